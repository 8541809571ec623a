"""Stage one, second half: the teacher rewrites each rollout, and what is kept is scored.

rollouts -> rewrite prompt -> engine -> check and filter -> engine (log-probabilities of the
rewrite) -> distill/part-*.parquet

Rewriting and scoring share one engine and one loop: a rewrite that passes the filter is
submitted for scoring while others are still being generated. Every rollout gives one row,
rejected ones with the reason in `status` and without log-probabilities.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd_data.checkers import Checker, judge, make_checker
from mpd_data.config import RewriteConfig
from mpd_data.engine import Completion, RequestError, Scores, VLLMEngine, pump
from mpd_data.errors import ConfigError
from mpd_data.models import (
    chat_template_hash,
    load_tokenizer,
    provenance,
    require_same_tokenizer,
    resolve_model,
)
from mpd_data.progress import Progress
from mpd_data.prompts import ChatFormatter, PromptError
from mpd_data.schema import distill_key, seed_of
from mpd_data.shards import RoundDir, read_metadata
from mpd_data.template import RewriteTemplate, load_template
from mpd_data.writer import ShardWriter

_ROLLOUT_COLUMNS = [
    "row_id",
    "prompt_id",
    "round",
    "prompt",
    "prompt_ids",
    "completion",
    "completion_ids",
    "num_completion_tokens",
    "finish_reason",
    "problem",
    "answer",
    "gold_answer",
]


@dataclass(frozen=True)
class Outcome:
    """What the stage left behind: distill rows by status in the whole round, rows this run
    wrote, rows that failed for good (they stand in errors/)."""

    statuses: dict[str, int]
    written: int
    failed: int


def tail_logprobs(
    topk_logprobs: npt.NDArray[np.float32], vocab_size: int
) -> npt.NDArray[np.float64]:
    """Log of the mass outside the top K, [n, K] -> [n]; -inf where K is the whole vocabulary.

    log(1 - sum p) in float64. Two bounds mend what float32 inputs cannot resolve: the mass is
    at most (V - K) times the smallest kept probability, and where the kept ones sum to 1 up to
    rounding the tail is taken as that rounding (or the bound, if smaller), never as zero: a
    zero would make reverse KL infinite.
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
    ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], k: int, vocab_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The k best of [n, K] ids below `vocab_size`, most probable first, their log-probabilities
    renormalised by the mass of the padding rows that were dropped. K must exceed k by at least
    the number of padding rows."""
    padding = ids >= vocab_size
    if padding.any():
        mass = np.where(padding, np.exp(logprobs.astype(np.float64)), 0.0).sum(axis=1)
        logprobs = (logprobs - np.log1p(-mass)[:, None]).astype(np.float32)
        order = np.argsort(padding, axis=1, kind="stable")
        ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    return ids[:, :k], logprobs[:, :k]


def as_float16(logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Rounds to float16, the lowest finite value standing for anything below it; -inf stays."""
    lowest = float(np.finfo(np.float16).min)
    bounded = np.where(np.isneginf(logprobs), -np.inf, np.maximum(logprobs, lowest))
    rounded: npt.NDArray[np.float16] = bounded.astype(np.float16)
    return rounded


@dataclass
class Pending:
    """A rollout on its way through the stage."""

    rollout: dict[str, Any]
    teacher_prompt_ids: list[int]
    row: dict[str, Any]


