"""Forget-Me-Not's attention stage against a torch transcription of its equation; tokens, draws and settings by hand."""

import copy
from collections import Counter
from functools import cache
from typing import Any

import ablating_oracle
import diffusers
import esd_oracle
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch_oracle
from ablating_world import Studio, run_end_to_end
from attention_oracle import ByHand
from esd_world import SCHEDULE, SHAPE, World, as_ours, toy_network, world
from esd_world import tools as world_tools
from factories import make_tokenizer
from messages import one_line
from puppet import RATE, Puppet, Scripted
from torch_oracle import error, exactly, to_nchw, to_nhwc
from words import BOTH, tokens

import esd_jax
from esd_jax.erasing.method import Models
from esd_jax.methods import forget_me_not
from esd_jax.methods.forget_me_not import ForgetMeNot, resteered
from esd_jax.params import combine, partition
from esd_jax.selection import select
from esd_jax.text import Tokenizer
from esd_jax.training.step import Optimizer, init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2
# M of "of {concept} of" and of "the {concept}", for each concept: start, the prompt, an end, and padding with the end.
COLUMNS = {
    "first": [[[2, 3, 5], [2, 3, 4]], [[2, 4], [2, 3]]],
    "all": [[[2, 3, 5, 6], [2, 3, 4, 5, 6]], [[2, 4, 5, 6], [2, 3, 4, 5, 6]]],
    "none": [[[2, 3], [2, 3]], [[2], [2]]],
}
# All that comes after the last map in the tiny UNet.
LAST = "up_blocks.1.attentions.1"
BLIND = ("conv_out.", "conv_norm_out.", f"{LAST}.proj_out.") + tuple(
    f"{LAST}.transformer_blocks.0.{part}."
    for part in ("attn2.to_v", "attn2.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2")
)


def make(w: World, concepts: Any = BOTH, studio: Studio | None = None, **fields: Any) -> Any:
    studio = studio or Studio()
    parts = {name: fields.pop(name) for name in ("images", "tokens", "denoiser") if name in fields}
    tools = world_tools(w, **{"sample": studio.sample, "to_latents": studio.to_latents, "tokens": tokens, **parts})
    return ForgetMeNot(**{"template": "of {concept} of; the {concept}", "drawn_images": 3, **fields}).make(
        tools, concepts
    )


def given(dtype: str, seed: int = 0) -> forget_me_not.Draws:
    """Draws by hand: example i is of concept i."""
    rng = np.random.default_rng(seed)
    noise = jnp.asarray(rng.standard_normal((2, *SHAPE)).astype(dtype))
    image = jnp.asarray([[2, 1], [1, 0]][seed % 2])  # the first and second prompt, and the other way round
    return forget_me_not.Draws(jnp.asarray(rng.integers(0, 1000, 2)), jnp.arange(2), image, noise)


def watched(unet: torch.nn.Module) -> tuple[torch.nn.Module, list[ByHand]]:
    """A copy of a UNet, and what keeps the maps of its cross-attentions."""
    unet = copy.deepcopy(unet)
    plain = diffusers.models.attention_processor.AttnProcessor
    processors = {name: ByHand() if "attn2" in name else plain() for name in unet.attn_processors}
    unet.set_attn_processor(dict(processors))
    return unet, [p for p in processors.values() if isinstance(p, ByHand)]


def reference(models: esd_oracle.Models, student: Any, inputs: Any, draws: Any, columns: Any) -> tuple[Any, Any]:
    """(x_t, loss) in torch: one example after the other, as the released code has them, and their mean."""
    unet, processors = student
    noise, t = to_nchw(draws.noise), torch.tensor(np.asarray(draws.t))
    a = esd_oracle.ALPHA_BAR[t][:, None, None, None].to(noise.dtype)
    latents = to_nchw(np.asarray(inputs.images)[np.asarray(draws.concept), np.asarray(draws.image)])
    x, norms = a.sqrt() * latents + (1 - a).sqrt() * noise, []
    for i, (concept, image) in enumerate(zip(draws.concept.tolist(), draws.image.tolist(), strict=True)):
        text = BOTH[concept].text
        unet(x[i : i + 1], t[i], models.encode([[f"of {text} of", f"the {text}"][image % 2]]))
        norms.append(torch.cat([p.maps[..., columns[concept][image % 2]].flatten() for p in processors]).norm())
    return x, sum(norms) / len(norms)


@cache
def loss_and_gradient() -> Any:
    return jax.jit(jax.value_and_grad(make(world("unet", "float32"))[0].loss))


