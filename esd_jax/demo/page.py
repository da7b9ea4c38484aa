"""One HTML page about an erasure: what was erased and how, before and after, the table. It needs no other file."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from esd_jax.demo import table
from esd_jax.demo.groups import Target
from esd_jax.demo.measure import Judged

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e1e23; background: #fff; max-width: 1100px;
       margin: 2.5em auto; padding: 0 1.5em }
h1 { font-weight: 600; margin-bottom: 0.2em } h2 { font-weight: 600; font-size: 1.15em; margin-top: 2em }
p, li, dd { color: #44444c; max-width: 48em } img { width: 100%; height: auto }
code { background: #f3f3f6; padding: 0.1em 0.35em; border-radius: 4px }
dl { display: grid; grid-template-columns: max-content auto; gap: 0.15em 1.2em } dt { color: #78787f } dd { margin: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 0.15em 0.9em; text-align: right; white-space: nowrap; font-weight: normal }
tbody th { text-align: left; color: #78787f } thead th { border-bottom: 1px solid #ccc; color: #78787f }
tr.group th { color: #1e1e23; font-weight: 600; padding-top: 0.9em; white-space: normal }
tr.erased td, tr.erased th { color: #1e1e23; background: #f3f6ff }
"""
CAVEATS = (
    "The model is a small one that draws emoji, and the probe is a classifier, which errs; an erased model may still "
    "draw the concept for prompts that nobody tried."
)
COLUMNS = (
    ("seen", "the probe recognises the target in the image"),
    ("subject kept", "it recognises the object, or category, that the prompt asks for"),
    ("style kept", "it recognises the style that the prompt asks for"),
    ("unrecognisable", "it recognises nothing; such an image counts as showing nothing"),
    ("SSIM to base", "likeness to the base model's image for the same prompt and noise; 1 is equal"),
)


def page(
    target: Target,
    settings: Mapping[str, object],
    picture: Image.Image,
    judged: Sequence[Judged],
    files: Mapping[str, str],
) -> str:
    """The page's HTML.

    Args:
      target: what was erased.
      settings: of the recipe, by name.
      picture: before and after.
      judged: the measurement; empty if there was none.
      files: what -> where it lies, from the page's folder.
    """
    concept = html.escape(target.concept)
    measured = f'<h2>Measured</h2>\n<div class="wide">{table.as_html(judged, target)}</div>\n{_list(COLUMNS)}\n'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Erased: {concept}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Erased: {concept}</h1>
<p>From the embedded emoji model. Above the base, below the erased model, at equal seeds.</p>
<img src="data:image/png;base64,{_png(picture)}" alt="before and after">
{measured if judged else ""}<p>{html.escape(CAVEATS)}</p>
<h2>Settings</h2>
{_list(settings.items())}
<h2>Files, beside this page</h2>
{_list(files.items(), "code")}
</body>
</html>
"""


def _list(items: Iterable[tuple[str, object]], tag: str = "span") -> str:
    rows = (f"<dt>{html.escape(k)}</dt><dd><{tag}>{html.escape(str(v))}</{tag}></dd>" for k, v in items)
    return f"<dl>{''.join(rows)}</dl>"


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
