"""Stage one, second half: the teacher rewrites each rollout, and what is kept is scored.

rollouts -> rewrite prompt -> engine -> check and filter -> engine (log-probabilities of the
rewrite) -> distill/part-*.parquet

Rewriting, checking and scoring go on side by side: a rewrite that passes the filter is submitted
for scoring while others are still being generated. Every rewrite gives one row, rejected ones
with the reason in `status` and without log-probabilities. The rows of one rollout are committed
together, since the choice among them is made once; where the student makes it
(select/likeliest.py), all that pass are scored, and it follows when the teacher's engine has ended.
"""

import functools
import itertools
import json
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mpd_data.checkers.pool import CheckPool, CheckRequest, Verdict
from mpd_data.common.errors import MPDError
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import (
    Completion,
    Engine,
    Refused,
    RequestError,
    Scores,
    StartEngine,
    pump,
)
from mpd_data.engines.scores import score_columns
from mpd_data.engines.start import start_engine
from mpd_data.prompts.chat import PromptError
from mpd_data.rewrite_setup import (
    ROLLOUT_COLUMNS,
    RewriteSetup,
    closes_thinking,
    refuse_half_refiltered,
    setup,
)
from mpd_data.select.filters import settle
from mpd_data.select.likeliest import choose_rewrites
from mpd_data.select.second_pass import put_in_place
from mpd_data.stage import Failures, RewriteOutcome
from mpd_data.store.locks import WHOLE
from mpd_data.store.progress import Progress
from mpd_data.store.round import RoundDir, is_whole, scratch_of
from mpd_data.store.schema import Stage, distill_key, repetition, seed_of
from mpd_data.store.writer import ShardWriter

OVERWRITTEN: tuple[Stage, ...] = ("distill",)


@dataclass
class Group:
    """A rollout and its rewrites on their way through the stage. `unjudged` rewrites are being
    generated or checked, `unscored` ones wait for their log-probabilities."""

    rollout: dict[str, Any]
    teacher_prompt_ids: list[int]
    rows: dict[str, dict[str, Any]]
    unjudged: set[str] = field(default_factory=set)
    unscored: set[str] = field(default_factory=set)


def run_rewrite(
    config: RewriteConfig, overwrite: bool = False, limit: int | None = None
) -> RewriteOutcome:
    """Rewrites, filters and scores what the round still owes, at most `limit` rollouts of it, and
    commits it shard by shard. The student's choice follows where the run is the whole stage; one
    of several parts leaves its rollouts waiting for it.

    Raises ConfigError or DataError for bad input and EngineError when the engine dies; rows
    finished before are committed in every case.
    """
    if config.choose != "likeliest" or config.parts.part != WHOLE:
        return distill(setup(config), overwrite, limit)
    round_dir = RoundDir(config.shards)
    if is_whole(scratch_of(round_dir)):
        # A kill while an earlier choice was put in place.
        with round_dir.lock("refilter"):
            put_in_place(round_dir, config)
    outcome = distill(setup(config), overwrite, limit)
    return replace(outcome, statuses=choose_rewrites(config))


def distill(
    prepared: RewriteSetup,
    overwrite: bool = False,
    limit: int | None = None,
    start: StartEngine = start_engine,
) -> RewriteOutcome:
    """`run_rewrite` from where all is prepared. `start` is as for `rollouts.sample`."""
    config, student, teacher = prepared.config, prepared.student, prepared.teacher
    k, spare, shard_metadata = prepared.k, prepared.spare, prepared.metadata()
    round_dir, part = RoundDir(config.shards), config.parts.part

    with round_dir.lock("rewrite", part):
        refuse_half_refiltered(round_dir)
        if overwrite:
            round_dir.discard(*OVERWRITTEN)
        rollouts = round_dir.recover("rollouts")
        details = {
            "config": config.model_dump(mode="json", exclude={"parts"}),
            "rows": len(rollouts),
        }
        round_dir.claim("distill", prepared.identity, details)
        round_dir.recover("distill")
        done = round_dir.rewritten()
        owing = part.share(rollouts - done)
        now = owing if limit is None else min(limit, owing)
        if not now:
            return RewriteOutcome(round_dir.count_statuses(), 0, 0, owing)
        there = part.share(rollouts) - owing
        failures = round_dir.failures()
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
            Progress("rewrite", there + now, round_dir.status_path("rewrite", part)) as progress,
            closing(start(teacher, config.engine, config.trust_remote_code, k + spare)) as engine,
        ):
            progress.skip(there)
            failed = Failures("rewrite", errors, failures, config.failures)
            job = _Job(prepared, engine, pool, writer, failed, progress)
            owed = (
                functools.partial(job.start, rollout)
                for rollout in round_dir.rows("rollouts", ROLLOUT_COLUMNS, done=done)
                if part.holds(rollout["row_id"])
            )
            progress.engine_started()
            try:
                for result in pump(engine, itertools.islice(owed, limit), job):
                    job.take(result)
            finally:
                # Not worth an error in place of the one that may be on its way.
                with suppress(MPDError, OSError):
                    if (speed := progress.speed(config.engine.backend)) is not None:
                        round_dir.record_speed("distill", speed)
        return RewriteOutcome(
            round_dir.count_statuses(), writer.rows_committed, failed.count, owing - now
        )


