"""Print plans."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mpd_data.common.text import format_table, plain_lines
from mpd_data.dryrun.plan import Shown, StagePlan

_NAMED = 3


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


def print_plan(plan: StagePlan, as_json: bool) -> None:
    """Print a stage's plan, as JSON or as text."""
    if as_json:
        click.echo(json.dumps(plan.as_json(), indent=2))
    else:
        click.echo(show(plan))
