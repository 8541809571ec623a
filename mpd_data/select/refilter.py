"""Apply changed filters and another choice to rewrites that exist: `mpd-gen rewrite --refilter`.

This is a second pass over the round (second_pass.py). The teacher's engine scores only what is
newly kept. Nothing is generated and nothing is lost: a row that is rejected now keeps its
log-probabilities and what a student measured, so going back needs no engine. Another student's
measures are forgotten when this one is to measure.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.common.hashing import differences
from mpd_data.common.models import ModelFiles, load_tokenizer, require_same_tokenizer
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Engine
from mpd_data.engines.scores import score_columns, scoring_contexts
from mpd_data.engines.start import start_engine
from mpd_data.select.filters import settle, wants_draft
from mpd_data.select.pass_rates import PassRates
from mpd_data.select.second_pass import (
    MEASURED_BY,
    Group,
    Pass,
    Request,
    Row,
    put_in_place,
    rework,
    trace_of,
)
from mpd_data.select.student import choosing_student, decide_by_student
from mpd_data.stage import Outcome, model_of
from mpd_data.store.round import REFILTERED, RoundDir
from mpd_data.store.run_record import require_kind
from mpd_data.store.schema import not_asked
from mpd_data.store.shards import read_metadata


def run_refilter(config: RewriteConfig) -> Outcome:
    """Apply the filters and the choice of `config` to the rewrites in `config.shards`.

    Raise ConfigError when there are no rewrites or another setting changed, EngineError when the
    engine fails: what was scored before is kept, and the next call resumes from there.
    """
    round_dir = RoundDir(config.shards)
    with round_dir.lock("refilter"):
        # An earlier pass may have been killed while its rows replaced the old ones.
        put_in_place(round_dir, config)
        saved = check_refilter(round_dir, config)
        if (rules := changed_rules(config, saved)) is not None:
            round_dir.recover("distill")
            paths = round_dir.shard_paths("distill")
            if not paths:
                raise ConfigError(f"{config.shards}: no rewrites here; run mpd-gen rewrite first.")
            require_asked(config, round_dir, paths)
            metadata = read_metadata(paths[0])
            entry = round_dir.run_info()["stages"]["distill"]
            measured_by = entry.get(MEASURED_BY)
            work = _Refilter(config, metadata, saved)
            if config.student_option is not None:
                # Raise its errors before the pass undoes the choice that was made.
                student = choosing_student(config, metadata["student"], metadata["tokenizer"])
                work.forgets = config.measures and measured_by not in (None, student.identity())
            rework(round_dir, work, {**saved, **rules}, None, None if work.forgets else measured_by)
        if config.student_option is not None:
            decide_by_student(round_dir, config)
        counts = round_dir.count_statuses()
        total = sum(counts.values())
        return Outcome(total, total, 0, statuses=counts)


def check_refilter(round_dir: RoundDir, config: RewriteConfig) -> dict[str, Any]:
    """Return the identity of the rewrites in `round_dir`. Raise ConfigError when there are none,
    or when another setting than the filters and the choice changed."""
    require_kind(round_dir.path, "round")
    saved = round_dir.saved_stage("distill")
    if saved is None:
        raise ConfigError(f"{config.shards}: --refilter needs rewrites; run mpd-gen rewrite first.")
    identity: dict[str, Any] = saved["identity"]
    given = {
        "num_candidates": config.num_candidates,
        "score_context": config.score_context,
        "seed": config.seed,
        "sampling": config.sampling.model_dump(),
        "cut_drafts": config.cut_drafts or None,
    }
    changed = differences({name: identity.get(name) for name in given}, given)
    if changed:
        raise ConfigError(
            f"{config.shards}: --refilter can change only the filters and --choose, not:\n  "
            + "\n  ".join(changed)
            + "\nGive the saved settings, or make new rewrites: --overwrite without --refilter."
        )
    return identity


def changed_rules(config: RewriteConfig, saved: dict[str, Any]) -> dict[str, Any] | None:
    """Return the filters and the choice of `config`, or None if they are the saved ones."""
    rules = {"filters": config.filters.identity(), "choose": config.choose}
    return rules if differences({name: saved.get(name) for name in REFILTERED}, rules) else None


def require_asked(config: RewriteConfig, round_dir: RoundDir, paths: list[Path]) -> None:
    """Raise ConfigError where the filters of `config` admit drafts that were never rewritten."""
    columns = ["status", "num_rewritten_tokens", "draft_is_correct"]
    table = round_dir.table("distill", columns, paths)
    kinds = table.filter(not_asked(table))["draft_is_correct"].to_pylist()
    missing = sum(wants_draft(is_correct, config.filters) for is_correct in kinds)
    if missing:
        raise ConfigError(
            f"{config.shards}: --drafts {config.filters.drafts} admits {missing:,} drafts that the"
            " teacher was not asked to rewrite. Give the --drafts that the rewrites were made with,"
            " or make new rewrites: --overwrite without --refilter."
        )


def require_teacher(
    config: RewriteConfig, teacher: ModelFiles, metadata: dict[str, Any], identity: dict[str, Any]
) -> None:
    """Raise ConfigError unless `teacher` made the rewrites, whose metadata and identity are given,
    with the same engine settings."""
    if {**teacher.identity(), "name": metadata["teacher"]["name"]} != metadata["teacher"]:
        raise ConfigError(
            f"{config.teacher} is not the teacher that made these rewrites"
            f" ({metadata['teacher']['name']}). Give that one: it has to score what is newly kept."
        )
    context = config.engine.max_model_len or teacher.context
    now = {**config.engine.identity, "max_model_len": context}
    names = ("dtype", "engine_kwargs", "max_model_len")
    if changed := differences({name: identity.get(name) for name in names}, now):
        raise ConfigError(
            f"{config.shards}: the teacher scores what is newly kept as it scored the rest, not"
            " with:\n  " + "\n  ".join(changed) + "\nGive the saved settings."
        )
    tokenizer = load_tokenizer(teacher, config.trust_remote_code)
    require_same_tokenizer(
        metadata["tokenizer"], tokenizer, str(config.shards), config.teacher,
        metadata["teacher"]["name"],
    )  # fmt: skip


@dataclass
class _Refilter(Pass):
    """Filter and choose again; the teacher scores what is newly kept. `identity`: of the rewrites.
    `forgets`: what another student measured is dropped."""

    label = "refilter"
    identity: dict[str, Any]
    forgets: bool = False

    @functools.cached_property
    def _rates(self) -> PassRates:
        round_dir = RoundDir(self.config.shards)
        return PassRates(round_dir, round_dir.shard_paths("rollouts"))

    def judge(self, rows: list[Row]) -> list[Row]:
        self._rates.fill(rows)
        if self.forgets:
            for row in rows:
                row |= {"answer_support": None, "weakest_step": None}
        config = self.config
        wanted = settle(rows, config.filters, config.choose, config.measures)
        return [row for row in wanted if row["topk_ids"] is None]

    def start_engine(self) -> Engine:
        config = self.config
        teacher = model_of(config)
        require_teacher(config, teacher, self.metadata, self.identity)
        # The teacher's padding rows may be among its best; `score_columns` drops them.
        self.k = self.metadata["num_logprobs"] + teacher.vocab_size - self.metadata["vocab_size"]
        return start_engine(teacher, config.engine, config.trust_remote_code, self.k)

    def requests(self, row: Row) -> list[Request]:
        """The trace in each context in which the round is scored, under the prefix of its columns
        and the row's key."""
        contexts = scoring_contexts(row, self.metadata["score_context"])
        return [
            Request(prefix + row["row_id"], context, trace_of(row))
            for prefix, context in contexts.items()
        ]

    def decide(self, group: Group) -> None:
        k, vocab_size = self.metadata["num_logprobs"], self.metadata["vocab_size"]
        for row in group.wanted:
            if row["row_id"] not in group.scores:
                row["status"] = "too_long"
                continue
            for prefix in scoring_contexts(row, self.metadata["score_context"]):
                scores = group.scores[prefix + row["row_id"]]
                row |= score_columns(scores, k, vocab_size, prefix)
