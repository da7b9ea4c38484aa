"""Executes the notebooks: NAME.py, which is what is edited, becomes NAME.ipynb, which is what is read.

pip install 'esd-jax[notebooks]' && python -m launch.notebooks
python -m launch.notebooks --names=quickstart
"""

import base64
import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from PIL import Image

from launch import command
from launch.command import say

FOLDER = Path(__file__).parent.parent / "notebooks"

FLAGS = flags.FlagValues()
flags.DEFINE_list("names", [], "Which; by default all.", flag_values=FLAGS)


def main() -> None:
    FLAGS(sys.argv)
    for name in FLAGS.names or sorted(path.stem for path in FOLDER.glob("*.py")):
        executed(name)
        say(f"{FOLDER / name}.ipynb")


def executed(name: str, **parameters: Any) -> None:
    """Runs a notebook from the first cell to the last, and writes it with what came out.

    Raises nbclient's CellExecutionError for a cell that fails.
    """
    import jupytext
    import nbclient

    notebook = source(name, parameters)
    nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", record_timing=False, coalesce_streams=True
    ).execute()
    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if kept(output)]
            for output in cell["outputs"]:
                if figure := output.get("data", {}).get("image/png"):
                    output["data"]["image/png"] = smaller(figure)
                    output["data"].pop("image/jpeg", None)  # a second copy, of images that are no figures
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "jupytext": notebook.metadata["jupytext"]}
    jupytext.write(notebook, FOLDER / f"{name}.ipynb")


def kept(output: Any) -> bool:
    """Whether an output is for readers. Progress and warnings are news when they are made, and noise afterwards."""
    if output["output_type"] != "stream":
        return True
    output["text"] = re.sub(r"(?m)^step \d+/\d+ .*\n?", "", output["text"])
    return output["name"] != "stderr" and bool(output["text"].strip())


def smaller(figure: str) -> str:
    """A figure with a palette of 256 colours, a third of its size; base64, as notebooks hold it."""
    stream = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB")
    image.quantize(256).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def source(name: str, parameters: Mapping[str, Any]) -> Any:
    """A notebook without outputs, with other values in the cell that is tagged "parameters".

    Raises ValueError for a parameter that the cell does not have.
    """
    import jupytext

    notebook = jupytext.read(FOLDER / f"{name}.py")
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for parameter, value in parameters.items():
        if not re.search(rf"(?m)^{parameter} = ", cell.source):
            raise ValueError(f"{name} has no parameter {parameter!r}")
        cell.source += f"\n{parameter} = {value!r}"
    return notebook


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
