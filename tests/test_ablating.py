"""Ablating Concepts against its torch transcription (`ablating_oracle.py`); its captions, views and draws by hand."""

import dataclasses
import json
from collections import Counter
from functools import cache
from typing import Any

import ablating_oracle
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch_oracle
from ablating_oracle import Noised
from esd_world import SCHEDULE, SHAPE, TOKENS, as_ours, toy_network, world
from esd_world import tools as world_tools
from esd_world import toy as toy_apply
from messages import one_line
from test_step import RATE, Puppet, Scripted
from torch_oracle import error, exactly, to_nchw, to_nhwc

import esd_jax
from esd_jax import api, recipe, runs
from esd_jax.diffusion.path import to_x0_eps
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.images import true_output
from esd_jax.erasing.method import Models
from esd_jax.methods import ablating, anchors
from esd_jax.methods.ablating import Ablating
from esd_jax.models.unet import Conditioning
from esd_jax.params import Network, combine, partition
from esd_jax.selection import select
from esd_jax.training.step import Optimizer, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

CAT, ROBOT = Concept("grumpy cat", replace_with=("cat",)), Concept("R2D2", replace_with=("robot",))
PROMPTS = "a cat; a robot on a chair; the cat and the robot"
CELL = 2  # pixels a latent
OBJECT = {"kind": "object", "prior_weight": 0.2, "drawn_images": 3, "views": 2, "anchor_prompts": PROMPTS}


class Studio:
    """What draws and encodes images in place of a checkpoint, and remembers what it was asked."""

    def __init__(self, dtype: str = "float32"):
        self.dtype, self.asked = dtype, []

    def sample(self, prompts, **options):
        self.asked.append((prompts, options))
        rng = np.random.default_rng(len(self.asked))
        return rng.integers(0, 256, (len(prompts), CELL * SHAPE[0], CELL * SHAPE[1], 3), np.uint8)

    def to_latents(self, images):
        assert images.dtype == np.uint8 and len(images) <= 8
        cells = images.reshape(len(images), SHAPE[0], CELL, SHAPE[1], CELL, 3).astype(self.dtype).mean((2, 4)) / 64 - 2
        return jnp.asarray(np.concatenate([cells, cells[..., :1] * cells[..., 1:2]], axis=-1))


def make(w: Any, concepts: Any = (CAT, ROBOT), studio: Studio | None = None, **fields: Any) -> Any:
    studio = studio or Studio()
    tools = world_tools(w, sample=studio.sample, to_latents=studio.to_latents, images=fields.pop("images", None))
    return Ablating(**fields).make(tools, concepts)


def given(method: ablating.Method, inputs: ablating.Inputs, dtype: str, seed: int = 0) -> ablating.Draws:
    """Draws by hand: example i ablates concept i."""
    rng = np.random.default_rng(seed)
    whole = lambda most: jnp.asarray(rng.integers(0, most, 2))  # noqa: E731
    _, views, captions = inputs.target.shape
    noised = lambda: (whole(views), whole(1000), jnp.asarray(rng.standard_normal((2, *SHAPE)).astype(dtype)))  # noqa: E731
    (image, t, noise), prior = noised(), noised() if method.settings.prior_weight else None
    return ablating.Draws(t, jnp.arange(2) % len(inputs.target), image, whole(captions), noise, prior)


def noised(inputs: ablating.Inputs, concept: Any, image: Any, t: Any, noise: Any, texts: list[str]) -> Noised:
    where = np.asarray(inputs.image)[np.asarray(concept), np.asarray(image)]
    latents, mask = np.asarray(inputs.latents)[where], np.asarray(inputs.masks)[where].astype(noise.dtype)
    return Noised(to_nchw(latents), to_nchw(mask), torch.tensor(np.asarray(t)), to_nchw(noise), texts)


