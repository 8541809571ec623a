"""Progress of a generation stage, on stderr and in a file that `mpd-gen status` reads."""

import contextlib
import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from mpd_data.common.errors import MPDError
from mpd_data.common.files import atomic_file, read_json
from mpd_data.common.machine import device_name, peak_memory
from mpd_data.common.meter import Meter
from mpd_data.common.records import Record, require

_SECONDS_PER_STATUS = 2.0
_SECONDS_PER_LOOK = 1.0
_LOOKS = 30


class _Report(Record):
    state: Literal["starting", "running", "finished", "interrupted", "failed"]
    host: str
    pid: int
    updated: float = Field(ge=0)
    rows: int = Field(ge=0)
    total: int = Field(ge=0)
    failed: int = Field(ge=0)
    recent_tokens_per_second: float
    in_flight: int
    seconds_left: float | None = Field(ge=0)
    tokens: int = Field(ge=0)
    truncated: int = Field(ge=0)
    # Reports of earlier versions lack these.
    running: int | None = None
    kept: int | None = None
    quiet_seconds: float = Field(0.0, ge=0)
    memory_gib: float | None = None


def read_report(path: Path) -> dict[str, Any]:
    """Return what the file `status` of a `Progress` holds. Raise DataError where it holds something
    else, as after a crash of the machine: it is not synced to the disk."""
    remedy = "Delete it: a stage that runs writes it anew."
    report = read_json(path, remedy)
    require(_Report, report, f"{path}: not a progress report", remedy)
    return report


