"""Streaming, packing and training with real models and real shards."""

import json
import resource
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    STUDENT,
    TEACHER,
    command,
    edit_rows,
    environment,
    killed,
    loss_on_all,
    losses,
    metrics,
    metrics_lines,
    other_tokenizer,
    rewrite_arguments,
    row_log,
    run,
    slow,
    tied_student,
    train_config,
    weights,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.store.locks import folder_lock
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import METADATA_KEY
from mpd_train import checkpoint
from mpd_train.config import LossConfig, OptimizerConfig
from mpd_train.data.batches import load_pack
from mpd_train.data.packing import make_packs
from mpd_train.data.shard_set import ShardSet
from mpd_train.distributed import Ranks
from mpd_train.kl.divergence import NAMES
from mpd_train.loop import train
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM
from mpd_train.optimizer import learning_rate, make_optimizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(round_dir):
    return ShardSet([round_dir])


@pytest.fixture(scope="module")
def student():
    return CausalLM(resolve_model(str(STUDENT)), CPU, torch.float32, False)


@pytest.fixture(scope="module")
def teacher():
    return CausalLM(resolve_model(str(TEACHER)), CPU, torch.float32, False)


@pytest.fixture(scope="module")
def self_round(round_dir, tmp_path_factory):
    """The round's rollouts rewritten by the teacher and scored, under the problem prompt."""
    out = tmp_path_factory.mktemp("self") / "round1"
    shutil.copytree(round_dir, out, ignore=shutil.ignore_patterns("distill*"))
    run("mpd-gen", *rewrite_arguments(out, **{"--score-context": "problem"}), "--overwrite")
    return out


# -- batches -------------------------------------------------------------------------------


def test_a_batch_holds_what_the_shard_says(shards, round_dir):
    pack = make_packs(shards, 512, 0, 0)[0]
    batch = load_pack(shards, pack)
    files = RoundDir(round_dir).shard_paths("distill")
    starts = np.flatnonzero(batch.position_ids[0].numpy() == 0)
    teacher_starts = np.flatnonzero(batch.teacher_position_ids[0].numpy() == 0)
    seen = 0
    for (group, row), start, teacher_start in zip(pack.rows, starts, teacher_starts, strict=True):
        source = shards.groups[group]
        assert source.path in files
        r = pq.ParquetFile(source.path).read_row_group(source.index).slice(row, 1).to_pylist()[0]
        length, n = len(r["input_ids"]), r["num_rewritten_tokens"]
        assert batch.input_ids[0, start : start + length].tolist() == r["input_ids"]
        positions = batch.loss_positions[seen : seen + n]
        # The state before each loss token predicts it; the last one predicts the end token.
        targets = batch.input_ids[0, positions + 1].tolist()
        assert targets == r["input_ids"][r["loss_start"] :]
        assert targets[-1] == shards.metadata["eos_token_id"]
        teacher_positions = batch.teacher_loss_positions[seen : seen + n]
        assert batch.teacher_input_ids[0, teacher_positions + 1].tolist() == targets
        context = r["teacher_prompt_ids"]
        end = teacher_start + len(context)
        assert batch.teacher_input_ids[0, teacher_start:end].tolist() == context
        assert batch.topk_ids[seen : seen + n].flatten().tolist() == r["topk_ids"]
        seen += n
    assert seen == len(batch.topk_ids) == pack.num_loss_tokens


# -- the loss through the whole path --------------------------------------------------------


def loss_of(student, teacher, shards, loss, num_packs=None):
    total = 0.0
    packs = make_packs(shards, 2000, 0, 0)[:num_packs]
    normalizer = float(sum(p.num_loss_tokens for p in packs))
    per_token = []
    for pack in packs:
        batch = load_pack(shards, pack)
        vocab = shards.metadata["vocab_size"]
        out = pack_loss(student, teacher, batch, vocab, loss, normalizer)
        total += out.loss.item()
        per_token.append(out.per_token)
    return total, torch.cat(per_token)


