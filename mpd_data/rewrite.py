"""Stage one, second half: the teacher rewrites each rollout, and what is kept is scored.

rollouts -> rewrite prompt -> engine -> check and filter -> engine (log-probabilities of the
rewrite) -> distill/part-*.parquet

Rewriting, checking and scoring go on side by side: a rewrite that passes the filter is submitted
for scoring while others are still being generated. Every rewrite gives one row, rejected ones
with the reason in `status` and without log-probabilities. The rows of one rollout are committed
together, since the choice among them is made once.
"""

import functools
import itertools
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
    ModelFiles,
    chat_template_hash,
    context_of,
    device_name,
    load_tokenizer,
    provenance,
    require_same_tokenizer,
    resolve_model,
)
from mpd_data.options import arguments
from mpd_data.plan import (
    Learned,
    Lengths,
    Shown,
    StagePlan,
    as_saved,
    distill_bytes,
    first_reasons,
    learn,
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


# What decides how many bytes a rewritten token takes.
_SIZE = ("num_candidates", "choose", "num_logprobs", "score_context")


@dataclass(frozen=True)
class Outcome:
    """What the stage left behind: distill rows by status in the whole round, rows this run
    wrote, rows that failed for good (they stand in errors/), rollouts still owed after a
    --limit."""

    statuses: dict[str, int]
    written: int
    failed: int
    owed: int = 0


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


@dataclass(frozen=True)
class Asked:
    """What the teacher is asked about a rollout: the rewrite prompt, and the context under which
    the rewrite would be scored with it."""

    text: str
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]


@dataclass(frozen=True)
class Prepared:
    """All that a run settles before it starts an engine. `student` is the rollouts' metadata;
    `spare`: the teacher's embedding rows beyond the student's."""

    config: RewriteConfig
    student: dict[str, Any]
    template: RewriteTemplate
    teacher: ModelFiles
    tokenizer: Any
    writing: ChatFormatter
    scoring: ChatFormatter
    context: int
    vocab_size: int
    k: int
    row_identity: dict[str, Any]
    identity: dict[str, Any]

    @property
    def spare(self) -> int:
        return self.teacher.vocab_size - self.vocab_size

    def metadata(self) -> dict[str, Any]:
        """What the stage's shards say of themselves."""
        template, student = self.template, self.student
        return {
            **self.identity,
            "teacher": {"name": self.config.teacher, **self.teacher.identity()},
            "template": {
                "name": template.name,
                "version": template.version,
                "hash": template.hash(),
            },
            "student": student["model"],
            "round": student["round"],
            "tokenizer": student["tokenizer"],
            "vocab_size": self.vocab_size,
            "eos_token_id": student["eos_token_id"],
            "score_temperature": 1.0,
            "backend": self.config.engine.backend,
            **provenance(),
        }

    def ask(self, problem: str, draft: str) -> Asked:
        """Renders the rewrite prompt. Raises PromptError where it cannot be used."""
        message = self.template.message(problem, draft)
        text, prompt_ids = self.writing.render(message)
        return Asked(text, prompt_ids, self.scoring.render(message)[1])

    def ask_about(self, rollout: dict[str, Any]) -> Asked:
        """The same for a row of rollouts."""
        # Control tokens that the student sampled would be obeyed in the teacher's prompt.
        draft = self.tokenizer.decode(rollout["completion_ids"], skip_special_tokens=True)
        return self.ask(rollout["problem"], draft)

    def fits(self, asked: Asked) -> bool:
        """Whether the teacher's context has room for the prompt and the longest rewrite."""
        return len(asked.prompt_ids) + self.config.sampling.max_tokens <= self.context


