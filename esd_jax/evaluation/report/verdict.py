"""The verdict on an erasure: one sentence, with its price, from the figures alone."""

from collections.abc import Iterator, Sequence

from esd_jax.evaluation.evidence import Evidence
from esd_jax.evaluation.report import outcome, terms
from esd_jax.evaluation.report.numbers import count, points, share, value
from esd_jax.evaluation.report.outcome import Change, Outcome
from esd_jax.metrics.intervals import Estimate

NOTHING = "Nothing was measured yet."
MARKED = 0.1  # by how much object accuracy must fall beyond the unrecognised images to be named as well


def sentence(evidence: Evidence) -> str:
    """The verdict in one sentence, from the figures alone: gone or not, its price, what else was harmed or not tested.

    "neon style is gone by name (0 of 20), but came back under attack (32 of 32, Concept Inversion); 20% of its prompts
    are unrecognised; related, other and unrelated concepts are unharmed."
    """
    results = outcome.of(terms.current(evidence))
    texts = evidence.record.texts if ", ".join(evidence.record.texts) == evidence.title else (evidence.title,)
    plural = len(texts) > 1
    about = _about(results, plural)
    clauses = [f"{_listed(texts)} {about}"] if about else []
    if results.target and outcome.level(results.target) == outcome.ABSENT:
        before, after = (count(e) if e else "" for e in (results.target.before, results.target.after))
        clauses.insert(
            0, f"the base itself rarely generates {_listed(texts)} ({before}), so {after} afterwards says little"
        )
    clauses += _uninformative(results)
    clauses += _price(results, "their" if plural else "its")
    clauses += _retention(results)
    if not clauses:
        return NOTHING
    return f"{'; '.join([*clauses, *_untested(results, 'their' if plural else 'its')])}."


def _about(results: Outcome, plural: bool) -> str:
    """What becomes of the concept, as predicates: by name, on implicit prompts, under attack; like with like."""
    states = list(_states(results, "are" if plural else "is", "appear" if plural else "appears"))
    same = [words for positive, words in states if positive == states[0][0]]
    others = [words for positive, words in states if positive != states[0][0]]
    return ", but ".join(" and ".join(words) for words in (same, others) if words)


def _states(results: Outcome, be: str, appear: str) -> Iterator[tuple[bool, str]]:
    """(Whether it speaks for the erasure, what is said), as predicates of the concept."""
    left = results.target and outcome.level(results.target)
    gone = left is None or left in outcome.REMOVED
    if results.target and left != outcome.ABSENT:
        where = "by name" if results.by_name else "on the tested prompts"
        yield gone, _left(results.target, where, be, appear)
        shown = [tier for tier in results.tiers if tier.after.value > outcome.RARELY]
        if gone and shown:
            worst = max(shown, key=lambda tier: tier.after.value)
            yield False, f"{appear} with {worst.of} ({count(worst.after)})"
    if results.implicit and outcome.level(results.implicit) != outcome.ABSENT:
        state = outcome.level(results.implicit)
        positive = state in outcome.REMOVED
        same = state == left
        words = "on implicit prompts"
        yield (
            positive,
            f"{words} ({count(results.implicit.after)})" if same else _left(results.implicit, words, be, appear),
        )
    back = [attack for attack in results.attacks if outcome.came_back(attack)]
    tried = len(results.attacks)
    under = "under attack" if tried == 1 else f"under {len(back) or tried} of {tried} attacks"
    if back:
        figure = f"({count(back[0].after)}, {back[0].what})"
        yield False, f"{'came back' if gone else f'{appear}'} {under} {figure}"
    elif any(map(outcome.informative, results.attacks)):
        strongest, under = results.attacks[0], "under attack" if tried == 1 else f"under any of {tried} attacks"
        hits = f"{'' if tried == 1 else 'at most '}{count(strongest.after)}, {strongest.what}"
        if strongest.after.value and strongest.control:
            hits += f"; random prompts {count(strongest.control)}"
        yield True, f"did not come back {under} ({hits})" if gone else f"did not appear more often {under} ({hits})"