def test_student_equal_to_teacher_gives_zero_from_cached_records(self_round, teacher):
    """Engine -> shard -> packing -> loss, every step at once."""
    loss, per_token = loss_of(teacher, None, ShardSet([self_round]), LossConfig())
    assert 0 <= loss < 5e-4
    assert per_token.min() > -1e-6


def test_student_equal_to_teacher_gives_zero_with_the_full_vocabulary(self_round, teacher):
    loss, _ = loss_of(teacher, teacher, ShardSet([self_round]), LossConfig())
    assert abs(loss) < 1e-5


def test_a_shift_by_one_would_not_be_zero(self_round, teacher):
    """That the two tests above can fail."""
    shards = ShardSet([self_round])
    batch = load_pack(shards, make_packs(shards, 2000, 0, 0)[0])
    shifted = replace(batch, loss_positions=batch.loss_positions + 1)
    n = float(len(batch.loss_positions))
    vocab = shards.metadata["vocab_size"]
    assert pack_loss(teacher, None, shifted, vocab, LossConfig(), n).loss > 0.1


def test_a_shift_of_the_teacher_alone_would_not_be_zero(round_dir, student, teacher):
    """Under the rewrite context teacher and student see different sequences; each model is its
    own object here, and only the teacher's positions move."""
    shards = ShardSet([round_dir])
    batch = load_pack(shards, make_packs(shards, 2000, 0, 0)[0])
    vocab, n = shards.metadata["vocab_size"], float(len(batch.loss_positions))
    right = pack_loss(student, teacher, batch, vocab, LossConfig(), n).loss
    cached = pack_loss(student, None, batch, vocab, LossConfig(), n).loss
    shifted = replace(batch, teacher_loss_positions=batch.teacher_loss_positions - 1)
    assert abs(right - cached) < 0.02 * cached
    assert pack_loss(student, teacher, shifted, vocab, LossConfig(), n).loss > 2 * right


@pytest.mark.parametrize("name", [NAMES[0], *map(slow, NAMES[1:])])
def test_the_cached_loss_bounds_the_dense_one(shards, student, teacher, name):
    cached, _ = loss_of(student, None, shards, LossConfig(divergence=name), num_packs=1)
    dense, _ = loss_of(student, teacher, shards, LossConfig(divergence=name), num_packs=1)
    assert cached <= dense * 1.002 + 1e-4
    assert cached >= 0.9 * dense - 1e-4


@pytest.mark.slow
def test_dense_equals_cached_at_full_k(round_dir, student, teacher, tmp_path):
    out = shutil.copytree(round_dir, tmp_path / "round1", ignore=shutil.ignore_patterns("distill*"))
    vocab = student.head().shape[0]
    run("mpd-gen", *rewrite_arguments(out, **{"--num-logprobs": vocab}), "--overwrite")
    run("mpd-gen", "validate", out)
    shards = ShardSet([out])
    assert shards.metadata["num_logprobs"] == vocab
    cached, _ = loss_of(student, None, shards, LossConfig())
    dense, _ = loss_of(student, teacher, shards, LossConfig())
    assert abs(cached - dense) < 1e-3 * dense
    with pytest.raises(ConfigError, match=f"num_logprobs: saved 64 / now {vocab}"):
        ShardSet([round_dir, out])