def prepare(config: RewriteConfig, student: dict[str, Any], teacher: ModelFiles) -> Prepared:
    """Checks everything that can be checked without an engine. `student`: what the rollouts'
    shards say of themselves. Raises ConfigError."""
    template = load_template(config.template)
    if config.num_candidates > 1 and config.sampling.temperature == 0:
        raise ConfigError(
            f"--num-candidates {config.num_candidates} at --temperature 0 gives the same rewrite so"
            " many times; give a temperature above 0."
        )
    tokenizer = load_tokenizer(teacher, config.trust_remote_code)
    require_same_tokenizer(
        student["tokenizer"], tokenizer, f"the student of {config.shards}", config.teacher
    )
    writing = ChatFormatter(
        tokenizer, config.template_kwargs, thinking=config.thinking, default_thinking=False
    )
    # ỹ is in the student's format, so the teacher is to take it as its own turn would be in that
    # mode.
    scoring = ChatFormatter(
        tokenizer,
        config.score_template_kwargs,
        default_thinking=student["thinking"] is not False,
    )
    context = context_of(teacher, config.engine.max_model_len)
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
        "max_model_len": context,
    }
    return Prepared(
        config=config,
        student=student,
        template=template,
        teacher=teacher,
        tokenizer=tokenizer,
        writing=writing,
        scoring=scoring,
        context=context,
        vocab_size=vocab_size,
        k=k,
        row_identity=row_identity,
        identity=identity,
    )


def plan_rewrite(
    config: RewriteConfig, overwrite: bool = False, limit: int | None = None
) -> StagePlan:
    """What `run_rewrite` would do, found without an engine or weights and without writing
    anything. Raises what the run would raise before it starts its engine."""
    round_dir = RoundDir(config.shards)
    student = _rollout_metadata(round_dir)
    teacher = resolve_model(config.teacher, config.revision, config.trust_remote_code, False)
    saved = round_dir.run_info().get("stages", {}).get("distill")
    if saved is not None and not overwrite:
        teacher = as_saved(teacher, saved["identity"]["teacher"])
    prepared = prepare(config, student, teacher)
    refuse_half_refiltered(round_dir)
    done: set[str] = set()
    if not overwrite:
        round_dir.check("distill", prepared.identity)
        sound = round_dir.survey("distill").paths
        done = {row["rollout_id"] for row in round_dir.rows("distill", ["rollout_id"], sound)}
    sound = round_dir.survey("rollouts").paths
    total = committed = owed = asked_about = 0
    first: Shown | None = None
    reasons: list[str] = []
    unasked: Counter[str] = Counter()
    lengths: list[int] = []
    contexts = kept_at_most = 0
    for rollout in round_dir.rows("rollouts", _ROLLOUT_COLUMNS, sound):
        total += 1
        if rollout["row_id"] in done:
            committed += 1
            continue
        if owed == limit:
            continue
        owed += 1
        if rollout["finish_reason"] == "length":
            unasked["draft_truncated"] += 1
            continue
        prepared.template.layout(closes_thinking(rollout))
        try:
            asked = prepared.ask_about(rollout)
        except PromptError as error:
            reasons.append(f"rollout {rollout['row_id']}: {error}")
            continue
        if not prepared.fits(asked):
            unasked["too_long"] += 1
            continue
        asked_about += 1
        first = first or Shown("first rewrite prompt", asked.text, len(asked.prompt_ids))
        lengths.append(len(asked.prompt_ids))
        contexts += len(rollout["prompt_ids"])
        if config.score_context == "rewrite":
            contexts += len(asked.teacher_prompt_ids)
        longest = int(config.filters.max_ratio * rollout["num_completion_tokens"])
        kept_at_most += min(longest, config.sampling.max_tokens)
    return predict(
        prepared,
        total=total,
        owed=owed,
        asked=asked_about,
        contexts=contexts,
        kept_at_most=kept_at_most,
        shown=[] if first is None else [first],
        prompt_tokens=Lengths.of(lengths),
        committed=committed,
        failing=len(reasons),
        reasons=first_reasons(reasons),
        details={f"not asked: {status}": n for status, n in sorted(unasked.items())},
    )


