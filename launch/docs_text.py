"""Texts of the documentation site: links between its pages, tables of flags, and docstrings with one name on each line.

Links are written as GitHub follows them, relative to their file. On the site a link leads to the page that was made of
its target; a target without a page is copied to the site.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

ROOT = Path(__file__).resolve().parent.parent
# File of the repository -> page of the site; notebooks are added to them, and what lies in docs/.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "esd_jax/demo/model/README.md": "model_card.md",
    "esd_jax/demo/flow/README.md": "flow_model_card.md",
}
OWN_PAGE = "index.md"  # has a text of its own: the README opens the repository, this the site
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def source_of(uri: str) -> str:
    """The file of the repository that a page was made of."""
    sources = {page: source for source, page in PAGES.items() if page != OWN_PAGE}
    return sources.get(uri, f"docs/{uri}")


def uri_of(target: str) -> str:
    """Where a file of the repository is on the site."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("notebooks/"):
        return target.removesuffix(".ipynb") + ".md"
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"


def targets(markdown: str, source: str) -> Iterator[str]:
    """The files of the repository that a text links to."""
    for match in LINK.finditer(markdown):
        path = match[2].partition("#")[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path and ":" not in path and (ROOT / target).is_file():
            yield target


def linked(markdown: str, uri: str) -> str:
    """A page's text with links to other pages in place of those to files."""
    source = source_of(uri)

    def link(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        target = next(targets(match[0], source), None)
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(uri_of(target), posixpath.dirname(uri) or '.')}{hash_}{anchor}{match[3]}"

    return LINK.sub(link, markdown)


def flag_table(values: flags.FlagValues) -> Iterator[str]:
    """A table of flags, as lines of Markdown; none for a verb without flags."""
    shown = [values[name] for name in values if not (values[name].help or "").startswith(("Internal", "Alias"))]
    if shown:
        yield "| flag | meaning | default |"
        yield "|---|---|---|"
    for flag in shown:
        text = (flag.help or "").partition(";\n")[0].replace("|", "\\|").replace("<", "&lt;")
        text += " May be repeated." if isinstance(flag, flags.MultiFlag) else ""
        default: Any = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
        code = "" if default in (None, "", False) else f"`{default}`"
        yield f"| `--{'[no]' if flag.boolean else ''}{flag.name}` | {text} | {code} |"


def sectioned(text: str, names: Sequence[str], section: str) -> str:
    """A docstring whose descriptions of names are a section, with one name on each line.

    The package's docstrings describe several names of one meaning together, and the fields of a class in running lines.

    Args:
      text: the docstring, without its indentation.
      names: the parameters, or the fields. section: what Google's style calls them, "Args" or "Attributes".
    """
    one = "|".join(map(re.escape, names))
    # As `esd_jax.recipe_docs` reads them: where a line or a sentence begins.
    pattern = rf"(?:^[ ]*|(?<=\. ))((?:{one})(?:, (?:{one}))*): "
    heads = list(re.finditer(pattern, text, re.MULTILINE)) if names else []
    if not heads:
        return text
    entries, prose = [], []
    for head, end in zip(heads, [*(head.start() for head in heads[1:]), len(text)], strict=True):
        body, _, after = text[head.end() : end].partition("\n\n")
        meaning = " ".join(body.split())
        prose.append(after.strip("\n"))
        entries += [f"    {name}: {meaning}" for name in head[1].split(", ")]
    before = re.sub(r"\s*\b(?:Args|Attributes):\s*\Z", "", text[: heads[0].start()]).rstrip()
    return "\n\n".join(filter(None, (before, "\n".join([f"{section}:", *entries]), *prose)))
