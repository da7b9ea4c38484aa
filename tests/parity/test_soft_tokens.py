"""New tokens of several text encoders: encodings and gradients against torch, whose tables have rows for them."""

import copy
import dataclasses
from functools import partial

import factories
import flow_factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from attacked import goal
from torch_oracle import error, to_nchw

import esd_jax
from esd_jax import recipe, sharding
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.method import Models, Session
from esd_jax.erasing.textual_inversion import Fixed, each
from esd_jax.evaluation.attacks import adversary, attack, preset
from esd_jax.methods import stereo
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.params import functional, initial, prefixed
from esd_jax.runs.setup import make_tools
from esd_jax.training.step import blank_memory

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

NEW, TEMPLATES = 2, ("a photo of {concept} on the cat", "{concept}")
STARTS = "<rand-0.3>|<rand-0.2>"


def grown(encoder, new):
    """A text encoder with the new embeddings below its table; returns the table, whose gradient has their rows."""
    encoder.resize_token_embeddings(encoder.get_input_embeddings().num_embeddings + NEW, mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-NEW:] = torch.tensor(np.asarray(new))
    return table


def encoded(encoders, ids):
    """What diffusers' SDXL reads of prompts: both embeddings side by side, and the pooled vector."""
    outputs = [e(i, output_hidden_states=True) for e, i in zip(encoders, torch_ids(ids), strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


def inversion_loss(pipe, encoders, schedule, ids, latents, t, noise):
    """The loss of textual inversion in torch."""
    embeddings, pooled = encoded(encoders, ids)
    alpha = torch.tensor(schedule.alpha_bar[np.asarray(t)], dtype=torch.float32)[:, None, None, None]
    clean, noise = (to_nchw(np.asarray(a)) for a in (latents, noise))
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(clean))
    e = pipe.unet(
        alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, torch.tensor(np.asarray(t)), embeddings,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    ).sample  # fmt: skip
    return torch.nn.functional.mse_loss(e, noise)


def torch_ids(ids):
    return [torch.tensor(rows).long() for rows in each(ids)]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sdxl"
    return factories.make_sdxl(folder), esd_jax.load(folder)


def test_the_gradient_reaches_the_tokens_of_both_text_encoders(sdxl):
    """The loss of Concept Inversion, as diffusers' SDXL has it: both embeddings, the pooled vector, the sizes."""
    pipe, base = sdxl
    text = adversary.text_of(base)
    ids, new = adversary.stacked([text.place(t, NEW) for t in TEMPLATES]), text.initial(STARTS, jax.random.key(1))
    assert len(new) == 2 and [rows.shape for rows in new] == [(NEW, factories.WIDTH)] * 2
    rng, t = np.random.default_rng(0), np.array([900, 120])
    x0, noise = (jnp.asarray(rng.standard_normal((2, 8, 8, 4)), jnp.float32) for _ in range(2))
    batch = textual_inversion.noised(base.schedule, x0, jax.tree.map(jnp.asarray, ids), jnp.asarray(t), noise)
    network, weights = adversary.denoiser(base)
    objective = lambda new: textual_inversion.loss(network, text.encoder, new, batch, Fixed(weights, text.params))  # noqa: E731
    ours, gradients = jax.jit(jax.value_and_grad(objective))(new)

    encoders = copy.deepcopy((pipe.text_encoder, pipe.text_encoder_2))
    tables = [grown(encoder, rows) for encoder, rows in zip(encoders, new, strict=True)]
    loss = inversion_loss(pipe, encoders, base.schedule, ids, x0, t, noise)
    loss.backward()
    assert float(ours) == pytest.approx(loss.item(), rel=1e-4)
    for gradient, table in zip(gradients, tables, strict=True):
        wanted = table.grad[-NEW:].numpy()
        assert np.abs(wanted).max() > 1e-5 and error(gradient, wanted) <= 1e-3


def test_a_round_of_stereo_learns_tokens_of_both_text_encoders(sdxl):
    """As torch's AdamW does; the texts that are erased next have the tokens' embeddings, and the pooled vector."""
    pipe, base = sdxl
    fields = {"search_rounds": 1, "search_updates": 1, "inversion_steps": 3, "inversion_tokens": STARTS,
              "template": ";".join(TEMPLATES), "drawn_images": 2, "steps": 2}  # fmt: skip
    plan = recipe.make(method="stereo", concept="cat", dtype="float32", **fields)
    images = jax.random.normal(jax.random.key(4), (2, 8, 8, 4))
    tools = dataclasses.replace(
        make_tools(base, plan, sharding.make_mesh(1)), sample=lambda prompts, **_: prompts, to_latents=lambda _: images
    )
    method, inputs = plan.settings.make(tools, plan.concepts)
    assert [rows.shape for rows in inputs.start] == [(NEW, factories.WIDTH)] * 2
    unet, key = prefixed(base.params["unet"], "unet"), jax.random.key(5)
    session = Session(1, key, lambda: Models(unet, unet), lambda tree: tree)
    memory = blank_memory(method, tools.shape, 1)
    interval = method.between(session, memory, inputs)

    encoders = copy.deepcopy((pipe.text_encoder, pipe.text_encoder_2))
    tables = [grown(encoder, rows) for encoder, rows in zip(encoders, inputs.start, strict=True)]
    alone, prompts = ([rows[part] for rows in inputs.ids] for part in (slice(1), slice(1, None)))
    with torch.no_grad():
        before = encoded(encoders, tuple(alone))
    new = [torch.tensor(np.asarray(rows)) for rows in inputs.start]
    adamw = torch.optim.AdamW(new, lr=5e-3, weight_decay=1e-2)
    key = jax.random.fold_in(jax.random.fold_in(key, stereo.SEARCH + 1), 0)
    latents = jnp.repeat(images, 2, axis=0)  # each with both templates
    for step in range(3):
        image, t, noise = textual_inversion.draw(jax.random.fold_in(key, step), 1, base.schedule, latents)
        ids = tuple(rows[image % 2] for rows in prompts)
        loss = inversion_loss(pipe, encoders, base.schedule, ids, latents[image], t, noise)
        loss.backward()
        for rows, table in zip(new, tables, strict=True):
            rows.grad, table.grad = table.grad[-NEW:], None
        adamw.step()
        with torch.no_grad():
            for rows, table in zip(new, tables, strict=True):
                table[-NEW:] = rows
    assert interval.record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    with torch.no_grad():
        wanted = encoded(encoders, tuple(alone))
    texts = interval.memory.texts
    for ours, theirs, start in zip((texts.embeddings, texts.pooled), wanted, before, strict=True):
        change = theirs[0] - start[0]
        assert change.abs().max() > 0.05 and error(np.asarray(ours[0, 0, 0, 0]) - start[0].numpy(), change) <= 1e-4
    np.testing.assert_array_equal(texts.time_ids[0, 0, 0, 0], [16, 16, 0, 0, 16, 16])


def test_a_new_token_is_not_taken_for_the_end_of_a_prompt():
    """Where the end is the largest id (`eos_token_id` 2, as SDXL's files have it), a new token's is larger."""
    config = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "max_position_embeddings": 6, "eos_token_id": 2}  # fmt: skip
    network = functional(lambda: CLIPTextModel(CLIPTextConfig(**config)))
    params = initial(lambda: CLIPTextModel(CLIPTextConfig(**config)))
    encoder = textual_inversion.Encoder(network, lambda outputs: outputs[0].pooled)
    new = jax.random.normal(jax.random.key(0), (1, 8))
    encode = jax.jit(partial(textual_inversion.encode, encoder))
    known = encode(params, jnp.array([[0, 3, 4, 8, 8, 8]]), new)
    whole = {**params, textual_inversion.TABLE: params[textual_inversion.TABLE].at[5].set(new[0])}
    ours = encode(params, jnp.array([[0, 9, 4, 8, 8, 8]]), new)
    wanted = encode(whole, jnp.array([[0, 5, 4, 8, 8, 8]]), new)
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    assert np.abs(ours - known).max() > 1e-3


