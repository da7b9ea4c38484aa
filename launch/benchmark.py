"""How long a training step or a sampling step takes, beside a PyTorch/diffusers loop that does the same work.

    python -m launch.benchmark --reference
    python -m launch.benchmark --reference --work=sampling --batch_size=16

on the embedded model and whatever device JAX finds. Each side runs in a process of its own, in turn (A B A B);
only their ratio means something on a machine that does other things too. The reference needs `esd-jax[torch]`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from launch import command

FLAGS = flags.FlagValues()
flags.DEFINE_enum("work", "training", ["training", "sampling"], "What is timed.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 1, "Images, when sampling.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("steps", 40, "Steps that are timed, after the first.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 2, "How often each side runs.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("reference", False, "Also time PyTorch/diffusers, and print the ratio.", flag_values=FLAGS)
flags.DEFINE_enum("child", None, ["jax", "torch"], "Internal: be one side.", flag_values=FLAGS)


def main() -> None:
    FLAGS(sys.argv)
    if FLAGS.child:
        print(json.dumps(SIDES[FLAGS.work, FLAGS.child](FLAGS.steps)))
        return
    sides = ["jax", "torch"] if FLAGS.reference else ["jax"]
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(FLAGS.rounds):
        for side in sides:
            command = [sys.executable, "-m", "launch.benchmark", f"--child={side}", f"--steps={FLAGS.steps}"]
            command += [f"--work={FLAGS.work}", f"--batch_size={FLAGS.batch_size}"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[side].append(json.loads(output.splitlines()[-1]))
    for side, runs in results.items():
        steps = [run["step_s"] for run in runs]
        print(
            f"{side:6} {runs[0]['version']:14} first step {min(run['first_s'] for run in runs):6.1f} s"
            f"   step {min(steps):.3f} s (runs: {', '.join(f'{s:.3f}' for s in steps)})"
        )
    if FLAGS.reference:
        # The least disturbed run of each side.
        jax, torch = (min(run["step_s"] for run in results[side]) for side in ("jax", "torch"))
        print(f"PyTorch takes {torch / jax:.2f} times as long for a step")


def work(steps: int) -> list[int]:
    """Sampler steps before each update: the same for both sides, and as many on average as the draws ask for."""
    return [(7 * i) % 20 for i in range(steps)]


def time_jax(steps: int) -> dict:
    """Our step, with its draws replaced by `work`; compiled anew, without the cache."""
    import jax
    import jax.numpy as jnp

    from esd_jax import api, recipe, runs
    from esd_jax.params import partition, prefixed
    from esd_jax.selection import select
    from esd_jax.training.step import init_state, make_step

    base = api.load("emoji")
    plan = recipe.make(**recipe.read("emoji").to_dict())
    method, inputs, shape = runs.prepare(base, plan)
    tx = plan.optimizer.transformation()
    names = select(plan.subset, base.network("unet").layouts)
    theta_0, frozen = (prefixed(part, "unet") for part in partition(base.params["unet"], names))
    state = init_state(theta_0, tx, 0)
    updates = jnp.asarray(work(steps))

    class Steered:
        """The method, drawing what `work` says; the inputs carry which step it is."""

        loss = method.loss

        @staticmethod
        def draw(step: Any, key: Any, example_keys: Any, shape: Any, inputs: Any) -> Any:
            drawn = method.draw(step, key, example_keys, shape, inputs[0])
            index = updates[inputs[1]]
            return drawn._replace(index=index, t=jnp.asarray(method.trajectory.t_low, jnp.float32)[index])

        @staticmethod
        def prepare(models: Any, draws: Any, inputs: Any) -> Any:
            return method.prepare(models, draws, inputs[0])

    step = make_step(Steered, tx, compute_dtype=jnp.float32, shape=shape)
    started = time.perf_counter()
    state, metrics = step(state, theta_0, frozen, (inputs, jnp.int32(0)))
    jax.block_until_ready(metrics)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for i in range(steps):
        state, metrics = step(state, theta_0, frozen, (inputs, jnp.int32(i)))
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - started) / steps
    return {"version": f"jax {jax.__version__}", "first_s": first, "step_s": seconds}


def time_torch(steps: int) -> dict:
    """The same work in PyTorch: guided DDIM by the teacher, its two predictions, the student's loss and Adam."""
    import copy

    import torch
    import transformers
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from esd_jax import demo

    teacher = UNet2DConditionModel.from_pretrained(demo.MODEL, subfolder="unet", torch_dtype=torch.float32)
    scheduler = DDIMScheduler.from_pretrained(demo.MODEL, subfolder="scheduler")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(demo.MODEL / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(demo.MODEL, subfolder="text_encoder", dtype=torch.float32)
    ids = tokenizer(["", "neon style"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        pair = encoder(ids).last_hidden_state
    student = copy.deepcopy(teacher)
    trained = [p for name, p in student.named_parameters() if "attn2" in name]
    student.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=3e-4)
    scheduler.set_timesteps(20)

    def update(count: int) -> None:
        x = torch.randn(1, 4, 16, 16)
        with torch.no_grad():
            for t in scheduler.timesteps[:count]:
                null, concept = teacher(torch.cat([x, x]), t, pair).sample.chunk(2)
                x = scheduler.step(null + 3.0 * (concept - null), t, x).prev_sample
            t = scheduler.timesteps[count]
            null, concept = teacher(torch.cat([x, x]), t, pair).sample.chunk(2)
            target = null - (concept - null)
        loss = torch.nn.functional.mse_loss(student(x, t, pair[1:]).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    started = time.perf_counter()
    update(0)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for count in work(steps):
        update(count)
    return {
        "version": f"torch {torch.__version__}",
        "first_s": first,
        "step_s": (time.perf_counter() - started) / steps,
    }


def time_jax_sampling(steps: int) -> dict:
    """One guided DDIM step of `batch_size` images, the median of `steps`."""
    import jax

    from esd_jax import api
    from esd_jax.diffusion import guidance, samplers

    base, n = api.load("emoji"), FLAGS.batch_size
    unet, sampler = base.network("unet"), samplers.make_sampler(base.schedule, "ddim", 20)
    null, cond = (base.encode_prompts([prompt] * n) for prompt in ("", PROMPT))

    @jax.jit
    def step(params: Any, x: Any) -> Any:
        denoise = guidance.classifier_free(lambda x, t, c: unet.apply(params, x, t, c), cond, null, 3.0)
        return samplers.run(sampler, denoise, x, start=10, stop=11)

    x = jax.random.normal(jax.random.key(0), (n, 16, 16, 4))
    return {"version": f"jax {jax.__version__}"} | timed(
        lambda: jax.block_until_ready(step(base.params["unet"], x)), steps
    )


def time_torch_sampling(steps: int) -> dict:
    """The same in diffusers, in inference mode and in the memory format that it is fastest in on CPUs."""
    import torch
    from diffusers import StableDiffusionPipeline

    from esd_jax import demo

    torch.set_num_threads(os.cpu_count() or 1)
    pipe, n = StableDiffusionPipeline.from_pretrained(demo.MODEL, torch_dtype=torch.float32), FLAGS.batch_size
    unet = pipe.unet.to(memory_format=torch.channels_last).eval()
    pipe.scheduler.set_timesteps(20)
    t = pipe.scheduler.timesteps[10]
    with torch.inference_mode():
        pair = torch.cat(pipe.encode_prompt(PROMPT, "cpu", n, True)[::-1])
        x = torch.randn(n, 4, 16, 16).contiguous(memory_format=torch.channels_last)

        def step() -> None:
            null, cond = unet(torch.cat([x, x]), t, pair).sample.chunk(2)
            pipe.scheduler.step(null + 3.0 * (cond - null), t, x)

        return {"version": f"torch {torch.__version__}"} | timed(step, steps)


def timed(call: Callable[[], Any], steps: int) -> dict:
    """Seconds of the first call, and the median of those after it."""
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return {"first_s": seconds[0], "step_s": statistics.median(seconds[1:])}


PROMPT = "a cat in neon style"
SIDES = {
    ("training", "jax"): time_jax,
    ("training", "torch"): time_torch,
    ("sampling", "jax"): time_jax_sampling,
    ("sampling", "torch"): time_torch_sampling,
}

if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
