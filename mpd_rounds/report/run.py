"""What a run's folder holds: its rounds, evaluations and trainings, and what of it is missing.

Nothing but light columns and settings is read here, and nothing is written.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.text import plain
from mpd_data.inspect.stats import collect, scan
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import Stage
from mpd_data.store.shards import read_metadata

BASE = 0  # the round of a model that has not been trained


@dataclass(frozen=True)
class Run:
    """One folder. `rounds`: the folders of `data/` that hold rollouts, by number; `trainings`:
    those of `train/` that hold metrics (of `mpd-train` alone: the run itself, as round 1);
    `evaluations`: by set and round, those that are finished. `missing`: what the pipeline owes,
    in words. `settings`: pipeline.json, empty where there is none."""

    path: Path
    label: str
    is_pipeline: bool
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, Path] = field(default_factory=dict)
    trainings: dict[int, Path] = field(default_factory=dict)
    evaluations: dict[str, dict[int, Path]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def headline(self) -> str | None:
        """The evaluation set that stands for the run: the first."""
        return next(iter(self.evaluations), None)

    @property
    def last_round(self) -> int:
        """The newest round that any evaluation has measured, 0 for none."""
        return max((r for folders in self.evaluations.values() for r in folders), default=BASE)


def round_name(number: int) -> str:
    return "base" if number == BASE else f"round {number}"


def open_runs(paths: list[Path]) -> list[Run]:
    """The runs in `paths`; a folder that `mpd-rounds --seeds` made stands for its seeds.

    Raises ConfigError for a folder that is no run, for one that is given twice, and where trainings
    are to be compared with anything.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{plain(str(path))}: no such folder. Give the OUT of mpd-rounds.")
        seeds = sorted(
            (p for p in path.glob("seed*") if p.name[4:].isdigit() and (p / "eval").is_dir()),
            key=lambda p: int(p.name[4:]),
        )
        found += seeds if seeds and not _is_pipeline(path) else [path]
    resolved = [path.resolve() for path in found]
    for path in found:
        if resolved.count(path.resolve()) > 1:
            raise ConfigError(f"{plain(str(path))}: given twice. A run is compared with others.")
    labels = _labels(resolved)
    runs = [_open(path, label) for path, label in zip(found, labels, strict=True)]
    if len(runs) > 1:
        for run in runs:
            if not run.is_pipeline:
                raise ConfigError(
                    f"{plain(str(run.path))}: the folder of a training; only runs of mpd-rounds can"
                    " be compared. Give it alone."
                )
    return runs