@pytest.mark.parametrize("make", [flow_factories.make_flux, flow_factories.make_sd3])
def test_new_tokens_of_clip_and_t5_are_encoded_as_torch_encodes_them(make, tmp_path):
    pipe = make(tmp_path / "base")
    base = esd_jax.load(tmp_path / "base")
    text = adversary.text_of(base)
    names = base.text_encoders
    ids, new = adversary.stacked([text.place(t, NEW) for t in TEMPLATES]), text.initial(STARTS, jax.random.key(2))
    assert len(new) == len(names) and new[-1].shape == (NEW, flow_factories.T5_WIDTH)
    rows = adversary.conditionings(base, ids, new)
    for name, own in zip(names, new, strict=True):
        grown(getattr(pipe, name), own)
    with torch.no_grad():
        outputs = [
            getattr(pipe, name)(rows, output_hidden_states=True)
            for name, rows in zip(names, torch_ids(ids), strict=True)
        ]
    t5 = outputs[-1].last_hidden_state
    ends = [(rows == factories.VOCAB_SIZE - 1).int().argmax(dim=1) for rows in torch_ids(ids)]
    # Not torch's own: where a config has the end token 2, it takes a new token for the end.
    pools = [output.last_hidden_state[torch.arange(2), end] for output, end in zip(outputs[:-1], ends, strict=False)]
    if make is flow_factories.make_flux:
        embeddings, pooled = t5, pools[0]
    else:
        clip = torch.cat([output.hidden_states[-2] for output in outputs[:2]], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        embeddings = torch.cat([clip, t5], dim=1)
        with torch.no_grad():
            pooled = torch.cat(
                [getattr(pipe, n).text_projection(own) for n, own in zip(names, pools, strict=False)], dim=-1
            )
    assert error(np.concatenate([row.embeddings for row in rows]), embeddings) <= 1e-4
    assert error(np.concatenate([row.pooled for row in rows]), pooled) <= 1e-4
    plain = adversary.conditionings(base, ids, jax.tree.map(jnp.zeros_like, new))
    assert np.abs(plain[0].embeddings - rows[0].embeddings).max() > 1e-2


def test_prompts_with_tokens_of_their_own_are_encoded_as_each_alone(sdxl):
    """As the updates of inversion rounds ask: each example has an adversary of its own."""
    _, base = sdxl
    text = adversary.text_of(base)
    ids = jax.tree.map(jnp.asarray, adversary.stacked([text.place(t, NEW) for t in TEMPLATES]))
    members = [text.initial(STARTS, jax.random.key(seed)) for seed in (3, 4)]
    encode = jax.jit(partial(textual_inversion.encode, text.encoder))
    both = encode(text.params, ids, jax.tree.map(lambda *rows: jnp.stack(rows), *members))
    for i, own in enumerate(members):
        alone = encode(text.params, ids, own)
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b[i], atol=1e-6)
    assert np.abs(both.pooled[0] - encode(text.params, ids, members[1]).pooled[0]).max() > 1e-3


