"""Checks run in worker processes: a check that hangs or crashes costs its own verdict only.

Parent and worker exchange JSON lines over pipes. A worker says `ready`, then for each request
sends the extracted `answer` and the `verdict`. The parent looks only between two steps of the
engine, so a worker has some requests ahead; where it is killed over one, the others go to the next.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from mpd_data.checkers.builtin import make_checker
from mpd_data.checkers.formats import Checker
from mpd_data.common.errors import ConfigError
from mpd_data.config import AnswerFormat

WORKER_MEMORY = 4 * 2**30
_AHEAD_BYTES = 32 << 10  # of requests with a worker: less than a pipe holds, so no write waits
_AHEAD_REQUESTS = 32
START_SECONDS = 300.0  # to import a checker's libraries, on a cold disk


@dataclass(frozen=True)
class CheckRequest:
    """One completion to check. `gold`: the gold column's cell; `draft_answer`: what a rewrite has
    to keep."""

    key: str
    completion: str
    gold: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    draft_answer: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a check found. `is_correct` is None without gold, `keeps_answer` without a draft's
    answer; both are False where no answer was found. `error`: why the check failed; it then counts
    as not correct, and says nothing of keeping the answer."""

    key: str
    answer: str | None
    is_correct: bool | None
    keeps_answer: bool | None
    error: str | None = None


@dataclass(frozen=True)
class _Task:
    request: CheckRequest
    line: bytes  # what a worker is sent


class _Worker:
    def __init__(self, checker: str, formats: Sequence[AnswerFormat], timeout: float):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mpd_data.checkers.pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            bufsize=0,
        )
        assert self.process.stdout is not None
        self.fd = self.process.stdout.fileno()
        self.unread = b""
        self.ready = False
        self.tasks: deque[_Task] = deque()  # the first is being checked
        self.answer: str | None = None  # to the first, once known
        self.deadline = time.monotonic() + START_SECONDS
        self._timeout = timeout
        self._send(_line({"checker": checker, "formats": list(formats), "timeout": timeout}))

    def takes(self, task: _Task) -> bool:
        """Whether it can be given `task` now."""
        ahead = sum(len(other.line) for other in self.tasks) + len(task.line)
        return not self.tasks or (ahead <= _AHEAD_BYTES and len(self.tasks) < _AHEAD_REQUESTS)

    def give(self, task: _Task) -> None:
        self.tasks.append(task)
        if len(self.tasks) == 1:
            self._begin()
        self._send(task.line)

    def done(self) -> CheckRequest:
        """Takes the first request away: the next one's time begins."""
        task = self.tasks.popleft()
        self._begin()
        return task.request

    def _begin(self) -> None:
        self.answer = None
        self.deadline = time.monotonic() + self._timeout

    def _send(self, line: bytes) -> None:
        """A worker that is gone is noticed by its closed output."""
        assert self.process.stdin is not None
        data = memoryview(line)
        with suppress(BrokenPipeError):
            while data:
                data = data[self.process.stdin.write(data) :]

    def lines(self) -> list[dict[str, Any]] | None:
        """Whole messages that have arrived; None at the end of the worker."""
        data = os.read(self.fd, 1 << 16)
        if not data:
            return None
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Kills the worker if it lives; its exit status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return status


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode() + b"\n"


