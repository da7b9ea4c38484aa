"""ESD on FLUX.1 and SD3: one update against its transcription in torch (`flow_oracle.py`), and whole runs."""

import copy

import diffusers
import flow_factories
import flow_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from messages import one_line
from torch_oracle import AXES, error, random_, to_nchw, to_nhwc, to_params

import esd_jax
from esd_jax import exports, recipe
from esd_jax.erasing.method import Models
from esd_jax.methods import esd
from esd_jax.params import prefixed
from esd_jax.planning.plan import make_plan
from esd_jax.runs import setup
from esd_jax.selection import select

SIZE, STEPS = (16, 24), 4
CONCEPTS = ("cat", "two photos")
FLOW = {
    "sampler": "flow_euler", "timestep_mode": "grid", "sampling_steps": STEPS, "sample_with": "teacher",
    "subset": "flow-text", "height": SIZE[0], "width": SIZE[1],
}  # fmt: skip
MAKE = {
    "dev": lambda folder: flow_factories.make_flux(folder),
    "schnell": lambda folder: flow_factories.make_flux(folder, dev=False),
    "sd3": lambda folder: flow_factories.make_sd3(folder),
}
SUBSETS = {  # of the tiny transformers: two double and two single blocks; three blocks, the first with attn2
    "dev": {
        "esd-x": 2 * 16 + 2 * 6, "flow-text": 2 * 8, "flow-kv-text": 2 * 4, "flow-kv": 2 * 8 + 2 * 4, "qk-dual": 2 * 8,
        "flow-double": 2 * 16, "flow-context": 2 * (8 + 4 + 2), "esd-u-flow": 2 * (8 + 4) + 2 * 10,
        "eraseanything": 2 * 4, "uce": 2,
    },
    "sd3": {
        "esd-x": 2 * 16 + 14 + 8, "flow-text": 2 * 8 + 6, "flow-kv-text": 3 * 4, "flow-kv": 3 * 8, "qk-dual": 3 * 8,
        "flow-double": 2 * 16 + 14, "flow-context": 2 * (8 + 4 + 2) + 6 + 2, "esd-u-flow": 3 * (8 + 4) + 8,
        "eraseanything": 3 * 4, "uce": 2,
    },
}  # fmt: skip

IDLE = "transformer_blocks.2.attn.add_q_proj."  # the last block of SD3 drops the text, whatever its queries are


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (folder, the torch pipeline that wrote it, ours), each made when it is first used."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("flow") / "model"
            made[kind] = folder, MAKE[kind](folder), esd_jax.load(folder)
        return made[kind]

    return of


