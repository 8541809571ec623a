"""`mpd-gen status`: show from another terminal how far a round, a training or a pipeline run is.

Only what these write for themselves is read: manifests, progress reports, metrics and locks. A lock
says whether a process lives; a report says what it does.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import read_json, read_json_lines
from mpd_data.common.records import Record, require
from mpd_data.common.text import format_table
from mpd_data.store.locks import is_held
from mpd_data.store.progress import read_report
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import kind_of, read_record, require_kind
from mpd_data.store.schema import STAGES
from mpd_data.store.trainings import metrics_file, read_metrics

_AT_WORK = ("starting", "running", "silent", "stalled")
# A process that works reports every two seconds, and after each step of its engine.
_SILENT_SECONDS = 30.0
# A process that made no token, or no step, for this long is called stalled. A step of a large model
# on a CPU takes minutes.
_STALLED_SECONDS = 600.0
# If more writers than this exist, finished ones are counted instead of listed.
_MANY = 16
# Steps of a training by which the rest is estimated.
_LAST_STEPS = 20


def status_of(path: Path) -> dict[str, Any]:
    """Return the status of a folder, of a round, a training, a pipeline run or a study, with its
    `kind`. Raise ConfigError for another folder, DataError for a damaged file in it."""
    kind = kind_of(path)
    if kind == "training":
        return {"kind": kind, **training_status(path)}
    if kind in ("pipeline", "study"):
        return {"kind": kind, **pipeline_status(path)}
    return {"kind": "round", **round_status(path)}


def is_at_work(status: dict[str, Any]) -> bool:
    """Return whether a process works on what `status_of` or `round_status` describes."""
    return any(part["state"] in _AT_WORK for part in status.get("writers", [status]))


# -- a round --------------------------------------------------------------------------------------


def round_status(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return `stages`, the committed and requested rows of each stage of the round at `path`, and
    `writers`, the last report of each process that writes or wrote there. The state of a writer is
    "died" if it reported work and no longer holds its lock; "silent" if it holds it and has not
    reported for a while; "stalled" if it has made no tokens for long.

    Only manifests and status files are read. Raise ConfigError if there is no round, DataError for
    a damaged file.
    """
    require_kind(path, "round")
    round_dir = RoundDir(path)
    info = round_dir.run_info().get("stages", {})
    writers = []
    for file in round_dir.statuses():
        report = read_report(file)
        heard = round(time.time() - report["updated"], 1)
        if report["state"] in _AT_WORK and not is_held(path / ".writers" / file.stem):
            report["state"] = "died"
        quiet = report.get("quiet_seconds", 0.0) + heard
        if report["state"] == "running" and quiet > _STALLED_SECONDS:
            report["state"] = "stalled"
        elif report["state"] == "running" and heard > _SILENT_SECONDS:
            report["state"] = "silent"
        if report["state"] not in _AT_WORK:
            # What it said of its work when it ended, or was killed, is true no more.
            report |= {"in_flight": 0, "running": None, "seconds_left": None}
            report["recent_tokens_per_second"] = 0.0
        writers.append({"writer": file.stem, **report, "heard": heard})
    stages = []
    for stage in STAGES:
        shards = round_dir.manifest(stage)
        if not shards and stage not in info:
            continue
        stages.append(
            {
                "stage": stage,
                "rows": sum(shard.rows for shard in shards),
                # For rewrites this counts rollouts, and one rollout can have several rows.
                "asked": info.get(stage, {}).get("details", {}).get("rows"),
                "tokens": sum(shard.tokens for shard in shards),
                "shards": len(shards),
                "bytes": sum(shard.bytes for shard in shards),
            }
        )
    if not stages and not writers:
        raise ConfigError(
            f"{path}: no round here, no training and no run. Give the --out of mpd-gen rollouts,"
            " mpd-train, mpd-rounds or mpd-study."
        )
    return {"stages": stages, "writers": writers}


# -- a training -----------------------------------------------------------------------------------


def training_status(path: Path) -> dict[str, Any]:
    """Return how far the training in `path` is: `state`, `step` of `steps`, the newest metrics,
    `seconds_left`, and `heard`, the seconds since its last step or start. The state is "stopped"
    where no process holds the folder and no model is written: killed, interrupted or failed."""
    details = read_record(path, "training").get("details", {})
    lines = read_metrics(path)
    steps = [line for line in lines if "tokens" in line]
    last = steps[-1] if steps else {}
    lock = path / ".lock"
    begun = lock.stat().st_mtime if lock.exists() else 0.0
    told = metrics_file(path).stat().st_mtime if steps else 0.0
    heard = max(time.time() - max(begun, told), 0.0)
    pace = [line.get("seconds", 0.0) for line in steps[-_LAST_STEPS:]]
    per_step = sum(pace) / len(pace) if pace else None
    if is_held(lock):
        # Steps before this start are those of a training that is resumed.
        state = "running" if told >= begun else "starting"
        if heard > max(_STALLED_SECONDS, 10 * (per_step or 0.0)):
            state = "stalled"
    else:
        state = "finished" if (path / "model").is_dir() else "stopped"
    total, done = details.get("steps"), last.get("step", 0)
    known = None not in (total, per_step)
    validations = [line for line in lines if "validation_loss" in line]
    return {
        "state": state,
        "step": done,
        "steps": total,
        **{name: last.get(name) for name in _METRICS},
        "validation_loss": validations[-1]["validation_loss"] if validations else None,
        "seconds_left": round(per_step * (total - done), 1) if known else None,
        "heard": round(heard, 1),
    }


