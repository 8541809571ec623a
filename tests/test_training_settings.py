"""What each setting of the trainer does, seen on a few rows of a real round."""

import itertools
import json
import math
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    STUDENT,
    TEACHER,
    edit_rows,
    invoke,
    metrics,
    row_log,
    rows,
    train_config,
    weights,
)
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import resolve_model
from mpd_data.store.round import RoundDir
from mpd_train.cli import cli
from mpd_train.config import LossConfig
from mpd_train.data.batches import load_pack
from mpd_train.data.packing import make_packs
from mpd_train.data.shard_set import ShardSet
from mpd_train.loop import train
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM

KEPT = 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(round_dir, tmp_path_factory):
    """The round with all but its first kept rows rejected: a few packs of 600 tokens."""
    out = shutil.copytree(round_dir, tmp_path_factory.mktemp("few") / "round1")
    left = itertools.count(KEPT, -1)

    def reject(row):
        if row["status"] == "ok" and next(left) <= 0:
            row["status"] = "longer"

    edit_rows(out, "distill", reject)
    return out


@pytest.fixture
def trained(few, exact_student, tmp_path):
    """Trains with the given settings; returns the steps' metrics and the run's folder."""
    count = 0

    def run(**changed):
        nonlocal count
        count += 1
        settings = {"shards": few, "student": exact_student, "optimizer": {"learning_rate": 1e-3}}
        out = tmp_path / f"run{count}"
        train(train_config(out=out, **{**settings, **changed}))
        return metrics(out), out

    return run


def first_pack(folder):
    shards = ShardSet([folder])
    pack = make_packs(shards, 600, 0, 0)[0]
    return load_pack(shards, pack), shards.metadata["vocab_size"], pack


def loaded(model):
    return CausalLM(resolve_model(str(model)), CPU, torch.float32, False)


def column(records, name):
    return [record[name] for record in records if name in record]


def test_packs_epochs_and_steps_are_as_told(trained, few):
    packs = make_packs(ShardSet([few]), 600, 0, 0)
    assert len(packs) > 4
    once, _ = trained()
    assert column(once, "loss_tokens") == [p.num_loss_tokens for p in packs]
    twice, _ = trained(epochs=2)
    packs += make_packs(ShardSet([few]), 600, 0, 1)
    assert column(twice, "loss_tokens") == [p.num_loss_tokens for p in packs]
    part, _ = trained(epochs=0.3)
    assert column(part, "loss_tokens") == column(once, "loss_tokens")[: math.ceil(0.3 * len(once))]
    longer, _ = trained(pack_length=1200)
    assert 600 < max(column(longer, "tokens")) <= 1200
    other, _ = trained(seed=1)
    packs = make_packs(ShardSet([few]), 600, 1, 0)
    assert column(other, "loss_tokens") == [p.num_loss_tokens for p in packs]
    assert column(other, "loss_tokens") != column(once, "loss_tokens")


def test_a_number_of_steps_takes_the_passes_that_it_needs(trained, few):
    packs = make_packs(ShardSet([few]), 600, 0, 0) + make_packs(ShardSet([few]), 600, 0, 1)
    wanted = len(packs) - 1
    records, _ = trained(max_steps=wanted)
    assert column(records, "loss_tokens") == [p.num_loss_tokens for p in packs[:wanted]]
    pairs, _ = trained(max_steps=2, gradient_accumulation_steps=2, epochs=9)
    assert column(pairs, "loss_tokens") == [
        sum(p.num_loss_tokens for p in packs[i : i + 2]) for i in (0, 2)
    ]


def test_each_row_has_its_divergence_of_each_step(trained, few):
    records, out = trained(epochs=2, gradient_accumulation_steps=2)
    found = row_log(out)
    kept = rows(few, "distill").filter(pl.col("status") == "ok")
    sizes = {row[:16]: n for row, n in kept.select("row_id", "num_rewritten_tokens").iter_rows()}
    for record in records:
        of_step = [(row, kl) for step, row, kl in found if step == record["step"]]
        tokens = [sizes[row] for row, _ in of_step]
        assert sum(tokens) == record["loss_tokens"]
        mean = np.average([kl for _, kl in of_step], weights=tokens)
        assert mean == pytest.approx(record["kl"], rel=1e-4)
    # Each row once in each of two epochs, and not as far from the teacher the second time.
    assert len(found) == 2 * len(sizes)
    by_row = {row: [kl for _, one, kl in found if one == row] for row in sizes}
    assert sum(first > second for first, second in by_row.values()) > 0.8 * len(sizes)
    assert min(first for first, _ in by_row.values()) < max(first for first, _ in by_row.values())


