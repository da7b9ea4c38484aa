"""`esd-jax purify`: draw real images anew by an erased checkpoint, and tell how exactly that works."""

from collections.abc import Mapping

import numpy as np
from absl import flags

from esd_jax.cli import common, early
from esd_jax.cli.common import Verb

USAGE = """\
  esd-jax purify  IMAGE ... --run=RUN | --base=BASE [--delta=FILE ...]   regenerate real images without the concept
                  --output=OUTPUT [--prompt=CONCEPT]"""


def define(values: flags.FlagValues) -> None:
    values.set_gnu_getopt(True)  # the images may stand before the flags
    flags.DEFINE_multi_string("image", [], "An image file; also without --image=.", flag_values=values)
    flags.DEFINE_string("run", None, "A run's folder: its newest checkpoint generates the images.", flag_values=values)
    flags.DEFINE_string("base", None, "The checkpoint; with --run: where its base lies now.", flag_values=values)
    flags.DEFINE_multi_string("delta", [], f"What to apply to it: {common.APPLIED}.", flag_values=values)
    flags.DEFINE_string(
        "prompt",
        "",
        "The prompt of inversion and generation: by default empty; or the concept.",
        flag_values=values,
    )
    common.define_steps(values, 35, "DDIM steps, up and down.")
    flags.DEFINE_float("guidance_scale", 1.0, "Guidance scale of generation; 1: none.", flag_values=values)
    flags.DEFINE_float("inversion_guidance_scale", 1.0, "Guidance scale of inversion; 1: none.", flag_values=values)
    flags.DEFINE_enum(
        "inverter",
        "unmodified",
        ["unmodified", "itself"],
        "The weights that invert: the base's, or those that generate, which without guidance reconstruct any image.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "timestep",
        "level",
        ["level", "target"],
        "The network's timestep in each step of inversion: the one that it steps from (level), or the one that it "
        "steps to (target), as in diffusers.",
        flag_values=values,
    )
    common.define_images(values)
    flags.DEFINE_bool(
        "compare", True, "Also regenerate the images by the unmodified weights, to measure what inversion alone loses.",
        flag_values=values,
    )  # fmt: skip


def run(values: flags.FlagValues) -> None:
    from esd_jax import sampling
    from esd_jax.io import exact, images

    output = common.output(values)
    images.check_output(output)
    if not values.image:
        raise ValueError("purify needs at least one image")
    if not values.run and not values.base:
        raise ValueError("purify needs --run, or --base")
    source = common.source(values)
    pipeline = common.applied(source, values.delta)
    size = sampling.image_size(pipeline.configs, values.height, values.width)
    inputs = np.asarray(sampling.to_uint8(images.read_images(values.image, size)))
    options = common.options(values, "steps guidance_scale inversion_guidance_scale timestep batch_size")
    plain = exact.unmodified(source)  # a whole transformer of --delta is no edit
    inverter = plain if values.inverter == "unmodified" else pipeline
    drawn = {"these images": sampling.purify(pipeline, inputs, values.prompt, inverter=inverter, **options)}
    images.write_images(drawn["these images"], output)
    print(f"{len(inputs)} images in {output}")
    if values.compare:
        if pipeline.edits or values.delta:
            drawn["by the unmodified weights"] = sampling.purify(plain, inputs, values.prompt, **options)
        drawn["by the autoencoder alone"] = sampling.reconstruct(pipeline, inputs, batch_size=values.batch_size)
    print(_likeness(inputs, drawn))


def _likeness(inputs: np.ndarray, drawn: Mapping[str, np.ndarray]) -> str:
    """A line for each set of images: their similarity to the inputs."""
    from esd_jax.metrics.likeness import ssim

    lines = ["similarity to the inputs (SSIM), mean and lowest"]
    for name, images in drawn.items():
        likeness = ssim(images, inputs)
        lines.append(f"  {name:26}{likeness.mean():.3f}  {likeness.min():.3f}")
    return "\n".join(lines)


VERB = Verb(USAGE, define, run, positional="image", check=early.check_models)
