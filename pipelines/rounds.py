"""`mpd-rounds`: a whole distillation from one TOML file.

For each round: rollouts by the newest student -> rewrites by the teacher -> training ->
evaluation. Each stage is the command a user would type, in a process of its own (the engine
must not share one with the trainer), printed before it runs and resumable by itself; a stage
that has finished is not started again.

    OUT/data/round1/            the round's shards
    OUT/train/round1/           its training: model/, metrics.jsonl, checkpoints/
    OUT/eval/round1-test/       rollouts on held-out prompts (base-test: before any training)
    OUT/summary.json            the figures; OUT/lengths.png the trace lengths
"""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

from mpd_data import compare as comparison
from mpd_data import interrupt
from mpd_data.cli import DRY_RUN, PLAN_JSON, run_command
from mpd_data.config import RewriteConfig
from mpd_data.errors import MPDError
from mpd_data.models import gpus, resolve_model
from mpd_data.shards import write_json_atomic
from mpd_data.stats import plot_lengths
from mpd_data.table import format_table
from mpd_data.workers import EXIT_FAILED_ROWS
from pipelines.forks import Fork, Forks
from pipelines.steps import (
    Pipeline,
    Step,
    evaluation_step,
    load_pipeline,
    rewrite_step,
    rollouts_step,
    train_step,
)


class Plan:
    """The commands of a pipeline, in order."""

    def __init__(self, pipeline: Pipeline, out: Path) -> None:
        self._pipeline = pipeline
        self._out = out

    def student(self, round_: int) -> str:
        """The model after `round_` rounds."""
        if round_ == 0:
            return self._pipeline.student
        return str(self._out / "train" / f"round{round_}" / "model")

    def evaluation(self, round_: int, name: str) -> Path:
        label = "base" if round_ == 0 else f"round{round_}"
        return self._out / "eval" / f"{label}-{name}"

    def training(self, round_: int) -> Iterator[Step]:
        """rollouts -> rewrite -> train of a round (from 1)."""
        p, data = self._pipeline, self._out / "data" / f"round{round_}"
        student = self.student(round_ - 1)
        yield rollouts_step(p, student, round_, data)
        yield rewrite_step(p, student, round_, data)
        yield train_step(p, student, round_, data, self._out / "train" / f"round{round_}")

    def evaluations(self, round_: int) -> Iterator[Step]:
        """Sampling on held-out prompts with the student after `round_` rounds."""
        p = self._pipeline
        for chosen in p.evaluation:
            out = self.evaluation(round_, chosen.name)
            yield evaluation_step(p, chosen, self.student(round_), round_, out)

    def all_steps(self) -> list[Step]:
        steps = list(self.evaluations(0))
        for round_ in range(1, self._pipeline.rounds + 1):
            steps += [*self.training(round_), *self.evaluations(round_)]
        return steps


_MODULES = {"mpd-gen": "mpd_data.cli", "mpd-train": "mpd_train.cli"}


def _inputs(step: Step) -> dict[str, str]:
    """Sizes and times of the files that a step's command names or that it reads beside them: a step
    whose models, prompts or shards have changed since is not done."""
    found: dict[str, str] = {}
    for path in (*map(Path, step.command), *step.reads):
        if path == step.out or not path.exists():
            continue
        files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
        for file in sorted(files):
            if file.name != ".lock":
                stat = file.stat()
                found[str(file)] = f"{stat.st_size} {stat.st_mtime_ns}"
    return found


class Finished:
    """The steps that OUT/finished.jsonl says are done; nothing is written."""

    def __init__(self, out: Path) -> None:
        self.path = out / "finished.jsonl"
        # A kill can tear the last line: its step is asked again, and resumes.
        self.whole = self.path.read_bytes() if self.path.exists() else b""
        self.whole = self.whole[: self.whole.rfind(b"\n") + 1]
        self.records: list[dict[str, Any]] = [json.loads(line) for line in self.whole.splitlines()]

    def holds(self, step: Step) -> bool:
        """Whether `step` has finished, with the inputs that are there now."""
        now = ([step.program, *step.command], _inputs(step))
        return step.out.exists() and any((r["command"], r["inputs"]) == now for r in self.records)


