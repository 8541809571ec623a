"""How far the student was from the teacher on each row of a training: TRAINING/rows/rank-N.jsonl.

Each process of a training writes a file of its own, a line for each row of a step: `step`, from 1;
`row`, the first 16 digits of its `row_id`; `kl`, the mean over its loss tokens, by weight, in nats,
before the step changed the student. A row may be in a step twice, in packs of two epochs.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from mpd_data.common.files import read_json_lines
from mpd_data.common.records import Record, require

_REMEDY = "Remove the line."


class _Line(Record):
    step: int = Field(ge=1)
    row: str = Field(pattern="^[0-9a-f]{16}$")
    kl: float = Field(allow_inf_nan=False)


def row_log(training: Path, rank: int) -> Path:
    """Return the file of the process `rank`."""
    return training / "rows" / f"rank-{rank}.jsonl"


def row_logs(training: Path) -> list[Path]:
    """Return the files that there are."""
    return sorted((training / "rows").glob("rank-*.jsonl"))


def read_row_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file. A last line without its end is left out: a kill tears it. Raise
    DataError for another damaged line."""
    lines = read_json_lines(path, _REMEDY)
    for number, line in enumerate(lines, start=1):
        require(_Line, line, f"{path}, line {number}: not a row of a training", _REMEDY)
    return lines
