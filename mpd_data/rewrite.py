"""Stage one, second half: the teacher rewrites each rollout, and what is kept is scored.

rollouts -> rewrite prompt -> engine -> check and filter -> engine (log-probabilities of the
rewrite) -> distill/part-*.parquet

Rewriting, checking and scoring go on side by side: a rewrite that passes the filter is submitted
for scoring while others are still being generated. Every rewrite gives one row, rejected ones
with the reason in `status` and without log-probabilities. The rows of one rollout are committed
together, since the choice among them is made once.
"""

import functools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd_data.checks import CheckPool, CheckRequest, Verdict
from mpd_data.config import RewriteConfig
from mpd_data.engine import Completion, Engine, RequestError, Scores, pump, start_engine
from mpd_data.errors import ConfigError
from mpd_data.filters import settle
from mpd_data.models import (
    chat_template_hash,
    load_tokenizer,
    provenance,
    require_same_tokenizer,
    resolve_model,
)
from mpd_data.progress import Progress
from mpd_data.prompts import ChatFormatter, PromptError
from mpd_data.schema import distill_key, repetition, seed_of
from mpd_data.shards import RoundDir, is_whole, read_metadata, scratch_of
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
    "is_correct",
    "metadata",
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
class Group:
    """A rollout and its rewrites on their way through the stage. `unjudged` rewrites are being
    generated or checked, `unscored` ones wait for their log-probabilities."""

    rollout: dict[str, Any]
    teacher_prompt_ids: list[int]
    rows: dict[str, dict[str, Any]]
    unjudged: set[str] = field(default_factory=set)
    unscored: set[str] = field(default_factory=set)


def run_rewrite(config: RewriteConfig, overwrite: bool = False) -> Outcome:
    """Rewrites, filters and scores what the round still owes and commits it shard by shard.

    Raises ConfigError or DataError for bad input and EngineError when the engine dies; rows
    finished before are committed in every case.
    """
    round_dir = RoundDir(config.shards)
    student = _rollout_metadata(round_dir)
    template = load_template(config.template)
    if config.num_candidates > 1 and config.sampling.temperature == 0:
        raise ConfigError(
            f"--num-candidates {config.num_candidates} at --temperature 0 gives the same rewrite so"
            " many times; give a temperature above 0."
        )
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
        "num_candidates": config.num_candidates,
        "choose": config.choose,
        "filters": config.filters.model_dump(),
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
        "backend": config.engine.backend,
        **provenance(),
    }

    with round_dir.lock():
        if is_whole(scratch_of(round_dir)):
            raise ConfigError(
                f"{config.shards}: a refilter was killed while its rows were put in place. Run it"
                " again (--refilter); it takes a moment."
            )
        if overwrite:
            round_dir.discard("distill")
        round_dir.claim("distill", identity, {"config": config.model_dump(mode="json")})
        rollouts = round_dir.recover("rollouts")
        round_dir.recover("distill")
        done = {row["rollout_id"] for row in round_dir.rows("distill", ["rollout_id"])}
        if rollouts <= done:
            return Outcome(_count_statuses(round_dir), 0, 0)
        failures = round_dir.failures()
        # A teacher with more embedding rows than the student may rank padding among its best:
        # with so many more asked for, k others are always left.
        spare = teacher.vocab_size - vocab_size
        output = config.output.model_dump()
        with (
            CheckPool(
                student["checker"],
                student["answer_formats"],
                config.checks.checker_timeout,
                config.checks.checker_processes,
            ) as pool,
            ShardWriter(round_dir, "distill", shard_metadata, **output) as writer,
            ShardWriter(round_dir, "errors", shard_metadata, **output) as errors,
            Progress("rewrite", len(rollouts), len(done)) as progress,
        ):
            job = _Job(
                config=config,
                row_identity=row_identity,
                template=template,
                tokenizer=tokenizer,
                student_thinks=student["thinking"],
                eos=student["eos_token_id"],
                vocab_size=vocab_size,
                k=k,
                spare=spare,
                engine=start_engine(teacher, config.engine, config.trust_remote_code, k + spare),
                pool=pool,
                writer=writer,
                errors=errors,
                failures=failures,
                progress=progress,
            )
            owed = (
                functools.partial(job.start, rollout)
                for rollout in round_dir.rows("rollouts", _ROLLOUT_COLUMNS)
                if rollout["row_id"] not in done
            )
            for result in pump(job.engine, owed, job):
                job.take(result)
        return Outcome(_count_statuses(round_dir), writer.rows_committed, job.failed)


