"""Refuse requests that no engine can answer, before an engine sees them.

Engines do not: vLLM samples a token that has no embedding from whatever lies behind the table, and
dies when it scores it; transformers raises an IndexError that ends the job.
"""

from collections.abc import Sequence

from mpd_data.common.ids import unknown_id
from mpd_data.common.models import ModelFiles
from mpd_data.config import SamplingConfig
from mpd_data.engines.protocol import Completion, Engine, Refused, RequestError, Scores


class Guarded:
    """An `inner` engine behind a check of its requests: ids of `model`'s embedding, and room for
    one more token."""

    def __init__(self, inner: Engine, model: ModelFiles) -> None:
        self.inner = inner
        self.max_model_len = inner.max_model_len
        self.max_in_flight = inner.max_in_flight
        self._model = model

    @property
    def in_flight(self) -> int:
        return self.inner.in_flight

    def submit_generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int,
        logprobs: bool = False,
    ) -> None:  # fmt: skip
        self._check(prompt_ids)
        self.inner.submit_generate(key, prompt_ids, sampling, seed, logprobs)

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
        return self.inner.step()

    def close(self) -> None:
        self.inner.close()