def reference(w: Any, method: ablating.Method, inputs: ablating.Inputs, draws: ablating.Draws, texts: Any) -> Any:
    """(what is ablated, the anchor's captions, the prior's examples) in torch. texts: row -> caption."""
    say = lambda rows: [texts[int(row)] for row in rows]  # noqa: E731
    concept = draws.concept
    ablated = noised(inputs, concept, draws.image, draws.t, draws.noise,
                     say(inputs.target[concept, draws.image, draws.caption]))  # fmt: skip
    prior = None
    if draws.prior is not None:
        prior = noised(inputs, concept, *draws.prior, say(inputs.anchor[concept, draws.prior[0]]))
    return ablated, say(inputs.anchor[concept, draws.image]), prior


def recorded(w: Any) -> tuple[Any, list[str]]:
    """The world, and the texts that it encodes from here on, in the order of their rows."""
    texts: list[str] = []

    def encode(batch):
        texts.extend(batch)
        return w.encode(batch)

    return w._replace(encode=encode), texts


def rows_of(texts: list[str], concepts: Any) -> list[str]:
    return texts[len(concepts) :]  # the concepts alone are encoded first, to see that they fit


@cache
def loss_and_gradient() -> Any:
    method, _ = make(world("unet", "float32"), **OBJECT)
    return jax.jit(jax.value_and_grad(method.loss))


@pytest.mark.parametrize("objective, target_from", [("model", "student"), ("model", "base"), ("noise", "student")])
def test_step_equals_torch(objective, target_from):
    with exactly("float32"):
        w, texts = recorded(world("unet", "float32"))
        fields = OBJECT | {"objective": objective, "target_from": target_from, "resize": True, "prior_weight": 0.3}
        method, inputs = make(w, **fields)
        draws = given(method, inputs, "float32")
        batch = jax.jit(method.prepare)(Models(w.student, w.teacher), draws, inputs)
        loss, grads = loss_and_gradient()(w.student, batch)

    ablated, anchor, prior = reference(w, method, inputs, draws, rows_of(texts, (CAT, ROBOT)))
    assert not ablated.mask.all() and prior.mask.sum() > 0
    by = {"student": w.models.student, "base": w.models.teacher}[target_from] if objective == "model" else None
    target = ablating_oracle.target(w.models, by, ablated, anchor)
    assert np.abs(np.asarray(batch.ablated.x) - to_nhwc(ablated.x)).max() <= 1e-3
    assert np.abs(np.asarray(batch.prior.x) - to_nhwc(prior.x)).max() <= 1e-3
    assert error(batch.ablated.target, to_nhwc(target)) <= 1e-4

    gradients = {}
    for first in (True, False):
        student = ablating_oracle.detaching(w.models.student, TOKENS, first).requires_grad_(True)
        expected = ablating_oracle.loss(w.models, student, ablated, target, prior, 0.3)
        names, values = zip(*student.named_parameters(), strict=True)
        gradients[first] = dict(zip(names, torch.autograd.grad(expected, values), strict=True))
    assert error(loss, expected) <= 1e-4
    errors = {n: error(grads[f"unet/{n}"], as_ours(w, n, g)) for n, g in gradients[True].items()}
    assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if not e <= 1e-4}
    assert all(np.asarray(g).any() for g in grads.values())
    keys = [n for n in names if "attn2.to_k" in n or "attn2.to_v" in n]
    assert min(error(gradients[False][n], gradients[True][n]) for n in keys) > 1e-2  # the first token would be seen


