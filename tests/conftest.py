"""Shared fixtures and helpers: the shipped pocket models, prompts for them, and real commands.

If MPD_TEST_DATA names a folder with prompts and a round, they are used (see ignore_option.py).
"""

import atexit
import fcntl
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from contextlib import closing, contextmanager
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nursery import Nursery

ROOT = Path(__file__).resolve().parents[1]
STUDENT = ROOT / "pipelines" / "pocket" / "models" / "student"
TEACHER = ROOT / "pipelines" / "pocket" / "models" / "teacher"
TEMPLATE = ROOT / "pipelines" / "pocket" / "rewrite.toml"
MODULES = {
    "mpd-gen": "mpd_data.cli",
    "mpd-train": "mpd_train.cli",
    "mpd-export": "mpd_train.export_cli",
    "mpd-rounds": "mpd_rounds.cli",
    "mpd-study": "mpd_rounds.study.cli",
    "mpd-report": "mpd_rounds.report.cli",
}


def pytest_addoption(parser):
    parser.addoption(
        "--all-cases",
        action="store_true",
        help="run every combination of parameters of tests/test_kl_*.py, and all kills of the kill"
        " matrix; without it, each pair of values runs once, and a third of the kills",
    )


def pytest_collection_modifyitems(config, items):
    """Thin the grids of the KL tests: a fault that only three parameters show together is rare."""
    if config.getoption("all_cases"):
        return
    grids = defaultdict(list)
    for item in items:
        is_grid = hasattr(item, "callspec") and len(item.callspec.params) > 1
        if is_grid and item.path.name.startswith("test_kl_"):
            grids[item.path, item.originalname].append(item)
    left_out = {item for grid in grids.values() for item in _beyond_pairs(grid)}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _beyond_pairs(grid):
    """Return the items of a grid that add no pair of values to the others, chosen greedily. In a
    grid of four parameters or more each kernel (target, kind, divergence) counts as a pair does."""
    pairs = {}
    for item in grid:
        values = [(name, repr(value)) for name, value in sorted(item.callspec.params.items())]
        pairs[item] = set(combinations(values, 2))
        if len(values) > 3:
            kernel = [value for value in values if value[0] in ("target", "kind", "divergence")]
            pairs[item].add(tuple(kernel))
    missing = set().union(*pairs.values())
    while missing:
        # The first of the best, so that every worker chooses the same.
        best = max(pairs, key=lambda item: len(pairs[item] & missing))
        missing -= pairs.pop(best)
    return list(pairs)


def slow(*values):
    """Return a case of a parametrized test that is slow where others are not."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Most tests ask for rows, not for an engine: without vLLM another one makes them.
ENGINE = {} if importlib.util.find_spec("vllm") else {"--backend": "transformers"}


@pytest.fixture(scope="session", autouse=True)
def exempt_imports():
    """Exempt the objects of imports from garbage collection, for good. vLLM collects seven times in
    an engine's life and undoes the exemption: of 4.6 s that an engine of the pocket models takes
    to start and close in a process that has had one, 3.6 are spent on a million such objects."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


@pytest.fixture(scope="session")
def nursery():
    return _nursery()


@cache
def _nursery():
    """Start the nursery of this process at its first use."""
    nursery = Nursery(Path(tempfile.mkdtemp(prefix="nursery-")), environment())
    nursery.__enter__()
    atexit.register(nursery.__exit__)
    os.environ.update(nursery.variables)
    return nursery


def command(program, *arguments, fresh=False):
    """Return the words that run a program or a module, in a fork of the nursery's process or a
    fresh one."""
    python = sys.executable if fresh else str(_nursery().python)
    return [python, "-m", MODULES.get(program, program), *map(str, arguments)]


def environment():
    """Return the environment of the commands; one that crashes prints where."""
    switches = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **switches}


def finish(words, code=0, env=None):
    """Run a program and return its output. Fail unless it exits with `code`."""
    words, env = [str(word) for word in words], env or environment()
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run(program, *arguments, code=0):
    """Run a real command and return its output. Fail unless it exits with `code`."""
    return finish(command(program, *arguments), code)


def python(source, *arguments, code=0, env=None):
    """Run Python source in a process of its own, as `finish` does."""
    return finish([sys.executable, "-c", textwrap.dedent(source), *arguments], code, env)


def started(program, *arguments, until, stderr=subprocess.DEVNULL, env=None, fresh=False):
    """Start a real command and return its process as soon as `until()` is true. A process that is
    to be stopped must be `fresh`: SIGSTOP would stop the one that waits for it."""
    words, env = command(program, *arguments, fresh=fresh), env or environment()
    process = subprocess.Popen(words, cwd=ROOT, env=env, stderr=stderr, text=True)
    while not until():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    return process


def killed(program, *arguments, until):
    """Start a real command and kill it as soon as `until()` is true."""
    process = started(program, *arguments, until=until)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it finished before it could be killed"


