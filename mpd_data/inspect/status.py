"""`mpd-gen status`: how far the stages of a round are, seen from another terminal."""

import json
import time
from pathlib import Path
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.common.text import format_table
from mpd_data.store.locks import is_held
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind
from mpd_data.store.schema import STAGES

_AT_WORK = ("starting", "running")
# More writers than fit a screen: those that have finished are counted, not listed.
_MANY = 16


def round_status(path: Path) -> dict[str, list[dict[str, Any]]]:
    """`stages`: rows committed and to come of each stage that has run in the round at `path`.
    `writers`: what each process that writes there, or did, last said of itself; its state is
    "died" where it said it was at work and holds its lock no more.

    Reads manifests and status files alone. Raises ConfigError where there is no round.
    """
    require_kind(path, "round")
    round_dir = RoundDir(path)
    info = round_dir.run_info().get("stages", {})
    writers = []
    for file in round_dir.statuses():
        said = json.loads(file.read_text(encoding="utf-8"))
        if said["state"] in _AT_WORK and not is_held(path / ".writers" / file.stem):
            said["state"] = "died"
        said["heard"] = round(time.time() - said["updated"], 1)
        writers.append({"writer": file.stem, **said})
    stages = []
    for stage in STAGES:
        shards = round_dir.manifest(stage)
        if not shards and stage not in info:
            continue
        stages.append(
            {
                "stage": stage,
                "rows": sum(shard.rows for shard in shards),
                # One rollout can have several rewrites: these count rows, that rollouts.
                "asked": info.get(stage, {}).get("details", {}).get("rows"),
                "tokens": sum(shard.tokens for shard in shards),
                "shards": len(shards),
                "bytes": sum(shard.bytes for shard in shards),
            }
        )
    if not stages and not writers:
        raise ConfigError(f"{path}: no round here: no run.json, no shards. Give a round's folder.")
    return {"stages": stages, "writers": writers}


def show_status(status: dict[str, list[dict[str, Any]]]) -> str:
    """The tables of `round_status`."""
    parts = []
    if status["stages"]:
        parts.append(format_table(status["stages"]))
    writers = status["writers"]
    if len(writers) > _MANY:
        writers = [said for said in writers if said["state"] != "finished"]
        parts.append(f"{len(status['writers']) - len(writers)} writers have finished.")
    if writers:
        parts.append(
            format_table(
                [
                    {
                        "writer": said["writer"],
                        "state": said["state"],
                        "rows": f"{said['rows']:,}/{said['total']:,}",
                        "failed": said["failed"],
                        "tok/s": said["recent_tokens_per_second"],
                        "in flight": said["in_flight"],
                        "s left": said["seconds_left"] if said["state"] == "running" else None,
                        "host": said["host"],
                        "pid": said["pid"],
                        "heard s ago": said["heard"],
                    }
                    for said in writers
                ]
            )
        )
    return "\n\n".join(parts)
