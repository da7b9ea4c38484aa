"""Fields of a recipe that a user gives and that mean nothing beside the others. Records and configs have all fields."""

from collections.abc import Iterable

from esd_jax.erasing.round_settings import DEFAULTS
from esd_jax.recipe import Recipe


def check_idle(plan: Recipe, fields: Iterable[str]) -> None:
    """Raises ValueError for a field of rounds where there are none, and for `preserve_weight` of a closed form."""
    fields = list(fields)
    if "preserve_weight" in fields and not plan.settings.trained:
        raise ValueError(
            f"preserve_weight: method {plan.method!r} solves for its result; preserve_scale is what weighs"
        )
    if getattr(plan.settings, "rounds_every", 0):
        return
    if without := [name for name in fields if name in DEFAULTS and name != "rounds_every"]:
        raise ValueError(f"{without[0]} means nothing without rounds: give rounds_every, too, or leave it out")
