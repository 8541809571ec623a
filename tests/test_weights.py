"""What is loaded is what the files hold: a model that is not whole is refused wherever it is used,
before an engine starts or a step is done."""

import json
import os
import re
import shutil

import pytest
import torch
import transformers
from conftest import ROOT, STUDENT, TEACHER, TEMPLATE, train_config, with_adapter
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, SIZES
from transformers import AutoModelForCausalLM

from mpd_data.common import weights
from mpd_data.common.errors import ConfigError
from mpd_data.common.models import load_tokenizer, resolve_model, tokenizer_hash
from mpd_data.common.weights import load_model, model_files, require_whole, stored_tensors
from mpd_data.config import EngineConfig, RewriteConfig, RolloutsConfig
from mpd_data.engines.start import start_engine
from mpd_data.rewrite_setup import setup as setup_rewrite
from mpd_data.rollouts import setup as setup_rollouts
from mpd_data.select.student import choosing_student
from mpd_train.loop import train
from mpd_train.model.causal_lm import CausalLM
from mpd_train.setup import setup as setup_training

GOLDEN = ROOT / "tests" / "data" / "golden" / "round1"
RECORDED = ROOT / "tests" / "data" / "recorded" / "round"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tensors():
    return load_file(STUDENT / "model.safetensors")


