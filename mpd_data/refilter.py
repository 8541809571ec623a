"""`mpd-gen rewrite --refilter`: other rules and another choice over rewrites that are there.

distill/part-*.parquet -> filter and choice -> engine (log-probabilities of what is newly kept)
-> .refilter/distill/part-*.parquet, which takes the place of distill/ once it is whole

Nothing is generated and nothing is thrown away: rows keep the log-probabilities they have, also
where they are rejected now, so that going back costs nothing. A kill leaves `.refilter/`; the
same command goes on from there.
"""

import functools
import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from mpd_data.config import RewriteConfig
from mpd_data.engine import (
    Engine,
    Refused,
    RequestError,
    Scores,
    pump,
    server_notes,
    start_engine,
)
from mpd_data.errors import ConfigError, EngineError
from mpd_data.filters import settle
from mpd_data.locks import WHOLE
from mpd_data.models import ModelFiles, load_tokenizer, require_same_tokenizer, resolve_model
from mpd_data.options import arguments
from mpd_data.plan import StagePlan, as_saved, distill_bytes
from mpd_data.progress import Progress
from mpd_data.rewrite import Outcome
from mpd_data.rewrite_plan import refuse_half_refiltered
from mpd_data.schema import DISTILL_SCHEMA, STATUSES, differences
from mpd_data.scores import score_columns
from mpd_data.shards import (
    ROWS_PER_GROUP,
    RoundDir,
    fsync_directory,
    is_whole,
    open_shard,
    read_metadata,
    scratch_of,
    write_json_atomic,
)
from mpd_data.writer import ShardWriter

# The settings that may differ from those the rewrites were made with.
_CHANGEABLE = ("filters", "choose")
_LIGHT = [f.name for f in DISTILL_SCHEMA if not str(f.type).startswith("list")]


def run_refilter(config: RewriteConfig) -> Outcome:
    """Applies the filters and the choice of `config` to the rewrites in `config.shards`.

    Raises ConfigError where there are none, or where another setting than those changed;
    EngineError when the engine dies: what was scored before is kept, run it again.
    """
    round_dir = RoundDir(config.shards)
    scratch = scratch_of(round_dir)
    with round_dir.lock("refilter"):
        if is_whole(scratch):
            # A kill while an earlier one was put in place.
            _put_in_place(scratch, round_dir, config)
        saved = check_refilter(round_dir, config)
        if (rules := _changed_rules(config, saved)) is not None:
            round_dir.recover("distill")
            _filter_into(scratch, round_dir, config, {**saved, **rules})
            _put_in_place(scratch, round_dir, config)
        counts = round_dir.count_statuses()
        return Outcome(counts, sum(counts.values()), 0)


def check_refilter(round_dir: RoundDir, config: RewriteConfig) -> dict[str, Any]:
    """The identity of the rewrites in `round_dir`. Raises ConfigError where there are none, or
    where another setting than filters and choice changed."""
    saved = round_dir.run_info().get("stages", {}).get("distill")
    if saved is None:
        raise ConfigError(
            f"{config.shards}: no rewrites here to filter anew; run mpd-gen rewrite first."
        )
    identity: dict[str, Any] = saved["identity"]
    given = {
        "num_candidates": config.num_candidates,
        "score_context": config.score_context,
        "seed": config.seed,
        "sampling": config.sampling.model_dump(),
    }
    unlike = differences({name: identity[name] for name in given}, given)
    if unlike:
        raise ConfigError(
            f"{config.shards}: --refilter changes filters and choice, nothing else:\n  "
            + "\n  ".join(unlike)
            + "\nGive the saved settings, or run without --refilter and with --overwrite."
        )
    return identity


def _changed_rules(config: RewriteConfig, saved: dict[str, Any]) -> dict[str, Any] | None:
    """Filters and choice of `config`, None where they are the saved ones."""
    rules = {"filters": config.filters.model_dump(), "choose": config.choose}
    return None if rules == {name: saved[name] for name in rules} else rules


