"""ESD on FLUX.2 [klein]: one update against its transcription in torch (`flow_oracle.py`), whole runs, LoRA files."""

import copy

import diffusers
import flow_oracle
import jax
import jax.numpy as jnp
import klein_factory
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from klein_factory import LAYERS
from messages import one_line
from torch_oracle import AXES, error, random_, to_nchw, to_nhwc, to_params

import esd_jax
from esd_jax import exports, recipe
from esd_jax.erasing.method import Models
from esd_jax.evaluation import attacks
from esd_jax.io.lora import export_lora
from esd_jax.io.lora_merge import merge_lora
from esd_jax.methods import esd
from esd_jax.params import prefixed
from esd_jax.planning.plan import make_plan
from esd_jax.runs import setup
from esd_jax.selection import select

SIZE, STEPS = (16, 24), 4
CONCEPTS = ("cat", "two photos")
FLOW = {
    "sampler": "flow_euler", "timestep_mode": "grid", "sampling_steps": STEPS, "sample_with": "teacher",
    "sampling_guidance": 4.0, "subset": "flow-text-single", "height": SIZE[0], "width": SIZE[1],
}  # fmt: skip
# Tensors of the tiny transformer, of two blocks of each kind.
SUBSETS = {
    "esd-x": 2 * 8, "flow-text": 2 * 4, "flow-kv-text": 2 * 2, "flow-double": 2 * 8, "qk-dual": 2 * 4,
    "flow-context": 2 * (4 + 2), "esd-u-flow": 2 * (4 + 2) + 2 * 2, "eraseanything": 2 * 2, "flow-single": 2,
    "flow-text-single": 2 * 4 + 2, "uce": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """(folder, the torch pipeline that wrote it, ours)"""
    folder = tmp_path_factory.mktemp("klein") / "model"
    return folder, klein_factory.make_klein(folder), esd_jax.load(folder)


def scheduler_of(pipe):
    """The scheduler as the pipeline sets it for `SIZE`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    mu = compute_empirical_mu(SIZE[0] * SIZE[1] // 16, STEPS)
    scheduler.set_timesteps(STEPS, sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=mu)
    return scheduler


def test_an_update_equals_its_transcription(klein):
    _, pipe, base = klein
    student = random_(copy.deepcopy(pipe.transformer), seed=5)
    plan = recipe.make(**recipe.preset("esd", **FLOW, eta=0.7).to_dict() | {"concept": list(CONCEPTS)})
    tools = setup.make_tools(base, plan, jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.local_devices()[:1]))
    method, inputs = plan.settings.make(tools, plan.concepts)
    net = base.network("transformer")
    ours = prefixed(to_params(student.state_dict(), net), "transformer")
    models = Models(ours, prefixed(base.params["transformer"], "transformer"))
    noise = np.random.default_rng(1).normal(size=(2, *tools.shape)).astype(np.float32)
    prepare, gradient_of = jax.jit(method.prepare), jax.jit(jax.value_and_grad(method.loss))
    for k in (0, STEPS - 1):
        with torch.enable_grad():
            expected = flow_oracle.update(
                flow_oracle.klein(pipe, LAYERS), student.requires_grad_(True), pipe.transformer, scheduler_of(pipe),
                to_nchw(noise), k, CONCEPTS, sampling_guidance=4.0, distilled=False, eta=0.7,
            )  # fmt: skip
            names, values = zip(*student.named_parameters(), strict=True)
            gradients = dict(zip(names, torch.autograd.grad(expected.loss, values, allow_unused=True), strict=True))
        t = method.trajectory.t_low[k]
        draws = esd.Draws(jnp.int32(k), jnp.float32(t), jnp.arange(2), jnp.asarray(noise), jnp.zeros(2, jnp.int32))
        batch = prepare(models, draws, inputs)
        assert float(batch.t) == pytest.approx(expected.t, rel=1e-6)
        assert error(batch.x, to_nhwc(expected.x)) <= 1e-4
        assert error(batch.target, to_nhwc(expected.target)) <= 1e-4
        loss, grads = gradient_of(ours, batch)
        assert error(loss, expected.loss) <= 1e-4
        for name in select(plan.subset, net.layouts, base.family.subsets):
            assert error(grads[f"transformer/{name}"], gradients[name].numpy().transpose(AXES["linear"])) <= 1e-3, name
    assert prepare._cache_size() == 1


def test_subsets(klein):
    base = klein[2]
    layouts, subsets = base.network("transformer").layouts, base.family.subsets
    assert {name: len(select(name, layouts, subsets)) for name in subsets} == SUBSETS
    for name in ("esd-x-strict", "xattn", "flow-kv", "full"):
        with pytest.raises(ValueError, match=one_line(f"unknown subset '{name}'")):
            select(name, layouts, subsets)


RUN = FLOW | {"steps": 30, "learning_rate": 2e-3, "batch_size": 2, "optimizer": "adam", "seed": 1}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"rank": 2, "learning_rate": 1e-2}, id="LoRA"),
        pytest.param({"subset": "flow-text"}, id="full", marks=pytest.mark.slow),
    ],
)
def test_a_run_erases_and_its_folder_is_what_diffusers_opens(fields, klein, tmp_path):
    folder, pipe, base = klein
    erased = esd_jax.erase(base, "cat", output_dir=tmp_path / "run", **RUN | fields)
    schedule = base.family.at_size(base.configs, base.schedule, SIZE)
    x = jax.random.normal(jax.random.key(0), (4, *base.family.latents(base.configs, SIZE)))
    t, null, cat = jnp.float32(1000 * schedule.visited(STEPS)[1]), *(base.encode_prompts([p] * 4) for p in ("", "cat"))
    v_null, v_cat, after = base.denoise(x, t, null), base.denoise(x, t, cat), erased.denoise(x, t, cat)
    target = 2 * v_null - v_cat
    assert jnp.mean((after - target) ** 2) < 0.8 * jnp.mean((v_cat - target) ** 2)
    np.testing.assert_array_equal(esd_jax.load(tmp_path / "run", base=base).denoise(x, t, cat), after)

    exports.export(erased, tmp_path / "out", "folder", verify=False)
    weights = type(pipe).from_pretrained(tmp_path / "out").transformer.state_dict()
    before = pipe.transformer.state_dict()
    changed = {f"transformer/{name}" for name, value in before.items() if not value.equal(weights[name])}
    assert changed == {*erased.edits}
    np.testing.assert_array_equal(esd_jax.load(tmp_path / "out").denoise(x, t, cat), after)
    for name in ("text_encoder", "tokenizer", "vae", "scheduler"):
        for path in (folder / name).iterdir():
            assert (tmp_path / "out" / name / path.name).read_bytes() == path.read_bytes()
    assert {"folder", "delta", "difference", "lora"} <= {*exports.possible(erased)}
    delta = exports.export(erased, tmp_path / "delta.safetensors", "delta", verify=False, dtype="float32").path
    np.testing.assert_array_equal(esd_jax.load(delta, base=base).denoise(x, t, cat), after)


@torch.no_grad()
def latents(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent", "text_encoder_out_layers": LAYERS}
    return pipe(prompt=["a cat"], height=SIZE[0], width=SIZE[1], generator=generator, **options).images.numpy()


def test_at_full_rank_diffusers_draws_with_the_lora_what_the_erased_model_draws(klein, tmp_path):
    folder, pipe, base = klein
    rng = np.random.default_rng(0)
    names = select("flow-text-single", base.network("transformer").layouts, base.family.subsets)
    old = base.params["transformer"]
    edits = {f"transformer/{n}": jnp.asarray(old[n] + 0.05 * rng.normal(size=old[n].shape), jnp.float32) for n in names}
    erased = base.with_edits(edits, {"concepts": [{"text": "cat"}], "base_sha256": "x"})
    file = tmp_path / "lora.safetensors"
    report = export_lora(erased, file, rank=10**6, dtype="float32")
    assert report.residual < 1e-10 and report.left_out == ()
    whole = diffusers.Flux2KleinPipeline.from_pretrained(esd_jax.export(erased, tmp_path / "whole"))
    whole.set_progress_bar_config(disable=True)
    before, expected = latents(pipe), latents(whole)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    try:
        assert error(latents(pipe), expected) <= 1e-4 < 1e-2 < error(before, expected)
    finally:
        pipe.unload_lora_weights()
    for name, value in merge_lora(base, file).edits.items():
        np.testing.assert_allclose(value, edits[name], atol=1e-5, err_msg=name)


def test_a_run_is_planned(klein):
    base = klein[2]
    plan = recipe.make(**recipe.preset("esd", concept="cat", **RUN).to_dict())
    size = make_plan(base.configs, base.schedule, plan)
    assert size.names == select("flow-text-single", base.network("transformer").layouts, base.family.subsets)
    assert size.trained == sum(base.params["transformer"][name].size for name in size.names)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("sdd", {}),
        pytest.param("all_but_one", {"window_start": 0.0, "delta_warmup": 0}, marks=pytest.mark.slow),
        pytest.param("ablating", {"replace_with": "photo", "drawn_images": 2, "views": 1}, marks=pytest.mark.slow),
    ],
)
def test_the_other_methods_erase(method, fields, klein, tmp_path):
    """Their presets for flows, with images in place of the real sizes; and with prompts and images preserved."""
    base, variant = klein[2], {"all_but_one": "sd3"}.get(method, "flow")
    small = {"steps": 2, "batch_size": 2, "rank": 2, "height": SIZE[0], "width": SIZE[1], "preserve": "two photos"}
    small |= {"drawing_steps" if method == "ablating" else "sampling_steps": 2, "preserve_images": 1}
    plan = recipe.preset(method, variant, **small | fields).to_dict()
    given = {name: value for name, value in plan.items() if name != "base"}
    erased = esd_jax.erase(base, **given | {"concept": "cat", "output_dir": tmp_path / "run"})
    names = select(plan["subset"], base.network("transformer").layouts, base.family.subsets)
    moved = {name for name, value in erased.edits.items() if np.any(value != base.params["transformer"][name[12:]])}
    assert moved == {f"transformer/{name}" for name in names}


def test_what_does_not_go_with_it_is_refused_by_name(klein):
    base = klein[2]
    for options, named in (
        ({"method": "forget_me_not", "subset": "flow-text"}, "attn2.to_q"),
        ({"method": "speed", "subset": "flow-text"}, "cross-attention"),
        ({"method": "stereo", "subset": "flow-text"}, "method 'stereo'"),
        (RUN | {"rounds_every": 2}, "rounds_every=2 needs text encoders that take the embeddings of new tokens"),
        (RUN | {"train_guidance": 2.0}, "train_guidance=2.0"),
        (RUN | {"timestep_mode": "compvis"}, "timestep_mode='grid'"),
    ):
        with pytest.raises(ValueError, match=one_line(named)):
            esd_jax.erase(base, "cat", **options)


@pytest.mark.parametrize("name", ["concept_inversion", "unlearn_diff_atk", "p4d", "ring_a_bell"])
def test_attacks_by_token_are_refused(name, klein):
    reason = attacks.lacking(attacks.ATTACKS[name](), klein[2])
    assert "needs text encoders that" in reason and "FLUX.2 [klein] does not have" in reason
