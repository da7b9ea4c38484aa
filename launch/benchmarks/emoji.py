"""A training or a sampling step of the embedded model, beside the same work in PyTorch/diffusers, on two CPU cores.

Both sides get two threads; PyTorch has the memory format that it is fastest in, and inference mode where it samples.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

THREADS = 2
PROMPT = "a cat in neon style"


def measure(side: str, kind: str, batch_size: int, steps: int) -> dict[str, Any]:
    """Times one side ("jax", "torch") of some work ("training", "sampling") in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    return SIDES[kind, side](batch_size, steps)


def jax_training(batch_size: int, steps: int) -> dict[str, Any]:
    """Our step, every update of average length; compiled anew, without the cache."""
    import jax

    from esd_jax import api, recipe
    from esd_jax.runs.setup import assemble
    from launch.benchmarks import work

    base = api.load("emoji")
    plan = recipe.make(**recipe.read("emoji").to_dict())
    training = dataclasses.replace(plan.training, batch_size=batch_size)
    plan = dataclasses.replace(plan, settings=work.Average(**dataclasses.asdict(plan.settings)), training=training)
    setup = assemble(base, plan)
    theta_0, frozen = setup.split(base.params[base.denoiser])
    state = setup.begin(theta_0)

    def update() -> None:
        nonlocal state
        state, metrics = setup.step(state, theta_0, frozen, setup.inputs)
        jax.block_until_ready((state, metrics))

    rounds = work.updates(plan, base.schedule)
    return {"version": f"jax {jax.__version__}", "rounds": rounds} | timed(update, steps)


def torch_training(batch_size: int, steps: int) -> dict[str, Any]:
    """The same work in PyTorch: guided DDIM by the student, the teacher's two predictions, the loss and Adam."""
    import copy

    import torch
    import transformers
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from esd_jax import api, demo, recipe
    from launch.benchmarks import work

    torch.set_num_threads(THREADS)
    plan = recipe.make(**recipe.read("emoji").to_dict())
    settings, rounds = plan.settings, work.updates(plan, api.architecture("emoji")[1])
    load = {"torch_dtype": torch.float32}
    teacher = UNet2DConditionModel.from_pretrained(demo.MODEL, subfolder="unet", **load)
    teacher = teacher.to(memory_format=torch.channels_last).requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(demo.MODEL, subfolder="scheduler")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(demo.MODEL / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(demo.MODEL, subfolder="text_encoder", dtype=torch.float32)
    ids = tokenizer(["", "neon style"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        pair = encoder(ids).last_hidden_state.repeat_interleave(batch_size, 0)
    student = copy.deepcopy(teacher)
    trained = [p for name, p in student.named_parameters() if "attn2" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=plan.optimizer.learning_rate)
    scheduler.set_timesteps(settings.sampling_steps)
    sampled = student if settings.sample_with == "student" else teacher

    def update() -> None:
        x = torch.randn(batch_size, 4, 16, 16).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            for t in scheduler.timesteps[:rounds]:
                null, concept = sampled(torch.cat([x, x]), t, pair).sample.chunk(2)
                x = scheduler.step(null + settings.sampling_guidance * (concept - null), t, x).prev_sample
            t = scheduler.timesteps[rounds]
            null, concept = teacher(torch.cat([x, x]), t, pair).sample.chunk(2)
            target = null - (concept - null)
        # Inference mode's results cannot be saved for a backward pass.
        x, target = x.clone(), target.clone()
        loss = torch.nn.functional.mse_loss(student(x, t, pair[batch_size:]).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {"version": f"torch {torch.__version__}", "rounds": rounds} | timed(update, steps)


def jax_sampling(batch_size: int, steps: int) -> dict[str, Any]:
    """One guided DDIM step; the prompts' keys and values, made once before the first of them, are there."""
    import jax

    from esd_jax import api
    from esd_jax.diffusion import guidance, samplers

    base = api.load("emoji")
    unet, sampler = base.network("unet"), samplers.make_sampler(base.schedule, "ddim", 20)
    project = jax.jit(unet.project)
    null, cond = (project(base.params["unet"], base.encode_prompts([p] * batch_size)) for p in ("", PROMPT))

    @jax.jit
    def step(params: Any, x: Any, null: Any, cond: Any) -> Any:
        denoise = guidance.classifier_free(lambda x, t, c: unet.apply(params, x, t, c), cond, null, 3.0)
        return samplers.run(sampler, denoise, x, start=10, stop=11)

    x = jax.random.normal(jax.random.key(0), (batch_size, 16, 16, 4))
    call = lambda: jax.block_until_ready(step(base.params["unet"], x, null, cond))  # noqa: E731
    return {"version": f"jax {jax.__version__}", "rounds": 1} | timed(call, steps)


def torch_sampling(batch_size: int, steps: int) -> dict[str, Any]:
    """The same in diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline

    from esd_jax import demo

    torch.set_num_threads(THREADS)
    pipe = StableDiffusionPipeline.from_pretrained(demo.MODEL, torch_dtype=torch.float32)
    unet = pipe.unet.to(memory_format=torch.channels_last).eval()
    pipe.scheduler.set_timesteps(20)
    t = pipe.scheduler.timesteps[10]
    with torch.inference_mode():
        pair = torch.cat(pipe.encode_prompt(PROMPT, "cpu", batch_size, True)[::-1])
        x = torch.randn(batch_size, 4, 16, 16).contiguous(memory_format=torch.channels_last)

        def step() -> None:
            null, cond = unet(torch.cat([x, x]), t, pair).sample.chunk(2)
            pipe.scheduler.step(null + 3.0 * (cond - null), t, x)

        return {"version": f"torch {torch.__version__}", "rounds": 1} | timed(step, steps)


def timed(call: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Seconds of the first call, and the median of those after it."""
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return {"first_s": seconds[0], "step_s": statistics.median(seconds[1:])}


SIDES = {
    ("training", "jax"): jax_training,
    ("training", "torch"): torch_training,
    ("sampling", "jax"): jax_sampling,
    ("sampling", "torch"): torch_sampling,
}
