"""`--workers`: run a stage in several processes on this machine, each with its own engine.

Each worker is a command that a user could type, `--shard-index I --num-shards N`, with its share of
the GPUs in CUDA_VISIBLE_DEVICES. All commit to the same round, each the rows of its part.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Thread

import click

from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.machine import gpus
from mpd_data.common.options import arguments
from mpd_data.config import PartsConfig, RewriteConfig, RolloutsConfig

EXIT_FAILED_ROWS = 3  # done with failed rows
_WORKER = "MPD_GEN_WORKER"  # set in workers: their standard input ends when the parent does
_is_worker = False


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


def run_workers(command: str, config: RolloutsConfig | RewriteConfig, limit: int | None) -> bool:
    """Run `mpd-gen COMMAND` in `config.parts.workers` processes. Return whether rows failed.

    Raise MPDError if a worker fails. The others are then interrupted and commit their finished
    rows.
    """
    workers, part = config.parts.workers, config.parts.part
    processes: list[subprocess.Popen[str]] = []
    printers: list[Thread] = []
    try:
        shares = _shares(workers, config.engine.num_gpus)
        for i, devices in enumerate(shares):
            own = PartsConfig(shard_index=part.index * workers + i, num_shards=part.count * workers)
            words = [command, *arguments(config.model_copy(update={"parts": own}))]
            if limit is not None:
                share = limit // workers + (i < limit % workers)
                if not share:
                    continue
                words += ["--limit", str(share)]
            share_of_gpus = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
            process = subprocess.Popen(
                [sys.executable, "-m", "mpd_data.cli", *words],
                env={**os.environ, _WORKER: "1", **share_of_gpus},
                stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                # An interrupt at the terminal must reach them once, from this process.
                start_new_session=True,
            )  # fmt: skip
            processes.append(process)
            printers.append(Thread(target=_print_lines, args=(i, process), daemon=True))
            printers[-1].start()
        codes = _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
        for printer in printers:
            printer.join()
    return EXIT_FAILED_ROWS in codes


def is_worker() -> bool:
    """Return whether this process was started by `run_workers`."""
    return _is_worker


def end_with_parent() -> None:
    """In a worker, interrupt this process when the parent dies, so that it does not keep the round
    locked. Elsewhere, do nothing."""
    global _is_worker
    if os.environ.pop(_WORKER, None) is None:
        return
    _is_worker = True

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=watch, name="parent-watch", daemon=True).start()


def _wait(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Return the exit codes. Raise MPDError as soon as a worker fails."""
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        for i, process in enumerate(processes):
            with suppress(subprocess.TimeoutExpired):
                codes[i] = process.wait(0.1)
            if codes.get(i, 0) not in (0, EXIT_FAILED_ROWS):
                raise MPDError(
                    f"worker {i} ended with exit code {codes[i]}; its message is above. Finished"
                    " rows are committed: fix the cause and run the same command again."
                )
    return list(codes.values())


def _print_lines(number: int, process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        click.echo(f"worker {number} | {line.rstrip()}", err=True)
