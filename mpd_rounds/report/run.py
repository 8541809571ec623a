"""Open a run's folder: its rounds, evaluations and trainings, and which steps are missing.

Only light columns and settings are read, and nothing is written.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.files import read_json
from mpd_data.common.text import plain
from mpd_data.inspect.stats import collect, scan
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import read_record
from mpd_data.store.schema import Stage
from mpd_data.store.shards import read_metadata
from mpd_data.store.trainings import read_metrics

BASE = 0  # the round of a model that has not been trained


@dataclass(frozen=True)
class Run:
    """One run. `rounds`: folders in `data/` with rollouts, by number; `trainings`: folders in
    `train/` with metrics (for a training alone: the run itself, as round 1); `evaluations`: the
    finished ones, by set and round; `baselines`: the finished ones, by set and name; `missing`:
    steps that are not finished, in words; `settings`: pipeline.json, or empty; `gate`: gate.json,
    or empty."""

    path: Path
    label: str
    is_pipeline: bool
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, Path] = field(default_factory=dict)
    trainings: dict[int, Path] = field(default_factory=dict)
    evaluations: dict[str, dict[int, Path]] = field(default_factory=dict)
    baselines: dict[str, dict[str, Path]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    gate: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> str | None:
        """The first evaluation set, which gives the headline results."""
        return next(iter(self.evaluations), None)


def round_name(number: int) -> str:
    return "base" if number == BASE else f"round {number}"


def open_runs(paths: list[Path]) -> list[Run]:
    """Open the runs in `paths`. A folder that `mpd-rounds --seeds` made is replaced by its seeds.

    Raise ConfigError for a folder that is no run or is given twice, and for a training among
    several runs.
    """
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder. Give the OUT of mpd-rounds.")
        seeds = sorted(
            (p for p in path.glob("seed*") if p.name[4:].isdigit() and (p / "eval").is_dir()),
            key=lambda p: int(p.name[4:]),
        )
        folders += seeds if seeds and not _is_pipeline(path) else [path]
    resolved = [path.resolve() for path in folders]
    for path in folders:
        if resolved.count(path.resolve()) > 1:
            raise ConfigError(f"{path}: given twice. Give each run once.")
    labels = _labels(resolved)
    runs = [_open(path, label) for path, label in zip(folders, labels, strict=True)]
    for run in runs:
        if len(runs) > 1 and not run.is_pipeline:
            raise ConfigError(
                f"{run.path}: the folder of a training. Only runs of mpd-rounds can be compared;"
                " give a training alone."
            )
    return runs


def _labels(paths: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
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
    info = read_record(path)
    if "stages" in info:
        raise ConfigError(
            f"{path}: the folder of a round, not of a run. Read it with mpd-gen stats, or give the"
            " OUT of mpd-rounds that contains it."
        )
    if "details" in info:
        trainings = {1: path} if (path / "metrics.jsonl").is_file() else {}
        missing = _missing_training("training", path)
        return Run(path, label, False, trainings=trainings, missing=missing)
    raise ConfigError(
        f"{path}: not a run. Expected the OUT of mpd-rounds (pipeline.json, data/, train/, eval/)"
        " or of mpd-train (run.json, metrics.jsonl)."
    )


def _open_pipeline(path: Path, label: str) -> Run:
    saved = path / "pipeline.json"
    missing = []
    if saved.is_file():
        settings = read_record(path, "pipeline")
        settings.pop("kind", None)
        try:
            planned = int(settings["rounds"])
            sets = [str(chosen["name"]) for chosen in settings["evaluation"]]
            # Runs of older versions have none.
            baselines = {b["name"]: b["sets"] or sets for b in settings.get("baseline", [])}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{saved}: expected the settings of a pipeline as mpd-rounds writes them, with"
                f" `rounds` and `evaluation` ({type(error).__name__}: {error})."
            ) from error
    else:
        settings = {}
        planned = max(_numbered(path / "data") | _numbered(path / "train"), default=0)
        folders = [f.name for f in (path / "eval").glob("*-*") if f.is_dir()]
        named = {name for name in folders if name.startswith(_BASELINE)}
        sets = sorted({name.partition("-")[2] for name in {*folders} - named})
        baselines = _baselines_of(named, sets)
        missing.append("pipeline.json: what else was planned is not known")
    gate = _gate_of(path) if settings.get("gate") else {}
    # After the round at which the gate stopped a run, nothing is missing.
    planned = min(planned, gate.get("stopped") or planned)
    run = Run(path, label, True, settings, missing=missing, gate=gate)
    for number in range(planned + 1):
        lines = _look_at_round(run, number) if number > BASE else []
        for name in sets:
            folder = path / "eval" / f"{round_name(number).replace(' ', '')}-{name}"
            unmeasured = _missing_rollouts(f"{round_name(number)}: evaluate {name}", folder)
            if not unmeasured:
                run.evaluations.setdefault(name, {})[number] = folder
            lines += unmeasured
        not_begun = [line for line in lines if line.endswith(_NOT_BEGUN)]
        if number == BASE:
            lines += _look_at_baselines(run, baselines, sets)
        if number > BASE and len(not_begun) == 3 + len(sets):
            # Nor has any round after it.
            rest = round_name(number) if number == planned else f"rounds {number} to {planned}"
            missing.append(f"{rest}: not begun")
            break
        missing += lines
    return run


def _gate_of(path: Path) -> dict[str, Any]:
    """Return what gate.json holds; {} before the first decision. Raise DataError if it is not what
    mpd-rounds writes."""
    file = path / "gate.json"
    if not file.is_file():
        return {}
    remedy = "Expected the gate's decisions, as mpd-rounds writes them. Run mpd-rounds again."
    return read_json(file, remedy, ("set", "rounds", "stopped", "best", "text"))


_NOT_BEGUN = "not begun"
_BASELINE = "baseline-"


def _baselines_of(folders: Iterable[str], sets: list[str]) -> dict[str, list[str]]:
    """Return the sets of each baseline, by the names of its folders."""
    found: dict[str, list[str]] = {}
    for folder in sorted(folders):
        # Of two sets, `a` and `b-a`, the longer name is meant.
        for name in sorted(sets, key=len, reverse=True):
            if folder.endswith(f"-{name}"):
                baseline = folder.removeprefix(_BASELINE).removesuffix(f"-{name}")
                found.setdefault(baseline, []).append(name)
                break
    return found


def _look_at_baselines(run: Run, baselines: dict[str, list[str]], sets: list[str]) -> list[str]:
    """Add the folders of the baselines to `run`, and return what is missing."""
    lines = []
    for baseline, measured in baselines.items():
        for name in sets:
            if name not in measured:
                continue
            folder = run.path / "eval" / f"{_BASELINE}{baseline}-{name}"
            missing = _missing_rollouts(f"baseline {baseline}: evaluate {name}", folder)
            if not missing:
                run.baselines.setdefault(name, {})[baseline] = folder
            lines += missing
    return lines


def _numbered(folder: Path) -> dict[int, Path]:
    numbers = ((p.name.removeprefix("round"), p) for p in folder.glob("round*") if p.is_dir())
    return {int(number): p for number, p in numbers if number.isdigit()}


def _look_at_round(run: Run, number: int) -> list[str]:
    """Add the folders of a round to `run`, and return what is missing."""
    data, train = run.path / "data" / f"round{number}", run.path / "train" / f"round{number}"
    name = round_name(number)
    lines = _missing_rollouts(f"{name}: rollouts", data)
    rollouts = count(data, "rollouts")
    if rollouts:
        run.rounds[number] = data
    rewritten = count(data, "distill", pl.col("rollout_id").hash().n_unique())
    if rewritten == 0:
        lines.append(f"{name}: rewrite: {_NOT_BEGUN}")
    elif (rewritten := _count_rewritten_or_failed(data)) < rollouts:
        lines.append(f"{name}: rewrite: {rewritten:,} of {rollouts:,} rollouts")
    lines += _missing_training(f"{name}: train", train)
    if (train / "metrics.jsonl").is_file():
        run.trainings[number] = train
    return lines


def _missing_rollouts(label: str, folder: Path) -> list[str]:
    rows = count(folder, "rollouts")
    expected = rollouts_info(folder).get("details", {}).get("rows")
    if expected is None:
        return [f"{label}: {_NOT_BEGUN}"] if not rows else []
    if rows + count(folder, "errors", (pl.col("stage") == "rollouts").sum()) < expected:
        return [f"{label}: {rows:,} of {expected:,} samples"]
    return [] if rows else [f"{label}: all {expected:,} samples failed"]


def _missing_training(label: str, folder: Path) -> list[str]:
    if (folder / "model").is_dir():
        return []
    if not (folder / "metrics.jsonl").is_file():
        return [f"{label}: {_NOT_BEGUN}"]
    steps = sum(1 for record in read_metrics(folder) if "loss" in record)
    return [f"{label}: {steps:,} steps, not finished"]


def count(folder: Path, stage: Stage, what: pl.Expr | None = None) -> int:
    """Return the number of rows of a stage in a round's folder, or the value of `what` over them;
    0 if there is no row."""
    frame = scan([folder], stage)
    if frame is None:
        return 0
    return int(collect(frame.select(pl.len() if what is None else what)).item())


def _count_rewritten_or_failed(folder: Path) -> int:
    """Return the number of rollouts that have rewrites, or whose rewrites failed for good."""
    rewrites, errors = scan([folder], "distill"), scan([folder], "errors")
    assert rewrites is not None
    ids = [rewrites.select("rollout_id")]
    if errors is not None:
        failed = errors.filter(pl.col("stage") == "rewrite")
        # The message of a failed rewrite begins with its rollout.
        ids.append(failed.select(rollout_id=pl.col("message").str.extract(r"^rollout (\w+)")))
    return collect(pl.concat(ids).unique()).height


# -- files ----------------------------------------------------------------------------------


def rollouts_info(folder: Path) -> dict[str, Any]:
    """Return what run.json holds of the rollouts in a round's folder; {} if they have not begun."""
    return RoundDir(folder).saved_stage("rollouts") or {}


def shard_metadata(folder: Path, stage: Stage) -> dict[str, Any]:
    """Return the metadata of a stage's first shard; empty if there is no shard."""
    shards = RoundDir(folder).shard_paths(stage)
    return read_metadata(shards[0]) if shards else {}


def dates(run: Run) -> tuple[str, str] | None:
    """Return the days (UTC) of the oldest and the newest result, by the files' modification times:
    the files themselves record no time."""
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