class CheckPool:
    """Checks completions in `processes` workers, each check within `timeout` seconds. A context
    manager. Raises ConfigError where the checker cannot be made, here or in a worker."""

    def __init__(
        self, checker: str, formats: Sequence[AnswerFormat], timeout: float, processes: int
    ):
        make_checker(checker, formats)  # a bad name is refused here, before any work
        self._checker, self._formats = checker, tuple(formats)
        self._timeout, self._processes = timeout, processes
        self._queue: deque[_Task] = deque()
        self._done: list[Verdict] = []
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; checks under way are lost."""
        for worker in list(self._workers):
            self._remove(worker)
        self._selector.close()

    @property
    def in_flight(self) -> int:
        """Requests whose verdict `ready` has not given yet."""
        given = sum(len(worker.tasks) for worker in self._workers)
        return len(self._queue) + given + len(self._done)

    def submit(self, request: CheckRequest) -> None:
        """Queues a check. Raises no error of the check's own."""
        line = _line(
            {
                "completion": request.completion,
                "gold": request.gold,
                "metadata": dict(request.metadata),
                "draft_answer": request.draft_answer,
            }
        )
        self._queue.append(_Task(request, line))
        self._hand_out()

    def ready(self, wait: float = 0.0) -> list[Verdict]:
        """Finished checks, in the order they finished; waits up to `wait` seconds for the first.
        Raises ConfigError where a worker cannot make the checker."""
        until = time.monotonic() + wait
        while True:
            now = time.monotonic()
            self._expire(now)
            self._hand_out()
            running = [w.deadline for w in self._workers if w.tasks or not w.ready]
            pause = 0.0 if self._done or not running else max(0.0, min(until, *running) - now)
            for key, _ in self._selector.select(pause):
                self._read(key.data)
            self._hand_out()
            if self._done or self.in_flight == 0 or time.monotonic() >= until:
                done, self._done = self._done, []
                return done

    def _hand_out(self) -> None:
        ready = [worker for worker in self._workers if worker.ready]
        while self._queue and ready:
            worker = min(ready, key=lambda worker: len(worker.tasks))
            if not worker.takes(self._queue[0]):
                break
            worker.give(self._queue.popleft())
        waiting = len(self._queue) + sum(len(worker.tasks) - 1 for worker in ready if worker.tasks)
        starting = len(self._workers) - len(ready)
        while waiting > starting and len(self._workers) < self._processes:
            worker = _Worker(self._checker, self._formats, self._timeout)
            self._workers.append(worker)
            self._selector.register(worker.fd, selectors.EVENT_READ, worker)
            starting += 1

    def _read(self, worker: _Worker) -> None:
        lines = worker.lines()
        if lines is None:
            self._died(worker)
            return
        for message in lines:
            if "refused" in message:
                raise ConfigError(message["refused"])
            if "ready" in message:
                worker.ready = True
            elif "verdict" in message:
                answer, request = worker.answer, worker.done()
                if message["error"] is not None:
                    self._failed(request, answer, message["error"])
                else:
                    self._done.append(Verdict(request.key, answer, *message["verdict"]))
            else:
                worker.answer = message["answer"]

    def _expire(self, now: float) -> None:
        for worker in list(self._workers):
            if not worker.tasks and worker.ready:
                continue
            if now < worker.deadline:
                continue
            # It may have answered while nobody asked: what has arrived counts.
            if self._has_output(worker):
                self._read(worker)
                continue
            self._remove(worker)
            if not worker.tasks:
                raise ConfigError(
                    f"checker {self._checker!r}: not ready after {START_SECONDS:g} s."
                )
            self._ended(worker, f"timed out after {self._timeout:g} s")

    def _has_output(self, worker: _Worker) -> bool:
        return any(key.data is worker for key, _ in self._selector.select(0))

    def _died(self, worker: _Worker) -> None:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(1)  # its output has ended, so it is about to exit: let it say why
        status = self._remove(worker)
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        if not worker.ready:
            raise ConfigError(f"checker {self._checker!r}: its process died at the start ({how}).")
        if not worker.tasks:
            return
        error = f"the checking process died ({how})"
        if status == -signal.SIGALRM:  # its own limit, where `ready` was not called in time
            error = f"timed out after {self._timeout:g} s"
        self._ended(worker, error)

    def _ended(self, worker: _Worker, error: str) -> None:
        """A worker is gone over its first request; the others it had are checked by another."""
        answer, request = worker.answer, worker.done()
        self._failed(request, answer, error)
        self._queue.extendleft(reversed(worker.tasks))

    def _remove(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        self._selector.unregister(worker.fd)
        return worker.end()

    def _failed(self, request: CheckRequest, answer: str | None, error: str) -> None:
        is_correct = None if request.gold is None else False
        self._done.append(Verdict(request.key, answer, is_correct, None, error))


def _work() -> None:
    """A worker's life: the settings, then one request a line, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The protocol keeps the pipes to itself: a checker that prints or reads must not reach them.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    with suppress(ValueError, OSError):  # a lower limit is set already, or there are none
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))

    def reply(message: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(replies, data) :]

    settings = json.loads(requests.readline())
    try:
        checker = make_checker(settings["checker"], settings["formats"])
        checker.prepare()
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent has to say it
        name = "" if isinstance(error, ConfigError) else f"checker {settings['checker']!r}: "
        reply({"refused": f"{name}{error}"})
        return
    reply({"ready": True})
    for line in requests:
        # Where the parent is gone, nobody else ends a check that hangs.
        signal.setitimer(signal.ITIMER_REAL, 2 * settings["timeout"] + 1)
        verdict, error_text = None, None
        try:
            verdict = _check(checker, json.loads(line), reply)
        except Exception as error:  # noqa: BLE001  # a checker's failure is its row's verdict
            error_text = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({"verdict": verdict, "error": error_text})


def _check(
    checker: Checker, request: dict[str, Any], reply: Callable[[Mapping[str, Any]], None]
) -> tuple[bool | None, bool | None]:
    gold, draft = request["gold"], request["draft_answer"]
    answer = checker.extract(request["completion"])
    reply({"answer": answer})
    if answer is None:
        return (None if gold is None else False), (None if draft is None else False)
    is_correct = None
    if gold is not None:
        is_correct = bool(checker.correct(answer, checker.gold(gold), request["metadata"]))
    keeps = None if draft is None else bool(checker.equal(answer, draft))
    return is_correct, keeps


if __name__ == "__main__":
    try:
        _work()
    except BrokenPipeError:
        sys.exit(1)  # the parent is gone
