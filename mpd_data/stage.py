"""Requests that fail for good: one row each in errors/, and an end to a job where most do."""

from collections.abc import Container
from dataclasses import dataclass

from mpd_data.common.errors import MPDError
from mpd_data.config import FailureConfig
from mpd_data.store.writer import ShardWriter

# Fewer say nothing of the rest.
_FEWEST = 50


@dataclass(frozen=True)
class RolloutsOutcome:
    """What the stage left behind: rows committed in all, rows this run wrote, rows that failed for
    good (they stand in errors/), rows still owed after a --limit. All of this process's part."""

    total: int
    written: int
    failed: int
    owed: int = 0


@dataclass(frozen=True)
class RewriteOutcome:
    """What the stage left behind: distill rows by status in the whole round, rows this run
    wrote, rows that failed for good (they stand in errors/), rollouts still owed after a
    --limit."""

    statuses: dict[str, int]
    written: int
    failed: int
    owed: int = 0


@dataclass
class Failures:
    """The failures of one run of `stage`. `known`: keys of those that earlier runs left, which are
    not written again and are no news of this run; `tried`: requests of this run, those among them
    that cannot even be made. The stage counts each before its outcome is known."""

    stage: str
    writer: ShardWriter
    known: Container[str]
    config: FailureConfig
    count: int = 0
    tried: int = 0

    def __post_init__(self) -> None:
        self._new = 0

    def add(self, row_id: str, prompt_id: str, message: str) -> None:
        """Notes that a request failed.

        Raises MPDError where more of this run's requests have failed than the settings allow.
        """
        self.count += 1
        if row_id in self.known:
            self.tried -= 1
            return
        self.writer.add(
            {"row_id": row_id, "stage": self.stage, "prompt_id": prompt_id, "message": message}
        )
        self._new += 1
        if self.tried >= _FEWEST and self._new > self.config.max_error_rate * self.tried:
            raise MPDError(
                f"{self._new} of {self.tried} requests failed, more than --max-error-rate"
                f" {self.config.max_error_rate:g} allows. The last: {message}\n"
                "All are in errors/*.parquet. Mend the cause, or raise --max-error-rate; then run"
                " the same command again, which goes on from here."
            )
