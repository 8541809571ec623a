"""The shard contract: columns, allowed values, file metadata and row keys.

Other stages, the trainer and Polars users rely on what this file and docs/contract.md state;
`mpd-gen validate` checks it. A changed meaning, or a column that cannot be null, raises
SCHEMA_VERSION. A new nullable column does not: where older shards lack it, all readers take it as
null.
"""

from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from mpd_data.common.hashing import content_key

SCHEMA_VERSION = 2

FINISH_REASONS = ("stop", "length")

# A rewrite has the first status that applies, in this order. `draft_truncated`: the rollout hit its
# length limit, so it has no answer to keep and the teacher is not asked. Nor is it asked about a
# `draft_rejected`; such a row has a rewrite only where a later filter rejected the draft.
STATUSES = (
    "draft_truncated", "draft_rejected", "too_long", "truncated", "malformed", "check_failed",
    "answer_changed", "longer", "too_short", "copied", "repetitive", "incorrect", "unsupported",
    "not_chosen", "ok",
)  # fmt: skip

# Decided while rewriting: no filter can make such a row usable for training.
UNUSABLE = ("draft_truncated", "too_long", "truncated", "malformed", "check_failed")


def not_asked(table: pa.Table) -> pa.Array:
    """Return for each row of a table with `status` and `num_rewritten_tokens` whether the teacher
    did not rewrite the draft because of its kind."""
    rejected = pc.equal(table["status"], "draft_rejected")
    return pc.and_(rejected, pc.is_null(table["num_rewritten_tokens"]))


# Values from a closed set are plain strings in the file: Arrow dictionary types read back from
# several files become unlike Categoricals in Polars. Writing and `validate` enforce the sets.
ENUMS: dict[str, tuple[str, ...]] = {
    "finish_reason": FINISH_REASONS,
    "rewrite_finish_reason": FINISH_REASONS,
    "status": STATUSES,
}


def _schema(**columns: str) -> pa.Schema:
    """Return the schema of columns, each given by its type; [] marks lists, ? nullable ones."""
    fields = []
    for name, notation in columns.items():
        type_ = pa.type_for_alias(notation.rstrip("[]?"))
        fields.append(
            pa.field(name, pa.list_(type_) if "[]" in notation else type_, "?" in notation)
        )
    return pa.schema(fields)


ROLLOUT_SCHEMA = _schema(
    row_id="string", prompt_id="string", round="int32", sample_idx="int32",
    prompt="string", completion="string", prompt_ids="int32[]", completion_ids="int32[]",
    num_prompt_tokens="int32", num_completion_tokens="int32", finish_reason="string",
    problem="string", answer="string?", gold_answer="string?", is_correct="bool?",
    check_error="string?", repetition="float32", metadata="string?", seed="int64",
    num_thinking_tokens="int32?", sampled_logprobs="float32[]?",
)  # fmt: skip

DISTILL_SCHEMA = _schema(
    row_id="string", rollout_id="string", prompt_id="string", round="int32", candidate_idx="int32",
    status="string", rewrite="string?", rewrite_finish_reason="string?", rewrite_answer="string?",
    keeps_answer="bool?", is_correct="bool?", check_error="string?", draft_is_correct="bool?",
    repetition="float32?", num_original_tokens="int32", num_rewritten_tokens="int32?",
    compression_ratio="float32?", loss_start="int32?", input_ids="int32[]?",
    teacher_prompt_ids="int32[]?", topk_ids="int32[]?", topk_logprobs="float16[]?",
    tail_logprobs="float16[]?", num_thinking_tokens="int32?", draft_overlap="float32?",
    pass_rate="float32?", answer_support="float32?", weakest_step="float32?",
    draft_topk_ids="int32[]?", draft_topk_logprobs="float16[]?", draft_tail_logprobs="float16[]?",
)  # fmt: skip

ERROR_SCHEMA = _schema(row_id="string", stage="string", prompt_id="string", message="string")

SCHEMAS: dict[str, pa.Schema] = {
    "rollouts": ROLLOUT_SCHEMA, "distill": DISTILL_SCHEMA, "errors": ERROR_SCHEMA,
}  # fmt: skip

# Metadata in which shards must agree to lie in one folder or to be trained on together.
SHARED_METADATA = (
    "tokenizer", "vocab_size", "eos_token_id", "num_logprobs", "score_context", "score_temperature",
)  # fmt: skip

# The columns of a score: ids and log-probabilities of the top K, and the log of the other mass.
SCORES = ("topk_ids", "topk_logprobs", "tail_logprobs")
# How the score columns of the context with the draft begin, where rewrites are scored in both.
WITH_DRAFT = "draft_"

# The column whose sum the manifest gives as a shard's tokens.
TOKEN_COLUMN = {"rollouts": "num_completion_tokens", "distill": "num_rewritten_tokens"}


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


Stage = Literal["rollouts", "distill", "errors"]
STAGES: tuple[Stage, ...] = ("rollouts", "distill", "errors")

METADATA_KEY = b"mpd"
# The columns that hold row keys.
KEYS = ("row_id", "rollout_id")
