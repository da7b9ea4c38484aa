"""`esd-jax sample`: draw images from prompts, by any weights, sampler and guidance rule."""

import dataclasses
from typing import Any

from absl import flags

from esd_jax.cli import common, early
from esd_jax.cli.common import Verb
from esd_jax.inputs import finite
from esd_jax.prompt_files import file_of, listed

USAGE = """\
  esd-jax sample  --base=BASE --prompts="A;B" --output=FILE.png [--delta=FILE ...]   generate images
                  [--sld=weak|medium|strong|max | --edit="CONCEPT; scale=-5" ...] [--reweight=WORD=FACTOR ...]"""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("base", "emoji", "The checkpoint.", flag_values=values)
    flags.DEFINE_multi_string("delta", [], f"What to apply to it: {common.APPLIED}.", flag_values=values)
    flags.DEFINE_string(
        "prompts",
        None,
        "Prompts separated by ';', or a .txt file with one a line, or a CSV with a column prompt.",
        flag_values=values,
    )
    text = "Image i depends on the seed and i alone; a CSV of prompts brings seeds of its own."
    flags.DEFINE_integer("seed", 0, text, 0, 2**32 - 1, flag_values=values)
    text = (
        "Sampler steps; by default the model's own: 50 of Stable Diffusion and FLUX.2 [klein], 28 of FLUX.1 [dev] and "
        "SD3, 4 of [schnell], 20 of the embedded models."
    )
    common.define_steps(values, None, text)
    text = (
        "Of classifier-free guidance, 1: none; of FLUX.1 [dev] an input. By default the model's own: 7.5 of Stable "
        "Diffusion, 3.5 of [dev], 7 of SD3, 4 of FLUX.2 [klein], 3 of the embedded models; [schnell] has no guidance."
    )
    flags.DEFINE_float("guidance_scale", None, text, flag_values=values)
    text = "Of FLUX.1 [dev]: of classifier-free guidance beside its own, with which --negative_prompt and rules act."
    flags.DEFINE_float("true_cfg", None, text, flag_values=values)
    flags.DEFINE_string("negative_prompt", None, "In place of the empty prompt.", flag_values=values)
    flags.DEFINE_string(
        "sampler",
        None,
        "ddim, pndm, lms, euler, euler_ancestral, heun, dpmpp_2m, unipc, ddpm, lcm or flow_euler; by default the "
        "checkpoint's own.",
        flag_values=values,
    )
    flags.DEFINE_float("eta", 0.0, "DDIM's stochasticity, 0 to 1.", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.", flag_values=values)
    flags.DEFINE_string("variant", None, "Of the base's files, as diffusers means it (fp16).", flag_values=values)
    common.define_images(values)
    flags.DEFINE_enum(
        "sld",
        None,
        ["weak", "medium", "strong", "max"],
        "Safe Latent Diffusion: steers away from --safety_prompt, so strongly.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "safety_prompt",
        None,
        "With --sld: the concept; by default all that its paper calls unsafe.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "edit",
        [],
        "Semantic guidance (SEGA) towards a concept, or with a negative scale away from it. 'CONCEPT', or with some of "
        "'CONCEPT; scale=-5; warmup=10; cooldown=40; threshold=0.9; weight=1'.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "reweight",
        [],
        "WORD=FACTOR: multiplies the attention to a word, or phrase, of the prompts (Prompt-to-Prompt); 0 ignores it. "
        "The word '<|endoftext|>' is what follows a prompt, which also holds the whole of it.",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> None:
    from esd_jax import api
    from esd_jax.evaluation import testbed
    from esd_jax.evaluation.drawing import sampled
    from esd_jax.io import images

    common.check_numbers(values)
    output = common.output(values)
    prompts, seed = _prompts(common.required(values, "prompts"), values.seed, values["seed"].present > 0)
    images.check_output(output)
    rule, reweight = _rule(values), _reweight(values.reweight)
    pipeline = common.applied(api.load(values.base, dtype=values.dtype, variant=values.variant), values.delta)
    bed = testbed.of(pipeline.provenance.source)
    asked = common.options(values, "steps guidance_scale true_cfg negative_prompt sampler eta height width batch_size")
    options = sampled(bed.sampling) if bed else {}
    options |= {name: value for name, value in asked.items() if value is not None}
    drawn = api.sample(pipeline, prompts, seed=seed, rule=rule, reweight=reweight, **options)
    images.write_images(drawn, output)
    print(f"{len(drawn)} images in {output}")


def _rule(values: flags.FlagValues) -> Any:
    """The guidance rule that --sld or --edit names, or None."""
    from esd_jax.diffusion.rules import SEGA, SLD

    if values.sld and values.edit:
        raise ValueError("--sld and --edit are two guidance rules: give one")
    if values.safety_prompt is not None and not values.sld:
        raise ValueError("--safety_prompt needs --sld")
    if values.sld:
        return SLD.preset(values.sld, *([] if values.safety_prompt is None else [values.safety_prompt]))
    return SEGA(tuple(map(_edit, values.edit))) if values.edit else None


def _edit(text: str) -> Any:
    """'CONCEPT; scale=-5; warmup=10' -> Edit."""
    from esd_jax.diffusion.rules import Edit

    concept, *settings = (part.strip() for part in text.split(";"))
    known = [field.name for field in dataclasses.fields(Edit)][1:]
    numbers = {}
    for setting in filter(None, settings):
        name, _, value = (part.strip() for part in setting.partition("="))
        if name not in known:
            raise ValueError(f"--edit: {setting!r} is no setting; choose of {', '.join(known)}")
        numbers[name] = finite(value, f"--edit: {name}")
    return Edit(concept, **numbers)


def _reweight(assignments: list[str]) -> dict[str, float]:
    """'WORD=FACTOR', ... -> {word: factor}."""
    factors = {}
    for text in assignments:
        word, _, factor = text.rpartition("=")
        if not word.strip():
            raise ValueError(f"--reweight={text} is not WORD=FACTOR")
        factors[word.strip()] = finite(factor, f"--reweight: {word}")
    return factors


def _prompts(text: str, seed: int, explicit: bool) -> tuple[list[str], int | list[int]]:
    """'A; B', or those of a .txt or .csv file; and the seeds. A CSV brings its own, as `evaluate` draws it."""
    file = file_of(text, "--prompts")
    if file is None or file.suffix.lower() != ".csv":
        return listed(text, "--prompts"), seed
    from esd_jax.evaluation.prompts import load

    cases = load(file).cases
    return [case.prompt for case in cases], seed if explicit else [case.seed for case in cases]


VERB = Verb(USAGE, define, run, check=early.check_models)