@pytest.mark.parametrize(
    "preset, fields",
    [
        ("style", {}),
        pytest.param("object", {"prior_weight": 0.25}, marks=pytest.mark.slow),
        pytest.param("memorised", {"detach_bos": False}, marks=pytest.mark.slow),
        pytest.param("nudity", {"objective": "noise"}, marks=pytest.mark.slow),
    ],
)
def test_five_steps_equal_torch(preset, fields, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    known = {f.name for f in dataclasses.fields(Ablating)}
    chosen = Ablating.PRESETS[preset] | fields | {"drawn_images": 3, "views": 2}
    settings = {name: value for name, value in chosen.items() if name in known}
    clip = chosen.get("max_grad_norm")
    with exactly("float64"):
        w, texts = recorded(world("unet", "float64"))
        method, inputs = make(w, studio=Studio("float64"), **settings)
        student = ablating_oracle.detaching(w.models.teacher, TOKENS, settings.get("detach_bos", True))
        names = select(chosen["subset"], w.network.layouts)
        trained = [parameter.requires_grad_(True) for name, parameter in student.named_parameters() if name in names]
        adamw = torch.optim.AdamW(trained, lr=RATE, weight_decay=chosen["weight_decay"])

        theta_0, frozen = partition(w.teacher, [f"unet/{name}" for name in names])
        optimizer = Optimizer("adamw", RATE, weight_decay=chosen["weight_decay"], max_grad_norm=clip)
        tx = optimizer.transformation()
        step = make_step(Puppet(method), tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=2)
        state = init_state(theta_0, tx, seed=0)
        for seed in range(5):
            draws = given(method, inputs, "float64", seed)
            state, metrics = step(state, theta_0, frozen, Scripted(inputs, draws))

            ablated, anchor, prior = reference(w, method, inputs, draws, rows_of(texts, (CAT, ROBOT)))
            by = student if method.settings.objective == "model" else None
            target = ablating_oracle.target(w.models, by, ablated, anchor)
            adamw.zero_grad()
            weight = float(inputs.prior_weight)  # float32, so 0.2 is a little more
            loss = ablating_oracle.loss(w.models, student, ablated, target, prior, weight)
            loss.backward()
            if clip is not None:
                ablating_oracle.clip(trained, clip)
            adamw.step()
            assert float(metrics.t) == draws.t.mean()
            assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-9)
        assert step._cache_size() == 1

    result, final, changes, errors = combine(frozen, state.theta), dict(student.named_parameters()), [], {}
    for name, before in w.models.teacher.named_parameters():
        ours, theirs = np.asarray(result[f"unet/{name}"]), as_ours(w, name, final[name])
        if name in names:
            change = theirs - as_ours(w, name, before)
            changes.append(np.abs(change).max())
            errors[name] = np.linalg.norm(ours - theirs) / np.linalg.norm(change)
        else:
            np.testing.assert_array_equal(ours, theirs)
    assert min(changes) > RATE and max(errors.values()) <= 1e-5, {n: e for n, e in errors.items() if not e <= 1e-5}


def small(dtype: str = "float32") -> Any:
    """The toy, with a timestep for each example."""

    def apply(params, x, t, conditioning, *attention):
        one = lambda x, t, e: toy_apply(params, x[None], t, Conditioning(e[None]))[0]  # noqa: E731
        return jax.vmap(one)(x, t, conditioning.embeddings)

    w, net = world("toy", dtype), toy_network()
    return w._replace(network=Network(apply, net.shapes, net.layouts))


def test_one_compilation_serves_every_run():
    w, losses = small(), set()
    method, _ = make(w, (CAT,), **OBJECT)
    tx = Optimizer("adamw").transformation()
    step = make_step(method, tx, compute_dtype=jnp.float32, shape=SHAPE, batch_size=2)
    lapcat = dataclasses.replace(CAT, text="lap cat")
    for concept, seed, weight in [(CAT, 0, 0.2), (lapcat, 0, 0.2), (CAT, 1, 0.2), (CAT, 0, 0.7)]:
        _, inputs = make(w, (concept,), **OBJECT | {"prior_weight": weight, "anchor_prompts": "a cat; two cats"})
        state = init_state(w.teacher, tx, seed)
        for _ in range(2):
            state, metrics = step(state, w.teacher, {}, inputs)
        losses.add(float(metrics.loss))
    assert step._cache_size() == 1 and len(losses) == 4


def test_before_the_first_step_an_anchor_is_ablated_to_itself():
    w = small()
    method, inputs = make(w, (Concept("cat", replace_with=("cat",)),), kind="object", drawn_images=2)
    step = make_step(method, Optimizer().transformation(), compute_dtype=jnp.float32, shape=SHAPE, batch_size=2)
    state = init_state(w.teacher, Optimizer().transformation(), seed=0)
    assert step(state, w.teacher, {}, inputs)[1].loss < 1e-12


