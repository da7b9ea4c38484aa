"""The documents as readers meet them: their links, headings, code blocks, and the commands in these."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from paths import ROOT

MODEL_CARD = ROOT / "esd_jax" / "demo" / "model" / "README.md"
FLOW_CARD = ROOT / "esd_jax" / "demo" / "flow" / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), MODEL_CARD, FLOW_CARD])
SHELLS = ("bash", "sh", "console", "shell")
SEPARATORS = {"&&", "||", ";", "|", "&"}
REDIRECTIONS = {">", ">>", "<"}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line on which it begins."""

    language: str
    text: str
    line: int


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@cache
def tokens(document: Path) -> list[Token]:
    text = document.read_text()
    text = re.sub(r"\A---\n.*?\n---\n", lambda header: "\n" * header[0].count("\n"), text, flags=re.DOTALL)
    # What is indented in an admonition ("!!! note") is text for the site, not code.
    text = re.sub(r"(?m)^(!!! .*\n)((?:\n|    .*\n)+)", lambda m: "\n" + re.sub(r"(?m)^    ", "", m[2]), text)
    return MarkdownIt("commonmark").enable("table").parse(text)


def inline(document: Path) -> Iterator[Token]:
    """The parts of a document's running text."""
    for token in tokens(document):
        yield from token.children or ()


def links(document: Path) -> list[str]:
    """Where a document's links and images lead."""
    return [str(token.attrs.get("href") or token.attrs.get("src")) for token in inline(document)
            if token.type in ("link_open", "image")]  # fmt: skip


def anchors(document: Path) -> set[str]:
    """What links to a document's headings end in, as GitHub and the site make it."""
    found: dict[str, int] = {}
    result = set()
    sequence = tokens(document)
    for token, after in zip(sequence, sequence[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(child.content for child in after.children or () if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found[slug] = found.get(slug, -1) + 1
            result.add(f"{slug}-{count}" if count else slug)
    return result


def blocks(document: Path) -> list[Block]:
    return [Block(token.info.partition(" ")[0], token.content, (token.map or [0])[0] + 1)
            for token in tokens(document) if token.type == "fence"]  # fmt: skip


def code(document: Path) -> list[str]:
    """What stands in `backticks`."""
    return [" ".join(token.content.split()) for token in inline(document) if token.type == "code_inline"]


def commands(text: str) -> list[list[str]]:
    """The words of each command in a shell's text, without comments, redirections and variables set before it."""
    result = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        rest = iter(lexer)
        for word in rest:
            if word in SEPARATORS:
                result.append(words)
                words = []
            elif word in REDIRECTIONS:
                next(rest)
            elif words or not re.fullmatch(r"\w+=.*", word, re.DOTALL):
                words.append(word)
        result.append(words)
    return [words for words in result if words]
