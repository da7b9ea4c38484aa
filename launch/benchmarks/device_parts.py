"""The parts of `launch.device_check`: each a function of where it writes, and of what is named behind its colons."""

import contextlib
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGAN = time.time()


@dataclass(frozen=True)
class Output:
    """Where a part's results go."""

    folder: Path
    part: str

    def say(self, **fields: Any) -> None:
        """A line of results.jsonl, on disk when this returns."""
        line = json.dumps({"part": self.part, "at": round(time.time() - BEGAN, 1), **fields})
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process at a time on the device while it is timed."""
    import fcntl

    with open(os.environ.get("DEVICE_CHECK_LOCK", "/var/tmp/device_check.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def machine(output: Output) -> None:
    """The card, what is installed, and how fast it multiplies matrices of bfloat16: what utilisation is a part of."""
    import jax
    import jax.numpy as jnp

    from esd_jax.models import attention

    device = jax.devices()[0]
    gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout if has_gpu() else ""
    output.say(
        kind=device.device_kind, platform=device.client.platform_version, device=str(attention.describe(device)),
        memory=device.memory_stats(), jax=jax.__version__, python=sys.version.split()[0], seen=gpus.strip(),
    )  # fmt: skip
    try:
        from jax._src.lib import _jax

        target = _jax.get_topology_for_devices(jax.devices()).target_config
        (output.folder / "target_config.txtpb").write_text(str(target))  # to compile for this card without it
    except Exception as error:  # private, and of GPUs alone
        output.say(target_config=str(error)[:200])
    side = 8192 if device.platform == "gpu" else 1024
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    with alone():
        seconds = timed(lambda: multiply(a, b), 20)
    output.say(ceiling_tflops=2 * side**3 / seconds / 1e12, side=side)


SHAPES = (  # heads, size, queries, tokens
    (8, 40, 4096, 4096), (8, 80, 1024, 1024), (8, 160, 256, 256), (10, 64, 4096, 4096),
    (8, 40, 4096, 77), (8, 80, 1024, 77), (20, 64, 1024, 77),
)  # fmt: skip


def attention(output: Output) -> None:
    """Each implementation's error against float32, forwards and backwards, and its time; and whether cuDNN would pay
    for the 77 tokens of a prompt: forwards as they are, or padded to 80 in both directions."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from esd_jax.models import attention as ours

    def plain(q: Any, k: Any, v: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)

    def fused(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def padded(q: Any, k: Any, v: Any) -> Any:
        k, v = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % 8), (0, 0), (0, 0))) for a in (k, v))
        lengths = jnp.full(q.shape[0], 77, jnp.int32)
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")

    small = jax.devices()[0].platform != "gpu"
    for heads, size, queries, tokens in SHAPES:
        if small:
            queries, tokens = queries // 16, min(tokens, queries // 16)
        rng = np.random.default_rng(size)
        lengths = (queries, tokens, tokens, queries)
        q, k, v, w = (jnp.asarray(rng.normal(size=(2, n, heads, size)), jnp.bfloat16) for n in lengths)

        def gradient(f: Callable[..., Any]) -> Callable[..., Any]:
            return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum((f(q, k, v) * w).astype(jnp.float32)), (0, 1, 2)))  # noqa: B023

        truth = gradient(plain)(*(a.astype(jnp.float32) for a in (q, k, v)))[1]
        case = {"heads": heads, "size": size, "queries": queries, "tokens": tokens}
        # Of odd lengths "cudnn" would take XLA's, which is measured already.
        choices = ("xla", "cudnn", "auto") if queries % 2 == tokens % 2 == 0 else ("xla", "auto")
        ways = {choice: ours.dot_product_attention for choice in choices}
        ways |= {"padded": padded} if tokens == 77 else {}
        for way, f in ways.items():
            os.environ[ours.CHOICE] = way if way != "padded" else "auto"
            try:
                program = gradient(f)
                got = program(q, k, v)[1]
                errors = [float(error(g, t)) for g, t in zip(got, truth, strict=True)]
                with alone():
                    both = timed(lambda: program(q, k, v), 20)  # noqa: B023
                output.say(**case, way=way, errors=errors, ms=1000 * both)
            except Exception as failed:
                output.say(**case, way=way, error=str(failed)[-300:])
        for way, f in {"xla": plain_half(ours), "cudnn": fused}.items():
            try:
                program = jax.jit(f)
                program(q, k, v)
                with alone():
                    output.say(**case, way=way, forward_ms=1000 * timed(lambda: program(q, k, v), 20))  # noqa: B023
            except Exception as failed:
                output.say(**case, way=way, forward=str(failed)[-300:])