@dataclass
class _Job:
    """What happens to one rollout after another: start -> (rewrite -> check) for each candidate
    -> filter and choice -> (score) -> rows."""

    prepared: RewriteSetup
    engine: Engine
    pool: CheckPool
    writer: ShardWriter
    failed: Failures
    progress: Progress

    def __post_init__(self) -> None:
        self.config = self.prepared.config
        self._tokenizer = self.prepared.tokenizer
        self._groups: dict[str, Group] = {}
        self._control = set(self._tokenizer.all_special_ids)

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
        self.progress.tick()

    # -- one rollout after another ----------------------------------------------------

    def start(self, rollout: dict[str, Any]) -> None:
        """Asks for the rewrites of a rollout, or settles it at once where there is none to ask."""
        rows = {}
        for index in range(self.config.num_candidates):
            row = _empty_row(
                distill_key(rollout["row_id"], index, self.prepared.row_identity), rollout
            )
            rows[row["row_id"]] = row | {"candidate_idx": index}
        group = Group(rollout, [], rows)
        if rollout["finish_reason"] == "length":
            self._finish_unasked(group, "draft_truncated")
            return
        self.failed.tried += len(rows)
        if not self.prepared.template.asks:
            self._take_draft(group)
            return
        try:
            asked = self.prepared.ask_about(rollout)
            group.teacher_prompt_ids = asked.teacher_prompt_ids
            if not self.prepared.fits(asked):
                self._finish_unasked(group, "too_long")
                return
            for row_id in rows:
                self.engine.submit_generate(
                    row_id, asked.prompt_ids, self.config.sampling, seed_of(row_id)
                )
                group.unjudged.add(row_id)
                self._groups[row_id] = group
        except (PromptError, RequestError) as error:
            # What holds for the prompt holds for each of its rewrites: none was taken.
            self.progress.fail()
            for row_id in list(rows):
                self._fail(group, row_id, error)

    def take(self, result: Completion | Scores | Refused) -> None:
        """Handles what the engine finished."""
        group = self._groups[result.key]
        if isinstance(result, Refused):
            scoring = result.key in group.unscored
            self._fail(group, result.key, f"the engine refused it: {result.message}")
            if scoring:
                group.unscored.discard(result.key)
                self._finish_if_whole(group)
            else:
                self._judged(group, result.key)
            return
        row = group.rows[result.key]
        if isinstance(result, Scores):
            row |= score_columns(result, self.prepared.k, self.prepared.vocab_size)
            group.unscored.discard(result.key)
            self._finish_if_whole(group)
            return
        trace = self._lay_out(group, row, result)
        if trace is None:
            self._judged(group, result.key)
            return
        self._check(group, result.key, trace)

    def _take_draft(self, group: Group) -> None:
        """The draft stands for its rewrite, id for id."""
        rollout = group.rollout
        (row_id,) = group.rows
        row = group.rows[row_id]
        row |= {"rewrite": rollout["completion"], "rewrite_finish_reason": "stop"}
        row |= _trace_columns(rollout, rollout["completion_ids"])
        group.unjudged.add(row_id)
        self._groups[row_id] = group
        self._check(group, row_id, rollout["completion"])

    def _check(self, group: Group, row_id: str, trace: str) -> None:
        rollout = group.rollout
        self.pool.submit(
            CheckRequest(
                row_id,
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
        row["rewrite"] = self._tokenizer.decode(visible, skip_special_tokens=False)
        row["rewrite_finish_reason"] = completion.finish_reason
        if not stopped:
            row["status"] = "truncated"
            return None
        trace = self.prepared.template.trace_of(row["rewrite"], closes_thinking(rollout))
        if trace is None:
            row["status"] = "malformed"
            return None
        rest = trace
        if rollout["prompt"].rstrip().endswith("<think>"):
            # Some chat templates open the thinking themselves: the trace goes on from there.
            rest = trace.removeprefix("<think>").lstrip()
        ids = [*self.prepared.writing.encode(rest), self.prepared.student["eos_token_id"]]
        if self._control & set(ids[:-1]):
            # The teacher spelled a control token; as an id it would end or restart the turn.
            row["status"] = "malformed"
            return None
        row |= _trace_columns(rollout, ids)
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
        k = self.prepared.k + self.prepared.spare
        for row in settle(rows, self.config.filters, self.config.choose):
            start = row["loss_start"]
            context = row["teacher_prompt_ids"] or row["input_ids"][:start]
            targets = row["input_ids"][start:]
            # The engine generates one token after a sequence that it scores.
            if len(context) + len(targets) + 1 > self.prepared.context:
                row["status"] = "too_long"
                continue
            try:
                self.engine.submit_score(row["row_id"], context, targets, k)
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

    def _fail(self, group: Group, row_id: str, error: Exception | str) -> None:
        """Takes a rewrite out of its group and into errors/."""
        del group.rows[row_id]
        self._groups.pop(row_id, None)
        message = f"rollout {group.rollout['row_id']}: {error}"
        self.failed.add(row_id, group.rollout["prompt_id"], message)


def _trace_columns(rollout: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """What a row says of a trace of `ids`, its end token included."""
    return {
        "num_rewritten_tokens": len(ids),
        "compression_ratio": len(ids) / rollout["num_completion_tokens"],
        "repetition": repetition(ids),
        "loss_start": len(rollout["prompt_ids"]),
        "input_ids": rollout["prompt_ids"] + ids,
    }


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