AN_UPDATE = {"steps": 1, "learning_rate": 1e-3, "contexts": "photo of {}: photo"}
ROUNDS_OF = {
    "esd2025_sdxl": {"anchor": "auto", "sampling_steps": 4, "sampler": "ddim", "rounds_images": 1, "rounds_warm": 1},
    "sdxl_robust": {
        "retain": None, "preserve": "dog", "preserve_images": 1, "drawn_images": 1, "drawing_steps": 2,
        "drawing_sampler": "ddim", "batch_size": 1, "preserve_worst_every": 0,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("config", ROUNDS_OF)
def test_inversion_rounds_of_sdxl(config, sdxl):
    _, base = sdxl
    rounds = {"rounds_every": 2, "rounds_search": 2, "rounds_tokens": "2", "rounds_bank": 2, "rounds_batch": 1,
              "rounds_skip": 1e9}  # fmt: skip
    erased = esd_jax.erase(base, "cat", config=config, **AN_UPDATE, **rounds, **ROUNDS_OF[config])
    (made,) = erased.provenance.erased[-1].rounds
    assert made["tokens"] == 2 and np.isfinite(made["gauge"]) and made["gauge"] == made["gauge_base"]
    assert all(np.isfinite(value).all() for value in erased.edits.values())


TINY = {
    "concept_inversion": {"steps": 2, "tokens": 2},
    "unlearn_diff_atk": {"num_times": 1, "iterations": 2, "tokens": 2, "together": 2},
    "p4d": {"iterations": 2, "judge_every": 2, "judged_on": 2, "length": 3, "together": 2},
    "ring_a_bell": {"population": 8, "generations": 3, "length": 4},
    "random_prompts": {"count": 3, "length": 4},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("random_prompts", "ring_a_bell") else pytest.mark.slow) for n in TINY]
)
def test_every_attack_by_token_runs_on_sdxl(name, sdxl):
    _, base = sdxl
    found = attack(base, base, goal("cat", ("a cat", "the cat and the dog")), preset(name, **TINY[name]))
    for trial in found.trials:
        assert trial.conditioning.embeddings.shape == (1, 77, 2 * factories.WIDTH)
        np.testing.assert_array_equal(trial.conditioning.time_ids, [[16, 16, 0, 0, 16, 16]])
        assert trial.conditioning.pooled.shape == (1, factories.WIDTH)
    assert np.isfinite(found.losses).all()
    images = esd_jax.sample(base, found.trials[0].conditioning, steps=1, guidance_scale=3.0, seed=[1])
    assert images.shape == (1, 16, 16, 3)
