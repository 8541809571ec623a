"""Record a training's progress: metrics.jsonl, trackers, stderr."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from mpd_data.common.files import atomic_file
from mpd_data.common.hashing import content_key
from mpd_data.common.machine import peak_memory
from mpd_data.common.meter import Meter
from mpd_data.store.run_record import read_record
from mpd_data.store.trainings import metrics_file, read_metrics
from mpd_train.config import TrainConfig
from mpd_train.tracking import Trackers, load_trackers, remember, told


class Recorder:
    """Records the steps after `done` of `total`."""

    def __init__(
        self, config: TrainConfig, tracker_modules: dict[str, Any], done: int, total: int
    ) -> None:
        if done:
            print(f"resuming after step {done} of {total}", file=sys.stderr)
        self._metrics, repeated = _open_metrics(config.out, done)
        settings = config.model_dump(mode="json")
        self._trackers = Trackers(tracker_modules, config.out, settings, done, repeated)
        if done + repeated == 0:
            self._trackers.log_rounds(config.shards)
        self._meter = Meter("train", total, "step", done)
        self._text = ""

    def step(self, step: int, record: dict[str, float], seconds: float, waited: float) -> None:
        """Record an optimiser step that took `seconds`, of which it `waited` for data."""
        pace = record["tokens"] / seconds
        self.write({
            "step": step, **record,
            "seconds": round(seconds, 4), "data_seconds": round(waited, 4),
            "tokens_per_second": round(pace, 1),
            "peak_memory_gib": round(peak_memory() / 2**30, 3),
        })  # fmt: skip
        self._text = f"loss {record['loss']:.4f}, {pace:,.0f} tok/s"
        self._meter.advance()
        self._meter.show(self._text)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, flushed before the next begins."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._trackers.log(record)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.close(self._text)
        self._trackers.close()
        self._metrics.close()


def record_evaluation(out: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Send the results of evaluation sets by name (`mpd_data.inspect.compare.evaluate`), of the
    model that the training in `out` made, to the runs that it has in its trackers, once. Raise
    ConfigError for a tracker that is not installed any more."""
    config = read_record(out, "training").get("details", {}).get("config", {})
    known = told(out)
    now = known | {"evaluation": content_key(dict(results))}
    if not config.get("report_to") or now == known:
        return
    step = max((record["step"] for record in read_metrics(out)), default=0)
    trackers = Trackers(load_trackers(config["report_to"]), out, config, step, 0)
    trackers.log_evaluation(step, results)
    trackers.close()
    remember(out, told(out) | now)


def _open_metrics(out: Path, done: int) -> tuple[TextIO, int]:
    """Open metrics.jsonl for appending, cut back to the steps that the checkpoint holds. Return it,
    and how many records were cut off. Raise DataError like `read_metrics`."""
    # Steps after the checkpoint are done again.
    path, lines = metrics_file(out), read_metrics(out)
    kept = [json.dumps(record) + "\n" for record in lines if record["step"] <= done]
    with atomic_file(path) as file:
        file.write("".join(kept))
    return path.open("a", encoding="utf-8"), len(lines) - len(kept)
