"""A model that is an adapter on a base gives what the merged model gives, and is trained as that or
further; a quantised one runs as it is."""

import json
import shutil

import pytest
import torch
from conftest import (
    STUDENT,
    TEACHER,
    TEMPLATE,
    drained,
    logits,
    losses,
    rows,
    train_config,
    until_a_checkpoint,
    weights,
    with_adapter,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpd_data.common.errors import ConfigError, EngineError
from mpd_data.common.models import resolve_model
from mpd_data.config import EngineConfig, RewriteConfig, RolloutsConfig, SamplingConfig
from mpd_data.engines.start import start_engine
from mpd_data.rewrite_setup import setup as setup_rewrite
from mpd_data.rollouts import run_rollouts
from mpd_train.dryrun.plan import plan_train
from mpd_train.export import export_checkpoint
from mpd_train.loop import train
from mpd_train.model.causal_lm import CausalLM
from mpd_train.setup import setup

peft = pytest.importorskip("peft")

ENGINE = {"dtype": "float32", "max_num_seqs": 16, "kv_cache_gib": 0.25}


@pytest.fixture(scope="module")
def models(exact_student, tmp_path_factory):
    """The folders of an adapter with some effect, and of the model that it is merged into."""
    folder = tmp_path_factory.mktemp("adapted")
    adapter, merged = folder / "adapter", folder / "merged"
    base = AutoModelForCausalLM.from_pretrained(exact_student)
    adapted = with_adapter(base, ["q_proj", "down_proj"])
    adapted.save_pretrained(adapter)
    shutil.copytree(exact_student, merged)
    adapted.merge_and_unload().save_pretrained(merged)
    return adapter, merged


def sampled(model, prompts, out, backend):
    settings = {
        "model": str(model),
        "prompts": [str(prompts)],
        "out": out,
        "num_prompts": 12,
        "id_column": "id",
        "answer_column": "answer",
        "sampling": {"max_tokens": 120, "temperature": 0},
        "engine": {**ENGINE, "backend": backend},
    }
    run_rollouts(RolloutsConfig(**settings))
    return dict(rows(out).select("prompt_id", "completion_ids").iter_rows())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_an_adapter_gives_what_the_merged_model_gives(
    models, exact_student, prompts, tmp_path, backend
):
    adapter, merged = models
    found = sampled(adapter, prompts, tmp_path / "adapter", backend)
    assert found == sampled(merged, prompts, tmp_path / "merged", backend)
    base = sampled(exact_student, prompts, tmp_path / "base", backend)
    assert sum(found[key] != base[key] for key in found) > 6


def test_adapter_and_base_both_name_the_model(models, exact_student, tmp_path):
    adapter, _ = models
    whole = resolve_model(str(adapter))
    assert whole.path == exact_student
    assert whole.version.startswith(resolve_model(str(exact_student)).version)
    assert resolve_model(str(adapter), weights=False).version == "unhashed"
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(exact_student, tmp_path / "base")
    settings = json.loads((moved / "adapter_config.json").read_text())

    def version(**changed):
        (moved / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        return resolve_model(str(moved)).version

    assert version(base_model_name_or_path=str(tmp_path / "base")) == whole.version
    assert version(lora_alpha=10) != whole.version
    for base in ("nowhere/at-all", str(tmp_path / "nowhere")):
        said = f"its base is not available: {base}: .*adapter_config.json names it: set base_model"
        with pytest.raises(ConfigError, match=said):
            version(base_model_name_or_path=base)
    with pytest.raises(ConfigError, match="config.json: base_model_name_or_path is null. Set it"):
        version(base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="type IA3"):
        version(peft_type="IA3")
    weights = load_file(moved / "adapter_model.safetensors")
    save_file({k: 2 * w for k, w in weights.items()}, moved / "adapter_model.safetensors")
    assert version() != whole.version


def test_an_adapter_with_a_tokenizer_is_asked_in_its_words(models, tmp_path):
    moved = shutil.copytree(models[0], tmp_path / "adapter")
    for file in STUDENT.glob("*token*"):
        shutil.copy(file, moved)
    assert resolve_model(str(moved)).tokenizer_path == moved
    assert resolve_model(str(models[0])).tokenizer_path == resolve_model(str(models[0])).path


@pytest.mark.parametrize(
    "changed, weights, message",
    [
        ({"use_dora": True}, {}, "DoRA"),
        ({}, {"base_model.model.model.embed_tokens.weight": (165, 128)}, "embed_tokens.weight"),
        ({"r": 4096}, {}, "rank"),
    ],
)
def test_what_vllm_would_leave_out_of_an_adapter_is_refused(
    exact_student, tmp_path, changed, weights, message
):
    """The second of them it would run without, and say nothing."""
    adapter, settings = tmp_path / "adapter", {"r": 6, "target_modules": ["q_proj", "down_proj"]}
    base = AutoModelForCausalLM.from_pretrained(exact_student)
    settings = peft.LoraConfig(**settings | changed, task_type="CAUSAL_LM")
    peft.get_peft_model(base, settings).save_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {name: torch.zeros(shape) for name, shape in weights.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(EngineError, match=f"{message}.*Merge it into its base"):
        start_engine(resolve_model(str(adapter)), EngineConfig(**ENGINE))


def test_vllm_does_not_score_with_an_adapter(models, round_dir, tmp_path):
    """It dies, or leaves the adapter of the head out."""
    settings = {"shards": round_dir, "template": str(TEMPLATE), "teacher": str(models[0])}
    for engine in ({}, {"backend": "transformers"}):
        config = RewriteConfig(**settings, engine=engine)
        if engine:
            setup_rewrite(config, weights=False, overwrite=True)
            continue
        with pytest.raises(ConfigError, match="adapter: .* vLLM cannot score.*Merge it into its b"):
            setup_rewrite(config, weights=False)
    with pytest.raises(ConfigError, match="vLLM cannot score"):
        start_engine(resolve_model(str(models[0])), EngineConfig(**ENGINE), max_logprobs=20)


# As the adapter of `models` is.
FURTHER = {"lora_r": 6, "lora_alpha": 9, "lora_target_modules": ["q_proj", "down_proj"]}


def config(round_dir, student, out, **changed):
    settings = {"max_steps": 6, "save_steps": 3, "optimizer": {"learning_rate": 1e-3}, **changed}
    return train_config(round_dir, student, out, **settings)


def as_peft_merges(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.fixture(scope="module")
def from_merged(models, round_dir, tmp_path_factory):
    """A training of all weights, from the merged model's folder."""
    out = tmp_path_factory.mktemp("merged") / "run"
    train(config(round_dir, models[1], out))
    return out


def test_an_adapter_is_trained_as_the_merged_model(models, from_merged, round_dir, tmp_path):
    """Merged here and merged there, in float32: the same to rounding, and here to the last bit."""
    out = tmp_path / "run"
    plan = plan_train(setup(config(round_dir, models[0], out), weights=False))
    assert plan.details["parameters"] == plan.details["trained parameters"]
    assert not out.exists()
    train(config(round_dir, models[0], out))
    assert losses(out) == pytest.approx(losses(from_merged), rel=1e-6)
    found, expected = weights(out), weights(from_merged)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
    merged = load_file(models[1] / "model.safetensors")
    assert all(not torch.equal(weight, merged[name]) for name, weight in found.items())
    # A plain folder, as that of any training.
    names = {path.name for path in (from_merged / "model").iterdir()}
    assert {path.name for path in (out / "model").iterdir()} == names
    assert not (out / "adapter").exists()


def test_an_adapters_own_tokenizer_is_the_exports(models, round_dir, tmp_path):
    adapter = shutil.copytree(models[0], tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.chat_template += "{# the adapter's #}"
    tokenizer.save_pretrained(adapter)
    train(config(round_dir, adapter, tmp_path / "run", max_steps=1))
    model = tmp_path / "run" / "model"
    assert AutoTokenizer.from_pretrained(model).chat_template == tokenizer.chat_template
    assert (model / "generation_config.json").is_file()
    assert not list(model.glob("adapter*"))


def test_an_adapter_is_trained_further(models, from_merged, exact_student, round_dir, tmp_path):
    out, adapter = tmp_path / "run", tmp_path / "adapter"
    shutil.copytree(models[0], adapter)
    told = json.loads((adapter / "adapter_config.json").read_text())
    # Not as transformers calls what it loads there: of a hub's model that is the cache's folder.
    told["base_model_name_or_path"] = f"{exact_student}/"
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    settings = config(round_dir, adapter, out, lora=FURTHER)
    plan = plan_train(setup(settings, weights=False))
    factors = load_file(models[0] / "adapter_model.safetensors")
    trained = sum(weight.numel() for weight in factors.values())
    assert plan.details["trained parameters"] == f"{trained:,}"

    with until_a_checkpoint():
        train(settings)
    # The first step's is that of the model as it was, whatever its parts.
    assert losses(out)[0] == pytest.approx(losses(from_merged)[0], rel=1e-5)
    assert losses(out)[1] != pytest.approx(losses(from_merged)[1], rel=1e-4)
    export_checkpoint(out, tmp_path / "exported")
    train(settings)
    train(config(round_dir, adapter, tmp_path / "one", lora=FURTHER))
    assert losses(out) == losses(tmp_path / "one")
    for folder in (tmp_path / "exported", out):
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert found.keys() == factors.keys()
        assert all(not torch.equal(found[name], factors[name]) for name in factors)
        whole = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
        assert torch.equal(whole, logits(as_peft_merges(exact_student, folder / "adapter")))
        assert (whole - logits(as_peft_merges(exact_student, models[0]))).abs().max() > 1e-3
    # On the same base, under its own name; so the next round can go on with it.
    said = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == f"{exact_student}/"
    assert (said["r"], said["lora_alpha"]) == (6, 9)
    train(config(round_dir, out / "adapter", tmp_path / "next", lora=FURTHER, max_steps=1))


def test_an_adapter_on_all_layers_is_trained_further(exact_student, round_dir, tmp_path):
    """As mpd-train leaves it when nothing but the rank is said."""
    lora = {"lora_r": 2}
    train(config(round_dir, exact_student, tmp_path / "first", lora=lora, max_steps=2))
    more = {"lora": {"lora_r": 2, "lora_dropout": 0.3}, "max_steps": 1}
    train(config(round_dir, tmp_path / "first" / "adapter", tmp_path / "second", **more))
    said = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (2, 4, 0.3)


@pytest.mark.parametrize(
    "changed, has",
    [
        ({"lora_r": 8}, "r 6, requested 8"),
        ({"lora_alpha": None}, "lora_alpha 9, requested 12"),
        ({"lora_target_modules": ["q_proj"]}, "layers down_proj q_proj .*, requested q_proj"),
        ({"lora_target_modules": ["all-linear"]}, "layers .* q_proj .*, requested down_proj gate"),
    ],
)
def test_adapters_of_another_form_are_not_trained_further(
    models, round_dir, tmp_path, changed, has
):
    out = tmp_path / "run"
    settings = config(round_dir, models[0], out, lora={**FURTHER, **changed})
    for start in (lambda settings: setup(settings, weights=False), train):
        with pytest.raises(ConfigError, match=f"{has}.*leave out --lora-r: it is then merged"):
            start(settings)
    # Without them it can be begun there.
    assert not (out / "run.json").exists()


def test_an_adapter_of_the_head_is_not_trained_further(exact_student, round_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(exact_student)
    with_adapter(base, ["lm_head"]).save_pretrained(tmp_path / "adapter")
    lora = {**FURTHER, "lora_target_modules": ["lm_head"]}
    with pytest.raises(ConfigError, match="the output head cannot have an adapter"):
        train(config(round_dir, tmp_path / "adapter", tmp_path / "run", lora=lora))
    # Merged it can be trained.
    train(config(round_dir, tmp_path / "adapter", tmp_path / "run", max_steps=1))


def test_an_embedding_beside_the_adapter_is_merged_and_not_trained_further(
    models, round_dir, tmp_path
):
    """peft leaves one there that was trained whole; out/adapter would be without it."""
    adapter = shutil.copytree(models[0], tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    embedding = torch.randn(165, 128)
    tensors["base_model.model.model.embed_tokens.weight"] = embedding
    save_file(tensors, adapter / "adapter_model.safetensors")
    merged = CausalLM(resolve_model(str(adapter)), torch.device("cpu"), torch.float32, False)
    assert torch.equal(merged.model.get_input_embeddings().weight, embedding)
    with pytest.raises(ConfigError, match="embed_tokens.weight is known to one of the two alone"):
        train(config(round_dir, adapter, tmp_path / "run", lora=FURTHER))


def test_a_dry_run_misses_an_adapters_weights(models, round_dir, tmp_path):
    shutil.copytree(models[0], tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"adapter: no adapter_model.safetensors here"):
        setup(config(round_dir, tmp_path / "adapter", tmp_path / "run"), weights=False)


def test_a_teacher_that_is_an_adapter_teaches_as_the_merged_one(models, round_dir, tmp_path):
    for name, teacher in zip(("adapter", "merged"), models, strict=True):
        settings = config(round_dir, STUDENT, tmp_path / name, teacher=str(teacher), max_steps=2)
        train(settings)
    assert losses(tmp_path / "adapter") == pytest.approx(losses(tmp_path / "merged"), rel=1e-6)
    train(config(round_dir, STUDENT, tmp_path / "base", teacher=str(TEACHER), max_steps=2))
    assert losses(tmp_path / "base") != pytest.approx(losses(tmp_path / "adapter"), rel=0.01)


@pytest.mark.parametrize(
    "told, of_base, message",
    [
        ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "a quantised base"),
        ({"init_lora_weights": "pissa"}, {}, "began by 'pissa'"),
        ({"target_modules": ["q_proj"]}, {}, r"its weights are not those.*\(6 such in all\)"),
        ({"r": 5}, {}, "does not fit its base"),
        ({"target_modules": ["nothing"]}, {}, "does not fit its base"),
        ({"layer_replication": [[0, 2], [1, 3]]}, {}, "adds layers or weights"),
        ({"target_modules": ["lm_head"]}, {"tie_word_embeddings": True}, "one weight in its base"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    models, exact_student, round_dir, tmp_path, told, of_base, message
):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(models[0], adapter)
    shutil.copytree(exact_student, base)
    told = {**told, "base_model_name_or_path": str(base)}
    for file, more in ((adapter / "adapter_config.json", told), (base / "config.json", of_base)):
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    with pytest.raises(ConfigError, match=message):
        train(config(round_dir, adapter, tmp_path / "run"))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The student with eight-bit weights and activations, in the layout of compressed-tensors."""
    quantised = shutil.copytree(STUDENT, tmp_path_factory.mktemp("quantised") / "w8a8")
    tensors = {}
    for name, weight in load_file(STUDENT / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.bfloat16()
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised


@pytest.mark.parametrize("more", [{}, {"lora": {"lora_r": 4}}], ids=str)
def test_a_quantised_student_is_refused(round_dir, quantised, tmp_path, more):
    """transformers would silently decompress it, and the export say that it is quantised."""
    with pytest.raises(ConfigError, match=r"quantised model \(compressed-tensors\).*was made from"):
        train(config(round_dir, quantised, tmp_path / "run", **more))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_quantised_checkpoint_runs_as_it_is(quantised):
    """The engine reads the checkpoint's own config, and mostly says what the model before rounding
    does. On a CPU with AMX its kernels do not take float32."""
    greedy = SamplingConfig(temperature=0, max_tokens=40)
    completions = {}

    def start(model, dtype):
        engine = start_engine(resolve_model(str(model)), EngineConfig(**ENGINE | {"dtype": dtype}))
        for i in range(8):
            engine.submit_generate(str(i), [1, 40 + i, 50], greedy, 0)
        return engine

    for model in (STUDENT, quantised):
        engine = start(model, "bfloat16")
        completions[model] = {key: x.token_ids[:10] for key, x in drained(engine).items()}
        layers = engine.inner.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        methods = {
            type(m.quant_method).__name__ for m in layers.modules() if hasattr(m, "quant_method")
        }
        assert ("CompressedTensorsLinearMethod" in methods) == (model == quantised)
        engine.close()
    ours, rounded = completions.values()
    assert sum(ours[key] == rounded[key] for key in ours) >= 4
    try:
        engine = start(quantised, "float32")
        engine.step()
    except EngineError as error:
        # With AMX: at the start or at the first step, as the version of vLLM has it.
        assert "do not take float32: give --dtype bfloat16" in str(error)
    engine.close()
