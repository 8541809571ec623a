"""The pocket world: its problems, traces and splits, and the skills of its shipped models."""

import json
import random
import re
import tomllib
from itertools import islice
from pathlib import Path
from statistics import fmean

import pytest
import torch
from click.testing import CliRunner

from pipelines.pocket import prompts, world
from pipelines.pocket.generation import TEMPLATE, Sample, load, rewrite_prompt, sample
from pipelines.pocket.tokenizer import build_tokenizer, prompt_ids

MODELS = Path(prompts.__file__).with_name("models")
LINE = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
VERBOSE = world.Habit(
    reads=1.0,
    recalls=0.7,
    checks=0.5,
    repeats=0.2,
    notes=0.4,
    blunders=0.1,
    doubts=0.3,
    retraces=0.4,
)


def drawn(family: world.Family, count: int, seed: int = 0) -> list[world.Problem]:
    rng = random.Random(f"{family} {seed}")
    return [world.sample_problem(rng, family) for _ in range(count)]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answer_by_reading(text: str) -> int:
    """Solve a problem from the words of its story, without the code of the world."""
    start, *amounts = (int(word) for word in text.split() if word.isdigit())
    gains = r"(?:wins|finds) (\d+)|(\d+) on"
    losses = r"(?:gives|loses|costs) (\d+)|(\d+) off"
    plus = [int(a or b) for a, b in re.findall(gains, text)]
    minus = [int(a or b) for a, b in re.findall(losses, text)]
    assert len(plus) + len(minus) == len(amounts)
    return start + sum(plus) - sum(minus)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_every_route_reaches_the_answer_that_the_story_tells(family: world.Family) -> None:
    for problem in drawn(family, 300):
        assert answer_by_reading(problem.text) == problem.answer
        traces = [world.concise_trace(problem, route) for route in world.ROUTES[family]]
        assert len(set(traces)) == len(traces) >= 2
        for trace in traces:
            lines = LINE.findall(trace)
            assert len(lines) >= 3
            for left, sign, right, result in lines:
                value = int(left) + int(right) if sign == "+" else int(left) - int(right)
                assert value == int(result)
            assert trace.endswith(f" = {problem.answer} . </think> answer {problem.answer}")


@pytest.mark.parametrize("family", world.FAMILIES)
def test_verbose_traces_are_longer_and_right_unless_they_slip(family: world.Family) -> None:
    rng = random.Random(1)
    lengths, wrong = [], 0
    for problem in drawn(family, 300):
        trace = world.sample_trace(rng, problem, VERBOSE)
        assert trace.answer == problem.answer
        assert trace.text.endswith(f"</think> answer {trace.answer}")
        concise = world.ideal_rewrite(problem, trace.text)
        assert world.route_of(problem, trace.text) == trace.route
        assert world.route_of(problem, concise) == trace.route
        lengths.append((len(trace.text.split()), len(concise.split())))
        slipped = world.sample_trace(rng, problem, VERBOSE, slip_rate=0.2)
        wrong += slipped.answer != problem.answer
        assert world.ideal_rewrite(problem, slipped.text).endswith(f"answer {problem.answer}")
    assert all(verbose >= concise for verbose, concise in lengths)
    assert sum(verbose for verbose, _ in lengths) > 2.5 * sum(concise for _, concise in lengths)
    assert 30 < wrong < 270


def test_prompt_files_are_disjoint_and_repeatable(tmp_path: Path) -> None:
    sizes = {"train": 900, "validation": 150, "test": 200, "ood": 100}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    for folder in ("first", "second"):
        done = CliRunner().invoke(prompts.main, ["--out", str(tmp_path / folder), *options])
        assert done.exit_code == 0, done.output
    texts: list[str] = []
    for name, size in sizes.items():
        path = tmp_path / "first" / f"{name}.jsonl"
        assert path.read_bytes() == (tmp_path / "second" / f"{name}.jsonl").read_bytes()
        rows = read(path)
        assert len({row["id"] for row in rows}) == len(rows) == size
        split = "test" if name == "ood" else name
        families = world.OUT_OF_DISTRIBUTION if name == "ood" else world.IN_DISTRIBUTION
        assert {row["family"] for row in rows} == set(families)
        for row in rows:
            assert world.split_of(row["problem"]) == split
            assert row["answer"] == str(answer_by_reading(row["problem"]))
            texts.append(row["problem"])
    assert len(set(texts)) == len(texts)