def scheduler_of(pipe):
    """The scheduler as the pipeline sets it for `SIZE`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    config, options = scheduler.config, {}
    if isinstance(pipe, diffusers.FluxPipeline):
        options["sigmas"] = np.linspace(1, 1 / STEPS, STEPS)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        options["mu"] = calculate_shift(SIZE[0] * SIZE[1] // 16, *(config[name] for name in names))
    scheduler.set_timesteps(STEPS, **options)
    return scheduler


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("dev", {"sampling_guidance": 3.5}),
        ("dev", {"sampling_guidance": 3.5, "train_guidance": 2.5, "eta": 0.7}),
        ("schnell", {}),
        ("sd3", {"sampling_guidance": 5.0}),
    ],
)
def test_an_update_equals_its_transcription(kind, fields, folders):
    _, pipe, base = folders(kind)
    tokens = {"dev": 512, "schnell": 256}
    velocity = flow_oracle.sd3(pipe) if kind == "sd3" else flow_oracle.flux(pipe, tokens[kind])
    student = random_(copy.deepcopy(pipe.transformer), seed=5)
    plan = recipe.make(**recipe.preset("esd", **FLOW | fields).to_dict() | {"concept": list(CONCEPTS)})
    tools = setup.make_tools(base, plan, jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.local_devices()[:1]))
    assert tuple(concept.text for concept in plan.concepts) == CONCEPTS
    method, inputs = plan.settings.make(tools, plan.concepts)
    net = base.network("transformer")
    ours = prefixed(to_params(student.state_dict(), net), "transformer")
    models = Models(ours, prefixed(base.params["transformer"], "transformer"))
    noise = np.random.default_rng(1).normal(size=(2, *tools.shape)).astype(np.float32)
    prepare, gradient_of = jax.jit(method.prepare), jax.jit(jax.value_and_grad(method.loss))
    for k in (0, 2, STEPS - 1):
        with torch.enable_grad():
            expected = flow_oracle.update(
                velocity, student.requires_grad_(True), pipe.transformer, scheduler_of(pipe), to_nchw(noise), k,
                CONCEPTS, **{"sampling_guidance": 3.0, "distilled": kind != "sd3"} | fields,
            )  # fmt: skip
            names, values = zip(*student.named_parameters(), strict=True)
            gradients = torch.autograd.grad(expected.loss, values, allow_unused=True)
        t = method.trajectory.t_low[k]
        draws = esd.Draws(jnp.int32(k), jnp.float32(t), jnp.arange(2), jnp.asarray(noise), jnp.zeros(2, jnp.int32))
        batch = prepare(models, draws, inputs)
        assert float(batch.t) == pytest.approx(expected.t, rel=1e-6)
        assert error(batch.x, to_nhwc(expected.x)) <= 1e-4
        assert error(batch.target, to_nhwc(expected.target)) <= 1e-4
        loss, grads = gradient_of(ours, batch)
        assert error(loss, expected.loss) <= 1e-4
        for name in select(plan.subset, net.layouts, base.family.subsets):
            theirs = dict(zip(names, gradients, strict=True))[name].numpy().transpose(AXES[net.layouts[name]])
            if name.startswith(IDLE):
                assert not theirs.any() and not grads[f"transformer/{name}"].any()
            else:
                assert error(grads[f"transformer/{name}"], theirs) <= 1e-3, name
    assert prepare._cache_size() == 1


@pytest.mark.parametrize("kind", SUBSETS)
def test_subsets(kind, folders):
    base = folders(kind)[2]
    layouts, subsets = base.network("transformer").layouts, base.family.subsets
    assert {name: len(select(name, layouts, subsets)) for name in subsets} == SUBSETS[kind]
    for name in ("esd-x-strict", "xattn", "noxattn", "full", "kv"):
        with pytest.raises(ValueError, match=one_line(f"unknown subset '{name}'")):
            select(name, layouts, subsets)


RUN = FLOW | {"steps": 30, "learning_rate": 2e-3, "batch_size": 2, "optimizer": "adam", "seed": 1}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [pytest.param("dev", {}, marks=pytest.mark.slow), ("sd3", {"rank": 2, "learning_rate": 1e-2})],
)
def test_a_run_erases_and_its_folder_is_what_diffusers_opens(kind, fields, folders, tmp_path):
    """The student's output for the concept moves to the target; diffusers' pipeline of the export says the same."""
    folder, pipe, base = folders(kind)
    erased = esd_jax.erase(base, "cat", output_dir=tmp_path / "run", **RUN | fields)
    assert {name.split("/")[0] for name in erased.edits} == {"transformer"}
    schedule = base.family.at_size(base.configs, base.schedule, SIZE)
    x = jax.random.normal(jax.random.key(0), (4, *base.family.latents(base.configs, SIZE)))
    t, null, cat = jnp.float32(1000 * schedule.visited(STEPS)[1]), *(base.encode_prompts([p] * 4) for p in ("", "cat"))
    v_null, v_cat, after = base.denoise(x, t, null), base.denoise(x, t, cat), erased.denoise(x, t, cat)
    target = 2 * v_null - v_cat
    assert jnp.mean((after - target) ** 2) < 0.8 * jnp.mean((v_cat - target) ** 2)
    again = esd_jax.load(tmp_path / "run", base=base)
    np.testing.assert_array_equal(again.denoise(x, t, cat), after)

    verify = kind == "sd3"  # whose default size is small
    exports.export(erased, tmp_path / "out", "folder", verify=verify)
    opened = type(pipe).from_pretrained(tmp_path / "out")
    weights = opened.transformer.state_dict()
    changed = {
        f"transformer/{name}" for name, value in pipe.transformer.state_dict().items() if not value.equal(weights[name])
    }
    assert changed == {name for name in erased.edits if not name.startswith(f"transformer/{IDLE}")}
    np.testing.assert_array_equal(esd_jax.load(tmp_path / "out").denoise(x, t, cat), after)
    for name in (base.text_encoders[-1], f"tokenizer_{len(base.tokenizers)}", "vae", "scheduler"):
        for path in (folder / name).iterdir():  # T5's names are none that an export changes
            assert (tmp_path / "out" / name / path.name).read_bytes() == path.read_bytes()
    kohya = ("kohya",) if kind == "dev" else ()
    assert exports.possible(erased) == ("folder", "single", "delta", "difference", "lora", *kohya, "orbax")
    delta = exports.export(erased, tmp_path / "delta.safetensors", "delta", verify=verify, dtype="float32").path
    np.testing.assert_array_equal(esd_jax.load(delta, base=base).denoise(x, t, cat), after)


def test_kept_trajectories_and_preserved_prompts_serve_a_distilled_model(folders, tmp_path):
    base = folders("dev")[2]
    fields = {"updates_per_trajectory": 4, "trajectory_buffer": 2, "preserve": "two photos", "steps": 4, "rank": 0}
    erased = esd_jax.erase(base, "cat", output_dir=tmp_path / "run", **RUN | fields)
    assert all(np.isfinite(value).all() for value in erased.edits.values()) and len(erased.edits) == 16


@pytest.mark.parametrize("kind", ["dev", "sd3"])
def test_a_run_is_planned(kind, folders):
    base = folders(kind)[2]
    plan = recipe.make(**recipe.preset("esd", concept="cat", **RUN).to_dict())
    size = make_plan(base.configs, base.schedule, plan)
    names = select("flow-text", base.network("transformer").layouts, base.family.subsets)
    assert size.names == names == setup.assemble(base, plan).names
    assert size.trained == sum(base.params["transformer"][name].size for name in names)


@pytest.mark.parametrize(
    ("kind", "method", "fields"),
    [
        ("dev", "sdd", {}),
        pytest.param("sd3", "sdd", {}, marks=pytest.mark.slow),
        ("sd3", "all_but_one", {"window_start": 0.0, "delta_warmup": 0}),
        ("dev", "ablating", {"replace_with": "photo", "drawn_images": 2, "views": 1}),
    ],
)
def test_the_other_methods_erase(kind, method, fields, folders, tmp_path):
    """Their presets for flows, with images in place of the real sizes; and with prompts and images preserved."""
    base = folders(kind)[2]
    variant = {"all_but_one": "sd3"}.get(method, "flow")
    small = {"steps": 2, "batch_size": 2, "rank": 2, "height": SIZE[0], "width": SIZE[1], "preserve": "two photos"}
    small |= {"drawing_steps" if method == "ablating" else "sampling_steps": 2, "preserve_images": 1}
    plan = recipe.preset(method, variant, **small | fields).to_dict()
    given = {name: value for name, value in plan.items() if name != "base"}
    erased = esd_jax.erase(base, **given | {"concept": "cat", "output_dir": tmp_path / "run"})
    names = select(plan["subset"], base.network("transformer").layouts, base.family.subsets)
    moved = {name for name, value in erased.edits.items() if np.any(value != base.params["transformer"][name[12:]])}
    weights = {f"transformer/{name}" for name in names if name.endswith("weight")}
    assert {name for name in weights if IDLE not in name} == moved


@pytest.mark.parametrize("preset", ["flux2026", "flux", "schnell", "sd3"])
def test_presets(preset, folders):
    kind = {"schnell": "schnell", "sd3": "sd3"}.get(preset, "dev")
    plan = recipe.make(**recipe.preset("esd", preset, concept="cat").to_dict())
    base, (concept,) = folders(kind)[2], plan.concepts
    assert set(select(plan.subset, base.network("transformer").layouts, base.family.subsets))
    trajectory = esd.make_trajectory(plan.settings, base.family.at_size(base.configs, base.schedule, SIZE))
    assert trajectory.scored_where_sampled and trajectory.t_low[0] == pytest.approx(1000)
    roles = {role: of(concept) for role, of in plan.settings.roles().items()}
    anchor = "cat" if preset == "flux2026" else ""  # the released code's target is v_c - eta (v_c - v_null)
    assert roles == {"concept": "cat", "student": "cat", "sample": "cat", "anchor": anchor}


def test_a_distilled_network_is_scored_at_one_scale_of_guidance(folders):
    """Whatever is encoded for a method; samplers set their own."""
    base = folders("dev")[2]
    for fields, scale in (({"method": "sdd"}, 1.0), ({"train_guidance": 2.5}, 2.5)):
        plan = recipe.make(concept="cat", subset="flow-text", height=SIZE[0], width=SIZE[1], **fields)
        tools = setup.make_tools(base, plan, jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.local_devices()[:1]))
        assert tools.encode(["cat", ""]).guidance.tolist() == [scale, scale]
        outputs = [network.apply(base.params[name], jnp.asarray(tools.tokenizers[name](["cat"])))
                   for name, network in tools.text_encoders.items()]  # fmt: skip
        assert tools.condition(outputs).guidance.tolist() == [scale]


def test_what_does_not_go_with_a_flow_is_refused_by_name(folders):
    base, guided = folders("dev")[2], folders("sd3")[2]
    small = {"height": 16, "width": 24, "subset": "flow-text"}
    for options, named in (
        ({"method": "forget_me_not", "subset": "flow-text"}, "attn2.to_q"),
        ({"method": "all_but_one", "subset": "flow-text"}, "guidance by the empty prompt"),
        (small | {"method": "ablating", "detach_bos": True, "replace_with": "photo"}, "cross-attention"),
        (
            small | {"method": "ablating", "kind": "nudity", "replace_with": "photo"},
            "guidance by the empty prompt",
        ),
        (FLOW | {"timestep_mode": "compvis"}, "timestep_mode='grid'"),
    ):
        with pytest.raises(ValueError, match=one_line(named)):
            esd_jax.erase(base, "cat", **{"sampler": "flow_euler"} | options if "method" not in options else options)
    with pytest.raises(ValueError, match=one_line("train_guidance=2.0", "distilled")):
        esd_jax.erase(guided, "cat", **RUN | {"train_guidance": 2.0})
