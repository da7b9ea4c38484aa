"""What a run would take: printed by `--dry_run`, and checked before a run on devices that say what memory they have."""

import dataclasses
from typing import Any

from esd_jax.cli import common


def planned(plan: Any, runs: int = 1, at_once: int | None = None) -> Any:
    """The plan of a run, where the device says how much memory it has; checked before anything is loaded.

    runs: so many such runs are trained together, `at_once` of them computed at a time.

    Raises ValueError if they cannot fit.
    """
    from esd_jax import api
    from esd_jax.planning.plan import check, make_plan

    if not (limit := memory("bytes_limit")):
        return None
    configs, schedule = api.architecture(plan.base, variant=plan.variant, revision=plan.revision)
    size = make_plan(configs, schedule, plan).together(runs, at_once)
    if warning := check(size, limit):
        common.say(f"warning: {warning}")
    return size


def memory(what: str) -> int | None:
    """A statistic of the first device's memory, in bytes; None on CPUs, which have none."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get(what)


def report(plan: Any, arch: str | None, compiling: bool, runs: int = 1, at_once: int | None = None) -> None:
    """Prints what a recipe would train, from shapes alone.

    arch: in place of its base. compiling: the step of one run, too. runs, at_once: as of `planned`.
    """
    from esd_jax import api, examples
    from esd_jax.planning import ahead, duration
    from esd_jax.planning.plan import make_plan

    configs, schedule = api.architecture(arch or plan.base, variant=plan.variant, revision=plan.revision)
    if unknown := examples.unknown(arch or plan.base, [concept.text for concept in plan.concepts]):
        common.say(f"warning: {unknown}")
    size = (alone := make_plan(configs, schedule, plan)).together(runs, at_once)
    print(f"base      {arch or plan.base}\nsubset    {plan.subset}\n{size}")
    if (count := len(plan.concepts)) > 1 and (steps := plan.training.steps):
        print(f"updates   {steps}, about {steps / count:.3g} for each of {count} concepts")
    if time := duration.estimates(size, plan):
        print(time)
    if duration.UNFIT in time and not plan.rank and plan.settings.trained:
        smaller = make_plan(configs, schedule, dataclasses.replace(plan, rank=8)).together(runs, at_once)
        print(f"          --rank=8 trains a LoRA in {smaller.peak / 2**30:.2f} GiB")
    if compiling:
        program = ahead.compiled(configs, schedule, plan)
        print(f"{program}\n          {alone.peak / program.peak:.2f} of it is what the plan expects")
