"""What the HTML pages share: their frame, which forbids every request, tables, lists of facts, and code."""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from esd_jax.evaluation.evidence import Cell, Table
from esd_jax.evaluation.report.heatmap import SHADES
from esd_jax.evaluation.report.numbers import interval, value
from esd_jax.metrics.intervals import Estimate


def document(title: str, body: str, contents: Iterable[tuple[str, str]] = ()) -> str:
    """A whole page. contents: (id of a heading, its name) for the list at the side; `body` is HTML.

    The page is read without its script, which adds the viewer, large pictures, sorting, copying and the theme.
    """
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    style += "".join(
        f".h{i} span{{background:color-mix(in srgb,var(--heat) {100 * i / SHADES:.0f}%,transparent)}}"
        for i in range(SHADES + 1)
    )
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    policy += "; base-uri 'none'; form-action 'none'"
    items = "".join(f'<li><a href="#{place}">{escape(name)}</a></li>' for place, name in contents)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<nav aria-label="Contents"><ol>{items}</ol></nav>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    """What a policy calls a style or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def code(text: str, *, flags: bool = False) -> str:
    """A block of code. flags: a command, which is broken before its flags alone."""
    lines = " ".join(f"<span>{escape(word)}</span>" for word in re.split(r" (?=-)", text)) if flags else escape(text)
    return f"<pre><code>{lines}</code></pre>"


def table(data: Table) -> str:
    """A table of a protocol: the titles of rows as row groups, intervals in grey beside the figures; to be sorted."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in data.columns)
    percent = [name in data.percent for name in data.columns]
    bodies: list[list[str]] = [[]]
    for label, cells in data.rows:
        if not cells:
            title = f'<th scope="rowgroup" colspan="{len(data.columns) + 1}">{escape(label)}</th>'
            bodies.append([f'<tr class="group">{title}</tr>'])
            continue
        kind = ' class="erased"' if label.lower() == "erased" else ""
        shown = "".join(map(_cell, cells, percent))
        bodies[-1].append(f'<tr{kind}><th scope="row">{escape(label)}</th>{shown}</tr>')
    rows = "".join(f"<tbody>{''.join(body)}</tbody>" for body in bodies if body)
    note = f'<p class="note">{escape(data.note)}</p>' if data.note else ""
    return (
        f'{wide(data.title)}<table class="data sortable"><caption>{escape(data.title)}</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead>{rows}</table></div>{note}"
    )


def wide(name: str) -> str:
    """Opens a `<div>` in which what is too wide for the page is scrolled, by keys too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">'


def facts(entries: Mapping[str, Any]) -> str:
    """Names and what they stand for, as a list; mappings within, one or several, are lists of their own."""
    items = []
    for name, content in entries.items():
        if isinstance(content, Mapping):
            shown = facts(content)
        elif _are_mappings(content):
            shown = "".join(map(facts, content))
        else:
            shown = _plain(content)
        items.append(f"<dt>{escape(str(name))}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _cell(cell: Cell, percent: bool) -> str:
    ci = f' <span class="ci">{interval(cell, percent)}</span>' if isinstance(cell, Estimate) else ""
    words = ' class="words"' if isinstance(cell, str) else ""
    number = cell.value if isinstance(cell, Estimate) else cell
    order = f' data-value="{number:.9g}"' if isinstance(number, int | float) and math.isfinite(number) else ""
    return f"<td{words}{order}>{escape(value(cell, percent))}{ci}</td>"


def _are_mappings(content: Any) -> bool:
    return isinstance(content, list | tuple) and bool(content) and all(isinstance(c, Mapping) for c in content)


def _plain(content: Any) -> str:
    if isinstance(content, list | tuple):
        return escape(", ".join(map(str, content)))
    if isinstance(content, bool) or content is None:
        return {True: "yes", False: "no", None: "–"}[content]
    text = escape(str(content))
    return f'<code class="hash">{text}</code>' if _is_hash(str(content)) else text


def _is_hash(text: str) -> bool:
    return len(text) in (40, 64) and all(letter in "0123456789abcdef" for letter in text)