def test_packed_equals_alone(shards, student):
    """Sequences of a pack do not see each other: one pack of many = each in its own."""
    many = make_packs(shards, 2000, 0, 0)[0]
    assert len(many.rows) > 5
    batch = load_pack(shards, many)
    with torch.no_grad():
        packed = student.states(batch.input_ids, batch.position_ids)[0, batch.loss_positions]
        alone = []
        for row in many.rows:
            one = load_pack(shards, type(many)((row,), 0, 0))
            alone.append(student.states(one.input_ids, None)[0, one.loss_positions])
    assert torch.allclose(packed, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_loss_and_gradients_do_not_depend_on_packing(shards, student):
    """One global token mean: however rows are packed and accumulated."""
    found = []
    for pack_length in (400, 3000):
        student.model.zero_grad()
        packs = make_packs(shards, pack_length, 0, 0)
        normalizer = float(sum(p.num_loss_tokens for p in packs))
        total = 0.0
        for pack in packs:
            batch = load_pack(shards, pack)
            vocab = shards.metadata["vocab_size"]
            out = pack_loss(student, None, batch, vocab, LossConfig(), normalizer)
            out.loss.backward()
            total += out.loss.item()
        found.append((total, student.head().grad.clone()))
    student.model.zero_grad(set_to_none=True)
    assert len(make_packs(shards, 400, 0, 0)) > len(make_packs(shards, 3000, 0, 0))
    assert abs(found[0][0] - found[1][0]) < 1e-6
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[0][1].norm()


# -- training -------------------------------------------------------------------------------


def config(shards, out, **changed):
    settings = {"epochs": 2, "save_steps": 4, "optimizer": {"learning_rate": 5e-4}}
    return train_config(shards, changed.pop("student", STUDENT), out, **{**settings, **changed})


def as_arguments(shards, out):
    return [
        "--shards", shards, "--student", STUDENT, "--out", out, "--pack-length", 600,
        "--epochs", 2, "--save-steps", 4, "--dtype", "float32", "--learning-rate", 5e-4,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(round_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "run"
    train(config(round_dir, out))
    return out


def test_training_lowers_the_loss_and_is_recorded(trained, round_dir):
    records = metrics(trained)
    kept = ShardSet([round_dir])
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert loss_on_all(kept, trained / "model") < 0.45 * loss_on_all(kept, STUDENT)
    assert records[0]["learning_rate"] < records[2]["learning_rate"]
    tokens = sum(p.num_loss_tokens for p in make_packs(kept, 600, 0, 0))
    assert sum(r["loss_tokens"] for r in records) == 2 * tokens
    assert not list(trained.rglob("*.pt")) + list(trained.rglob("*.bin"))


@pytest.mark.slow
def test_sigkill_and_resume_give_the_same_curve_and_weights(trained, round_dir, tmp_path):
    out = tmp_path / "run"
    arguments = as_arguments(round_dir, out)
    for after in (6, 13):
        killed("mpd-train", *arguments, until=lambda: len(metrics_lines(out)) >= after)  # noqa: B023
        assert not (out / "model").exists()
    resumed = run("mpd-train", *arguments)
    assert "resuming after step" in resumed.stderr
    assert losses(out) == losses(trained)
    assert row_log(out) == row_log(trained)
    ours, theirs = weights(out), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = run("mpd-train", *arguments)
    assert "has finished" in again.stderr


def test_other_settings_do_not_resume(trained, round_dir):
    with pytest.raises(ConfigError, match=r"learning_rate: saved 0.0005 / now 0.1"):
        train(config(round_dir, trained, optimizer={"learning_rate": 0.1}))


def test_a_checkpoint_holds_weights_and_moments(tmp_path, shards, round_dir):
    model = CausalLM(resolve_model(str(STUDENT)), CPU, torch.float32, False)
    optimizer = make_optimizer(model.model, OptimizerConfig())
    batch = load_pack(shards, make_packs(shards, 600, 0, 0)[0])
    vocab = shards.metadata["vocab_size"]
    pack_loss(model, None, batch, vocab, LossConfig(), 100.0).loss.backward()
    optimizer.step()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model.model, optimizer, checkpoint.Progress(), Ranks())
    found = checkpoint.checkpoints(tmp_path)
    assert [p.name for p in found] == ["step-000002", "step-000003"]
    other = CausalLM(resolve_model(str(STUDENT)), CPU, torch.float32, False)
    other_optimizer = make_optimizer(other.model, OptimizerConfig())
    assert checkpoint.newest(tmp_path) == 3
    checkpoint.load(tmp_path, 3, other.model, other_optimizer)
    for a, b in zip(model.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, other_optimizer.state_dict()["state"][i][key]), key
    # Nothing that would have to be unpickled.
    assert {p.suffix for p in found[-1].iterdir()} == {".safetensors", ".json"}


def test_a_second_trainer_is_refused(round_dir, tmp_path):
    with folder_lock(tmp_path / "run"), pytest.raises(ConfigError, match="another process"):
        train(config(round_dir, tmp_path / "run"))


def test_tied_embeddings_are_trained_and_exported_once(round_dir, tmp_path):
    """Small models tie head and embedding: one tensor in checkpoint and export, both trained."""
    tied = tied_student(tmp_path / "tied", "bfloat16")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    train(config(round_dir, tmp_path / "run", student=str(tied), epochs=1, save_steps=2))
    found = weights(tmp_path / "run")
    assert "lm_head.weight" not in found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(model.lm_head.weight, found["model.embed_tokens.weight"])
    before = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(before, model.lm_head.weight)
    records = metrics(tmp_path / "run")
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]


@pytest.mark.parametrize("name", [NAMES[0], *map(slow, NAMES[1:])])
def test_each_divergence_trains(round_dir, tmp_path, name):
    train(config(round_dir, tmp_path / "run", epochs=1, loss={"divergence": name}))
    values = losses(tmp_path / "run")
    assert np.mean(values[-3:]) < np.mean(values[:3])


def test_cross_entropy_alone_is_plain_fine_tuning(round_dir, student, shards):
    """ce_weight 1 = transformers' own loss on the rewrites, gradient included."""
    batch = load_pack(shards, make_packs(shards, 600, 0, 0)[0])
    n = float(len(batch.loss_positions))
    loss = LossConfig(ce_weight=1.0, divergence_clip=0.5)
    found = []
    for ours in (True, False):
        student.model.zero_grad()
        if ours:
            value = pack_loss(student, None, batch, shards.metadata["vocab_size"], loss, n).loss
        else:
            labels = torch.full_like(batch.input_ids, -100)
            labels[0, batch.loss_positions + 1] = batch.labels
            ids, positions = batch.input_ids, batch.position_ids
            value = student.model(
                input_ids=ids, position_ids=positions, labels=labels, use_cache=False
            ).loss
        value.backward()
        found.append((value.item(), student.head().grad.clone()))
    student.model.zero_grad(set_to_none=True)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[1][1].norm()


def test_clip_and_cross_entropy_are_recorded(round_dir, trained, tmp_path):
    loss = {"ce_weight": 0.25, "divergence_clip": 0.05}
    train(config(round_dir, tmp_path / "run", epochs=1, loss=loss))
    first, plain = metrics(tmp_path / "run")[0], metrics(trained)[0]
    assert plain["kl"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["kl"] == pytest.approx(plain["kl"], rel=1e-5)
    assert 0 < first["clipped"] < 1
    assert first["loss"] < 0.75 * first["kl"] + 0.25 * first["cross_entropy"]
    assert first["loss"] > 0.25 * first["cross_entropy"]
    assert "clipped" not in plain
    assert "cross_entropy" not in plain


def test_learning_rate_schedules():
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == 1.0
    assert rates[99] < 0.001
    linear = config.model_copy(update={"lr_schedule": "linear"})
    assert learning_rate(linear, 55, 100) == pytest.approx(0.5)
    constant = config.model_copy(update={"lr_schedule": "constant"})
    assert learning_rate(constant, 99, 100) == 1.0


# -- export and refusals --------------------------------------------------------------------


def test_shards_that_do_not_fit_together_are_refused(round_dir, self_round, tmp_path):
    with pytest.raises(ConfigError, match="score_context: saved 'rewrite' / now 'problem'"):
        ShardSet([round_dir, self_round])
    with pytest.raises(ConfigError, match="no distill shards"):
        ShardSet([tmp_path])


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokenizer", "x"), ("vocab_size", 166), ("eos_token_id", 3), ("num_logprobs", 32),
        ("score_context", "problem"), ("score_temperature", 2.0),
    ],
)  # fmt: skip
def test_rounds_that_differ_in_what_is_shared_are_refused(round_dir, tmp_path, name, value):
    other = shutil.copytree(round_dir, tmp_path / "round2")
    for file in (other / "distill").glob("*.parquet"):
        table = pq.read_table(file)
        metadata = json.loads(table.schema.metadata[METADATA_KEY]) | {name: value}
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)}), file)
    with pytest.raises(ConfigError, match=f"round2/distill/part-.*cannot be trained.*\n *{name}: "):
        ShardSet([round_dir, other])


