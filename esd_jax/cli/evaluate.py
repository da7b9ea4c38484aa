"""`esd-jax evaluate`: measure what an erasure removed, and what it kept."""

from absl import flags

from esd_jax.cli import common, early
from esd_jax.cli.common import Verb
from esd_jax.inputs import expanded, finite

STRENGTH_IMAGES = 40
# Flags of protocols that sample a list of prompts.
OF_LISTS = (
    "steps", "guidance_scale", "measures", "samples", "own_guidance", "convention", "classifier", "clip", "features",
    "reference",
)  # fmt: skip
# Flags of one measure.
OF_MEASURES = {
    "convention": "nudity", "classifier": "objects", "clip": "clip", "features": "distances", "reference": "distances",
}  # fmt: skip
USAGE = """\
  esd-jax evaluate [BASE] ERASED [--protocol=NAME]   measure erasure and retention
                  [--prompts=CSV] [--measures=ssim,lpips,...] [--placebo=RUN] [--output=FOLDER]"""


def define(values: flags.FlagValues) -> None:
    common.define_erased(values)
    flags.DEFINE_string(
        "protocol", "quick",
        "smoke, quick, emoji (the embedded model, by its probe), preservation, i2p, objects, style, coco or custom.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "prompts", None, "A CSV with a column prompt, in place of the protocol's, or a list's name.", flag_values=values
    )
    flags.DEFINE_list(
        "measures",
        None,
        "In place of the protocol's: ssim, lpips, nudity, objects, clip, distances.",
        flag_values=values,
    )
    at_least_1 = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_integer("images", None, "Of each group or of the list; by default the protocol's.", **at_least_1)
    flags.DEFINE_integer("samples", 1, "Images of each prompt of a list.", **at_least_1)
    common.define_steps(values, None, "Sampler steps; by default the protocol's.")
    flags.DEFINE_float("guidance_scale", None, "By default the protocol's.", flag_values=values)
    flags.DEFINE_bool(
        "own_guidance", False, "Sample prompts that bring a guidance scale of their own with it.", flag_values=values
    )
    flags.DEFINE_integer("batch_size", None, "Images per call of the network.", **at_least_1)
    flags.DEFINE_list(
        "strengths",
        None,
        "Also measure these scales of the weight change; 1 is the erasure itself.",
        flag_values=values,
    )
    flags.DEFINE_string("detector", "probe", f"For --strengths. {common.DETECTOR}", flag_values=values)
    flags.DEFINE_string("convention", "esd", "How nudity is counted.", flag_values=values)
    flags.DEFINE_string("classifier", "resnet50", "Of ImageNet: resnet50 or efficientnet-lite0.", flag_values=values)
    flags.DEFINE_string("clip", None, "A CLIP model's folder or hub id.", flag_values=values)
    flags.DEFINE_string("features", "inception", "Of distances: inception or efficientnet-lite0.", flag_values=values)
    flags.DEFINE_string("reference", None, "A folder of real images, for distances.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    from esd_jax import dossier
    from esd_jax.evaluation.report import text

    common.check_numbers(values)
    strengths = [finite(strength, "--strengths") for strength in values.strengths or ()]
    if values["detector"].present and not strengths:
        raise ValueError("--detector is for --strengths: give some, or leave it out")
    base, erased, concepts, output = common.erased(values)
    options = {"num_steps": values.steps} | common.options(values, "guidance_scale batch_size")
    options = {name: value for name, value in options.items() if value is not None}
    if dossier.testbed_for(base, values.protocol, values.prompts) is None:
        if values.placebo:
            raise ValueError("--placebo is for the embedded model's own protocols, without --prompts")
        _check_measures(values)
        request = {name: values[name].value for name in ("convention", "classifier", "clip", "features")}
        request["reference"] = expanded(values.reference) if values.reference else None
        options |= {
            "prompt_list": values.prompts,
            "samples": values.samples,
            "measured": values.measures,
            "own_guidance": values.own_guidance,
            "request": request,
        }
    elif unused := [name for name in OF_LISTS if values[name].present or values[name].value != values[name].default]:
        raise ValueError(f"--{unused[0]} is not for protocol {values.protocol} of the embedded model, which is fixed")
    else:
        options["sham"] = common.placebo(values, base)
    asked = values.detector, None, base, concepts, values.images or STRENGTH_IMAGES
    if strengths:
        common.question(*asked)  # refuses a detector before anything is sampled
    evidence = dossier.evaluate(
        base, erased, values.protocol, output_dir=output, concept=concepts, images=values.images,
        progress=common.say, **options,
    )  # fmt: skip
    if strengths:
        dossier.front(erased, common.metric(*asked), strengths, output_dir=output)
    print(f"\n{text.summary(evidence, dossier.so_far(evidence, output))}\n")
    print(f"results {output}")


def _check_measures(values: flags.FlagValues) -> None:
    """Raises ValueError for a flag of a measure that is not taken."""
    from esd_jax.evaluation.protocols import PROTOCOLS

    if values.measures is None and values.protocol not in PROTOCOLS:
        return  # refused where it is looked up
    taken = values.measures or PROTOCOLS[values.protocol].measures
    for flag, measure in OF_MEASURES.items():
        if values[flag].present and measure not in taken:
            wanted = ",".join([*taken, measure])
            raise ValueError(f"--{flag} is for the measure {measure}, which is not taken: give --measures={wanted}")


VERB = Verb(USAGE, define, run, positional="model", check=early.check_models)
