"""`--ray`: run one stage on a Ray cluster. Ray Data gives blocks of keys to actors; an actor keeps
its engine from block to block.

A block is a part of the stage, as with `--num-shards` (store/locks.py), and runs the stage's own
code: it finds its missing rows and commits them under the part's lock. If a node dies, Ray runs its
block again, and the second attempt continues from the rows that the first one committed. If the
first attempt still runs, cut off from Ray, the second waits for it.

The command holds a lock of its own, which the actors check. A node that does not see the lock held
does not share the round's folder, or its file system does not pass locks on. When the command
releases the lock, the actors commit their finished rows and stop.
"""

import dataclasses
import json
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

from mpd_data import rewrite, rewrite_setup, rollouts
from mpd_data.common.errors import ConfigError, MPDError, requires
from mpd_data.common.models import ModelFiles
from mpd_data.config import EngineConfig, PartsConfig, RewriteConfig, RolloutsConfig
from mpd_data.engines.protocol import Completion, Engine, Refused, Scores
from mpd_data.engines.start import start_engine
from mpd_data.stage import OVERWRITTEN, Outcome
from mpd_data.store.locks import Part, is_held, part_lock_path
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import Stage

# More blocks divide the work more evenly. Fewer keep the engines busier: at the end of a block an
# engine has fewer and fewer requests.
BLOCKS_PER_ACTOR = 4
# A block whose process dies this often is the cause of the deaths. Attempts are counted when they
# begin: Ray counts several for one death, because it still calls nodes that it does not yet know to
# be dead.
_ATTEMPTS = 4
# Seconds to wait for an earlier attempt. A process on a node that Ray gave up ends in seconds.
_LOCK_WAIT_SECONDS = 300.0
_SECONDS_PER_LOOK = 1.0
# Variables of the command that actors get, by the beginnings of their names. GPUs and paths are the
# node's own.
_ENVIRONMENT = ("PYTHONPATH", "OMP_NUM_THREADS", "HF_", "VLLM_", "TOKENIZERS_")
# Ends of names that actors do not get: whoever sees the cluster's job list could read the values.
_SECRETS = ("TOKEN", "KEY")


@dataclass(frozen=True)
class Job:
    """What every actor gets. `folder` is the round's, `cwd` the base of other relative paths.
    The blocks share `limit`, the maximum number of rows; one that is run again has its share again.
    """

    config: RolloutsConfig | RewriteConfig
    folder: Path
    cwd: str
    blocks: int
    limit: int | None

    @property
    def label(self) -> str:
        return "rollouts" if isinstance(self.config, RolloutsConfig) else "rewrite"

    @property
    def command(self) -> Part:
        """The part that the command itself locks: one after the last, which has no rows."""
        return Part(self.blocks, self.blocks)

    def lock_path(self, part: Part) -> Path:
        return part_lock_path(self.folder, self.label, part)


def rollouts_on_ray(
    config: RolloutsConfig, overwrite: bool = False, limit: int | None = None
) -> Outcome:
    """`run_rollouts` by `config.parts.workers` actors of a Ray cluster: the one of RAY_ADDRESS, one
    that runs here, or one that is started here for the purpose.

    Raise what `run_rollouts` raises, ConfigError where Ray is not installed or a node does not
    share the folder, and MPDError for Ray's own troubles. After an interrupt or a stage's error all
    actors commit what they have first.
    """
    rollouts.setup(config, weights=False, overwrite=overwrite)
    return _run(config, RoundDir(config.out), "rollouts", overwrite, limit)


def rewrite_on_ray(
    config: RewriteConfig, overwrite: bool = False, limit: int | None = None
) -> Outcome:
    """`run_rewrite` on a Ray cluster, as `rollouts_on_ray`."""
    rewrite_setup.setup(config, weights=False, overwrite=overwrite)
    round_dir = RoundDir(config.shards)
    outcome = _run(config, round_dir, "distill", overwrite, limit)
    return dataclasses.replace(outcome, statuses=round_dir.count_statuses())


def _rows(round_dir: RoundDir, stage: Stage) -> int:
    return sum(shard.rows for shard in round_dir.manifest(stage))