def plan_refilter(config: RewriteConfig) -> StagePlan:
    """What `run_refilter` would do, found without an engine or weights and without writing
    anything. Raises what the run would raise before it starts its engine."""
    round_dir = RoundDir(config.shards)
    refuse_half_refiltered(round_dir)
    saved = check_refilter(round_dir, config)
    unchanged = _changed_rules(config, saved) is None
    paths = round_dir.survey("distill").paths
    before = Counter(round_dir.count_statuses(paths))
    after: Counter[str] = Counter()
    rollouts = unscored = tokens = 0
    # The tails are there where the scores are, and are the smallest of their columns.
    rows = round_dir.rows("distill", [*_LIGHT, "tail_logprobs"], paths)
    for _, group in itertools.groupby(rows, key=lambda row: row["rollout_id"]):
        candidates = sorted(group, key=lambda row: row["candidate_idx"])
        rollouts += 1
        settle(candidates, config.filters, config.choose)
        after.update(row["status"] for row in candidates)
        for row in candidates:
            if row["status"] == "ok" and row["tail_logprobs"] is None:
                unscored += 1
                tokens += row["num_rewritten_tokens"]
    metadata = read_metadata(paths[0]) if paths else {}
    if unscored:
        teacher = _teacher(config, weights=False)
        _require_teacher(config, as_saved(teacher, saved["teacher"]), metadata)
    size = sum(path.stat().st_size for path in paths)
    more = distill_bytes(0, 0, tokens, saved["num_logprobs"], metadata.get("vocab_size", 2))
    return StagePlan(
        command="mpd-gen rewrite --refilter",
        out=str(config.shards),
        settings=arguments(config),
        rows=rollouts,
        committed=rollouts if unchanged else 0,
        owed=0 if unchanged else rollouts,
        disk_bytes=0 if unchanged else size + more,
        details={
            "rewrites to score": unscored,
            "tokens to score": tokens,
            **{
                status: f"{before[status]:,} -> {after[status]:,}"
                for status in STATUSES
                if before[status] or after[status]
            },
        },
        notes=["The rules are those of the rewrites that are there."] * unchanged
        + (server_notes(config.engine) if unscored else []),
    )


def _teacher(config: RewriteConfig, weights: bool = True) -> ModelFiles:
    served = config.engine.served(config.teacher)
    return resolve_model(config.teacher, config.revision, config.trust_remote_code, weights, served)


def _require_teacher(config: RewriteConfig, teacher: ModelFiles, metadata: dict[str, Any]) -> None:
    """Raises ConfigError unless `teacher` made the rewrites that `metadata` is of."""
    if {**teacher.identity(), "name": metadata["teacher"]["name"]} != metadata["teacher"]:
        raise ConfigError(
            f"{config.teacher} is not the teacher that made these rewrites"
            f" ({metadata['teacher']['name']}); newly kept ones need its scores."
        )
    tokenizer = load_tokenizer(teacher, config.trust_remote_code)
    require_same_tokenizer(metadata["tokenizer"], tokenizer, str(config.shards), config.teacher)


def _filter_into(
    scratch: RoundDir, round_dir: RoundDir, config: RewriteConfig, identity: dict[str, Any]
) -> None:
    """Writes all rows of `round_dir` into `scratch` with their new statuses."""
    with scratch.lock():
        # Rules that changed again since a kill: what the earlier ones left is of no use.
        if scratch.run_info().get("stages", {}).get("distill", {}).get("identity") != identity:
            scratch.discard("distill")
        scratch.claim("distill", identity, {})
        scratch.recover("distill")
        done = scratch.rewritten()
        metadata = read_metadata(round_dir.shard_paths("distill")[0])
        metadata = {k: v for k, v in metadata.items() if k not in ("schema_version", "stage")}
        metadata |= {name: identity[name] for name in _CHANGEABLE}
        output = config.output.model_dump()
        total = len(round_dir.rewritten())
        with (
            ShardWriter(scratch, "distill", metadata, **output) as writer,
            Progress("refilter", total, round_dir.status_path("refilter", WHOLE)) as progress,
        ):
            progress.skip(len(done))
            job = _Job(config, metadata, writer, progress)
            groups = (rows for rows in _groups(round_dir) if rows[0]["rollout_id"] not in done)
            # The engine is started when the first rewrite needs it, if any does.
            for rows in groups:
                settle(rows, config.filters, config.choose)
                if job.owes_scores(rows):
                    rest = itertools.chain([rows], groups)
                    submissions = (functools.partial(job.start, rows) for rows in rest)
                    with closing(job.start_engine()) as engine:
                        for result in pump(engine, submissions, job):
                            if isinstance(result, Refused):
                                raise _cannot_be_scored(result.key, result.message)
                            assert isinstance(result, Scores)
                            job.take(result)
                    break
                job.finish(rows)
        (scratch.path / "complete").touch()
        fsync_directory(scratch.path)


