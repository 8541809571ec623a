"""The generation engine: requests in, results as they finish.

One small protocol serves both stages: `submit_*` adds a request, `step` advances the engine
and returns what finished. A stage keeps a bounded number of requests in flight and refills as
results return, so that no batch waits for its slowest member and memory does not grow with
the job. vLLM is the engine, transformers the one for machines where vLLM does not install, and a
server the one for models that this machine cannot hold; each is imported only when it is started.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mpd_data.common import signals
from mpd_data.common.models import ModelFiles
from mpd_data.config import EngineConfig, SamplingConfig


@dataclass(frozen=True)
class Completion:
    """One sampled continuation. `token_ids` ends with the end token if `finish_reason` is
    "stop"; "length" means cut at the limit."""

    key: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Scores:
    """A model's distributions over the last n tokens of a sequence, row i over token i given
    all before it. `topk_ids` int32 [n, K] and `topk_logprobs` float32 [n, K] (natural log,
    temperature 1), most probable first; `target_logprobs` float32 [n] of the tokens there."""

    key: str
    topk_ids: npt.NDArray[np.int32]
    topk_logprobs: npt.NDArray[np.float32]
    target_logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Refused:
    """The engine refuses this one request, which it found out only after it was submitted; others
    are not affected."""

    key: str
    message: str


class RequestError(ValueError):
    """The engine refuses this one request; others are not affected."""


def require_room(ids: list[int], max_model_len: int) -> None:
    """Raise RequestError where `ids` leave no room for one more token."""
    if len(ids) >= max_model_len:
        raise RequestError(f"{len(ids)} tokens leave no room in the context of {max_model_len}")


class Engine(Protocol):
    """What a stage needs of an engine."""

    max_model_len: int
    max_in_flight: int

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet returned."""

    def submit_generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int
    ) -> None:
        """Asks for one continuation. Raises RequestError if refused."""

    def submit_score(self, key: str, context_ids: list[int], target_ids: list[int], k: int) -> None:
        """Asks for the distributions over `target_ids` after `context_ids`. Raises RequestError
        if refused."""

    def step(self) -> Sequence[Completion | Scores | Refused]:
        """Advances all requests and returns those that finished. Raises EngineError."""

    def close(self) -> None:
        """Gives back what the engine holds. Until then no other can start in this process."""


class StartEngine(Protocol):
    """What gives a stage its engine: `start_engine`, or who has one."""

    def __call__(
        self,
        model: ModelFiles,
        config: EngineConfig,
        trust_remote_code: bool = False,
        max_logprobs: int = 1,
    ) -> Engine: ...


class SideWork(Protocol):
    """Work beside the engine whose results may bring it new requests: checks, and commits."""

    @property
    def in_flight(self) -> int:
        """Pieces of work begun and not finished."""

    def advance(self, wait: bool) -> None:
        """Takes what has finished; `wait`: there is nothing else to do, so wait for something."""


def pump(
    engine: Engine, submissions: Iterable[Callable[[], None]], side: SideWork
) -> Iterator[Completion | Scores | Refused]:
    """Runs `submissions` (each submits a request or a few) through the engine, refilling it as
    results return. The consumer may submit more while iterating, and so may `side`: all are
    drained. `side.advance` runs after each engine step, also where nothing finished. Raises
    KeyboardInterrupt where one got lost."""
    source = iter(submissions)
    exhausted = False
    while True:
        signals.check()
        while not exhausted and max(engine.in_flight, side.in_flight) < engine.max_in_flight:
            submit = next(source, None)
            if submit is None:
                exhausted = True
            else:
                submit()
        if engine.in_flight:
            yield from engine.step()
        side.advance(wait=not engine.in_flight)
        if exhausted and not engine.in_flight and not side.in_flight:
            return