@pytest.mark.parametrize("eos_positions", ["first", "all", "none"])
def test_step_equals_torch(eos_positions):
    w, draws = world("unet", "float32"), given("float32")
    with exactly("float32"):
        method, inputs = make(w, eos_positions=eos_positions)
        batch = jax.jit(method.prepare)(Models(w.student, w.teacher), draws, inputs)
        loss, grads = loss_and_gradient()(w.student, batch)
    assert [[np.flatnonzero(row).tolist() for row in rows] for rows in inputs.columns] == COLUMNS[eos_positions]

    unet, processors = watched(w.models.student)
    unet.requires_grad_(True)
    x, expected = reference(w.models, (unet, processors), inputs, draws, COLUMNS[eos_positions])
    names, values = zip(*unet.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(expected, values, allow_unused=True), strict=True))
    assert len(processors) == len(method.layers) == 4
    assert np.abs(np.asarray(batch.x) - to_nhwc(x)).max() <= 1e-3
    assert error(loss, expected) <= 1e-4
    blind = {name for name in names if name.startswith(BLIND)}
    assert blind == {name for name, gradient in gradients.items() if gradient is None}
    assert blind == {name for name in names if not np.asarray(grads[f"unet/{name}"]).any()}
    errors = {n: error(grads[f"unet/{n}"], as_ours(w, n, g)) for n, g in gradients.items() if g is not None}
    assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if not e <= 1e-4}


@pytest.mark.parametrize(
    "subset, eos_positions", [("xattn", "all"), pytest.param("full", "first", marks=pytest.mark.slow)]
)
def test_five_steps_equal_torch(subset, eos_positions, monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    w = world("unet", "float64")
    student, processors = watched(w.models.teacher)
    names = select(subset, w.network.layouts)
    trained = [parameter.requires_grad_(True) for name, parameter in student.named_parameters() if name in names]
    adamw = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    with exactly("float64"):
        method, inputs = make(w, studio=Studio("float64"), eos_positions=eos_positions)
        theta_0, frozen = partition(w.teacher, [f"unet/{name}" for name in names])
        tx = Optimizer("adamw", RATE, weight_decay=0.01, max_grad_norm=1.0).transformation()
        step = make_step(Puppet(method), tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=2)
        state = init_state(theta_0, tx, seed=0)
        for seed in range(5):
            draws = given("float64", seed)
            state, metrics = step(state, theta_0, frozen, Scripted(inputs, draws))
            adamw.zero_grad()
            _, loss = reference(w.models, (student, processors), inputs, draws, COLUMNS[eos_positions])
            loss.backward()
            for parameter in trained:  # torch would leave what has no gradient without decay, too
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            ablating_oracle.clip(trained, 1.0)
            adamw.step()
            assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-9)
        assert step._cache_size() == 1

    result, final, errors = combine(frozen, state.theta), dict(student.named_parameters()), {}
    for name, before in w.models.teacher.named_parameters():
        ours, theirs = np.asarray(result[f"unet/{name}"]), as_ours(w, name, final[name])
        if name in names:
            change = theirs - as_ours(w, name, before)
            assert np.abs(change).max() > (0 if name.startswith(BLIND) else RATE)
            errors[name] = np.linalg.norm(ours - theirs) / np.linalg.norm(change)
        else:
            np.testing.assert_array_equal(ours, theirs)
    assert max(errors.values()) <= 1e-5, {n: e for n, e in errors.items() if not e <= 1e-5}


def test_everything_is_drawn_uniformly():
    method, inputs = make(world("unet", "float32"))
    keys = jax.random.split(jax.random.key(0), 20_001)
    draws = jax.jit(lambda keys: method.draw(0, keys[0], keys[1:], (1, 1, 1), inputs))(keys)
    pairs = list(zip(draws.concept.tolist(), draws.image.tolist(), strict=True))
    for values, size in ((pairs, 6), (draws.t.tolist(), 1000)):
        counts = Counter(values)
        assert len(counts) == size and scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert min(draws.t) == 0 and max(draws.t) == 999
    assert scipy.stats.kstest(np.ravel(draws.noise), "norm").pvalue > 1e-3


# Tokens


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokens_of_a_real_tokenizer(pad):
    tokenizer = Tokenizer(make_tokenizer(pad_token=pad), 77)
    ids = tokenizer(["a photo of a cat on a cat!"])[0]
    words = tokenizer.backend.convert_ids_to_tokens(ids)
    end = words.index("<|endoftext|>")
    cats = [i for i, word in enumerate(words) if word == "cat</w>"]
    assert len(cats) == 2 and words[:2] == ["<|startoftext|>", "a</w>"]

    def positions(concept, eos_positions="none"):
        return np.flatnonzero(resteered(tokenizer, "a photo of a cat on a cat!", concept, eos_positions)).tolist()

    assert positions("cat") == positions(" Cat ") == cats
    assert positions("a cat") == [cats[0] - 1, cats[0], cats[1] - 1, cats[1]]
    assert positions("cat", "first") == [*cats, end]
    assert positions("cat", "all") == ([*cats, end] if pad == "!" else [*cats, *range(end, 77)])
    for other in ("dog", "cat dog", "photo cat"):
        with pytest.raises(ValueError, match=one_line(repr(other), "not found", "template")):
            positions(other)


