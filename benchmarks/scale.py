"""What looking at a round of ten million rows costs: time and peak memory of each command.

    PYTHONPATH=. python benchmarks/scale.py --out /tmp/scale

makes a synthetic round by the real contract and the real writer, then runs each command in a
process of its own on its first million rows, three million, and all, and prints a table.

    PYTHONPATH=. python benchmarks/scale.py --out /tmp/scale --bytes

writes shards of made-up top-K log-probabilities instead and prints bytes per token for each K.

The round: 1,024 rows a shard (mpd-gen's default), 4 samples a prompt. One row in 64 holds some 500
tokens with their text, the others 4 to 12; every 16th shard of rollouts has no rewrites yet; half
of the rewrites are kept, with 8 log-probabilities for each of their 2 to 6 (1 in 64: 60) tokens.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mpd_data.dryrun.plan import distill_bytes
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import DISTILL_SCHEMA, ROLLOUT_SCHEMA, Stage
from mpd_data.store.writer import ShardWriter

ROWS_PER_SHARD = 1024
SAMPLES = 4
LONG_EVERY = 64
VOCAB = 151_936
END = VOCAB - 1
PROMPT_TOKENS = 6
K = 8
STATUSES = ("ok", "ok", "longer", "answer_changed")
METADATA = {
    "student": {"name": "synthetic", "version": "0"},
    "teacher": {"name": "synthetic", "version": "0"},
    "tokenizer": "synthetic",
    "vocab_size": VOCAB,
    "eos_token_id": END,
    "num_logprobs": K,
    "score_context": "problem",
    "score_temperature": 1.0,
}

WORDS = [
    "so", "the", "sum", "of", "both", "is", "12", "and", "wait", "let", "me", "check", "that",
    "again", "hmm", "it", "holds", r"\frac{1}{2}",
]  # fmt: skip

# What each command does at its start, or all that it does. Each ends by printing what it found.
RESUME_ROLLOUTS = """
round_dir = RoundDir(path)
with round_dir.lock():
    done, failures = round_dir.recover("rollouts"), round_dir.failures()
    remaining = sum(key not in done for shard in range(shards) for key in hex_keys("row", shard))
print(len(done), "exist,", remaining, "remaining")
"""
RESUME_REWRITE = """
round_dir = RoundDir(path)
with round_dir.lock():
    rollouts, _ = round_dir.recover("rollouts"), round_dir.recover("distill")
    done, failures = round_dir.rewritten(), round_dir.failures()
    remaining = len(rollouts - done)
    next(round_dir.rows("rollouts", ["row_id", "completion_ids"], done=done))
