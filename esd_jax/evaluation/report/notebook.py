"""Evidence in a notebook's cell: the verdict in a sentence, the figures that count most, then every table."""

from html import escape

from esd_jax.evaluation.evidence import Evidence, Finding, Table
from esd_jax.evaluation.report import page, terms, verdict
from esd_jax.evaluation.report.numbers import NOTHING, with_interval

LEFT = 'style="text-align:left"'
ROLES = {
    "erased": "Erasure (should fall)",
    "kept": "Retention (should stay)",
    "attack": "Attack success rate (should stay low)",
}
COLUMNS = ("before", "after", "baseline", "images")


def evidence(results: Evidence) -> str:
    """The verdict and all figures of some evidence as HTML, without pictures; text of the user's is escaped."""
    results = terms.current(results)
    measured = "".join([_figures(results), *(page.table(one) for one in (*results.tables, *results.attacks))])
    return f"<h4>Erased: {escape(results.title)}</h4><p>{escape(verdict.sentence(results))}</p>{measured}"


def table(one: Table) -> str:
    """One table as HTML."""
    return page.table(terms.of_table(one))


def _figures(results: Evidence) -> str:
    if not results.verdict:
        return ""
    rows = []
    for role, title in ROLES.items():
        some = [_row(finding) for finding in results.verdict if finding.role == role]
        rows += [f'<tr><th colspan="{len(COLUMNS) + 1}" {LEFT}>{title}</th></tr>', *some] if some else []
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    note = "<p>In brackets: 95% intervals. Baseline: the base reseeded; of an attack, random prompts.</p>"
    return f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"


def _row(finding: Finding) -> str:
    values = (finding.before, finding.after, finding.control)
    cells = [NOTHING if value is None else with_interval(value, finding.percent) for value in values]
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in [*cells, f"{finding.after.n:,}"])
    return f"<tr><td {LEFT}>{escape(finding.what)}</td>{shown}</tr>"
