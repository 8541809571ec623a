"""Learn lengths, sizes and speeds from rows that were committed before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from mpd_data.store.round import RoundDir
from mpd_data.store.schema import not_asked


@dataclass(frozen=True)
class Learned:
    """What committed rows say about rows to come. A stage takes `start_seconds` on `device`, then
    `seconds_per_token`, None if that was not measured. `tokens_per_row` and `bytes_per_token` are
    means over the rows that were generated."""

    source: str
    seconds_per_token: float | None
    device: str | None
    start_seconds: float = 0.0
    tokens_per_row: float = 0.0
    bytes_per_token: float = 0.0
    # Rollouts: the share that reached its length limit.
    truncated: float = 0.0
    # Rewrites: the share that was kept, and the mean tokens of those.
    kept: float = 0.0
    kept_tokens: float = 0.0


def learn(
    round_dir: RoundDir,
    stage: Literal["rollouts", "distill"],
    backend: str,
    paths: list[Path] | None = None,
) -> Learned | None:
    """Learn from the sound shards of `stage` (`paths`, if known), None where nothing was generated.
    The recorded speed counts only for the engine `backend` that it was measured with."""
    entry = round_dir.saved_stage(stage)
    if entry is None:
        return None
    paths = round_dir.scan_shards(stage).paths if paths is None else paths
    truncated = 0
    if stage == "rollouts":
        table = round_dir.table(stage, ["num_completion_tokens", "finish_reason"], paths)
        tokens = table["num_completion_tokens"]
        truncated = pc.sum(pc.equal(table["finish_reason"], "length")).as_py()
        kept = tokens[:0]
    else:
        table = round_dir.table(stage, ["num_rewritten_tokens", "status"], paths)
        not_generated = pa.array(["draft_truncated", "too_long"])
        unasked = pc.or_(not_asked(table), pc.is_in(table["status"], not_generated))
        table = table.filter(pc.invert(unasked))
        tokens = table["num_rewritten_tokens"]
        kept = tokens.filter(pc.equal(table["status"], "ok"))
    total = pc.sum(tokens).as_py()
    if not total:
        return None
    speed, pace, device = entry.get("speed"), None, None
    if speed is not None and speed.get("backend") == backend:
        pace, device = speed["seconds"] / speed["tokens"], f"{speed['device']}, {backend}"
    return Learned(
        source=f"{round_dir.path} ({len(table):,} rows)",
        seconds_per_token=pace,
        device=device,
        start_seconds=speed["start_seconds"] if speed else 0.0,
        tokens_per_row=total / len(table),
        bytes_per_token=sum(path.stat().st_size for path in paths) / total,
        truncated=truncated / len(table),
        kept=len(kept) / len(table),
        kept_tokens=pc.mean(kept).as_py() or 0.0,
    )