def _run(
    config: RolloutsConfig | RewriteConfig,
    round_dir: RoundDir,
    stage: Stage,
    overwrite: bool,
    limit: int | None,
) -> Outcome:
    with requires("ray", "--ray (on every node of the cluster)"):
        import ray
        from ray.exceptions import RayError
    blocks = config.parts.workers * BLOCKS_PER_ACTOR
    job = Job(config, round_dir.path.absolute(), str(Path.cwd()), blocks, limit)
    if overwrite:
        with round_dir.lock(job.label):
            round_dir.discard(*OVERWRITTEN[stage])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_ENVIRONMENT) and not name.endswith(_SECRETS)
    }
    with ExitStack() as held:
        held.enter_context(round_dir.lock(job.label, job.command))
        round_dir.recover(stage)
        before = _rows(round_dir, stage)
        try:
            ray.init(logging_level=logging.ERROR, runtime_env={"env_vars": variables})
            with _stopping(held) as stop:
                failed, remaining = _take_results(job, stop)
        except (RayError, ConnectionError) as error:
            raise MPDError(
                f"Ray: {error}\nEvery row that was committed is safe. Mend the cause and run the"
                " same command again."
            ) from error
        finally:
            ray.shutdown()
    # What a dead node had committed is in no actor's count.
    total = _rows(round_dir, stage)
    return Outcome(total, total - before, failed, remaining)


@contextmanager
def _stopping(held: ExitStack) -> Iterator[Callable[[], None]]:
    """Yield a function that tells the actors to stop. The first interrupt tells them too; it is
    raised when they have stopped, instead of their errors. A second interrupt is raised at once."""
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        held.close()
        click.echo("stopping: the actors commit what they have.", err=True)

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield held.close
    except MPDError:
        # After an interrupt, an actor that was about to begin reports that the command is gone.
        if not interrupted:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted:
        raise KeyboardInterrupt