def plain_half(ours: Any) -> Callable[..., Any]:
    """Our attention without a kernel of its own."""
    return lambda q, k, v: ours.weighted_values(ours.attention_maps(q, k, dtype=v.dtype), v)


def right(output: Output) -> None:
    """Three updates of the tiny network: on the CPU in float32, and on the device in float32 and bfloat16."""
    import jax
    import numpy as np

    from esd_jax.models import attention as ours
    from launch.benchmarks import work
    from launch.benchmarks.step import Step

    os.environ[ours.CHOICE] = "xla"
    results = {}
    for dtype, platform in (("float32", "cpu"), ("float32", None), ("bfloat16", None)):
        device = jax.devices(platform)[0] if platform else jax.devices()[0]
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            update = Step(work.plan("tiny", "esd-x", 2, dtype), "tiny", device)
            # A step donates its state, and the arrays that the state consists of.
            before = {name: np.array(value, np.float32) for name, value in update.state.theta.items()}
            losses = [float(update().loss) for _ in range(3)]
        theta = update.state.theta
        moved = [np.asarray(theta[name], np.float32) - before[name] for name in sorted(before)]
        results[dtype, platform or device.platform] = losses, np.concatenate([part.ravel() for part in moved])
    (_, truth), *_ = results.values()
    for (dtype, where), (losses, moved) in results.items():
        output.say(dtype=dtype, where=where, losses=losses, error_of_change=float(error(moved, truth)))


