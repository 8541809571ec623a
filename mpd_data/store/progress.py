"""Progress of a generation stage, on stderr and in a file that `mpd-gen status` reads."""

import contextlib
import json
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from mpd_data.common.errors import MPDError
from mpd_data.common.files import atomic_file, read_json
from mpd_data.common.machine import device_name
from mpd_data.common.meter import Meter
from mpd_data.common.records import Record, require

_SECONDS_PER_STATUS = 2.0


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
        self._started = time.time()
        self._begun = self._last_status = time.monotonic()
        self._start_seconds = 0.0
        self._recent: deque[tuple[float, int]] = deque([(self._begun, 0)], maxlen=200)
        status.parent.mkdir(exist_ok=True)
        self._write("starting")

    def engine_started(self) -> None:
        """End the time that counts as the engine's start; rates count from here."""
        now = time.monotonic()
        self._start_seconds, self._begun = now - self._begun, now
        self._recent = deque([(now, 0)], maxlen=200)
        self._write("running")

    def speed(self, backend: str) -> dict[str, Any] | None:
        """Return rows and tokens of this run, seconds of the engine's start and of the work after
        it, device and `backend`; None where no token was made."""
        if not self._tokens:
            return None
        return {
            "device": "server" if backend == "openai" else device_name(),
            "backend": backend,
            "rows": self._rows,
            "tokens": self._tokens,
            "start_seconds": round(self._start_seconds, 1),
            "seconds": round(time.monotonic() - self._begun, 1),
        }

    def skip(self, rows: int = 1) -> None:
        """Count `rows` that existed before this run."""
        self._meter.advance(rows)

    def fail(self, rows: int = 1) -> None:
        """Count `rows` that will not come."""
        self._failed += rows

    def update(self, tokens: int, truncated: int, in_flight: int) -> None:
        """Count a finished row of `tokens` tokens; `truncated`: 1 where it hit its length limit."""
        self._rows += 1
        self._tokens += tokens
        self._truncated += truncated
        self._in_flight = in_flight
        self._recent.append((time.monotonic(), self._tokens))
        self._meter.advance()
        self.tick()

    def tick(self) -> None:
        """Show progress and renew an old status file; call it also while no row finishes."""
        self._meter.show(self._text(), self._seconds_left())
        if time.monotonic() - self._last_status >= _SECONDS_PER_STATUS:
            self._write("running")

    def _speeds(self) -> tuple[float, float]:
        """Return tokens per second, recent and overall."""
        now = time.monotonic()
        then, tokens = self._recent[0]
        recent = (self._tokens - tokens) / max(now - then, 1e-9)
        return recent, self._tokens / max(now - self._begun, 1e-9)

    def _text(self) -> str:
        recent, lifetime = self._speeds()
        share = self._truncated / max(self._rows, 1)
        failed = f", {self._failed} failed" if self._failed else ""
        return (
            f"{recent:,.0f} tok/s (all {lifetime:,.0f}), {self._in_flight} in flight,"
            f" {share:.1%} truncated{failed}"
        )

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
            "tokens": self._tokens,
            "tokens_per_second": round(lifetime, 1),
            "recent_tokens_per_second": round(recent, 1),
            "in_flight": self._in_flight,
            "truncated": self._truncated,
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
        self._meter.close(self._text())
        self._in_flight = 0
        if kind is None:
            self._write("finished")
            return
        # Best effort: a failure here must not mask the exception that ends the stage.
        with contextlib.suppress(MPDError):
            self._write("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
