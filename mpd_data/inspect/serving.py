"""`mpd-gen compare --serve`: what shorter traces save where a model is served.

Both models answer the same requests with the engine and the settings of their rollouts, a number of
them at a time, as a server under steady load does: when one is answered, the next begins.
"""

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import resolve_model
from mpd_data.common.options import parse
from mpd_data.common.text import format_table
from mpd_data.config import RolloutsConfig
from mpd_data.engines.protocol import Completion, Engine, Refused, RequestError
from mpd_data.engines.start import start_engine
from mpd_data.inspect.stats import collect, scan_round
from mpd_data.inspect.status import pipeline_status
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import seed_of

# More requests than this show the median no better.
_MOST_REQUESTS = 2000


@dataclass(frozen=True)
class Served:
    """How a model answered `requests`: seconds until all had their answer, of each answer from its
    request on, and tokens of the answers."""

    requests: int
    seconds: float
    each: list[float]
    tokens: int

    def cells(self) -> dict[str, Any]:
        return {
            "requests per hour": round(3600 * self.requests / self.seconds),
            "seconds to an answer, median": float(np.median(self.each)),
            "95%": float(np.quantile(self.each, 0.95)),
            "tokens per answer": self.tokens / self.requests,
            "tokens per second": round(self.tokens / self.seconds),
        }


def serve_both(base: Path, new: Path, at_once: int) -> dict[str, Any]:
    """Return what each side of a comparison takes to answer its own rollouts' prompts, `at_once` at
    a time, as `base` and `new`; and `paid_after`, the number of requests whose saving is the time
    that the pipeline run of `new` took, None where `new` is in no run or saves nothing.

    Raise ConfigError where the rollouts cannot be sampled again, EngineError where an engine ends.
    """
    sides = {"base": _serve(base, at_once), "new": _serve(new, at_once)}
    saved = sides["base"].seconds / sides["base"].requests
    saved -= sides["new"].seconds / sides["new"].requests
    cost = _cost(new)
    return {
        "at_once": at_once,
        **{name: side.cells() for name, side in sides.items()},
        "run_seconds": cost,
        "paid_after": round(cost / saved) if cost is not None and saved > 0 else None,
    }


def show(served: dict[str, Any]) -> str:
    """Return what `serve_both` returned as a table and a sentence."""
    table = format_table([{"": side, **served[side]} for side in ("base", "new")])
    text = (
        f"served on this machine, as busy as it is, {served['at_once']} requests at a time\n{table}"
    )
    if served["paid_after"] is not None:
        text += (
            f"\nThe run took {served['run_seconds'] / 3600:.2f} hours without evaluations. On a"
            f" machine like this one that is saved after {served['paid_after']:,} requests."
        )
    return text


def _serve(rollouts: Path, at_once: int) -> Served:
    """Start the engine of some rollouts and sample up to 2,000 of them again."""
    round_dir = RoundDir(rollouts)
    stage = round_dir.run_info().get("stages", {}).get("rollouts")
    if stage is None:
        raise ConfigError(f"{rollouts}: no run.json, which says how it was sampled. Restore it.")
    config = parse(RolloutsConfig, stage["details"]["config"], f"{rollouts}/run.json")
    if config.token_budget is not None:
        raise ConfigError(
            f"{rollouts}: sampled with --token-budget, which no server has. --serve compares"
            " rollouts without one."
        )
    columns = ["row_id", "prompt_ids"]
    rows = collect(scan_round(rollouts).select(columns).bottom_k(_MOST_REQUESTS, by="row_id"))
    requests = list(rows.sort(pl.col("row_id")).iter_rows())
    name = config.model
    model = resolve_model(
        name, config.revision, config.trust_remote_code, served=config.engine.served(name)
    )
    if model.identity() != stage["identity"]["model"]:
        raise ConfigError(
            f"{name}: not the model any more that {rollouts} was sampled with. Sample again with"
            " this one, into another folder."
        )
    engine_config = config.engine.model_copy(update={"max_num_seqs": at_once})
    with contextlib.closing(start_engine(model, engine_config, config.trust_remote_code)) as engine:
        # The first requests find cold caches.
        _answer(engine, config, requests[:at_once], at_once)
        return _answer(engine, config, requests, at_once)


def _answer(
    engine: Engine, config: RolloutsConfig, requests: Sequence[tuple[str, list[int]]], at_once: int
) -> Served:
    waiting, begun = deque(requests), dict[str, float]()
    each, tokens, start = list[float](), 0, time.monotonic()
    while waiting or engine.in_flight:
        while waiting and engine.in_flight < at_once:
            row_id, prompt_ids = waiting.popleft()
            begun[row_id] = time.monotonic()
            try:
                engine.submit_generate(row_id, prompt_ids, config.sampling, seed_of(row_id))
            except RequestError as error:
                raise ConfigError(f"{config.model}: {error}") from error
        for result in engine.step():
            if isinstance(result, Refused):
                raise ConfigError(f"{config.model}: {result.message}")
            assert isinstance(result, Completion)
            each.append(time.monotonic() - begun[result.key])
            tokens += len(result.token_ids)
    return Served(len(requests), time.monotonic() - start, each, tokens)


def _cost(rollouts: Path) -> float | None:
    """Return the seconds that the rounds took of the pipeline run in which the `rollouts` are; None
    where they are in none."""
    run = rollouts.resolve().parents[1]
    if not (run / "finished.jsonl").is_file():
        return None
    steps = pipeline_status(run)["steps"]
    took = (step["seconds"] for step in steps if "evaluate" not in step["label"])
    return sum(seconds for seconds in took if seconds is not None) or None