def run_rewrite(config: RewriteConfig, overwrite: bool = False) -> Outcome:
    """Rewrites, filters and scores what the round still owes and commits it shard by shard.

    Raises ConfigError or DataError for bad input and EngineError when the engine dies; rows
    finished before are committed in every case.
    """
    round_dir = RoundDir(config.shards)
    student = _rollout_metadata(round_dir)
    template = load_template(config.template)
    teacher = resolve_model(config.teacher, config.revision, config.trust_remote_code)
    tokenizer = load_tokenizer(teacher, config.trust_remote_code)
    require_same_tokenizer(
        student["tokenizer"], tokenizer, f"the student of {round_dir.path}", config.teacher
    )
    # Rows that one model has beyond the other's are padding of the embedding, not tokens.
    vocab_size = min(student["vocab_size"], teacher.vocab_size)
    k = min(config.num_logprobs, vocab_size)
    row_identity = {
        "teacher": teacher.identity(),
        "template": template.hash(),
        "template_kwargs": config.template_kwargs,
        "chat_template": chat_template_hash(tokenizer),
        "sampling": config.sampling.model_dump(),
        "seed": config.seed,
    }
    identity = {
        **row_identity,
        "num_logprobs": k,
        "score_context": config.score_context,
        "score_template_kwargs": config.score_template_kwargs,
        "dtype": config.engine.dtype,
        # Decides which rows are too_long.
        "max_model_len": config.engine.max_model_len or teacher.context,
    }
    shard_metadata = {
        **identity,
        "teacher": {"name": config.teacher, **teacher.identity()},
        "template": {"name": template.name, "version": template.version, "hash": template.hash()},
        "student": student["model"],
        "round": student["round"],
        "tokenizer": student["tokenizer"],
        "vocab_size": vocab_size,
        "eos_token_id": student["eos_token_id"],
        "score_temperature": 1.0,
        **provenance(),
    }

    with round_dir.lock():
        if overwrite:
            round_dir.discard("distill")
        round_dir.claim("distill", identity, {"config": config.model_dump(mode="json")})
        rollouts = len(round_dir.recover("rollouts"))
        done = round_dir.recover("distill")
        if len(done) >= rollouts:
            return Outcome(_count_statuses(round_dir), 0, 0)
        failures = round_dir.failures()
        # A teacher with more embedding rows than the student may rank padding among its best:
        # with so many more asked for, k others are always left.
        spare = teacher.vocab_size - vocab_size
        engine = VLLMEngine(
            teacher, config.engine, config.trust_remote_code, max_logprobs=k + spare
        )
        output = config.output.model_dump()
        with (
            ShardWriter(round_dir, "distill", shard_metadata, **output) as writer,
            ShardWriter(round_dir, "errors", shard_metadata, **output) as errors,
            Progress("rewrite", rollouts, len(done)) as progress,
        ):
            job = _Job(
                config=config,
                template=template,
                checker=make_checker(student["checker"]),
                tokenizer=tokenizer,
                eos=student["eos_token_id"],
                vocab_size=vocab_size,
                k=k,
                spare=spare,
                engine=engine,
                writer=writer,
                errors=errors,
                failures=failures,
                progress=progress,
            )
            owed = (
                functools.partial(job.start, rollout, row_id)
                for rollout in round_dir.rows("rollouts", _ROLLOUT_COLUMNS)
                if (row_id := distill_key(rollout["row_id"], 0, row_identity)) not in done
            )
            for result in pump(engine, owed, writer.commit_if_due):
                job.take(result)
        return Outcome(_count_statuses(round_dir), writer.rows_committed, job.failed)