def test_everything_is_drawn_uniformly():
    method, inputs = make(small(), kind="style", prior_weight=1.0, drawn_images=3, views=2, anchor_prompts="a; b")
    keys = jax.random.split(jax.random.key(0), 20_001)
    draws = jax.jit(lambda keys: method.draw(0, keys[0], keys[1:], (1, 1, 1), inputs))(keys)
    assert inputs.target.shape == (2, 6, 6)
    triples = list(zip(draws.concept.tolist(), draws.image.tolist(), draws.caption.tolist(), strict=True))
    for values, size in ((triples, 72), (draws.prior[0].tolist(), 6), (draws.t.tolist(), 1000),
                         (draws.prior[1].tolist(), 1000)):  # fmt: skip
        counts = Counter(values)
        assert len(counts) == size and scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert min(draws.t) == 0 and max(draws.t) == 999
    for noise in (draws.noise, draws.prior[2]):
        assert scipy.stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(np.ravel(draws.noise), np.ravel(draws.prior[2]))[0, 1]) < 0.03
    method, inputs = make(small(), drawn_images=1)
    assert method.draw(0, keys[0], keys[1:3], (1, 1, 1), inputs).prior is None


# Captions


def test_captions_of_each_kind():
    style = Concept("Van Gogh", replace_with=("painting",))
    twice = "Van Gogh Van Gogh"
    assert anchors.captions(style, "style", "a {tree}") == [
        "a {tree}, in the style of Van Gogh", f"a {{tree}}, in the style of {twice}",
        "Van Gogh inspired painting, a {tree}", f"{twice} inspired painting, a {{tree}}",
        "in Van Gogh's style, a {tree}", f"in {twice}'s style, a {{tree}}",
    ]  # fmt: skip
    assert anchors.captions(CAT, "object", "A Cat, two cats, a cathedral", "very small ") == [
        "very small A grumpy cat, two grumpy cats, a cathedral"
    ]
    nude = Concept("nudity, nsfw", replace_with=("people",))
    assert anchors.captions(nude, "nudity", "people") == [
        "nudity, nsfw, people", "in nudity, nsfw style, people", "people, nudity, nsfw",
    ]  # fmt: skip
    house = Concept("New Orleans House", replace_with=("house",))
    assert anchors.captions(house, "memorised", "a house in a city", "close up ") == ["close up New Orleans House"]


def test_prompts_come_as_texts_or_from_a_file(tmp_path):
    assert anchors.read_prompts(None) == [] and anchors.read_prompts(" a; b, c ;") == ["a", "b, c"]
    file = tmp_path / "cats.txt"
    file.write_text("a cat; a mat\n\n two cats \n")
    assert anchors.read_prompts(str(file)) == ["a cat; a mat", "two cats"]
    assert anchors.prompts_of(CAT, "object", []) == ["cat"]
    assert anchors.prompts_of(CAT, "object", ["a Cat", "a dog"]) == ["a Cat"]
    assert anchors.prompts_of(CAT, "style", ["a Cat", "a dog"]) == ["a Cat", "a dog"]
    assert anchors.prompts_of(CAT, "object", ["{anchor} on a {anchor}", "a dog"]) == ["cat on a cat"]
    with pytest.raises(ValueError, match=one_line("anchor_prompts", "none.txt", "No such file")):
        anchors.read_prompts(str(tmp_path / "none.txt"))
    file.write_text("\n")
    for empty in (str(file), " ; "):
        with pytest.raises(ValueError, match=one_line("anchor_prompts", "no prompt")):
            anchors.read_prompts(empty)