@pytest.fixture
def made(tmp_path):
    """A function that makes a copy of the student with other tensors and settings."""

    def make(tensors, name="model", **settings):
        folder = shutil.copytree(STUDENT, tmp_path / name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return make


def files(folder):
    return resolve_model(str(folder), weights=False)


def renamed(tensors, change):
    return {change(name): x for name, x in tensors.items()}


def left_over(tensors):
    return tensors | {UP.replace("layers.0", "layers.7"): tensors[UP].clone()}


BROKEN = {
    "compiled": (
        lambda x: renamed(x, "_orig_mod.{}".format),
        r"36 weights of its architecture are in none of its files \(lm_head.weight, .*, …\)"
        r".*'_orig_mod.', which torch.compile leaves",
    ),
    "parallel": (lambda x: renamed(x, "module.{}".format), "'module.', which DDP"),
    "adapted": (lambda x: renamed(x, "base_model.model.{}".format), "'base_model.model.', which p"),
    "doubled": (
        lambda x: renamed(x, lambda name: name.replace("model.", "model.model.")),
        "35 tensors in its files are not .*'model.', which a wrapper",
    ),
    "inside": (
        lambda x: renamed(x, lambda n: n.replace("layers.1.", "layers.1._fsdp_wrapped_module.")),
        "11 weights .*'_fsdp_wrapped_module.', which FSDP",
    ),
    "no head": (
        lambda x: {name: x[name] for name in x.keys() - {HEAD}},
        rf"1 weights of its architecture .* \({HEAD}\)\. .*set tie_word_embeddings to true",
    ),
    "no norm": (lambda x: {name: x[name] for name in x.keys() - {NORM}}, rf"1 weights .*\({NORM}"),
    "left over": (left_over, r"1 tensors in its files are not .*\(model.layers.7.mlp.up_proj.w"),
    "shape": (
        lambda x: x | {NORM: x[NORM][:5].clone()},
        rf"1 have another shape \({NORM}: \(5,\), expected \(128,\)\)",
    ),
    "integers": (lambda x: x | {UP: x[UP].char()}, r"1 weights are stored as I8 \(model.layers.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_that_is_not_whole_is_refused(made, tensors, case):
    change, message = BROKEN[case]
    with pytest.raises(ConfigError, match=message):
        require_whole(files(made(change(tensors))))


def test_known_left_overs_are_accepted(made, tensors):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    require_whole(files(made(tensors | old)))
    # As AutoModel saves a model with its head; transformers adds the prefix.
    require_whole(files(made(renamed(tensors, lambda n: n.removeprefix("model.")), "inner")))


@pytest.fixture(scope="module")
def without_norm(tensors, tmp_path_factory):
    folder = shutil.copytree(STUDENT, tmp_path_factory.mktemp("broken") / "model")
    whole = {name: tensors[name] for name in tensors.keys() - {NORM}}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rollouts(model, out, **_):
    prompts = ROOT / "tests" / "data" / "recorded" / "prompts.jsonl"
    config = RolloutsConfig(model=str(model), prompts=[str(prompts)], out=out)
    setup_rollouts(config, weights=False)


def rewriting(model, out, **more):
    return RewriteConfig(teacher=str(model), shards=RECORDED, template=str(TEMPLATE), **more)


PATHS = {
    "rollouts --dry-run": rollouts,
    "rewrite --dry-run": lambda model, out: setup_rewrite(rewriting(model, out), weights=False),
    "the student that chooses": lambda model, out: choosing_student(
        rewriting(TEACHER, out, choose="likeliest", num_candidates=2, student=str(model)),
        {"name": str(STUDENT), "version": ""},
        tokenizer_hash(load_tokenizer(files(STUDENT))),
    ),
    "vLLM": lambda model, out: start_engine(files(model), EngineConfig(backend="vllm")),
    "transformers": lambda model, out: start_engine(
        files(model), EngineConfig(backend="transformers")
    ),
    "mpd-train --dry-run": lambda model, out: setup_training(
        train_config(GOLDEN, model, out), weights=False
    ),
    "student": lambda model, out: train(train_config(GOLDEN, model, out, max_steps=1)),
    "teacher": lambda model, out: train(
        train_config(GOLDEN, STUDENT, out, teacher=str(model), teacher_offload=True, max_steps=1)
    ),
    "loading": lambda model, out: CausalLM(files(model), torch.device("cpu"), torch.float32, False),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_every_path_compares(without_norm, tmp_path, path):
    with pytest.raises(ConfigError, match=rf"are in none of its files \({NORM}\)"):
        PATHS[path](without_norm, tmp_path / "out")
    assert not (tmp_path / "out").exists() or path in ("student", "teacher")
    assert not list(tmp_path.glob("out/run.json"))


def test_a_pair_that_is_said_to_be_one_is_one(made, tensors):
    """Where the files hold two that differ, libraries use one, or both."""
    with pytest.raises(ConfigError, match=f"{HEAD} and {EMBEDDING} are one .*two that differ"):
        require_whole(files(made(tensors, tie_word_embeddings=True)))
    same = tensors | {HEAD: tensors[EMBEDDING].clone()}
    require_whole(files(made(same, "same", tie_word_embeddings=True)))
    for index, name in enumerate((HEAD, EMBEDDING)):
        one = {each: tensors[each] for each in tensors.keys() - {name}}
        require_whole(files(made(one, f"one-{index}", tie_word_embeddings=True)))


# -- which files are the model -----------------------------------------------------------


def in_parts(folder, tensors, parts):
    """Save the model in parts, with their index, beside what is there; return their names."""
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    of = {tensor: names[i % parts] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        own = {tensor: x for tensor, x in tensors.items() if of[tensor] == name}
        save_file(own, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": of})
    )
    return names


def test_an_index_says_which_parts_are_the_model(made, tensors):
    folder = made(tensors)
    in_parts(folder, {name: x * 0 for name, x in tensors.items()}, 3)
    with pytest.raises(ConfigError, match="two sets of weights: model.safetensors, and the 3"):
        model_files(folder)
    (folder / "model.safetensors").unlink()
    # Those of three that were left over are not read.
    names = in_parts(folder, tensors, 2)
    assert [file.name for file in model_files(folder)] == names
    found = load_model(files(folder), False, dtype=torch.float32)
    assert torch.equal(found.lm_head.weight, tensors[HEAD].float())
    (folder / names[0]).unlink()
    with pytest.raises(
        ConfigError, match=rf"index.json: names files that are not here: {names[0]}"
    ):
        require_whole(files(folder))


def test_weights_that_only_some_libraries_read_are_refused(made, tensors):
    folder = made(tensors)
    save_file({"x": torch.ones(1)}, folder / "left.safetensors")
    with pytest.raises(ConfigError, match="there are other weights: left.safetensors"):
        model_files(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(ConfigError, match="are neither model.safetensors nor named by"):
        model_files(folder)


def test_a_file_that_is_cut_short_is_refused(made, tensors):
    file = made(tensors) / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(ConfigError, match=f"has {size - 100:,} bytes, its header says {size:,}"):
        require_whole(files(file.parent))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1437\n"
    for content, message in (
        (b"no header", "not a safetensors file .*Copy it again"),
        (b"", "is empty. Copy it again"),
        (pointer, "git-lfs's pointer to them. Run git lfs pull"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            require_whole(files(file.parent))


def test_a_model_that_changes_is_compared_again(made, tensors):
    folder = made(tensors)
    require_whole(files(folder))
    save_file({HEAD: tensors[HEAD]}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="35 weights of its architecture"):
        require_whole(files(folder))


# -- families ----------------------------------------------------------------------------

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
MORE = {
    "Mixtral": EXPERTS,
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "num_key_value_heads": 1, "head_dim": 16},
    "GPTNeoX": {},
    "Qwen2": {"tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_headers_say_what_loading_says(tmp_path, family):
    """Of the model whole, and of one without its middle tensor and with another one."""
    more = MORE[family] if family in MORE else FAMILIES[family][0]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = files(tmp_path)
    require_whole(model)
    load_model(model, False)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[len(tensors) // 2]
    tensors["another.weight"] = tensors.pop(gone)
    save_file(tensors, file, metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    loaded = weights._Unlike.of(info)
    skeleton = weights.skeleton(model, False, None)
    headers = weights._as_loaded(skeleton, stored_tensors(model_files(tmp_path)))
    assert len(headers) >= 2
    assert (headers.missing, headers.unknown) == (loaded.missing, loaded.unknown)
    with pytest.raises(ConfigError, match="another.weight"):
        require_whole(model)


def test_an_architecture_that_cannot_be_compared_is_named(made, tensors, capsys):
    unknown = made(tensors, "unknown", model_type="for_vllm_alone", architectures=["ForVllmAlone"])
    require_whole(files(unknown))
    assert re.search("were not compared with .*for_vllm_alone", capsys.readouterr().err)
    with pytest.raises(ValueError, match="for_vllm_alone"):
        load_model(files(unknown), False)
    # Its own code makes a tensor on the CPU when it is built.
    config = transformers.MiniMaxConfig(**SIZES, num_local_experts=2)
    transformers.MiniMaxForCausalLM(config).save_pretrained(minimax := unknown.parent / "minimax")
    (minimax / "generation_config.json").unlink()
    require_whole(files(minimax))
    assert not capsys.readouterr().err


# -- quantised models and adapters ---------------------------------------------------------

GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


def packed(tensors):
    """The tensors in the layout of GPTQ, without its values."""
    found = {}
    for name, x in tensors.items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                found[f"{module}.{part}"] = torch.zeros(4, 4, dtype=torch.int32)
        else:
            found[name] = x
    return found


def test_of_a_quantised_model_the_modules_are_compared(made, tensors):
    whole = packed(tensors)
    require_whole(files(made(whole, **GPTQ)))
    module = UP.removesuffix(".weight")
    part = {name: x for name, x in whole.items() if not name.startswith(module)}
    with pytest.raises(ConfigError, match=rf"1 weights of its architecture .*\({UP}\)"):
        require_whole(files(made(part, "part", **GPTQ)))
    prefixed = renamed(whole, "_orig_mod.{}".format)
    with pytest.raises(ConfigError, match=r"not of its architecture \(_orig_mod.lm_head"):
        require_whole(files(made(prefixed, "prefixed", **GPTQ)))
    with pytest.raises(ConfigError, match=r"not of its architecture \(.*g_idx"):
        require_whole(files(made(whole, "unsaid")))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda name: name.replace("layers.2", "layers.9"), r"layers\.\d.* \(8 such in all\)"),
        (lambda name: name.removeprefix("base_model.model."), "begin with base_model.model. once"),
        (lambda name: f"_orig_mod.{name}", "is known to one of the two alone"),
    ],
)
def test_an_adapter_whose_weights_match_no_module_is_refused(tmp_path, change, message):
    pytest.importorskip("peft")
    adapted = with_adapter(AutoModelForCausalLM.from_pretrained(STUDENT), ["q_proj", "down_proj"])
    adapted.save_pretrained(tmp_path)
    require_whole(files(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file(renamed(load_file(file), change), file)
    for use in (
        lambda: start_engine(files(tmp_path), EngineConfig(backend="vllm")),
        lambda: setup_training(train_config(GOLDEN, tmp_path, tmp_path / "out"), weights=False),
    ):
        with pytest.raises(ConfigError, match=message):
            use()
