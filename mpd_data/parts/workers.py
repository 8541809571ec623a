"""`--workers`: processes on this machine that share a stage, each with an engine of its own.

Every worker is the command that a user could type, `--shard-index I --num-shards N`, with its share
of the GPUs in CUDA_VISIBLE_DEVICES. They commit into the same round, each the rows of its part.
"""

import os
import signal
import subprocess
import sys
from threading import Thread

import click

from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.machine import gpus
from mpd_data.common.options import arguments
from mpd_data.config import PartsConfig, RewriteConfig, RolloutsConfig

EXIT_FAILED_ROWS = 3  # done with failed rows
_WORKER = "MPD_GEN_WORKER"  # set for a worker: its standard input lasts as long as its parent
_is_worker = False


def slurm_part() -> tuple[int, int] | None:
    """(index from 0, count) of this task in its SLURM job array; None outside one."""
    if "SLURM_ARRAY_TASK_COUNT" not in os.environ:
        return None
    task, first, step, count = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
    )
    index = (task - first) // step
    if not 0 <= index < count:
        raise ConfigError(
            f"SLURM array task {task} is not one of {count} from {first} in steps of {step}: its"
            " part of the work cannot be told. Use an array without gaps (--array=0-15), or give"
            " --shard-index and --num-shards."
        )
    return index, count


def _devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here; none on a CPU machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    return [str(index) for index in range(len(gpus("index")))]


def _shares(workers: int, gpus_each: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None: as it is, on a CPU machine."""
    devices = _devices()
    if not devices:
        return [None] * workers
    if workers * gpus_each > len(devices):
        raise ConfigError(
            f"--workers {workers} with {gpus_each} GPU(s) each take {workers * gpus_each}, and"
            f" there are {len(devices)} here ({', '.join(devices)}). Lower --workers,"
            " --tensor-parallel-size or --pipeline-parallel-size."
        )
    return [",".join(devices[i * gpus_each : (i + 1) * gpus_each]) for i in range(workers)]


def run_workers(
    command: str, config: RolloutsConfig | RewriteConfig, limit: int | None = None
) -> int:
    """Runs `mpd-gen COMMAND` in `config.parts.workers` processes; returns the exit code, 0 or 3
    (some rows failed).

    Raises MPDError where a worker fails. The others are interrupted then, as by KeyboardInterrupt,
    and commit what they have.
    """
    workers, part = config.parts.workers, config.parts.part
    processes: list[subprocess.Popen[str]] = []
    printers: list[Thread] = []
    try:
        shares = _shares(workers, config.engine.num_gpus)
        for i, devices in enumerate(shares):
            own = config.model_copy(
                update={
                    "parts": PartsConfig(
                        shard_index=part.index * workers + i, num_shards=part.count * workers
                    )
                }
            )
            asked = [command, *arguments(own)]
            if limit is not None:
                share = limit // workers + (i < limit % workers)
                if not share:
                    continue
                asked += ["--limit", str(share)]
            process = subprocess.Popen(
                [sys.executable, "-m", "mpd_data.cli", *asked],
                env={
                    **os.environ,
                    _WORKER: "1",
                    **({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}),
                },
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                # An interrupt at the terminal reaches them once, from here.
                start_new_session=True,
            )
            processes.append(process)
            printers.append(Thread(target=_print_lines, args=(i, process), daemon=True))
            printers[-1].start()
        codes = _wait(processes)
    finally:
        _interrupt(processes)
        for process in processes:
            process.wait()
        for printer in printers:
            printer.join()
    return EXIT_FAILED_ROWS if EXIT_FAILED_ROWS in codes else 0


def is_worker() -> bool:
    """Whether this process is one of another one's `run_workers`."""
    return _is_worker


def end_with_parent() -> None:
    """In a worker, an interrupt where the parent is killed: nobody else would end it, and it would
    stand in the way of the same command. Elsewhere nothing."""
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
    """The exit codes. Raises MPDError as soon as one is not a good end."""
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        for i, process in enumerate(processes):
            if i in codes:
                continue
            try:
                codes[i] = process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            if codes[i] not in (0, EXIT_FAILED_ROWS):
                raise MPDError(
                    f"worker {i} ended with exit code {codes[i]}; its message stands above. What is"
                    " finished is committed: mend the cause and run the same command again."
                )
    return list(codes.values())


def _interrupt(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)


def _print_lines(number: int, process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        click.echo(f"worker {number} | {line.rstrip()}", err=True)