@dataclass
class _Job:
    """What happens to the rewrites of one rollout: filter and choice -> (score) -> rows."""

    config: RewriteConfig
    metadata: dict[str, Any]
    writer: ShardWriter
    progress: Progress
    in_flight: int = 0  # SideWork: nothing goes on beside the engine
    _groups: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _unscored: dict[str, set[str]] = field(default_factory=dict)

    def advance(self, wait: bool) -> None:
        self.writer.commit_if_due()

    def start_engine(self) -> Engine:
        config = self.config
        teacher = _teacher(config)
        _require_teacher(config, teacher, self.metadata)
        self._k, self._vocab_size = self.metadata["num_logprobs"], self.metadata["vocab_size"]
        self._asked = self._k + teacher.vocab_size - self._vocab_size
        self._engine = start_engine(teacher, config.engine, config.trust_remote_code, self._asked)
        return self._engine

    @staticmethod
    def owes_scores(rows: list[dict[str, Any]]) -> bool:
        return any(row["status"] == "ok" and row["topk_ids"] is None for row in rows)

    def start(self, rows: list[dict[str, Any]]) -> None:
        """Filters a group and asks for the scores that it lacks."""
        settle(rows, self.config.filters, self.config.choose)
        owed = [row for row in rows if row["status"] == "ok" and row["topk_ids"] is None]
        for row in owed:
            start = row["loss_start"]
            ids = row["input_ids"].tolist()
            given = row["teacher_prompt_ids"]
            context = ids[:start] if given is None else given.tolist()
            if len(context) + len(ids) - start + 1 > self._engine.max_model_len:
                row["status"] = "too_long"
                continue
            try:
                self._engine.submit_score(row["row_id"], context, ids[start:], self._asked)
            except RequestError as error:
                raise _cannot_be_scored(row["row_id"], str(error)) from error
            self._groups[row["row_id"]] = rows
            self._unscored.setdefault(row["rollout_id"], set()).add(row["row_id"])
        if rows[0]["rollout_id"] not in self._unscored:
            self.finish(rows)

    def take(self, scores: Scores) -> None:
        """Handles what the engine finished."""
        rows = self._groups.pop(scores.key)
        row = next(row for row in rows if row["row_id"] == scores.key)
        row |= score_columns(scores, self._k, self._vocab_size)
        owed = self._unscored[row["rollout_id"]]
        owed.discard(scores.key)
        if not owed:
            del self._unscored[row["rollout_id"]]
            self.finish(rows)

    def finish(self, rows: list[dict[str, Any]]) -> None:
        self.writer.add(*rows)
        self.progress.update(sum(r["num_rewritten_tokens"] or 0 for r in rows), False, 0)


def _cannot_be_scored(row_id: str, reason: str) -> EngineError:
    return EngineError(
        f"rewrite {row_id} cannot be scored: {reason}. It passes the rules; raise --max-model-len,"
        " or keep it out by a rule."
    )


def _groups(round_dir: RoundDir) -> Iterator[list[dict[str, Any]]]:
    """The rows of each rollout, in order of candidate_idx: they lie side by side in one shard.
    Lists are numpy arrays; a group of rows at a time is in memory."""

    def rows() -> Iterator[dict[str, Any]]:
        for path in round_dir.shard_paths("distill"):
            with open_shard(path) as file:
                for batch in file.iter_batches(ROWS_PER_GROUP):
                    light = batch.select(_LIGHT).to_pylist()
                    for index, row in enumerate(light):
                        for name in DISTILL_SCHEMA.names:
                            if name not in row:
                                cell = batch.column(name)[index]
                                row[name] = (
                                    cell.values.to_numpy(zero_copy_only=False)
                                    if cell.is_valid
                                    else None
                                )
                        yield row

    for _, group in itertools.groupby(rows(), key=lambda row: row["rollout_id"]):
        yield sorted(group, key=lambda row: row["candidate_idx"])


def _put_in_place(scratch: RoundDir, round_dir: RoundDir, config: RewriteConfig) -> None:
    """Replaces distill/ by the finished scratch folder. A kill at any step leaves `complete`, and
    the steps can be done again."""
    if scratch.folder("distill").exists():
        if round_dir.folder("distill").exists():
            round_dir.folder("distill").replace(round_dir.staging / "replaced-distill")
        scratch.folder("distill").replace(round_dir.folder("distill"))
        fsync_directory(round_dir.path)
    if scratch.manifest_path("distill").exists():
        scratch.manifest_path("distill").replace(round_dir.manifest_path("distill"))
    info = round_dir.run_info()
    info["stages"]["distill"] |= {
        "identity": scratch.run_info()["stages"]["distill"]["identity"],
        "details": info["stages"]["distill"]["details"]
        | {"config": config.model_dump(mode="json", exclude={"parts"})},
    }
    write_json_atomic(round_dir.path / "run.json", info)
    (scratch.path / "complete").unlink()
    shutil.rmtree(scratch.path)
    shutil.rmtree(round_dir.staging / "replaced-distill", ignore_errors=True)