def step(output: Output, arch: str, batch: str) -> None:
    """A training step at true size: its program, its time, its memory beside XLA's figure and the plan."""
    import jax

    from esd_jax.planning import hlo
    from esd_jax.planning.duration import peak_flops
    from launch.benchmarks import work
    from launch.benchmarks.step import Step

    device = jax.devices()[0]
    update = Step(work.plan(arch, "esd-x", int(batch)), arch, device)
    text, memory = update.program.as_text(), update.program.memory_analysis()
    with gzip.open(output.folder / f"{arch}_{batch}.hlo.gz", "wt") as file:
        file.write(text)
    output.say(
        trace_s=update.trace_s, compile_s=update.compile_s,
        kernels=[vars(kernel) for kernel in hlo.kernels(hlo.Program(text))],
        compiled_peak=memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )  # fmt: skip
    with alone():
        seconds = []
        for _ in range(10):
            began = time.perf_counter()
            metrics = jax.block_until_ready(update())
            seconds.append(time.perf_counter() - began)
    each = statistics.median(seconds[2:])
    output.say(step_s=each, seconds=seconds, examples_per_s=int(batch) / each, loss=float(metrics.loss),
               peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"))  # fmt: skip
    flops, most = update.flops(), peak_flops(device.device_kind)
    mfu = flops / each / most if most else None
    output.say(flops=flops, tflops_per_s=flops / each / 1e12, mfu=mfu, planned=update.planned())


def preset(output: Output, name: str, arch: str) -> None:
    """Seconds of an update of another preset of ESD, on average over many, as it makes them: beside `step`'s, what a
    whole erasure takes, since both make as many updates."""
    import jax

    from launch.benchmarks import work
    from launch.benchmarks.step import Step

    update = Step(work.plan(arch, "esd-x", 1, preset=name), arch, jax.devices()[0])
    output.say(trace_s=update.trace_s, compile_s=update.compile_s)
    with alone():
        output.say(step_s=timed(update, 40))


def torch(output: Output, arch: str, batch: str, mode: str) -> None:
    """The same in PyTorch and diffusers. mode: "eager", or that of torch.compile."""
    from launch.benchmarks import reference

    compiled = None if mode == "eager" else mode
    output.say(**reference.measure(arch, "esd-x", int(batch), "bfloat16", 5, compiled=compiled, alone=alone))


def sample(output: Output, arch: str, batch: str) -> None:
    """Images a second: 50 guided steps of DDIM by the network alone, in one program."""
    import jax
    import jax.numpy as jnp

    from esd_jax import families
    from esd_jax.diffusion import programs, samplers
    from esd_jax.pipeline import network
    from launch.benchmarks import work
    from launch.benchmarks.values import values

    configs, schedule = work.architecture(arch)
    net, number = network(configs["unet"], "bfloat16"), int(batch)
    params = {name: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16) for name, s in net.shapes.items()}
    prompts = families.of(configs).encoded(configs, number, jnp.bfloat16)
    params, null, cond = values((params, prompts, prompts), jax.devices()[0])
    sampler, side = samplers.make_sampler(schedule, "ddim", 50), configs["unet"].sample_size

    run, encoded = programs.steps(net, sampler), ((null, None), (cond, None))
    x = jax.random.normal(jax.random.key(0), (number, side, side, 4))
    began = time.perf_counter()
    jax.block_until_ready(run(params, x, encoded, 7.5))
    first = time.perf_counter() - began
    with alone():
        seconds = timed(lambda: run(params, x, encoded, 7.5), 3)
    output.say(first_s=first, images_per_s=number / seconds)


def resume(output: Output) -> None:
    """The embedded model's erasure, killed and taken up, beside one that was not: whether the weights are the same."""
    import numpy as np
    from safetensors.numpy import load_file

    deltas = {}
    for name in ("whole", "killed"):
        folder = output.folder / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "esd_jax.cli", "erase", "--config=emoji", "--config.concept=neon style",
                   "--config.steps=12", "--config.checkpoint_every=4", f"--config.output_dir={folder}"]  # fmt: skip
        if name == "killed":
            process = subprocess.Popen(command)
            while process.poll() is None and not list(folder.glob("checkpoints/8*")):
                time.sleep(0.05)
            process.kill()
            process.wait()
            command.append("--resume")
        began = time.perf_counter()
        subprocess.run(command, check=True)
        output.say(run=name, seconds=time.perf_counter() - began)
        (file,) = folder.glob("*.safetensors")
        deltas[name] = load_file(file)
    whole, killed = deltas.values()
    differences = [float(np.abs(whole[k].astype("f4") - killed[k].astype("f4")).max()) for k in whole]
    output.say(largest_difference=max(differences), bit_equal=max(differences) == 0)
    shutil.rmtree(output.folder / "runs")


def timed(call: Callable[[], Any], times: int) -> float:
    """Seconds of one of so many calls, which follow each other without waiting."""
    import jax

    jax.block_until_ready([call() for _ in range(3)])
    began = time.perf_counter()
    jax.block_until_ready([call() for _ in range(times)])
    return (time.perf_counter() - began) / times


def error(values: Any, truth: Any) -> Any:
    """|found - truth| / |truth|."""
    import numpy as np

    values, truth = (np.asarray(a, np.float64).ravel() for a in (values, truth))
    return np.linalg.norm(values - truth) / np.linalg.norm(truth)


PARTS = {
    "machine": machine, "attention": attention, "right": right, "step": step, "torch": torch, "sample": sample,
    "resume": resume, "preset": preset,
}  # fmt: skip
