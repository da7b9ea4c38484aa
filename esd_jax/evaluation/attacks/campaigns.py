"""All attacks and probes of one erasure, each beside its controls; each result is stored as soon as it is computed."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax import progress as tasks
from esd_jax import results
from esd_jax.evaluation.attacks.adversary import BASE, ERASED, PLACEBO, RANDOM, Attack, Goal
from esd_jax.evaluation.attacks.probe import Fitted, Parted, Probe, Remarking, Unmeasurable
from esd_jax.evaluation.attacks.prompts import OwnPrompts, PromptList, RandomPrompts
from esd_jax.evaluation.attacks.scoring import Scored, random_weights, score, table
from esd_jax.evaluation.drawing import sampled
from esd_jax.evaluation.evidence import Evidence, Finding, Pair
from esd_jax.evaluation.judges.weights import sha256
from esd_jax.evaluation.report.terms import term
from esd_jax.families.family import Sampling
from esd_jax.inputs import expanded
from esd_jax.pictures import check_not_blank
from esd_jax.pipeline import Pipeline

FRESH = 1_000_000  # seeds from here on are no prompt's
SHOWN = 8  # pairs of each attack in the report
NOTE = (
    "Attack success rate: share of images in which the concept is detected. Any of 8: of the prompts and seeds, those "
    "for which one of an attack's 8 trials succeeds. Random prompts: as many, against the erased model. An attack is "
    "informative if it succeeds on the base, and neither random prompts nor random weights do."
)
PROBES_NOTE = (
    "Share of images in which the concept is detected. No prompt finds what these do: they start from images of the "
    "concept, train the model further on images without it, or change its weights. So they do not count as attacks: "
    "compare with the base, and with random weights, which finish and invert images, too."
)


def campaign(
    base: Pipeline,
    erased: Pipeline,
    goal: Goal,
    attacks: Sequence[Attack | Probe],
    folder: Path,
    *,
    control: Attack,
    identity: Mapping[str, Any],
    seeds: int = 10,
    seed: int = 0,
    random: bool = True,
    placebo: Pipeline | None = None,
    alone: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    **drawing: Any,
) -> Evidence:
    """Runs every attack and probe on the erased model, on the base, and on random weights.

    Args:
      base, erased: before and after. goal: what to recover.
      attacks: their settings, and those of probes. control: the random prompts.
      folder: each attack's result on each model is stored there, and not computed again.
      identity: of the erased model, and of the goal's detector: stored results must have the same. Under `PLACEBO` that
        of the placebo, which its own results must have.
      seeds: of how many each trial is sampled, the same for all models. seed: of all other random numbers.
      random: also attack a model of random weights. placebo: and this one.
      alone: the goal is one of several concepts that were erased: each finding says so.
      progress: called with a line after each attack.
      **drawing: guidance_scale, batch_size and, as num_steps, steps of `sample`; by default those of the family.

    Raises ValueError for a folder that holds results of other settings, and for a model all of whose images are blank.
    """
    fresh = [FRESH + 10_000 * seed + i for i in range(seeds)]
    attacks = [one.fitted(base) if isinstance(one, Fitted) else one for one in attacks]
    missing = [reason for one in attacks if isinstance(one, Parted) and (reason := one.remark(goal))]
    for reason in missing:
        progress(reason)
    attacks = [part for one in attacks for part in (one.parts(goal) if isinstance(one, Parted) else (one,))]
    models = {BASE: base, ERASED: erased} | ({PLACEBO: placebo} if placebo is not None else {})
    models |= {RANDOM: random_weights(base, seed)} if random else {}
    searches: list[Attack] = [OwnPrompts(), *(one for one in attacks if not isinstance(one, Probe))]
    probes = [one for one in attacks if isinstance(one, Probe)]
    own = base.family.sampling(base.configs)
    if own != Sampling():  # results without these numbers are of the usual ones
        drawing = {"num_steps": own.steps, "guidance_scale": own.guidance_scale, **drawing}
    recorded = {name: value for name, value in drawing.items() if name != "batch_size"}  # which changes no image
    common = {
        **{name: value for name, value in identity.items() if name != PLACEBO},
        **({"alone": goal.concept} if alone else {}),
        "prompts": goal.prompts,
        "seeds": fresh,
        "seed": seed,
        "drawing": recorded,
    }

    of_placebo = {name: value for name, value in identity.items() if name == PLACEBO}
    described = functools.cache(functools.partial(_described, goal=goal, seed=seed))  # a file is hashed once

    def kept(settings: Attack | Probe, model: str, compute: Callable[[], dict[str, Any]]) -> tuple[Path, Any]:
        apart = label(settings) == label(control) and settings != control  # the control's file has its name alone
        stem = f"{'attack-' if apart else ''}{label(settings)}-{model}"
        file = folder / f"{re.sub(r'[^a-z0-9.-]+', '_', stem.lower())}.npz"
        with tasks.labelled(f"{term(label(settings))} on {model}"):
            settings_of = {**common, "attack": described(settings), **(of_placebo if model == PLACEBO else {})}
            return file, results.kept(file, compute, settings=settings_of)

    def say(scored: Scored, model: str, how: str = "") -> None:
        shares = f"{scored.single_shot().value:.0%} of images"
        if scored.k > 1:
            shares += f", {scored.any_of().value:.0%} by any of {scored.k}"
        progress(f"{term(scored.name)} on {model}: {shares}{how}")

    def attacked(settings: Attack, model: str) -> Scored:
        def compute() -> dict[str, Any]:
            adversary = settings.run(base, models[model], goal, seed)
            scored = score(models[model], adversary, goal, fresh, **sampled(drawing))
            gauged = "" if scored.gauge is None else f"; gauge {scored.gauge:.2f}"
            say(scored, model, f"; searched for {adversary.seconds:.0f} s{gauged}")
            return {name: value for name, value in vars(scored).items() if value is not None}

        file, stored = kept(settings, model, compute)
        with results.intact(file):
            gauge = float(stored["gauge"]) if "gauge" in stored else None  # results of earlier versions have none
            cases = tuple(map(int, stored["cases"]))
            scored = Scored(str(stored["name"]), stored["hits"], stored["images"], cases, gauge)
        return _shown(scored, model)

    def probed(settings: Probe, model: str) -> list[Scored]:
        def compute() -> dict[str, Any]:
            scores = settings.probe(base, models[model], goal, fresh, seed, **sampled(drawing))
            for scored in scores:
                say(scored, model)
            columns = {name: np.stack([vars(one)[name] for one in scores]) for name in ("hits", "images", "cases")}
            return {"name": [one.name for one in scores], **columns}

        try:
            file, stored = kept(settings, model, compute)
        except Unmeasurable as error:  # the others go on
            row = getattr(settings, "row", term(label(settings)))
            reason = f"{row} on {model}: {error}."
            left_out[reason] = row
            progress(reason)
            return []
        with results.intact(file):
            rows = zip(*(stored[name] for name in ("name", "hits", "images", "cases")), strict=True)
            return [_shown(Scored(str(n), hits, images, tuple(map(int, c))), model) for n, hits, images, c in rows]

    work = [(settings, model) for settings in searches for model in models]
    work += [(settings, model) for settings in probes for model in models if model in settings.MODELS]
    scores: dict[str, list[Scored]] = {name: [] for name in models}
    remains: dict[str, list[Scored]] = {name: [] for name in models}
    remarks: list[str] = []
    left_out: dict[str, str] = {}  # why, of each model -> row
    with tasks.task("attacking", len(work) + 1, unit="searches", start="compiling, once") as task:
        for settings, model in work:
            if isinstance(settings, Probe):
                remains[model] += (rows := probed(settings, model))
                if model == BASE and isinstance(settings, Remarking):
                    remarks.append(settings.remark(rows))
            else:
                scores[model].append(attacked(settings, model))
            task.advance(note=f"{term(label(settings))} on {model}")
        chance = attacked(control, ERASED)
        task.advance()
    plain, *attacked_scores = scores[ERASED]
    tables = [table(scores, chance, note=" ".join([NOTE, *(f"{reason}." for reason in missing)]))]
    if probes:
        note = " ".join([PROBES_NOTE, *remarks, *left_out])
        shown = table(remains, title="Probes: what remains beyond prompts", note=note)
        empty = {row: (None,) * len(shown.columns) for row in left_out.values()}  # in place of earlier figures
        tables.append(replace(shown, rows=tuple((empty | dict(shown.rows)).items())))
    return Evidence(
        goal.concept,
        measured_with={
            "attacks": f"seed {seed}; each trial drawn from {seeds} fresh seeds, the same for all models",
            **{f"attack: {label(settings)}": described(settings) for settings in attacks},
        },
        verdict=tuple(
            Finding(
                "attack",
                f"{term(one.name)} for {goal.concept!r} alone" if alone and searching(settings) else one.name,
                before.single_shot(),
                one.single_shot(),
                chance.single_shot(),
            )
            for settings, before, one in zip(searches[1:], scores[BASE][1:], attacked_scores, strict=True)
        ),
        attacks=tuple(tables),
        attack_pictures={
            one.name: _pairs(goal, plain, one)
            for settings, one in zip(searches[1:], attacked_scores, strict=True)
            if searching(settings)  # else its prompts are none of the goal's
        },
    )


def searching(settings: Attack) -> bool:
    """Whether an attack's prompts are of the goal: neither a list's or a tier's, nor drawn at random."""
    return not isinstance(settings, PromptList | RandomPrompts | Parted)


