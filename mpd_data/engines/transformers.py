"""The transformers engine, for machines where vLLM does not install.

Generation is transformers' own `generate` over a left-padded batch, with two small hooks. The
sampler draws each row's tokens from the row's own seed, by position, so that neither the batch nor
a restart changes them. The stopping rule ends a batch as soon as half of it has finished, or after
some tokens: what has finished is returned, and the rest continues in the next batch next to new
requests, so that no row waits for the slowest one.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    StoppingCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from mpd_data.common.errors import EngineError, MPDError, reason_of, requires
from mpd_data.common.machine import free_gpu_memory
from mpd_data.common.models import ModelFiles, has_softcap, load_tokenizer
from mpd_data.common.weights import load_model
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines.protocol import Completion, Scores
from mpd_data.prompts.special import turn_of

_BATCHED_TOKENS = 2048
# Tokens of a row in one step, so that finished rows are returned soon.
_STEP_TOKENS = 256


@dataclass
class _Row:
    """A continuation in progress: the prompt, and the tokens so far."""

    key: str
    prompt_ids: list[int]
    sampling: SamplingConfig
    seed: int
    limit: int  # of completion tokens
    completion_ids: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion_ids


class _ToScore(NamedTuple):
    key: str
    ids: list[int]
    num_targets: int
    k: int


class TransformersEngine:
    """A model in this process, on the GPU if there is one. Raise EngineError where the model
    cannot be loaded."""

    def __init__(
        self, model: ModelFiles, config: EngineConfig, trust_remote_code: bool, context: int
    ) -> None:
        logging.disable_progress_bar()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model: Any = load_model(model, trust_remote_code, dtype=config.dtype)
            if config.dtype == "auto" and self._model.dtype == torch.float32:
                # "auto" means the same with every engine: vLLM runs float32 weights in bfloat16.
                self._model.to(torch.bfloat16)
            if has_softcap(self._model.config):
                # transformers' default silently leaves the cap out.
                self._model.set_attn_implementation("eager")
            if model.adapter is not None:
                self._model = _adapted(self._model, model)
            self._model.to(self._device).eval()
        except MPDError:
            raise
        except Exception as error:  # transformers raises all kinds
            reason = reason_of(error)
            raise EngineError(
                f"{model.name}: transformers cannot load this model: {reason}"
            ) from error
        self.max_model_len = context
        self.max_in_flight = 2 * config.max_num_seqs
        self._max_num_seqs = config.max_num_seqs
        self._batched_tokens = config.max_num_batched_tokens or _BATCHED_TOKENS
        tokenizer = load_tokenizer(model, trust_remote_code)
        turn = turn_of(model, tokenizer, trust_remote_code)
        self._stop_ids, self._spelling = turn.stop_ids, turn.spelling
        # The model's own defaults (a repetition penalty, say) are not the stage's settings.
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._stop_ids, pad_token_id=self._stop_ids[0]
        )
        self._rows: list[_Row] = []
        self._to_score: list[_ToScore] = []

    @property
    def in_flight(self) -> int:
        return len(self._rows) + len(self._to_score)

    def underway(self) -> tuple[int, int]:
        lengths = [len(row.completion_ids) for row in self._rows]
        return sum(length > 0 for length in lengths), sum(lengths)

    def submit_generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int,
        logprobs: bool = False, k: int = 0,
    ) -> None:  # fmt: skip
        limit = min(sampling.max_tokens, self.max_model_len - len(prompt_ids))
        self._rows.append(_Row(key, prompt_ids, sampling, seed, limit))

    def submit_score(self, key: str, context_ids: list[int], target_ids: list[int], k: int) -> None:
        self._to_score.append(_ToScore(key, context_ids + target_ids, len(target_ids), k))

    def step(self) -> list[Completion | Scores]:
        try:
            with torch.inference_mode():
                # Scores first: they are short work, and complete rows that wait for them.
                return [*self._score_all(), *(self._generate() if self._rows else ())]
        except FloatingPointError:  # guard.py says what it means
            raise
        except Exception as error:  # out of memory, or a family that lacks what is asked of it
            raise EngineError(
                f"the engine died: {reason_of(error)}. Finished rows are committed; run the same"
                " command again to go on. If it dies again, lower --max-num-seqs (where it dies"
                " while scoring, --max-num-batched-tokens)."
            ) from error

    # -- generation ---------------------------------------------------------------------

    def _generate(self) -> list[Completion]:
        """Advance the oldest rows until half of them have finished, and return those."""
        sampling = self._rows[0].sampling
        rows = [row for row in self._rows if row.sampling == sampling][: self._max_num_seqs]
        ids, mask = self._left_padded([row.ids for row in rows])
        rest = [row.limit - len(row.completion_ids) for row in rows]
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            # No position past the context, also of a row that has ended: LongRoPE and dynamic NTK
            # go by the largest in the batch.
            max_new_tokens=min(max(rest), _STEP_TOKENS, self.max_model_len - ids.shape[1]),
            logits_processor=[_SeededSampler(rows, sampling, ids.shape[1])],
            stopping_criteria=[_HalfDone(rest, self._stop_ids, ids.shape[1])],
        )
        results = []
        for row, tokens, room in zip(rows, output[:, ids.shape[1] :].tolist(), rest, strict=True):
            new = tokens[:room]
            stops = [i for i, token in enumerate(new) if token in self._stop_ids]
            row.completion_ids += new[: stops[0] + 1] if stops else new
            is_stopped = bool(stops) or (bool(sampling.stop) and self._says_stop(row))
            if is_stopped or len(row.completion_ids) == row.limit:
                self._rows.remove(row)
                reason = "stop" if is_stopped else "length"
                results.append(Completion(row.key, row.completion_ids, reason))
        return results

    def _says_stop(self, row: _Row) -> bool:
        text = self._spelling.decode(row.completion_ids, row.prompt_ids)
        return any(one in text for one in row.sampling.stop)

    def _left_padded(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask, int64 [B, T], with the padding on the left."""
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self._stop_ids[0], dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, longest - len(sequence) :] = torch.tensor(sequence)
            mask[i, longest - len(sequence) :] = 1
        return ids.to(self._device), mask.to(self._device)

    # -- scoring ------------------------------------------------------------------------

    def _score_all(self) -> list[Scores]:
        """Score all waiting requests, sequences of similar length together."""
        waiting = sorted(self._to_score, key=lambda request: len(request.ids))
        self._to_score = []
        results: list[Scores] = []
        while waiting:
            longest = len(waiting[-1].ids)
            size = max(1, min(self._max_num_seqs, self._batched_tokens // longest))
            batch, waiting = waiting[-size:], waiting[:-size]
            results += self._score(batch)
        return results

    def _score(self, batch: list[_ToScore]) -> list[Scores]:
        """Run the sequences through the model in blocks, which bounds the positions with logits."""
        ids, mask = self._left_padded([request.ids for request in batch])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        length = ids.shape[1]
        # The state at a position predicts the next token; padding is on the left, so that the
        # targets of all rows end together.
        start = length - 1 - max(request.num_targets for request in batch)
        most = max(request.k for request in batch)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        width = max(1, self._batched_tokens // len(batch))
        cache = None
        for first in range(0, length - 1, width):
            last = min(first + width, length - 1)
            wanted = last - max(first, start)
            output = self._model(
                input_ids=ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=positions[:, first:last],
                past_key_values=cache,
                use_cache=length - 1 > width,
                logits_to_keep=max(wanted, 1),
            )
            cache = output.past_key_values
            if wanted > 0:
                logprobs_btv = output.logits.float().log_softmax(-1)
                best = logprobs_btv.topk(most, dim=-1)
                targets = ids[:, last - wanted + 1 : last + 1, None]
                of_targets = logprobs_btv.gather(-1, targets)[..., 0]
                parts.append((best.indices.int().cpu(), best.values.cpu(), of_targets.cpu()))
        topk_ids, topk_logprobs, logprobs = (
            torch.cat(column, 1).numpy() for column in zip(*parts, strict=True)
        )
        results = []
        for i, (key, _, n, k) in enumerate(batch):
            best = topk_ids[i, -n:, :k], topk_logprobs[i, -n:, :k]
            results.append(Scores(key, *best, logprobs[i, -n:]))
        return results

    def forget(self) -> None:
        pass

    def close(self) -> None:
        del self._model
        free_gpu_memory()


def _adapted(base: Any, model: ModelFiles) -> Any:
    with requires("lora", f"{model.name}: an adapter"):
        from peft import PeftModel
    # In the precision of `base`.
    adapted = PeftModel.from_pretrained(base, str(model.adapter), autocast_adapter_dtype=False)
    return adapted.get_base_model()


class _SeededSampler(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Choose each row's next token by a random number of its own: temperature, top-k, top-p, min-p,
    then the inverse of the cumulative distribution at a number that the row's seed and the token's
    position determine (Philox). All other tokens get -inf."""

    def __init__(self, rows: list[_Row], sampling: SamplingConfig, width: int) -> None:
        self._seeds = [(row.seed, len(row.completion_ids)) for row in rows]
        self._temperature = sampling.temperature
        self._width = width
        self._filters: list[LogitsProcessor] = []
        if sampling.top_k > 0:
            self._filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._filters.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            self._filters.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] -> the same, -inf but for the chosen token of each row. Raise
        FloatingPointError where those of a row are not finite."""
        if not scores.amax(-1).isfinite().all():
            raise FloatingPointError(f"token {input_ids.shape[1] - self._width} of a step")
        if self._temperature == 0:
            return scores
        scores = scores.float() / self._temperature
        for keep in self._filters:
            scores = keep(input_ids, scores)
        new = input_ids.shape[1] - self._width
        numbers = [_uniform(seed, begun + new) for seed, begun in self._seeds]
        # float64: in float32 the sum over a large vocabulary loses the rare tokens.
        cumulative = scores.softmax(-1).double().cumsum(-1)
        at = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None]
        # Below 1 the product stays below the total, so a token of some probability is found.
        chosen = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


def _uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) of this position of the row with this seed."""
    return float(np.random.Philox(key=seed, counter=position).random_raw() >> 11) / 2.0**53


class _HalfDone(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """End a row at its end token or its limit, and the batch when half of its rows have ended."""

    def __init__(self, rest: list[int], stop_ids: list[int], width: int) -> None:
        self._rest = torch.tensor(rest)
        self._stop_ids = torch.tensor(stop_ids)
        self._width = width
        self._ended = torch.zeros(len(rest), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """input_ids [B, T] -> bool [B], true where a row is to end."""
        self._ended |= torch.isin(input_ids[:, -1].cpu(), self._stop_ids)
        self._ended |= self._rest <= input_ids.shape[1] - self._width
        is_half = 2 * int(self._ended.sum()) >= len(self._ended)
        return (torch.ones_like(self._ended) if is_half else self._ended).to(input_ids.device)
