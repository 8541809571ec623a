"""Models and ids that engine or trainer cannot take: one clear error, as early as can be."""

import dataclasses
import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
import transformers
from conftest import STUDENT, drained, edit_rows, rows, train_config, write_jsonl
from safetensors.torch import load_file, save_file

from mpd_data.common.errors import ConfigError, DataError, EngineError
from mpd_data.common.models import resolve_model
from mpd_data.config import EngineConfig, RolloutsConfig, SamplingConfig
from mpd_data.engines.protocol import RequestError
from mpd_data.engines.start import context_of, start_engine
from mpd_data.rollouts import run_rollouts
from mpd_train.data.batches import load_pack
from mpd_train.data.packing import split_packs
from mpd_train.data.shard_set import ShardSet
from mpd_train.model.attention import attention
from mpd_train.model.causal_lm import CausalLM
from mpd_train.setup import setup

CPU = torch.device("cpu")
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [1 + i / 2 for i in range(16)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
ON_CPU = {"backend": "transformers", "dtype": "float32", "max_num_seqs": 8}


def copied(folder, **changed):
    """Copy the student with other values in its config.json."""
    file = shutil.copytree(STUDENT, folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return folder


def phi(folder, original):
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=165, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        original_max_position_embeddings=original, rope_parameters={**LONGROPE}, bos_token_id=None,
        eos_token_id=2, pad_token_id=0, initializer_range=0.3, sliding_window=None,
    )  # fmt: skip
    shutil.copytree(STUDENT, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    return resolve_model(str(folder))


# -- positions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}, 128),
        ({"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}}, 64),
        ({"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 128}, 128),
        ({"rope_parameters": {"full_attention": LONGROPE | {
            "original_max_position_embeddings": 32}}}, 32),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 64}}, 1024),
        ({"rope_scaling": None, "original_max_position_embeddings": 64}, 1024),
    ],
)  # fmt: skip
def test_the_context_is_that_in_which_positions_stay_the_same(tmp_path, config, context):
    files = resolve_model(str(copied(tmp_path / "model", **config)))
    assert context_of(files, EngineConfig()) == files.context == context
    if context < 1024:
        with pytest.raises(ConfigError, match=rf"of {context} tokens, its original.* LongRoPE"):
            context_of(files, EngineConfig(max_model_len=1024))


def test_a_row_sees_the_same_positions_beside_any_other(tmp_path):
    """A row that has ended goes on in its batch, past the context."""
    files = phi(tmp_path / "phi", 64)
    prompts = {"near the end": list(range(4, 64)), "short": list(range(10, 20))}

    def sampled(keys):
        engine = start_engine(files, EngineConfig(**ON_CPU))
        for key in keys:
            engine.submit_generate(key, prompts[key], SamplingConfig(max_tokens=40), 1)
        return drained(engine)["short"].token_ids

    alone = sampled(["short"])
    assert len(alone) == 40
    assert sampled(prompts) == alone


def test_a_row_over_the_students_context_is_refused(round_dir, tmp_path):
    student = copied(tmp_path / "model", max_position_embeddings=60)
    with pytest.raises(ConfigError, match=r"parquet, row \d+ .* tokens, and the context of .* 60"):
        setup(train_config(round_dir, student, tmp_path / "run"))


def test_a_pack_over_an_attentions_chunk_is_refused(tmp_path):
    config = transformers.Llama4TextConfig(
        vocab_size=165, num_hidden_layers=2, attention_chunk_size=64,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    config.save_pretrained(shutil.copytree(STUDENT, tmp_path / "model"))
    files = resolve_model(str(tmp_path / "model"))
    settings = train_config(tmp_path, STUDENT, tmp_path, pack_length=64)
    assert attention(settings, CPU, torch.float32, [files]) is None
    longer = settings.model_copy(update={"pack_length": 65})
    with pytest.raises(ConfigError, match="chunks of 64 tokens.* Give --pack-length 64 or less"):
        attention(longer, CPU, torch.float32, [files])


# -- ids -------------------------------------------------------------------------------


@pytest.fixture
def extended(tmp_path):
    """A student to whose tokenizer a token was added, and not to its embedding."""
    folder = shutil.copytree(STUDENT, tmp_path / "extended")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 165, "content": "<tool>", **token})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_prompt_without_an_embedding_is_one_row_in_errors(extended, tmp_path):
    texts = ["how many nuts ?", "how many <tool> ?", "how many coins ?"]
    file = write_jsonl(tmp_path / "p.jsonl", [{"problem": text} for text in texts])
    outcome = run_rollouts(
        RolloutsConfig(
            model=str(extended), prompts=[str(file)], out=tmp_path / "round", num_samples=2,
            sampling={"max_tokens": 5}, engine=ON_CPU,
        )
    )  # fmt: skip
    assert (outcome.total, outcome.failed) == (4, 1)
    (message,) = rows(tmp_path / "round", "errors")["message"]
    assert "p.jsonl, row 2: the token id 165 has no embedding" in message


