"""An erasure in progress: what it draws of the same prompts from the same noise, step by step."""

from collections.abc import Sequence
from html import escape

import numpy as np

from esd_jax import wording
from esd_jax.evaluation.evidence import Curve, Evidence, Moment, Plot
from esd_jax.evaluation.report import charts, page
from esd_jax.evaluation.report.pictures import WINDOW, Encoder
from esd_jax.metrics.likeness import ssim

MOST = 8  # moments whose images are shown; curves have all
TARGET, OTHER, ALL = "target prompts", "other prompts", "all prompts"
STEP = "step"


def shown(moments: Sequence[Moment]) -> list[Moment]:
    """The first, the last, and some evenly between them."""
    places = np.linspace(0, len(moments) - 1, min(MOST, len(moments))).round().astype(int)
    return [moments[i] for i in places]


def section(evidence: Evidence, encoder: Encoder) -> str:
    """A row of images for each prompt, and curves of target prompts and others apart. Empty without a timeline."""
    moments = evidence.timeline
    if not moments:
        return ""
    count = len(moments[0].images)
    named = len(evidence.timeline_prompts) == count
    prompts = evidence.timeline_prompts if named else tuple(f"prompt {i + 1}" for i in range(count))
    groups = _groups(evidence, prompts) if named else {ALL: list(range(count))}
    kinds = {i: name for name, places in groups.items() for i in places}
    some = shown(moments)
    heads = "".join(f'<th scope="col">step {moment.step:,}</th>' for moment in some)
    rows = "".join(
        f'<tr><th scope="row">{escape(prompt)}<span class="under">{escape(kinds[i].removesuffix("s"))}</span></th>'
        f"{''.join(_cell(moment, i, prompt, encoder) for moment in some)}</tr>"
        for i, prompt in enumerate(prompts)
    )
    marked = any(any(moment.detected) for moment in some)
    note = '<p class="note">Outlined: the concept is detected in the image.</p>' if marked else ""
    plots = [plot for plot in (_detection(moments, groups), _similarity(moments, groups)) if plot.curves]
    drawn = "".join(charts.lines(plot, y_range=(min(0, *(y for c in plot.curves for y in c.y)), 1)) for plot in plots)
    return (
        f'{page.wide("The erasure in progress")}<table class="moments"><thead><tr><td></td>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div>{note}<div class="charts">{drawn}</div>'
    )


def _cell(moment: Moment, i: int, prompt: str, encoder: Encoder) -> str:
    hit = i < len(moment.detected) and moment.detected[i]
    alt = f"step {moment.step:,}: {prompt}{', concept detected' if hit else ''}"
    return f"<td{' class=hit' if hit else ''}>{encoder.tag(moment.images[i], alt)}</td>"


def _groups(evidence: Evidence, prompts: Sequence[str]) -> dict[str, list[int]]:
    """Target prompts and others -> the places of their images."""
    texts = evidence.record.texts or (evidence.title,)
    named = [any(wording.names(text, prompt) for text in texts) for prompt in prompts]
    groups = {TARGET: [i for i, n in enumerate(named) if n], OTHER: [i for i, n in enumerate(named) if not n]}
    return {name: places for name, places in groups.items() if places}


def _detection(moments: Sequence[Moment], groups: dict[str, list[int]]) -> Plot:
    curves = []
    if all(len(moment.detected) == len(moment.images) for moment in moments):
        for name, places in groups.items():
            rates = tuple(float(np.mean([moment.detected[i] for i in places])) for moment in moments)
            curves.append(Curve(name, tuple(moment.step for moment in moments), rates))
    elif known := [(moment.step, moment.score) for moment in moments if moment.score is not None]:
        curves.append(Curve(ALL, *map(tuple, zip(*known, strict=True))))
    return Plot("Detection rate of the concept", STEP, "share of images", tuple(c for c in curves if len(c.x) > 1))


def _similarity(moments: Sequence[Moment], groups: dict[str, list[int]]) -> Plot:
    first, curves = moments[0].images, []
    if min(first.shape[1:3]) >= WINDOW and all(moment.images.shape == first.shape for moment in moments):
        values = [ssim(moment.images, first, WINDOW) for moment in moments]
        for name, places in groups.items():
            means = tuple(float(value[places].mean()) for value in values)
            curves.append(Curve(name, tuple(moment.step for moment in moments), means))
    elif known := [(moment.step, moment.ssim) for moment in moments if moment.ssim is not None]:
        curves.append(Curve(ALL, *map(tuple, zip(*known, strict=True))))
    return Plot("Similarity to the images of step 0", STEP, "SSIM", tuple(c for c in curves if len(c.x) > 1))
