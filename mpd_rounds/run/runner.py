"""Run the steps of a pipeline as processes, and record which are finished."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from mpd_data.common import signals
from mpd_data.common.errors import MPDError
from mpd_data.common.files import read_json_lines, write_json_atomic
from mpd_data.common.records import Record, require
from mpd_data.parts.workers import EXIT_FAILED_ROWS
from mpd_rounds.run.steps import Step

_MODULES = {"mpd-gen": "mpd_data.cli", "mpd-train": "mpd_train.cli"}


def _inputs(step: Step) -> dict[str, str]:
    """Return size and modification time of each input file of a step, by path. A step whose models,
    prompts or shards have changed since is run again."""
    inputs: dict[str, str] = {}
    for path in (*map(Path, step.command), *step.reads):
        # Not Path.exists, which raises for a word that is too long for a name.
        if path == step.out or not os.path.exists(path):  # noqa: PTH110
            continue
        files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
        for file in sorted(files):
            # Cards are written when results are there, and decide nothing.
            if file.name not in (".lock", "README.md"):
                stat = file.stat()
                inputs[str(file)] = f"{stat.st_size} {stat.st_mtime_ns}"
    return inputs


class _Line(Record):
    """A line of finished.jsonl."""

    command: list[str]
    inputs: dict[str, str]
    exit_code: int


class Finished:
    """The finished steps, as recorded in OUT/finished.jsonl. Reads only. Raise DataError for a
    damaged line."""

    def __init__(self, out: Path) -> None:
        self.path = out / "finished.jsonl"
        # A kill can tear the last line. Its step runs again, and resumes.
        self.whole = self.path.read_bytes() if self.path.exists() else b""
        self.whole = self.whole[: self.whole.rfind(b"\n") + 1]
        remedy = "Remove the line: its step runs again, and finds what exists."
        self.records = read_json_lines(self.path, remedy)
        for number, record in enumerate(self.records, start=1):
            require(_Line, record, f"{self.path}, line {number}: not a finished step", remedy)

    def holds(self, step: Step) -> bool:
        """Return whether `step` has finished with the inputs that exist now."""
        now = (step.words, _inputs(step))
        return step.out.exists() and any((r["command"], r["inputs"]) == now for r in self.records)


class Runner:
    """Runs steps as processes. Records all that there are in OUT/steps.json, for `mpd-gen status`,
    and the finished ones in OUT/finished.jsonl."""

    def __init__(self, out: Path, environment: dict[str, str], steps: list[Step]) -> None:
        planned = [
            {"label": s.label, "folder": os.path.relpath(s.folder, out), "command": s.words}
            for s in steps
        ]
        write_json_atomic(out / "steps.json", {"steps": planned})
        self._finished = Finished(out)
        self._path = self._finished.path
        if self._path.exists():
            self._path.write_bytes(self._finished.whole)
        # wandb shows the trainings of a pipeline together.
        group = {"WANDB_RUN_GROUP": os.path.relpath(out)}
        self._environment = {**group, **os.environ, **environment}
        # A pipeline may be a task of a SLURM job array; its stages are not parts of that array.
        self._environment.pop("SLURM_ARRAY_TASK_COUNT", None)
        self._total = len(steps)
        self._number = 0
        self._running: set[subprocess.Popen[str]] = set()
        self._is_ending = False
        self.failed_rows = any(r["exit_code"] == EXIT_FAILED_ROWS for r in self._finished.records)

    def run(self, steps: list[Step], parallel: int = 1) -> None:
        """Run `steps`, up to `parallel` at a time. Raise MPDError if one fails."""
        for _, error in self.attempt(steps, parallel):
            raise error

    def attempt(self, steps: list[Step], parallel: int = 1) -> list[tuple[Step, MPDError]]:
        """Run `steps`, up to `parallel` at a time. Return those that failed."""
        signals.check()
        remaining = []
        for step in steps:
            self._number += 1
            head = f"[{self._number}/{self._total}] {step.label}"
            if self._finished.holds(step):
                click.echo(f"{head}: done before", err=True)
                continue
            click.echo(f"{head}: {step.why}", err=True)
            click.echo(f"    {shlex.join(step.words)}", err=True)
            remaining.append(step)
        together = min(parallel, len(remaining))
        failed: list[tuple[Step, MPDError]] = []
        with ThreadPoolExecutor(max(together, 1)) as pool:
            try:
                begun = [
                    (step, pool.submit(self._run_one, step, together > 1)) for step in remaining
                ]
                for step, done in begun:
                    try:
                        done.result()
                    except MPDError as error:
                        failed.append((step, error))
            except KeyboardInterrupt as interrupt:
                # Running steps commit their rows, and the pool waits for them. No other begins.
                pool.shutdown(wait=False, cancel_futures=True)
                if interrupt.args == (signal.SIGTERM,):
                    # A scheduler signals this process only; a terminal signals the steps too.
                    self._is_ending = True
                    for process in list(self._running):
                        process.terminate()
                raise
        return failed

    def _run_one(self, step: Step, prefixed: bool) -> None:
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULES[step.program], *step.command],
            env=self._environment,
            # Steps that run at the same time report in lines: their progress bars would mix.
            stderr=subprocess.PIPE if prefixed else None,
            encoding="utf-8",
            errors="replace",
        )
        self._running.add(process)
        if self._is_ending:
            # It was started after the others were terminated.
            process.terminate()
        for line in process.stderr or ():
            click.echo(f"    {step.label} | {line.rstrip()}", err=True)
        code = process.wait()
        self._running.discard(process)
        if code not in (0, EXIT_FAILED_ROWS):
            raise MPDError(
                f"{step.label} ended with exit code {code}; see its message above. Finished work"
                " is kept: fix the cause and run the same command again. To begin this step anew,"
                " run its own command, above, with --overwrite."
            )
        self.failed_rows |= code == EXIT_FAILED_ROWS
        record = {
            "label": step.label,
            "command": step.words,
            "inputs": _inputs(step),
            "seconds": round(time.monotonic() - begun, 1),
            "exit_code": code,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
