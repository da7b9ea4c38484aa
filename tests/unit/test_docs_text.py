"""Texts of the documentation site: where links lead, the tables of flags, and docstrings for the API reference."""

import textwrap

import pytest
from absl import flags
from paths import ROOT

from esd_jax import cli
from launch import docs_text

LINKS = {  # page -> link as it is written -> link of the site
    "faq.md": {"methods.md#x": "methods.md#x", "#here": "#here", "https://a.org/b.md": "https://a.org/b.md",
               "../README.md#limitations": "index.md#limitations", "../CONTRIBUTING.md": "contributing.md",
               "../launch/gke.yaml": "files/launch/gke.yaml",
               "../notebooks/quickstart.ipynb": "notebooks/quickstart.md"},
    "results/embedded.md": {"../methods.md": "../methods.md", "../grid.png": "../grid.png",
                            "../../esd_jax/demo/model/README.md": "../model_card.md"},
    "contributing.md": {"docs/design.md#layers": "design.md#layers", "LICENSE": "files/LICENSE"},
}  # fmt: skip


@pytest.mark.parametrize(("uri", "written"), [(uri, link) for uri, links in LINKS.items() for link in links])
def test_links_lead_to_pages(uri, written):
    assert docs_text.linked(f"see [this]({written}).", uri) == f"see [this]({LINKS[uri][written]})."


def test_files_without_a_page_are_copied():
    text = "[a](../launch/gke.yaml) [b](../NOTICE) [c](https://a.org) [d](#e) [f](missing.md) ![g](grid.png)"
    assert list(docs_text.targets(text, "docs/scale.md")) == ["launch/gke.yaml", "NOTICE", "docs/grid.png"]
    assert docs_text.uri_of("NOTICE") == "files/NOTICE" and (ROOT / "NOTICE").is_file()


def test_flags_are_a_table():
    lines = list(docs_text.flag_table(cli.VERBS["sample"].defined()))
    assert lines[0] == "| flag | meaning | default |"
    assert any(line.startswith("| `--delta` |") and "May be repeated." in line for line in lines)
    assert any(line.startswith("| `--[no]overwrite` |") and line.endswith("|  |") for line in lines)
    assert not any("num_steps" in line for line in lines)  # an alias
    assert all(line.count("|") - line.count("\\|") == 4 for line in lines)
    assert list(docs_text.flag_table(flags.FlagValues())) == []


def test_docstrings_have_one_name_on_each_line():
    text = """\
        Samples images.

        Args:
          height, width: in pixels, of
            the images.
          seed: of the noise.

        Returns:
          The images.

        Raises ValueError for height: 0."""
    lines = """\
        Samples images.

        Args:
            height: in pixels, of the images.
            width: in pixels, of the images.
            seed: of the noise.

        Returns:
          The images.

        Raises ValueError for height: 0."""
    names = ["height", "width", "seed"]
    assert docs_text.sectioned(textwrap.dedent(text), names, "Args") == textwrap.dedent(lines)


def test_fields_of_a_class_become_a_section():
    text = "A thing.\n\nname: what it is. value, unit: its size.\n\nRaises ValueError."
    section = "Attributes:\n    name: what it is.\n    value: its size.\n    unit: its size."
    lines = f"A thing.\n\n{section}\n\nRaises ValueError."
    assert docs_text.sectioned(text, ["name", "value", "unit"], "Attributes") == lines
    assert docs_text.sectioned(text, [], "Args") == docs_text.sectioned(text, ["other"], "Args") == text
