"""Let the teacher rewrite each rollout, and score the rewrites that are kept: `mpd-gen rewrite`.

    rollouts -> rewrite prompt -> engine -> rewrite -> check and filter -> engine
    -> log-probabilities of the rewrite -> distill/part-*.parquet

These steps overlap: a rewrite that passes the filters is submitted for scoring while others are
still generated. One that was written in its score context keeps the log-probabilities that it was
sampled from. Every rewrite becomes one row. A rejected one has the reason in `status` and no
log-probabilities. The rows of one rollout are committed together, because one choice is made among
them. When the student measures or chooses (select/student.py), all rewrites that pass are scored,
and the choice follows after the teacher's engine has ended.
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mpd_data.checkers.pool import CheckRequest, Verdict
from mpd_data.common.ids import unknown_id
from mpd_data.common.ngrams import overlap, repetition
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Completion, Refused, RequestError, Scores, StartEngine
from mpd_data.engines.scores import score_columns, scoring_contexts
from mpd_data.engines.start import start_engine
from mpd_data.prompts.chat import PromptError
from mpd_data.prompts.thinking import ThinkingCounter
from mpd_data.rewrite_setup import OMISSION, ROLLOUT_COLUMNS, RewriteSetup, setup, thinks
from mpd_data.select.filters import settle, wants_draft
from mpd_data.select.pass_rates import PassRates
from mpd_data.select.second_pass import put_in_place
from mpd_data.select.student import ask_student
from mpd_data.stage import CheckedRun, Outcome, open_round, open_run
from mpd_data.store.locks import WHOLE
from mpd_data.store.round import RoundDir, is_whole, scratch_of
from mpd_data.store.schema import DISTILL_SCHEMA, WITH_DRAFT, distill_key, seed_of


def run_rewrite(
    config: RewriteConfig, overwrite: bool = False, limit: int | None = None
) -> Outcome:
    """Rewrite, filter and score the rollouts of `config.shards` that have no rewrites yet.

    overwrite: delete the rewrites first. limit: the largest number of rollouts to rewrite.
    The student measures and chooses at the end, if it is asked to, except when this run is one of
    several parts: then its rollouts wait for `run_refilter`.
    Raise ConfigError or DataError for bad input, EngineError when the engine fails. Rows that were
    finished before an error are kept, and the next call resumes from there.
    """
    config.parts.require_one_process("mpd-gen rewrite")
    if config.student_option is None or config.parts.part != WHOLE:
        return distill(setup(config), overwrite, limit)
    round_dir = RoundDir(config.shards)
    if is_whole(scratch_of(round_dir)):
        # An earlier choice was killed while its rows replaced the old ones.
        with round_dir.lock("refilter"):
            put_in_place(round_dir, config)
    outcome = distill(setup(config), overwrite, limit)
    return replace(outcome, statuses=ask_student(config))


def distill(
    prepared: RewriteSetup,
    overwrite: bool = False,
    limit: int | None = None,
    start: StartEngine = start_engine,
) -> Outcome:
    """Run the stage that `run_rewrite` has prepared, without the student's choice. `start` is as
    for `rollouts.sample`."""
    config, student, k = prepared.config, prepared.student, prepared.engine_k
    round_dir, part = RoundDir(config.shards), config.parts.part
    with open_round(round_dir, "distill", config, prepared.identity, overwrite) as opened:
        rates = PassRates(round_dir, round_dir.shard_paths("rollouts"))
        unfinished = opened.rollouts - opened.done
        existing = part.share(opened.rollouts) - part.share(unfinished)
        missing = part.share(unfinished - rates.waiting)
        if waiting := part.share(unfinished) - missing:
            print(
                f"{config.shards}: {waiting:,} rollouts wait until all samples of their prompts are"
                " there. Finish mpd-gen rollouts, then run this command again.",
                file=sys.stderr,
            )
        count = missing if limit is None else min(limit, missing)
        written = failed = 0
        if count:
            checker, formats = student["checker"], student["answer_formats"]
            total = existing + count
            with open_run(opened, prepared.metadata(), checker, formats, total) as run:
                run.progress.skip(existing)
                job = RewriteJob(prepared.at(opened.begun), run, rates)
                run.work(
                    job.submissions(limit), job.take,
                    lambda: start(prepared.teacher, config.engine, config.trust_remote_code, k),
                )  # fmt: skip
            written, failed = run.writer.rows_committed, run.failures.count
        statuses = round_dir.count_statuses()
        return Outcome(sum(statuses.values()), written, failed, missing - count, statuses)


@dataclass
class Group:
    """A rollout and the rows of its rewrites, by row_id. `draft_ids`: the tokens of it that the
    teacher is shown. `written`: scores of rewrites that the teacher wrote as they are scored.
    `unjudged` rewrites are being generated or checked; `unscored` are the keys of requests for the
    teacher's log-probabilities."""

    rollout: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    teacher_prompt_ids: list[int] = field(default_factory=list)
    draft_ids: list[int] = field(default_factory=list)
    written: dict[str, Scores] = field(default_factory=dict)
    unjudged: set[str] = field(default_factory=set)
    unscored: set[str] = field(default_factory=set)

    @property
    def is_part(self) -> bool:
        """Whether the teacher was shown less than a whole draft."""
        is_cut = len(self.draft_ids) < len(self.rollout["completion_ids"])
        return is_cut or self.rollout["finish_reason"] == "length"


