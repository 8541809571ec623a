"""What a session (session.py) does: run the commands that its parent sends."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Thread

import click

from mpd_data.common import signals
from mpd_data.common.command import exit_code
from mpd_data.engines.start import close_kept_engine, keep_engine
from mpd_data.parts import workers
from mpd_data.parts.session import ANSWER, SESSION

_INTERRUPTED = 130


def serve(command: click.Command) -> None:
    """Run `command` with the words that come on stdin, as JSON lists; an empty one closes what is
    kept. Answer each with the exit code."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    del os.environ[SESSION]
    signals.listen()
    keep_engine()
    is_busy, code = Event(), 0
    with suppress(KeyboardInterrupt):
        for words in _orders(is_busy):
            if words:
                code = exit_code(command, words)
            else:
                workers.close_worker_engines()
                close_kept_engine()
            is_busy.clear()
            sys.stderr.flush()
            print(f"{ANSWER}{code}", file=answers, flush=True)
            if code == _INTERRUPTED:
                break
    workers.end_workers()
    # Python takes twice as long to end with an open one.
    close_kept_engine()
    sys.exit(code)


def _orders(is_busy: Event) -> Iterator[list[str]]:
    """Yield the words of each command that the parent sends. Interrupt this process when the parent
    dies while a command runs: nobody waits for it, and it holds a round's lock."""
    lines: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        # Unbuffered: at its end Python waits for a buffer's lock, which a reader holds.
        with os.fdopen(0, "rb", buffering=0, closefd=False) as orders:
            for line in orders:
                is_busy.set()
                lines.put(line)
        lines.put(b"")
        # Not SIGINT, which the jobs of a shell's background ignore.
        if is_busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=read, name="orders", daemon=True).start()
    while line := lines.get():
        yield json.loads(line)