def test_a_round_without_kept_rewrites_is_refused(round_dir, tmp_path):
    out = shutil.copytree(round_dir, tmp_path / "round1")
    edit_rows(out, "distill", lambda row: row.update(status="longer"))
    with pytest.raises(ConfigError, match="no kept rewrite.*'longer'"):
        ShardSet([out])


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_shard_is_named(round_dir, tmp_path, damage):
    out = shutil.copytree(round_dir, tmp_path / "round1")
    victim = RoundDir(out).shard_paths("distill")[0]
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    else:
        # One bit in the middle of the stored log-probabilities.
        group = pq.read_metadata(victim).row_group(0)
        columns = [group.column(index) for index in range(group.num_columns)]
        column = next(c for c in columns if c.path_in_schema.startswith("topk_logprobs"))
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    victim.write_bytes(content)
    settings = ["--shards", out, "--student", STUDENT, "--out", tmp_path / "run"]
    said = run("mpd-train", *settings, code=1).stderr
    assert str(victim) in said
    assert "Traceback" not in said
    assert str(victim) in run("mpd-gen", "validate", out, code=1).stdout


def test_another_tokenizer_is_refused(round_dir, tmp_path):
    other = other_tokenizer(tmp_path / "other")
    with pytest.raises(ConfigError, match="different tokenizers"):
        train(config(round_dir, tmp_path / "run", student=str(other)))
    refused = run("mpd-gen", *rewrite_arguments(round_dir, **{"--teacher": other}), code=1)
    assert "different tokenizers" in refused.stderr


