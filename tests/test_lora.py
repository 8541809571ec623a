"""Training adapters: what they are, that they come back, and what is left behind."""

import json
import shutil

import pytest
import torch
from conftest import STUDENT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpd_data.errors import ConfigError
from mpd_data.models import resolve_model
from mpd_train import loop
from mpd_train.config import LoraConfig, TrainConfig
from mpd_train.loop import train
from mpd_train.lora import attach
from mpd_train.models import CausalLM

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The pocket student in float32: merging rounds to the precision a model came in."""
    folder = tmp_path_factory.mktemp("base") / "student"
    shutil.copytree(STUDENT, folder)
    AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).save_pretrained(folder)
    return folder


def config(round_dir, base, out, **changed):
    settings = {
        "shards": [round_dir],
        "student": str(base),
        "out": out,
        "pack_length": 600,
        "save_steps": 4,
        "dtype": "float32",
        "optimizer": {"learning_rate": 3e-3},
        "lora": {"lora_r": 8},
    }
    return TrainConfig(**{**settings, **changed})


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(round_dir, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    train(config(round_dir, base, out))
    return out


def test_merged_generates_what_base_and_adapter_do(trained, base):
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert (settings["r"], settings["lora_alpha"]) == (8, 16)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    ids = torch.arange(4, 16)[None]
    options = {"do_sample": False, "max_new_tokens": 60, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before = plain(ids).logits
        adapted = peft.PeftModel.from_pretrained(plain, trained / "adapter").eval()
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-3, rtol=1e-4)
        assert (adapted(ids).logits - before).abs().max() > 0.1
    assert torch.equal(adapted.generate(ids, **options), merged.generate(ids, **options))


def test_training_lowers_the_loss_and_leaves_the_rest_alone(trained, base):
    found = losses(trained)
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    before, after = (load_file(f / "model.safetensors") for f in (base, trained / "model"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) != name.endswith("_proj.weight"), name


def test_adapters_alone_are_trained_and_start_without_effect(base):
    student = CausalLM(resolve_model(str(base)), torch.device("cpu"), torch.float32, False)
    ids = torch.arange(4, 16)[None]
    before = student.model(ids).logits
    layers = [m for n, m in student.model.named_modules() if n.endswith("_proj")]
    attach(student.model, student.files.name, LoraConfig(lora_r=3), None, 0)
    parameters = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in parameters)
    expected = sum(3 * (m.in_features + m.out_features) for m in layers)
    assert sum(p.numel() for p in parameters.values()) == expected
    assert torch.equal(student.model(ids).logits, before)


def test_an_interrupted_run_gives_the_same_adapter(trained, round_dir, base, tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = loop.checkpoint.save

    def killed(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(round_dir, base, out))
    (saved,) = (out / "checkpoints").glob("step-*")
    assert all("lora_" in name for name in load_file(saved / "model.safetensors"))
    monkeypatch.undo()
    train(config(round_dir, base, out))
    assert losses(out) == losses(trained)
    name = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(out / name), load_file(trained / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_gradient_checkpointing_with_frozen_embeddings(trained, round_dir, base, tmp_path):
    train(config(round_dir, base, tmp_path / "run", gradient_checkpointing=True))
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-3)


@pytest.mark.parametrize("targets", [["q_proj", "nothing"], ["lm_head"], ["all-linear", "q_proj"]])
def test_targets_that_cannot_be_are_refused(round_dir, base, tmp_path, targets):
    lora = {"lora_r": 2, "lora_target_modules": targets}
    with pytest.raises(ConfigError, match="--lora-target-modules"):
        train(config(round_dir, base, tmp_path / "run", lora=lora))
