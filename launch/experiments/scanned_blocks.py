"""What a scan over FLUX.1's blocks would save in compiling, and what it would cost in memory.

    python -m launch.experiments.scanned_blocks --topology=v5e:2x2 --double=4 --single=8

Compiles the gradient of a chain of blocks at true width, 512 tokens of text and 1,024 of an image, with respect to a
LoRA of the text's projections, for one TPU that is not there: once with each block written out, as the package has
them, and once with a `lax.scan` over blocks of a kind, whose weights lie stacked. Each is a process of its own. A block
is recomputed in the backward pass, as it is in training. Needs `esd-jax[tpu]`.
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array

from esd_jax import lora
from esd_jax.models import layers
from esd_jax.models.flux import DoubleBlock, FluxConfig, SingleBlock
from esd_jax.params import Network, functional, shape_of
from esd_jax.planning.plan import readable
from launch import command
from launch.benchmarks import child, compiling, tables

FLAGS = flags.FlagValues()
flags.DEFINE_string("topology", "v5e:2x2", "The TPUs, of which one is compiled for.", flag_values=FLAGS)
flags.DEFINE_integer("double", 4, "Blocks of two streams.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("single", 8, "Blocks of one stream.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rank", 16, "Of the LoRA.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("width", 3072, "A multiple of 128; FLUX.1's is 3,072.", lower_bound=128, flag_values=FLAGS)
flags.DEFINE_string("output", None, "A folder for the table.", flag_values=FLAGS)
flags.DEFINE_string("child", None, "Internal: compile one of both.", flag_values=FLAGS)

TEXT, IMAGE, HEAD = 512, 1024, 128
TRAINED = re.compile(r"\.?attn\.(add_[qkv]_proj|to_add_out)\.weight$")
KINDS = ("unrolled", "scan")


def main() -> None:
    FLAGS(sys.argv)
    if FLAGS.child:
        print(json.dumps(measured(FLAGS.child)))
        return
    rows = []
    for kind in KINDS:
        arguments = [sys.executable, "-m", "launch.experiments.scanned_blocks", *sys.argv[1:], f"--child={kind}"]
        rows.append(json.loads(child.output(arguments, child.tpu_environment()).splitlines()[-1]))
        tables.progress(table([rows[-1]]).splitlines()[-1])
    tables.write(FLAGS.output, "scanned_blocks", table(rows), rows)


def table(rows: list[dict[str, Any]]) -> str:
    header = ["blocks", "lowered in", "compiled in", "arguments", "temporaries", "program"]
    sizes = ("arguments", "temporaries", "code")
    return tables.markdown(
        header,
        [
            [row["kind"], f"{row['lower_s']:.0f} s", f"{row['compile_s']:.0f} s", *(readable(row[s]) for s in sizes)]
            for row in rows
        ],
    )


def measured(kind: str) -> dict[str, Any]:
    """Seconds and bytes of one of `KINDS`."""
    config = FluxConfig(num_attention_heads=FLAGS.width // HEAD)
    make = {"dtype": jnp.bfloat16, "rngs": layers.Keys(0)}
    double, single = (functional(partial(block, config, **make)) for block in (DoubleBlock, SingleBlock))
    stacked = kind == "scan"
    chain = scanned if stacked else unrolled
    doubles, singles = of_blocks(double, FLAGS.double, stacked), of_blocks(single, FLAGS.single, stacked)
    factors = jax.tree.map(partial(of_factors, rank=FLAGS.rank, stacked=stacked), trained(doubles), is_leaf=is_trained)

    def loss(factors: Any, doubles: Any, singles: Any, x: Array, context: Array, time: Array, angles: Any) -> Array:
        body = partial(rotated, network=double, rotation=angles)
        x, context = chain(lambda carry, block: body(block, *carry, time), (x, context), joined(doubles, factors))
        body = partial(rotated, network=single, rotation=angles)
        h = jnp.concatenate([context, x], axis=1)
        (h,) = chain(lambda carry, block: (body(block, *carry, time),), (h,), singles)
        return jnp.mean(h.astype(jnp.float32) ** 2)

    half = partial(shape_of, dtype=jnp.bfloat16)
    angles = (shape_of((TEXT + IMAGE, HEAD // 2), jnp.float32),) * 2
    tokens = half((1, IMAGE, config.width)), half((1, TEXT, config.width)), half((1, config.width))
    device = jax.sharding.SingleDeviceSharding(compiling.described(FLAGS.topology)[0])
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), (factors, doubles, singles, *tokens, angles)
    )
    began = time.perf_counter()
    lowered = jax.jit(jax.grad(loss)).lower(*arguments)
    lower_s = time.perf_counter() - began
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "kind": kind,
        "lower_s": lower_s,
        "compile_s": time.perf_counter() - began - lower_s,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def rotated(block: Any, *inputs: Array, network: Network, rotation: Any) -> Any:
    return network.apply(block, *inputs, rotation=rotation)


def unrolled(body: Any, carry: Any, blocks: Any) -> Any:
    for block in blocks:
        carry = jax.checkpoint(body)(carry, block)
    return carry


def scanned(body: Any, carry: Any, blocks: Any) -> Any:
    return jax.lax.scan(lambda carry, block: (jax.checkpoint(body)(carry, block), None), carry, blocks)[0]


def of_blocks(network: Network, count: int, stacked: bool) -> Any:
    """The shapes of so many blocks' tensors: a list of their dictionaries, or one of stacked tensors."""
    shape = {name: shape_of(s.shape, jnp.bfloat16) for name, s in network.shapes.items()}
    if stacked:
        return {name: shape_of((count, *s.shape), s.dtype) for name, s in shape.items()}
    return [dict(shape) for _ in range(count)]


def trained(blocks: Any) -> Any:
    """Of blocks' tensors those that have a LoRA."""
    if isinstance(blocks, Mapping):
        return {name: s for name, s in blocks.items() if TRAINED.search(name)}
    return [trained(block) for block in blocks]


def is_trained(node: Any) -> bool:
    return isinstance(node, Mapping)


def of_factors(tensors: Mapping[str, Any], rank: int, stacked: bool) -> dict[str, Any]:
    """The shapes of LoRA factors, float32."""
    factors = {}
    for name, s in tensors.items():
        *count, inputs, outputs = s.shape
        factors[name + lora.A] = shape_of((*count, inputs, rank), jnp.float32)
        factors[name + lora.B] = shape_of((*count, rank, outputs), jnp.float32)
    return factors


def joined(blocks: Any, factors: Any) -> Any:
    """The blocks' tensors, of which those with factors are `Factored`, in the compute dtype."""
    if not isinstance(blocks, Mapping):
        return [joined(block, own) for block, own in zip(blocks, factors, strict=True)]
    half = {name: a.astype(jnp.bfloat16) for name, a in factors.items()}
    return {
        **blocks,
        **{
            name: layers.Factored(first, half[name + lora.A], half[name + lora.B])
            for name, first in trained(blocks).items()
        },
    }


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