def test_no_engine_sees_an_id_without_an_embedding():
    engine = start_engine(resolve_model(str(STUDENT)), EngineConfig(**ON_CPU))
    for bad in (165, -1):
        with pytest.raises(RequestError, match=f"the token id {bad} has no embedding"):
            engine.submit_generate("one", [4, bad], SamplingConfig(max_tokens=5), 0)
        with pytest.raises(RequestError, match=f"the token id {bad} has no embedding"):
            engine.submit_score("one", [4, 5], [bad], 1)
    assert engine.in_flight == 0


@pytest.mark.parametrize("column", ["input_ids", "topk_ids"])
def test_a_shard_with_an_unknown_id_is_refused_by_its_row(round_dir, tmp_path, column):
    shards = shutil.copytree(round_dir, tmp_path / "round1")

    def change(row):
        if row["status"] == "ok":
            row[column][-1] = 165

    edit_rows(shards, "distill", change)
    found = ShardSet([shards])
    packs, _ = split_packs(found, train_config(shards, STUDENT, tmp_path / "run"))
    with pytest.raises(DataError, match=r"parquet, row \d+ of row group 0: token ids .* to 165"):
        load_pack(found, packs[0])


# -- the start -------------------------------------------------------------------------


def test_what_vllm_asserts_is_one_message(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=165, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=2, use_sliding_window=True, sliding_window=32, max_window_layers=2,
    )  # fmt: skip
    folder = shutil.copytree(STUDENT, tmp_path / "qwen2")
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    files = resolve_model(str(folder))
    with pytest.raises(EngineError, match="qwen2: vLLM cannot start with this model: Assert"):
        start_engine(files, EngineConfig(dtype="float32", kv_cache_gib=0.25))


def test_a_package_that_is_missing_is_one_message(tmp_path):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    model = copied(tmp_path / "awq", quantization_config=awq | {"version": "gemm"})
    files = resolve_model(str(model))
    with pytest.raises(EngineError, match="awq: transformers cannot load this model: ImportError"):
        start_engine(files, EngineConfig(**ON_CPU))
    with pytest.raises(ConfigError, match="awq: cannot be loaded: ImportError"):
        CausalLM(files, CPU, torch.float32, False)


# -- numbers that are none -----------------------------------------------------------------


@pytest.fixture(scope="module")
def nan_model(tmp_path_factory):
    folder = shutil.copytree(STUDENT, tmp_path_factory.mktemp("nan") / "student")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return resolve_model(str(folder))


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_logits_that_are_no_numbers_end_the_job(nan_model, backend):
    """Each engine takes them for the token 0."""
    settings = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_gib": 0.25}
    with closing(start_engine(nan_model, EngineConfig(backend=backend, **settings))) as engine:
        for temperature in (0, 1):
            sampling = SamplingConfig(max_tokens=3, temperature=temperature)
            engine.submit_generate(str(temperature), [4, 5, 6], sampling, 0)
            with pytest.raises(EngineError, match=r"student: the logits are not finite.* --dtype"):
                drained(engine)
            if backend == "transformers":
                engine.inner._rows.clear()
        engine.submit_score("scores", [4, 5], [6, 7], 1)
        with pytest.raises(EngineError, match="not finite .*scores"):
            drained(engine)


def test_scores_of_no_probability_are_numbers():
    """Of all but the best token."""
    from mpd_data.engines.guard import Guarded
    from mpd_data.engines.protocol import Scores

    guarded = Guarded(start_engine(resolve_model(str(STUDENT)), EngineConfig(**ON_CPU)), None, None)
    ids, logprobs = np.array([[4, 5]]), np.array([[0.0, -np.inf]], dtype=np.float32)
    scores = Scores("one", ids, logprobs, logprobs[:, 1])
    assert guarded._looked_at(scores) is scores
    with pytest.raises(FloatingPointError):
        guarded._looked_at(dataclasses.replace(scores, topk_logprobs=logprobs - np.inf))


def test_a_path_that_vllm_takes_for_a_pattern_is_refused(tmp_path):
    files = resolve_model(str(shutil.copytree(STUDENT, tmp_path / "st[u]dent")))
    with pytest.raises(ConfigError, match=r"st\[u\]dent: vLLM takes \[ in a path for a pattern"):
        context_of(files, EngineConfig(), False)
    assert context_of(files, EngineConfig(**ON_CPU), False) == files.context
