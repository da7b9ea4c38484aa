"""The work of `step.measure` in PyTorch and diffusers, as the published codes of ESD do it."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from esd_jax.runs.setup import changed_names
from launch.benchmarks import work


def measure(
    arch: str,
    method: str,
    batch_size: int,
    dtype: str,
    steps: int,
    compiled: str | None = None,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Times updates: a guided trajectory of average length, two predictions of the teacher, the student's loss, Adam.

    All of it is in one dtype, as in the published codes (ours keeps what is trained in float32, which is more work).
    compiled: by torch.compile, in this mode ("default", "max-autotune").
    alone: what is entered while updates are timed.
    """
    import torch
    from diffusers import UNet2DConditionModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configs, schedule = work.architecture(arch)
    recipe = work.plan(arch, method, batch_size, dtype)
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    if arch == "tiny":
        torch.set_num_threads(1)  # waking threads costs more than they do
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    with device:
        teacher = UNet2DConditionModel.from_config(work.unet_config(arch)).to(kind).requires_grad_(False)
        student = UNet2DConditionModel.from_config(work.unet_config(arch)).to(kind)
    student.load_state_dict(teacher.state_dict())
    teacher, student = (unet.to(memory_format=torch.channels_last) for unet in (teacher, student))
    names = set(changed_names(recipe, configs))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert len(trained) == len(names)
    optimizer = torch.optim.Adam(trained, lr=recipe.optimizer.learning_rate, fused=device.type == "cuda")
    if recipe.remat or arch == "sdxl":
        student.enable_gradient_checkpointing()
        student.train()
    ours = student if recipe.settings.sample_with == "student" else teacher
    if compiled:
        options = {"mode": None if compiled == "default" else compiled, "dynamic": False}
        teacher, ours, student = (torch.compile(unet, **options) for unet in (teacher, ours, student))

    scheduler = _scheduler(recipe.settings.sampler)
    scheduler.set_timesteps(recipe.settings.sampling_steps, device=device)
    rounds, guidance = work.updates(recipe, schedule), recipe.settings.sampling_guidance
    unet, side = configs["unet"], configs["unet"].sample_size
    random = lambda *shape: torch.randn(shape, device=device, dtype=kind)  # noqa: E731
    null, concept = (random(1, 77, max(unet.contexts)).expand(batch_size, -1, -1) for _ in range(2))

    def evaluate(model: Any, x: Any, t: Any, prompts: Any) -> Any:
        added = {}
        if unet.addition_embed_type:
            pooled = torch.ones(len(x), configs["text_encoder_2"].projection_dim, device=device, dtype=kind)
            sizes = torch.full((len(x), 6), 1024.0, device=device, dtype=kind)
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return model(x, t, prompts, **added).sample

    pair = torch.cat([null, concept])

    def update() -> Any:
        x = random(batch_size, 4, side, side).to(memory_format=torch.channels_last) * scheduler.init_noise_sigma
        scheduler._step_index = None
        with torch.no_grad():
            for t in scheduler.timesteps[:rounds]:
                two = scheduler.scale_model_input(torch.cat([x, x]), t)
                e_null, e_concept = evaluate(ours, two, t, pair).clone().chunk(2)
                x = scheduler.step(e_null + guidance * (e_concept - e_null), t, x).prev_sample.to(kind)
            t = scheduler.timesteps[rounds]
            x = scheduler.scale_model_input(x, t)
            e_null, e_concept = evaluate(teacher, torch.cat([x, x]), t, pair).clone().chunk(2)
            target = e_null - (e_concept - e_null)
        loss = torch.nn.functional.mse_loss(evaluate(student, x, t, concept).float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def timed() -> tuple[float, float]:
        began = time.perf_counter()
        loss = update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, float(loss.detach())

    (first, _), *_ = [timed() for _ in range(3)]
    with alone():
        seconds, losses = zip(*(timed() for _ in range(steps)), strict=True)
    each = statistics.median(seconds)
    return {
        "version": f"torch {torch.__version__}",
        "kind": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "rounds": rounds,
        "step_s": each,
        "examples_per_s": batch_size / each,
        "first_s": first,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "loss": losses[-1],
    }


def _scheduler(sampler: str) -> Any:
    """The published codes' noise schedule, with diffusers' class for a sampler."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if sampler == "euler":
        return EulerDiscreteScheduler(**noise)
    return DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False)
