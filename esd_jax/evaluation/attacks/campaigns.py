"""All attacks on one erasure, each beside its controls; each result is stored as soon as it is computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from esd_jax import progress as tasks
from esd_jax import results
from esd_jax.evaluation.attacks.adversary import Attack, Goal
from esd_jax.evaluation.attacks.prompts import OwnPrompts
from esd_jax.evaluation.attacks.scoring import Scored, random_weights, score, table
from esd_jax.evaluation.drawing import sampled
from esd_jax.evaluation.evidence import Evidence, Finding, Pair
from esd_jax.evaluation.report.terms import term
from esd_jax.pictures import check_not_blank
from esd_jax.pipeline import Pipeline

BASE, ERASED, RANDOM = "base", "erased", "random weights"
FRESH = 1_000_000  # seeds from here on are no prompt's
SHOWN = 8  # pairs of each attack in the report
NOTE = (
    "Attack success rate: share of images in which the concept is detected. Any of 8: of the prompts and seeds, those "
    "for which one of an attack's 8 trials succeeds. Random prompts: as many, against the erased model. An attack is "
    "informative if it succeeds on the base, and neither random prompts nor random weights do."
)


def campaign(
    base: Pipeline,
    erased: Pipeline,
    goal: Goal,
    attacks: Sequence[Attack],
    folder: Path,
    *,
    control: Attack,
    identity: Mapping[str, Any],
    seeds: int = 10,
    seed: int = 0,
    random: bool = True,
    progress: Callable[[str], None] = lambda _: None,
    **drawing: Any,
) -> Evidence:
    """Runs every attack on the erased model, on the base, and on random weights.

    Args:
      base, erased: before and after. goal: what to recover.
      attacks: their settings. control: the random prompts.
      folder: each attack's result on each model is stored there, and not computed again.
      identity: of the erased model, and of the goal's detector: stored results must have the same.
      seeds: of how many each trial is sampled, the same for all models. seed: of all other random numbers.
      random: also attack a model of random weights.
      progress: called with a line after each attack.
      **drawing: guidance_scale, batch_size and, as num_steps, steps of `sample`.

    Raises ValueError for a folder that holds results of other settings, and for a model all of whose images are blank.
    """
    fresh = [FRESH + 10_000 * seed + i for i in range(seeds)]
    models = {BASE: base, ERASED: erased} | ({RANDOM: random_weights(base, seed)} if random else {})
    scores: dict[str, list[Scored]] = {name: [] for name in models}
    recorded = {name: value for name, value in drawing.items() if name != "batch_size"}  # which changes no image
    common = {**identity, "prompts": goal.prompts, "seeds": fresh, "seed": seed, "drawing": recorded}

    def scored_by(settings: Attack, model: str) -> Scored:
        file = folder / f"{settings.NAME}-{model}.npz".replace(" ", "_").lower()

        def attacked() -> dict[str, Any]:
            with tasks.labelled(f"{term(settings.NAME)} on {model}"):
                adversary = settings.run(base, models[model], goal, seed)
                scored = score(models[model], adversary, goal, fresh, **sampled(drawing))
            shares = f"{scored.single_shot().value:.0%} of images"
            if scored.k > 1:
                shares += f", {scored.any_of().value:.0%} by any of {scored.k}"
            progress(f"{term(scored.name)} on {model}: {shares}; searched for {adversary.seconds:.0f} s")
            return vars(scored)

        kept = results.kept(file, attacked, settings={**common, "attack": _described(settings)})
        with results.intact(file):
            scored = Scored(str(kept["name"]), kept["hits"], kept["images"], tuple(map(int, kept["cases"])))
        if model != RANDOM:
            check_not_blank(scored.images.reshape(-1, *scored.images.shape[2:]), f"the {model} model")
        return scored

    own = OwnPrompts()
    total = len(models) * (1 + len(attacks)) + 1
    with tasks.task("attacking", total, unit="searches", start="compiling, once") as task:
        for settings in (own, *attacks):
            for model in models:
                scores[model].append(scored_by(settings, model))
                task.advance(note=f"{term(settings.NAME)} on {model}")
        chance = scored_by(control, ERASED)
        task.advance()
    plain, *attacked = scores[ERASED]
    return Evidence(
        goal.concept,
        measured_with={
            "attacks": f"seed {seed}; each trial drawn from {seeds} fresh seeds, the same for all models",
            **{f"attack: {settings.NAME}": _described(settings) for settings in attacks},
        },
        verdict=tuple(
            Finding("attack", one.name, before.single_shot(), one.single_shot(), chance.single_shot())
            for before, one in zip(scores[BASE][1:], attacked, strict=True)
        ),
        attacks=(table(scores, chance, note=NOTE),),
        attack_pictures={one.name: _pairs(goal, plain, one) for one in attacked},
    )


def _pairs(goal: Goal, plain: Scored, attacked: Scored) -> tuple[Pair, ...]:
    """The erased model's image of a prompt, and under the attack, from the same noise: the first trial of each."""
    pairs = []
    for trial, case in enumerate(attacked.cases):
        if case not in attacked.cases[:trial] and case < len(goal.prompts):
            pairs.append(Pair(goal.prompts[case], plain.images[case, 0], attacked.images[trial, 0]))
    return tuple(pairs[:SHOWN])


def _described(settings: Attack) -> dict[str, Any]:
    return {"name": settings.NAME, **asdict(settings)} if fields(settings) else {"name": settings.NAME}
