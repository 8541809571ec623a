"""Print plans as tables or JSON."""

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from mpd_data.common.text import format_table, json_text, plain_lines
from mpd_data.dryrun.plan import Shown, StagePlan

_FEW = 64  # rows from which lengths and speed can be told


def _existing(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that `path` is or will be on."""
    return shutil.disk_usage(_existing(path)).free


def size_text(size: int) -> str:
    """Return `size` bytes for people, as 1.23MB."""
    return str(tqdm.format_sizeof(size, "B")) if size else "0"


def time_text(seconds: float) -> str:
    """Return a duration for people, as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def _text(plan: StagePlan, value: float | None, form: Callable[[Any], str]) -> str | None:
    """Return a figure of a plan, marked where it is an upper bound."""
    if value is None:
        return None
    return f"at most {form(value)}" if value and plan.is_bound else form(value)


def _time_text(plan: StagePlan) -> str:
    text = _text(plan, plan.seconds, time_text)
    device = f" ({plan.device})" if plan.seconds and plan.device else ""
    return "not known" if text is None else f"{text}{device}"


def show(plan: StagePlan) -> str:
    """Return a stage's plan as text: settings, rendered prompts, table, notes."""
    command = " ".join([plan.command, *map(shlex.quote, plan.settings)])
    parts = [plain_lines(command), *shown_text(plan.shown)]
    rows: dict[str, Any] = {
        "rows": plan.rows,
        "rows committed": plan.committed,
        "rows remaining": plan.remaining,
    }
    if plan.prompt_tokens is not None:
        rows["prompt tokens, mean"] = plan.prompt_tokens.mean
        rows["prompt tokens, max"] = plan.prompt_tokens.max
    rows |= {
        "tokens remaining, expected": plan.tokens_expected,
        "tokens remaining, at most": plan.tokens_at_most,
        "cannot be used": plan.failing,
        "disk": _text(plan, plan.disk_bytes, size_text),
        "disk free": size_text(free_bytes(Path(plan.out))),
        "time": _time_text(plan),
        "learned from": plan.learned_from,
        **plan.details,
    }
    text = {
        name: value if isinstance(value, str) else "-" if value is None else f"{value:,}"
        for name, value in rows.items()
    }
    parts.append(format_table([{"plan": name, plan.out: value} for name, value in text.items()]))
    if notes := all_notes(plan):
        parts.append("\n".join(f"* {plain_lines(note)}" for note in notes))
    return "\n\n".join(parts)


def shown_text(shown: list[Shown]) -> list[str]:
    """Return rendered prompts for a terminal."""
    return [
        f"{item.name} ({item.num_tokens:,} tokens):\n"
        + "\n".join(f"  | {line}" for line in plain_lines(item.text).split("\n"))
        for item in shown
    ]


def all_notes(plan: StagePlan) -> list[str]:
    """Return the plan's notes, and those that its figures call for."""
    notes = [*plan.reasons, *([plan.refusal] if plan.refusal else []), *plan.notes]
    if plan.remaining and plan.seconds is None and not plan.refusal:
        if plan.command == "mpd-train":
            notes.append("The time is not known: plan again after the first steps.")
        elif plan.is_bound:
            few = _few(plan, ": make a few ({}), then plan again")
            notes.append(f"The figures are upper bounds, since no rows exist yet{few}.")
        elif plan.tokens_expected is not None:
            few = _few(plan, ": make a few rows ({}), then plan again")
            notes.append(f"No speed of this backend is recorded{few}.")
    if plan.disk_bytes is not None and plan.disk_bytes > free_bytes(Path(plan.out)):
        notes.append(f"{plan.out}: less disk is free than this may take.")
    folder = _existing(Path(plan.out))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        notes.append(f"{folder}: cannot be written; the run would stop.")
    return notes


def few_rows(plan: StagePlan) -> str:
    """Return the option that makes a few rows; "" where a step has no more than these."""
    return f"--limit {_FEW}" if plan.remaining > _FEW else ""


def _few(plan: StagePlan, text: str) -> str:
    """Return `text` with that option, "" where there is none."""
    option = few_rows(plan)
    return text.format(option) if option else ""


def steps_table(steps: list[tuple[str, StagePlan | None]]) -> str:
    """Return one line for each step (None: finished before), and the totals."""
    lines: list[list[str | None]] = []
    for label, plan in steps:
        if plan is None:
            lines.append([label, "done", None, None, None])
            continue
        tokens = _text(plan, plan.tokens, "{:,}".format)
        disk = _text(plan, plan.disk_bytes, size_text)
        lines.append([label, f"{plan.remaining:,}", tokens, disk, _time_text(plan)])
    total = totals([plan for _, plan in steps if plan is not None])
    lines.append(["total", None, *total.values()])
    names = ["step", "rows", *total]
    return format_table([dict(zip(names, line, strict=True)) for line in lines])


def totals(plans: list[StagePlan]) -> dict[str, str]:
    """Return tokens, disk and time of all plans: "at most" where a part is a bound, "and more"
    where a part is not known."""

    def total(value: Callable[[StagePlan], float | None], form: Callable[[Any], str]) -> str:
        known = [x for plan in plans if (x := value(plan)) is not None]
        if not known:
            return "not known" if plans else "-"
        if len(known) < len(plans):
            return f"{form(sum(known))} and more"
        bound = any(plan.is_bound and value(plan) for plan in plans)
        return f"{'at most ' if bound else ''}{form(sum(known))}"

    return {
        "tokens": total(lambda plan: plan.tokens, "{:,}".format),
        "disk": total(lambda plan: plan.disk_bytes, size_text),
        "time": total(lambda plan: plan.seconds, time_text),
    }


def print_plan(plan: StagePlan, as_json: bool) -> None:
    """Print a stage's plan, as JSON or as text. Raise Exit with code 1 where the run would end
    without a result, so that a script does not go on."""
    click.echo(json_text(asdict(plan)) if as_json else show(plan))
    if plan.refusal is not None:
        raise click.exceptions.Exit(1)
