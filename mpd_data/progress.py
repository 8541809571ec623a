"""Progress of a generation stage: a bar on a terminal, readable lines elsewhere."""

import sys
import time
from collections import deque
from typing import Any

from tqdm import tqdm

from mpd_data.models import device_name

_SECONDS_PER_LINE = 15.0


class Progress:
    """Counts finished rows and tokens; shows rate (recent and whole), queue, truncation and
    time left on stderr."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._start_rows = done
        self._rows = done
        self._tokens = 0
        self._truncated = 0
        self._begun = self._last_line = time.monotonic()
        self._start_seconds = 0.0
        self._recent: deque[tuple[float, int]] = deque([(self._begun, 0)], maxlen=200)
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit="row", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def engine_started(self) -> None:
        """What went by until now was the engine's start; rates count from here."""
        now = time.monotonic()
        self._start_seconds, self._begun = now - self._begun, now
        self._recent = deque([(now, 0)], maxlen=200)

    def speed(self, backend: str) -> dict[str, Any] | None:
        """Rows and tokens of this run, seconds of the engine's start and of the work after it, the
        device and the engine's `backend`; None where no token was made."""
        if not self._tokens:
            return None
        return {
            "device": device_name(),
            "backend": backend,
            "rows": self._rows - self._start_rows,
            "tokens": self._tokens,
            "start_seconds": round(self._start_seconds, 1),
            "seconds": round(time.monotonic() - self._begun, 1),
        }

    def update(self, tokens: int, truncated: int, in_flight: int) -> None:
        """One more row finished, of so many tokens."""
        now = time.monotonic()
        self._rows += 1
        self._tokens += tokens
        self._truncated += truncated
        self._recent.append((now, self._tokens))
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(self._rates(now, in_flight), refresh=False)
        elif now - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = now
            self._print(now, in_flight)

    def _rates(self, now: float, in_flight: int) -> str:
        then, tokens = self._recent[0]
        recent = (self._tokens - tokens) / max(now - then, 1e-9)
        lifetime = self._tokens / max(now - self._begun, 1e-9)
        share = self._truncated / max(self._rows - self._start_rows, 1)
        return (
            f"{recent:,.0f} tok/s (all {lifetime:,.0f}), {in_flight} in flight,"
            f" {share:.1%} truncated"
        )

    def _print(self, now: float, in_flight: int) -> None:
        per_row = (now - self._begun) / max(self._rows - self._start_rows, 1)
        left = per_row * (self._total - self._rows)
        print(
            f"{self._label}: {self._rows}/{self._total} rows, {self._rates(now, in_flight)},"
            f" {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._print(time.monotonic(), 0)
