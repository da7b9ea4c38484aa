"""The tabs of the page, and what their buttons do."""

import importlib
from collections.abc import Callable, Hashable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from esd_jax import recipe_docs
from esd_jax.demo import NAMES, captions, vocabulary
from esd_jax.evaluation import testbed
from esd_jax.exports import FORMATS
from esd_jax.exports.verifying import DTYPES
from esd_jax.kinds import KINDS
from esd_jax.methods import METHODS
from esd_jax.names import ATTACK_NAMES
from esd_jax.runs import listing
from esd_jax.runs.listing import Run
from esd_jax.studio import views, works
from esd_jax.studio.jobs import MISTAKES

if TYPE_CHECKING:
    from esd_jax.studio.app import Page

gr: Any = importlib.import_module("gradio")  # an extra, whose types lack the events that it generates

KNOWN = [*(captions.prompt(style=s) for s in vocabulary.styles()), *map(captions.prompt, vocabulary.objects())]
FIELDS = ("subset", "eta", "learning_rate", "batch_size", "rank", "preview_prompts", "preview_every")
PROTOCOLS = [("nothing", ""), ("smoke: 8 images of each group", "smoke"), ("quick: 24 of each group", "quick")]
HTML = partial(gr.HTML, apply_default_css=False)
BOX = partial(gr.Textbox, value="")  # one that nobody has touched would give None
FORM, RESULT = ({"scale": scale, "min_width": 320} for scale in (2, 3))  # the columns of a tab
MAIN = {"variant": "primary"}
ACTION = {"api_visibility": "private", "show_progress": "hidden"}
SAMPLING = {"api_visibility": "private", "show_progress": "minimal", "concurrency_id": "device", "concurrency_limit": 1}


def reported(action: Callable[..., Any]) -> Callable[..., Any]:
    """Shows a mistake as one sentence, and leaves the page as it is."""

    @wraps(action)
    def guarded(*values: Any) -> Any:
        try:
            return action(*values)
        except MISTAKES as error:
            gr.Warning(" ".join(str(error).split()), duration=12)
            return gr.skip()

    return guarded


def lines(text: str) -> list[str]:
    """The prompts of a text, one per line. Raises ValueError if there is none."""
    if not (prompts := [line.strip() for line in (text or "").splitlines() if line.strip()]):
        raise ValueError("Write at least one prompt, each on a line of its own.")
    return list(dict.fromkeys(prompts))


def stamp(run: Run | None, *files: str) -> Hashable:
    """When files of a run last changed."""
    return run and tuple(f.stat().st_mtime if (f := run.folder / file).exists() else 0 for file in files)


# fmt: off
def resuming(page: "Page", place: str) -> None:
    """A button that resumes the run that is chosen, while it can be resumed."""
    button = gr.Button("Resume", visible=False, elem_id=f"resume-{place}")
    usable = lambda job, run: bool(run and not run.finished and not (job and job.active))  # noqa: E731
    label = lambda run: f"Resume {run.name}, {run.step} of {run.plan.training.steps}" if run else ""  # noqa: E731
    page.follow(button, lambda job, run: gr.Button(label(run), visible=usable(job, run)),
                lambda job, run: (usable(job, run), label(run)))
    page.starts(button, works.resume)


def sampling(page: "Page", place: str, each: int) -> list[Any]:
    """Prompts, and how their images are sampled."""
    prompts = BOX(label="Prompts", info="one per line", lines=2 * each + 1, elem_id=f"{place}-prompts")
    with gr.Row():
        seed = gr.Number(1, label="Seed", precision=0, min_width=90)
        steps = gr.Number(20, label="Steps", precision=0, minimum=1, min_width=90, elem_id=f"{place}-steps")
        guidance = gr.Number(3, label="Guidance", min_width=90)
    page.follow(prompts, lambda job, run: views.prompts(run, each), lambda job, run: run and run.name)
    own = lambda job, run: 3 if not run or testbed.of(run.plan.base) else 7.5  # noqa: E731
    page.follow(guidance, own, own)
    return [prompts, seed, steps, guidance]


