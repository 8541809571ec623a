"""A pass over rewrites that are there: all rows go into a new folder, which takes the place of
distill/ once it is whole.

distill/part-*.parquet -> judge a rollout's rewrites -> (engine: log-probabilities) -> rows
-> .refilter/distill/part-*.parquet -> distill/

Two passes are made so: other rules and another choice (refilter.py), and the student's
choice (likeliest.py). A kill leaves `.refilter/`; the same command goes on from there.
"""

import functools
import itertools
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

from mpd_data.common.errors import EngineError
from mpd_data.common.files import fsync_directory
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Engine, Refused, RequestError, Scores, pump
from mpd_data.store.locks import WHOLE
from mpd_data.store.progress import Progress
from mpd_data.store.round import REFILTERED, RoundDir, is_whole, scratch_of
from mpd_data.store.run_record import write_record
from mpd_data.store.schema import DISTILL_SCHEMA
from mpd_data.store.shards import ROWS_PER_GROUP, open_shard, read_metadata
from mpd_data.store.writer import ShardWriter

# Beside the identity of the rewrites in run.json: what the student that chose is.
_CHOSEN_BY = "chosen_by"
# Columns that are read fast.
LIGHT = [f.name for f in DISTILL_SCHEMA if not str(f.type).startswith("list")]


