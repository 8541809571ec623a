"""Run mpd-gen commands one after another in a process that stays, with the engine of the last one.

A pipeline runs its generation steps in such processes, and `--workers` its parts. A command that
needs the model of the one before, with the same engine settings, finds its engine started: the
evaluation sets of a student and the next round's rollouts, or what a teacher rewrites in a study.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress

import click

# Set in the environment of a session, and of one that runs a worker's part of a command.
SESSION, _WORKER = "MPD_GEN_SESSION", "MPD_GEN_WORKER"
# What an answer begins with. All other text is messages.
ANSWER = "\0"


class Session:
    """A process that runs mpd-gen commands one after another and keeps its engine. `piped`: its
    messages are printed line by line; else it has the terminal. `worker`: it runs parts of what
    this process was asked to do, and is interrupted by this process alone."""

    def __init__(self, environment: dict[str, str], piped: bool, worker: bool = False) -> None:
        roles = {SESSION: "1", **({_WORKER: "1"} if worker else {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mpd_data.cli"],
            env=environment | roles,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if piped else None,
            encoding="utf-8",
            errors="replace",
            start_new_session=worker,
        )

    def run(self, words: list[str], prefix: str) -> int:
        """Run the command `words` and print its messages behind `prefix`. Return its exit code; of
        a process that dies, the process's."""
        self._send(words)
        return self._answer(prefix)

    def _send(self, words: list[str]) -> None:
        """Send a command; no words close the engine."""
        assert self.process.stdin is not None
        # It may be dead, which the end of its output shows.
        with suppress(OSError):
            self.process.stdin.write(f"{json.dumps(words)}\n")
            self.process.stdin.flush()

    def _answer(self, prefix: str) -> int:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text, is_answer, code = line.rstrip().partition(ANSWER)
            if text:
                click.echo(f"{prefix}{text}", err=True)
            if is_answer:
                return int(code)
        # A process that was killed by a signal has a negative code.
        return self.process.wait() or 1


def close_engines(sessions: Collection[Session]) -> None:
    """Free what the engines of `sessions` hold, for other processes."""
    for session in sessions:
        session._send([])
    for session in sessions:
        session._answer("")


def dismiss(sessions: Collection[Session]) -> None:
    """Let processes end, whose engines go with them, without waiting for them."""
    for session in sessions:
        assert session.process.stdin is not None
        with suppress(OSError):
            session.process.stdin.close()


def end(sessions: Collection[Session]) -> None:
    """End processes, whose engines go with them."""
    dismiss(sessions)
    for session in sessions:
        session.process.wait()


def ending_of(code: int) -> str:
    """Return how a process ended that did not succeed, as the rest of a sentence about it."""
    if code == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), as the kernel does where memory runs out; then use fewer workers"
            " at a time, or lower what one takes: --max-num-batched-tokens and --max-num-seqs of an"
            " engine, --pack-length of a training"
        )
    if code < 0:
        return f"was ended by signal {-code}"
    return f"ended with exit code {code}; its message is above"


def is_session() -> bool:
    """Return whether this process was started as a session."""
    return SESSION in os.environ


def is_worker() -> bool:
    """Return whether this process runs a worker's part of a command."""
    return _WORKER in os.environ