_METRICS = ("loss", "kl", "tokens_per_second", "peak_memory_gib")


# -- a pipeline run -------------------------------------------------------------------------------


class _PlannedStep(Record):
    label: str
    folder: str
    command: list[str]


class _Planned(Record):
    steps: list[_PlannedStep]


class _FinishedStep(Record):
    label: str
    command: list[str]
    seconds: float = 0.0


def pipeline_status(path: Path) -> dict[str, Any]:
    """Return the `state` of the pipeline run in `path`; its `steps`, each with `label`, `folder`,
    `state`, `seconds` that it took, and `at_work`: the progress report or training status of its
    process; and `seconds_left` of the whole run, by the same steps of earlier rounds, with the
    labels that have none in `not_estimated`."""
    planned_file, finished_file = path / "steps.json", path / "finished.jsonl"
    remedy = "Run mpd-rounds again: it writes the file anew."
    finished = read_json_lines(finished_file, "Remove the line.")
    for number, line in enumerate(finished, start=1):
        place = f"{finished_file}, line {number}: not a finished step"
        require(_FinishedStep, line, place, "Remove the line.")
    try:
        planned = read_json(planned_file, remedy)
    except FileNotFoundError as error:
        if runs := sorted(str(file.parent) for file in path.glob("seed*/finished.jsonl")):
            hint = f"Give the runs of its seeds: {' '.join(runs)}"
            raise ConfigError(f"{path}: a run with several seeds. {hint}") from error
        # Of an earlier version, which did not record what is still to come.
        steps = [{"label": line["label"], "folder": ".", "command": line["command"]}
                 for line in finished]  # fmt: skip
        planned = {"steps": steps}
    require(_Planned, planned, str(planned_file), remedy)
    took = {tuple(line["command"]): line.get("seconds", 0.0) for line in finished}
    is_alive = is_held(path / ".lock")
    steps = [
        _step_status(path, step, took.get(tuple(step["command"]))) for step in planned["steps"]
    ]
    state = "running" if is_alive else "stopped"
    if not is_alive and (_has_ended(path) or all(step["state"] == "finished" for step in steps)):
        state = "finished"
    left, unknown = _time_left(steps) if is_alive else (None, [])
    return {"state": state, "steps": steps, "seconds_left": left, "not_estimated": unknown}


def _has_ended(path: Path) -> bool:
    """Return whether the last start of a pipeline came to its summary: its gate may have left out
    the last rounds."""
    summary, steps = path / "summary.json", path / "steps.json"
    started = steps.stat().st_mtime_ns if steps.exists() else 0
    return summary.exists() and summary.stat().st_mtime_ns >= started


