"""A second pass over the rewrites of a round, which may change which of them are kept.

    distill/ -> judge the rewrites of a rollout -> (engine) -> log-probabilities -> rows
    -> .refilter/distill/ -> distill/

There are two such passes: other filters and another choice (refilter.py), and what the student
measures and chooses (student.py). All rows are written to `.refilter/`, which replaces distill/
when it is complete. After a kill the same command resumes from `.refilter/`.
"""

import functools
import itertools
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mpd_data.common.errors import EngineError
from mpd_data.common.files import fsync_directory
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Completion, Engine, Refused, RequestError, Scores
from mpd_data.stage import StageRun, open_round
from mpd_data.store.keys import KeySet
from mpd_data.store.locks import WHOLE
from mpd_data.store.progress import Progress
from mpd_data.store.round import REFILTERED, RoundDir, is_whole, scratch_of
from mpd_data.store.run_record import write_record
from mpd_data.store.schema import DISTILL_SCHEMA, WITH_DRAFT
from mpd_data.store.shards import read_batches, read_metadata
from mpd_data.store.writer import ShardWriter

# The keys in run.json, next to the identity of the rewrites, for the student that chose among them
# and the one that measured them.
CHOSEN_BY, MEASURED_BY = "chosen_by", "measured_by"
# Columns of single values, which are read fast, and those of lists.
LIGHT = [f.name for f in DISTILL_SCHEMA if not str(f.type).startswith("list")]
_HEAVY = [name for name in DISTILL_SCHEMA.names if name not in LIGHT]


Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """Tokens to score, and those before them."""

    key: str
    context: list[int]
    targets: list[int]


@dataclass
class Group:
    """All rewrites of a rollout, those that need scores, and the scores so far, by their requests'
    keys."""

    rows: list[Row]
    wanted: list[Row]
    waiting: int = 0
    scores: dict[str, Scores] = field(default_factory=dict)


@dataclass
class Pass(ABC):
    """What happens to one rollout: judge its rewrites -> (engine) -> scores -> decide -> rows.
    `metadata` is that of the shards."""

    config: RewriteConfig
    metadata: dict[str, Any]
    label: ClassVar[str]  # names the work in progress lines
    k: int = field(default=1, init=False)  # log-probabilities per token that the engine returns
    run: StageRun = field(init=False)
    _groups: dict[str, Group] = field(default_factory=dict, init=False)

    @abstractmethod
    def judge(self, rows: list[Row]) -> list[Row]:
        """Set what needs no engine. Return the rows that need log-probabilities."""

    @abstractmethod
    def start_engine(self) -> Engine:
        """Start the engine that scores. Called once, when the first row needs it."""

    @abstractmethod
    def decide(self, group: Group) -> None:
        """Set what follows from the scores of the rows that `judge` returned, if any. A row without
        scores does not fit into the engine's context."""

    def requests(self, row: Row) -> list[Request]:
        """Return what is scored of a row: its trace after the student's prompt, under the row's
        key."""
        return [Request(row["row_id"], prompt_of(row), trace_of(row))]

    def submissions(self, rollouts: Iterator[list[Row]]) -> Iterator[Callable[[], None]]:
        """Yield a call that submits each group which needs scores; finish the others."""
        for rows in rollouts:
            group = Group(rows, self.judge(rows))
            if group.wanted:
                yield functools.partial(self._submit, group)
            else:
                self._finish(group)

    def _submit(self, group: Group) -> None:
        limit = self.run.engine.max_model_len
        for row in group.wanted:
            requests = self.requests(row)
            # The engine generates one token after the sequence that it scores.
            if any(len(one.context) + len(one.targets) + 1 > limit for one in requests):
                continue
            for one in requests:
                try:
                    self.run.engine.submit_score(one.key, one.context, one.targets, self.k)
                except RequestError as error:
                    raise _cannot_be_scored(one.key, str(error)) from error
                self._groups[one.key] = group
                group.waiting += 1
        if not group.waiting:
            self._finish(group)

    def take(self, result: Completion | Scores | Refused) -> None:
        """Take scores. Raise EngineError when a row cannot be scored."""
        if isinstance(result, Refused):
            raise _cannot_be_scored(result.key.removeprefix(WITH_DRAFT), result.message)
        assert isinstance(result, Scores)
        group = self._groups.pop(result.key)
        group.scores[result.key] = result
        group.waiting -= 1
        if not group.waiting:
            self._finish(group)

    def _finish(self, group: Group) -> None:
        self.decide(group)
        self.run.writer.add(*group.rows)
        tokens = sum(row["num_rewritten_tokens"] or 0 for row in group.rows)
        self.run.progress.update(tokens, 0)


