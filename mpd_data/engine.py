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

from mpd_data import interrupt
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.errors import ConfigError
from mpd_data.models import ModelFiles

# Settings of an engine that a server was started with.
_THE_SERVERS = (
    "dtype",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "kv_cache_gib",
)


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
        interrupt.check()
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


def context_of(model: ModelFiles, config: EngineConfig) -> int:
    """The context in tokens that the engine runs `model` with. Raises ConfigError for settings
    that do not fit the model or the engine."""
    if config.max_model_len is not None and config.max_model_len > model.context:
        raise ConfigError(
            f"{model.name}: --max-model-len {config.max_model_len} is over the model's context of"
            f" {model.context} tokens."
        )
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if config.backend == "transformers" and (size := getattr(config, name)) > 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} {size}: the transformers backend runs a model on one"
                " device. Use --backend vllm, or leave it out."
            )
    _check_server_settings(config)
    return config.max_model_len or model.context


def _check_server_settings(config: EngineConfig) -> None:
    """Raises ConfigError for settings of a server without one, or that are the server's own."""
    if config.backend != "openai":
        for name in ("base_url", "served_model"):
            if getattr(config, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} goes with --backend openai: add it.")
        return
    if config.base_url is None:
        raise ConfigError(
            "--backend openai needs the server's URL: --base-url http://HOST:8000. Start one with"
            " vllm serve."
        )
    for name in _THE_SERVERS:
        if getattr(config, name) != EngineConfig.model_fields[name].default:
            raise ConfigError(
                f"--{name.replace('_', '-')} is the server's to know with --backend openai: leave"
                " it out here, and start the server with it."
            )


def server_notes(config: EngineConfig) -> list[str]:
    """What a plan does not know of a stage whose model a server runs."""
    if config.backend != "openai":
        return []
    return [f"{config.base_url} was not asked: whether it serves the model shows at the start."]


def start_engine(
    model: ModelFiles,
    config: EngineConfig,
    trust_remote_code: bool = False,
    max_logprobs: int = 1,
) -> Engine:
    """The engine that `config` names, with `model` loaded. `max_logprobs`: the largest K that it
    will be asked to score. Raises EngineError where it cannot start, ConfigError like
    `context_of`."""
    context = context_of(model, config)
    if config.backend == "transformers":
        from mpd_data.transformers_engine import TransformersEngine

        return TransformersEngine(model, config, trust_remote_code, context)
    if config.backend == "openai":
        from mpd_data.openai_engine import OpenAIEngine

        return OpenAIEngine(model, config, trust_remote_code, context, max_logprobs)
    from mpd_data.vllm_engine import VLLMEngine

    return VLLMEngine(model, config, trust_remote_code, context, max_logprobs)
