"""What the page shows, as HTML: functions of a job and a run. Text of the user's is escaped. No web page is needed."""

import dataclasses
import shlex
from collections.abc import Hashable, Mapping, Sequence
from html import escape
from pathlib import Path

from esd_jax import examples, progress, repeat
from esd_jax.dossier import EVIDENCE
from esd_jax.evaluation import gather, store
from esd_jax.evaluation.evidence import Curve, Plot
from esd_jax.evaluation.report import charts, html, page, pictures, terms
from esd_jax.evaluation.report.pictures import Encoder, Pixels
from esd_jax.runs.listing import Run
from esd_jax.studio.jobs import Job


def head() -> str:
    """The page's styles: the report's, for what stands in a block of class "evidence", and the studio's own."""
    report = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8").replace(":root", "&")
    own = Path(__file__).with_name("studio.css").read_text(encoding="utf-8")
    return f"<style>.evidence {{ {report} }}\n{own}</style>"


def block(*parts: str, otherwise: str = "") -> str:
    """Parts of a view, in the report's styles; without any, what to do to get some."""
    inner = "".join(parts)
    return f'<div class="evidence">{inner}</div>' if inner else f'<p class="empty">{escape(otherwise)}</p>'


def state(job: Job | None, run: Run | None) -> Hashable:
    """What `bar` depends on."""
    return job and (job.state, job.note, tuple((task.name, task.done, task.note) for task in list(job.tasks)))


def bar(job: Job | None, run: Run | None) -> str:
    """The job in a line: its tasks, the outermost first, the newest figure, and the time left."""
    if job is None:
        return '<p class="bar idle">Nothing is running.</p>'
    tasks, state = list(job.tasks), {"stopping": "stopping after this step", "running": ""}.get(job.state, job.state)
    state = "" if job.note.startswith(job.state) else state  # "stopped at step 12 of 40"
    words = [f"{t.name} {t.done:,g} of {t.total:,g} {t.unit}" if t.total else t.name for t in tasks]
    words += [tasks[-1].note] if tasks else ["loading"] if job.active else []
    if tasks and tasks[0].left is not None:
        words.append(f"{progress.left(tasks[0].left)} left")
    words = [job.title, state, *words, job.note.partition("\n")[0]]
    title, *line = (escape(word.strip()) for word in words if word)
    fraction = 0.0
    for task in reversed(tasks):  # an inner task is a part of the outer one's next step
        fraction = min(1.0, (task.done + fraction) / task.total) if task.total else 0.0
    value = f' value="{fraction:.4f}"' if fraction else ""  # without one, the meter moves by itself
    meter = f'<progress aria-label="Progress"{value}></progress>' if job.active else ""
    return f'<p class="bar {job.state}" role="status"><b>{title}</b> · {" · ".join(line)}</p>{meter}'


def sheet(rows: Mapping[str, Sequence[Pixels]], prompts: Sequence[str]) -> str:
    """Rows of images, each with its name, above their prompts."""
    return block(pictures.sheet(rows, prompts, Encoder(image for images in rows.values() for image in images)))


def previews(job: Job | None, run: Run | None) -> str:
    """A run's first preview above its newest."""
    if run and (rows := run.previews()):
        count = len(next(iter(rows.values())))
        named = {f"update {update:,}": images for update, images in rows.items()}
        return sheet(named, [*run.plan.previews, *[""] * count][:count])
    if job and job.active and job.kind == "erase":
        return block(otherwise="The first preview appears here when the model is compiled.")
    return block(otherwise="Choose a concept and press Erase. Previews and the loss appear here.")


def wipe(rows: Mapping[str, Sequence[Pixels]], prompts: Sequence[str]) -> str:
    """Two models' images on top of each other; a slider, or the pointer, moves the edge between them in all."""
    (before, first), (after, second) = rows.items()
    encoder = Encoder([*first, *second])
    move = "this.closest('.edge').style.setProperty('--edge', {} + '%')"
    pairs = "".join(
        f'<figure><div onpointermove="{move.format("100 * event.offsetX / this.clientWidth")}">'
        f"{encoder.tag(b, f'{after}: {prompt}')}{encoder.tag(a, f'{before}: {prompt}')}</div>"
        f"<figcaption>{escape(prompt)}</figcaption></figure>"
        for a, b, prompt in zip(first, second, prompts, strict=True)
    )
    edge = f'<input type="range" value="50" aria-label="Edge between both" oninput="{move.format("this.value")}">'
    ends = f"<label><span>{escape(before)}</span>{edge}<span>{escape(after)}</span></label>"
    return block(f'<div class="edge">{ends}{pairs}</div>')