def num_shards(out, stage="rollouts"):
    return len(list((out / stage).glob("part-*.parquet")))


def invoke(command, *arguments):
    """Run a click command in this process. Return its exit code or raise its MPDError."""
    with pytest.MonkeyPatch.context() as patch:
        # What it starts is a fork.
        patch.setattr(sys, "executable", str(_nursery().python))
        code = command.main(list(map(str, arguments)), standalone_mode=False)
    return code if isinstance(code, int) else 0


def rollout_arguments(prompts, out, **changed):
    """Return the words of `mpd-gen rollouts` with small settings; None leaves one out."""
    settings = {
        "--model": STUDENT,
        "--prompts": prompts,
        "--out": out,
        "-n": 4,
        "--id-column": "id",
        "--answer-column": "answer",
        "--metadata-columns": "family",
        "--dtype": "float32",
        "--max-tokens": 400,
        "--max-num-seqs": 64,
        "--kv-cache-gib": 0.25,
        **ENGINE,
        **changed,
    }
    return ["rollouts", *(str(x) for pair in settings.items() if pair[1] is not None for x in pair)]


def rewrite_arguments(shards, **changed):
    settings = {
        "--teacher": TEACHER,
        "--shards": shards,
        "--template": TEMPLATE,
        "--score-context": "rewrite",
        "--dtype": "float32",
        "--max-tokens": 200,
        "--max-num-seqs": 64,
        "--kv-cache-gib": 0.25,
        **ENGINE,
        **changed,
    }
    return ["rewrite", *(str(x) for pair in settings.items() if pair[1] is not None for x in pair)]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(NAME, make)` returns a folder that `make(folder)` filled, in one of the workers
    for all of them."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def of(name, make):
        folder, done = common / "shared" / name, common / "shared" / f".{name}"
        folder.parent.mkdir(exist_ok=True)
        with (common / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return of


@pytest.fixture(scope="session")
def prompts(made_once):
    """A JSONL file of 60 held-out problems, made by the shipped script."""
    if "MPD_TEST_DATA" in os.environ:
        return Path(os.environ["MPD_TEST_DATA"]) / "validation.jsonl"
    return made_once("prompts", make_prompts) / "validation.jsonl"


@pytest.fixture(scope="session")
def round_dir(prompts, made_once):
    """A round with rollouts and rewrites, made by the real commands. Never write to it."""
    if "MPD_TEST_DATA" in os.environ:
        return Path(os.environ["MPD_TEST_DATA"]) / "round1"
    return made_once("round1", partial(make_round, prompts))


@pytest.fixture(scope="session")
def both_dir(round_dir, made_once):
    """The same rewrites, scored in both contexts: some when they were made, the rest by a refilter.
    Never write to it."""

    def make(out):
        told = {"--score-context": "both", "--rows-per-shard": 100}
        without_rewrites(round_dir, out)
        run("mpd-gen", *rewrite_arguments(out, **told, **{"--max-ratio": 0.5}))
        run("mpd-gen", *rewrite_arguments(out, **told), "--refilter")

    return made_once("both", make)


def make_prompts(folder):
    sizes = ["--train", "0", "--validation", "60", "--test", "0", "--ood", "0"]
    finish([sys.executable, "-m", "pipelines.pocket.prompts", "--out", folder, *sizes])
    return folder / "validation.jsonl"


def make_round(prompts, out):
    run("mpd-gen", *rollout_arguments(prompts, out), "--rows-per-shard", 100)
    run("mpd-gen", *rewrite_arguments(out), "--rows-per-shard", 100)


def small_pocket(prompts, folder):
    """Write the pocket pipeline with 24 of `prompts` in each part, four samples of each."""
    text = (ROOT / "pipelines" / "pocket" / "pipeline.toml").read_text()
    for split in ("train", "test", "ood"):
        text = text.replace(f"data/pocket/{split}.jsonl", str(prompts))
    for size in ("320", "500", "250"):
        text = text.replace(f"num_prompts = {size}", "num_prompts = 24")
    text = text.replace("num_samples = 2", "num_samples = 4")
    # A second process takes longer to start than these rows.
    text = text.replace("parts = { workers = 2 }\n", "")
    path = folder / "small.toml"
    path.write_text(text)
    return path


SCORES = ("topk_ids", "topk_logprobs", "tail_logprobs")


def rows(round_dir, stage="rollouts"):
    """Return all rows of a stage in the order of their keys, without `sampled_logprobs`: they
    differ in the last bit of float32 with the batch."""
    frame = pl.read_parquet(round_dir / stage / "*.parquet").sort("row_id")
    return frame.drop("sampled_logprobs", strict=False)


def without_rewrites(round_dir, folder):
    """Copy a round without its rewrites into `folder`."""
    shutil.copytree(round_dir, folder, ignore=shutil.ignore_patterns("distill*", ".*"))
    info = json.loads((folder / "run.json").read_text())
    del info["stages"]["distill"]
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def edit_rows(round_dir, stage, change):
    """Rewrite the shards of a copied round without updating its manifest.

    `change` gets each row as a dict and may edit it; it returns False to delete the row.
    """
    for file in sorted((round_dir / stage).glob("*.parquet")):
        table = pq.read_table(file)
        rows = [row for row in table.to_pylist() if change(row) is not False]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


def assert_near(ours, theirs):
    """Scores of the same rewrites differ in the last bit of float32 with the batch they were in."""
    ours, theirs = (frame["topk_logprobs"].explode().cast(pl.Float64) for frame in (ours, theirs))
    assert len(ours) == len(theirs)
    assert (ours - theirs).filter(theirs > -10).abs().max() < 2e-2


def model_with(folder, model, suffix):
    """Copy `model` and append `suffix` to its chat template."""
    shutil.copytree(model, folder)
    with (folder / "chat_template.jinja").open("a") as file:
        file.write(suffix)
    return folder


def other_tokenizer(folder):
    """Copy the student and exchange two tokens of its vocabulary."""
    path = shutil.copytree(STUDENT, folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(content))
    return folder


def train_config(shards, student, out, **changed):
    from mpd_train.config import TrainConfig

    settings = {"student": str(student), "out": out, "pack_length": 600, "dtype": "float32"}
    return TrainConfig(shards=[shards], **{**settings, **changed})


@contextmanager
def until_a_checkpoint():
    """Interrupt the training inside, after its first checkpoint."""
    from mpd_train import checkpoint

    save = checkpoint.save

    def save_and_stop(*given):
        save(*given)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save_and_stop)
        yield


def metrics_lines(out):
    """Return the lines of a training's metrics.jsonl; none before it has begun."""
    path = out / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def metrics(out):
    return [json.loads(line) for line in metrics_lines(out)]


def row_log(out):
    """Return what a training wrote of its rows, whatever the process: step, row and divergence. A
    step with packs of two epochs may have a row twice."""
    files = sorted((out / "rows").glob("rank-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted((line["step"], line["row"], line["kl"]) for line in lines)


def losses(out):
    return [record["loss"] for record in metrics(out) if "loss" in record]


def weights(out):
    """Return the weights that a training or mpd-export wrote."""
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(4, 60)[None]).logits


def drained(engine):
    """Return the results of an engine by key, when it has finished all requests."""
    found = {}
    while engine.in_flight:
        found |= {result.key: result for result in engine.step()}
    return found


@pytest.fixture(scope="session")
def exact_student(tmp_path_factory):
    """The pocket student in float32, so that its exports are not rounded."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(STUDENT, tmp_path_factory.mktemp("student") / "student")
    AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).save_pretrained(folder)
    return folder


def loss_on_all(shards, model):
    """Return the mean loss of a model on all kept rows, which has no noise from steps."""
    import torch

    from mpd_data.common.models import resolve_model
    from mpd_train.config import LossConfig
    from mpd_train.data.batches import Loader
    from mpd_train.data.packing import make_packs
    from mpd_train.distributed import Ranks
    from mpd_train.loss import validate
    from mpd_train.model.causal_lm import CausalLM

    cpu = torch.device("cpu")
    student = CausalLM(resolve_model(str(model)), cpu, torch.float32, False)
    packs = make_packs(shards, 2000, 0, 0)
    vocab = shards.metadata["vocab_size"]
    with closing(Loader(shards, cpu)) as loader:
        return validate(student, None, loader, packs, vocab, LossConfig(), torch.float32, Ranks())[
            0
        ]


def tied_student(folder, dtype):
    """Save a model of the student's shape with tied embeddings and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(STUDENT, folder)
    config = AutoConfig.from_pretrained(STUDENT)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def with_adapter(base, targets):
    """Return `base` as a peft model with an adapter of rank 6 that changes its output."""
    import peft
    import torch

    settings = peft.LoraConfig(r=6, lora_alpha=9, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(0)  # peft initialises one of the adapter's factors at random
    adapted = peft.get_peft_model(base, settings)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.6)
    return adapted


def saved_weights(checkpoint):
    """Return the weights of a training's checkpoint, joined from the parts in its files."""
    import torch
    from safetensors import safe_open

    parts = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places = json.loads((tensors.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in tensors.keys():  # noqa: SIM118  # no dict
                if not name.startswith("exp_avg"):
                    begin = places[name]["saved_offsets"][0] if name in places else 0
                    parts.setdefault(name, {})[begin] = tensors.get_tensor(name)
    return {
        name: torch.cat([part for _, part in sorted(by_begin.items())])
        for name, by_begin in parts.items()
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    from browser import HOW, find_browser
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = find_browser(playwright.chromium.executable_path)
        if path is None:
            # Where nobody reads what was skipped, a skipped test is none.
            (pytest.fail if os.environ.get("CI") else pytest.skip)(HOW)
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()