def erase(page: "Page") -> None:
    with gr.Row():
        with gr.Column(**FORM):
            base = gr.Dropdown(list(dict.fromkeys([page.desk.base, *NAMES])), label="Base", allow_custom_value=True,
                               elem_id="base", info="emoji and emoji-flow are in the package; or a folder, a hub id")
            concept = gr.Dropdown(KNOWN, value="neon style", label="Concept", allow_custom_value=True,
                                  elem_id="concept", info="what to erase; several are separated by “;”")
            with gr.Row():
                kind = gr.Dropdown([("automatic", ""), *((kind, kind) for kind in KINDS)], value="", label="Kind",
                                   min_width=140)
                method = gr.Dropdown(list(METHODS), value="esd", label="Method", min_width=140)
            strength = gr.Slider(0.1, 3, 1, step=0.1, label="Strength", info="multiplies the recipe's own")
            preserve = BOX(label="Preserve", info="prompts to hold to the base, separated by “|”")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=100)
                steps = BOX(label="Updates", placeholder="the recipe's", min_width=100, elem_id="updates")
            with gr.Accordion("Advanced", open=False):
                texts = {one.name: one.text for one in recipe_docs.described()}
                boxes = {name: BOX(label=name, info=texts[name], placeholder="the recipe's") for name in FIELDS}
                more = BOX(label="Further fields", lines=3, placeholder="sampling_steps = 10\nremat = true",
                                  info="NAME = VALUE, one per line, texts in quotes; docs/fields.md lists them")
            go = gr.Button("Erase", elem_id="go", **MAIN)
            resuming(page, "erase")
        with gr.Column(**RESULT):
            page.follow(HTML(elem_id="previews"), views.previews,
                        lambda job, run: (tuple(run.preview_files) if run else (), job and job.state))
            page.follow(HTML(elem_id="loss"), views.losses, lambda job, run: stamp(run, "log.jsonl"))
    named = {"method": method, "preserve": preserve, "seed": seed, "steps": steps, **boxes}

    @reported
    def begin(base: str, concept: str, kind: str, more: str, strength: float, *values: Any) -> Any:
        fields = dict(zip(named, values, strict=True)) | ({"strength": strength} if strength != 1 else {})
        name = works.erase(page.desk, works.plan(base, concept, kind, more, **fields)).folder.name
        return gr.Dropdown(choices=page.choices(), value=name)

    go.click(begin, [base, concept, kind, more, strength, *named.values()], page.run, **ACTION)


def compare(page: "Page") -> None:
    with gr.Row():
        with gr.Column(**FORM):
            other = gr.Dropdown([("its base", "")], value="", label="Compare the run with", elem_id="other")
            page.follow(other, lambda job, run: gr.Dropdown([("its base", ""), *page.choices()], value=""),
                        lambda job, run: tuple(page.choices()))
            how = sampling(page, "compare", 2)
            go = gr.Button("Generate", elem_id="compare-go", **MAIN)
        with gr.Column(**RESULT):
            empty = views.block(otherwise="Press Generate: both models get the same prompts and the same noise.")
            wipe = HTML(empty, elem_id="wipe")
    table = HTML(elem_id="grid")

    @reported
    def generate(name: str, other: str, text: str, seed: int, steps: int, guidance: float) -> Any:
        run, prompts, how = page.chosen(name), lines(text), {"steps": steps, "guidance_scale": guidance}
        with page.desk.device():
            first = page.desk.images(page.chosen(other or name), 1.0 if other else 0.0, prompts, seed, **how)
            second = page.desk.images(run, 1.0, prompts, seed, **how)
        apart = [np.abs(a.astype(np.int16) - b).astype(np.uint8) for a, b in zip(first, second, strict=True)]
        rows = {other or "base": first, run.name: second}
        return views.wipe(rows, prompts), views.sheet(rows | {"difference": apart}, prompts)

    go.click(generate, [page.run, other, *how], [wipe, table], **SAMPLING)


def strength(page: "Page") -> None:
    with gr.Row():
        with gr.Column(**FORM):
            value = gr.Slider(-0.5, 1.5, 1, step=0.05, label="Strength of the change", elem_id="strength")
            meaning = HTML(views.meaning(1), elem_id="meaning")
            how = sampling(page, "strength", 1)
            go = gr.Button("Generate", elem_id="strength-go")
            with gr.Accordion("Measure the curve", open=False):
                images = gr.Number(8, label="Images of each group", precision=0, minimum=1)
                page.starts(gr.Button("Measure", elem_id="measure"), works.curve, images)
        with gr.Column(**RESULT):
            table = HTML(views.block(otherwise="Move the slider: the images follow."), elem_id="strengths")
            page.follow(HTML(), views.front, lambda job, run: stamp(run, "evidence/front.json"))

    @reported
    def generate(name: str, strength: float, text: str, seed: int, steps: int, guidance: float) -> Any:
        run, prompts = page.chosen(name), lines(text)
        parts = {"base: 0": 0.0, f"{strength:g}": strength, "erased: 1": 1.0}
        with page.desk.device():
            rows = {label: page.desk.images(run, part, prompts, seed, steps=steps, guidance_scale=guidance)
                    for label, part in parts.items()}
        return views.sheet(rows, prompts)

    value.change(views.meaning, value, meaning, queue=False, **ACTION)
    for event in (value.change, go.click):  # a release alone would not notice the keyboard
        event(generate, [page.run, value, *how], table, trigger_mode="always_last", **SAMPLING)