def test_every_split_holds_a_fair_share() -> None:
    counts = dict.fromkeys(("pretrain", "train", "validation", "test"), 0)
    for family in world.FAMILIES:
        for problem in drawn(family, 700):
            counts[world.split_of(problem.text)] += 1
    assert min(counts.values()) > 60
    assert max(counts, key=lambda name: counts[name]) == "pretrain"


def test_tokenizer_round_trips_the_world() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(2)
    for family in world.FAMILIES:
        for problem in drawn(family, 200):
            draft = world.sample_trace(rng, problem, VERBOSE, slip_rate=0.1).text
            text = rewrite_prompt(problem.text, draft)
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids + prompt_ids(tokenizer, text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("a word unheard of").input_ids.count(tokenizer.unk_token_id) == 3


def test_chat_template_has_the_shape_of_qwens() -> None:
    tokenizer = build_tokenizer()
    ids = prompt_ids(tokenizer, "a bus")
    assert tokenizer.decode(ids) == "<|im_start|> user a bus <|im_end|> <|im_start|> assistant"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_rewrite_template_reads_and_lays_out_a_trace() -> None:
    template = tomllib.loads(Path(prompts.__file__).with_name("rewrite.toml").read_text("utf-8"))
    assert template == TEMPLATE
    (problem,) = drawn("shop", 1)
    trace = world.concise_trace(problem, "total first")
    match = re.fullmatch(template["output"], trace, re.DOTALL)
    assert match is not None
    laid_out = template["trace"]
    for name, text in match.groupdict().items():
        laid_out = laid_out.replace(f"{{{{{name}}}}}", text)
    assert laid_out == trace
    assert re.fullmatch(template["output"], trace + " so", re.DOTALL) is None


def mean_tokens(samples: list[Sample]) -> float:
    return fmean(one.num_tokens for one in samples)


@pytest.fixture(scope="module")
def drafts() -> list[Sample]:
    """Sixteen samples of the shipped student for each family, at temperature 1."""
    torch.set_num_threads(1)
    tasks = [
        (problem, problem.text)
        for family in world.FAMILIES
        for problem in islice(world.problems(random.Random(3), (family,), "validation"), 16)
    ]
    student, tokenizer = load(MODELS / "student")
    return sample(student, tokenizer, tasks, temperature=1.0)


def test_shipped_student_solves_verbosely(drafts: list[Sample]) -> None:
    assert fmean(draft.ended for draft in drafts) > 0.9
    assert 0.5 < fmean(draft.right for draft in drafts) < 0.97
    assert 90 < mean_tokens(drafts) < 190


def test_shipped_teacher_rewrites_what_the_student_wrote(drafts: list[Sample]) -> None:
    teacher, tokenizer = load(MODELS / "teacher")
    right = [draft for draft in drafts if draft.right]
    tasks = [(draft.problem, rewrite_prompt(draft.problem.text, draft.text)) for draft in right]
    rewrites = sample(teacher, tokenizer, tasks, temperature=0.0)
    assert fmean(rewrite.ended for rewrite in rewrites) > 0.9
    assert fmean(rewrite.right for rewrite in rewrites) > 0.8
    assert mean_tokens(rewrites) < 0.6 * mean_tokens(right)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_shipped_training_log_ends_where_the_recipe_does(role: str) -> None:
    rows = read(MODELS / role / "train_log.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert float(steps[-1]["loss"]) < 0.7 * float(steps[0]["loss"])
    assert float(steps[-1]["lr_scale"]) < 0.01
    assert float(rows[-1]["greedy_accuracy"]) > 0.9