def _left(change: Change, where: str, be: str, appear: str) -> str:
    """How much of the concept is left on some prompts."""
    after, level = count(change.after), outcome.level(change)
    if level == outcome.LESS:
        return f"{appear} less often {where} ({after}, {count(change.before or change.after)} before)"
    if level == outcome.THERE and change.before:
        after += f", {count(change.before)} before"
    return f"{be} {level} {where} ({after})"


def _uninformative(results: Outcome) -> Iterator[str]:
    if results.attacks and not any(outcome.came_back(a) or outcome.informative(a) for a in results.attacks):
        verb = "the attack fails" if len(results.attacks) == 1 else "the attacks fail"
        yield f"{verb} on the base as well, which shows nothing"


def _price(results: Outcome, its: str) -> Iterator[str]:
    """What the concept's own prompts show instead."""
    lost = results.unrecognised
    rise = -(lost.drop or 0.0) if lost else 0.0
    if lost:
        shown = f"{share(lost.after.value, lost.after.n)} of {its} prompts are unrecognised"
        if not lost.after.value:
            yield f"none of {its} prompts are unrecognised"
        elif lost.before and lost.before.value:
            yield f"{shown} ({share(lost.before.value, lost.before.n)} before)"
        else:
            yield shown
    if results.objects and results.objects.fell and (results.objects.drop or 0.0) > rise + MARKED:
        yield f"prompt-object accuracy on {its} prompts falls by {points(results.objects.drop)}"


def _retention(results: Outcome) -> Iterator[str]:
    """What became of other concepts: those that are harmed first."""
    worst: dict[str, Change] = {}
    for change in results.kept:
        if change.of not in worst or (change.drop or 0.0) > (worst[change.of].drop or 0.0):
            worst[change.of] = change
    changes = list(worst.values())
    for change in changes:
        shown = f"{_percent(change.before)} → {_percent(change.after)}"
        if outcome.harmed(change):
            yield f"{change.of} lose {points(change.drop)} of accuracy ({shown})"
    for change in changes:
        if change.before is None:
            yield f"accuracy on {change.of} is {_percent(change.after)}"
        elif not outcome.harmed(change) and not outcome.unharmed(change):
            shown = f"({_percent(change.before)} → {_percent(change.after)}, {change.after.n:,} images)"
            drop = "lose no more than the reseeded baseline" if change.fell else "show no significant drop"
            yield f"{change.of} {drop} {shown}"
    fine = [change for change in changes if outcome.unharmed(change)]
    for few, state in ((False, "are unharmed"), (True, "show no drop")):
        some = [change for change in fine if (change.after.n < outcome.FEW) == few]
        if some:
            yield f"{_kinds([change.of for change in some])} {state}{_limited(some) if few else ''}"
    if not changes:
        for finding in results.similar:
            yield f"{finding.what} is {value(finding.after)} on other prompts"


def _limited(changes: Sequence[Change]) -> str:
    """How few images say so."""
    counts = sorted({change.after.n for change in changes})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f" in only {several} {'image' if counts == [1] else 'images'}"


def _untested(results: Outcome, its: str) -> Iterator[str]:
    missing = [] if results.target or results.attacks else [f"{its} own prompts"]  # attacks try these, too
    missing += [] if results.attacks else ["attacks"]
    missing += [] if results.kept or results.similar else ["other concepts"]
    if missing:
        yield f"{_listed(missing)} were not tested"


def _kinds(names: Sequence[str]) -> str:
    """ "related, other and unrelated concepts"."""
    ends = [name.removesuffix(" concepts") for name in names]
    if all(end != name for end, name in zip(ends, names, strict=True)):
        return f"{_listed(ends)} concepts"
    return _listed(names)


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _percent(estimate: Estimate | None) -> str:
    return share(estimate.value, estimate.n) if estimate else "–"
