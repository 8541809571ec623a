"""The shard contract: columns, allowed values, file metadata and row keys.

Other stages, the trainer and Polars users rely on what this file and docs/contract.md state;
`mpd-gen validate` checks it. A change of meaning raises SCHEMA_VERSION.
"""

from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from mpd_data.common.hashing import content_key

SCHEMA_VERSION = 2

FINISH_REASONS = ("stop", "length")

# A rewrite has the first status that applies, in this order. `draft_truncated`: the rollout hit its
# length limit, so it has no answer to keep and the teacher is not asked.
STATUSES = (
    "draft_truncated",
    "too_long",
    "truncated",
    "malformed",
    "check_failed",
    "draft_rejected",
    "answer_changed",
    "longer",
    "too_short",
    "repetitive",
    "incorrect",
    "not_chosen",
    "ok",
)

# Decided while rewriting: no filter can make such a row usable for training.
UNUSABLE = ("draft_truncated", "too_long", "truncated", "malformed", "check_failed")

# Values from a closed set are plain strings in the file (dictionary-encoded by Parquet):
# Arrow dictionary types read back from several files become unlike Categoricals in Polars.
# The sets are enforced on writing and by `validate`.
ENUMS: dict[str, tuple[str, ...]] = {
    "finish_reason": FINISH_REASONS,
    "rewrite_finish_reason": FINISH_REASONS,
    "status": STATUSES,
}


def _field(name: str, type_: pa.DataType, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable)


_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float16())

ROLLOUT_SCHEMA = pa.schema(
    [
        _field("row_id", pa.string()),
        _field("prompt_id", pa.string()),
        _field("round", pa.int32()),
        _field("sample_idx", pa.int32()),
        _field("prompt", pa.string()),
        _field("completion", pa.string()),
        _field("prompt_ids", _IDS),
        _field("completion_ids", _IDS),
        _field("num_prompt_tokens", pa.int32()),
        _field("num_completion_tokens", pa.int32()),
        _field("finish_reason", pa.string()),
        _field("problem", pa.string()),
        _field("answer", pa.string(), nullable=True),
        _field("gold_answer", pa.string(), nullable=True),
        _field("is_correct", pa.bool_(), nullable=True),
        _field("check_error", pa.string(), nullable=True),
        _field("repetition", pa.float32()),
        _field("metadata", pa.string(), nullable=True),
        _field("seed", pa.int64()),
    ]
)

DISTILL_SCHEMA = pa.schema(
    [
        _field("row_id", pa.string()),
        _field("rollout_id", pa.string()),
        _field("prompt_id", pa.string()),
        _field("round", pa.int32()),
        _field("candidate_idx", pa.int32()),
        _field("status", pa.string()),
        _field("rewrite", pa.string(), nullable=True),
        _field("rewrite_finish_reason", pa.string(), nullable=True),
        _field("rewrite_answer", pa.string(), nullable=True),
        _field("keeps_answer", pa.bool_(), nullable=True),
        _field("is_correct", pa.bool_(), nullable=True),
        _field("check_error", pa.string(), nullable=True),
        _field("draft_is_correct", pa.bool_(), nullable=True),
        _field("repetition", pa.float32(), nullable=True),
        _field("num_original_tokens", pa.int32()),
        _field("num_rewritten_tokens", pa.int32(), nullable=True),
        _field("compression_ratio", pa.float32(), nullable=True),
        _field("loss_start", pa.int32(), nullable=True),
        _field("input_ids", _IDS, nullable=True),
        _field("teacher_prompt_ids", _IDS, nullable=True),
        _field("topk_ids", _IDS, nullable=True),
        _field("topk_logprobs", _LOGPROBS, nullable=True),
        _field("tail_logprobs", _LOGPROBS, nullable=True),
    ]
)

ERROR_SCHEMA = pa.schema(
    [
        _field("row_id", pa.string()),
        _field("stage", pa.string()),
        _field("prompt_id", pa.string()),
        _field("message", pa.string()),
    ]
)

SCHEMAS: dict[str, pa.Schema] = {
    "rollouts": ROLLOUT_SCHEMA,
    "distill": DISTILL_SCHEMA,
    "errors": ERROR_SCHEMA,
}

# Metadata in which shards must agree to lie in one folder or to be trained on together.
SHARED_METADATA = (
    "tokenizer",
    "vocab_size",
    "eos_token_id",
    "num_logprobs",
    "score_context",
    "score_temperature",
)

# The column whose sum the manifest gives as a shard's tokens.
TOKEN_COLUMN: dict[str, str | None] = {
    "rollouts": "num_completion_tokens",
    "distill": "num_rewritten_tokens",
    "errors": None,
}


def seed_of(row_id: str) -> int:
    """Return the engine's seed for a row: 48 bits of its key, so that neither the order of the
    input nor a restart changes what is sampled."""
    return int(row_id[:12], 16)


def rollout_key(prompt_id: str, prompt_ids: list[int], sample_idx: int, identity: Any) -> str:
    """Return the key of a rollout. `identity` holds what else determines it: round, sampling
    parameters, model, base seed."""
    return content_key(["rollout", prompt_id, prompt_ids, sample_idx, identity])


def distill_key(rollout_id: str, candidate_idx: int, identity: Any) -> str:
    """Return the key of a rewrite. `identity`: teacher, rewrite template, sampling, base seed."""
    return content_key(["distill", rollout_id, candidate_idx, identity])


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams of `token_ids` that occur earlier in it too; 0 for less than n
    tokens."""
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    grams = set(zip(*(token_ids[i : total + i] for i in range(n)), strict=True))
    return 1.0 - len(grams) / total


Stage = Literal["rollouts", "distill", "errors"]
STAGES: tuple[Stage, ...] = ("rollouts", "distill", "errors")

METADATA_KEY = b"mpd"
