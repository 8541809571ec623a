"""`--workers`: run a stage in several processes on this machine, each with its own engine.

Each worker runs a command that a user could type, `--shard-index I --num-shards N`, with its share
of the GPUs in CUDA_VISIBLE_DEVICES. All commit to the same round, each the rows of its part.
"""

import os
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.machine import gpus
from mpd_data.common.options import arguments
from mpd_data.config import PartsConfig, RewriteConfig, RolloutsConfig
from mpd_data.engines.start import close_kept_engine, keeps_engine
from mpd_data.parts.session import Session, close_engines, end, ending_of

EXIT_FAILED_ROWS = 3  # done with failed rows


def slurm_part() -> tuple[int, int] | None:
    """Return (index from 0, count) of this task in its SLURM job array; None outside one. Raise
    ConfigError for an array with gaps."""
    if "SLURM_ARRAY_TASK_COUNT" not in os.environ:
        return None
    task, first, step, count = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
    )
    index = (task - first) // step
    if not 0 <= index < count:
        raise ConfigError(
            f"SLURM array task {task} is not one of {count} from {first} in steps of {step}, so its"
            " part of the work is not known. Use an array without gaps (--array=0-15), or give"
            " --shard-index and --num-shards."
        )
    return index, count


def _shares(workers: int, gpus_each: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker; None leaves it as it is, on a CPU machine. Raise
    ConfigError for too few GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        devices = [str(index) for index in range(len(gpus("index")))]
    else:
        devices = [device.strip() for device in visible.split(",") if device.strip()]
    if not devices:
        return [None] * workers
    if workers * gpus_each > len(devices):
        raise ConfigError(
            f"--workers {workers} with {gpus_each} GPU(s) each need {workers * gpus_each} GPUs, but"
            f" this machine has {len(devices)} ({', '.join(devices)}). Lower --workers,"
            " --tensor-parallel-size or --pipeline-parallel-size."
        )
    return [",".join(devices[i * gpus_each : (i + 1) * gpus_each]) for i in range(workers)]


# Workers of the last command, and their GPUs, where this process keeps engines for the next.
_kept: dict[tuple[int, str | None], Session] = {}


def run_workers(command: str, config: RolloutsConfig | RewriteConfig, limit: int | None) -> bool:
    """Run `mpd-gen COMMAND` in `config.parts.workers` processes. Return whether rows failed.

    Raise MPDError if a worker fails. The others are then interrupted and commit their finished
    rows.
    """
    workers, part = config.parts.workers, config.parts.part
    shares = dict(enumerate(_shares(workers, config.engine.num_gpus)))
    # This process may have one of its own, on the same GPUs.
    close_kept_engine()
    if _kept.keys() != set(shares.items()):
        end_workers()
    orders = {}
    for i, devices in shares.items():
        own = PartsConfig(shard_index=part.index * workers + i, num_shards=part.count * workers)
        words = [command, *arguments(config.model_copy(update={"parts": own}))]
        if limit is not None:
            share = limit // workers + (i < limit % workers)
            if not share:
                continue
            words += ["--limit", str(share)]
        if (i, devices) not in _kept:
            share_of_gpus = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
            _kept[i, devices] = Session({**os.environ, **share_of_gpus}, piped=True, worker=True)
        orders[i] = _kept[i, devices], words
    is_done = False
    with ThreadPoolExecutor(len(orders)) as pool:
        running = {
            pool.submit(session.run, words, f"worker {i} | "): i
            for i, (session, words) in orders.items()
        }
        try:
            codes = _codes(running)
            is_done = True
        finally:
            if not is_done:
                # Not SIGINT, which the jobs of a shell's background ignore.
                for session, _ in orders.values():
                    session.process.terminate()
            if not is_done or not keeps_engine():
                wait(running)
                end_workers()
    return EXIT_FAILED_ROWS in codes


def _codes(running: dict[Future[int], int]) -> list[int]:
    """Return the exit codes. Raise MPDError as soon as a worker fails."""
    codes, rest = [], set(running)
    while rest:
        # With a limit, so that an interrupt gets through.
        done, rest = wait(rest, 0.1, FIRST_COMPLETED)
        for future in done:
            codes.append(future.result())
            if codes[-1] not in (0, EXIT_FAILED_ROWS):
                raise MPDError(
                    f"worker {running[future]} {ending_of(codes[-1])}. Finished rows are committed:"
                    " fix the cause and run the same command again."
                )
    return codes


def close_worker_engines() -> None:
    """Free what the engines of kept workers hold."""
    close_engines(_kept.values())


def end_workers() -> None:
    """End the kept workers."""
    end(_kept.values())
    _kept.clear()
