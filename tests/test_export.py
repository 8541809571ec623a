"""What a training leaves behind is the model that it trained: greedy, token for token."""

import copy

import pytest
import torch
from conftest import STUDENT, rows, tied_student, train_config
from nursery import Nursery
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpd_train import loop
from mpd_train.loop import train

MAX_TOKENS = 120
NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def precision(request):
    return request.param


@pytest.fixture(scope="module", params=["full", "lora", "tied"])
def exported(request, precision, round_dir, exact_student, tmp_path_factory):
    """A training on the round: the folder of the student that it started from, that of the export,
    and the student that was trained, as it stood when the last step was done."""
    folder = tmp_path_factory.mktemp(f"{request.param}-{precision}")
    start, settings = exact_student if precision == "float32" else STUDENT, {"epochs": 1}
    if request.param == "lora":
        settings |= {"lora": {"lora_r": 8}, "optimizer": {"learning_rate": 3e-3}}
    if request.param == "tied":
        # From random weights: until it writes more than one token.
        start = tied_student(folder / "tied", precision)
        settings |= {"epochs": 6, "optimizer": {"learning_rate": 3e-3}}
    live = []
    export = loop._export

    def seen(config, student, ranks):
        # The export merges adapters in place.
        live.append(copy.deepcopy(student))
        export(config, student, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_export", seen)
        settings = {"optimizer": {"learning_rate": 5e-4}, **settings}
        train(train_config(round_dir, start, folder / "run", **settings))
    return start, folder / "run" / "model", live[0]


@pytest.fixture(scope="module")
def continued(exported, nursery, prompts, tmp_path_factory):
    """Prompts in token ids with what vLLM's greedy search makes of the export, in float32."""
    out = tmp_path_factory.mktemp("greedy") / "round"
    nursery.finish(
        [
            "rollouts", "--model", exported[1], "--prompts", prompts, "--out", out,
            "--temperature", 0, "--max-tokens", MAX_TOKENS, "--id-column", "id",
            "--num-prompts", NUM_PROMPTS, "--dtype", "float32",
        ]
    )  # fmt: skip
    pairs = rows(out).select("prompt_ids", "completion_ids").rows()
    assert len(pairs) == NUM_PROMPTS
    return pairs


def as_transformers(folder, prompt_ids):
    """Greedy, by transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids in prompt_ids:
        ids = torch.tensor([ids])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS
        )
        yield found[0, ids.shape[1] :].tolist()


def as_trained(student, pairs):
    """What the trainer's own pass (packed, states times head) ranks first after each prefix of the
    completions: they are its greedy output if and only if these are their tokens."""
    student.model.eval()
    ids = torch.tensor([[x for prompt, completion in pairs for x in prompt + completion]])
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        first = (student.states(ids, positions)[0] @ student.head().T).argmax(-1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [
        first[end - 1 - len(completion) : end - 1].tolist()
        for end, (_, completion) in zip(ends, pairs, strict=True)
    ]


def brought_to(student, precision):
    """The live student as the export says it is: adapters added to the weights in float32, then
    the weights rounded to the student's precision and computed with in float32. Of a float32
    student nothing is rounded; without adapters it is the live student, untouched."""
    if student.adapted is not None:
        student.model = student.adapted.merge_and_unload()
    if precision == "bfloat16":
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.copy_(parameter.bfloat16())
    return student


def test_the_export_generates_what_the_trained_student_does(exported, continued, precision):
    start, folder, live = exported
    completions = [completion for _, completion in continued]
    assert list(as_transformers(folder, [ids for ids, _ in continued])) == completions
    if precision == "float32":
        # Adapters still beside the weights.
        assert as_trained(live, continued) == completions
    assert as_trained(brought_to(live, precision), continued) == completions
    # The weights have moved as far as that this can be seen.
    before = list(as_transformers(start, [ids for ids, _ in continued]))
    assert sum(a == b for a, b in zip(before, completions, strict=True)) < NUM_PROMPTS / 2
    assert len({tuple(completion) for completion in completions}) > NUM_PROMPTS / 2


def test_the_exports_weights_are_the_trained_ones(exported, precision):
    start, folder, live = exported
    found = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, precision)}
    assert found.keys() == load_file(start / "model.safetensors").keys()
    trained = dict(brought_to(copy.deepcopy(live), precision).model.named_parameters())
    assert found.keys() == trained.keys()
    for name, weight in found.items():
        assert torch.equal(weight.float(), trained[name]), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(STUDENT).chat_template
