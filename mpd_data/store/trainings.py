"""Read what a training writes while it goes on.

metrics.jsonl has a line for each step and each validation. rows/rank-N.jsonl has a line for each
row of a step, of one process: `step`, from 1; `row`, the first 16 digits of its `row_id`; `kl`, the
student's mean divergence from the teacher over its loss tokens, by weight, in nats, before the step
changed the student. A row may be in a step twice, in packs of two epochs.

Of each file a last line without its end is left out: a kill tears it.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from mpd_data.common.errors import DataError
from mpd_data.common.files import read_json_lines
from mpd_data.common.records import Record, require

_REMEDY = "Remove the line."


class _Metrics(Record):
    """Of a step, or of a validation, which has no tokens."""

    step: int = Field(ge=0)
    tokens: int | None = Field(None, ge=1)
    seconds: float = Field(0.0, ge=0)


class _Row(Record):
    step: int = Field(ge=1)
    row: str = Field(pattern="^[0-9a-f]{16}$")
    kl: float


def metrics_file(training: Path) -> Path:
    return training / "metrics.jsonl"


def read_metrics(training: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's metrics.jsonl; none where there is no file. Raise DataError
    for a damaged line, and for a step that is there twice."""
    path, newest = metrics_file(training), 0
    records = read_json_lines(path, _REMEDY)
    for number, record in enumerate(records, start=1):
        place = f"{path}, line {number}: not a line of metrics"
        require(_Metrics, record, place, _REMEDY)
        if "tokens" in record:
            if record["step"] <= newest:
                raise DataError(f"{place} (step {record['step']} after {newest}). {_REMEDY}")
            newest = record["step"]
    return records


def row_log(training: Path, rank: int) -> Path:
    """Return the file of the process `rank`."""
    return training / "rows" / f"rank-{rank}.jsonl"


def row_logs(training: Path) -> list[Path]:
    """Return the files that there are."""
    return sorted((training / "rows").glob("rank-*.jsonl"))


def read_row_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of such a file. Raise DataError for a damaged line."""
    lines = read_json_lines(path, _REMEDY)
    for number, line in enumerate(lines, start=1):
        require(_Row, line, f"{path}, line {number}: not a row of a training", _REMEDY)
    return lines
