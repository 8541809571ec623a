"""Where a run says how far it is: metrics.jsonl, trackers, a progress bar or lines."""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mpd_data.common.errors import ConfigError
from mpd_train.config import TrainConfig

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "mpd"
_SECONDS_PER_LINE = 15.0


def load_trackers(names: list[str]) -> dict[str, Any]:
    """The trackers' modules by name; ConfigError for one that is not installed."""
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(_MODULES[name])
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--report-to {name} needs {error.name}: pip install"
                " 'mixed-policy-distillation[trackers]'"
            ) from error
    return modules


class Trackers:
    """The trackers of one training. A run has the name of the training's folder, in the project
    "mpd"; wandb takes WANDB_NAME and WANDB_PROJECT instead if they are set.

    After a resume tensorboard drops the steps that are done again (purge_step); with wandb and
    trackio a resumed training is a further run of the same name. wandb has been run offline,
    trackio with its local database.
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
        """A line of metrics.jsonl."""
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
    """Tells of the steps after `done` of `total`."""

    def __init__(
        self, config: TrainConfig, tracker_modules: dict[str, Any], done: int, total: int
    ) -> None:
        if done:
            print(f"resuming after step {done} of {total}", file=sys.stderr)
        self._metrics = _open_metrics(config.out / "metrics.jsonl", done)
        self._trackers = Trackers(tracker_modules, config.out, config.model_dump(mode="json"), done)
        self._bar = tqdm(
            total=total, initial=done, desc="train", unit="step", disable=not sys.stderr.isatty()
        )
        self._last_line = time.monotonic()

    def step(self, step: int, record: dict[str, float], seconds: float, waited: float) -> None:
        """After each optimiser step, which took `seconds`, of which it `waited` for data."""
        pace = record["tokens"] / seconds
        self.write(
            {
                "step": step,
                **record,
                "seconds": round(seconds, 4),
                "data_seconds": round(waited, 4),
                "tokens_per_second": round(pace, 1),
                "peak_memory_gib": round(peak_memory() / 2**30, 3),
            }
        )
        self._bar.update(1)
        said = f"loss {record['loss']:.4f}, {pace:,.0f} tok/s"
        self._bar.set_postfix_str(said, refresh=False)
        if self._bar.disable and time.monotonic() - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = time.monotonic()
            print(f"train: step {step}/{self._bar.total}, {said}", file=sys.stderr)

    def write(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, whole on disk when the next begins."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._trackers.log(record)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._trackers.close()
        self._metrics.close()


def peak_memory() -> int:
    """Bytes that this process has taken at most: of the GPU where there is one, else of RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _open_metrics(path: Path, done: int) -> Any:
    """metrics.jsonl for appending, cut back to the steps that the checkpoint holds."""
    kept = []
    if path.exists():
        # The last line may be torn by a kill; steps after the checkpoint are done again.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return path.open("a", encoding="utf-8")
