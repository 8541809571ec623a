"""From an engine's scores to the log-probability columns of a shard."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd_data.engines.protocol import Float32s, Int32s, Scores
from mpd_data.store.schema import WITH_DRAFT


def scoring_contexts(row: Mapping[str, Any], score_context: str) -> dict[str, list[int]]:
    """Return the token ids after which the teacher scores a distill row's trace, by how the names
    of the score columns begin: "", and WITH_DRAFT for the second context of `both`."""
    problem, rewrite = row["input_ids"][: row["loss_start"]], row["teacher_prompt_ids"]
    contexts = {
        "problem": {"": problem},
        "rewrite": {"": rewrite},
        "both": {"": problem, WITH_DRAFT: rewrite},
    }[score_context]
    return {prefix: np.asarray(ids).tolist() for prefix, ids in contexts.items()}


def tail_logprobs(topk_logprobs: Float32s, vocab_size: int) -> npt.NDArray[np.float64]:
    """Return the log of the mass outside the top K, [n, K] -> [n]; -inf where K is the whole
    vocabulary.

    It is log(1 - sum p) in float64, with two corrections for what float32 inputs cannot resolve.
    The mass is at most (V - K) times the smallest of the K probabilities. Where these sum to 1 up
    to rounding, the tail is that rounding (or the bound, if smaller), never zero: a zero would make
    reverse KL infinite.
    """
    n, k = topk_logprobs.shape
    if k == vocab_size:
        return np.full(n, -np.inf)
    exact = topk_logprobs.astype(np.float64)
    missing = 1.0 - np.exp(exact).sum(axis=1)
    resolution = float(np.finfo(np.float32).eps)
    bound = exact[:, -1] + np.log(vocab_size - k)
    tail: npt.NDArray[np.float64] = np.minimum(np.log(np.maximum(missing, resolution)), bound)
    return tail


def drop_padding(
    ids: Int32s, logprobs: Float32s, k: int, vocab_size: int
) -> tuple[Int32s, Float32s]:
    """Return the k best of [n, K] ids below `vocab_size`, most probable first, and their
    log-probabilities, renormalised by the mass of the padding rows that are dropped. K must exceed
    k by at least the number of padding rows."""
    padding = ids >= vocab_size
    if padding.any():
        mass = np.where(padding, np.exp(logprobs.astype(np.float64)), 0.0).sum(axis=1)
        logprobs = (logprobs - np.log1p(-mass)[:, None]).astype(np.float32)
        order = np.argsort(padding, axis=1, kind="stable")
        ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    return ids[:, :k], logprobs[:, :k]


def as_float16(logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Round to float16; values below its lowest finite one become that one, -inf stays."""
    lowest = float(np.finfo(np.float16).min)
    bounded = np.where(np.isneginf(logprobs), -np.inf, np.maximum(logprobs, lowest))
    return bounded.astype(np.float16)


def score_columns(scores: Scores, k: int, vocab_size: int, prefix: str = "") -> dict[str, Any]:
    """Return a distill row's score columns, whose names begin with `prefix`: the k best ids below
    `vocab_size`, and the tail."""
    ids, logprobs = drop_padding(scores.topk_ids, scores.topk_logprobs, k, vocab_size)
    return {
        f"{prefix}topk_ids": ids.reshape(-1),
        f"{prefix}topk_logprobs": as_float16(logprobs).reshape(-1),
        f"{prefix}tail_logprobs": as_float16(tail_logprobs(logprobs, vocab_size)),
    }
