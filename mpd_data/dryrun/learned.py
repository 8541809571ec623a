"""Learn lengths, sizes and speeds from rows that exist."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from mpd_data.common.errors import DataError
from mpd_data.store.round import RoundDir


@dataclass(frozen=True)
class Learned:
    """What the committed rows of a folder say about those to come. `tokens_per_row` and
    `bytes_per_token` are means over all rows that were generated; `speed` is run.json's."""

    folder: Path
    rows: int
    tokens_per_row: float
    bytes_per_token: float
    identity: Mapping[str, Any]
    speed: Mapping[str, Any] | None
    # rollouts: share that hit its length limit; distill: share kept for training, mean tokens of
    # what was kept
    truncated: float = 0.0
    kept: float = 0.0
    kept_tokens: float = 0.0

    def has(self, identity: Mapping[str, Any], names: tuple[str, ...]) -> bool:
        """Whether the rows were made with these settings of `identity`."""
        return all(self.identity.get(name) == identity[name] for name in names)

    def seconds(self, tokens: float) -> float | None:
        """Time for so many tokens at the recorded speed, the engine's start included."""
        if self.speed is None or not tokens:
            return None
        per_token = self.speed["seconds"] / self.speed["tokens"]
        return round(float(tokens * per_token + self.speed["start_seconds"]), 1)

    @property
    def source(self) -> str:
        return f"{self.folder} ({self.rows:,} rows)"

    @property
    def device(self) -> str | None:
        return None if self.speed is None else f"{self.speed['device']}, {self.speed['backend']}"


def siblings(out: Path, marker: str) -> Iterator[Path]:
    """`out`, then the folders beside it that hold the file `marker`, newest first."""
    yield out
    near = [path for path in out.parent.glob(f"*/{marker}") if path.parent != out]
    for path in sorted(near, key=lambda path: path.stat().st_mtime, reverse=True):
        yield path.parent


def learn(
    out: Path,
    stage: Literal["rollouts", "distill"],
    tokenizer: str,
    name: str,
    alike: Mapping[str, Any],
) -> Learned | None:
    """From the rows of `stage` in `out`, else in the first folder beside it of the same tokenizer
    (content hash) whose stage was made by a model called `name`, else by one with the settings
    `alike` (a part of its identity); one with shorter `max_tokens` says nothing of longer rows.
    None where there is none."""
    by_settings: Learned | None = None
    for folder in siblings(out, "run.json"):
        try:
            stages = RoundDir(folder).run_info().get("stages", {})
            if stage not in stages or stages["rollouts"]["identity"]["tokenizer"] != tokenizer:
                continue
            entry = stages[stage]
            config = entry["details"].get("config", {})
            same_name = name == config.get("model" if stage == "rollouts" else "teacher")
            same_settings = alike == {key: entry["identity"].get(key) for key in alike}
            longest = entry["identity"]["sampling"]["max_tokens"]
            if folder != out and (
                longest < alike["sampling"]["max_tokens"]
                or (not same_name and (by_settings or not same_settings))
            ):
                continue
            found = _read(RoundDir(folder), stage, entry)
        except (DataError, ValueError, KeyError, OSError):
            # A folder that cannot be read teaches nothing; its own commands say what it lacks.
            continue
        if found is not None and (folder == out or same_name):
            return found
        by_settings = by_settings or found
    return by_settings


def _read(
    round_dir: RoundDir, stage: Literal["rollouts", "distill"], entry: Mapping[str, Any]
) -> Learned | None:
    size = sum(path.stat().st_size for path in round_dir.shard_paths(stage))
    if stage == "rollouts":
        table = round_dir.table(stage, ["num_completion_tokens", "finish_reason"])
        tokens = table["num_completion_tokens"]
        cut = pc.sum(pc.equal(table["finish_reason"], "length")).as_py()
        kept = tokens[:0]
    else:
        table = round_dir.table(stage, ["num_rewritten_tokens", "status"])
        unasked = pa.array(["draft_truncated", "too_long"])
        table = table.filter(pc.invert(pc.is_in(table["status"], unasked)))
        tokens = table["num_rewritten_tokens"]
        cut = 0
        kept = tokens.filter(pc.equal(table["status"], "ok"))
    total = pc.sum(tokens).as_py()
    if not total:
        return None
    speed = entry.get("speed")
    return Learned(
        folder=round_dir.path,
        rows=len(table),
        tokens_per_row=total / len(table),
        bytes_per_token=size / total,
        identity=entry["identity"],
        speed=speed if speed is not None and "backend" in speed else None,
        truncated=cut / len(table),
        kept=len(kept) / len(table),
        kept_tokens=pc.mean(kept).as_py() or 0.0,
    )
