"""What a stage would do: rows, tokens, disk and time, as data and as a table.

A prediction is learned from rows that are there: this round's, else those of a folder beside it
that a model of the same tokenizer made under the same name or with the same settings. Where there
are none the figures are bounds and say "at most"; speeds are recorded ones (run.json), never
guessed. Nothing here writes, and no engine is imported.
"""

import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from mpd_data.errors import DataError
from mpd_data.models import ModelFiles
from mpd_data.shards import RoundDir
from mpd_data.table import format_table, plain_lines

# Bounds for rounds of which nothing is known; docs/contract.md has what real rounds take.
_BYTES_PER_ROW = 200
_TEXT_BYTES_PER_TOKEN = 2.0
_LOGPROB_BYTES = 2.0
_NAMED = 3


@dataclass(frozen=True)
class Lengths:
    """Mean and maximum in tokens."""

    mean: float
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> "Lengths | None":
        return cls(round(sum(values) / len(values), 1), max(values)) if values else None


@dataclass(frozen=True)
class Shown:
    """A rendered prompt."""

    name: str
    text: str
    num_tokens: int


@dataclass(frozen=True)
class StagePlan:
    """What one command would do. None: not known.

    `rows`, `committed`, `owed` are samples of rollouts, rollouts to rewrite, or kept rows to train
    on; tokens are completions, rewrites, or trained tokens, of the owed rows. `disk_bytes` is what
    the owed rows will take, expected where `tokens_expected` is known and at most else.
    `failing` counts what could not be used; `reasons` name the first few.
    """

    command: str
    out: str
    settings: list[str]
    rows: int | None
    committed: int
    owed: int | None
    shown: list[Shown] = field(default_factory=list)
    prompt_tokens: Lengths | None = None
    tokens_expected: int | None = None
    tokens_at_most: int | None = None
    failing: int = 0
    reasons: list[str] = field(default_factory=list)
    disk_bytes: int | None = None
    seconds: float | None = None
    device: str | None = None
    learned_from: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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


def as_saved(model: ModelFiles, saved: Mapping[str, str] | None) -> ModelFiles:
    """`model` under the version that an earlier run saved, where a dry run has not hashed its
    weights: their change is for the real run to find."""
    if model.version != "unhashed" or saved is None:
        return model
    return replace(model, version=saved["version"])


def id_bytes(vocab_size: int) -> float:
    """Bytes of a token id, all ids being as likely: compression never does worse."""
    return math.log2(vocab_size) / 8


def rollout_bytes(rows: int, prompt_tokens: int, tokens: int, vocab_size: int) -> int:
    """At most, for rollouts of so many prompt tokens (of all rows) and completion tokens."""
    ids = (prompt_tokens + tokens) * id_bytes(vocab_size)
    return int(ids + tokens * _TEXT_BYTES_PER_TOKEN + rows * _BYTES_PER_ROW)


def distill_bytes(rows: int, context_tokens: int, tokens: int, k: int, vocab_size: int) -> int:
    """At most, for rows of so many context tokens (student's prompts, and rewrite prompts where
    they are stored) and rewritten tokens that are all kept with K log-probabilities each."""
    ids = (context_tokens + tokens) * id_bytes(vocab_size)
    entries = tokens * (k * (id_bytes(vocab_size) + _LOGPROB_BYTES) + _LOGPROB_BYTES)
    return int(ids + entries + tokens * _TEXT_BYTES_PER_TOKEN + rows * _BYTES_PER_ROW)


