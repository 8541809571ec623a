"""What a training leaves behind is the model that it trained: greedy, token for token."""

import copy
import errno
import json
import resource
import shutil

import pytest
import torch
from conftest import ROOT, STUDENT, rows, slow, tied_student, train_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import resolve_model
from mpd_train import loop
from mpd_train.card import Trained
from mpd_train.dryrun.plan import plan_train
from mpd_train.export import export, rehearse
from mpd_train.loop import train
from mpd_train.model.causal_lm import CausalLM
from mpd_train.setup import setup

MAX_TOKENS = 120
NUM_PROMPTS = 24


KINDS = [(kind, dtype) for kind in ("full", "lora") for dtype in ("float32", "bfloat16")]


@pytest.fixture(
    scope="module",
    params=[*KINDS, slow(("tied", "float32")), ("tied", "bfloat16")],
    ids=lambda kind: "-".join(kind),
)
def kind(request):
    """What is trained, and the student's precision."""
    return request.param


@pytest.fixture(scope="module")
def precision(kind):
    return kind[1]


@pytest.fixture(scope="module")
def exported(kind, precision, round_dir, exact_student, tmp_path_factory):
    """A training on the round: the folder of the student that it started from, that of the export,
    and the student that was trained, as it stood when the last step was done."""
    folder = tmp_path_factory.mktemp("-".join(kind))
    start, settings = exact_student if precision == "float32" else STUDENT, {"epochs": 1}
    if kind[0] == "lora":
        settings |= {"lora": {"lora_r": 8}, "optimizer": {"learning_rate": 3e-3}}
    if kind[0] == "tied":
        # From random weights: until it writes more than one token.
        start = tied_student(folder / "tied", precision)
        settings |= {"epochs": 6, "optimizer": {"learning_rate": 3e-3}}
    live = []
    export = loop._export

    def seen(trained, student, ranks):
        # The export merges adapters in place.
        live.append(copy.deepcopy(student))
        export(trained, student, ranks)

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


@pytest.mark.slow
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


# -- the folder as it came -----------------------------------------------------------------

CPU = torch.device("cpu")
GOLDEN = ROOT / "tests" / "data" / "golden" / "round1"
# Old readers' names and new ones', a sampling setting without do_sample, which transformers does
# not write.
CONFIG = {"torch_dtype": "bfloat16", "rope_theta": 10000.0, "kept_as_it_came": [1]}
GENERATION = '{"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}'


def test_each_tensor_keeps_its_dtype_and_the_rest_its_content(tmp_path):
    start = shutil.copytree(STUDENT, tmp_path / "student")
    tensors = load_file(start / "model.safetensors")
    kept = {name: x.float() + 1e-5 for name, x in tensors.items() if "norm" in name}
    save_file(tensors | kept, start / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | CONFIG))
    (start / "generation_config.json").write_text(GENERATION)
    trained = Trained(train_config(tmp_path, start, tmp_path / "run"), "out")
    export(
        CausalLM(resolve_model(str(start)), CPU, torch.float32, False), tmp_path / "out", trained
    )
    assert_the_same(tmp_path / "out" / "model", start)


def test_where_transformers_joins_tensors_too(tmp_path):
    """Its own names of experts and routers are not those of the files."""
    start = shutil.copytree(STUDENT, tmp_path / "student")
    config = MixtralConfig(
        vocab_size=165, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(start)
    tensors = load_file(start / "model.safetensors")
    assert any("block_sparse_moe.gate" in name for name in tensors)
    for name, x in tensors.items():
        tensors[name] = x if ".gate." in name else x.bfloat16()
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    trained = Trained(train_config(tmp_path, start, tmp_path / "run"), "out")
    export(
        CausalLM(resolve_model(str(start)), CPU, torch.float32, False), tmp_path / "out", trained
    )
    assert_the_same(tmp_path / "out" / "model", start)


def assert_the_same(exported, start):
    found, tensors = (load_file(x / "model.safetensors") for x in (exported, start))
    assert {name: x.dtype for name, x in found.items()} == {n: x.dtype for n, x in tensors.items()}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    for file in start.glob("*.json"):
        assert (exported / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_generation_config_that_transformers_would_not_write_is_copied(tmp_path):
    start = shutil.copytree(STUDENT, tmp_path / "student")
    (start / "generation_config.json").write_text(GENERATION)
    train(train_config(GOLDEN, start, tmp_path / "run", max_steps=1))
    model = tmp_path / "run" / "model"
    assert (model / "generation_config.json").read_text() == GENERATION


def test_what_would_fail_at_the_end_fails_before_the_first_step(tmp_path):
    start = shutil.copytree(STUDENT, tmp_path / "student")
    config = train_config(GOLDEN, start, tmp_path / "run", max_steps=1)
    rehearse(resolve_model(str(start)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    (start / "notes.json").symlink_to("/proc/self/mem")
    with pytest.raises(ConfigError, match="could not be written there at the end"):
        train(config)
    with pytest.raises(ConfigError, match="could not be written there at the end"):
        plan_train(setup(config, weights=False))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_disk_without_room_for_the_model_is_refused(tmp_path):
    start = shutil.copytree(STUDENT, tmp_path / "student")
    # None of it is written.
    tensor = {"dtype": "F32", "shape": [1 << 41], "data_offsets": [0, 1 << 43]}
    header = json.dumps({"x": tensor}).encode()
    with (start / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 43))
    with pytest.raises(ConfigError, match="needs 8.* of disk at the end, and .* are free"):
        rehearse(resolve_model(str(start), weights=False), tmp_path / "run")


def test_no_room_for_an_export_is_an_error_of_the_disk(tmp_path):
    """The kernel refuses files above a size, as a full disk would; safetensors has an error of its
    own for it."""
    student = CausalLM(resolve_model(str(STUDENT)), torch.device("cpu"), torch.float32, False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            config = train_config(tmp_path, STUDENT, tmp_path / "run")
            export(student, tmp_path / "run", Trained(config, "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "run" / "model").exists()
