"""Show progress on stderr: a bar on a terminal or in a notebook, else a line every 15 seconds."""

import sys
import time

from tqdm import tqdm

_SECONDS_PER_LINE = 15.0


class Meter:
    """Counts `done` of `total` units, and shows them with a text of the caller's."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.done, self.total = done, total
        self._label, self._unit = label, unit
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True,
            disable=not _can_redraw(),
        )  # fmt: skip

    def advance(self, units: int = 1) -> None:
        self.done += units
        self._bar.update(units)

    def show(self, text: str, seconds_left: float | None = None) -> None:
        """Put `text` beside the bar; without one, print a line if the last is old enough."""
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable and time.monotonic() - self._last_line >= _SECONDS_PER_LINE:
            self._print(text, seconds_left)

    def close(self, text: str) -> None:
        """Close the bar; without one, print a last line if there is a text."""
        if self._bar.disable and text:
            self._print(text, None)
        self._bar.close()

    def _print(self, text: str, seconds_left: float | None) -> None:
        self._last_line = time.monotonic()
        left = "" if seconds_left is None else f", {seconds_left:.0f} s left"
        counts = f"{self.done}/{self.total} {self._unit}s"
        print(f"{self._label}: {counts}, {text}{left}", file=sys.stderr, flush=True)


def _can_redraw() -> bool:
    """Return whether stderr can replace a line that it has shown: a notebook's kernel can, though
    it is no terminal."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
