"""Run a stage on a round: what rollouts, rewrite and the second pass have in common.

    open_round  lock the round, delete old rows (--overwrite), record or refuse the settings,
                find the rows that exist
    open_run    open the shard writers, the progress display and the check workers
    work        start the engine, submit requests, take results until all are done

A stage adds what happens to one row. The order of these steps makes it safe to kill the process
at any moment: keep it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpd_data.checkers.pool import CheckPool, CheckRequest, Verdict
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.models import ModelFiles, resolve_model
from mpd_data.config import AnswerFormat, RewriteConfig, RolloutsConfig
from mpd_data.engines.protocol import Completion, Engine, Refused, Scores, pump
from mpd_data.failures import Failures
from mpd_data.store.keys import KeySet
from mpd_data.store.progress import Progress
from mpd_data.store.round import RoundDir, is_whole, scratch_of
from mpd_data.store.schema import Stage
from mpd_data.store.writer import ShardWriter

# The command whose rows a folder of the round holds.
COMMANDS: dict[Stage, str] = {"rollouts": "rollouts", "distill": "rewrite"}
# What --overwrite deletes. Rewrites of rollouts that are gone are of no use.
OVERWRITTEN: dict[Stage, tuple[Stage, ...]] = {
    "rollouts": ("rollouts", "distill", "errors"),
    "distill": ("distill",),
}


def model_of(config: RolloutsConfig | RewriteConfig, weights: bool = True) -> ModelFiles:
    """Return the model that a stage runs, as `resolve_model` does."""
    name = config.model if isinstance(config, RolloutsConfig) else config.teacher
    served = config.engine.served(name)
    return resolve_model(name, config.revision, config.trust_remote_code, weights, served)


@dataclass(frozen=True)
class Outcome:
    """What one run of a stage leaves behind.

    total: rows that exist now (rollouts: of this process's part). written: those of this run.
    failed: requests that failed for good, earlier runs included; errors/ has a row for each.
    remaining: what a --limit left over: samples for rollouts, rollouts for rewrite.
    statuses: number of rewrites by status, in the whole round; empty for rollouts.
    """

    total: int
    written: int
    failed: int
    remaining: int = 0
    statuses: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenRound:
    """A round that this process has locked for its part of a stage.

    done: keys of the rollouts that exist (stage "rollouts"), or of the rollouts that have rewrites
    ("distill").
    rollouts: keys of all rollouts to rewrite; empty where the stage does not read them.
    begun: when the stage began here (`RoundDir.claim`).
    """

    round_dir: RoundDir
    stage: Stage
    config: RolloutsConfig | RewriteConfig
    done: KeySet
    rollouts: KeySet
    begun: str | None


@contextlib.contextmanager
def open_round(
    round_dir: RoundDir,
    stage: Stage,
    config: RolloutsConfig | RewriteConfig,
    identity: dict[str, Any],
    overwrite: bool,
    details: dict[str, Any] | None = None,
) -> Iterator[OpenRound]:
    """Lock this process's part of `stage` and find what exists, after repairing what a kill left.

    identity: the settings that determine the rows. details: what else run.json records; None: of
    a stage that reads the round's rollouts, its settings and their number.
    Raise ConfigError when another process works here or the rows were made with other settings.
    """
    with round_dir.lock(COMMANDS[stage], config.parts.part):
        if stage == "distill":
            refuse_half_refiltered(round_dir)
        if overwrite:
            round_dir.discard(*OVERWRITTEN[stage])
        rollouts = KeySet()
        if details is None:
            rollouts = round_dir.recover("rollouts")
            settings = config.model_dump(mode="json", exclude={"parts"})
            details = {"config": settings, "rows": len(rollouts)}
        begun = round_dir.claim(stage, identity, details)
        done = round_dir.recover(stage)
        if stage == "distill":
            done = round_dir.rewritten()
        yield OpenRound(round_dir, stage, config, done, rollouts, begun)


def refuse_half_refiltered(round_dir: RoundDir) -> None:
    """Raise ConfigError when a second pass was killed after it had all its rows and before they
    replaced the old ones."""
    if is_whole(scratch_of(round_dir)):
        raise ConfigError(
            f"{round_dir.path}: a --refilter, or the student's choice, was killed while its rows"
            " were put in place. Run the same command again with --refilter; it takes a moment."
        )


@dataclass
class StageRun:
    """What a stage works with: a writer for its rows, progress, and an engine once it is needed."""

    opened: OpenRound
    writer: ShardWriter
    progress: Progress
    engine: Engine = field(init=False)

    @property
    def in_flight(self) -> int:
        """Checks that are not finished."""
        return 0

    def advance(self, wait: bool) -> None:
        """Commit the shard that is due by age. `pump` calls this after each step."""
        self.writer.commit_if_due()
        self.progress.tick(self.engine.in_flight, self.engine.underway)

    def work(
        self,
        submissions: Iterator[Callable[[], None]],
        take: Callable[[Completion | Scores | Refused], None],
        start: Callable[[], Engine],
    ) -> None:
        """Run `submissions` (each submits one or more requests) through the engine and give every
        result to `take`. Without a submission no engine is started."""
        first = next(submissions, None)
        if first is None:
            return
        with contextlib.closing(start()) as self.engine:
            self.progress.engine_started()
            try:
                for result in pump(self.engine, itertools.chain([first], submissions), self):
                    take(result)
            finally:
                # Best effort: a failure here must not mask the original exception.
                with contextlib.suppress(MPDError, OSError):
                    opened = self.opened
                    speed = self.progress.speed(opened.config.engine.backend)
                    if speed is not None:
                        opened.round_dir.record_speed(opened.stage, speed)


@dataclass
class CheckedRun(StageRun):
    """A run that checks answers and goes on when single requests fail."""

    failures: Failures
    pool: CheckPool
    _waiting: dict[str, Callable[[Verdict], None]] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        return self.pool.in_flight

    def advance(self, wait: bool) -> None:
        """Hand over finished checks, too; if `wait`, give them a second to finish."""
        for verdict in self.pool.ready(1.0 if wait else 0.0):
            self._waiting.pop(verdict.key)(verdict)
        super().advance(wait)

    def check(self, request: CheckRequest, take: Callable[[Verdict], None]) -> None:
        """Check an answer in a worker process and give the verdict to `take`."""
        self._waiting[request.key] = take
        self.pool.submit(request)


@contextlib.contextmanager
def open_run(
    opened: OpenRound,
    metadata: dict[str, Any],
    checker: str,
    formats: Sequence[AnswerFormat],
    total: int,
) -> Iterator[CheckedRun]:
    """Open what a stage needs besides its engine; on leaving, commit the rows that are left.

    metadata: what the shards record about themselves. checker, formats: how answers are compared,
    and where they may be in a text. total: rows that will exist in the end.
    """
    round_dir, config, command = opened.round_dir, opened.config, COMMANDS[opened.stage]
    output, checks = config.output.model_dump(), config.checks
    known = round_dir.failures()
    with (
        ShardWriter(round_dir, opened.stage, metadata, **output) as writer,
        ShardWriter(round_dir, "errors", metadata, **output) as errors,
        Progress(command, total, round_dir.status_path(command, config.parts.part)) as progress,
        CheckPool(checker, formats, checks.checker_timeout, checks.checker_processes) as pool,
    ):
        failures = Failures(command, errors, known, config.failures)
        yield CheckedRun(opened, writer, progress, failures, pool)
