"""docs/notebook.ipynb runs in a fresh kernel, and the outputs in the file are those of its code."""

import re

import pytest
from conftest import ENGINE
from nbformat.v4 import new_code_cell
from run_notebook import execute, read, without_libraries

SMALL = "num_prompts, num_samples = 6, 2\ntraining |= {'epochs': 1}"
# Models that are still in memory when all is done.
LEFT = """
import gc, torch
gc.collect()
gc.unfreeze()  # an engine that was not shut down has frozen its objects, which hides them
modules = [x for x in gc.get_objects() if isinstance(x, torch.nn.Module)]
print(sorted({type(x).__name__ for x in modules if any(True for _ in x.parameters())}))
"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The folder of a small run, the outputs of the notebook's cells, and what the last one said
    that is not the notebook's."""
    folder, notebook = tmp_path_factory.mktemp("notebook"), read()
    (place,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    small = SMALL + ("\nengine['backend'] = 'transformers'" if ENGINE else "")
    notebook.cells.insert(place + 1, new_code_cell(small))
    notebook.cells.append(new_code_cell(LEFT))
    execute(notebook, folder)
    *cells, last = code_cells(notebook)
    outputs = [cell.outputs for cell in cells if cell.source != small]
    return folder, outputs, last.outputs[0].text


@pytest.mark.slow
def test_it_trains_a_student(executed):
    assert (executed[0] / "runs" / "train" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_no_engine_and_no_model_stays_in_memory(executed):
    assert executed[2] == "[]\n"


@pytest.mark.slow
def test_a_bar_is_one_line_that_changes(executed):
    said = "".join(o.text for outputs in executed[1] for o in outputs if o.get("name") == "stderr")
    # tqdm writes s/row where a row takes longer than a second.
    bars = [line for line in said.splitlines() if re.search(r"100%.*(row/s|s/row)", line)]
    assert [line.split(":")[0] for line in bars] == ["rollouts", "rewrite", "rollouts", "rollouts"]


def shape(outputs):
    """What does not depend on sizes and speed: the kinds of a cell's outputs, columns of frames."""
    found = []
    for output in without_libraries(outputs):
        data = output.get("data", {})
        columns = re.findall(r"<th>(.*?)</th>", data.get("text/html", ""))
        found.append((output.output_type, output.get("name"), sorted(data), columns))
    return found


@pytest.mark.slow
def test_the_outputs_in_the_file_belong_to_its_code(executed):
    cells = code_cells(read())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell, outputs in zip(cells, executed[1], strict=True):
        assert shape(cell.outputs) == shape(outputs), cell.source
