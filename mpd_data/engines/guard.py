"""What holds for all engines: refuse requests that none can answer, and answers that are no
numbers; end completions at stop strings.

Engines refuse neither. vLLM samples a token that has no embedding from whatever lies behind the
table, and dies when it scores it; transformers raises an IndexError that ends the job. From logits
that are NaN, of a damaged weight or an overflow, all of them take the token 0.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpd_data.common.errors import EngineError
from mpd_data.common.ids import unknown_id
from mpd_data.common.models import ModelFiles
from mpd_data.config import SamplingConfig
from mpd_data.engines.protocol import Completion, Engine, Refused, RequestError, Scores
from mpd_data.engines.stop_strings import ended
from mpd_data.prompts.special import Turn

# Continuations of which the log-probabilities are looked at, in engines that return them. Those of
# all would cost time, and a model that gives NaN does so from its first tokens, mostly.
_LOOKED_AT = 8


class Guarded:
    """An `inner` engine behind a check of its requests: ids of `model`'s embedding, and room for
    one more token; and of its results, see `step`. `turn`: of the model."""

    def __init__(self, inner: Engine, model: ModelFiles, turn: Turn) -> None:
        self.inner = inner
        self.max_model_len = inner.max_model_len
        self.max_in_flight = inner.max_in_flight
        self._model, self._turn = model, turn
        self._rest = _LOOKED_AT
        # Requests whose log-probabilities are wanted here alone.
        self._own: set[str] = set()
        # Of requests with stop strings: the prompt and these.
        self._stops: dict[str, tuple[list[int], list[str]]] = {}

    @property
    def in_flight(self) -> int:
        return self.inner.in_flight

    def underway(self) -> tuple[int, int] | None:
        return self.inner.underway()

    def submit_generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int,
        logprobs: bool = False, k: int = 0,
    ) -> None:  # fmt: skip
        self._check(prompt_ids)
        looks = self._rest > 0
        self.inner.submit_generate(key, prompt_ids, sampling, seed, logprobs or looks, k)
        self._rest -= looks
        if looks and not logprobs:
            self._own.add(key)
        if sampling.stop:
            self._stops[key] = prompt_ids, sampling.stop

    def submit_score(self, key: str, context_ids: list[int], target_ids: list[int], k: int) -> None:
        self._check(context_ids + target_ids)
        self.inner.submit_score(key, context_ids, target_ids, k)

    def _check(self, ids: list[int]) -> None:
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"{len(ids)} tokens leave no room in the context of {self.max_model_len}"
            )
        if problem := unknown_id(ids, self._model.vocab_size, self._model.name):
            raise RequestError(problem)

    def step(self) -> Sequence[Completion | Scores | Refused]:
        """Do what the protocol says. Raise EngineError, too, where the engine raises
        FloatingPointError, where scores are no numbers, and where the log-probabilities of one of
        the first continuations are none."""
        try:
            return [self._ended(self._looked_at(result)) for result in self.inner.step()]
        except FloatingPointError as error:
            raise EngineError(
                f"{self._model.name}: the logits are not finite ({error}), so what would be sampled"
                " or scored means nothing. They overflow in this precision (give --dtype bfloat16,"
                " or float32, and another --out), or the weights are damaged (copy the model"
                " again)."
            ) from error

    def _looked_at(self, result: Completion | Scores | Refused) -> Completion | Scores | Refused:
        scores = result.scores if isinstance(result, Completion) else result
        if isinstance(scores, Scores):
            # A token may have no probability at all, the best one may not.
            best = scores.topk_logprobs[:, 0]
            if np.isnan(scores.topk_logprobs).any() or not np.isfinite(best).all():
                raise FloatingPointError(f"scores of {result.key}")
        if isinstance(result, Completion) and result.logprobs is not None:
            if not np.isfinite(result.logprobs).all():
                raise FloatingPointError(f"tokens of {result.key}")
            if result.key in self._own:
                self._own.discard(result.key)
                return replace(result, logprobs=None)
        return result

    def _ended(self, result: Completion | Scores | Refused) -> Completion | Scores | Refused:
        before, stop = self._stops.pop(result.key, ([], []))
        if isinstance(result, Completion) and stop:
            try:
                return ended(result, before, stop, self._turn)
            except RequestError as error:
                return Refused(result.key, str(error))
        return result

    def forget(self) -> None:
        self._rest = _LOOKED_AT
        self.inner.forget()

    def close(self) -> None:
        self.inner.close()
