"""The requests of a run that fail for good."""

from collections.abc import Container
from dataclasses import dataclass

from mpd_data.common.errors import MPDError
from mpd_data.config import FailureConfig
from mpd_data.store.writer import ShardWriter

# With fewer requests the share of failures means little.
_MIN_REQUESTS = 50


@dataclass
class Failures:
    """Count the requests of one run that fail for good, and write each to errors/.

    stage: the command, for the column `stage`.
    known: keys that errors/ holds from earlier runs; they are not written again.
    tried: requests of this run. The stage counts each before its result is known.
    """

    stage: str
    writer: ShardWriter
    known: Container[str]
    config: FailureConfig
    count: int = 0
    tried: int = 0
    _new: int = 0

    def add(self, row_id: str, prompt_id: str, message: str) -> None:
        """Record that a request failed.

        Raise MPDError when more of this run's requests failed than --max-error-rate allows.
        """
        self.count += 1
        if row_id in self.known:
            self.tried -= 1
            return
        self.writer.add(
            {"row_id": row_id, "stage": self.stage, "prompt_id": prompt_id, "message": message}
        )
        self._new += 1
        if self.tried >= _MIN_REQUESTS and self._new > self.config.max_error_rate * self.tried:
            raise MPDError(
                f"{self._new} of {self.tried} requests failed, more than --max-error-rate"
                f" {self.config.max_error_rate:g} allows. The last one: {message}\n"
                "errors/*.parquet lists all of them. Fix the cause or raise --max-error-rate, then"
                " run the same command again to resume."
            )
