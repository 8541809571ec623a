"""Run checks in worker processes, so that one that hangs or crashes loses its own verdict only.

Parent and worker exchange JSON lines over pipes. A worker sends `ready`, then for each request the
extracted `answer` and the `verdict`. The parent reads them only between two steps of the engine, so
a worker gets several requests in advance. If one of them kills it, another worker gets the rest.
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
from typing import Any, NamedTuple, Self

from mpd_data.checkers.builtin import make_checker
from mpd_data.checkers.formats import Checker
from mpd_data.common.errors import ConfigError
from mpd_data.config import AnswerFormat
from mpd_data.prompts.special import after_thinking

WORKER_MEMORY = 4 * 2**30
# Limits of the requests that a worker has: less than a pipe holds, so that no write blocks.
_AHEAD_BYTES = 32 << 10
_AHEAD_REQUESTS = 32
START_SECONDS = 300.0  # to import a checker's libraries from a cold disk


@dataclass(frozen=True)
class CheckRequest:
    """One completion to check. `gold` is the gold column's cell, `draft_answer` the answer that a
    rewrite must keep. A completion that ends in its thinking, which the `prompt` may have opened,
    has no answer, whatever the checker."""

    key: str
    completion: str
    gold: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    draft_answer: str | None = None
    prompt: str = ""


@dataclass(frozen=True)
class Verdict:
    """The result of a check: `is_correct` is None without a gold answer that can be read,
    `keeps_answer` without a draft's answer. Both are False if no answer was found. `error` says why
    a check failed; then `is_correct` is False and `keeps_answer` None."""

    key: str
    answer: str | None
    is_correct: bool | None
    keeps_answer: bool | None
    error: str | None = None


class _Task(NamedTuple):
    request: CheckRequest
    line: bytes  # the message for the worker


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
        self.answer: str | None = None  # of the first, once it has arrived
        self.deadline = time.monotonic() + START_SECONDS
        self._timeout = timeout
        self._send(_line({"checker": checker, "formats": list(formats), "timeout": timeout}))

    def has_room(self, task: _Task) -> bool:
        """Return whether `task` can be sent now."""
        ahead = sum(len(other.line) for other in self.tasks) + len(task.line)
        return not self.tasks or (ahead <= _AHEAD_BYTES and len(self.tasks) < _AHEAD_REQUESTS)

    def give(self, task: _Task) -> None:
        self.tasks.append(task)
        if len(self.tasks) == 1:
            self._begin()
        self._send(task.line)

    def done(self) -> CheckRequest:
        """Remove and return the first request; the time of the next one begins."""
        task = self.tasks.popleft()
        self._begin()
        return task.request

    def _begin(self) -> None:
        self.answer = None
        self.deadline = time.monotonic() + self._timeout

    def _send(self, line: bytes) -> None:
        """Write to the worker. That one has died shows later, by the end of its output."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            _write(self.process.stdin.fileno(), line)

    def lines(self) -> list[dict[str, Any]] | None:
        """Return the complete messages that have arrived; None if the worker has ended."""
        data = os.read(self.fd, 1 << 16)
        if not data:
            return None
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Kill the worker if it is alive. Return its exit status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return status


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode() + b"\n"


def _write(fd: int, line: bytes) -> None:
    while line:
        line = line[os.write(fd, line) :]


