"""What the HTML pages share: their frame, which forbids every request, images as data, and tables."""

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from esd_jax.evaluation.evidence import Cell, Pair, Table
from esd_jax.evaluation.report.heatmap import SHADES
from esd_jax.evaluation.report.numbers import interval, value
from esd_jax.metrics.intervals import Estimate

LOSSLESS = 128  # pixels of the longer side up to which an image is shown as it is, in PNG
LARGEST = 384  # pixels to which a larger one is reduced: twice what it takes up on the page
QUALITY = 88  # of WebP
IN_A_ROW = 4  # pairs that fit beside each other on a phone


def document(title: str, body: str, contents: Iterable[tuple[str, str, bool]] = ()) -> str:
    """A whole page. contents: (id of a heading, its name, has data) for the list at the side; `body` is HTML."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    style += "".join(f".h{i} span{{background:rgb(var(--heat)/{i / SHADES:.2f})}}" for i in range(SHADES + 1))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    items = "".join(
        f'<li{"" if data else " class=absent"}><a href="#{place}">{escape(name)}</a></li>'
        for place, name, data in contents
    )
    aside = f'<nav aria-label="Contents"><ol>{items}</ol></nav>' if items else ""
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
{aside}
<main>
{body}
</main>
</body>
</html>
"""


def image(pixels: UInt8[np.ndarray, "height width 3"], alt: str) -> str:
    """An `<img>` that carries its own data: PNG of a small image; of a large one WebP, reduced if need be."""
    picture, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if max(picture.size) <= LOSSLESS:
        picture.save(buffer, format="png", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(buffer, format="webp", quality=QUALITY, method=4)
        kind = "webp"
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = picture.size
    return f'<img src="data:image/{kind};base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'


def shown_as(pictures: Iterable[UInt8[np.ndarray, "height width 3"]]) -> str:
    """How images of these sizes are shown, in a sentence."""
    if all(max(pixels.shape[:2]) <= LOSSLESS for pixels in pictures):
        return "Images are shown as they are, without loss."
    return (
        f"Images with a side of more than {LOSSLESS} pixels are shown as WebP of quality {QUALITY}, reduced to "
        f"{LARGEST} pixels; they were judged as they were drawn."
    )


def pairs(title: str, found: Sequence[Pair], before: str = "before", after: str = "after") -> str:
    """Pairs of images, before above after, with their prompts below them, under a title."""
    blocks = []
    for start in range(0, len(found), IN_A_ROW):
        some = found[start : start + IN_A_ROW]
        rows = [
            f'<tr><th scope="row"><span>{escape(name)}</span></th>'
            + "".join(f"<td>{image(getattr(pair, side), f'{name}: {pair.prompt}')}</td>" for pair in some)
            + "</tr>"
            for side, name in (("before", before), ("after", after))
        ]
        prompts = "".join(f'<th scope="col">{escape(pair.prompt)}</th>' for pair in some)
        blocks.append(f"<table><tbody>{''.join(rows)}</tbody><tfoot><tr><td></td>{prompts}</tr></tfoot></table>")
    return f'<div class="pairs"><h3>{escape(title)}</h3><div class="flow">{"".join(blocks)}</div></div>'


def table(found: Table) -> str:
    """A table of a protocol: the titles of rows as row groups, intervals in grey beside the figures."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.columns)
    percent = [name in found.percent for name in found.columns]
    bodies: list[list[str]] = [[]]
    for label, cells in found.rows:
        if not cells:
            title = f'<th scope="rowgroup" colspan="{len(found.columns) + 1}">{escape(label)}</th>'
            bodies.append([f'<tr class="group">{title}</tr>'])
            continue
        kind = ' class="erased"' if label.lower() == "erased" else ""
        shown = "".join(map(_cell, cells, percent))
        bodies[-1].append(f'<tr{kind}><th scope="row">{escape(label)}</th>{shown}</tr>')
    rows = "".join(f"<tbody>{''.join(body)}</tbody>" for body in bodies if body)
    note = f'<p class="note">{escape(found.note)}</p>' if found.note else ""
    return (
        f'{wide(found.title)}<table class="data"><caption>{escape(found.title)}</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead>{rows}</table></div>{note}"
    )


def wide(name: str) -> str:
    """Opens a `<div>` in which what is too wide for the page is scrolled, by keys too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">'


def facts(found: Mapping[str, Any]) -> str:
    """Names and what they stand for, as a list; mappings within, one or several, are lists of their own."""
    items = []
    for name, content in found.items():
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
    return f"<td{words}>{escape(value(cell, percent))}{ci}</td>"


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
