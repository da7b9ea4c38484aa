"""Hooks of mkdocs (mkdocs.yml): pages that are made of files outside docs/, their links, and the tables of flags."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # mkdocs runs a hook as a file of its own
from esd_jax import cli
from launch import docs_text
from launch.docs_text import OWN_PAGE, PAGES, ROOT

FLAGS = re.compile(r"^<!-- flags of (\w+) -->$", re.MULTILINE)
# What the converter from TeX lacks, or renders badly, and what stands for it.
TEX = {r"\bigl": "", r"\bigr": "", r"\lVert": "‖", r"\rVert": "‖", r"\arg\min": r"\operatorname{argmin}"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of files outside docs/, and the files that pages link to."""
    for source, uri in PAGES.items():
        if uri != OWN_PAGE:
            files.append(File.generated(config, uri, content=_without_header((ROOT / source).read_text())))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for file in _notebook(path, config):
            files.append(file)
    for page in [file for file in files if file.is_documentation_page()]:
        for target in docs_text.targets(page.content_string, docs_text.source_of(page.src_uri)):
            uri = docs_text.uri_of(target)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links into those of the site, and inserts the tables of flags."""
    uri = page.file.src_uri
    if not uri.startswith("notebooks/"):
        markdown = docs_text.linked(markdown, uri)
    return FLAGS.sub(lambda match: _flags(match[1]), markdown)


def _flags(verb: str) -> str:
    """The usage of a verb, and its flags as a table."""
    usage = cli.VERBS[verb].usage.splitlines()
    return "\n".join(["```text", *usage, "```", "", *docs_text.flag_table(cli.VERBS[verb].defined())])


def _without_header(text: str) -> str:
    """A model card without the block of YAML that hubs read."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def _notebook(path: Path, config: MkDocsConfig) -> Iterator[File]:
    """The page of a notebook, and its pictures."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _with_mathml(cell.source)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, picture in resources["outputs"].items():
        text = text.replace(f"({name})", f"({path.stem}/{name})")
        yield File.generated(config, f"notebooks/{path.stem}/{name}", content=picture)
    yield File.generated(config, f"notebooks/{path.stem}.md", content=text)


def _with_mathml(markdown: str) -> str:
    """Formulas in TeX as MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        tex = match[1] or match[2]
        for name, known in TEX.items():
            tex = tex.replace(name, known)
        shown = convert(" ".join(tex.split()), display="block" if match[1] else "inline")
        return shown if match[1] else f"<span>{shown}</span>"  # a line that begins with <math> would be a paragraph

    return re.sub(r"\$\$(.+?)\$\$|\$(.+?)\$", formula, markdown, flags=re.DOTALL)
