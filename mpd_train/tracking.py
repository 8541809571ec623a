"""Send a training to its trackers: tensorboard, wandb, trackio."""

import importlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.common.errors import requires
from mpd_data.common.files import read_json, write_json_atomic
from mpd_data.inspect.stats import collect, scan
from mpd_data.inspect.traces import kept_pairs

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "mpd"
_TOLD = "tracker.json"
TRACES = 20  # of the newest round


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
    WANDB_PROJECT, WANDB_NAME, TRACKIO_PROJECT and TRACKIO_NAME in the environment come first. Its
    group is WANDB_RUN_GROUP. A training that is resumed after step `done` goes on in the same run;
    the `repeated` records that the run has from after that step are not sent again. tensorboard
    takes them anew (purge_step). Tested with wandb offline and with trackio's local database.
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
            group = os.environ.get("WANDB_RUN_GROUP")
            run.init(project=project, name=name, group=group, config=config, **again)

    def log(self, record: dict[str, Any]) -> None:
        """Pass on a line of metrics.jsonl."""
        values = {name: value for name, value in record.items() if name != "step"}
        self._write(values, record["step"])
        if self._repeated:
            self._repeated -= 1
            return
        for run in self._runs.values():
            run.log(values, step=record["step"])

    def log_rounds(self, shards: list[Path]) -> None:
        """Send the share of each status among the rewrites in `shards`, and some kept ones of the
        newest round with their drafts."""
        rewrites = scan(shards, "distill") if self._runs or self._writer else None
        if rewrites is None:
            return
        counts = collect(rewrites.group_by("status").agg(n=pl.len()))
        total = counts["n"].sum()
        shares = {f"rewrites/{status}": n / total for status, n in counts.sort("status").rows()}
        traces = kept_pairs(shards[-1], TRACES)
        self._write(shares, 0)
        if self._writer is not None:
            for number, row in enumerate(traces.to_dicts()):
                text = "\n\n".join(row[name] for name in ("problem", "completion", "rewrite"))
                self._writer.add_text("traces", text, number)
        for tracker, run in self._runs.items():
            if tracker == "trackio":  # some releases lose a record whose table comes as rows
                table = run.Table(dataframe=traces.to_pandas())
            else:
                table = run.Table(columns=traces.columns, data=[list(row) for row in traces.rows()])
            run.log({**shares, "traces": table}, step=0)

    def log_evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Send the results of evaluation sets (`mpd_data.inspect.compare.evaluate`) by name, of the
        model after `step`."""
        values = {
            f"{name}/{measure}": found[measure]
            for name, found in results.items()
            for measure in ("accuracy", "mean_tokens", "truncated")
            if found[measure] is not None
        }
        self._write(values, step)
        for run in self._runs.values():
            # wandb drops what comes for a step that is over.
            run.log(values, step=step + 1)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for run in self._runs.values():
            run.finish()


def told(out: Path) -> dict[str, str]:
    """Return what the trackers of the training in `out` have been told: the `wandb` run's id, a
    hash of the `evaluation`."""
    if not (out / _TOLD).exists():
        return {}
    saved = read_json(out / _TOLD, "Delete it: the tracker begins another run.")
    return {str(name): str(value) for name, value in saved.items()}


def remember(out: Path, known: dict[str, str]) -> None:
    """Write what `told` returns."""
    write_json_atomic(out / _TOLD, known)


def _run_id(out: Path, resumed: bool) -> str:
    """Return the id of the wandb run of the training in `out`, a new one unless it is resumed."""
    known = told(out) if resumed else {}
    if "wandb" not in known:
        known["wandb"] = uuid.uuid4().hex
        remember(out, known)
    return known["wandb"]