def test_a_nan_loss_stops_with_the_rows_named(round_dir, tmp_path):
    arguments = ["--shards", round_dir, "--student", STUDENT, "--out", tmp_path / "run"]
    said = run("mpd-train", *arguments, "--learning-rate", 1e30, code=1).stderr
    assert "step 2: loss nan" in said
    assert "part-00000.parquet" in said
    assert not (tmp_path / "run" / "model").exists()
    (saved,) = (tmp_path / "run" / "failed" / "step-000002").iterdir()
    batch = load_pack(ShardSet([round_dir]), make_packs(ShardSet([round_dir]), 4096, 0, 0)[1])
    found = load_file(saved)
    assert found.keys() == vars(batch).keys()
    assert all(torch.equal(found[name], value) for name, value in vars(batch).items())


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_one_message(round_dir, trained, tmp_path):
    """The kernel refuses files above a size, as a full disk would; the rest follows."""
    out = tmp_path / "run"
    arguments = as_arguments(round_dir, out)
    limit = 2 << 20
    stopped = subprocess.run(
        command("mpd-train", *arguments, fresh=True),
        env=environment(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert stopped.returncode == 1
    assert "Steps up to the last checkpoint are safe" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not checkpoint.checkpoints(out / "checkpoints")
    run("mpd-train", *arguments)
    assert losses(out) == losses(trained)


def test_a_loss_out_of_bounds_stops(round_dir, trained, tmp_path):
    bound = 0.9 * metrics(trained)[0]["loss"]
    with pytest.raises(MPDError, match=f"step 1: .* at most --max-loss {bound:g}"):
        train(config(round_dir, tmp_path / "run", max_loss=bound))


def test_broken_weights_are_refused(tmp_path):
    broken = shutil.copytree(STUDENT, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="not finite"):
        CausalLM(resolve_model(str(broken)), CPU, torch.float32, False)


def test_code_that_ships_with_a_model_is_not_run(tmp_path):
    folder = shutil.copytree(STUDENT, tmp_path / "model")
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config_ = json.loads((folder / "config.json").read_text())
    config_["auto_map"] = {"AutoModelForCausalLM": "hostile.Model", "AutoConfig": "hostile.C"}
    (folder / "config.json").write_text(json.dumps(config_))
    CausalLM(resolve_model(str(folder)), CPU, torch.float32, False)
    load_tokenizer(resolve_model(str(folder)))
    assert not (tmp_path / "ran").exists()
