"""Evaluation results for the terminal."""

import textwrap

from esd_jax.evaluation.evidence import Evidence, Table
from esd_jax.evaluation.report import terms, verdict
from esd_jax.evaluation.report.card import sentence
from esd_jax.evaluation.report.numbers import with_interval

WIDTH = 110  # characters of a note, and of a group's title


def summary(evidence: Evidence, every: Evidence | None = None) -> str:
    """All tables, then the figures that count most, a line each, and the verdict in a sentence.

    every: the results so far, of which the sentence is; by default these alone.
    """
    evidence = terms.current(evidence)
    parts = [table(one) for one in (*evidence.tables, *evidence.attacks)]
    parts.append("\n".join(sentence(finding) for finding in evidence.verdict))
    if evidence.verdict:
        parts.append("\n".join(textwrap.wrap(verdict.sentence(terms.current(every) if every else evidence), WIDTH)))
    return "\n\n".join(filter(None, parts))


def table(one: Table) -> str:
    """A table in aligned columns."""
    cells = [
        (label, [with_interval(cell, name in one.percent) for cell, name in zip(row, one.columns, strict=bool(row))])
        for label, row in one.rows
    ]
    widths = [
        max(len(text) for text in column) for column in zip(one.columns, *(row for _, row in cells if row), strict=True)
    ]
    first = max((len(label) for label, row in cells if row), default=0)

    def line(label: str, row: list[str]) -> str:
        return f"{label:{first + 4}}" + "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))

    lines = [one.title, line("", list(one.columns))]
    lines += [
        line(f"  {label}", row) if row else textwrap.shorten(label, WIDTH, placeholder=" ...") for label, row in cells
    ]
    return "\n".join([*(text.rstrip() for text in lines), *textwrap.wrap(one.note, WIDTH)])