def prompt_of(row: Row) -> list[int]:
    """Return the ids of the student's prompt."""
    ids: list[int] = row["input_ids"][: row["loss_start"]].tolist()
    return ids


def trace_of(row: Row) -> list[int]:
    """Return the ids of the trace, end token included."""
    ids: list[int] = row["input_ids"][row["loss_start"] :].tolist()
    return ids


def rework(
    round_dir: RoundDir,
    work: Pass,
    identity: dict[str, Any],
    chosen_by: dict[str, str] | None,
    measured_by: dict[str, str] | None,
) -> None:
    """Take all rewrites of a round through `work` and replace the old rows by the new ones.

    The caller holds the round by the lock `refilter`. identity: the settings of the new rows.
    chosen_by: the student that chooses in this pass; measured_by: the one whose measures the new
    rows hold. Raise EngineError when a row cannot be scored.
    """
    scratch = scratch_of(round_dir)
    identity = {**identity, CHOSEN_BY: chosen_by, MEASURED_BY: measured_by}
    saved = scratch.saved_stage("distill")
    # Rows of an earlier pass that was killed are of no use when the rules have changed since.
    overwrite = saved is None or saved["identity"] != identity
    with open_round(scratch, "distill", work.config, identity, overwrite, {}) as opened:
        total = len(round_dir.rewritten())
        metadata = read_metadata(round_dir.shard_paths("distill")[0])
        metadata = {k: v for k, v in metadata.items() if k not in ("schema_version", "stage")}
        metadata |= {name: identity[name] for name in REFILTERED}
        output = work.config.output.model_dump()
        status = round_dir.status_path("refilter", WHOLE)
        with (
            ShardWriter(scratch, "distill", metadata, **output) as writer,
            Progress(work.label, total, status) as progress,
        ):
            progress.skip(len(opened.done))
            work.run = StageRun(opened, writer, progress)
            submissions = work.submissions(_groups(round_dir, opened.done))
            work.run.work(submissions, work.take, work.start_engine)
        (scratch.path / "complete").touch()
        fsync_directory(scratch.path)
    put_in_place(round_dir, work.config)


def put_in_place(round_dir: RoundDir, config: RewriteConfig) -> None:
    """Replace distill/ by the rows of a complete pass, if there is one. After a kill at any step
    the file `complete` still exists, and all steps can be done again."""
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
    entry = info["stages"]["distill"]
    identity = scratch.run_info()["stages"]["distill"]["identity"]
    students = {key: identity.pop(key, None) for key in (CHOSEN_BY, MEASURED_BY)}
    details = entry["details"] | {"config": config.model_dump(mode="json", exclude={"parts"})}
    entry |= {"identity": identity, "details": details, **students}
    write_record(round_dir.path, "round", info)
    (scratch.path / "complete").unlink()
    shutil.rmtree(scratch.path)
    shutil.rmtree(round_dir.staging / "replaced-distill", ignore_errors=True)


def _cannot_be_scored(row_id: str, reason: str) -> EngineError:
    return EngineError(
        f"rewrite {row_id} passes the filters but cannot be scored: {reason}. Raise"
        " --max-model-len, or set a filter that rejects it."
    )


def _groups(round_dir: RoundDir, done: KeySet) -> Iterator[list[Row]]:
    """Yield the rewrites of each rollout that is not done, in order of candidate_idx. They are next
    to each other in one shard. Lists are numpy arrays; one row group at a time is in memory."""

    def rows() -> Iterator[Row]:
        for path in round_dir.shard_paths("distill"):
            for batch in read_batches(path, DISTILL_SCHEMA.names):
                for index, row in enumerate(batch.select(LIGHT).to_pylist()):
                    for name in _HEAVY:
                        values = batch.column(name)[index].values
                        if values is not None:
                            values = values.to_numpy(zero_copy_only=False)
                        row[name] = values
                    yield row

    for rollout_id, group in itertools.groupby(rows(), key=lambda row: row["rollout_id"]):
        if rollout_id not in done:
            yield sorted(group, key=lambda row: row["candidate_idx"])