class Progress:
    """Count finished rows and tokens; show them and what follows from them on stderr and in the
    file `status`. A context manager: the way it is left tells how the stage ended. `total`: rows
    that will exist at the end, those from before this run included (see `skip`)."""

    def __init__(self, label: str, total: int, status: Path) -> None:
        self._meter = Meter(label, total, "row")
        self._status = status
        self._rows = self._failed = self._tokens = self._truncated = self._in_flight = 0
        self._kept: int | None = None
        self._scored_while_writing = 0
        self._running: int | None = None
        # By number of requests that ran: how often a look found so many.
        self._occupancy: Counter[int] = Counter()
        self._started = time.time()
        self._begun = self._last_status = self._last_look = self._last_token = time.monotonic()
        self._start_seconds = 0.0
        # Tokens so far, those of unfinished rows too, at each look of the last half minute.
        self._looks: deque[tuple[float, int]] = deque([(self._begun, 0)], maxlen=_LOOKS)
        status.parent.mkdir(exist_ok=True)
        self._write("starting")

    def engine_started(self) -> None:
        """End the time that counts as the engine's start; rates count from here."""
        now = time.monotonic()
        self._start_seconds, self._begun = now - self._begun, now
        self._last_token = now
        self._looks.clear()
        self._looks.append((now, 0))
        self._write("running")

    def speed(self, backend: str) -> dict[str, Any] | None:
        """Return rows and tokens of this run, seconds of the engine's start and of the work after
        it, device and `backend`; `half_empty`, the share of the time in which less than half as
        many requests ran as ran at most; of rewrites also how many are kept and how many of these
        needed no second pass for scores with the draft. None where no token was made."""
        if not self._tokens:
            return None
        looks, most = self._occupancy.total(), max(self._occupancy, default=0)
        few = sum(times for number, times in self._occupancy.items() if 2 * number < most)
        occupancy = {"half_empty": round(few / looks, 2)} if looks else {}
        written = self._scored_while_writing
        kept = {"kept": self._kept, "scored_while_writing": written} if self._kept else {}
        return {
            "device": "server" if backend == "openai" else device_name(),
            "backend": backend,
            "rows": self._rows,
            "tokens": self._tokens,
            "start_seconds": round(self._start_seconds, 1),
            "seconds": round(time.monotonic() - self._begun, 1),
            **occupancy,
            **kept,
        }

    def skip(self, rows: int = 1) -> None:
        """Count `rows` that existed before this run."""
        self._meter.advance(rows)

    def fail(self, rows: int = 1) -> None:
        """Count `rows` that will not come."""
        self._failed += rows

    def update(
        self, tokens: int, truncated: int, kept: int | None = None, written: int = 0
    ) -> None:
        """Count a finished row of `tokens` tokens; `truncated`: 1 where it hit its length limit;
        `kept`: how many rewrites of it are kept; `written`: how many of these were scored while
        they were written."""
        self._rows += 1
        self._tokens += tokens
        self._truncated += truncated
        if kept is not None:
            self._kept = (self._kept or 0) + kept
            self._scored_while_writing += written
        self._meter.advance()

    def tick(self, in_flight: int, underway: Callable[[], tuple[int, int] | None]) -> None:
        """Show progress and renew an old status file; call it after each step of an engine that has
        `in_flight` requests. `underway` returns how many of them have begun and have how many
        tokens, None where that is not known. It is called once a second."""
        now = time.monotonic()
        if now - self._last_look < _SECONDS_PER_LOOK:
            return
        self._last_look, self._in_flight = now, in_flight
        running, tokens = underway() or (None, 0)
        self._running = running
        if running is not None:
            self._occupancy[running] += 1
        # A row's tokens are counted when it is written: between its last token and then they are
        # in neither sum.
        before = self._looks[-1][1]
        made = max(before, self._tokens + tokens)
        self._looks.append((now, made))
        if made > before:
            self._last_token = now
        self._meter.show(self._text(), self._seconds_left())
        if now - self._last_status >= _SECONDS_PER_STATUS:
            self._write("running")

    def _speeds(self) -> tuple[float, float]:
        """Return tokens per second: of the last half minute, and of this run."""
        now = time.monotonic()
        then, tokens = self._looks[0]
        made = max(self._looks[-1][1], self._tokens)
        recent = (made - tokens) / max(now - then, 1e-9)
        return recent, made / max(now - self._begun, 1e-9)

    def _text(self) -> str:
        recent, lifetime = self._speeds()
        parts = [f"{recent:,.0f} tok/s (all {lifetime:,.0f})"]
        if self._running is None and self._in_flight:
            parts.append(f"{self._in_flight:,} in flight")
        if self._running is not None:
            parts.append(f"{self._running:,} of {self._in_flight:,} running")
        if self._rows:
            parts.append(f"{self._truncated / self._rows:.1%} truncated")
        if self._kept is not None:
            parts.append(f"{self._kept:,} kept")
        if self._failed:
            parts.append(f"{self._failed} failed")
        return ", ".join(parts)

    @property
    def done(self) -> int:
        """Rows finished by this run or committed by earlier ones."""
        return self._meter.done

    def _seconds_left(self) -> float | None:
        if not self._rows:
            return None
        per_row = (time.monotonic() - self._begun) / self._rows
        return per_row * max(self._meter.total - self.done - self._failed, 0)

    def _write(self, state: str) -> None:
        self._last_status = time.monotonic()
        recent, lifetime = self._speeds()
        left = self._seconds_left()
        report = {
            "state": state,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": round(self._started, 1),
            "updated": round(time.time(), 1),
            "rows": self.done,
            "total": self._meter.total,
            "failed": self._failed,
            "tokens": max(self._looks[-1][1], self._tokens),
            "tokens_per_second": round(lifetime, 1),
            "recent_tokens_per_second": round(recent, 1),
            "in_flight": self._in_flight,
            "running": self._running,
            "truncated": self._truncated,
            "kept": self._kept,
            "quiet_seconds": round(time.monotonic() - self._last_token, 1),
            "memory_gib": round(peak_memory() / 2**30, 2),
            "seconds_left": None if left is None else round(left, 1),
        }
        try:
            # Useful only while it is fresh, so it is not worth an fsync.
            with atomic_file(self._status, durable=False) as file:
                file.write(json.dumps(report) + "\n")
        except OSError as error:
            raise MPDError(
                f"{self._status}: cannot be written: {error.strerror}. Every row committed before"
                " is safe; free space or give a writable place, then run the same command again."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._in_flight, self._running = 0, None
        self._meter.close(self._text())
        if kind is None:
            self._write("finished")
            return
        # Best effort: a failure here must not mask the exception that ends the stage.
        with contextlib.suppress(MPDError):
            self._write("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
