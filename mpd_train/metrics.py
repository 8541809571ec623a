"""Record a training's progress: metrics.jsonl, trackers, stderr."""

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from mpd_data.common.errors import requires
from mpd_data.common.files import atomic_file, read_json_lines
from mpd_data.common.meter import Meter
from mpd_train.config import TrainConfig

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "mpd"


def load_trackers(names: list[str]) -> dict[str, Any]:
    """Return the trackers' modules by name. Raise ConfigError for one that is not installed."""
    modules = {}
    for name in names:
        with requires("trackers", f"--report-to {name}"):
            modules[name] = importlib.import_module(_MODULES[name])
    return modules


class Trackers:
    """The trackers of one training. A run has the name of the training's folder, in the project
    "mpd"; wandb takes WANDB_NAME and WANDB_PROJECT instead if they are set.

    After a resume tensorboard drops the steps that are done again (purge_step); with wandb and
    trackio a resumed training is a further run of the same name. Tested with wandb offline and with
    trackio's local database.
    """

    def __init__(
        self, modules: dict[str, Any], out: Path, config: dict[str, Any], done: int
    ) -> None:
        self._writer: Any = None
        self._runs = {name: module for name, module in modules.items() if name != "tensorboard"}
        if "tensorboard" in modules:
            folder = str(out / "tensorboard")
            self._writer = modules["tensorboard"].SummaryWriter(folder, purge_step=done + 1)
        for tracker, run in self._runs.items():
            names = {"PROJECT": _PROJECT, "NAME": out.resolve().name}
            if tracker == "wandb":
                names = {key: os.environ.get(f"WANDB_{key}", name) for key, name in names.items()}
            run.init(project=names["PROJECT"], name=names["NAME"], config=config)

    def log(self, record: dict[str, Any]) -> None:
        """Pass on a line of metrics.jsonl."""
        values = {name: value for name, value in record.items() if name != "step"}
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, record["step"])
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
        self._metrics = _open_metrics(config.out / "metrics.jsonl", done)
        self._trackers = Trackers(tracker_modules, config.out, config.model_dump(mode="json"), done)
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


def _open_metrics(path: Path, done: int) -> Any:
    """Open metrics.jsonl for appending, cut back to the steps that the checkpoint holds."""
    kept = []
    if path.exists():
        # The last line may be torn by a kill; steps after the checkpoint are done again.
        for record in read_json_lines(path, "Remove the line.", ("step",)):
            if record["step"] <= done:
                kept.append(json.dumps(record) + "\n")
    with atomic_file(path) as file:
        file.write("".join(kept))
    return path.open("a", encoding="utf-8")
