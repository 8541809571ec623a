"""Training adapters: what they are, that they come back, and what is left behind."""

import json

import pytest
import torch
from conftest import loss_on_all, losses, rows, train_config, until_a_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import resolve_model
from mpd_train.config import LoraConfig
from mpd_train.data.shard_set import ShardSet
from mpd_train.loop import train
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.lora import attach

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(exact_student):
    """Merging rounds to the precision a model came in: none is lost here."""
    return exact_student


def config(round_dir, base, out, **changed):
    optimizer = {"learning_rate": 3e-3}
    settings = {"save_steps": 4, "optimizer": optimizer, "lora": {"lora_r": 8}, **changed}
    return train_config(round_dir, base, out, **settings)


@pytest.fixture(scope="module")
def trained(round_dir, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    train(config(round_dir, base, out))
    return out


@pytest.mark.slow
def test_merged_generates_what_base_and_adapter_do(trained, base, round_dir):
    """Token for token on real prompts, as the run's folders are loaded by others."""
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert (settings["r"], settings["lora_alpha"]) == (8, 16)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    prompts = rows(round_dir)["prompt_ids"].unique(maintain_order=True).to_list()[:8]

    def continued(model, ids):
        ids = torch.tensor([ids])
        mask = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=120)
        return found[0].tolist()

    with torch.no_grad():
        ids = torch.tensor(prompts[:1])
        before = plain(ids).logits
        unadapted = [continued(plain, ids) for ids in prompts]
        adapted = peft.PeftModel.from_pretrained(plain, trained / "adapter").eval()
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-3, rtol=1e-4)
        assert (adapted(ids).logits - before).abs().max() > 0.1
        found = [continued(adapted, ids) for ids in prompts]
    assert found == [continued(merged, ids) for ids in prompts]
    assert found != unadapted


@pytest.mark.slow
def test_full_rank_reaches_the_loss_of_full_training(round_dir, base, tmp_path):
    """On the whole round. Full training moves norms and embeddings too, and the paths differ, so
    the two agree as two runs of one method do; adapters of a small rank stay far behind."""
    student = CausalLM(resolve_model(str(base)), torch.device("cpu"), torch.float32, False)
    rank = student.model.config.hidden_size
    assert all(
        min(m.in_features, m.out_features) <= rank
        for name, m in student.model.named_modules()
        if name.endswith("_proj")
    )
    shards = ShardSet([round_dir])
    before = loss_on_all(shards, base)
    found = {}
    for name, r in (("full", 0), ("full rank", rank), ("small rank", 4)):
        out = tmp_path / name
        lora = {"lora_r": r, "lora_alpha": r or None}
        rate = {"learning_rate": 1e-3}
        train(config(round_dir, base, out, epochs=2, lora=lora, optimizer=rate))
        found[name] = loss_on_all(shards, out / "model")
    assert found["full"] < 0.5 * before
    assert found["full rank"] == pytest.approx(found["full"], rel=0.15)
    assert found["small rank"] > 1.3 * found["full"]


def test_training_lowers_the_loss_and_leaves_the_rest_alone(trained, base, round_dir):
    shards = ShardSet([round_dir])
    assert loss_on_all(shards, trained / "model") < 0.6 * loss_on_all(shards, base)
    before, after = (load_file(f / "model.safetensors") for f in (base, trained / "model"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) != name.endswith("_proj.weight"), name


def test_adapters_alone_are_trained_and_start_without_effect(base):
    student = CausalLM(resolve_model(str(base)), torch.device("cpu"), torch.float32, False)
    ids = torch.arange(4, 16)[None]
    before = student.model(ids).logits
    layers = [m for n, m in student.model.named_modules() if n.endswith("_proj")]
    attach(student.model, student.files, LoraConfig(lora_r=3), None, 0)
    parameters = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in parameters)
    expected = sum(3 * (m.in_features + m.out_features) for m in layers)
    assert sum(p.numel() for p in parameters.values()) == expected
    assert torch.equal(student.model(ids).logits, before)


def test_an_interrupted_run_gives_the_same_adapter(trained, round_dir, base, tmp_path):
    out = tmp_path / "run"
    with until_a_checkpoint():
        train(config(round_dir, base, out))
    (saved,) = (out / "checkpoints").glob("step-*")
    names = [name for file in saved.glob("*.safetensors") for name in load_file(file)]
    assert names and all("lora_" in name for name in names)
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
