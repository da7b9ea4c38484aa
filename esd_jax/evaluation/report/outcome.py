"""What the figures of an erasure amount to: gone or not, by name, without it and under attack; its price; retention."""

from collections.abc import Iterable
from dataclasses import dataclass

from esd_jax.evaluation.evidence import Cell, Evidence, Finding, Table
from esd_jax.metrics.intervals import Estimate

ROWS = ("base", "erased", "reseeded baseline")  # of tables
TARGET, DETECTION = "target prompts, ", "detection rate"  # titles of groups, and a column
GONE, UNSEEN, RARE, LESS, THERE = "gone", "not detected", "nearly gone", "less frequent", "still there"
ABSENT = "not shown by the base"
REMOVED = (GONE, UNSEEN, RARE)
RARELY = 0.1  # the detection rate up to which a concept is nearly gone
# Where the 95% interval ends higher, there are too few images to call a concept gone, or nearly gone.
SURELY_GONE, SURELY_RARE = 0.2, 0.3
HARMLESS = 0.05  # a drop in accuracy up to which a concept that shows no significant one is unharmed
FEW = 20  # images below which "unharmed" says how many there were
ON_TARGET, IMPLICIT = "detection rate on target prompts", "detection rate on implicit prompts"
UNRECOGNISED, OBJECTS = "unrecognised", "object accuracy"
ACCURACY = "top-1 accuracy of "


@dataclass(frozen=True)
class Change:
    """A share before and after: what is measured, on what.

    of: the concepts ("related concepts"), or what else is counted.
    before: None where the base was not measured. reseeded: of the base from other noise, where that was measured.
    """

    of: str
    before: Estimate | None
    after: Estimate
    reseeded: Estimate | None = None

    @property
    def drop(self) -> float | None:
        """By how much the share fell, 0 to 1; negative where it rose."""
        return self.before and self.before.value - self.after.value

    @property
    def fell(self) -> bool:
        """Whether it fell significantly: the 95% interval of the difference lies below 0 (Newcombe 1998, method 10)."""
        return self.before is not None and _least(self.before, self.after) > 0

    @property
    def rose(self) -> bool:
        """Whether it rose significantly."""
        return self.before is not None and _least(self.after, self.before) > 0


def _least(more: Estimate, less: Estimate) -> float:
    """The lower bound of the difference of two shares."""
    return more.value - less.value - ((more.value - more.low) ** 2 + (less.high - less.value) ** 2) ** 0.5


@dataclass(frozen=True)
class Outcome:
    """The figures that count most, each the one with the most images. What was not measured is None or empty.

    target: the detection rate of the concept where it is asked for; by_name, whether all prompts name it.
    tiers: on further target prompts, as the name alone and held-out phrasings.
    implicit: on prompts that imply it without its name.
    unrecognised: share of images of target prompts in which the classifier recognises nothing.
    objects: accuracy of the objects that target prompts ask for.
    kept: accuracy on other concepts. similar: other means, as SSIM to the base's images.
    attacks: the strongest first.
    """

    target: Change | None = None
    by_name: bool = True
    tiers: tuple[Change, ...] = ()
    implicit: Change | None = None
    unrecognised: Change | None = None
    objects: Change | None = None
    kept: tuple[Change, ...] = ()
    similar: tuple[Finding, ...] = ()
    attacks: tuple[Finding, ...] = ()


def of(evidence: Evidence) -> Outcome:
    """The outcome that evidence, in today's terms, amounts to."""
    findings = _largest(evidence.verdict)
    erased = [finding for finding in findings if finding.role == "erased" and finding.percent]
    implicit = [finding for finding in erased if finding.what.endswith(IMPLICIT)]
    target = [finding for finding in erased if finding not in implicit]
    kept = [finding for finding in findings if finding.role == "kept"]
    attacks = [finding for finding in findings if finding.role == "attack"]
    return Outcome(
        target=_change(target[0]) if target else None,
        by_name=not target or target[0].what.endswith(ON_TARGET) or target[0].what.startswith(ACCURACY),
        tiers=_tiers(evidence.tables),
        implicit=_change(implicit[0]) if implicit else None,
        unrecognised=_in_tables(evidence.tables, UNRECOGNISED),
        objects=_in_tables(evidence.tables, OBJECTS),
        kept=tuple(_change(finding) for finding in kept if finding.percent),
        similar=tuple(finding for finding in kept if not finding.percent),
        attacks=tuple(sorted(attacks, key=lambda finding: -finding.after.value)),
    )