def test_accumulated_packs_are_one_step(trained, few):
    packs = make_packs(ShardSet([few]), 600, 0, 0)
    still = {"learning_rate": 1e-12}
    (step,), _ = trained(gradient_accumulation_steps=len(packs), optimizer=still)
    apart, _ = trained(optimizer=still)
    tokens = column(apart, "loss_tokens")
    assert step["loss_tokens"] == sum(tokens)
    assert step["loss"] == pytest.approx(
        np.average(column(apart, "loss"), weights=tokens), rel=1e-4
    )


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.2},
        {"divergence": "skew_kl", "alpha": 0.6},
        {"ce_weight": 0.5},
        {"divergence_clip": 0.05},
        {"entry_clip": 0.05},
    ],
    ids=["divergence", "beta", "alpha", "ce_weight", "divergence_clip", "entry_clip"],
)
def test_the_loss_is_the_one_asked_for(trained, few, exact_student, loss):
    """The first step's, against the same computed here; each differs from the default."""
    batch, vocab, pack = first_pack(few)
    student = loaded(exact_student)

    def expected(config):
        return pack_loss(student, None, batch, vocab, config, float(pack.num_loss_tokens)).loss

    records, _ = trained(loss=loss)
    found = records[0]["loss"]
    assert found == pytest.approx(expected(LossConfig(**loss)).item(), rel=1e-5)
    without = {name: value for name, value in loss.items() if name == "divergence"}
    if without == loss:
        without = {}
    assert abs(found / expected(LossConfig(**without)).item() - 1) > 0.005


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_without_the_tail_the_top_k_are_renormalised(
    trained, few, exact_student, tmp_path, divergence
):
    """Four ids of each token, with a fifth of the mass outside: the first step's loss and gradient
    against autograd on whole distributions, the teacher's nought elsewhere."""
    known, shards = np.log([0.4, 0.2, 0.1, 0.1]), ShardSet([few])
    soft, k = tmp_path / "soft", shards.metadata["num_logprobs"]
    shutil.copytree(few, soft)
    for file in RoundDir(soft).shard_paths("distill"):
        table = pq.read_table(file)
        rows = table.to_pylist()
        for row in rows:
            if row["topk_ids"] is not None:
                n = len(row["tail_logprobs"])
                row["topk_ids"] = [x for i, x in enumerate(row["topk_ids"]) if i % k < len(known)]
                row["topk_logprobs"] = list(known) * n
                row["tail_logprobs"] = [np.log(0.2)] * n
        metadata = json.loads(table.schema.metadata[b"mpd"]) | {"num_logprobs": len(known)}
        schema = table.schema.with_metadata({b"mpd": json.dumps(metadata).encode()})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    batch, vocab, _ = first_pack(soft)
    student = loaded(exact_student)
    states = student.states(batch.input_ids, batch.position_ids)[0, batch.loss_positions]
    log_q = (states @ student.head(vocab).T).log_softmax(-1)
    p = torch.zeros_like(log_q).scatter(1, batch.topk_ids, batch.topk_logprobs.exp())
    assert p.sum(1).max() < 0.81
    p = p / p.sum(1, keepdim=True)
    if divergence == "jsd":
        # The student's mass outside the top K is one outcome, as it is with a tail; the mixture has
        # half of it.
        q = log_q.exp()
        outside = q.masked_fill(p > 0, 0).sum(1) * math.log(2)
        log_m = ((p + q) / 2).log()
        inside = p.xlogy(p) - p * log_m + (q * (log_q - log_m)).masked_fill(p == 0, 0)
        loss = ((inside.sum(1) + outside) / 2).mean()
    else:
        loss = (p.xlogy(p) - p * log_q).sum(1).mean()
    loss.backward()
    norm = torch.cat([w.grad.flatten() for w in student.model.parameters()]).norm().item()
    said = {"divergence": divergence, "tail": False}
    records, _ = trained(shards=soft, loss=said, max_steps=1)
    assert records[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert records[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    kept, _ = trained(shards=soft, loss={"divergence": divergence}, max_steps=1)
    assert abs(kept[0]["loss"] / loss.item() - 1) > 0.05


def test_leaving_the_tail_out_is_refused_where_it_means_nothing(trained):
    with pytest.raises(ConfigError, match="the divergence is infinite"):
        trained(loss={"divergence": "reverse_kl", "tail": False})
    with pytest.raises(ConfigError, match="whole vocabulary is used, which has no tail"):
        trained(teacher=str(TEACHER), loss={"tail": False})


def test_a_teacher_in_the_process_is_the_one_learned_from(trained):
    cached, _ = trained()
    dense, _ = trained(teacher=str(TEACHER))
    # The cache is rounded to float16, and its tail is one number.
    assert dense[0]["loss"] == pytest.approx(cached[0]["loss"], rel=0.02)
    assert dense[0]["loss"] != cached[0]["loss"]
    taught, _ = trained(teacher=str(STUDENT))
    assert taught[0]["loss"] > 1.1 * dense[0]["loss"]


def test_the_temperature_divides_both_models_logits(trained, few, exact_student):
    batch, vocab, _ = first_pack(few)
    student, teacher = map(loaded, (exact_student, TEACHER))
    with torch.no_grad():
        q = student.states(batch.input_ids, batch.position_ids)[0, batch.loss_positions]
        p = teacher.states(batch.teacher_input_ids, batch.teacher_position_ids)
        p = p[0, batch.teacher_loss_positions] @ teacher.head(vocab).T
        log_q = (q @ student.head(vocab).T / 4).log_softmax(-1)
        log_p = (p / 4).log_softmax(-1)
        expected = 16 * (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    records, _ = trained(teacher=str(TEACHER), loss={"kl_temperature": 4.0})
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert records[0]["kl"] == pytest.approx(expected / 16, rel=1e-3)
    with pytest.raises(ConfigError, match="records are the teacher's at 1, .* Give --teacher"):
        trained(loss={"kl_temperature": 4.0})


def test_attention_is_the_one_asked_for(trained):
    usual, _ = trained()
    eager, _ = trained(attn_implementation="eager")
    assert eager[0]["loss"] == pytest.approx(usual[0]["loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        trained(attn_implementation="no_such_attention")


def test_activations_are_kept_in_the_cpus_memory_when_told(trained, monkeypatch):
    used = []
    context = torch.autograd.graph.save_on_cpu

    def seen(**options):
        used.append(options)
        return context(**options)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", seen)
    usual, _ = trained()
    assert not used
    offloaded, _ = trained(activation_offload=True)
    assert len(used) == len(offloaded)
    assert column(offloaded, "loss") == column(usual, "loss")


def test_schedule_and_warm_up_are_as_told(trained):
    shape = {"learning_rate": 1e-3, "warmup_ratio": 0.5}
    course = column(trained(optimizer={**shape, "lr_schedule": "linear"})[0], "learning_rate")
    total, warmup = len(course), -(-len(course) // 2)
    up = [(step + 1) / warmup for step in range(warmup)]
    down = [1 - step / (total - warmup) for step in range(total - warmup)]
    assert course == pytest.approx([1e-3 * share for share in up + down])


def test_weight_decay_shrinks_matrices(trained, exact_student):
    """One step: every matrix loses learning rate x decay of itself, and nothing else does."""
    one = {"gradient_accumulation_steps": 1000}
    rate, decay = 1e-3, 50.0
    found = [
        weights(trained(**one, optimizer={"learning_rate": rate, "weight_decay": value})[1])
        for value in (0.0, decay)
    ]
    before = load_file(exact_student / "model.safetensors")
    for name, weight in before.items():
        expected = rate * decay * weight if weight.dim() >= 2 else torch.zeros_like(weight)
        assert torch.allclose(found[0][name] - found[1][name], expected, atol=1e-6), name


def test_the_second_moment_decays_as_told(trained):
    """It makes no difference to the first step, and one to those after."""
    usual, _ = trained()
    other, _ = trained(optimizer={"learning_rate": 1e-3, "adam_beta2": 0.5})
    assert column(other, "loss")[:2] == pytest.approx(column(usual, "loss")[:2], rel=1e-4)
    assert abs(other[3]["loss"] / usual[3]["loss"] - 1) > 1e-3


def test_gradients_are_clipped_to_the_norm_given(trained, exact_student):
    """Clipped far below Adam's epsilon they move nothing."""
    _, out = trained(optimizer={"learning_rate": 1e-3, "max_grad_norm": 1e-15})
    before = load_file(exact_student / "model.safetensors")
    after = weights(out)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved < 1e-6


def test_the_learning_rate_is_the_one_given(trained):
    records, _ = trained(optimizer={"learning_rate": 7e-4, "warmup_ratio": 0.0})
    assert records[0]["learning_rate"] == pytest.approx(7e-4)


def test_gradient_checkpointing_runs_each_layer_twice(trained):
    calls = []
    hook = register_module_forward_pre_hook(
        lambda module, *_: (
            calls.append(1) if module.training and "MLP" in type(module).__name__ else None
        )
    )
    try:
        counts = []
        losses = []
        for checkpointing in (False, True):
            calls.clear()
            records, _ = trained(gradient_checkpointing=checkpointing)
            counts.append(len(calls))
            losses.append(column(records, "loss"))
    finally:
        hook.remove()
    assert counts[1] == 2 * counts[0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)


def test_bfloat16_computes_in_bfloat16(trained):
    high, low = (column(trained(dtype=name)[0], "loss") for name in ("float32", "bfloat16"))
    assert high != low
    assert low == pytest.approx(high, rel=0.1)


def test_the_device_is_the_one_given(trained, capfd):
    """Never silently the other one."""
    if torch.cuda.is_available():
        trained(device="cpu")
        assert "steps on cpu" in capfd.readouterr().err
    else:
        with pytest.raises(ConfigError, match="--device cuda"):
            trained(device="cuda")


def test_adapters_are_as_told(trained, exact_student):
    lora = {"lora_r": 3, "lora_alpha": 12.0, "lora_dropout": 0.5}
    lora["lora_target_modules"] = ["q_proj", "up_proj"]
    fast = {"learning_rate": 5e-3}
    records, out = trained(lora=lora, optimizer=fast)
    adapters = load_file(out / "adapter" / "adapter_model.safetensors")
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters}
    assert layers == {"q_proj", "up_proj"}
    assert {w.shape[0] for name, w in adapters.items() if "lora_A" in name} == {3}
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert saved["lora_alpha"] == 12
    # Scaled by alpha / r, in the merged weights.
    name = "model.layers.0.self_attn.q_proj"
    stem = f"base_model.model.{name}"
    change = adapters[f"{stem}.lora_B.weight"] @ adapters[f"{stem}.lora_A.weight"]
    base, merged = load_file(exact_student / "model.safetensors"), weights(out)[f"{name}.weight"]
    assert torch.allclose(merged - base[f"{name}.weight"], 4 * change, atol=1e-6)
    # Adapters start at zero, so that dropout shows from the second step on.
    dry, _ = trained(lora=lora | {"lora_dropout": 0.0}, optimizer=fast)
    assert dry[0]["loss"] == pytest.approx(records[0]["loss"], rel=1e-6)
    assert abs(dry[-1]["loss"] / records[-1]["loss"] - 1) > 1e-3


def test_validation_is_held_and_ended_as_told(trained, few):
    validation = {"validation_fraction": 0.4, "eval_steps": 1, "early_stopping_patience": 1}
    packs = make_packs(ShardSet([few]), 600, 0, 0, (0.0, 0.4))
    # So high that it gets worse at once.
    records, _ = trained(
        epochs=4,
        validation=validation,
        optimizer={"learning_rate": 0.3, "lr_schedule": "constant", "warmup_ratio": 0.0},
    )
    steps, found = column(records, "loss"), column(records, "validation_loss")
    assert set(column(records, "validation_tokens")) == {sum(p.num_loss_tokens for p in packs)}
    assert len(found) == len(steps)
    rises = [b >= a for a, b in itertools.pairwise(found)]
    assert rises.index(True) == len(rises) - 1
    assert len(steps) < 4 * len(make_packs(ShardSet([few]), 600, 0, 0, (0.4, 1.0)))


def test_each_step_drops_units_of_its_own(few, trained, exact_student, tmp_path):
    """The same row in each step, and weights that do not move: losses differ by dropout alone."""
    one, left = shutil.copytree(few, tmp_path / "one"), itertools.count(1, -1)

    def reject(row):
        if row["status"] == "ok" and next(left) <= 0:
            row["status"] = "longer"

    edit_rows(one, "distill", reject)
    student = shutil.copytree(exact_student, tmp_path / "student")
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.3}))
    still = {"learning_rate": 1e-12}
    found = [
        column(trained(shards=one, student=student, epochs=4, optimizer=still)[0], "loss")
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) == 4


def test_checkpoints_are_as_frequent_as_told(trained, monkeypatch):
    from mpd_train import loop

    saved = []
    save = loop.checkpoint.save
    monkeypatch.setattr(loop.checkpoint, "save", lambda *a: saved.append(a[1]) or save(*a))
    records, _ = trained(save_steps=2)
    assert saved == list(range(2, len(records), 2))


OWN = """
from pathlib import Path
from transformers import Qwen3ForCausalLM

class Own(Qwen3ForCausalLM):
    pass

Path({path!r}).touch()
"""


def test_code_that_ships_with_a_model_runs_when_told(trained, exact_student, tmp_path):
    folder = shutil.copytree(exact_student, tmp_path / "model")
    (folder / "own.py").write_text(OWN.format(path=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    trained(student=str(folder), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_overwrite_of_a_run(few, tmp_path):
    arguments = [
        "--shards", few, "--student", STUDENT, "--out", tmp_path / "run", "--pack-length", 1000,
    ]  # fmt: skip
    assert invoke(cli, *arguments) == 0
    with pytest.raises(ConfigError, match="seed: saved 0 / now 1"):
        invoke(cli, *arguments, "--seed", 1)
    assert invoke(cli, *arguments, "--seed", 1, "--overwrite") == 0
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["identity"]["config"]["seed"] == 1
