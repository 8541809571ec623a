"""How near `mpd-gen rollouts` and `rewrite` come to the engine's own limit, in one run:

    PYTHONPATH=. python benchmarks/generation.py                    rollouts, rewrite, memory
    PYTHONPATH=. python benchmarks/generation.py rollouts async     of these, the ones named

rollouts  the stage, shards and checks included, beside a bare `LLM.generate` over the whole list at
          once, which batches as well as the engine can; then transformers' `generate` in static
          batches, on the first requests of the list. All three sample with the same model; the
          stage and the bare engine give the same tokens, or the run ends.
rewrite   the stage beside one `LLM.generate` of the rewrites and one that scores those it kept.
memory    resident memory of `mpd-gen rollouts`, at 2,000 rows and at the end of 20,000.
async     AsyncLLM, with the engine in a process of its own, beside the stage's step loop.

Runs are interleaved in pairs after one that warms up; a ratio is the median of the pairs'. The
engine is started once, outside the figures; all else that a stage does is in them. CPU seconds are
those of this process, without the checks' processes, and are the steadier figure on a busy machine.

Lengths: the rollouts' model is the pocket student with its output head set to zero, so that each
token, the end included, has the chance of one in 165; completions then have geometric lengths up to
the limit of 512, at the cost of the whole model. The rewrites are of natural traces. One thread.
Prints Markdown tables for benchmarks/README.md.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import polars as pl

from mpd_data import rewrite, rewrite_setup, rollouts
from mpd_data.common.models import ModelFiles, resolve_model
from mpd_data.common.options import arguments
from mpd_data.config import EngineConfig, RewriteConfig, RolloutsConfig
from mpd_data.engines.start import start_engine
from mpd_data.rewrite_setup import ROLLOUT_COLUMNS
from mpd_data.store.locks import WHOLE
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import seed_of

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "pipelines" / "pocket"
ENGINE = EngineConfig(dtype="float32")
STATIC_BATCH = 128
# Short: what counts is the number of rows.
MEMORY_TOKENS = 40


@dataclass(frozen=True)
class Took:
    """Seconds of one run, by the wall and of this process's CPU."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def report(name: str, limit: str, pairs: list[tuple[Took, Took]], tokens: int) -> None:
    """A table of (stage, limit) runs of so many tokens, and the medians of their ratios."""
    print(f"\n| pair | {name} s (CPU s) | {limit} s (CPU s) | ratio | of CPU |")
    print("|---|---|---|---|---|")
    for i, (ours, bare) in enumerate(pairs, 1):
        print(
            f"| {i} | {ours.wall:.1f} ({ours.cpu:.1f}) | {bare.wall:.1f} ({bare.cpu:.1f}) |"
            f" {bare.wall / ours.wall:.3f} | {bare.cpu / ours.cpu:.3f} |"
        )
    wall = statistics.median(bare.wall / ours.wall for ours, bare in pairs)
    cpu = statistics.median(bare.cpu / ours.cpu for ours, bare in pairs)
    speed = statistics.median(tokens / ours.wall for ours, _ in pairs)
    print(f"\n**{name} at {wall:.3f} of {limit}** (by CPU time {cpu:.3f}), {speed:,.0f} tokens/s")


@contextmanager
def engine_kept(model: ModelFiles, max_logprobs: int) -> Iterator[Any]:
    """An engine for one stage after another: they close what they are given, and it stays open."""
    engine: Any = start_engine(model, ENGINE, max_logprobs=max_logprobs)
    close, engine.close = engine.close, lambda: None
    yield engine
    close()


