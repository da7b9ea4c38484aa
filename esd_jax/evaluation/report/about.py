"""What is known of a run besides its evidence: when and where it ran, its files, and how other programs use them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from urllib.parse import quote

from esd_jax.evaluation.report import page


@dataclass(frozen=True)
class File:
    """A file or folder of a run: its path from the report's folder, bytes, and what it is. format: of an export."""

    path: str
    size: int
    what: str
    format: str = ""


@dataclass(frozen=True)
class Use:
    """How a program uses a file: a title, code, and a note. language: of the code, "python", "text"."""

    title: str
    code: str
    note: str = ""
    language: str = "python"


@dataclass(frozen=True)
class About:
    """A run's facts. What is not known is None or empty.

    folder: as commands name it. date: when training ended. seconds: of the erasure. device: that it ran on.
    license: of the erased model. base: the hub id of what it was erased from.
    """

    folder: str = ""
    date: datetime | None = None
    seconds: float | None = None
    device: str = ""
    license: str | None = None
    base: str | None = None
    files: tuple[File, ...] = ()
    uses: tuple[Use, ...] = ()

    @property
    def when(self) -> str:
        """The date for people: "28 November 2026"."""
        return f"{self.date.day} {self.date:%B %Y}" if self.date else ""

    @property
    def facts(self) -> dict[str, str]:
        """Date, duration and device, for people."""
        when = f"{self.when}, {self.date:%H:%M} {self.date.tzname() or ''}".strip() if self.date else ""
        known = {"date": when, "duration": duration(self.seconds) if self.seconds else "", "device": self.device}
        return {name: text for name, text in known.items() if text}


def duration(seconds: float) -> str:
    """ "41 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{max(whole, 1)} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 // 60 else "")


def size(count: int) -> str:
    """ "1.06 MB"."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB"))
    return f"{count / unit:.3g} {name}"


def files(entries: Sequence[File]) -> str:
    """The files as a table of links, relative to the report."""
    if not entries:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><a href="{escape(quote(file.path))}">{escape(file.path)}</a></th>'
        f'<td class="words">{escape(file.what)}</td><td data-value="{file.size}">{size(file.size)}</td></tr>'
        for file in entries
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("file", "what it is", "size"))
    return (
        f'{page.wide("Files of the run")}<table class="data sortable files"><thead><tr>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">Links are relative to the folder of the run.</p>'
    )


def uses(snippets: Sequence[Use]) -> str:
    """How programs use the files: the first open, the others to be opened."""
    parts = []
    for i, use in enumerate(snippets):
        note = f'<p class="note">{escape(use.note)}</p>' if use.note else ""
        shown = page.code(use.code) if use.code else ""
        parts.append(
            f"<details{' open' if i == 0 else ''}><summary>{escape(use.title)}</summary>{shown}{note}</details>"
        )
    return "".join(parts)