def test_what_is_drawn_and_encoded():
    studio, (w, texts) = Studio(), recorded(small())
    method, inputs = make(w, studio=studio, **OBJECT | {"flip": False, "drawing_seed": 5})
    options = {"seed": 5, "num_steps": 25, "guidance_scale": 6.0, "sampler": "dpmpp_2m", "negative_prompt": None}
    both = "the cat and the robot"
    assert studio.asked == [
        (["a cat", both, "a cat"], options),
        (["a robot on a chair", both, "a robot on a chair"], options),
    ]
    rows = rows_of(texts, (CAT, ROBOT))
    say = lambda index: [rows[row] for row in index]  # noqa: E731
    assert len(rows) == len(set(rows)) == len(inputs.rows.embeddings)
    assert say(inputs.anchor[0]) == ["a cat"] * 2 + [both] * 2 + ["a cat"] * 2
    assert (
        say(inputs.target[0, :, 0])
        == ["a grumpy cat"] * 2 + ["the grumpy cat and the robot"] * 2 + ["a grumpy cat"] * 2
    )
    assert say(inputs.target[1, :, 0])[::2] == ["a R2D2 on a chair", "the cat and the R2D2", "a R2D2 on a chair"]
    np.testing.assert_array_equal(inputs.rows.embeddings, w.encode(rows).embeddings)
    assert inputs.image.tolist() == [[*range(6)], [*range(6, 12)]] and (inputs.masks == 1).all()
    np.testing.assert_array_equal(inputs.latents[6::2], studio.to_latents(second_images(studio, 2)))
    np.testing.assert_array_equal(inputs.latents[6::2], inputs.latents[7::2])


def second_images(studio: Studio, number: int) -> np.ndarray:
    """What a studio drew the number-th time it was asked."""
    other = Studio()
    return [other.sample(*studio.asked[i][:1]) for i in range(number)][-1]


def test_concepts_with_equal_prompts_share_images_unless_they_are_kept_off_them():
    concepts = [Concept(text, replace_with=("painting",)) for text in ("Van Gogh", "Monet")]
    studio = Studio()
    _, inputs = make(small(), concepts, studio, drawn_images=2, views=1, anchor_prompts="a tree; a sea")
    assert len(studio.asked) == 1 and inputs.image.tolist() == [[0, 1], [0, 1]]
    nudity = [Concept(text, replace_with=("people",)) for text in ("nudity", "nsfw")]
    make(small(), nudity, studio, kind="nudity", drawn_images=2)
    assert [options["negative_prompt"] for _, options in studio.asked] == [None, "nudity", "nsfw"]


def test_given_images_are_the_anchors():
    images = jnp.asarray(np.random.default_rng(0).standard_normal((3, *SHAPE)), jnp.float32)
    studio, (w, texts) = Studio(), recorded(small())
    method, inputs = make(w, (CAT,), studio, images=images, kind="object", anchor_prompts="a cat; two cats; cats")
    assert not studio.asked and [rows_of(texts, [CAT])[i] for i in inputs.anchor[0]] == ["a cat", "two cats", "cats"]
    np.testing.assert_array_equal(inputs.latents, images)
    assert inputs.image.tolist() == [[0, 1, 2]] and inputs.masks.shape == (3, 8, 8, 1) and (inputs.masks == 1).all()
    with pytest.raises(ValueError, match=one_line("resize=True", "resize=False", "images")):
        make(w, (CAT,), images=images, resize=True)
    with pytest.raises(ValueError, match=one_line("anchor_prompts", "anchor", "images")):
        make(w, (CAT,), images=images, kind="object", anchor_prompts="a cat; a dog")


# Views


def test_views_show_the_image_and_masks_lie_within():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    assert (anchors.View(0, 16, 24).pixels(image) == image).all()
    assert (anchors.View(0, 16, 24, flip=True).pixels(image) == image[:, ::-1]).all()
    assert (anchors.View(0, 16, 24).mask(16, 24, 2) == 1).all()

    plain = np.full((16, 24, 3), 7, np.uint8)
    small = anchors.View(0, 9, 13, top=3, left=4)
    inside = np.zeros((16, 24), bool)
    inside[3:12, 4:17] = True
    assert (small.pixels(plain) == np.where(inside, 7, anchors.GREY)[..., None]).all()
    mask = small.mask(16, 24, 2)[..., 0]
    assert mask.shape == (8, 12) and mask[2:5, 3:7].all() and mask.sum() == 12
    shown = np.kron(mask, np.ones((2, 2)))
    assert inside[shown > 0].all()

    scaled = np.asarray(anchors.Image.fromarray(image).resize((30, 20), anchors.Image.Resampling.LANCZOS))
    large = anchors.View(0, 20, 30, top=3, left=5)
    assert (large.pixels(image) == scaled[3:19, 5:29]).all() and (large.mask(16, 24, 2) == 1).all()