class Pass(ABC):
    """What happens to the rewrites of one rollout: judge -> (ask the engine -> decide) -> rows.
    `metadata` is that of the shards. The engine is started when the first rewrite needs it, if any
    does."""

    label: str  # names the work in progress lines
    k: int  # log-probabilities per token that the engine is asked for
    in_flight = 0  # SideWork: nothing goes on beside the engine

    def __init__(self, config: RewriteConfig, metadata: dict[str, Any]) -> None:
        self.config = config
        self.metadata = metadata
        self._groups: dict[str, list[dict[str, Any]]] = {}
        self._asked: dict[str, set[str]] = {}

    @abstractmethod
    def judge(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Sets what can be told without the engine; the rows that it is to be asked about."""

    @abstractmethod
    def start_engine(self) -> Engine: ...

    @abstractmethod
    def context_of(self, row: dict[str, Any]) -> list[int]:
        """Token ids that stand before the trace when it is scored."""

    @abstractmethod
    def pass_over(self, row: dict[str, Any]) -> None:
        """The engine's context has no room for this row."""

    @abstractmethod
    def note(self, row: dict[str, Any], scores: Scores) -> None:
        """Takes what the engine says of a row."""

    @abstractmethod
    def decide(self, rows: list[dict[str, Any]]) -> None:
        """All that was asked about a rollout's rewrites is known."""

    def run(
        self, groups: Iterable[list[dict[str, Any]]], writer: ShardWriter, progress: Progress
    ) -> None:
        """Takes all groups through the pass. Raises EngineError where one cannot be scored."""
        self._writer, self._progress = writer, progress
        groups = iter(groups)
        for rows in groups:
            if self.judge(rows):
                rest = itertools.chain([rows], groups)
                submissions = (functools.partial(self._start, rows) for rows in rest)
                with closing(self.start_engine()) as self._engine:
                    for result in pump(self._engine, submissions, self):
                        if isinstance(result, Refused):
                            raise _cannot_be_scored(result.key, result.message)
                        assert isinstance(result, Scores)
                        self._take(result)
                return
            self._finish(rows)

    def advance(self, wait: bool) -> None:
        self._writer.commit_if_due()

    def _start(self, rows: list[dict[str, Any]]) -> None:
        for row in self.judge(rows):
            context = self.context_of(row)
            targets = row["input_ids"][row["loss_start"] :].tolist()
            if len(context) + len(targets) + 1 > self._engine.max_model_len:
                self.pass_over(row)
                continue
            try:
                self._engine.submit_score(row["row_id"], context, targets, self.k)
            except RequestError as error:
                raise _cannot_be_scored(row["row_id"], str(error)) from error
            self._groups[row["row_id"]] = rows
            self._asked.setdefault(row["rollout_id"], set()).add(row["row_id"])
        if rows[0]["rollout_id"] not in self._asked:
            self.decide(rows)
            self._finish(rows)

    def _take(self, scores: Scores) -> None:
        rows = self._groups.pop(scores.key)
        row = next(row for row in rows if row["row_id"] == scores.key)
        self.note(row, scores)
        asked = self._asked[row["rollout_id"]]
        asked.discard(scores.key)
        if not asked:
            del self._asked[row["rollout_id"]]
            self.decide(rows)
            self._finish(rows)

    def _finish(self, rows: list[dict[str, Any]]) -> None:
        self._writer.add(*rows)
        self._progress.update(sum(r["num_rewritten_tokens"] or 0 for r in rows), False, 0)


def rework(
    round_dir: RoundDir,
    work: Pass,
    identity: dict[str, Any],
    chosen_by: dict[str, str] | None = None,
) -> None:
    """Takes all rewrites of `round_dir`, which the caller holds by the lock `refilter`, through
    `work`, and puts them in their old ones' place, under the settings `identity`. `chosen_by`: the
    student that has chosen then."""
    scratch = scratch_of(round_dir)
    with scratch.lock():
        # Rules that changed again since a kill: what the earlier ones left is of no use.
        by_now = {**identity, _CHOSEN_BY: chosen_by}
        if (scratch.saved_stage("distill") or {}).get("identity") != by_now:
            scratch.discard("distill")
        scratch.claim("distill", by_now, {})
        scratch.recover("distill")
        done = scratch.rewritten()
        metadata = read_metadata(round_dir.shard_paths("distill")[0])
        metadata = {k: v for k, v in metadata.items() if k not in ("schema_version", "stage")}
        metadata |= {name: identity[name] for name in REFILTERED}
        output = work.config.output.model_dump()
        status = round_dir.status_path("refilter", WHOLE)
        with (
            ShardWriter(scratch, "distill", metadata, **output) as writer,
            Progress(work.label, len(round_dir.rewritten()), status) as progress,
        ):
            progress.skip(len(done))
            groups = (rows for rows in _groups(round_dir) if rows[0]["rollout_id"] not in done)
            work.run(groups, writer, progress)
        (scratch.path / "complete").touch()
        fsync_directory(scratch.path)
    put_in_place(round_dir, work.config)


def put_in_place(round_dir: RoundDir, config: RewriteConfig) -> None:
    """Replaces distill/ by the rows of a pass that has all of them, if there is one. A kill at any
    step leaves `complete`, and the steps can be done again."""
    scratch = scratch_of(round_dir)
    if not is_whole(scratch):
        return
    if scratch.folder("distill").exists():
        if round_dir.folder("distill").exists():
            round_dir.folder("distill").replace(round_dir.staging / "replaced-distill")
        scratch.folder("distill").replace(round_dir.folder("distill"))
        fsync_directory(round_dir.path)
    if scratch.manifest_path("distill").exists():
        scratch.manifest_path("distill").replace(round_dir.manifest_path("distill"))
    info = round_dir.run_info()
    identity = scratch.run_info()["stages"]["distill"]["identity"]
    chosen_by = identity.pop(_CHOSEN_BY)
    info["stages"]["distill"] |= {
        "identity": identity,
        "details": info["stages"]["distill"]["details"]
        | {"config": config.model_dump(mode="json", exclude={"parts"})},
        _CHOSEN_BY: chosen_by,
    }
    write_record(round_dir.path, "round", info)
    (scratch.path / "complete").unlink()
    shutil.rmtree(scratch.path)
    shutil.rmtree(round_dir.staging / "replaced-distill", ignore_errors=True)


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
                    light = batch.select(LIGHT).to_pylist()
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