@dataclass
class _Job:
    """What happens to one rollout after another: start -> (rewrite) -> judge -> (score) -> row."""

    config: RewriteConfig
    template: RewriteTemplate
    checker: Checker
    tokenizer: Any
    eos: int
    vocab_size: int
    k: int
    spare: int
    engine: VLLMEngine
    writer: ShardWriter
    errors: ShardWriter
    failures: set[str]
    progress: Progress
    failed: int = 0

    def __post_init__(self) -> None:
        self._writing = ChatFormatter(self.tokenizer, self.config.template_kwargs)
        self._scoring = ChatFormatter(self.tokenizer, self.config.score_template_kwargs)
        self._waiting: dict[str, Pending] = {}
        self._control = set(self.tokenizer.all_special_ids)

    def start(self, rollout: dict[str, Any], row_id: str) -> None:
        """Asks for the rewrite of a rollout, or settles it at once where there is none to ask."""
        pending = Pending(rollout, [], _empty_row(row_id, rollout))
        self._waiting[row_id] = pending
        if rollout["finish_reason"] == "length":
            self._finish(pending, "draft_truncated")
            return
        # Control tokens that the student sampled would be obeyed in the teacher's prompt.
        draft = self.tokenizer.decode(rollout["completion_ids"], skip_special_tokens=True)
        message = self.template.message(rollout["problem"], draft)
        try:
            _, prompt_ids = self._writing.render(message)
            _, pending.teacher_prompt_ids = self._scoring.render(message)
            if len(prompt_ids) + self.config.sampling.max_tokens > self.engine.max_model_len:
                self._finish(pending, "too_long")
                return
            sampling = self.config.sampling
            self.engine.submit_generate(row_id, prompt_ids, sampling, seed_of(row_id))
        except (PromptError, RequestError) as error:
            self._fail(pending, error)

    def take(self, result: Completion | Scores) -> None:
        """Handles what the engine finished."""
        pending = self._waiting[result.key]
        if isinstance(result, Scores):
            pending.row |= self._score_columns(result)
            self._finish(pending, "ok")
            return
        status, trace_ids = self._judge(pending, result)
        if status != "ok":
            self._finish(pending, status)
            return
        context = pending.rollout["prompt_ids"]
        if self.config.score_context == "rewrite":
            context = pending.row["teacher_prompt_ids"] = pending.teacher_prompt_ids
        # The engine generates one token after a sequence that it scores.
        if len(context) + len(trace_ids) + 1 > self.engine.max_model_len:
            self._finish(pending, "too_long")
            return
        try:
            self.engine.submit_score(result.key, context, trace_ids, self.k + self.spare)
        except RequestError as error:
            self._fail(pending, error)

    def _judge(self, pending: Pending, completion: Completion) -> tuple[str, list[int]]:
        """Fills the row's fields on the rewrite; returns the first filter that it meets, or
        "ok", and the ids of the trace: the rewrite in the student's own format, tokenised here
        once, its end token included."""
        row, rollout = pending.row, pending.rollout
        stopped = completion.finish_reason == "stop"
        visible = completion.token_ids[:-1] if stopped else completion.token_ids
        row["rewrite"] = self.tokenizer.decode(visible, skip_special_tokens=False)
        row["rewrite_finish_reason"] = completion.finish_reason
        if not stopped:
            return "truncated", []
        trace = self.template.trace_of(row["rewrite"], "</think>" in rollout["completion"])
        answer = None if trace is None else self.checker.extract(trace)
        if trace is None or answer is None:
            return "malformed", []
        if rollout["prompt"].rstrip().endswith("<think>"):
            # Some chat templates open the thinking themselves: the trace goes on from there.
            trace = trace.removeprefix("<think>").lstrip()
        ids = [*self._writing.encode(trace), self.eos]
        if self._control & set(ids[:-1]):
            # The teacher spelled a control token; as an id it would end or restart the turn.
            return "malformed", []
        original = rollout["num_completion_tokens"]
        row |= {
            "rewrite_answer": answer,
            "is_correct": judge(self.checker, answer, rollout["gold_answer"]),
            "num_rewritten_tokens": len(ids),
            "compression_ratio": len(ids) / original,
            "loss_start": len(rollout["prompt_ids"]),
            "input_ids": rollout["prompt_ids"] + ids,
        }
        if rollout["answer"] is None or not self.checker.equal(answer, rollout["answer"]):
            return "answer_changed", ids
        if len(ids) > original:
            return "longer", ids
        return ("incorrect" if row["is_correct"] is False else "ok"), ids

    def _score_columns(self, scores: Scores) -> dict[str, Any]:
        ids, logprobs = drop_padding(scores.topk_ids, scores.topk_logprobs, self.k, self.vocab_size)
        return {
            "topk_ids": ids.reshape(-1),
            "topk_logprobs": as_float16(logprobs).reshape(-1),
            "tail_logprobs": as_float16(tail_logprobs(logprobs, self.vocab_size)),
        }

    def _finish(self, pending: Pending, status: str) -> None:
        del self._waiting[pending.row["row_id"]]
        self.writer.add(pending.row | {"status": status})
        self.progress.update(
            pending.row["num_rewritten_tokens"] or 0, status == "truncated", self.engine.in_flight
        )

    def _fail(self, pending: Pending, error: Exception) -> None:
        row_id = pending.row["row_id"]
        del self._waiting[row_id]
        self.failed += 1
        if row_id not in self.failures:
            self.errors.add(
                {
                    "row_id": row_id,
                    "stage": "rewrite",
                    "prompt_id": pending.rollout["prompt_id"],
                    "message": f"rollout {pending.rollout['row_id']}: {error}",
                }
            )


def _rollout_metadata(round_dir: RoundDir) -> dict[str, Any]:
    paths = round_dir.shard_paths("rollouts")
    if not paths:
        raise ConfigError(
            f"{round_dir.path}: no rollouts here (rollouts/part-*.parquet). Run mpd-gen rollouts"
            " with this folder as --out first."
        )
    return read_metadata(paths[0])


def _empty_row(row_id: str, rollout: dict[str, Any]) -> dict[str, Any]:
    return {
        "row_id": row_id,
        "rollout_id": rollout["row_id"],
        "prompt_id": rollout["prompt_id"],
        "round": rollout["round"],
        "candidate_idx": 0,
        "status": None,
        "rewrite": None,
        "rewrite_finish_reason": None,
        "rewrite_answer": None,
        "keeps_answer": None,
        "is_correct": None,
        "check_error": None,
        "draft_is_correct": None,
        "repetition": None,
        "num_original_tokens": rollout["num_completion_tokens"],
        "num_rewritten_tokens": None,
        "compression_ratio": None,
        "loss_start": None,
        "input_ids": None,
        "teacher_prompt_ids": None,
        "topk_ids": None,
        "topk_logprobs": None,
        "tail_logprobs": None,
    }


def _count_statuses(round_dir: RoundDir) -> dict[str, int]:
    return dict(Counter(row["status"] for row in round_dir.rows("distill", ["status"])))
