"""Run docs/notebook.ipynb. As a program (`make notebook`), write its outputs anew."""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "notebook.ipynb"
_BARS = ("rollouts: 100%", "rewrite: 100%", "train: 100%")


def read():
    return nbformat.read(PATH, as_version=4)


def execute(notebook, folder):
    """Run `notebook` in `folder` with a kernel of its own; its cells get the outputs. Raise
    nbclient's CellExecutionError where a cell fails."""
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", coalesce_streams=True, resources=where
    )
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (str(ROOT), before)))
    return client.execute(env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def without_libraries(outputs):
    """Return outputs of a cell; of what is on stderr only our progress. The rest is what libraries
    say of the machine that ran the notebook."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr":
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(line for line in lines if line.startswith(_BARS))
        if output.get("text") != "":
            kept.append(output)
    return kept


def main():
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = without_libraries(cell.outputs)
            del cell.metadata["execution"]  # times, which would change with each run
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
