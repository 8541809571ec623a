"""Held-out prompts, early stopping and the best weights."""

from contextlib import closing

import pyarrow.parquet as pq
import pytest
import torch
from conftest import STUDENT, TEACHER, metrics, train_config, until_a_checkpoint, weights

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import resolve_model
from mpd_train.config import LossConfig
from mpd_train.data.batches import Loader
from mpd_train.data.packing import split_packs
from mpd_train.data.shard_set import ShardSet
from mpd_train.distributed import Ranks
from mpd_train.loop import train
from mpd_train.loss import pack_loss, validate
from mpd_train.model.causal_lm import CausalLM


def config(round_dir, student, out, **changed):
    settings = {
        "save_steps": 4,
        # Many more than it will see.
        "epochs": 10,
        # So high that validation soon gets worse.
        "optimizer": {"learning_rate": 2e-2, "lr_schedule": "constant"},
        "validation": {
            "validation_fraction": 0.25, "eval_steps": 3, "early_stopping_patience": 2,
        },
    }  # fmt: skip
    return train_config(round_dir, student, out, **{**settings, **changed})


def settings(fraction=0.25, **changed):
    validation = {"validation_fraction": fraction}
    changed = {"epochs": 1, "validation": validation, **changed}
    return config("round1", STUDENT, "run", **changed)


def lines(out):
    found = metrics(out)
    return [r for r in found if "loss" in r], [r for r in found if "validation_loss" in r]


def prompts_of(shards, packs):
    columns = [
        pq.ParquetFile(group.path).read_row_group(group.index)["prompt_id"].to_pylist()
        for group in shards.groups
    ]
    return {columns[g][r] for pack in packs for g, r in pack.rows}


def test_prompts_are_on_one_side_for_every_seed(round_dir):
    shards = ShardSet([round_dir])
    packs, held_out = split_packs(shards, settings())
    assert sum(len(p.rows) for p in packs + held_out) == shards.num_rows
    assert not prompts_of(shards, packs) & prompts_of(shards, held_out)
    other, same = split_packs(shards, settings(seed=7))
    assert held_out == same
    assert packs != other
    assert prompts_of(shards, packs) == prompts_of(shards, other)


@pytest.mark.parametrize("fraction, side", [(1e-9, "validate"), (1 - 1e-9, "train")])
def test_an_empty_side_is_refused(round_dir, fraction, side):
    with pytest.raises(ConfigError, match=f"left to {side} on"):
        split_packs(ShardSet([round_dir]), settings(fraction))


def test_patience_needs_validation(round_dir, tmp_path):
    with pytest.raises(ConfigError, match="--validation-fraction"):
        train(
            config(round_dir, STUDENT, tmp_path / "run", validation={"early_stopping_patience": 1})
        )


@pytest.fixture(scope="module")
def stopped(round_dir, exact_student, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped") / "run"
    train(config(round_dir, exact_student, out))
    return out


def test_stops_and_exports_the_best(stopped, round_dir):
    steps, validations = lines(stopped)
    values = [v["validation_loss"] for v in validations]
    best = values.index(min(values))
    assert len(values) - 1 - best == 2
    shards = ShardSet([round_dir])
    packs, held_out = split_packs(shards, settings(epochs=10))
    assert len(steps) < len(packs)
    said = f"step {validations[best]['step']} of {len(packs)} planned"
    assert f"* Training: {said}," in (stopped / "model" / "README.md").read_text()
    student = CausalLM(
        resolve_model(str(stopped / "model")), torch.device("cpu"), torch.float32, False
    )
    vocab = shards.metadata["vocab_size"]
    with closing(Loader(shards, torch.device("cpu"))) as loader:
        value, count = validate(
            student, None, loader, held_out, vocab, LossConfig(), torch.float32, Ranks()
        )
    assert value == pytest.approx(values[best], rel=1e-6)
    assert all(abs(other / value - 1) > 1e-5 for i, other in enumerate(values) if i != best)
    assert count == validations[0]["validation_tokens"]


def test_the_loss_of_held_out_packs_is_that_of_training_on_them(round_dir):
    shards, cpu = ShardSet([round_dir]), torch.device("cpu")
    student, teacher = (
        CausalLM(resolve_model(str(path)), cpu, torch.float32, False) for path in (STUDENT, TEACHER)
    )
    _, held_out = split_packs(shards, settings())
    tokens = sum(pack.num_loss_tokens for pack in held_out)
    loss, vocab = LossConfig(kl_temperature=2.0, ce_weight=0.25), shards.metadata["vocab_size"]
    with closing(Loader(shards, cpu)) as loader, torch.no_grad():
        told = (loader, held_out, vocab, loss, torch.float32, Ranks())
        value, count = validate(student, teacher, *told)
        expected = sum(
            pack_loss(student, teacher, batch, vocab, loss, float(tokens)).loss.item()
            for batch in loader.batches([held_out], Ranks())
        )
    assert (value, count) == (pytest.approx(expected, rel=1e-5), tokens)


def test_the_weights_of_the_last_step_are_validated(round_dir, exact_student, tmp_path):
    train(config(round_dir, exact_student, tmp_path / "run", max_steps=4))
    assert [line["step"] for line in lines(tmp_path / "run")[1]][-2:] == [3, 4]


def test_resumed_stops_at_the_same_step_with_the_same_weights(
    stopped, round_dir, exact_student, tmp_path
):
    out = tmp_path / "run"
    for _ in range(2):
        with until_a_checkpoint():
            train(config(round_dir, exact_student, out))
    train(config(round_dir, exact_student, out))
    ours, theirs = lines(out), lines(stopped)
    assert [r["loss"] for r in ours[0]] == [r["loss"] for r in theirs[0]]
    assert ours[1] == theirs[1]
    expected = weights(stopped)
    assert all(torch.equal(w, expected[n]) for n, w in weights(out).items())
