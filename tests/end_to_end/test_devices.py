"""A run draws the same numbers and gets the same losses on 1, 2 and 8 devices, and a sample the same images; and what
the devices tell each other: on a data mesh the gradients, once; on a mesh with an fsdp axis also the split weights.

XLA splits the host into several devices only before it starts, so the runs are a process of their own: this file.
"""

import math
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

BATCH, STEPS = 8, 3
MESHES = {"1": (1, 1), "8": (8, 1), "4x2": (8, 2)}  # name -> (devices, fsdp)
LEAST = 64  # scalars of a tensor that is split
TOKENS = 7
UNET = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SHAPE = (8, 8, 4)


def main(output: str) -> None:
    """Runs a few steps on each number of devices and writes what they drew, their losses and weights."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import optax

    from esd_jax import sharding
    from esd_jax.diffusion.schedule import Schedule
    from esd_jax.erasing.concepts import Concept
    from esd_jax.erasing.method import Method, Tools
    from esd_jax.methods import esd
    from esd_jax.models.unet import Conditioning, UNet2DConditionModel, UNetConfig
    from esd_jax.params import functional, partition, prefixed
    from esd_jax.selection import select
    from esd_jax.training.step import Optimizer, blank_memory, init_state, make_step

    jax.config.update("jax_default_matmul_precision", "highest")
    # Not `step._cache_size()`: on several devices, it counts a typed key twice without compiling anything.
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
    )
    rng = np.random.default_rng(0)
    network = functional(lambda: UNet2DConditionModel(UNetConfig.from_dict(UNET)))
    teacher = {}
    for name, spec in network.shapes.items():  # vectors ~ N(0, 1), matrices ~ N(0, 1 / inputs)
        spread = 1 if len(spec.shape) == 1 else np.prod(spec.shape[:-1]) ** -0.5
        teacher[name] = jnp.asarray(rng.normal(size=spec.shape) * spread, "float32")
    names = [f"unet/{name}" for name in select("esd-x", network.layouts)]
    theta_0, frozen = partition(prefixed(teacher, "unet"), names)
    schedule = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
                "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}  # fmt: skip
    settings = esd.ESD(sampling_steps=10)
    ring = {"timestep_mode": "grid", "updates_per_trajectory": 2, "trajectory_buffer": 2}
    concepts = [Concept("a cat"), Concept("Van Gogh")]
    encoded = lambda texts: Conditioning(jnp.asarray(rng.normal(size=(len(texts), TOKENS, 16)), "float32"))  # noqa: E731
    tools = Tools(network, Schedule.from_config(schedule), SHAPE, (), encoded, *[pytest.fail] * 3)
    method, inputs = settings.make(tools, concepts)
    replaying, _ = esd.ESD(sampling_steps=4, **ring).make(tools, concepts)
    tx = Optimizer(learning_rate=1e-3).transformation()

    def both(*arguments):
        """What both methods draw, as one."""
        mine, other = method.draw(*arguments)._asdict(), replaying.draw(*arguments)._asdict()
        names = [*mine, *(f"kept_{name}" for name in other)]
        return NamedTuple("Draws", [(name, Any) for name in names])(*mine.values(), *other.values())

    class Witness(Method):
        """A method whose gradient is what the step drew."""

        draw = staticmethod(both)
        prepare = staticmethod(lambda models, draws, inputs: draws)
        loss = staticmethod(lambda student, draws: sum(jnp.sum(student[k] * v) for k, v in draws._asdict().items()))

    zeros = lambda theta: jax.tree.map(jnp.zeros_like, theta)  # noqa: E731
    recorder = optax.GradientTransformation(zeros, lambda grads, state, theta=None: (zeros(grads), grads))
    slots = {"index": (), "t": (), "concept": (BATCH,), "noise": (BATCH, *SHAPE), "image": (BATCH,)}
    slots |= {f"kept_{name}": (BATCH,) for name in ("slot", "index", "t", "concept")} | {"kept_noise": slots["noise"]}

    sharding.SPLIT_FROM = LEAST
    results = {"meshes": [sharding.make_mesh(batch).size for batch in (1, 6, 8, 12, 16)]}
    for n, (devices, fsdp) in MESHES.items():
        mesh = sharding.make_mesh(BATCH, jax.devices()[:devices], fsdp=fsdp)
        assert dict(mesh.shape) == {"data": devices // fsdp, "fsdp": fsdp}
        options = {"compute_dtype": jnp.float32, "shape": SHAPE, "batch_size": BATCH, "mesh": mesh}

        step = make_step(Witness(), recorder, **options)
        state = init_state({name: jnp.zeros(shape) for name, shape in slots.items()}, recorder, seed=0)
        state = state._replace(step=jnp.int32(5))
        state, bank = sharding.place((state, inputs), mesh)
        state, _ = step(state, {}, {}, bank)
        results |= {f"{n}/draws/{name}": value for name, value in state.opt.items()}

        placed = dataclasses.replace(method, denoiser=sharding.gathering(method.denoiser, mesh))
        step = make_step(placed, tx, **options)
        arguments = sharding.place((init_state(theta_0, tx, seed=0), theta_0, frozen, inputs), mesh)
        state, losses, before = arguments[0], [], len(compilations)
        for _ in range(STEPS):
            state, metrics = step(state, *arguments[1:])
            losses.append(metrics)
        results[f"{n}/compilations"] = len(compilations) - before
        results |= {f"{n}/{name}": [getattr(m, name) for m in losses] for name in ("loss", "t", "grad_norm")}
        results |= {f"{n}/theta/{name}": value for name, value in sharding.fetched(state.theta, mesh).items()}
        kept = [a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (state, arguments[0])), strict=True)]
        results[f"{n}/kept"] = all(kept)
        compiled = step.lower(state, *arguments[1:]).compile()
        results[f"{n}/flops"] = compiled.cost_analysis()["flops"]
        results[f"{n}/arguments"] = compiled.memory_analysis().argument_size_in_bytes
        results[f"{n}/program"] = compiled.as_text()
        if fsdp > 1:
            continue
        step = make_step(replaying, tx, **options)
        arguments = sharding.place((init_state(theta_0, tx, seed=0), theta_0, frozen, inputs), mesh)
        memory = sharding.spread(blank_memory(replaying, SHAPE, BATCH), mesh)
        state, losses, before = arguments[0]._replace(memory=memory), [], len(compilations)
        for _ in range(STEPS):
            state, metrics = step(state, *arguments[1:])
            losses.append(metrics.loss)
        results |= {f"{n}/ring/compilations": len(compilations) - before, f"{n}/ring/loss": losses}
        results |= {f"{n}/ring/x": state.memory.x, f"{n}/ring/devices": len(state.memory.x.sharding.device_set)}
        results[f"{n}/ring/part"] = state.memory.x.addressable_shards[0].data.shape[0]
    with pytest.raises(ValueError) as refused:
        sharding.make_mesh(BATCH, fsdp=3)
    results["refused"] = str(refused.value)
    results["gradients"] = sum(value.nbytes for value in theta_0.values())
    # Keys and values of the prompts are computed before the loop.
    inside = {
        name: a for name, a in {**theta_0, **frozen}.items() if not name.endswith(("2.to_k.weight", "2.to_v.weight"))
    }
    results["split"] = sum(not a.is_fully_replicated for a in sharding.placements(inside, mesh).values())

    import esd_jax

    base, prompts = esd_jax.load("emoji"), ["a cat", "neon style", "a rose in ink style", "a fish"] * 2
    for size in (8, 3):  # on all devices, and on one
        options = {"steps": 2, "eta": 1.0, "sampler": "ddim", "batch_size": size}
        results[f"images/{size}"] = esd_jax.sample(base, prompts, negative_prompt=prompts[::-1], **options)
    np.savez(output, **{name: np.asarray(value) for name, value in results.items()})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("devices") / "found.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",  # compiles faster
    }
    done = subprocess.run([sys.executable, __file__, output], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(output))


def test_draws_are_bit_equal(found):
    names = [name.removeprefix("1/") for name in found if name.startswith("1/draws/")]
    assert len(names) == 10 and np.std(found["1/draws/noise"]) > 0.9
    for n in MESHES:
        for name in [*names, "t"]:
            np.testing.assert_array_equal(found[f"{n}/{name}"], found[f"1/{name}"])


def test_losses_and_weights_agree(found):
    assert len(set(found["1/loss"])) == STEPS
    for n in MESHES:
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(found[f"{n}/{name}"], found[f"1/{name}"], rtol=1e-5)
        theta = [name for name in found if name.startswith(f"{n}/theta/")]
        assert theta
        for name in theta:  # three updates of 1e-3 each
            np.testing.assert_allclose(found[name], found["1" + name.removeprefix(n)], atol=2e-5)


def test_kept_trajectories_stay_where_their_examples_are(found):
    meshes = [name for name, (_, fsdp) in MESHES.items() if fsdp == 1]
    for n in meshes:
        devices = MESHES[n][0]
        assert found[f"{n}/ring/compilations"] == 1
        assert found[f"{n}/ring/devices"] == devices and found[f"{n}/ring/part"] == BATCH // devices
        np.testing.assert_allclose(found[f"{n}/ring/loss"], found["1/ring/loss"], rtol=1e-5)
        np.testing.assert_allclose(found[f"{n}/ring/x"], found["1/ring/x"], atol=1e-4)
    assert len(meshes) > 1 and len(set(found["1/ring/loss"])) == STEPS
    assert np.all(np.std(found["1/ring/x"], axis=(3, 4, 5, 6)) > 0.1)


def test_the_work_is_split_and_compiled_once(found):
    for n, (devices, _) in MESHES.items():
        assert found[f"{n}/compilations"] == 1 and found[f"{n}/kept"]
        assert found[f"{n}/flops"] < 1.1 * found["1/flops"] / devices


def loops(program: str) -> dict[str, list[str]]:
    """name -> lines of each computation that is called from a sampler's loop; and "" -> the lines of all others."""
    parts = {match[1]: match[2].splitlines() for match in COMPUTATION.finditer(program)}
    (body,) = {name for lines in parts.values() for line in lines if "/while" in line for name in BODY.findall(line)
               if any("attention" in inner for called in reached(parts, name) for inner in parts[called])}  # fmt: skip
    inside = reached(parts, body)
    return {name: lines for name, lines in parts.items() if name in inside} | {
        "": [line for name, lines in parts.items() if name not in inside for line in lines]
    }


COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*?\{$\n(.*?)^\}", re.MULTILINE | re.DOTALL)
BODY = re.compile(r"body=%([\w.\-]+)")
CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%([\w.\-]+)")
COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def reached(parts: dict[str, list[str]], name: str) -> set[str]:
    names, new = set(), {name}
    while new:
        names |= new
        new = {other for called in new for line in parts[called] for other in CALLED.findall(line)} - names
    return names


def collectives(lines: list[str]) -> list[tuple[str, int]]:
    """(kind, bytes of what comes out), all arrays being float32."""
    matches = filter(None, map(COLLECTIVE.search, lines))
    shapes = lambda text: re.findall(r"f32\[([\d,]*)\]", text)  # noqa: E731
    size = lambda shape: 4 * math.prod(int(n) for n in shape.split(",") if n)  # noqa: E731
    return [(match[2], sum(map(size, shapes(match[1])))) for match in matches]


def inside(program: str) -> list[str]:
    return [line for name, lines in loops(program).items() if name for line in lines]


def test_a_data_mesh_adds_up_gradients_and_nothing_else(found):
    program = str(found["8/program"])
    assert not collectives(inside(program))
    kinds, sizes = zip(*collectives(loops(program)[""]), strict=True)
    assert set(kinds) == {"all-reduce"}
    assert found["gradients"] <= sum(sizes) <= 1.01 * found["gradients"]  # and the loss


