"""Send a training to its trackers: tensorboard, wandb, trackio, mlflow."""

import importlib
import os
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.common.errors import ConfigError, requires
from mpd_data.common.files import read_json, write_json_atomic
from mpd_data.inspect.stats import collect, scan
from mpd_data.inspect.traces import kept_pairs

_MODULES = {
    "tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio",
    "mlflow": "mlflow",
}  # fmt: skip
_PROJECT = "mpd"
_TOLD = "tracker.json"
TRACES = 20  # of the newest round
_MLFLOW_TEXT = 500  # characters of a parameter that every store takes


def load_trackers(names: list[str]) -> dict[str, Any]:
    """Return the trackers' modules by name. Raise ConfigError for one that is not installed, and
    where MLflow has nowhere to write."""
    modules: dict[str, Any] = {}
    for name in names:
        with requires(name, f"--report-to {name}"):
            modules[name] = importlib.import_module(_MODULES[name])
    if "mlflow" in modules:
        modules["mlflow"] = _MLflow(modules["mlflow"])
    return modules


class _MLflow:
    """MLflow behind the calls that wandb and trackio share. Raise ConfigError where its store is a
    database that the small package (mlflow-skinny) cannot open."""

    def __init__(self, module: Any) -> None:
        self._module = module
        uri = module.get_tracking_uri()
        if not uri.startswith(("http", "databricks", "file")) and not find_spec("sqlalchemy"):
            raise ConfigError(
                f"--report-to mlflow: its store is {uri}, and mlflow-skinny opens no database. Name"
                " a server in MLFLOW_TRACKING_URI, or install the whole package mlflow."
            )

    def init(
        self, project: str, name: str, group: str | None, config: dict[str, Any], id: str | None
    ) -> str:
        """Begin the run, or go on in the one of `id`. Return its id."""
        self._module.set_experiment(project)
        tags = {} if group is None else {"group": group}
        run = self._module.start_run(run_id=id, run_name=None if id else name, tags=tags)
        if id is None:
            # What a run was begun with cannot change there.
            flat = {k: str(v)[:_MLFLOW_TEXT] for k, v in _flat(config).items()}
            self._module.log_params(flat)
        return str(run.info.run_id)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send numbers as metrics of a step, tables as files."""
        tables = {name: value for name, value in values.items() if isinstance(value, pl.DataFrame)}
        for name, table in tables.items():
            self._module.log_dict(table.to_dict(as_series=False), f"{name}.json")
        numbers = {name: float(value) for name, value in values.items() if name not in tables}
        self._module.log_metrics(numbers, step=step)

    def finish(self) -> None:
        self._module.end_run()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by names such as `loss.divergence`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {}
        flat |= nested or {f"{prefix}{name}": value}
    return flat


class Trackers:
    """The trackers of one training.

    A run is named after the training's folder, as transformers does, in the project "mpd";
    WANDB_PROJECT, WANDB_NAME, TRACKIO_PROJECT, TRACKIO_NAME and MLFLOW_EXPERIMENT_NAME in the
    environment come first. Its group is WANDB_RUN_GROUP. A training that is resumed after step
    `done` goes on in the same run; the `repeated` records that the run has from after that step are
    not sent again. tensorboard takes them anew (purge_step). Tested with wandb offline, trackio's
    local database and MLflow's store of files.
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
            group, resumed = os.environ.get("WANDB_RUN_GROUP"), done + repeated > 0
            if tracker == "mlflow":
                project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or project
                known = told(out) if resumed else {}
                id_ = os.environ.get("MLFLOW_RUN_ID") or known.get("mlflow")
                remember(out, known | {"mlflow": run.init(project, name, group, config, id_)})
                continue
            again: dict[str, Any] = {"resume": "allow"}
            if tracker == "wandb":
                again["id"] = os.environ.get("WANDB_RUN_ID") or _run_id(out, resumed)
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
            elif tracker == "mlflow":
                table = traces
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
    """Return what the trackers of the training in `out` have been told: the ids of the runs of
    `wandb` and `mlflow`, a hash of the `evaluation`."""
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
