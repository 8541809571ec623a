"""`mpd-gen status`: show from another terminal how far the stages of a round are."""

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpd_data.common.errors import ConfigError
from mpd_data.common.text import format_table
from mpd_data.store.locks import is_held
from mpd_data.store.progress import read_report
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind
from mpd_data.store.schema import STAGES

_REMEDY = "Delete it: its process writes it anew while it works."
_REPORTED = (
    "state", "updated", "rows", "total", "failed", "recent_tokens_per_second", "in_flight",
    "seconds_left", "host", "pid",
)  # fmt: skip
_AT_WORK = ("starting", "running")
# If more writers than this exist, finished ones are counted instead of listed.
_MANY = 16


def round_status(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return `stages`, the committed and requested rows of each stage of the round at `path`, and
    `writers`, the last report of each process that writes or wrote there. The state of a writer is
    "died" if it reported work and no longer holds its lock.

    Only manifests and status files are read. Raise ConfigError if there is no round, DataError for
    a damaged file.
    """
    require_kind(path, "round")
    round_dir = RoundDir(path)
    info = round_dir.run_info().get("stages", {})
    writers = []
    for file in round_dir.statuses():
        report = read_report(file)
        if report["state"] in _AT_WORK and not is_held(path / ".writers" / file.stem):
            report["state"] = "died"
        report["heard"] = round(time.time() - report["updated"], 1)
        writers.append({"writer": file.stem, **report})
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
        raise ConfigError(f"{path}: no round here. Give the --out of mpd-gen rollouts.")
    return {"stages": stages, "writers": writers}


def show_status(status: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables of `round_status`."""
    parts = []
    if status["stages"]:
        rows = [row | {"bytes": tqdm.format_sizeof(row["bytes"], "B")} for row in status["stages"]]
        parts.append(format_table(rows))
    writers = status["writers"]
    if len(writers) > _MANY:
        writers = [report for report in writers if report["state"] != "finished"]
        parts.append(f"{len(status['writers']) - len(writers)} writers have finished.")
    if writers:
        parts.append(format_table([_cells(report) for report in writers]))
    return "\n\n".join(parts)


def _cells(report: dict[str, Any]) -> dict[str, Any]:
    """Return a writer's line of the table."""
    seconds = report["seconds_left"] if report["state"] == "running" else None
    return {
        "writer": report["writer"],
        "state": report["state"],
        "rows": f"{report['rows']:,}/{report['total']:,}",
        "failed": report["failed"],
        "tok/s": report["recent_tokens_per_second"],
        "in flight": report["in_flight"],
        "time left": None if seconds is None else tqdm.format_interval(seconds),
        "host": report["host"],
        "pid": str(report["pid"]),  # a name, not a quantity
        "last report": f"{tqdm.format_interval(report['heard'])} ago",
    }