def test_an_fsdp_mesh_gathers_weights_in_the_loop_and_nothing_else(found):
    program = str(found["4x2/program"])
    kinds, sizes = zip(*collectives(inside(program)), strict=True)
    assert set(kinds) == {"all-gather"} and len(kinds) == found["split"]
    print(f"gathered in each evaluation of the loop: {sum(sizes):,} bytes in {len(kinds)} tensors")
    assert {kind for kind, _ in collectives(loops(program)[""])} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["4x2/arguments"] < 0.7 * found["8/arguments"]


def test_keys_and_values_of_the_prompts_are_computed_before_the_loop(found):
    """Of one example and its empty prompt; they have as many rows as the prompts have tokens."""
    rows = rf" = f32\[(?:{2 * TOKENS}|2,{TOKENS}),16\]\S* dot\("
    program = str(found["8/program"])
    assert not [line for line in inside(program) if re.search(rows, line)]
    assert len(re.findall(rows, program)) >= 8  # four layers


def test_images_are_the_same(found):
    assert found["images/8"].std() > 20
    np.testing.assert_allclose(found["images/8"], found["images/3"].astype(int), atol=1)


def test_a_mesh_takes_as_many_devices_as_divide_the_batch(found):
    np.testing.assert_array_equal(found["meshes"], [1, 2, 8, 4, 8])


def test_a_mesh_that_cannot_be_made(found):
    assert "fsdp=3 must divide the devices that share a batch, here 8 of 8" in str(found["refused"])


if __name__ == "__main__":
    main(sys.argv[1])