def level(change: Change) -> str:
    """How much of a concept is left where it is asked for: one of REMOVED, or LESS, THERE, ABSENT."""
    if change.before is not None and change.before.value <= RARELY and not change.rose:
        return ABSENT
    if change.after.value == 0:
        return GONE if change.after.high <= SURELY_GONE else UNSEEN
    if change.before is not None and not change.fell:
        return THERE
    if change.after.value <= RARELY and change.after.high <= SURELY_RARE:
        return RARE
    return THERE if change.before is None else LESS


def came_back(attack: Finding) -> bool:
    """Whether an attack recovers the concept significantly more often than random prompts do."""
    return _more_often(attack.after, attack.control)


def informative(attack: Finding) -> bool:
    """Whether an attack succeeds on the base more often than random prompts do on the erased model."""
    return attack.before is None or _more_often(attack.before, attack.control)


def _more_often(share: Estimate, control: Estimate | None) -> bool:
    """Whether the 95% interval of the difference to a control lies above 0; without one, the share's own."""
    return _least(share, control) > 0 if control else share.low > 0


def harmed(change: Change) -> bool:
    """Whether accuracy fell significantly, and below that of the reseeded baseline where there is one."""
    return change.fell and (change.reseeded is None or change.reseeded.value - change.after.value > HARMLESS)


def unharmed(change: Change) -> bool:
    """Whether accuracy is about what it was before."""
    return not harmed(change) and change.drop is not None and change.drop <= HARMLESS


def _change(finding: Finding) -> Change:
    what = finding.what.removeprefix(ACCURACY)
    return Change(what.partition(": ")[0], finding.before, finding.after, finding.control)


def _largest(findings: Iterable[Finding]) -> list[Finding]:
    """Of findings of one thing, from several protocols, the one with the most images.

    Of other concepts a protocol has the accuracy of object or style, whichever lost more: both are one thing.
    """
    findings = list(dict.fromkeys(findings))
    most: dict[tuple[str, str], int] = {}
    for finding in findings:
        most[_thing(finding)] = max(most.get(_thing(finding), 0), finding.after.n)
    return [finding for finding in findings if finding.after.n == most[_thing(finding)]]


def _thing(finding: Finding) -> tuple[str, str]:
    """What a finding is about."""
    return finding.role, finding.what.partition(": ")[0] if finding.role == "kept" else finding.what


def _in_tables(tables: Iterable[Table], column: str) -> Change | None:
    """A column's shares on target prompts, of the table with the most images."""
    changes = (change for table in tables for change in _by_group(table, column) if _quotes(change))
    return max(changes, key=lambda change: change.after.n, default=None)


def _tiers(tables: Iterable[Table]) -> tuple[Change, ...]:
    """The detection rates on further groups of target prompts, each from the table with the most images."""
    tiers: dict[str, Change] = {}
    for table in tables:
        for column in table.columns:
            for change in _by_group(table, column) if column.endswith(DETECTION) else ():
                if _quotes(change):
                    continue
                if change.of not in tiers or change.after.n > tiers[change.of].after.n:
                    tiers[change.of] = change
    return tuple(tiers.values())


def _quotes(change: Change) -> bool:
    """Whether a group is that of the target prompts themselves, of which its title quotes one."""
    return change.of.startswith('"')


def _by_group(table: Table, column: str) -> list[Change]:
    """A column's shares before and after in each group of target prompts; none in a table without them."""
    if column not in table.columns:
        return []
    place, rows = table.columns.index(column), []
    groups: list[tuple[str, dict[str, Cell]]] = []
    for label, cells in table.rows:
        if not cells:
            rows = [(label, {})]
            groups += rows if label.startswith(TARGET) else []
        elif rows:
            rows[0][1].setdefault(label, cells[place])
    changes = []
    for title, cells in groups:
        before, after, reseeded = (e if isinstance(e := cells.get(name), Estimate) else None for name in ROWS)
        if after:
            changes.append(Change(title.removeprefix(TARGET).partition(":")[0], before, after, reseeded))
    return changes
