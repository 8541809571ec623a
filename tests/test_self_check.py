"""Before the first step the trainer's model is compared with the engine that made the shards."""

import shutil
from dataclasses import replace

import polars as pl
import pytest
import torch
from conftest import STUDENT, TEACHER, edit_rows, train_config

from mpd_data.common.errors import ConfigError
from mpd_train.data.packing import split_packs
from mpd_train.loop import train
from mpd_train.model.causal_lm import CausalLM
from mpd_train.self_check import require_one_model
from mpd_train.setup import setup

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(round_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    more = {"teacher": str(TEACHER), "pack_length": 2000}
    return setup(train_config(round_dir, STUDENT, out, **more))


def models(prepared, dtype=torch.float32):
    files = (prepared.student, prepared.teacher)
    return [CausalLM(file, CPU, dtype, False) for file in files]


def compare(prepared, student, teacher):
    require_one_model(
        prepared, student, teacher, split_packs(prepared.shards, prepared.config)[0][0]
    )


def test_the_first_drafts_have_log_probabilities(round_dir):
    rows = pl.read_parquet(round_dir / "rollouts" / "*.parquet")
    known = rows.filter(pl.col("sampled_logprobs").is_not_null())
    assert len(known) == 8 and (known["sample_idx"] == 0).all()
    assert (known["sampled_logprobs"].list.len() == known["num_completion_tokens"]).all()


def test_the_models_of_the_round_pass(prepared):
    compare(prepared, *models(prepared))


def test_rounding_passes(prepared):
    compare(replace(prepared, dtype=torch.bfloat16), *models(prepared, torch.bfloat16))


def rotary(model):
    model.model.rotary_emb.inv_freq *= 0.8


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def window(model):
    config = model.config
    config.sliding_window, config.layer_types = 16, ["sliding_attention"] * len(model.model.layers)
    model.model.has_sliding_layers = True
    for layer in model.model.layers:
        layer.attention_type = "sliding_attention"
        layer.self_attn.sliding_window = 16


def offset(model):
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            weight.data += 1


@pytest.mark.parametrize("broken", [rotary, tied, window, offset])
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_computation_is_refused(prepared, broken, which, dtype):
    student, teacher = models(prepared)
    broken((student if which == "student" else teacher).model)
    name = STUDENT if which == "student" else TEACHER
    with pytest.raises(ConfigError, match=f"{name} gives its tokens other log-probabilities"):
        compare(replace(prepared, dtype=dtype), student, teacher)


def test_a_model_of_another_version_is_not_compared(prepared):
    """A student that is trained further did not sample these drafts."""
    student, teacher = models(prepared)
    rotary(student.model)
    student.files = replace(student.files, version="another")
    compare(prepared, student, teacher)


def test_a_training_is_refused_before_its_first_step(round_dir, tmp_path):
    shards = shutil.copytree(round_dir, tmp_path / "round1")

    def change(row):
        if row["sampled_logprobs"] is not None:
            row["sampled_logprobs"] = [x - 0.5 for x in row["sampled_logprobs"]]

    edit_rows(shards, "rollouts", change)
    with pytest.raises(
        ConfigError, match=r"rollouts/part-\d+\.parquet, row \w+: .* by 0\.5 nats a token"
    ):
        train(train_config(shards, STUDENT, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