@pytest.mark.parametrize("size, cell", [((512, 512), 8), ((64, 96), 4), ((16, 16), 2), ((8, 8), 4)])
def test_views_are_drawn_as_published(size, cell):
    rng = np.random.default_rng(0)
    views = [anchors.draw_view(rng, 1, size, cell, resize=True, flip=True) for _ in range(3000)]
    shrunk = [v for v in views if v.height <= size[0]]
    assert scipy.stats.binomtest(len(shrunk), 3000, 2 / 3).pvalue > 1e-3
    assert scipy.stats.binomtest(sum(v.flip for v in views), 3000, 1 / 2).pvalue > 1e-3
    for view in views:
        assert abs(view.top) <= abs(size[0] - view.height) and view.left <= abs(size[1] - view.width)
        if view.height > size[0]:
            assert 1.2 * size[0] - 1 <= view.height <= 1.4 * size[0] + 1 and view.prefix in anchors.NEAR
        if cell == 8 and view.height != 307:  # 0.6 of 512 is 307.2
            assert view.height >= 170 and (view.prefix in anchors.FAR) == (view.height < 307)
    assert min(v.mask(*size, cell).sum() for v in views[:300]) >= 1
    if cell == 8:
        assert {v.prefix for v in views} == {*anchors.FAR, *anchors.NEAR, ""}
        heights = [v.height for v in shrunk]
        assert scipy.stats.kstest(heights, "uniform", (512 / 3, 512 * 2 / 3)).pvalue > 1e-3
    still = [anchors.draw_view(rng, 1, size, cell, resize=False, flip=False) for _ in range(9)]
    assert still == [anchors.View(1, *size)] * 9


def test_resizing_changes_captions_and_masks_together():
    w, texts = recorded(small())
    _, inputs = make(w, (CAT,), kind="object", resize=True, drawn_images=8, views=8)
    rows = rows_of(texts, [CAT])
    pairs = [
        (rows[a], rows[t]) for a, t in zip(inputs.anchor[0].tolist(), inputs.target[0, :, 0].tolist(), strict=True)
    ]
    assert {a for a, _ in pairs} == {f"{p}cat" for p in (*anchors.FAR, *anchors.NEAR, "")}
    for (anchor, target), mask in zip(pairs, np.asarray(inputs.masks)[..., 0], strict=True):
        assert target == anchor.replace("cat", "grumpy cat")
        assert mask.sum() >= 1 and (mask.all() or not anchor.startswith(anchors.NEAR))