class CheckPool:
    """A context manager that checks completions in `processes` workers, each within `timeout`
    seconds. Raise ConfigError if the checker cannot be created, here or in a worker."""

    def __init__(
        self, checker: str, formats: Sequence[AnswerFormat], timeout: float, processes: int
    ):
        make_checker(checker, formats)  # refuses a bad name before any work
        self._checker, self._formats = checker, tuple(formats)
        self._timeout, self._processes = timeout, processes
        self._queue: deque[_Task] = deque()
        self._done: list[Verdict] = []
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers. Unfinished checks are lost."""
        for worker in list(self._workers):
            self._remove(worker)
        self._selector.close()

    @property
    def in_flight(self) -> int:
        """The number of requests whose verdict `ready` has not returned yet."""
        sent = sum(len(worker.tasks) for worker in self._workers)
        return len(self._queue) + sent + len(self._done)

    def submit(self, request: CheckRequest) -> None:
        """Queue a check. If it fails, its verdict says so."""
        self._queue.append(_Task(request, _line(vars(request))))
        self._hand_out()

    def ready(self, wait: float = 0.0) -> list[Verdict]:
        """Return the verdicts of finished checks, in the order in which they finished. Wait up to
        `wait` seconds for the first. Raise ConfigError if a worker cannot create the checker."""
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
            if not worker.has_room(self._queue[0]):
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
            idle = worker.ready and not worker.tasks
            if idle or now < worker.deadline:
                continue
            # A verdict may have arrived in time and not have been read.
            if any(key.data is worker for key, _ in self._selector.select(0)):
                self._read(worker)
                continue
            self._remove(worker)
            if not worker.tasks:
                reason = f"not ready after {START_SECONDS:g} s."
                raise ConfigError(f"checker {self._checker!r}: {reason}")
            self._ended(worker, f"timed out after {self._timeout:g} s")

    def _died(self, worker: _Worker) -> None:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(1)  # its output has ended, so its exit status comes soon
        status = self._remove(worker)
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        if not worker.ready:
            raise ConfigError(f"checker {self._checker!r}: its process died at start-up ({how}).")
        if not worker.tasks:
            return
        error = f"the checking process died ({how})"
        if status == -signal.SIGALRM:  # the worker's own limit, if `ready` was called too late
            error = f"timed out after {self._timeout:g} s"
        self._ended(worker, error)

    def _ended(self, worker: _Worker, error: str) -> None:
        """Fail the first request of a worker that has ended; queue its others again."""
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
    """Run a worker: read the settings, then a request from each line until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A checker that prints or reads must not reach the pipes of the protocol.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with suppress(ValueError, OSError):  # a lower limit is set, or the system has no limits
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))

    def reply(message: Mapping[str, Any]) -> None:
        _write(replies, json.dumps(message).encode() + b"\n")

    settings = json.loads(requests.readline())
    try:
        checker = make_checker(settings["checker"], settings["formats"])
        checker.prepare()
    except Exception as error:  # noqa: BLE001  # the parent reports it, whatever it is
        name = "" if isinstance(error, ConfigError) else f"checker {settings['checker']!r}: "
        reply({"refused": f"{name}{error}"})
        return
    reply({"ready": True})
    for line in requests:
        # If the parent has died, only this ends a check that hangs.
        signal.setitimer(signal.ITIMER_REAL, 2 * settings["timeout"] + 1)
        verdict, error_text = None, None
        try:
            verdict = _check(checker, json.loads(line), reply)
        except Exception as error:  # noqa: BLE001  # a checker's failure becomes the verdict
            error_text = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({"verdict": verdict, "error": error_text})


def _check(
    checker: Checker, request: dict[str, Any], reply: Callable[[Mapping[str, Any]], None]
) -> tuple[bool | None, bool | None]:
    gold, draft = request["gold"], request["draft_answer"]
    answer, completion = None, request["completion"]
    if after_thinking(request["prompt"], completion) is not None:
        answer = checker.extract(completion)
    reply({"answer": answer})
    gold = None if gold is None else checker.gold(gold)
    if gold is not None and not checker.can_read(gold):
        gold = None
    if answer is None:
        return (None if gold is None else False), (None if draft is None else False)
    is_correct = None
    if gold is not None:
        is_correct = bool(checker.correct(answer, gold, request["metadata"]))
    keeps = None if draft is None else bool(checker.equal(answer, draft))
    return is_correct, keeps


if __name__ == "__main__":
    try:
        _work()
    except BrokenPipeError:
        sys.exit(1)  # the parent has died
