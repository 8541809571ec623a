"""Run the steps of a pipeline as processes, and record which are finished."""

import contextlib
import glob
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import click

from mpd_data.common import signals
from mpd_data.common.errors import MPDError
from mpd_data.common.files import read_json_lines, write_json_atomic
from mpd_data.common.models import base_of
from mpd_data.common.records import Record, require
from mpd_data.config import RolloutsConfig
from mpd_data.parts.session import Session, close_engines, dismiss, end, ending_of
from mpd_data.parts.workers import EXIT_FAILED_ROWS
from mpd_rounds.run.steps import Step
from mpd_train.config import TrainConfig

_MODULES = {"mpd-gen": "mpd_data.cli", "mpd-train": "mpd_train.cli"}


def _engine_of(step: Step) -> tuple[int, str] | None:
    """Return the number of workers of `step`, and what their engines are known by: model and
    settings. None for a step that has a process of its own."""
    config = step.config
    if isinstance(config, TrainConfig) or config.parts.ray:
        return None
    model = config.model if isinstance(config, RolloutsConfig) else config.teacher
    return config.parts.workers, json.dumps([model, config.engine.model_dump(mode="json")])


def at_once(steps: list[Step], parallel: int) -> int:
    """Return how many of `steps` run at the same time where `parallel` processes may compute: a
    step takes as many of them as it has workers."""
    widest = max((engine[0] for engine in map(_engine_of, steps) if engine), default=1)
    return min(max(parallel // widest, 1), len(steps))


def _inputs(step: Step) -> dict[str, str]:
    """Return size and modification time of each input file of a step, by path. A step whose models,
    prompts or shards have changed since is run again."""
    inputs: dict[str, str] = {}
    patterns = step.config.prompts if isinstance(step.config, RolloutsConfig) else []
    matches = [match for pattern in patterns for match in glob.iglob(pattern, recursive=True)]  # noqa: PTH207
    # Not Path.exists, which raises for a word that is too long for a name.
    words = [word for word in step.command if os.path.exists(word)]  # noqa: PTH110
    bases = [base for word in words if (base := base_of(Path(word))) is not None]
    for path in (*map(Path, [*words, *bases, *matches]), *step.reads):
        # A base may be a hub id.
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
        """Return whether `step` was the last to make its folder, with the inputs that exist now.
        Other settings may have made it anew since an earlier one."""
        kind, folder = step.words[:2], str(step.folder)
        made = [r for r in self.records if r["command"][:2] == kind and folder in r["command"]]
        now = (step.words, _inputs(step))
        return step.out.exists() and bool(made) and (made[-1]["command"], made[-1]["inputs"]) == now


class Runner:
    """Runs steps as processes; those that generate, in processes that stay (session.py). Records
    all that there are in OUT/steps.json, for `mpd-gen status`, and the finished ones in
    OUT/finished.jsonl. `parallel`: processes that may compute at the same time."""

    def __init__(
        self, out: Path, environment: dict[str, str], steps: list[Step], parallel: int = 1
    ) -> None:
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
        self._total, self._parallel = len(steps), parallel
        self._number = 0
        self._running: set[subprocess.Popen[str]] = set()
        # Those that run no step, with the engine that each has.
        self._idle: list[tuple[Session, tuple[int, str] | None]] = []
        self._choosing = Lock()
        self._is_ending = False
        self.failed_rows = any(r["exit_code"] == EXIT_FAILED_ROWS for r in self._finished.records)

    def run(self, steps: list[Step]) -> None:
        """Run `steps`, which do not need each other. Raise MPDError if one fails."""
        for _, error in self.attempt(steps):
            raise error

    def attempt(self, steps: list[Step]) -> list[tuple[Step, MPDError]]:
        """Run `steps`, which do not need each other. Return those that failed."""
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
        together = at_once(remaining, self._parallel)
        # Those of one engine one after another.
        needed = list(dict.fromkeys(map(_engine_of, remaining)))
        remaining.sort(key=lambda step: needed.index(_engine_of(step)))
        # Others need the memory of engines that stay unused.
        if remaining and (len(self._idle) > together or None in needed):
            self._close_engines(needed)
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

    def rest(self) -> None:
        """Let the processes that stay between steps end while others work: no step follows."""
        dismiss([session for session, _ in self._idle])

    def close(self) -> None:
        """End the processes that stay between steps."""
        end([session for session, _ in self._idle])
        self._idle.clear()

    def _close_engines(self, needed: list[tuple[int, str] | None]) -> None:
        unneeded = [one for one in self._idle if one[1] is not None and one[1] not in needed]
        close_engines([session for session, _ in unneeded])
        self._idle = [(one[0], None) if one in unneeded else one for one in self._idle]

    def _run_one(self, step: Step, is_one_of_several: bool) -> None:
        begun = time.monotonic()
        if _engine_of(step) is None:
            code = self._run_process(step, is_one_of_several)
        else:
            code = self._run_in_session(step)
        if code not in (0, EXIT_FAILED_ROWS):
            raise MPDError(
                f"{step.label} {ending_of(code)}. Finished work is kept: fix the cause and run the"
                " same command again. To begin this step anew, run its own command, above, with"
                " --overwrite."
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

    def _run_process(self, step: Step, is_one_of_several: bool) -> int:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULES[step.program], *step.command],
            env=self._environment,
            # Steps that run at the same time report in lines: their progress bars would mix.
            stderr=subprocess.PIPE if is_one_of_several else None,
            encoding="utf-8",
            errors="replace",
        )
        with self._running_as(process):
            for line in process.stderr or ():
                click.echo(f"    {step.label} | {line.rstrip()}", err=True)
            return process.wait()

    def _run_in_session(self, step: Step) -> int:
        needed = _engine_of(step)
        with self._choosing:
            idle = sorted(self._idle, key=lambda one: one[1] != needed)
            session, engine = idle[0] if idle else (None, None)
            if session is not None:
                self._idle.remove((session, engine))
        session = session or Session(self._environment, piped=self._parallel > 1)
        with self._running_as(session.process):
            if engine is not None and needed is not None and engine[0] != needed[0]:
                close_engines([session])
            code = session.run(step.command, f"    {step.label} | ")
        if session.process.poll() is None:
            self._idle.append((session, needed))
        return code

    @contextlib.contextmanager
    def _running_as(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Let an interrupt end `process`."""
        self._running.add(process)
        if self._is_ending:
            # It was started after the others were terminated.
            process.terminate()
        try:
            yield
        finally:
            self._running.discard(process)