# Images


def test_what_is_drawn():
    studio = Studio()
    _, inputs = make(world("unet", "float32"), studio=studio, drawing_sampler="ddim", drawing_seed=4)
    prompts = ["of a cat of", "the a cat", "of a cat of", "of clay of", "the clay", "of clay of"]
    options = {"seed": 4, "steps": 50, "guidance_scale": 7.5, "sampler": "ddim"}
    assert studio.asked == [(prompts, options)]
    expected = studio.to_latents(Studio().sample(prompts)).reshape(2, 3, *SHAPE)
    np.testing.assert_array_equal(inputs.images, expected)


def test_images_may_be_given_or_left_out():
    w, studio = world("unet", "float32"), Studio()
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, *SHAPE)), jnp.float32)
    _, inputs = make(w, studio=studio, images=images)
    np.testing.assert_array_equal(inputs.images, [images, images])
    one = make(w, studio=studio, images=images[:1])[1].images
    np.testing.assert_array_equal(one, [images[jnp.zeros(2, int)]] * 2)  # one for each prompt
    method, inputs = make(w, studio=studio, no_images=True)
    assert inputs.images.shape == (2, 2, *SHAPE)
    draws = given("float32", seed=1)
    x = method.prepare(Models(w.student, w.teacher), draws, inputs).x
    spread = np.sqrt(1 - SCHEDULE.alpha_bar[np.asarray(draws.t)])[:, None, None, None]
    np.testing.assert_allclose(x, spread * draws.noise, rtol=1e-6)
    assert not studio.asked
    with pytest.raises(ValueError, match=one_line("no_images=True", "images are given")):
        make(w, images=images, no_images=True)


# From the checkpoint to the export


@pytest.mark.slow
def test_a_run_from_checkpoint_to_export(tmp_path):
    """With both stages."""
    factories.make_sd1(tmp_path / "base")
    fields = {
        "config": "emoji_forget_me_not", "subset": "xattn", "batch_size": 2, "template": "a photo of {concept}",
        "drawn_images": 2, "drawing_steps": 2, "inversion_steps": 2, "inversion_tokens": "cat|<rand-1>",
    }  # fmt: skip
    run_end_to_end(esd_jax.load(tmp_path / "base"), tmp_path / "run", "the cat", fields)


@pytest.mark.slow
@pytest.mark.parametrize("inversion_steps", [0, 2])
def test_the_embedded_model_forgets(inversion_steps, tmp_path):
    fields = {"steps": 2, "drawn_images": 2, "drawing_steps": 2, "inversion_steps": inversion_steps}
    folder = tmp_path / "run"
    erased = esd_jax.erase("emoji", "neon style", method="forget_me_not", output_dir=folder, **fields)
    (erasure,) = esd_jax.load(folder / "model").provenance.erased
    assert erasure.recipe["method"] == "forget_me_not" and all("attn2" in name for name in erased.edits)
    assert all(np.isfinite(value).all() for value in erased.edits.values())


# What is refused, and what it costs


def test_settings_that_are_wrong_are_refused():
    with pytest.raises(ValueError, match=one_line("eos_positions='nonsense'", *ForgetMeNot.CHOICES["eos_positions"])):
        ForgetMeNot(eos_positions="nonsense")
    with pytest.raises(ValueError, match=one_line("drawing_sampler='nonsense'", "ddim")):
        ForgetMeNot(drawing_sampler="nonsense")
    for template in ("a photo", "a photo of {concept};"):
        with pytest.raises(ValueError, match=one_line(f"template={template!r}", "{concept}")):
            ForgetMeNot(template=template)
    for field, value in {"drawn_images": 0, "drawing_steps": 0, "inversion_steps": -1}.items():
        with pytest.raises(ValueError, match=one_line(f"{field}={value}", f"at least {value + 1}")):
            ForgetMeNot(**{field: value})
    with pytest.raises(ValueError, match=one_line("inversion_learning_rate=0.0", "positive")):
        ForgetMeNot(inversion_learning_rate=0.0)
    with pytest.raises(ValueError, match=one_line("inversion_steps=5", "no_images=True")):
        ForgetMeNot(inversion_steps=5, no_images=True)
    with pytest.raises(ValueError, match=one_line("no cross-attention")):
        make(world("unet", "float32"), denoiser=toy_network())
    with pytest.raises(ValueError, match=one_line("no concept")):
        make(world("unet", "float32"), ())