def _step_status(path: Path, step: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """Return the status of a step that took `seconds`, None where it has not finished."""
    folder, program = path / step["folder"], step["command"]
    state, at_work = "waiting" if seconds is None else "finished", []
    has_begun = (folder / "run.json").exists()
    if has_begun and program[0] == "mpd-train":
        found = training_status(folder)
        if seconds is None:
            state, at_work = found["state"], [found] if is_at_work(found) else []
    elif has_begun:
        # The second pass over rewrites is a part of its step.
        names = (program[1], "refilter") if program[1] == "rewrite" else (program[1],)
        own = [w for w in round_status(folder)["writers"] if w["writer"].startswith(names)]
        at_work = [writer for writer in own if writer["state"] in _AT_WORK]
        if at_work or (own and seconds is None):
            state = (at_work or own)[0]["state"]
    return {
        "label": step["label"], "folder": str(folder), "state": state, "seconds": seconds,
        "at_work": at_work,
    }  # fmt: skip


def _time_left(steps: Sequence[dict[str, Any]]) -> tuple[float | None, list[str]]:
    """Return the seconds that the steps not yet finished will take, those of them that can be told,
    and the labels of the others. A step takes as long as the last one of its kind took: what stands
    after the round in its label."""
    known = {_kind(step): step["seconds"] for step in steps if step["seconds"] is not None}
    left, unknown = 0.0, []
    for step in steps:
        if step["state"] == "finished":
            continue
        reported = [r["seconds_left"] for r in step["at_work"] if r["seconds_left"] is not None]
        seconds = max(reported) if reported else known.get(_kind(step))
        if seconds is None:
            unknown.append(step["label"])
        else:
            left += seconds
    return round(left, 1), unknown


def _kind(step: dict[str, Any]) -> str:
    return str(step["label"]).rpartition(": ")[2]


# -- as text --------------------------------------------------------------------------------------


def show_status(status: dict[str, Any], columns: int = sys.maxsize) -> str:
    """Return what `status_of` or `round_status` returns as text for a terminal that is `columns`
    wide."""
    kind = status.get("kind", "round")
    if kind == "training":
        return format_table([_training_cells(status)], columns)
    if kind in ("pipeline", "study"):
        return _show_steps(status, columns)
    parts = []
    if status["stages"]:
        rows = [
            {
                "stage": row["stage"],
                "saved": row["rows"],
                "of": row["asked"],
                "tokens": row["tokens"],
                "shards": row["shards"],
                "bytes": tqdm.format_sizeof(row["bytes"], "B"),
            }
            for row in status["stages"]
        ]
        parts.append(format_table(rows))
    writers = status["writers"]
    if len(writers) > _MANY:
        writers = [report for report in writers if report["state"] != "finished"]
        parts.append(f"{len(status['writers']) - len(writers)} writers have finished.")
    if writers:
        parts.append(format_table([_cells(report) for report in writers], columns))
    if not is_at_work(status) and any(report["state"] != "finished" for report in writers):
        parts.append(_RESUME)
    return "\n\n".join(parts)


def _show_steps(status: dict[str, Any], columns: int) -> str:
    steps = status["steps"]
    finished = sum(step["state"] == "finished" for step in steps)
    head = f"{status['state']}: {finished} of {len(steps)} steps finished"
    if status["seconds_left"] is not None:
        unknown = len(status["not_estimated"])
        if status["seconds_left"]:
            head += f", about {_until(status['seconds_left'])} left"
        if unknown:
            head += f"; {unknown} of the others are of kinds that were not timed yet"
    shown = [step for step in steps if len(steps) <= _MANY or step["state"] != "finished"]
    rows = [
        {
            "step": step["label"],
            "state": step["state"],
            "took": None if step["seconds"] is None else _duration(step["seconds"]),
        }
        for step in shown
    ]
    parts = [head, format_table(rows)] if rows else [head]
    if status["state"] == "stopped":
        parts.append(_RESUME)
    at_work = [(step["label"], report) for step in steps for report in step["at_work"]]
    for is_round in (True, False):
        cells = [
            {"at work": label, **(_cells(report) if is_round else _training_cells(report))}
            for label, report in at_work
            if ("writer" in report) is is_round
        ]
        if cells:
            parts.append(format_table(cells, columns))
    return "\n\n".join(parts)


def _training_cells(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "state": report["state"],
        "steps": f"{_bar(report['step'], report['steps'])}{_of(report['step'], report['steps'])}",
        "loss": report["loss"],
        "kl": report["kl"],
        "validation": report["validation_loss"],
        "tok/s": report["tokens_per_second"],
        "GiB": report["peak_memory_gib"],
        "left": _left(report),
        "last step": f"{_duration(report['heard'])} ago",
    }


def _cells(report: dict[str, Any]) -> dict[str, Any]:
    """Return a writer's line of the table."""
    rows, running = report["rows"], report.get("running")
    in_flight = f"{report['in_flight']:,}"
    state = report["state"]
    is_running, is_alive = state == "running", state in _AT_WORK
    quiet = report.get("quiet_seconds", 0.0) + report["heard"]
    failed = f", {report['failed']:,} failed" if report["failed"] else ""
    kept = report.get("kept")
    return {
        "writer": report["writer"],
        "state": state,
        "rows": f"{_bar(rows, report['total'])}{_of(rows, report['total'])}{failed}",
        "tokens": report["tokens"],
        "tok/s": round(report["recent_tokens_per_second"]) if is_running else None,
        "running": (in_flight if running is None else f"{running:,} of {in_flight}")
        if is_running
        else None,
        "cut off": report["truncated"],
        "kept": kept,
        "GiB": report.get("memory_gib"),
        "left": _left(report),
        # What a process that starts or has ended says of itself does not grow old.
        "last token": f"{_duration(quiet)} ago" if is_alive and state != "starting" else None,
        "process": f"{report['host']}:{report['pid']}",
    }


def _left(report: dict[str, Any]) -> str | None:
    is_known = report["state"] == "running" and report["seconds_left"] is not None
    return _until(report["seconds_left"]) if is_known else None


def _of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def _bar(done: int, total: int | None) -> str:
    if not total:
        return ""
    full = min(done * _BAR // total, _BAR)
    return f"{'█' * full}{'░' * (_BAR - full)} "


_BAR = 10
_RESUME = "No process works here. The same command as before goes on where it stopped."


def _until(seconds: float) -> str:
    """Return how long it will take, and the clock's time at its end."""
    end = time.localtime(time.time() + seconds)
    return (
        f"{_duration(seconds)} ({time.strftime('%H:%M' if seconds < 72_000 else '%a %H:%M', end)})"
    )


def _duration(seconds: float) -> str:
    return str(tqdm.format_interval(seconds))