def pocket_prompts(folder: Path, count: int) -> Path:
    sizes = ["--train", count, "--validation", 0, "--test", 0, "--ood", 0]
    made = [sys.executable, "-m", "pipelines.pocket.prompts", "--out", folder, *sizes]
    subprocess.run(list(map(str, made)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "train.jsonl"


def model_of_spread_lengths(folder: Path) -> Path:
    """See above: every token is as likely as any other."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(POCKET / "models" / "student", folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rollouts_config(model: Path, prompts: Path, out: Path, **changed: Any) -> RolloutsConfig:
    settings = {
        "model": str(model),
        "prompts": [str(prompts)],
        "out": out,
        "id_column": "id",
        "answer_column": "answer",
        "sampling": {"max_tokens": 512},
        "engine": ENGINE,
    }
    return RolloutsConfig(**{**settings, **changed})


def requests_of(config: RolloutsConfig) -> list[rollouts.Request]:
    """What the stage will ask for, in its order."""
    prepared = rollouts.setup(config)
    return [request for prompt in prepared.prompts for request in prepared.requests(prompt)]


def sampling_params(config: RolloutsConfig | RewriteConfig, row_id: str) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        max_tokens=config.sampling.max_tokens,
        seed=seed_of(row_id),
        detokenize=False,
    )


def column(out: Path, stage: str, name: str) -> dict[str, Any]:
    """A column of a round's rows, by row."""
    frame = pl.read_parquet(out / stage / "*.parquet", columns=["row_id", name])
    return dict(frame.iter_rows())


def measure_rollouts(folder: Path, num_requests: int, num_pairs: int, use_async: bool) -> None:
    model = model_of_spread_lengths(folder / "model")
    prompts = pocket_prompts(folder / "prompts", num_requests // 4)
    out = folder / "round"
    config = rollouts_config(model, prompts, out, num_samples=4)
    requests = requests_of(config)

    with engine_kept(resolve_model(str(model)), 1) as engine:

        def stage() -> Took:
            shutil.rmtree(out, ignore_errors=True)
            took = timed(
                lambda: rollouts.sample(rollouts.setup(config), start=lambda *_, **__: engine)
            )
            found = column(out, "rollouts", "completion_ids")
            assert not expected or found == expected, "the stage gave other tokens"
            expected.update(found)
            return took

        def bare() -> Took:
            params = [sampling_params(config, request.row_id) for request in requests]
            ids = [{"prompt_token_ids": request.ids} for request in requests]
            outputs: list[Any] = []
            took = timed(
                lambda: outputs.extend(engine.inner.llm.generate(ids, params, use_tqdm=False))
            )
            pairs = zip(requests, outputs, strict=True)
            found = {request.row_id: list(o.outputs[0].token_ids) for request, o in pairs}
            assert found == expected, "the bare engine gave other tokens"
            return took

        expected: dict[str, list[int]] = {}
        stage(), bare()
        lengths = [len(ids) for ids in expected.values()]
        spread = ", ".join(f"{x:.0f}" for x in np.percentile(lengths, [0, 5, 25, 50, 75, 95, 100]))
        print(f"\n{len(requests)} requests; lengths at 0, 5, 25, 50, 75, 95, 100%: {spread}")
        pairs = [(stage(), bare()) for _ in range(num_pairs)]
    tokens = sum(lengths)
    report("rollouts", "LLM.generate", pairs, tokens)
    ours = statistics.median(took.wall for took, _ in pairs)
    if use_async:
        measure_async(model, config, requests, tokens, ours, num_pairs)
        return
    begun = time.perf_counter()
    static_tokens = static_batches(model, config, requests[: 2 * STATIC_BATCH])
    seconds = time.perf_counter() - begun
    print(
        f"\n**rollouts at {tokens / ours * seconds / static_tokens:.1f} times transformers' static"
        f" batches** of {STATIC_BATCH} ({static_tokens} tokens in {seconds:.0f} s,"
        f" {static_tokens / seconds:,.0f} tokens/s)"
    )


def static_batches(model: Path, config: RolloutsConfig, requests: list[rollouts.Request]) -> int:
    """`generate` over requests as they come; tokens up to each row's end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = 0
    for i in range(0, len(requests), STATIC_BATCH):
        batch = tokenizer.pad(
            {"input_ids": [r.ids for r in requests[i : i + STATIC_BATCH]]}, return_tensors="pt"
        )
        output = student.generate(
            **batch,
            do_sample=True,
            temperature=config.sampling.temperature,
            top_k=0,
            max_new_tokens=config.sampling.max_tokens,
        )
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            end = tokenizer.eos_token_id
            tokens += row.index(end) + 1 if end in row else len(row)
    return tokens


def measure_async(
    model: Path,
    config: RolloutsConfig,
    requests: list[rollouts.Request],
    tokens: int,
    ours: float,
    num_runs: int,
) -> None:
    """AsyncLLM on the same requests, all submitted at once; the stage took `ours` seconds."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        max_num_seqs=ENGINE.max_num_seqs,
        enforce_eager=True,
        kv_cache_memory_bytes=int(ENGINE.kv_cache_gib * (1 << 30)),
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        disable_log_stats=True,
    )

    async def one(engine: Any, request: rollouts.Request) -> int:
        params = sampling_params(config, request.row_id)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt = {"prompt_token_ids": request.ids}
        async for output in engine.generate(prompt, params, request.row_id):
            tokens = len(output.outputs[0].token_ids)
        return tokens

    async def all_runs() -> tuple[float, float]:
        """Seconds of its start, and the median of a run."""
        begun = time.perf_counter()
        engine = AsyncLLM.from_engine_args(settings)
        start, runs = time.perf_counter() - begun, []
        try:
            for _ in range(num_runs + 1):
                begun = time.perf_counter()
                made = sum(await asyncio.gather(*(one(engine, request) for request in requests)))
                runs.append(time.perf_counter() - begun)
                assert made == tokens, "AsyncLLM gave other tokens"
        finally:
            engine.shutdown()
        return start, statistics.median(runs[1:])

    start, theirs = asyncio.run(all_runs())
    print(
        f"\n**rollouts at {theirs / ours:.3f} of AsyncLLM**, which here makes neither shards nor"
        f" checks: {tokens / theirs:,.0f} tokens/s. It starts in {start:.0f} s."
    )


def measure_rewrite(folder: Path, num_requests: int, num_pairs: int) -> None:
    prompts = pocket_prompts(folder / "prompts", num_requests // 4)
    drafts, out = folder / "drafts", folder / "round"
    student = POCKET / "models" / "student"
    rollouts.run_rollouts(rollouts_config(student, prompts, drafts, num_samples=4))
    config = RewriteConfig(
        teacher=str(POCKET / "models" / "teacher"),
        shards=out,
        template=str(POCKET / "rewrite.toml"),
        score_context="rewrite",
        sampling={"max_tokens": 400},
        engine=ENGINE,
    )
    teacher = resolve_model(config.teacher)
    shutil.copytree(drafts, out)
    prepared = rewrite_setup.setup(config)
    k = prepared.engine_k
    asked = {
        row["row_id"]: prepared.ask_about(row).prompt_ids
        for row in RoundDir(out).rows("rollouts", ROLLOUT_COLUMNS)
        if row["finish_reason"] == "stop"
    }
    with engine_kept(teacher, k) as engine:
        from vllm import SamplingParams

        def stage() -> Took:
            shutil.rmtree(out)
            shutil.copytree(drafts, out)
            return timed(
                lambda: rewrite.distill(rewrite_setup.setup(config), start=lambda *_, **__: engine)
            )

        stage()
        rows = pl.read_parquet(out / "distill" / "*.parquet")
        expected = dict(rows.select("rollout_id", "rewrite").iter_rows())
        kept = rows.filter(pl.col("topk_ids").is_not_null())
        to_score = [
            {"prompt_token_ids": [*prompt, *ids[start:]]}
            for prompt, ids, start in kept.select(
                "teacher_prompt_ids", "input_ids", "loss_start"
            ).iter_rows()
        ]
        to_rewrite = [{"prompt_token_ids": ids} for ids in asked.values()]

        def bare() -> Took:
            sampling = [sampling_params(config, row_id) for row_id in asked]
            scoring = SamplingParams(
                max_tokens=1, prompt_logprobs=k, flat_logprobs=True, detokenize=False
            )
            rewrites: list[Any] = []

            def both() -> None:
                rewrites.extend(engine.inner.llm.generate(to_rewrite, sampling, use_tqdm=False))
                engine.inner.llm.generate(to_score, scoring, use_tqdm=False)

            took = timed(both)
            for row_id, output in zip(asked, rewrites, strict=True):
                sample = output.outputs[0]
                ids = sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
                text = prepared.tokenizer.decode(ids, skip_special_tokens=False)
                assert text == expected[row_id], "the bare engine gave another rewrite"
            return took

        bare()
        print(f"\n{len(asked)} rewrites, {len(to_score)} of them scored at K = {k}")
        pairs = [(stage(), bare()) for _ in range(num_pairs)]
    report("rewrite", "two LLM.generate", pairs, rows["num_rewritten_tokens"].sum())


def resident(pid: int) -> float:
    """MiB that a process holds in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (size,) = (line for line in lines if line.startswith("VmRSS"))
    return int(size.split()[1]) / 1024


def measure_memory(folder: Path) -> None:
    """Looks from outside at the command that a user types."""
    prompts = pocket_prompts(folder / "prompts", 5_000)
    student, out = POCKET / "models" / "student", folder / "round"
    config = rollouts_config(
        student, prompts, out, num_samples=4, sampling={"max_tokens": MEMORY_TOKENS}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mpd_data.cli", "rollouts", *arguments(config)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    status = RoundDir(out).status_path("rollouts", WHOLE)
    seen: list[tuple[int, float]] = []
    while process.poll() is None:
        time.sleep(0.2)
        said = json.loads(status.read_text()) if status.exists() else {"rows": 0}
        if said["rows"] >= 2_000 and said["state"] == "running":
            seen.append((said["rows"], resident(process.pid)))
    assert process.returncode == 0
    (first, few), (last, many) = seen[0], seen[-1]
    print(
        f"\n**resident memory {few:.0f} MiB after {first:,} rows, {many:.0f} MiB after {last:,}:"
        f" {many / few - 1:+.1%}**"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parts = ["rollouts", "rewrite", "memory", "async"]
    parser.add_argument("parts", nargs="*", choices=[*parts, []])
    parser.add_argument("--requests", type=int, default=1024, help="rollouts to sample")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of runs")
    asked = parser.parse_args()
    chosen = asked.parts or parts[:3]
    if len(chosen) > 1:
        print(f"{cpu_name()}, {os.cpu_count()} cores, {date.today()}", flush=True)
        sizes = ["--requests", str(asked.requests), "--pairs", str(asked.pairs)]
        for part in chosen:
            # A process for each: none finds another's engine, or memory to be used again.
            subprocess.run([sys.executable, __file__, part, *sizes], check=True)
        return
    (part,) = chosen
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if part == "rewrite":
            measure_rewrite(folder, asked.requests, asked.pairs)
        elif part == "memory":
            measure_memory(folder)
        else:
            measure_rollouts(folder, asked.requests, asked.pairs, part == "async")


def cpu_name() -> str:
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return names[0].partition(": ")[2] if names else platform.machine()


if __name__ == "__main__":
    main()