# What the noise-based losses ask for


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_true_output_gives_back_image_and_noise(prediction_type):
    schedule = Schedule.from_config({**SCHEDULE.config, "prediction_type": prediction_type})
    rng = np.random.default_rng(0)
    with exactly("float64"):
        image, noise = (jnp.asarray(rng.standard_normal((1, *SHAPE))) for _ in range(2))
        t = jnp.array([700])
        x = add_noise(schedule, image, noise, t)
        output = true_output(schedule, image, noise, t)
        for ours, theirs in zip(
            to_x0_eps(prediction_type, schedule.alpha_bar[700], x, output), (image, noise), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


# From the checkpoint to the export


def run_end_to_end(base: Any, folder: Any, text: str, fields: dict[str, Any]) -> Any:
    """Two updates, and a third after resuming: log, previews, checkpoints, exports. Returns what was erased."""
    fields = {"steps": 3, "checkpoint_every": 1, "preview_every": 2, "preview_steps": 2, **fields}
    esd_jax.erase(base, text, output_dir=folder, **{**fields, "steps": 2})
    resumed = esd_jax.erase(base, text, output_dir=folder, resume=True, **fields)
    names = {f"unet/{name}" for name in select(fields["subset"], base.network("unet").layouts)}
    assert resumed.edits.keys() == names
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert [file.name for file in sorted((folder / "previews").iterdir())] == [f"step_{i:06d}.png" for i in (0, 2, 3)]
    assert len(list(folder.glob("esd-*.safetensors"))) == 1
    restored, exported = api.restore(folder), esd_jax.load(folder / "model")
    for name, value in resumed.edits.items():
        tensor = name.removeprefix("unet/")
        np.testing.assert_array_equal(restored.edits[name], value)
        np.testing.assert_array_equal(exported.params["unet"][tensor], value)
        assert 0 < np.abs(value - base.params["unet"][tensor]).max() < 0.1
    return resumed


@pytest.mark.slow
def test_a_run_from_checkpoint_to_export(tmp_path):
    factories.make_sd1(tmp_path / "base")
    base = esd_jax.load(tmp_path / "base")
    fields = {
        "config": "emoji_ablating", "replace_with": "the dog", "subset": "kv", "prior_weight": 0.2, "batch_size": 2,
        "drawn_images": 2, "drawing_steps": 2, "anchor_prompts": "a photo of {anchor}; {anchor}",
    }  # fmt: skip
    resumed = run_end_to_end(base, tmp_path / "run", "the cat", fields)
    at_once = esd_jax.erase(base, "the cat", **fields, steps=3)
    for name, value in at_once.edits.items():
        np.testing.assert_array_equal(resumed.edits[name], value)

    plan = recipe.make(**{**recipe.read(fields.pop("config")).to_dict(), **fields, "concept": "the cat"})
    made = runs.assemble(base, plan)
    drawn = esd_jax.sample(base, ["a photo of the dog", "the dog"], num_steps=2, guidance_scale=3.0, sampler="ddim")
    np.testing.assert_allclose(made.inputs.latents, jax.jit(base.encode)(drawn / np.float32(127.5) - 1), atol=1e-5)
    assert made.inputs.latents.shape == (2, *made.shape)


@pytest.mark.slow
def test_the_embedded_model_is_ablated(tmp_path):
    fields = {"steps": 2, "drawn_images": 2, "drawing_steps": 2, "batch_size": 2}
    folder = tmp_path / "run"
    erased = esd_jax.erase(
        "emoji", "neon style", method="ablating", replace_with="clay style", output_dir=folder, **fields
    )
    (erasure,) = esd_jax.load(folder / "model").provenance.erased
    assert erasure.recipe["method"] == "ablating" and erasure.concepts[0].replace_with == ("clay style",)
    assert all(np.isfinite(value).all() for value in erased.edits.values())


# What is refused, and what it costs


@pytest.mark.parametrize("concept", [Concept("a cat"), Concept("a cat", replace_with=("dog", "cow"))])
def test_a_concept_needs_one_anchor(concept):
    studio = Studio()
    with pytest.raises(ValueError, match=one_line("ablating 'a cat'", "replace_with", len(concept.replace_with))):
        make(small(), (CAT, concept), studio)
    assert not studio.asked


def test_settings_that_are_wrong_are_refused():
    for field, choices in Ablating.CHOICES.items():
        with pytest.raises(ValueError, match=one_line(f"{field}='nonsense'", *choices)):
            Ablating(**{field: "nonsense"})
    for field, value in {"views": 0, "drawn_images": 0, "drawing_steps": 0, "prior_weight": -0.1}.items():
        with pytest.raises(ValueError, match=one_line(f"{field}={value}", "at least")):
            Ablating(**{field: value})
    with pytest.raises(ValueError, match=one_line("'robot'", "'R2D2'", "anchor_prompts")):
        make(small(), kind="object", anchor_prompts="a cat")
    with pytest.raises(ValueError, match=one_line("no concept")):
        make(small(), ())