@dataclass
class RewriteJob:
    """What happens to one rollout: prompt -> (engine) -> rewrite -> (check) for each candidate
    -> filters and choice -> (engine) -> log-probabilities -> rows."""

    prepared: RewriteSetup
    run: CheckedRun
    rates: PassRates
    # By the key of a request that the engine has: a row's id, for a second score WITH_DRAFT and it.
    _groups: dict[str, Group] = field(default_factory=dict)

    @functools.cached_property
    def _thinking(self) -> ThinkingCounter:
        return ThinkingCounter(self.prepared.tokenizer)

    def submissions(self, limit: int | None = None) -> Iterator[Callable[[], None]]:
        """Yield a call that begins each rollout without rewrites, of the first `limit` alone, if it
        need not wait. Of each 512 the longest come first: at the end they would run alone."""
        opened, part, waiting = self.run.opened, self.prepared.config.parts.part, self.rates.waiting
        rows = opened.round_dir.rows("rollouts", ROLLOUT_COLUMNS, done=opened.done)
        mine = (r for r in rows if part.holds(r["row_id"]) and r["row_id"] not in waiting)
        first = itertools.islice(mine, limit)
        while some := list(itertools.islice(first, 512)):
            for rollout in sorted(some, key=lambda r: -r["num_completion_tokens"]):
                yield functools.partial(self._begin, rollout)

    # -- rewriting --------------------------------------------------------------------

    def _begin(self, rollout: dict[str, Any]) -> None:
        """Ask the teacher to rewrite a rollout, or finish it when there is nothing to ask."""
        run, config = self.run, self.prepared.config
        rows, pass_rate = {}, self.rates.of(rollout["prompt_id"])
        for index in range(config.num_candidates):
            row_id = distill_key(rollout["row_id"], index, self.prepared.row_identity)
            rows[row_id] = _new_row(row_id, index, rollout, pass_rate)
        group = Group(rollout, rows)
        if rollout["finish_reason"] == "length" and not self.prepared.takes_parts(rollout):
            self._finish_without_rewrite(group, "draft_truncated")
            return
        if not wants_draft(rollout["is_correct"], config.filters):
            self._finish_without_rewrite(group, "draft_rejected")
            return
        run.failures.tried += len(rows)
        if not self.prepared.template.asks:
            self._take_draft(group)
            return
        try:
            asked = self.prepared.ask_about(rollout)
            if asked is None:
                self._finish_without_rewrite(group, "too_long")
                return
            group.teacher_prompt_ids, group.draft_ids = asked.teacher_prompt_ids, asked.draft_ids
            k = 0
            if config.score_context != "problem" and asked.prompt_ids == asked.teacher_prompt_ids:
                k = self.prepared.engine_k
            for row_id in rows:
                seed = seed_of(row_id)
                run.engine.submit_generate(row_id, asked.prompt_ids, config.sampling, seed, k=k)
                group.unjudged.add(row_id)
                self._groups[row_id] = group
        except (PromptError, RequestError) as error:
            # All rewrites of a rollout have the same prompt, so none of them was accepted.
            run.progress.fail()
            for row_id in list(rows):
                self._fail(group, row_id, error)

    def take(self, result: Completion | Scores | Refused) -> None:
        """Take what the engine finished: a rewrite, its log-probabilities, or a refusal."""
        row_id, group = result.key.removeprefix(WITH_DRAFT), self._groups.pop(result.key)
        if isinstance(result, Completion):
            trace = self._lay_out(group, group.rows[row_id], result)
            if trace is None:
                self._judged(group, row_id)
            else:
                self._check(group, row_id, trace)
            return
        if isinstance(result, Scores):
            # A row that was refused in its other context is gone.
            if row_id in group.rows:
                self._set_scores(group.rows[row_id], result, result.key.removesuffix(row_id))
        else:
            self._fail(group, row_id, f"the engine refused it: {result.message}")
            if row_id in group.unjudged:
                self._judged(group, row_id)
                return
        group.unscored.discard(result.key)
        self._finish_if_complete(group)

    def _take_draft(self, group: Group) -> None:
        """Use the draft as its own rewrite, id for id."""
        rollout = group.rollout
        group.draft_ids = rollout["completion_ids"]
        ((row_id, row),) = group.rows.items()
        row |= {"rewrite": rollout["completion"], "rewrite_finish_reason": "stop"}
        row |= self._trace_columns(rollout, rollout["completion"], rollout["completion_ids"])
        group.unjudged.add(row_id)
        self._check(group, row_id, rollout["completion"])

    def _lay_out(self, group: Group, row: dict[str, Any], completion: Completion) -> str | None:
        """Fill the columns of a rewrite. Return its trace: the rewrite in the student's format,
        tokenised here once with its end token. Return None, and set a status, if it has none."""
        rollout, prepared = group.rollout, self.prepared
        stopped = completion.finish_reason == "stop"
        visible = completion.token_ids[:-1] if stopped else completion.token_ids
        row["rewrite"] = prepared.teacher_turn.read(visible, group.teacher_prompt_ids)
        row["rewrite_finish_reason"] = completion.finish_reason
        if not stopped:
            row["status"] = "truncated"
            return None
        trace = prepared.template.trace_of(row["rewrite"], thinks(rollout))
        written = None
        if trace is not None and OMISSION.strip() not in trace:
            written = prepared.turn.write(rollout["prompt"], rollout["prompt_ids"], trace)
        if written is None:
            row["status"] = "malformed"
            return None
        if unknown := unknown_id(written[1], prepared.vocab_size, "student or teacher"):
            self._fail(group, row["row_id"], unknown)
            return None
        row |= self._trace_columns(rollout, *written)
        if completion.scores is not None and completion.token_ids == written[1]:
            group.written[row["row_id"]] = completion.scores
        row["draft_overlap"] = overlap(group.draft_ids, written[1])
        if self.prepared.config.score_context != "problem":
            row["teacher_prompt_ids"] = group.teacher_prompt_ids
        return trace

    def _trace_columns(self, rollout: dict[str, Any], trace: str, ids: list[int]) -> dict[str, Any]:
        """Return the columns that follow from a trace, as text and as `ids`, with its end token."""
        return {
            "num_rewritten_tokens": len(ids),
            "num_thinking_tokens": self._thinking.count(rollout["prompt"], trace, ids),
            "compression_ratio": len(ids) / rollout["num_completion_tokens"],
            "repetition": repetition(ids),
            "loss_start": len(rollout["prompt_ids"]),
            "input_ids": rollout["prompt_ids"] + ids,
        }

    # -- checking and choosing --------------------------------------------------------

    def _check(self, group: Group, row_id: str, trace: str) -> None:
        rollout = group.rollout
        metadata = json.loads(rollout["metadata"] or "{}")
        gold, answer = rollout["gold_answer"], rollout["answer"]
        request = CheckRequest(row_id, trace, gold, metadata, answer, rollout["prompt"])
        self.run.check(request, functools.partial(self._take_verdict, group))

    def _take_verdict(self, group: Group, verdict: Verdict) -> None:
        row = group.rows[verdict.key]
        row |= {
            "rewrite_answer": verdict.answer,
            "is_correct": verdict.is_correct,
            # The teacher has not seen the answer of a part, if there is one: the gold one counts.
            "keeps_answer": verdict.is_correct if group.is_part else verdict.keeps_answer,
            "check_error": verdict.error,
        }
        if verdict.error is not None:
            row["status"] = "check_failed"
        elif verdict.answer is None:
            row["status"] = "malformed"
        self._judged(group, verdict.key)

    def _judged(self, group: Group, row_id: str) -> None:
        """Mark a rewrite as checked. After the last one, filter the group and submit what is kept
        for scoring."""
        group.unjudged.discard(row_id)
        if group.unjudged:
            return
        rows, config = list(group.rows.values()), self.prepared.config
        for row in settle(rows, config.filters, config.choose, config.measures):
            contexts = scoring_contexts(row, config.score_context)
            targets = row["input_ids"][row["loss_start"] :]
            # The engine generates one token after the sequence that it scores.
            if max(map(len, contexts.values())) + len(targets) + 1 > self.prepared.context:
                row["status"] = "too_long"
                continue
            known = group.written.get(row["row_id"])
            try:
                for prefix, context in contexts.items():
                    key = prefix + row["row_id"]
                    if known is not None and context == group.teacher_prompt_ids:
                        self._set_scores(row, known, prefix)
                        continue
                    self.run.engine.submit_score(key, context, targets, self.prepared.engine_k)
                    group.unscored.add(key)
                    self._groups[key] = group
            except RequestError as error:
                self._fail(group, row["row_id"], error)
        self._finish_if_complete(group)

    def _set_scores(self, row: dict[str, Any], scores: Scores, prefix: str) -> None:
        row |= score_columns(scores, self.prepared.k, self.prepared.vocab_size, prefix)

    # -- writing ----------------------------------------------------------------------

    def _finish_if_complete(self, group: Group) -> None:
        """Write the rows of a group together once nothing of it waits for scores."""
        if group.unscored:
            return
        rows = list(group.rows.values())
        self.run.writer.add(*rows)
        tokens = sum(row["num_rewritten_tokens"] or 0 for row in rows)
        truncated = sum(row["status"] == "truncated" for row in rows)
        kept = {row["row_id"] for row in rows if row["status"] == "ok"}
        self.run.progress.update(tokens, truncated, len(kept), len(kept & group.written.keys()))

    def _finish_without_rewrite(self, group: Group, status: str) -> None:
        """Write one row for a rollout that gets no rewrite, whatever --num-candidates is."""
        row_id, row = next(iter(group.rows.items()))
        group.rows = {row_id: row | {"status": status}}
        self._finish_if_complete(group)

    def _fail(self, group: Group, row_id: str, error: Exception | str) -> None:
        """Move a rewrite from its group to errors/, once."""
        if group.rows.pop(row_id, None) is not None:
            message = f"rollout {group.rollout['row_id']}: {error}"
            self.run.failures.add(row_id, group.rollout["prompt_id"], message)


def _new_row(
    row_id: str, candidate_idx: int, rollout: dict[str, Any], pass_rate: float | None
) -> dict[str, Any]:
    """Return a distill row before its rewrite: what it takes from its rollout, and nulls."""
    return dict.fromkeys(DISTILL_SCHEMA.names) | {
        "row_id": row_id,
        "rollout_id": rollout["row_id"],
        "prompt_id": rollout["prompt_id"],
        "round": rollout["round"],
        "candidate_idx": candidate_idx,
        "draft_is_correct": rollout["is_correct"],
        "num_original_tokens": rollout["num_completion_tokens"],
        "pass_rate": pass_rate,
    }
