"""Record a training's progress: metrics.jsonl, trackers, stderr."""

import importlib
import json
import os
import resource
import sys
import uuid
from pathlib import Path
from typing import Any, TextIO

import torch
from pydantic import Field

from mpd_data.common.errors import DataError, requires
from mpd_data.common.files import atomic_file, read_json, read_json_lines, write_json_atomic
from mpd_data.common.meter import Meter
from mpd_data.common.records import Record, require
from mpd_train.config import TrainConfig

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "mpd"


def load_trackers(names: list[str]) -> dict[str, Any]:
    """Return the trackers' modules by name. Raise ConfigError for one that is not installed."""
    modules = {}
    for name in names:
        with requires(name, f"--report-to {name}"):
            modules[name] = importlib.import_module(_MODULES[name])
    return modules


class Trackers:
    """The trackers of one training.

    A run is named after the training's folder, as transformers does, in the project "mpd";
    WANDB_PROJECT, WANDB_NAME, TRACKIO_PROJECT and TRACKIO_NAME in the environment come first. A
    training that is resumed after step `done` goes on in the same run; the `repeated` records that
    the run has from after that step are not sent again. tensorboard takes them anew (purge_step).
    Tested with wandb offline and with trackio's local database.
    """

    def __init__(
        self, modules: dict[str, Any], out: Path, config: dict[str, Any], done: int, repeated: int
    ) -> None:
        self._writer: Any = None
        self._repeated = repeated
        self._runs = {name: module for name, module in modules.items() if name != "tensorboard"}
        if "tensorboard" in modules:
            folder = str(out / "tensorboard")
            self._writer = modules["tensorboard"].SummaryWriter(folder, purge_step=done + 1)
        for tracker, run in self._runs.items():
            names = {"PROJECT": _PROJECT, "NAME": os.path.relpath(out)}
            project, name = (
                os.environ.get(f"{tracker.upper()}_{key}") or value for key, value in names.items()
            )
            again: dict[str, Any] = {"resume": "allow"}
            if tracker == "wandb":
                again["id"] = os.environ.get("WANDB_RUN_ID") or _run_id(out, done + repeated > 0)
            run.init(project=project, name=name, config=config, **again)

    def log(self, record: dict[str, Any]) -> None:
        """Pass on a line of metrics.jsonl."""
        values = {name: value for name, value in record.items() if name != "step"}
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, record["step"])
        if self._repeated:
            self._repeated -= 1
            return
        for run in self._runs.values():
            run.log(values, step=record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for run in self._runs.values():
            run.finish()


class Recorder:
    """Records the steps after `done` of `total`."""

    def __init__(
        self, config: TrainConfig, tracker_modules: dict[str, Any], done: int, total: int
    ) -> None:
        if done:
            print(f"resuming after step {done} of {total}", file=sys.stderr)
        self._metrics, repeated = _open_metrics(config.out / "metrics.jsonl", done)
        settings = config.model_dump(mode="json")
        self._trackers = Trackers(tracker_modules, config.out, settings, done, repeated)
        self._meter = Meter("train", total, "step", done)
        self._text = ""

    def step(self, step: int, record: dict[str, float], seconds: float, waited: float) -> None:
        """Record an optimiser step that took `seconds`, of which it `waited` for data."""
        pace = record["tokens"] / seconds
        self.write({
            "step": step, **record,
            "seconds": round(seconds, 4), "data_seconds": round(waited, 4),
            "tokens_per_second": round(pace, 1),
            "peak_memory_gib": round(peak_memory() / 2**30, 3),
        })  # fmt: skip
        self._text = f"loss {record['loss']:.4f}, {pace:,.0f} tok/s"
        self._meter.advance()
        self._meter.show(self._text)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, flushed before the next begins."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._trackers.log(record)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.close(self._text)
        self._trackers.close()
        self._metrics.close()


def peak_memory() -> int:
    """Return the most bytes that this process has used: of the GPU, or of RAM without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _run_id(out: Path, resumed: bool) -> str:
    """Return the id of the wandb run of the training in `out`, a new one unless it is resumed."""
    path = out / "tracker.json"
    if resumed and path.exists():
        saved = read_json(path, "Delete it: the tracker begins another run.", ("wandb",))
        return str(saved["wandb"])
    run_id = uuid.uuid4().hex
    write_json_atomic(path, {"wandb": run_id})
    return run_id


class _Line(Record):
    """A line of metrics.jsonl: of a step, or of a validation, which has no tokens."""

    step: int = Field(ge=0)
    tokens: int | None = Field(None, ge=1)
    seconds: float = Field(0.0, ge=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; none where there is no file. A last line without its
    end is left out: a kill tears it. Raise DataError for another damaged line, and for a step that
    is there twice."""
    remedy, newest = "Remove the line.", 0
    records = read_json_lines(path, remedy)
    for number, record in enumerate(records, start=1):
        place = f"{path}, line {number}: not a line of metrics"
        require(_Line, record, place, remedy)
        if "tokens" in record:
            if record["step"] <= newest:
                raise DataError(f"{place} (step {record['step']} after {newest}). {remedy}")
            newest = record["step"]
    return records


def _open_metrics(path: Path, done: int) -> tuple[TextIO, int]:
    """Open metrics.jsonl for appending, cut back to the steps that the checkpoint holds. Return it,
    and how many records were cut off. Raise DataError like `read_metrics`."""
    # Steps after the checkpoint are done again.
    lines = read_metrics(path)
    kept = [json.dumps(record) + "\n" for record in lines if record["step"] <= done]
    with atomic_file(path) as file:
        file.write("".join(kept))
    return path.open("a", encoding="utf-8"), len(lines) - len(kept)