def losses(job: Job | None, run: Run | None) -> str:
    """A run's loss."""
    plot = gather.training(run.folder / "log.jsonl") if run else None
    return block(charts.lines(plot)) if plot else ""


def attacked(job: Job | None, run: Run | None) -> str:
    """The losses of an attack's searches, while it is the newest job, and the results of the attacks on a run."""
    parts = []
    if job and job.losses and run and job.folder == run.folder:
        curves = [Curve(name, tuple(range(1, len(y) + 1)), tuple(y)) for name, y in list(job.losses.items())]
        parts.append(charts.lines(Plot("Searches", "step", "loss", tuple(curves))))
    if run and (file := run.folder / EVIDENCE / "attacks.json").is_file():
        evidence = terms.current(store.load(file))
        images = [i for pairs in evidence.attack_pictures.values() for p in pairs for i in (p.before, p.after)]
        parts.append(html.attacks(evidence, Encoder(images)))
    return block(*parts, otherwise="Not attacked yet. An attack searches for what brings the concept back.")


def front(job: Job | None, run: Run | None) -> str:
    """Detection rate and retention over the strength of the weight change, if it was measured."""
    file = run.folder / EVIDENCE / "front.json" if run else None
    plot = terms.current(store.load(file)).front if file and file.is_file() else None
    return block(charts.lines(plot)) if plot else ""


def report(job: Job | None, run: Run | None) -> str:
    """A run's report in a frame of its own, whose scripts can reach neither this page nor any network."""
    if not run or not (file := run.folder / "report.html").is_file():
        return block(otherwise="No report of this run yet: press Write report.")
    source = escape(file.read_text(encoding="utf-8"))
    title = f"Report on {escape(run.name)}"
    return f'<iframe class="report" title="{title}" sandbox="allow-scripts" srcdoc="{source}"></iframe>'


def card(job: Job | None, run: Run | None) -> str:
    """A run's card in Markdown, without its header for hubs, and its picture."""
    if not run or not (file := run.folder / "ERASURE.md").is_file():
        return "*The card is written together with the report.*"
    text = file.read_text(encoding="utf-8").split("---\n", 2)[-1]
    return "\n".join(line for line in text.splitlines() if not line.startswith("!["))


def written(job: Job | None, run: Run | None) -> str:
    """The file of an export, and the result of its verification."""
    done = job and job.kind == "export" and job.file
    otherwise = "Press Export. The file is read again, and compared with the run."
    return block(page.code(job.note) if job and done else "", otherwise=otherwise)


def details(job: Job | None, run: Run | None) -> str:
    """What a run is, and the command that goes on with it in a terminal."""
    if run is None:
        return block(otherwise="No run yet: the tab Erase makes one.")
    facts = {
        "erased": f"{', '.join(run.record.texts)} from {run.record.base}",
        "method": f"{run.plan.method}, {run.plan.subset}, seed {run.plan.training.seed}",
        "updates": f"{run.step:,} of {run.plan.training.steps:,}" + ("" if run.finished else ", not finished"),
        "folder": str(run.folder.absolute()),
    }
    line = command(run)
    return block(page.facts(facts), page.code(line, flags=True) if line else "")


def command(run: Run) -> str:
    """The command that reports on a run, or resumes it where it has not ended; "" where no flags can say it."""
    if run.finished:
        return f"esd-jax report {shlex.quote(str(run.folder))}"
    line = repeat.command(dataclasses.replace(run.record, recipe=run.plan.flat()), str(run.folder))
    return line and f"{line} --resume"


def prompts(run: Run | None, each: int) -> str:
    """So many prompts of each kind that show an erasure, a line each."""
    groups = examples.prompts_of(run.plan.base, run.record.texts, run.record.recipe or {}) if run else ()
    return "\n".join(text for _, texts in groups for text in texts[:each])


def meaning(strength: float) -> str:
    """What a strength of the weight change means, in a sentence."""
    if strength < 0:
        return '<p class="bar failed">Below 0 the change is reversed: the concept is strengthened, not erased.</p>'
    between = "A part of the change." if strength < 1 else "More than was trained."
    return f'<p class="bar">{ {0.0: "The base.", 1.0: "The erased model, as trained."}.get(strength, between) }</p>'