def _take_results(job: Job, stop: Callable[[], None]) -> tuple[int, int]:
    """Wait for all blocks. Return rows that failed and what remains. Raise the first error as
    MPDError when all actors have stopped."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block may take hours; Ray Data gives up after half an hour without results.
    context.execution_no_progress_timeout_s = -1
    context.issue_detectors_config.detectors = []
    engine = job.config.engine
    needs_gpus = engine.backend != "openai" and "GPU" in ray.cluster_resources()
    # Items instead of a range: tasks would read the range, and the actors leave no CPU for tasks.
    items = ray.data.from_items(list(range(job.blocks)), override_num_blocks=job.blocks)
    results = items.map_batches(
        EngineActor,
        fn_constructor_args=(job,),
        batch_size=1,
        # One block at a time: an idle actor cannot take a block that waits at a busy one.
        compute=ActorPoolStrategy(size=job.config.parts.workers, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=engine.num_gpus if needs_gpus else None,
    )
    error, counts = None, Counter[str]()
    batches = results.iter_batches(batch_size=1, prefetch_batches=0)
    for done, batch in enumerate(batches, start=1):
        result = json.loads(str(batch["result"][0]))
        block_error = result.pop("error")
        if error is None and block_error is not None:
            error = block_error
            stop()
        counts.update(result)
        rows = f"{counts['written']} rows new, {counts['failed']} failed"
        click.echo(f"{job.label}: {done} of {job.blocks} blocks, {rows}", err=True)
    if error is not None:
        raise MPDError(error)
    return counts["failed"], counts["remaining"]


class EngineActor:
    """Run one block after another with one engine, which the first block with missing rows
    starts."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._prepared: Any = None
        self._engine: Engine | None = None
        # A node without the folder can still run a job whose paths are all absolute.
        with suppress(OSError):
            os.chdir(job.cwd)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Return the result of the block in `batch`, as JSON. Errors with a message are in it: Ray
        would wrap them in its own, and this way all actors can stop in order."""
        block = int(batch["item"][0])
        result: dict[str, Any] = {"written": 0, "failed": 0, "remaining": 0, "error": None}
        try:
            outcome = self._do(block)
            result |= {name: getattr(outcome, name) for name in ("written", "failed", "remaining")}
        except KeyboardInterrupt:
            self._drop_engine()
        except MPDError as error:
            self._drop_engine()
            result["error"] = f"{error} (block {block}, on {socket.gethostname()})"
        return {"result": [json.dumps(result)]}

    def _do(self, block: int) -> Outcome:
        job = self._job
        if not is_held(job.lock_path(job.command)):
            raise ConfigError(
                f"{job.folder}: this node does not see the lock of the command that started this"
                " block. All nodes must share the round's folder, on a file system that passes"
                " locks on (NFS does)."
            )
        part = Part(block, job.blocks)
        lock = job.lock_path(part)
        self._wait_for_earlier_attempt(lock)
        with _counted(lock.with_name(f"{lock.name}.attempts")):
            return self._do_part(part)

    def _do_part(self, part: Part) -> Outcome:
        config, limit = self._job.config, self._job.limit
        if self._prepared is None:
            # Once for all blocks, because it reads all prompts and hashes all weights.
            if isinstance(config, RolloutsConfig):
                self._prepared = rollouts.setup(config)
            else:
                self._prepared = rewrite_setup.setup(config)
        own = PartsConfig(shard_index=part.index, num_shards=part.count)
        config = config.model_copy(update={"parts": own})
        prepared = dataclasses.replace(self._prepared, config=config)
        if limit is not None:
            limit = limit // part.count + (part.index < limit % part.count)
        if isinstance(prepared, rollouts.RolloutSetup):
            return rollouts.sample(prepared, limit=limit, start=self._start)
        return rewrite.distill(prepared, limit=limit, start=self._start)

    def _wait_for_earlier_attempt(self, lock: Path) -> None:
        until = time.monotonic() + _LOCK_WAIT_SECONDS
        while is_held(lock):
            if time.monotonic() > until:
                raise MPDError(
                    f"{lock}: an earlier attempt at this block still holds the lock, although Ray"
                    f" gave up its node {_LOCK_WAIT_SECONDS:.0f} s ago. `mpd-gen status` shows the"
                    " host; end that process, then run the same command again."
                )
            self.stop_if_told()
            time.sleep(_SECONDS_PER_LOOK)

    def stop_if_told(self) -> None:
        """Raise KeyboardInterrupt if the command has released its lock."""
        if not is_held(self._job.lock_path(self._job.command)):
            raise KeyboardInterrupt

    def _start(
        self,
        model: ModelFiles,
        config: EngineConfig,
        trust_remote_code: bool = False,
        max_logprobs: int = 1,
    ) -> Engine:
        if self._engine is None:
            self._engine = start_engine(model, config, trust_remote_code, max_logprobs)
        return _Lent(self._engine, self.stop_if_told)

    def _drop_engine(self) -> None:
        """Close the engine: after an interrupted block it holds requests that nobody waits for."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


@contextmanager
def _counted(file: Path) -> Iterator[None]:
    """Count an attempt that may kill this process. `file` has one byte for each attempt that began
    and did not end; the next process that starts alone in the round deletes it (store/locks.py).
    Raise MPDError after too many attempts."""
    with file.open("ab") as begun:
        begun.write(b".")
        attempts = begun.tell()
    if attempts > _ATTEMPTS:
        raise MPDError(
            f"{_ATTEMPTS} processes died on this block. If their nodes are alive, they may have run"
            " out of memory: `ray logs` has their last messages. Finished rows are committed: fix"
            " the cause and run the same command again."
        )
    try:
        yield
    except (Exception, KeyboardInterrupt):
        file.unlink()
        raise
    file.unlink()


class _Lent:
    """An actor's engine, lent to one block: closing it leaves the engine open, and a step checks
    once a second whether to stop."""

    def __init__(self, engine: Engine, stop_if_told: Callable[[], None]) -> None:
        self._engine = engine
        self._stop_if_told = stop_if_told
        self._looked = 0.0
        self.max_model_len = engine.max_model_len
        self.max_in_flight = engine.max_in_flight
        self.submit_generate = engine.submit_generate
        self.submit_score = engine.submit_score
        self.forget = engine.forget
        self.underway = engine.underway

    @property
    def in_flight(self) -> int:
        return self._engine.in_flight

    def step(self) -> Sequence[Completion | Scores | Refused]:
        if time.monotonic() - self._looked > _SECONDS_PER_LOOK:
            self._looked = time.monotonic()
            self._stop_if_told()
        return self._engine.step()

    def close(self) -> None:
        pass