@dataclass
class _Job:
    """What happens to one rollout after another: start -> (rewrite -> check) for each candidate
    -> filter and choice -> (score) -> rows."""

    config: RewriteConfig
    row_identity: dict[str, Any]
    template: RewriteTemplate
    tokenizer: Any
    student_thinks: bool | None
    eos: int
    vocab_size: int
    k: int
    spare: int
    engine: Engine
    pool: CheckPool
    writer: ShardWriter
    errors: ShardWriter
    failures: set[str]
    progress: Progress
    failed: int = 0

    def __post_init__(self) -> None:
        self._writing = ChatFormatter(
            self.tokenizer,
            self.config.template_kwargs,
            thinking=self.config.thinking,
            default_thinking=False,
        )
        # ỹ is in the student's format, so the teacher is to take it as its own turn would be
        # in that mode.
        self._scoring = ChatFormatter(
            self.tokenizer,
            self.config.score_template_kwargs,
            default_thinking=self.student_thinks is not False,
        )
        self._groups: dict[str, Group] = {}
        self._control = set(self.tokenizer.all_special_ids)

    # -- work beside the engine (SideWork) --------------------------------------------

    @property
    def in_flight(self) -> int:
        """Checks begun and not finished."""
        return self.pool.in_flight

    def advance(self, wait: bool) -> None:
        """Takes finished checks; commits shards that are due by age."""
        for verdict in self.pool.ready(1.0 if wait else 0.0):
            self._take_verdict(verdict)
        self.writer.commit_if_due()

    # -- one rollout after another ----------------------------------------------------

    def start(self, rollout: dict[str, Any]) -> None:
        """Asks for the rewrites of a rollout, or settles it at once where there is none to ask."""
        rows = {}
        for index in range(self.config.num_candidates):
            row = _empty_row(distill_key(rollout["row_id"], index, self.row_identity), rollout)
            rows[row["row_id"]] = row | {"candidate_idx": index}
        group = Group(rollout, [], rows)
        if rollout["finish_reason"] == "length":
            self._finish_unasked(group, "draft_truncated")
            return
        # Control tokens that the student sampled would be obeyed in the teacher's prompt.
        draft = self.tokenizer.decode(rollout["completion_ids"], skip_special_tokens=True)
        message = self.template.message(rollout["problem"], draft)
        sampling = self.config.sampling
        try:
            _, prompt_ids = self._writing.render(message)
            _, group.teacher_prompt_ids = self._scoring.render(message)
            if len(prompt_ids) + sampling.max_tokens > self.engine.max_model_len:
                self._finish_unasked(group, "too_long")
                return
            for row_id in rows:
                self.engine.submit_generate(row_id, prompt_ids, sampling, seed_of(row_id))
                group.unjudged.add(row_id)
                self._groups[row_id] = group
        except (PromptError, RequestError) as error:
            # What holds for the prompt holds for each of its rewrites: none was taken.
            for row_id in list(rows):
                self._fail(group, row_id, error)

    def take(self, result: Completion | Scores) -> None:
        """Handles what the engine finished."""
        group = self._groups[result.key]
        row = group.rows[result.key]
        if isinstance(result, Scores):
            row |= score_columns(result, self.k, self.vocab_size)
            group.unscored.discard(result.key)
            self._finish_if_whole(group)
            return
        trace = self._lay_out(group, row, result)
        if trace is None:
            self._judged(group, result.key)
            return
        rollout = group.rollout
        self.pool.submit(
            CheckRequest(
                result.key,
                trace,
                rollout["gold_answer"],
                json.loads(rollout["metadata"] or "{}"),
                rollout["answer"],
            )
        )

    def _lay_out(self, group: Group, row: dict[str, Any], completion: Completion) -> str | None:
        """Fills the row's fields on the rewrite. Returns the trace (the rewrite in the student's
        own format, tokenised here once, its end token included), or None and a status."""
        rollout = group.rollout
        stopped = completion.finish_reason == "stop"
        visible = completion.token_ids[:-1] if stopped else completion.token_ids
        row["rewrite"] = self.tokenizer.decode(visible, skip_special_tokens=False)
        row["rewrite_finish_reason"] = completion.finish_reason
        if not stopped:
            row["status"] = "truncated"
            return None
        trace = self.template.trace_of(row["rewrite"], "</think>" in rollout["completion"])
        if trace is None:
            row["status"] = "malformed"
            return None
        rest = trace
        if rollout["prompt"].rstrip().endswith("<think>"):
            # Some chat templates open the thinking themselves: the trace goes on from there.
            rest = trace.removeprefix("<think>").lstrip()
        ids = [*self._writing.encode(rest), self.eos]
        if self._control & set(ids[:-1]):
            # The teacher spelled a control token; as an id it would end or restart the turn.
            row["status"] = "malformed"
            return None
        row |= {
            "num_rewritten_tokens": len(ids),
            "compression_ratio": len(ids) / rollout["num_completion_tokens"],
            "repetition": repetition(ids),
            "loss_start": len(rollout["prompt_ids"]),
            "input_ids": rollout["prompt_ids"] + ids,
        }
        if self.config.score_context == "rewrite":
            row["teacher_prompt_ids"] = group.teacher_prompt_ids
        return trace

    def _take_verdict(self, verdict: Verdict) -> None:
        group = self._groups[verdict.key]
        row = group.rows[verdict.key]
        row |= {
            "rewrite_answer": verdict.answer,
            "is_correct": verdict.is_correct,
            "keeps_answer": verdict.keeps_answer,
            "check_error": verdict.error,
        }
        if verdict.error is not None:
            row["status"] = "check_failed"
        elif verdict.answer is None:
            row["status"] = "malformed"
        self._judged(group, verdict.key)

    def _judged(self, group: Group, row_id: str) -> None:
        """One rewrite has its facts; with the last of them the group is filtered and scored."""
        group.unjudged.discard(row_id)
        if group.unjudged:
            return
        rows = list(group.rows.values())
        settle(rows, self.config.filters, self.config.choose)
        for row in rows:
            if row["status"] != "ok":
                continue
            start = row["loss_start"]
            context = row["teacher_prompt_ids"] or row["input_ids"][:start]
            targets = row["input_ids"][start:]
            # The engine generates one token after a sequence that it scores.
            if len(context) + len(targets) + 1 > self.engine.max_model_len:
                row["status"] = "too_long"
                continue
            try:
                self.engine.submit_score(row["row_id"], context, targets, self.k + self.spare)
            except RequestError as error:
                self._fail(group, row["row_id"], error)
                continue
            group.unscored.add(row["row_id"])
        self._finish_if_whole(group)

    def _finish_if_whole(self, group: Group) -> None:
        if group.unscored:
            return
        for row_id in group.rows:
            self._groups.pop(row_id, None)
        rows = list(group.rows.values())
        self.writer.add(*rows)
        self.progress.update(
            sum(row["num_rewritten_tokens"] or 0 for row in rows),
            sum(row["status"] == "truncated" for row in rows),
            self.engine.in_flight,
        )

    def _finish_unasked(self, group: Group, status: str) -> None:
        """A rollout that the teacher is not asked about has one row, whatever --num-candidates."""
        first = next(iter(group.rows))
        group.rows = {first: group.rows[first] | {"status": status}}
        self._finish_if_whole(group)

    def _fail(self, group: Group, row_id: str, error: Exception) -> None:
        """Takes a rewrite out of its group and into errors/."""
        del group.rows[row_id]
        self._groups.pop(row_id, None)
        self.failed += 1
        if row_id not in self.failures:
            self.errors.add(
                {
                    "row_id": row_id,
                    "stage": "rewrite",
                    "prompt_id": group.rollout["prompt_id"],
                    "message": f"rollout {group.rollout['row_id']}: {error}",
                }
            )


def score_columns(scores: Scores, k: int, vocab_size: int) -> dict[str, Any]:
    """A distill row's log-probability columns: the k best below `vocab_size`, and the tail."""
    ids, logprobs = drop_padding(scores.topk_ids, scores.topk_logprobs, k, vocab_size)
    return {
        "topk_ids": ids.reshape(-1),
        "topk_logprobs": as_float16(logprobs).reshape(-1),
        "tail_logprobs": as_float16(tail_logprobs(logprobs, vocab_size)),
    }


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
        "draft_is_correct": rollout["is_correct"],
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