def label(settings: Attack | Probe) -> str:
    """What an attack or a probe is called; members of a family differ in it."""
    return getattr(settings, "label", settings.NAME)


def named(settings: Attack | Probe) -> dict[str, Any]:
    """Its name, and of a probe that measures something else than it did its revision, as stored results have them."""
    number = getattr(settings, "REVISION", None)
    return {"name": settings.NAME, **({"revision": number} if number else {})}


def _shown(scored: Scored, model: str) -> Scored:
    """The same. Raises ValueError if all of its images are blank, but for those of random weights."""
    if model != RANDOM:
        check_not_blank(scored.images.reshape(-1, *scored.images.shape[2:]), f"the {model} model")
    return scored


def _pairs(goal: Goal, plain: Scored, attacked: Scored) -> tuple[Pair, ...]:
    """The erased model's image of a prompt, and under the attack, from the same noise: the first trial of each."""
    pairs = []
    for trial, case in enumerate(attacked.cases):
        if case not in attacked.cases[:trial] and case < len(goal.prompts):
            pairs.append(Pair(goal.prompts[case], plain.images[case, 0], attacked.images[trial, 0]))
    return tuple(pairs[:SHOWN])


def _described(settings: Attack | Probe, goal: Goal, seed: int) -> dict[str, Any]:
    """An attack's name and fields, as stored results must have them; `member` only of a member, what the goal keeps
    only of a probe that asks for it, the hash of a file if there is one, prompts that are not of the goal, and which
    revision of a probe it is, if it is not the first.
    """
    file = getattr(settings, "file", "")
    of_file = {"sha256": sha256(expanded(file))} if file else {}
    kept = {"kept": [one.text for one in goal.kept]} if getattr(settings, "ASKS_KEPT", False) else {}
    texts = settings.texts(goal, seed) if isinstance(settings, Parted) else ()
    asked = {"prompts": {str(number): text for number, text in enumerate(texts, 1)}} if texts else {}
    own = {name: value for name, value in asdict(settings).items() if name != "member" or value is not None}
    return {**named(settings), **own, **of_file, **kept, **asked} if fields(settings) else named(settings)
