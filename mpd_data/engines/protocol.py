"""The engine protocol: what a stage asks of a generation engine, and the loop that feeds one.

`submit_*` adds a request, `step` advances the engine and returns what finished. A stage keeps a
bounded number of requests in flight and adds new ones as results return, so that no request waits
for the slowest one and memory does not grow with the job. There are three engines: vLLM;
transformers, for machines where vLLM does not install; and a server, for models that this machine
cannot hold. Each is imported only when it is started.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mpd_data.common import signals
from mpd_data.common.models import ModelFiles
from mpd_data.config import EngineConfig, SamplingConfig

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """A model's distributions over the last n tokens of a sequence: row i is over token i, given
    all tokens before it. Natural logarithms at temperature 1.

    topk_ids: int32 [n, K], most probable first
    topk_logprobs: float32 [n, K]
    target_logprobs: float32 [n], of the tokens of the sequence
    """

    key: str
    topk_ids: Int32s
    topk_logprobs: Float32s
    target_logprobs: Float32s


@dataclass(frozen=True)
class Completion:
    """One sampled continuation. `token_ids` ends with the end token if `finish_reason` is
    "stop"; "length" means cut at the limit. `logprobs`: of these tokens at temperature 1.
    `scores`: of the same tokens, where they were asked for and the engine has them."""

    key: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    scores: Scores | None = None


@dataclass(frozen=True)
class Refused:
    """The engine refuses this one request, after it was submitted; others are not affected."""

    key: str
    message: str


class RequestError(ValueError):
    """The engine refuses this one request; others are not affected."""


class Engine(Protocol):
    """What a stage needs of an engine."""

    max_model_len: int
    max_in_flight: int

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet returned."""

    def underway(self) -> tuple[int, int] | None:
        """Return how many requests have begun, and their tokens; None where it is not known."""

    def submit_generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int,
        logprobs: bool = False, k: int = 0,
    ) -> None:  # fmt: skip
        """Submit a request for one continuation, with `logprobs` where the engine is not of the
        trainer's own code. With `k` vLLM adds its scores. Raise RequestError if refused."""

    def submit_score(self, key: str, context_ids: list[int], target_ids: list[int], k: int) -> None:
        """Submit a request for the `k` best tokens at each place of `target_ids`, which follow
        `context_ids`. Raise RequestError if refused."""

    def step(self) -> Sequence[Completion | Scores | Refused]:
        """Advance all, return what finished. Raise EngineError, FloatingPointError for NaN."""

    def forget(self) -> None:
        """Forget what is cached of earlier requests, so that the next ones find a new engine."""

    def close(self) -> None:
        """Free what the engine holds. Until then no other engine can start in this process."""


class StartEngine(Protocol):
    """A function that returns an engine for a stage: `start_engine`, or one that keeps engines."""

    def __call__(
        self,
        model: ModelFiles,
        config: EngineConfig,
        trust_remote_code: bool = False,
        max_logprobs: int = 1,
    ) -> Engine: ...


class SideWork(Protocol):
    """Work next to the engine whose results may lead to new requests: checks and commits."""

    @property
    def in_flight(self) -> int:
        """Pieces of work begun and not finished."""

    def advance(self, wait: bool) -> None:
        """Take what has finished. `wait`: nothing else is left to do, so wait for a result."""


def pump(
    engine: Engine, submissions: Iterable[Callable[[], None]], side: SideWork
) -> Iterator[Completion | Scores | Refused]:
    """Run `submissions` (each submits a request or a few) through the engine and yield its results.

    New requests are submitted as results return. The consumer may submit more while iterating, and
    so may `side`; the end comes when none is left. `side.advance` runs after each engine step, also
    where nothing finished. Raise KeyboardInterrupt where one was lost (`signals.check`).
    """
    source = iter(submissions)
    exhausted = False
    while True:
        signals.check()
        while not exhausted and max(engine.in_flight, side.in_flight) < engine.max_in_flight:
            submit = next(source, None)
            exhausted = submit is None
            if submit is not None:
                submit()
        if engine.in_flight:
            yield from engine.step()
        side.advance(wait=not engine.in_flight)
        if exhausted and not engine.in_flight and not side.in_flight:
            return
