"""A student that is an adapter on a base gives what the merged model gives, and a quantised one
runs as it is."""

import json
import shutil

import polars as pl
import pytest
import torch
from conftest import STUDENT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpd_data.config import EngineConfig, RolloutsConfig, SamplingConfig
from mpd_data.engine import start_engine
from mpd_data.errors import ConfigError, EngineError
from mpd_data.models import resolve_model
from mpd_data.rollouts import run_rollouts
from mpd_train.config import TrainConfig
from mpd_train.loop import train

peft = pytest.importorskip("peft")

ENGINE = {"dtype": "float32", "max_num_seqs": 16, "kv_cache_gib": 0.25}


@pytest.fixture(scope="module")
def models(exact_student, tmp_path_factory):
    """The folders of an adapter with some effect, and of the model that it is merged into."""
    folder = tmp_path_factory.mktemp("adapted")
    adapter, merged = folder / "adapter", folder / "merged"
    base = AutoModelForCausalLM.from_pretrained(exact_student)
    settings = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)  # before the adapter: one of its factors is random from the start
    adapted = peft.get_peft_model(base, settings)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.6)
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
    frame = pl.read_parquet(out / "rollouts" / "*.parquet")
    return dict(frame.select("prompt_id", "completion_ids").iter_rows())


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
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    shutil.copytree(exact_student, tmp_path / "base")
    settings = json.loads((moved / "adapter_config.json").read_text())

    def version(**changed):
        (moved / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        return resolve_model(str(moved)).version

    assert version(base_model_name_or_path=str(tmp_path / "base")) == whole.version
    assert version(lora_alpha=10) != whole.version
    with pytest.raises(ConfigError, match="its base cannot be had: nowhere/at-all"):
        version(base_model_name_or_path="nowhere/at-all")
    with pytest.raises(ConfigError, match="type IA3"):
        version(peft_type="IA3")
    weights = load_file(moved / "adapter_model.safetensors")
    save_file({k: 2 * w for k, w in weights.items()}, moved / "adapter_model.safetensors")
    assert version() != whole.version


def test_an_adapter_with_a_tokenizer_is_asked_in_its_words(models, tmp_path):
    moved = tmp_path / "adapter"
    shutil.copytree(models[0], moved)
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
    models, tmp_path, changed, weights, message
):
    """The last of them it would run without, and say nothing."""
    adapter = tmp_path / "adapter"
    shutil.copytree(models[0], adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {name: torch.zeros(shape) for name, shape in weights.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(EngineError, match=f"{message}.*Merge it into its base"):
        start_engine(resolve_model(str(adapter)), EngineConfig(**ENGINE))


def test_training_wants_an_adapter_merged(models, round_dir, tmp_path):
    config = TrainConfig(shards=[round_dir], student=str(models[0]), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="training needs it merged"):
        train(config)


def test_a_quantised_checkpoint_runs_as_it_is(tmp_path):
    """Eight-bit weights and activations in the layout of compressed-tensors: the engine finds out
    by the checkpoint's own config, and mostly says what the model before rounding does."""
    quantised = tmp_path / "w8a8"
    shutil.copytree(STUDENT, quantised)
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
    greedy = SamplingConfig(temperature=0, max_tokens=40)
    found = {}
    for model in (STUDENT, quantised):
        engine = start_engine(resolve_model(str(model)), EngineConfig(**ENGINE))
        for i in range(8):
            engine.submit_generate(str(i), [1, 40 + i, 50], greedy, 0)
        found[model] = {}
        while engine.in_flight:
            found[model] |= {result.key: result.token_ids[:10] for result in engine.step()}
        layers = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        methods = {
            type(m.quant_method).__name__ for m in layers.modules() if hasattr(m, "quant_method")
        }
        assert ("CompressedTensorsLinearMethod" in methods) == (model == quantised)
        engine.close()
    same = sum(found[STUDENT][key] == found[quantised][key] for key in found[STUDENT])
    assert same >= 4