def _labels(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return [plain(label) for label in labels]


def _is_pipeline(path: Path) -> bool:
    return (path / "pipeline.json").is_file() or (path / "eval").is_dir()


def _open(path: Path, label: str) -> Run:
    if _is_pipeline(path):
        return _open_pipeline(path, label)
    info = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    if "stages" in info:
        raise ConfigError(
            f"{plain(str(path))}: the folder of a round, not of a run. Look at it with mpd-gen"
            " stats, or give the OUT of mpd-rounds that it lies in."
        )
    if "details" in info:
        trainings = {1: path} if (path / "metrics.jsonl").is_file() else {}
        missing = _owed_training("training", path)
        return Run(path, label, False, trainings=trainings, missing=missing)
    raise ConfigError(
        f"{plain(str(path))}: not a run. Expected the OUT of mpd-rounds (pipeline.json, data/,"
        " train/, eval/) or of mpd-train (run.json, metrics.jsonl)."
    )


def _open_pipeline(path: Path, label: str) -> Run:
    saved = path / "pipeline.json"
    missing = []
    if saved.is_file():
        settings = {name: value for name, value in read_json(saved).items() if name != "kind"}
        try:
            planned = int(settings["rounds"])
            sets = [str(chosen["name"]) for chosen in settings["evaluation"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{plain(str(saved))}: expected the settings of a pipeline as mpd-rounds writes"
                f" them, with `rounds` and `evaluation` ({type(error).__name__}: {error})."
            ) from error
    else:
        settings = {}
        planned = max(_numbered(path / "data") | _numbered(path / "train"), default=0)
        sets = sorted({f.name.partition("-")[2] for f in (path / "eval").glob("*-*") if f.is_dir()})
        missing.append("pipeline.json: what else was planned is not known")
    run = Run(path, label, True, settings, missing=missing)
    for number in range(planned + 1):
        owed = _look_at_round(run, number) if number > BASE else []
        for name in sets:
            folder = path / "eval" / f"{round_name(number).replace(' ', '')}-{name}"
            unmeasured = _owed_rollouts(f"{round_name(number)}: evaluate {name}", folder)
            if not unmeasured:
                run.evaluations.setdefault(name, {})[number] = folder
            owed += unmeasured
        if number > BASE and len(owed) == 3 + len(sets) and all(map(_is_ahead, owed)):
            # After a round that has not begun none has.
            rest = round_name(number) if number == planned else f"rounds {number} to {planned}"
            missing.append(f"{rest}: not begun")
            break
        missing += owed
    return run


_NOT_BEGUN = "not begun"


def _is_ahead(owed: str) -> bool:
    return owed.endswith(_NOT_BEGUN)


def _numbered(folder: Path) -> dict[int, Path]:
    found = ((p.name.removeprefix("round"), p) for p in folder.glob("round*") if p.is_dir())
    return {int(number): p for number, p in found if number.isdigit()}


def _look_at_round(run: Run, number: int) -> list[str]:
    """Adds what there is of a round to `run`, and returns what is not."""
    data, train = run.path / "data" / f"round{number}", run.path / "train" / f"round{number}"
    name = round_name(number)
    owed = _owed_rollouts(f"{name}: rollouts", data)
    rollouts = count_rows(data, "rollouts")
    if rollouts:
        run.rounds[number] = data
    rewritten = count_rollouts_rewritten(data)
    if rewritten == 0:
        owed.append(f"{name}: rewrite: {_NOT_BEGUN}")
    elif rewritten + count_rows(data, "errors", of="distill") < rollouts:
        owed.append(f"{name}: rewrite: {rewritten:,} of {rollouts:,} rollouts")
    owed += _owed_training(f"{name}: train", train)
    if (train / "metrics.jsonl").is_file():
        run.trainings[number] = train
    return owed


def _owed_rollouts(label: str, folder: Path) -> list[str]:
    rows = count_rows(folder, "rollouts")
    details = stage_info(folder, "rollouts").get("details", {})
    expected = details.get("rows")
    if expected is None:
        return [f"{label}: {_NOT_BEGUN}"] if not rows else []
    if rows + count_rows(folder, "errors", of="rollouts") < expected:
        return [f"{label}: {rows:,} of {expected:,} samples"]
    return [] if rows else [f"{label}: all {expected:,} samples failed"]


def _owed_training(label: str, folder: Path) -> list[str]:
    if (folder / "model").is_dir():
        return []
    if not (folder / "metrics.jsonl").is_file():
        return [f"{label}: {_NOT_BEGUN}"]
    steps = sum(1 for record in read_metrics(folder) if "loss" in record)
    return [f"{label}: {steps:,} steps, not finished"]


def count_rows(folder: Path, stage: Stage, of: str | None = None) -> int:
    """Rows of a stage in a round's folder; of errors those of the stage `of`."""
    frame = scan([folder], stage)
    if frame is None:
        return 0
    if of is not None:
        frame = frame.filter(pl.col("stage") == of)
    return int(collect(frame.select(pl.len())).item())


def count_rollouts_rewritten(folder: Path) -> int:
    frame = scan([folder], "distill")
    if frame is None:
        return 0
    return int(collect(frame.select(pl.col("rollout_id").hash().n_unique())).item())


# -- files ----------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DataError where the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{plain(str(path))}: not JSON ({error}). It was written whole, so it was changed"
            " afterwards: restore it."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{plain(str(path))}: expected a JSON object, found {type(value).__name__}")
    return value


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a training's metrics.jsonl; raises what `read_lines` raises."""
    return read_lines(folder / "metrics.jsonl", "step")


def read_lines(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. A line that a kill has torn, the last, is left out.

    Raises DataError for any other line that is no JSON object with these keys.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{plain(str(path))}, line {number}: not JSON ({error})."
                ) from error
            if not isinstance(record, dict) or not record.keys() >= set(keys):
                raise DataError(
                    f"{plain(str(path))}, line {number}: expected a JSON object with"
                    f" {', '.join(keys)}, found {plain(line[:80])}"
                )
            yield record


def stage_info(folder: Path, stage: str) -> dict[str, Any]:
    """What run.json says of a stage; empty where it has not run there."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    saved: dict[str, Any] = read_json(path).get("stages", {}).get(stage, {})
    return saved


def shard_metadata(folder: Path, stage: Stage) -> dict[str, Any]:
    """What the first shard of a stage says of itself; empty where there is none."""
    shards = RoundDir(folder).shard_paths(stage)
    return read_metadata(shards[0]) if shards else {}


def dates(run: Run) -> tuple[str, str] | None:
    """The days (UTC) of the oldest and the newest result, by the files' own times: nothing in them
    says when they were written."""
    files = [
        *run.path.glob("pipeline.json"),
        *run.path.glob("data/round*/*.manifest.jsonl"),
        *run.path.glob("eval/*/rollouts.manifest.jsonl"),
        *(folder / "metrics.jsonl" for folder in run.trainings.values()),
    ]
    if not files:
        return None
    days = [datetime.fromtimestamp(f.stat().st_mtime, UTC).date().isoformat() for f in files]
    return min(days), max(days)