print(len(rollouts), "exist,", remaining, "remaining")
"""
TRAINING = """
from mpd_train.config import TrainConfig
from mpd_train.data.packing import split_packs
from mpd_train.data.shard_set import ShardSet
shards = ShardSet([path])
shards.identity()
packs, _ = split_packs(shards, TrainConfig(shards=[path], student="", out=path))
print(shards.num_rows, "rows in", len(packs), "packs")
"""
EVALUATION_SHARDS = 4  # of the run that is reported on: its round's first, as base and as newest
HEAD = "from benchmarks.scale import *; path = Path({path!r}); shards = {shards}\n"


class TableWriter(ShardWriter):
    """The real writer, fed with Arrow tables: ten million dicts would take an hour."""

    def add_table(self, table: pa.Table) -> None:
        """Commits `table` as one shard."""
        self._pending.append(self._thread.submit(self._write_table, table))
        self.commit()


def hex_keys(kind: str, shard: int, each: int = 1) -> list[str]:
    """The keys of a shard's rows; `each` rows share one."""
    rng = np.random.default_rng([ord(kind[0]), shard])
    digits = rng.bytes(16 * ROWS_PER_SHARD // each).hex()
    return [digits[32 * (i // each) :][:32] for i in range(ROWS_PER_SHARD)]


def lists(lengths: npt.NDArray[np.int64], values: pa.Array, there: Any = None) -> pa.Array:
    """A list column; rows that are not `there` are null and have length 0."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = None if there is None else pa.array(~there)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def lengths_of(rng: np.random.Generator, low: int, high: int, long: int) -> npt.NDArray[np.int64]:
    lengths = rng.integers(low, high + 1, ROWS_PER_SHARD)
    lengths[::LONG_EVERY] = rng.integers(
        long - long // 5, long + long // 5, len(lengths[::LONG_EVERY])
    )
    return lengths


def prompt_ids(shard: int) -> npt.NDArray[np.int32]:
    """[rows, PROMPT_TOKENS], the same for the samples of a prompt."""
    prompts = np.random.default_rng([1, shard]).integers(
        0, VOCAB, (ROWS_PER_SHARD // SAMPLES, PROMPT_TOKENS), dtype=np.int32
    )
    return np.repeat(prompts, SAMPLES, axis=0)


def as_stage(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Return a table of `columns` in a stage's schema; the others are null."""
    rows = len(columns["row_id"])
    return pa.table({f.name: columns.get(f.name, pa.nulls(rows, f.type)) for f in schema}, schema)


def rollouts_table(shard: int, text: bytes) -> pa.Table:
    rng = np.random.default_rng([2, shard])
    rows = ROWS_PER_SHARD
    lengths = lengths_of(rng, 4, 12, 500)
    # Four characters a token, cut out of one text one after another.
    ends = np.concatenate([[0], np.cumsum(4 * lengths)]).astype(np.int32)
    start = int(rng.integers(0, len(text) - ends[-1]))
    completion = pa.StringArray.from_buffers(
        rows, pa.py_buffer(ends), pa.py_buffer(text[start : start + ends[-1]])
    )
    problems = [f"What is {shard} + {i // SAMPLES}?" for i in range(rows)]
    columns = {
        "row_id": hex_keys("row", shard),
        "prompt_id": hex_keys("prompt", shard, SAMPLES),
        "round": np.ones(rows, np.int32),
        "sample_idx": np.arange(rows, dtype=np.int32) % SAMPLES,
        "prompt": [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in problems],
        "completion": completion,
        "prompt_ids": lists(np.full(rows, PROMPT_TOKENS), pa.array(prompt_ids(shard).ravel())),
        "completion_ids": lists(
            lengths, pa.array(rng.integers(0, VOCAB, lengths.sum(), dtype=np.int32))
        ),
        "num_prompt_tokens": np.full(rows, PROMPT_TOKENS, np.int32),
        "num_completion_tokens": lengths.astype(np.int32),
        "finish_reason": np.where(rng.random(rows) < 0.05, "length", "stop").astype(object),
        "problem": problems,
        "answer": [str(n) for n in rng.integers(0, 1000, rows)],
        "gold_answer": [str(n) for n in rng.integers(0, 1000, rows)],
        "is_correct": rng.random(rows) < 0.6,
        "check_error": pa.nulls(rows, pa.string()),
        "repetition": rng.random(rows, np.float32),
        "metadata": [json.dumps({"level": int(n)}) for n in rng.integers(1, 6, rows)],
        "seed": rng.integers(0, 2**48, rows),
    }
    return as_stage(columns, ROLLOUT_SCHEMA)


def distributions(rng: np.random.Generator, n: int, k: int) -> tuple[Any, Any]:
    """n made-up next-token distributions: log-probabilities of the K best float16 [n, K], most
    probable first, and of the rest float16 [n]."""
    sharpness = rng.uniform(0.5, 4, (n, 1))
    weights = np.arange(1, k + 1) ** -sharpness * rng.uniform(0.5, 1, (n, k))
    weights = -np.sort(-weights, axis=1)
    rest = weights[:, -1] * rng.uniform(0.01, 1, n)
    total = weights.sum(axis=1) + rest
    logprobs = np.log(weights / total[:, None]).astype(np.float16)
    return logprobs, np.log(rest / total).astype(np.float16)


def distill_table(shard: int) -> pa.Table:
    rng = np.random.default_rng([3, shard])
    rows = ROWS_PER_SHARD
    statuses = rng.permutation(np.resize(np.array(STATUSES, object), rows))
    kept = statuses == "ok"
    tokens = lengths_of(rng, 2, 6, 60)
    scored = np.where(kept, tokens, 0)
    n = int(scored.sum())
    sequences = []
    for prompt, count in zip(prompt_ids(shard)[kept], tokens[kept], strict=True):
        rewrite = rng.integers(0, VOCAB, count, dtype=np.int32)
        rewrite[-1] = END
        sequences += [prompt, rewrite]
    top = (rng.integers(0, VOCAB, (n, 1)) + 7919 * np.arange(K)) % VOCAB
    logprobs, tails = distributions(rng, n, K)
    columns = {
        "row_id": hex_keys("distill", shard),
        "rollout_id": hex_keys("row", shard),
        "prompt_id": hex_keys("prompt", shard, SAMPLES),
        "round": np.ones(rows, np.int32),
        "candidate_idx": np.zeros(rows, np.int32),
        "status": statuses,
        "rewrite": ["so it is 12"] * rows,
        "rewrite_finish_reason": ["stop"] * rows,
        "rewrite_answer": ["12"] * rows,
        "keeps_answer": statuses != "answer_changed",
        "is_correct": rng.random(rows) < 0.6,
        "check_error": pa.nulls(rows, pa.string()),
        "draft_is_correct": rng.random(rows) < 0.6,
        "repetition": rng.random(rows, np.float32),
        "num_original_tokens": lengths_of(rng, 4, 12, 500).astype(np.int32),
        "num_rewritten_tokens": tokens.astype(np.int32),
        "compression_ratio": rng.random(rows, np.float32),
        "loss_start": np.full(rows, PROMPT_TOKENS, np.int32),
        "input_ids": lists(
            np.where(kept, tokens + PROMPT_TOKENS, 0), pa.array(np.concatenate(sequences)), kept
        ),
        "teacher_prompt_ids": pa.nulls(rows, pa.list_(pa.int32())),
        "topk_ids": lists(scored * K, pa.array(top.ravel().astype(np.int32)), kept),
        "topk_logprobs": lists(scored * K, pa.array(logprobs.ravel()), kept),
        "tail_logprobs": lists(scored, pa.array(tails), kept),
    }
    return as_stage(columns, DISTILL_SCHEMA)


def make_part(folder: Path, shards: range) -> Path:
    """Some shards of the round, as a round of their own."""
    round_dir = RoundDir(folder)
    text = " ".join(np.random.default_rng(0).choice(WORDS, 200_000)).encode()
    with (
        round_dir.lock(),
        TableWriter(round_dir, "rollouts", METADATA) as rollouts,
        TableWriter(round_dir, "distill", METADATA) as distill,
    ):
        for shard in shards:
            rollouts.add_table(rollouts_table(shard, text))
            if shard % 16 != 15:
                distill.add_table(distill_table(shard))
    return folder


def make_round(out: Path, shards: int, processes: int) -> RoundDir:
    """The whole round, put together from parts that processes make side by side."""
    whole = RoundDir(out / "whole")
    size = 128
    with ProcessPoolExecutor(processes) as pool:
        ranges = [range(first, min(first + size, shards)) for first in range(0, shards, size)]
        parts = pool.map(make_part, [out / f"part-{r.start}" for r in ranges], ranges)
        with whole.lock():
            for part in map(RoundDir, parts):
                for stage in ("rollouts", "distill"):
                    adopt(whole, part, stage)
                shutil.rmtree(part.path)
    return whole


def adopt(whole: RoundDir, part: RoundDir, stage: Stage, most: int | None = None) -> None:
    """Links the first shards of `part` into `whole` under the next names, and indexes them."""
    folder, manifest = whole.folder(stage), whole.manifest_path(stage)
    folder.mkdir(exist_ok=True, parents=True)
    first = len(whole.manifest(stage))
    with manifest.open("a") as lines:
        for number, shard in enumerate(part.manifest(stage)[:most], start=first):
            name = f"part-{number:05d}.parquet"
            os.link(part.folder(stage) / shard.name, folder / name)
            line = asdict(shard) | {"name": name}
            lines.write(json.dumps(line, separators=(",", ":")) + "\n")


def measure(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak memory in GB and the last line of a command. Raises where it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{command} failed:\n{said[-4000:]}")
    return seconds, usage.ru_maxrss * 1024 / 1e9, said.strip().splitlines()[-1]


def commands(path: Path, shards: int) -> dict[str, list[str]]:
    head = HEAD.format(path=str(path), shards=shards)
    gen = [sys.executable, "-m", "mpd_data.cli"]
    return {
        "resume, rollouts": [sys.executable, "-c", head + RESUME_ROLLOUTS],
        "resume, rewrite": [sys.executable, "-c", head + RESUME_REWRITE],
        "mpd-gen stats": [*gen, "stats", str(path)],
        "mpd-gen validate": [*gen, "validate", str(path)],
        "the trainer's plan": [sys.executable, "-c", head + TRAINING],
        "mpd-report": [sys.executable, "-m", "mpd_rounds.report.cli", str(run_of(path))],
    }


def run_of(path: Path) -> Path:
    """A run of mpd-rounds whose one round is the one at `path`, made where it is not there yet."""
    run = path.with_name(f"run-{path.name}")
    if not run.exists():
        (run / "data").mkdir(parents=True)
        (run / "data" / "round1").symlink_to(path.resolve())
        for name in ("base-test", "round1-test"):
            evaluation = RoundDir(run / "eval" / name)
            evaluation.path.mkdir(parents=True)
            adopt(evaluation, RoundDir(path), "rollouts", EVALUATION_SHARDS)
        settings = {"name": "scale", "student": "synthetic", "teacher": "synthetic", "seed": 0}
        settings |= {"rounds": 1, "evaluation": [{"name": "test"}]}
        (run / "pipeline.json").write_text(json.dumps(settings))
    return run


def growth(rows: list[int], values: list[float]) -> str:
    """The straight line through `values`, and the power law: what of it is paid once, what for each
    million rows."""
    slope, start = np.polyfit(np.array(rows) / 1e6, values, 1)
    power = np.polyfit(np.log(rows), np.log(values), 1)[0]
    return f"{start:.2f} + {slope:.2f} a million, or rows^{power:.2f}"


def scale(out: Path, rows: list[int], only: str | None, processes: int) -> None:
    """Makes the round where it is not there and prints the table."""
    sizes = [math.ceil(n / ROWS_PER_SHARD) for n in rows]
    whole = RoundDir(out / "whole")
    if not whole.path.exists():
        began = time.perf_counter()
        make_round(out, max(sizes), processes)
        print(f"made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for size in sizes:
        part = RoundDir(out / f"first-{size}")
        if not part.path.exists():
            with part.lock():
                adopt(part, whole, "rollouts", size)
                adopt(part, whole, "distill", size - size // 16)
        disk = sum(file.stat().st_size for file in part.path.glob("*/*.parquet"))
        print(f"{size:,} shards of rollouts, {disk / 1e9:.2f} GB", file=sys.stderr)
        for name, command in commands(part.path, size).items():
            if only is None or only in name:
                seconds, memory, said = measure(command)
                found.setdefault(name, []).append((size * ROWS_PER_SHARD, seconds, memory))
                print(f"  {name}: {seconds:.1f} s, {memory:.2f} GB ({said})", file=sys.stderr)
    print("| | rollouts | seconds | peak GB |\n|---|---|---|---|")
    for name, lines in found.items():
        for n, seconds, memory in lines:
            print(f"| {name} | {n:,} | {seconds:.1f} | {memory:.2f} |")
    if len(sizes) > 1:
        print("\n| | seconds grow as | memory grows as |\n|---|---|---|")
        for name, lines in found.items():
            n, seconds, memory = map(list, zip(*lines, strict=True))
            print(f"| {name} | {growth(n, seconds)} | {growth(n, memory)} |")


def scored_table(rng: np.random.Generator, k: int, even: bool) -> pa.Table:
    """64 rows of 256 scored tokens each with K ids, drawn evenly from the vocabulary or by Zipf's
    law (frequent tokens are among the best K more often)."""
    rows, each = 64, 256
    n = rows * each
    if even:
        drawn = rng.integers(0, VOCAB, (n, k))
    else:
        drawn = (VOCAB ** rng.random((n, k))).astype(np.int64) - 1
    logprobs, tails = distributions(rng, n, k)
    whole = distill_table(0).slice(0, rows)
    scored = {
        "topk_ids": lists(np.full(rows, each * k), pa.array(drawn.ravel().astype(np.int32))),
        "topk_logprobs": lists(np.full(rows, each * k), pa.array(logprobs.ravel())),
        "tail_logprobs": lists(np.full(rows, each), pa.array(tails)),
    }
    columns = {name: scored.get(name, whole.column(name)) for name in DISTILL_SCHEMA.names}
    return pa.table(columns, schema=DISTILL_SCHEMA)


def bytes_per_token(out: Path) -> None:
    """Prints what the top-K columns of a token take, for each K."""
    rng = np.random.default_rng(0)
    print("| K | even ids | Zipf ids | bound of the plan |\n|---|---|---|---|")
    for k in (8, 16, 32, 64, 128):
        cells = []
        for even in (True, False):
            round_dir = RoundDir(out / f"bytes-{k}-{even}")
            with round_dir.lock(), TableWriter(round_dir, "distill", METADATA) as writer:
                writer.add_table(scored_table(rng, k, even))
            footer = pq.read_metadata(round_dir.shard_paths("distill")[0])
            groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
            chunks = [g.column(i) for g in groups for i in range(footer.num_columns)]
            columns = ("topk_ids", "topk_logprobs", "tail_logprobs")
            size = sum(
                c.total_compressed_size for c in chunks if c.path_in_schema.startswith(columns)
            )
            cells.append(f"{size / (64 * 256):.1f}")
        bound = distill_bytes(0, 0, 1_000_000, k, VOCAB) - distill_bytes(0, 0, 1_000_000, 0, VOCAB)
        print(f"| {k} | {cells[0]} | {cells[1]} | {bound / 1e6 + 2:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the data; kept")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--only", help="only commands whose name holds this")
    parser.add_argument("--processes", type=int, default=2, help="that make the round")
    parser.add_argument("--bytes", action="store_true", help="bytes per token instead")
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},"
        f" pyarrow {pa.__version__}, polars {pl.__version__}, numpy {np.__version__}",
        file=sys.stderr,
    )
    if arguments.bytes:
        bytes_per_token(arguments.out)
    else:
        scale(arguments.out, arguments.rows, arguments.only, arguments.processes)


if __name__ == "__main__":
    main()