def first_reasons(reasons: list[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = len(reasons) - _NAMED
    return reasons[:_NAMED] + ([f"and {more:,} more"] if more > 0 else [])


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def unwritable(path: Path) -> str | None:
    """Why `path` could not be written, None where it can (as far as permissions say)."""
    at = path
    while not at.exists():
        at = at.parent
    if at.is_dir() and os.access(at, os.W_OK):
        return None
    return f"{at}: cannot write here; the real run would stop."


def size_text(size: int | None) -> str | None:
    """Bytes for people."""
    if size is None:
        return None
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def time_text(seconds: float | None) -> str | None:
    """A duration for people."""
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _tokens_text(plan: StagePlan) -> str | None:
    if plan.tokens_expected is not None:
        return f"{plan.tokens_expected:,}"
    return None if plan.tokens_at_most is None else f"at most {plan.tokens_at_most:,}"


def _disk_text(plan: StagePlan) -> str | None:
    text = size_text(plan.disk_bytes)
    bound = plan.tokens_expected is None and plan.tokens_at_most is not None
    return f"at most {text}" if text and bound else text


def _time_cell(plan: StagePlan) -> str:
    text = time_text(plan.seconds)
    bound = "at most " if plan.seconds and plan.tokens_expected is None else ""
    return f"{bound}{text} ({plan.device})" if text else "not known"


def show(plan: StagePlan) -> str:
    """The whole of a stage's plan: settings, rendered prompts, table, notes."""
    command = " ".join([plan.command, *map(shlex.quote, plan.settings)])
    parts = [plain_lines(command), *shown_text(plan.shown)]
    rows: dict[str, Any] = {
        "rows in all": plan.rows,
        "rows committed": plan.committed,
        "rows owed": plan.owed,
    }
    if plan.prompt_tokens is not None:
        rows["prompt tokens, mean"] = plan.prompt_tokens.mean
        rows["prompt tokens, max"] = plan.prompt_tokens.max
    rows |= {
        "tokens owed, expected": plan.tokens_expected,
        "tokens owed, at most": plan.tokens_at_most,
        "cannot be used": plan.failing,
        "disk": _disk_text(plan),
        "disk free": size_text(free_bytes(Path(plan.out))),
        "time": _time_cell(plan),
        "learned from": plan.learned_from,
        **plan.details,
    }
    text = {
        name: value if isinstance(value, str) else _number(value) for name, value in rows.items()
    }
    parts.append(format_table([{"plan": name, plan.out: value} for name, value in text.items()]))
    if notes := all_notes(plan):
        parts.append("\n".join(f"* {plain_lines(note)}" for note in notes))
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"


def shown_text(shown: list[Shown]) -> list[str]:
    """Rendered prompts for a terminal."""
    return [
        f"{item.name} ({item.num_tokens:,} tokens):\n"
        + "\n".join(f"  | {line}" for line in plain_lines(item.text).split("\n"))
        for item in shown
    ]


def all_notes(plan: StagePlan) -> list[str]:
    """The plan's notes, and those that its figures call for."""
    notes = [*plan.reasons, *plan.notes]
    unknown = plan.tokens_expected is None and plan.tokens_at_most is not None
    if plan.owed and plan.command == "mpd-train" and plan.seconds is None:
        notes.append(
            "No training with these settings here or beside it: metrics.jsonl has its speed from"
            " the first steps on. Plan again then."
        )
    elif plan.owed and unknown:
        notes.append(
            "No rows to learn from: the figures are bounds. Run a few first (--limit 64), then"
            " plan again."
        )
    elif plan.owed and plan.tokens_expected is not None and plan.seconds is None:
        notes.append("No speed is recorded there: run a few rows (--limit 64), then plan again.")
    if plan.disk_bytes is not None and plan.disk_bytes > free_bytes(Path(plan.out)):
        notes.append(f"{plan.out}: less disk is free than this may take.")
    if (reason := unwritable(Path(plan.out))) is not None:
        notes.append(reason)
    return notes


def steps_table(steps: list[tuple[str, StagePlan | None]]) -> str:
    """One line a step (None: done before), and the totals of what is owed."""
    lines = []
    for label, plan in steps:
        if plan is None:
            cells: list[Any] = ["done", None, None, None]
        else:
            cells = [
                None if plan.owed is None else f"{plan.owed:,}",
                _tokens_text(plan),
                _disk_text(plan),
                _time_cell(plan),
            ]
        lines.append([label, *cells])
    owed = [plan for _, plan in steps if plan is not None]
    lines.append(["total", None, *totals(owed)])
    names = ["step", "rows", "tokens", "disk", "time"]
    return format_table([dict(zip(names, line, strict=True)) for line in lines])


def totals(plans: list[StagePlan]) -> list[str]:
    """Tokens, disk and time of all plans: "at most" where a part is a bound, "and more" where a
    part is not known."""

    def total(value: Callable[[StagePlan], float | None], text: Callable[[Any], str | None]) -> str:
        known = [found for plan in plans if (found := value(plan)) is not None]
        if not known:
            return "not known" if plans else "-"
        bound = any(p.tokens_expected is None and value(p) for p in plans)
        more = " and more" if len(known) < len(plans) else ""
        return f"{'at most ' if bound and not more else ''}{text(sum(known))}{more}"

    return [
        total(_tokens, lambda n: f"{n:,}"),
        total(lambda p: p.disk_bytes, size_text),
        total(_seconds, time_text),
    ]


def _tokens(plan: StagePlan) -> int | None:
    return plan.tokens_at_most if plan.tokens_expected is None else plan.tokens_expected


def _seconds(plan: StagePlan) -> float | None:
    return plan.seconds if plan.owed != 0 else 0.0
