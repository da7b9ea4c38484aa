"""Notebooks: what is read is what is edited, and every cell runs."""

import ast

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from messages import one_line
from PIL import Image

from launch import notebooks

# Parameters that make each one short.
SMALL = {
    "quickstart": {"steps": 2, "images": 1},
    "inside_an_erasure": {"steps": 2},
    "compare_methods": {"methods": ["emoji_uce"], "guidance": ["SLD medium"], "images": 2},
    "attack_and_defend": {"steps": 2, "steps_all": 2, "short": 2, "long": 2, "seeds": 1, "images": 2},
}
NAMES = sorted(path.stem for path in notebooks.FOLDER.glob("*.py"))


def test_every_notebook_is_tested():
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_is_edited(name):
    read = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    edited = jupytext.read(notebooks.FOLDER / f"{name}.py")
    assert [(c.cell_type, c.source) for c in read.cells] == [(c.cell_type, c.source) for c in edited.cells]
    outputs = [output for cell in read.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size < 800_000


def test_unknown_parameters_are_refused():
    assert "steps = 7" in notebooks.source("quickstart", {"steps": 7}).cells[1].source
    with pytest.raises(ValueError, match=one_line("quickstart", "'stepps'")):
        notebooks.source("quickstart", {"stepps": 7})


def run(name):
    """Runs all cells in this process, which has compiled much of it before. Returns the pictures that they show."""
    matplotlib.use("Agg")
    pictures, space = [], {"__name__": "__main__"}
    for cell in notebooks.source(name, SMALL[name]).cells:
        if cell.cell_type == "code":
            *body, last = ast.parse(cell.source).body
            shown = isinstance(last, ast.Expr)
            exec(compile(ast.Module(body if shown else [*body, last], []), f"{name}.py", "exec"), space)
            value = eval(compile(ast.Expression(last.value), f"{name}.py", "eval"), space) if shown else None
            pictures += [value] if isinstance(value, Image.Image) else []
            pictures += map(plt.figure, plt.get_fignums())
            plt.close("all")
    return pictures


@pytest.mark.slow
def test_the_quickstart_runs():
    assert len(run("quickstart")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"quickstart"}))
def test_the_others_run(name):
    assert len(run(name)) >= 2