def attack(page: "Page") -> None:
    with gr.Row():
        with gr.Column(**FORM):
            names = gr.CheckboxGroup(ATTACK_NAMES, value=[ATTACK_NAMES[0]], label="Attacks", elem_id="attacks")
            with gr.Row():
                budget = gr.Dropdown([("the model's", ""), "emoji", "paper"], value="", label="Budget", min_width=110)
                seeds = gr.Number(4, label="Seeds", precision=0, minimum=1, min_width=90, elem_id="seeds")
                updates = BOX(label="Updates", placeholder="budget's", min_width=90, elem_id="attack-updates")
            random = gr.Checkbox(False, label="Also attack random weights, as a baseline")
            afresh = gr.Checkbox(False, label="Discard earlier attacks on this run", elem_id="afresh")
            with gr.Accordion("Another model than emoji", open=False):
                prompts = BOX(label="Prompts that name the concept", info="separated by “;”")
                detector = BOX(value="nudenet", label="Detector", info="nudenet, nudenet:CONVENTION, imagenet:CLASS")
            go = gr.Button("Attack", elem_id="attack-go", **MAIN)
            page.starts(go, works.attack, names, budget, seeds, updates, random, afresh, prompts, detector)
        with gr.Column(**RESULT):
            steps = lambda job: (job.state, sum(map(len, job.losses.values())) // 5) if job else None  # noqa: E731
            page.follow(HTML(elem_id="attacked"), views.attacked,
                        lambda job, run: (stamp(run, "evidence/attacks.json"), steps(job)))


def report(page: "Page") -> None:
    protocol = gr.Dropdown(PROTOCOLS, value="", label="Evaluate first", elem_id="protocol")
    page.starts(gr.Button("Write report", elem_id="report-go", **MAIN), works.report, protocol)
    page.follow(HTML(elem_id="report-page"), views.report, lambda job, run: stamp(run, "report.html"))
    with gr.Accordion("Card for a model hub", open=False):
        page.follow(gr.Markdown(), views.card, lambda job, run: stamp(run, "ERASURE.md"))


def export(page: "Page") -> None:
    format = gr.Dropdown([(one.what, name) for name, one in FORMATS.items()], value="folder", label="Format",
                         elem_id="format")
    with gr.Row():
        dtype = gr.Dropdown([("as trained", ""), *((name, name) for name in DTYPES)], value="", label="Numbers")
        rank = BOX(label="Rank of a LoRA", placeholder="as the change needs")
    page.starts(gr.Button("Export", elem_id="export-go", **MAIN), works.export, format, dtype, rank)
    done = lambda job, run: job.file if job and job.kind == "export" and job.state == "done" else None  # noqa: E731
    page.follow(HTML(elem_id="written"), views.written, done)
    page.follow(gr.DownloadButton(visible=False, elem_id="download"), lambda job, run: gr.DownloadButton(
        f"Download {file.name}" if (file := done(job, run)) else "", value=file, visible=bool(file)), done)


def runs(page: "Page") -> None:
    every = lambda: listing.listed(page.desk.folder)  # noqa: E731
    gallery = gr.Gallery(allow_preview=False, show_label=False, format="png", elem_id="gallery", interactive=False,
                         buttons=[], height="auto")
    page.follow(gallery, lambda job, run: [(one.thumbnail(), one.name) for one in every()],
                lambda job, run: tuple((one.name, *one.preview_files[-1:]) for one in every()))
    page.follow(HTML(elem_id="details"), views.details, lambda job, run: run and (run.step, run.finished))
    with gr.Row():
        resuming(page, "runs")
        ask = gr.Button("Delete …", elem_id="delete")
    with gr.Row(visible=False) as sure:
        yes = gr.Button("Delete for good", variant="stop", elem_id="delete-yes")
        no = gr.Button("Keep", elem_id="delete-no")

    def select(event: gr.SelectData) -> str:  # pyright: ignore[reportInvalidTypeForm]
        return every()[event.index].name

    def delete(name: str) -> Any:
        works.delete(page.desk, page.chosen(name))
        return gr.Row(visible=False)

    gallery.select(select, None, page.run, **ACTION)
    ask.click(reported(lambda name: gr.Row(visible=bool(page.chosen(name)))), page.run, sure, **ACTION)
    no.click(lambda: gr.Row(visible=False), None, sure, **ACTION)
    yes.click(reported(delete), page.run, sure, **ACTION)


ALL = (erase, compare, strength, attack, report, export, runs)