def predict(
    prepared: Prepared, total: int, owed: int, asked: int, contexts: int, kept_at_most: int,
    **known: Any,
) -> StagePlan:  # fmt: skip
    """The plan for `asked` rollouts that the teacher is asked about, of `owed`: tokens, disk and
    time. `contexts`: tokens of the contexts that are stored with their rewrites; `kept_at_most`:
    tokens of the longest rewrites that the filter keeps, one for each rollout; `known`: other
    fields of the plan."""
    config = prepared.config
    learned = learn_rewrites(prepared)
    rewrites = asked * config.num_candidates
    at_most = rewrites * config.sampling.max_tokens
    stored = config.num_candidates if config.choose == "all" else 1
    expected = seconds = None
    kept = kept_at_most * stored
    if learned is not None:
        expected = min(round(rewrites * learned.tokens_per_row), at_most)
        seconds = learned.seconds(expected)
        kept = min(kept, expected)
    contexts *= config.num_candidates
    disk = distill_bytes(owed, contexts, kept, prepared.k, prepared.vocab_size)
    if learned is not None and expected is not None and learned.has(prepared.identity, _SIZE):
        disk = round(expected * learned.bytes_per_token)
    return StagePlan(
        command="mpd-gen rewrite",
        out=str(config.shards),
        settings=arguments(config),
        rows=total,
        owed=owed,
        tokens_expected=expected,
        tokens_at_most=at_most,
        disk_bytes=disk,
        seconds=seconds,
        device=None if learned is None else learned.device,
        learned_from=None if learned is None else learned.source,
        **known,
    )


def learn_rewrites(prepared: Prepared) -> Learned | None:
    """What rewrites that are there say of those to come."""
    same = ("sampling", "num_candidates", "choose", "filters", "num_logprobs", "score_context")
    return learn(
        prepared.config.shards,
        "distill",
        prepared.student["tokenizer"],
        prepared.config.teacher,
        {name: prepared.identity[name] for name in same},
    )


def run_rewrite(
    config: RewriteConfig, overwrite: bool = False, limit: int | None = None
) -> Outcome:
    """Rewrites, filters and scores what the round still owes, at most `limit` rollouts of it, and
    commits it shard by shard.

    Raises ConfigError or DataError for bad input and EngineError when the engine dies; rows
    finished before are committed in every case.
    """
    round_dir = RoundDir(config.shards)
    student = _rollout_metadata(round_dir)
    teacher = resolve_model(config.teacher, config.revision, config.trust_remote_code)
    prepared = prepare(config, student, teacher)
    k, spare, shard_metadata = prepared.k, prepared.spare, prepared.metadata()

    with round_dir.lock():
        refuse_half_refiltered(round_dir)
        if overwrite:
            round_dir.discard("distill")
        details = {"config": config.model_dump(mode="json")}
        round_dir.claim("distill", prepared.identity, details)
        rollouts = round_dir.recover("rollouts")
        round_dir.recover("distill")
        done = {row["rollout_id"] for row in round_dir.rows("distill", ["rollout_id"])}
        owed_ids = rollouts - done
        if not owed_ids:
            return Outcome(_count_statuses(round_dir), 0, 0)
        now = len(owed_ids) if limit is None else min(limit, len(owed_ids))
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
            Progress("rewrite", len(done) + now, len(done)) as progress,
        ):
            job = _Job(
                prepared=prepared,
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
            progress.engine_started()
            try:
                for result in pump(job.engine, itertools.islice(owed, limit), job):
                    job.take(result)
            finally:
                if (speed := progress.speed()) is not None:
                    made_by = {"device": device_name(), "backend": config.engine.backend}
                    round_dir.record_speed("distill", speed | made_by)
        left = len(owed_ids) - now
        return Outcome(_count_statuses(round_dir), writer.rows_committed, job.failed, left)


def refuse_half_refiltered(round_dir: RoundDir) -> None:
    """Raises ConfigError where a refilter has all its rows and was killed before they took the
    old ones' place."""
    if is_whole(scratch_of(round_dir)):
        raise ConfigError(
            f"{round_dir.path}: a refilter was killed while its rows were put in place. Run it"
            " again (--refilter); it takes a moment."
        )


def closes_thinking(rollout: dict[str, Any]) -> bool:
    """Whether a draft has a thinking part."""
    return "</think>" in rollout["completion"]


@dataclass
class _Job:
    """What happens to one rollout after another: start -> (rewrite -> check) for each candidate
    -> filter and choice -> (score) -> rows."""

    prepared: Prepared
    engine: Engine
    pool: CheckPool
    writer: ShardWriter
    errors: ShardWriter
    failures: set[str]
    progress: Progress
    failed: int = 0

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
            for row_id in list(rows):
                self._fail(group, row_id, error)

    def take(self, result: Completion | Scores) -> None:
        """Handles what the engine finished."""
        group = self._groups[result.key]
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
        k = self.prepared.k + self.prepared.spare
        for row in rows:
            if row["status"] != "ok":
                continue
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
