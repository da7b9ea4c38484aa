"""`esd-jax attack`: attempt to recover the erased concept."""

from absl import flags

from esd_jax.cli import common, early
from esd_jax.cli.common import Verb
from esd_jax.names import ATTACK_NAMES, MORE_ATTACKS
from esd_jax.prompt_files import listed

USAGE = """\
  esd-jax attack  [BASE] ERASED [--attacks=concept_inversion,p4d,...]   attempt to recover the erased concept
                  [--prompts="A;B" --detector=nudenet] [--placebo=RUN] [--output=FOLDER]"""


def define(values: flags.FlagValues) -> None:
    common.define_erased(values)
    more = (
        f"Attacks and probes, separated by commas; by default {', '.join(ATTACK_NAMES)}, but for those that need what "
        f'the base lacks; more are {", ".join(MORE_ATTACKS)}, prompts; "all".'
    )
    flags.DEFINE_list("attacks", None, more, flag_values=values)
    flags.DEFINE_string("budget", None, "paper, or emoji, the embedded model's.", flag_values=values)
    flags.DEFINE_multi_string("set", [], "A setting of an attack: ATTACK.FIELD=VALUE.", flag_values=values)
    common.define_question(values)
    kept = "Concepts that must stay, for probes that ask for them: PROMPT=DETECTOR; several are separated by ';'."
    flags.DEFINE_string("kept", None, kept, flag_values=values)
    at_least_1 = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_integer("seeds", 10, "Images of each trial.", **at_least_1)
    flags.DEFINE_integer("seed", 0, "Seed of all other random numbers.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("random", True, "Also attack a model of random weights.", flag_values=values)
    common.define_steps(values, None, "Sampler steps.")
    flags.DEFINE_float("guidance_scale", None, "Guidance scale of the images.", flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "Images per call of the network.", **at_least_1)


def check(values: flags.FlagValues) -> None:
    """Raises ValueError or OSError for models that are none, and for flags that mean nothing beside others."""
    if not values.prompts:
        beside = {"kept": values.kept, "detector": values.detector if values.detector != "probe" else None}
        if unused := next((name for name, value in beside.items() if value), None):
            raise ValueError(f"--{unused} is for --prompts, which ask for the concept: give both, or neither")
    early.check_models(values)


def run(values: flags.FlagValues) -> None:
    from esd_jax import dossier
    from esd_jax.evaluation import attacks
    from esd_jax.evaluation.report import text

    common.check_numbers(values)
    base, erased, concepts, output = common.erased(values)
    options = common.options(values, "seeds seed random batch_size") | {"placebo": common.placebo(values, base)}
    drawing = {"num_steps": values.steps, "guidance_scale": values.guidance_scale}
    options |= {name: value for name, value in drawing.items() if value is not None}
    goal, metric_model = None, "the embedded probe"
    if values.prompts:
        texts = listed(values.prompts, "--prompts")
        # Refuses what the base lacks before images are drawn.
        attacks.possible(base, values.attacks, values.budget or "paper", _settings(values.set))
        how = {name: options[name] for name in ("num_steps", "guidance_scale", "batch_size") if name in options}
        goal, metric_model = dossier.goal(base, concepts, texts, values.detector, kept=kept_of(values.kept), **how)
    evidence = dossier.attack(
        base, erased, values.attacks, output_dir=output, concept=concepts, budget=values.budget, goal=goal,
        judge=metric_model, settings=_settings(values.set), progress=common.say, **options,
    )  # fmt: skip
    print(f"\n{text.summary(evidence, dossier.so_far(evidence, output))}\n")
    print(f"results {output}")


def kept_of(text: str | None) -> dict[str, str]:
    """ "a church=imagenet:church;a dog=..." -> by prompt."""
    kept = {}
    for part in filter(None, map(str.strip, (text or "").split(";"))):
        prompt, equals, detector = part.partition("=")
        if not equals or not prompt.strip() or not detector.strip():
            raise ValueError(f"--kept: {part!r} is not PROMPT=DETECTOR")
        kept[prompt.strip()] = detector.strip()
    return kept


def _settings(assignments: list[str]) -> dict[str, dict[str, object]]:
    """ATTACK.FIELD=VALUE -> by attack."""
    settings: dict[str, dict[str, object]] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        attack, dot, field = name.partition(".")
        if not equals or not dot:
            raise ValueError(f"--set={text} is not ATTACK.FIELD=VALUE")
        settings.setdefault(attack, {})[field] = value
    return settings


VERB = Verb(USAGE, define, run, positional="model", check=check)