class Runner:
    """Runs steps as processes and remembers in OUT/finished.jsonl which are done. `preload`: the
    processes are forks of one that has imported what they need (pipelines/forks.py)."""

    def __init__(
        self, out: Path, environment: dict[str, str], total: int, preload: bool = False
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._finished = Finished(out)
        self._path = self._finished.path
        if self._path.exists():
            self._path.write_bytes(self._finished.whole)
        self._environment = {**os.environ, **environment}
        # A pipeline that is a task of a job array is not one of the parts of its stages.
        self._environment.pop("SLURM_ARRAY_TASK_COUNT", None)
        self._total = total
        self._number = 0
        self._running: set[subprocess.Popen[bytes] | Fork] = set()
        self._forks = Forks(self._environment) if preload and not gpus() else None
        self._told_to_end = False
        self.failed_rows = any(r["exit_code"] == EXIT_FAILED_ROWS for r in self._finished.records)

    def run(self, steps: list[Step], parallel: int = 1) -> None:
        """Runs `steps`, up to `parallel` at a time. Raises MPDError if one fails."""
        for _, error in self.attempt(steps, parallel):
            raise error

    def attempt(self, steps: list[Step], parallel: int = 1) -> list[tuple[Step, MPDError]]:
        """Runs `steps`, up to `parallel` at a time, and returns those that failed."""
        interrupt.check()
        owed = []
        for step in steps:
            self._number += 1
            head = f"[{self._number}/{self._total}] {step.label}"
            if self._finished.holds(step):
                click.echo(f"{head}: done before", err=True)
                continue
            click.echo(f"{head}: {step.why}", err=True)
            click.echo(f"    {step.program} {shlex.join(step.command)}", err=True)
            owed.append(step)
        together = min(parallel, len(owed))
        failed: list[tuple[Step, MPDError]] = []
        with ThreadPoolExecutor(max(together, 1)) as pool:
            try:
                begun = [(step, pool.submit(self._run_one, step, together > 1)) for step in owed]
                for step, done in begun:
                    try:
                        done.result()
                    except MPDError as error:
                        failed.append((step, error))
            except KeyboardInterrupt as told:
                # What runs commits what it has, and is waited for; no other begins.
                pool.shutdown(wait=False, cancel_futures=True)
                if told.args == (signal.SIGTERM,):
                    # Which was for this process; a terminal tells all of them.
                    self._told_to_end = True
                    for process in list(self._running):
                        process.terminate()
                raise
        return failed

    def _start(self, step: Step, stderr: Connection | None) -> subprocess.Popen[bytes] | Fork:
        module = _MODULES[step.program]
        if self._forks is not None:
            return self._forks.start(module, step.command, stderr)
        return subprocess.Popen(
            [sys.executable, "-m", module, *step.command],
            env=self._environment,
            stderr=None if stderr is None else stderr.fileno(),
        )

    def _run_one(self, step: Step, prefixed: bool) -> None:
        begun = time.monotonic()
        # Two progress bars would fight for one line: side by side, steps report in lines.
        reader, writer = multiprocessing.Pipe(duplex=False) if prefixed else (None, None)
        process = self._start(step, writer)
        self._running.add(process)
        if self._told_to_end:
            # Too late to be among those that were told.
            process.terminate()
        if reader is not None and writer is not None:
            writer.close()
            with os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    click.echo(f"    {step.label} | {line.rstrip()}", err=True)
            reader.close()
        code = process.wait()
        self._running.discard(process)
        if code not in (0, EXIT_FAILED_ROWS):
            raise MPDError(
                f"{step.label} ended with exit code {code}; its message stands above. What is"
                " finished is kept: mend it and run the same command again."
            )
        self.failed_rows |= code == EXIT_FAILED_ROWS
        record = {
            "label": step.label,
            "command": [step.program, *step.command],
            "inputs": _inputs(step),
            "seconds": round(time.monotonic() - begun, 1),
            "exit_code": code,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def summarize(pipeline: Pipeline, plan: Plan) -> dict[str, Any]:
    """The figures of a finished pipeline: the first evaluation set for base and every round,
    and the comparison of the last round with the base on every set."""
    headline, *_ = [chosen.name for chosen in pipeline.evaluation]
    last = pipeline.rounds
    sets = {
        chosen.name: comparison.compare(
            plan.evaluation(0, chosen.name), plan.evaluation(last, chosen.name)
        )
        for chosen in pipeline.evaluation
    }
    rounds = [comparison.evaluate(plan.evaluation(r, headline)) for r in range(1, last + 1)]
    return {
        "pipeline": pipeline.name,
        "seed": pipeline.seed,
        "base": sets[headline]["base"],
        "rounds": rounds,
        "final": rounds[-1],
        **{
            name: sets[headline][name]
            for name in (
                "token_reduction",
                "token_reduction_interval",
                "accuracy_difference",
                "accuracy_difference_interval",
            )
        },
        "sets": sets,
    }


def show(summary: dict[str, Any]) -> None:
    """The before/after tables of a summary, on stderr: the first evaluation set by round, and all
    sets side by side."""
    rows = {"base": summary["base"]}
    rows |= {f"round {i}": side for i, side in enumerate(summary["rounds"], start=1)}
    click.echo(f"\n{comparison.table(rows)}", err=True)
    sets = [
        {"set": name, **comparison.side_by_side(result)} for name, result in summary["sets"].items()
    ]
    click.echo(f"\n{format_table(sets)}", err=True)


def check_inputs(pipeline: Pipeline, out: Path) -> None:
    """Finds out now what would else stop the pipeline hours in: both models, with their weights
    where this machine runs them, and all that a dry run checks. Raises ConfigError or DataError."""
    from pipelines.plan import plan_pipeline

    resolve_model(pipeline.student)
    for step in Plan(pipeline, out).training(1):
        if isinstance(step.config, RewriteConfig):
            resolve_model(pipeline.teacher, served=step.config.engine.served(pipeline.teacher))
    plan_pipeline(pipeline, out)


def run_pipeline(pipeline: Pipeline, out: Path) -> dict[str, Any]:
    """Runs what is not finished of `pipeline` in `out` and returns its summary, with
    `failed_rows` true where a stage left rows in errors/."""
    plan = Plan(pipeline, out)
    check_inputs(pipeline, out)
    runner = Runner(out, pipeline.environment, len(plan.all_steps()), pipeline.preload)
    write_json_atomic(out / "pipeline.json", pipeline.model_dump(mode="json"))
    runner.run(list(plan.evaluations(0)), pipeline.parallel_evaluations)
    for round_ in range(1, pipeline.rounds + 1):
        for step in plan.training(round_):
            runner.run([step])
        runner.run(list(plan.evaluations(round_)), pipeline.parallel_evaluations)
    summary = summarize(pipeline, plan)
    summary["failed_rows"] = runner.failed_rows
    write_json_atomic(out / "summary.json", summary)
    headline = pipeline.evaluation[0].name
    lengths = {"base": plan.evaluation(0, headline)}
    lengths |= {f"round {r}": plan.evaluation(r, headline) for r in range(1, pipeline.rounds + 1)}
    plot_lengths(lengths, out / "lengths.png")
    return summary


def _seeds_table(summaries: list[dict[str, Any]]) -> str:
    return format_table(
        [
            {"seed": str(summary["seed"]), "set": name, **comparison.side_by_side(result)}
            for summary in summaries
            for name, result in summary["sets"].items()
        ]
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("pipeline", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Override a setting.")
@click.option(
    "--seeds", type=click.IntRange(1), help="Run seeds 0 … N-1 into OUT/seed0 … and compare them."
)
@DRY_RUN
@PLAN_JSON
@click.version_option(package_name="mixed-policy-distillation")
def cli(
    pipeline: Path,
    out: Path,
    overrides: tuple[str, ...],
    seeds: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a whole distillation PIPELINE (TOML) into OUT. Run again to resume."""
    if dry_run:
        from pipelines.plan import plan_pipeline, show_pipeline

        # Of several seeds the first: the others take as much again.
        folder, settings = out, overrides
        if seeds is not None:
            folder, settings = out / "seed0", (*overrides, "seed=0")
        planned = plan_pipeline(load_pipeline(pipeline, settings), folder)
        show_pipeline(planned, as_json, prompts=True)
        if seeds is not None:
            click.echo(f"This is the first of {seeds} seeds.", err=True)
        return
    if seeds is None:
        summary = run_pipeline(load_pipeline(pipeline, overrides), out)
        show(summary)
        click.echo(f"wrote {out / 'summary.json'} and {out / 'lengths.png'}", err=True)
        click.echo(f"mpd-report {shlex.quote(str(out))} draws the report", err=True)
        if summary["failed_rows"]:
            click.echo(f"some rows failed; see {out}/*/*/errors/*.parquet", err=True)
            raise click.exceptions.Exit(EXIT_FAILED_ROWS)
        return
    summaries = []
    for seed in range(seeds):
        chosen = load_pipeline(pipeline, (*overrides, f"seed={seed}"))
        summaries.append(run_pipeline(chosen, out / f"seed{seed}"))
    write_json_atomic(out / "seeds.json", summaries)
    click.echo(f"\n{_seeds_table(summaries)}\nwrote {out / 'seeds.json'}", err=True)
    click.echo(f"mpd-report {shlex.quote(str(out))} draws the report", err=True)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
