"""Files that commands wrote and something has changed since: what is damaged is named, the rest is
read as it is. test_fuzz.py looks for what is missing here."""

import errno
import json
import shutil
import sys
from pathlib import Path

import click
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, STUDENT

from mpd_data.common.command import run_command
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.inspect.stats import round_stats
from mpd_data.inspect.status import round_status
from mpd_data.inspect.validate import validate_round
from mpd_data.store.progress import Progress, read_report
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import read_record
from mpd_data.store.shards import read_batches, read_columns, read_metadata
from mpd_data.store.trainings import read_metrics, read_row_log, row_log
from mpd_data.store.writer import commit_file

RECORDED = ROOT / "tests" / "data" / "recorded"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(RECORDED / "round", tmp_path / "round")


@pytest.fixture
def shard(folder):
    return folder / "rollouts" / "part-00000.parquet"


def rewritten(path, change):
    """Write the table of a Parquet file again, as `change` returns it."""
    table = pq.read_table(path, partitioning=None)
    pq.write_table(change(table), path)


def recast(name, type_):
    def change(table):
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, table.column(name).cast(type_))

    return change


# -- run.json, manifests, reports -------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        (DEEP, "nested too deeply"),
        ('{"stages": "none"}', "stages: .*found 'none'"),
        ('{"stages": {"rollouts": {"details": {}}}}', "stages.rollouts.identity: Field required"),
        (
            '{"stages": {"rollouts": {"identity": {}, "details": {"rows": "6"}}}}',
            "stages.rollouts.details.rows: .*integer, found '6'",
        ),
        ('{"identity": {"student": "none"}, "details": {}}', "identity.student: .*found 'none'"),
        ('{"identity": {}, "details": null}', "details: .*found None"),
    ],
)
def test_a_damaged_run_json_is_named_with_the_place(folder, text, message):
    (folder / "run.json").write_text(text)
    with pytest.raises(DataError, match=rf"run\.json: .*{message}.*Restore it"):
        round_status(folder)


def test_a_run_json_that_is_a_folder_or_a_link_to_nothing_is_not_taken_for_none(folder):
    (folder / "run.json").unlink()
    (folder / "run.json").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"run\.json: a link to nothing"):
        read_record(folder)
    (folder / "run.json").unlink()
    assert read_record(folder) == {}
    (folder / "run.json").mkdir()
    with pytest.raises(DataError, match=r"run\.json: cannot be read \(Is a directory\)"):
        read_record(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda line: line.replace(b'"rows":3', b'"rows":"3"'), "rows: .*integer, found '3'"),
        (lambda line: line.replace(b'"rows":3', b'"rows":-3'), "rows: .*found -3"),
        (lambda line: line.replace(b"part-", b"../part-"), "name: .*found '../part-00000"),
        (lambda line: line.replace(b"[3]", DEEP.encode()), "nested too deeply"),
        (lambda line: line + line, "names part-00000.parquet again"),
    ],
)
def test_a_damaged_manifest_is_named_and_made_anew(folder, change, message):
    round_dir = RoundDir(folder)
    whole, path = round_dir.manifest("rollouts"), round_dir.manifest_path("rollouts")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(change(first) + second)
    with pytest.raises(DataError, match=f"rollouts.manifest.jsonl, line .: .*{message}"):
        round_status(folder)
    with round_dir.lock():
        assert len(round_dir.recover("rollouts")) == 6
    assert round_dir.manifest("rollouts") == whole


def test_validate_compares_the_counts_of_the_manifest(folder):
    path = folder / "distill.manifest.jsonl"
    path.write_text(path.read_text().replace('"tokens":', '"tokens":1', 1))
    (problem,) = validate_round(folder)
    assert "distill.manifest.jsonl: the counts of part-00000.parquet are not" in problem


def test_validate_names_what_is_no_file(folder, shard):
    shard.unlink()
    shard.mkdir()
    problems = "\n".join(validate_round(folder))
    assert f"{shard}: cannot be read" in problems


@pytest.mark.parametrize("text", ["", "\0" * 200, DEEP, "[]", '{"state": "asleep"}'])
def test_a_damaged_progress_report_is_named(folder, text):
    path = folder / ".status" / "rollouts-0-of-1.json"
    with Progress("rollouts", 6, path):
        pass
    assert read_report(path)["state"] == "finished"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rollouts-0-of-1\.json: (not|expected) .*Delete it"):
        round_status(folder)


# -- shards -----------------------------------------------------------------------------------


def with_metadata(path, **changed):
    values = {**read_metadata(path), **changed}
    kept = {name: value for name, value in values.items() if value is not ...}
    rewritten(path, lambda table: table.replace_schema_metadata({"mpd": json.dumps(kept)}))


def test_metadata_that_is_missing_or_of_another_type_is_named(shard):
    with_metadata(shard, tokenizer=...)
    with pytest.raises(DataError, match=r"part-00000\.parquet: its `mpd` metadata lacks 'tokeni"):
        read_metadata(shard)["tokenizer"]
    with_metadata(shard, vocab_size="many")
    with pytest.raises(DataError, match=r"damaged: vocab_size: .*integer, found 'many'"):
        read_metadata(shard)


def test_columns_come_in_the_contracts_types(shard):
    """Polars writes large types, and other tools dictionaries."""
    sound = pq.read_table(shard, partitioning=None)
    names = ["row_id", "prompt_id", "finish_reason", "num_completion_tokens"]
    metadata = sound.schema.metadata
    pl.from_arrow(sound).with_columns(pl.col("finish_reason").cast(pl.Categorical)).write_parquet(
        shard
    )
    rewritten(shard, lambda table: table.replace_schema_metadata(metadata))
    read = read_columns(shard, names)
    assert read.schema.types == sound.select(names).schema.types
    assert read.to_pylist() == sound.select(names).to_pylist()


@pytest.mark.parametrize(
    "name, change",
    [
        ("prompt_id", lambda column: pa.nulls(len(column), pa.string())),
        ("sample_idx", lambda column: pa.array(["one"] * len(column))),
        ("completion_ids", lambda column: pa.array([3] * len(column))),
    ],
)
def test_values_of_another_kind_are_refused(shard, name, change):
    rewritten(
        shard,
        lambda table: table.set_column(
            table.schema.get_field_index(name), name, change(table.column(name))
        ),
    )
    with pytest.raises(DataError, match=rf"part-00000\.parquet: .*({name}|cast|parse)"):
        read_columns(shard, [name])
    with pytest.raises(DataError, match=r"part-00000\.parquet"):
        list(read_batches(shard, [name]))


def test_the_trainer_reads_large_types_and_refuses_other_kinds(folder):
    pytest.importorskip("torch")
    from mpd_train.data.shard_set import ShardSet

    path = folder / "distill" / "part-00001.parquet"
    rows, sound = ShardSet([folder]).num_rows, path.read_bytes()
    rewritten(path, recast("status", pa.large_string()))
    assert ShardSet([folder]).num_rows == rows
    path.write_bytes(sound)
    rewritten(path, lambda table: table.drop_columns(["status"]))
    with pytest.raises(DataError, match=r"part-00001\.parquet: .*status"):
        ShardSet([folder])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_start", None, "row 1: kept, with 50 num_rewritten_tokens from loss_start 0 on"),
        ("num_rewritten_tokens", None, "row 1: kept, with 0 num_rewritten_tokens"),
        ("num_rewritten_tokens", -1, "row 1: kept, with -1 num_rewritten_tokens"),
        ("num_rewritten_tokens", 49, r"row 1 of row group 0: \d+ input_ids, expected loss_start"),
        ("input_ids", None, "row 1 of row group 0: 0 input_ids, expected loss_start"),
    ],
)
def test_the_trainer_never_leaves_out_a_damaged_row(folder, name, value, message):
    pytest.importorskip("torch")
    from mpd_train.data.batches import load_pack
    from mpd_train.data.packing import make_packs
    from mpd_train.data.shard_set import ShardSet

    def change(table):
        rows = table.to_pylist()
        rows[1][name] = value
        return pa.Table.from_pylist(rows, schema=table.schema)

    rewritten(folder / "distill" / "part-00001.parquet", change)
    with pytest.raises(DataError, match=rf"part-00001\.parquet, {message}"):
        shards = ShardSet([folder])
        for pack in make_packs(shards, 600, 0, 0):
            load_pack(shards, pack)


@pytest.mark.parametrize(
    "text", ["null", '{"pad_token_id": "one"}', "{", DEEP, "[]", '{"eos_token_id": [2, 1e308]}']
)
def test_a_damaged_generation_config_is_not_taken_for_none(tmp_path, text):
    """The model's end tokens are in it."""
    pytest.importorskip("transformers")
    from mpd_data.common.models import end_tokens, load_tokenizer, resolve_model

    model = shutil.copytree(STUDENT, tmp_path / "model")
    (model / "generation_config.json").write_text(text)
    files = resolve_model(str(model))
    with pytest.raises(ConfigError, match=r"generation_config\.json: (cannot be read|.* an id)"):
        end_tokens(files, load_tokenizer(files, False))


def test_a_tokenizer_that_cannot_encode_is_named(tmp_path):
    pytest.importorskip("transformers")
    from mpd_data.common.models import load_tokenizer, resolve_model

    model = shutil.copytree(STUDENT, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": ""}))
    with pytest.raises(ConfigError, match=r"tokenizer cannot be loaded .*tokenizer_config\.json"):
        load_tokenizer(resolve_model(str(model)), False)


def test_stats_of_other_columns_is_one_error(folder, shard):
    rewritten(shard, lambda table: table.append_column("mine", pa.array([1] * len(table))))
    with pytest.raises(DataError, match="mpd-gen validate"):
        round_stats([folder])


def test_a_shard_under_a_name_without_number_takes_none(folder, shard, tmp_path):
    shard.rename(shard.with_name("part-last.parquet"))
    staged = tmp_path / "staged.parquet"
    staged.write_bytes(b"rows")
    assert commit_file(staged, shard.parent, hard_links=True).name == "part-00002.parquet"


def test_something_else_in_the_place_of_a_file_is_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in [
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "loop", "symbolic links"),
    ]:
        monkeypatch.setattr(sys, "argv", ["reads"])
        with pytest.raises(SystemExit) as ended:
            run_command(click.Command("reads", callback=Path(path).read_bytes))
        assert ended.value.code == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: {path}: ")
        assert reason in message
        assert "Move away or restore" in message


# -- settings ---------------------------------------------------------------------------------


def test_settings_that_are_nested_too_deeply_are_named(tmp_path):
    from mpd_data.prompts.template import load_template
    from mpd_rounds.run.steps import read_settings

    path = tmp_path / "settings.toml"
    path.write_text(f"name = {DEEP}")
    for read in (lambda: load_template(str(path)), lambda: read_settings(path, ())):
        with pytest.raises(ConfigError, match=r"settings\.toml: not .*nested too deeply"):
            read()
    path.write_text("name = 1")
    assert read_settings(path, (f"name={DEEP}",)) == {"name": DEEP}


def test_a_number_of_rounds_that_nobody_can_run_is_refused(tmp_path):
    from mpd_rounds.run.steps import load_pipeline

    with pytest.raises(ConfigError, match="rounds: .*less than or equal to 1000"):
        load_pipeline(ROOT / "pipelines" / "pocket" / "pipeline.toml", ("rounds=100000000000",))


# -- trainings and runs -----------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    return shutil.copytree(RECORDED / "training" / "checkpoints", tmp_path / "checkpoints")


def test_only_checkpoints_are_taken_for_checkpoints(checkpoints):
    from mpd_train import checkpoint

    for name in ("step-last", "step-1", "step-000002", "step-1000000"):
        (checkpoints / name).mkdir()
    found = [path.name for path in checkpoint.checkpoints(checkpoints)]
    assert found == ["step-000002", "step-000003", "step-1000000"]
    assert checkpoint.newest(checkpoints) == 1_000_000


@pytest.mark.parametrize("text", ["", DEEP, "{}", '{"step": 4, "best": 1.0}'])
def test_a_damaged_state_of_a_checkpoint_is_named(checkpoints, text):
    from mpd_train import checkpoint

    (checkpoints / "step-000003" / "state.json").write_text(text)
    with pytest.raises(DataError, match=r"state\.json: .*resumes from the checkpoint before it"):
        checkpoint.load(checkpoints, 3, None, None)


@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_damaged_tensors_of_a_checkpoint_are_named(checkpoints, keep):
    import torch

    from mpd_data.common.models import resolve_model
    from mpd_train import checkpoint
    from mpd_train.config import OptimizerConfig
    from mpd_train.model.causal_lm import CausalLM
    from mpd_train.optimizer import make_optimizer

    student = CausalLM(resolve_model(str(STUDENT)), torch.device("cpu"), torch.float32, False)
    optimizer = make_optimizer(student.model, OptimizerConfig())
    (file,) = (checkpoints / "step-000003").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match="step-000003: cannot be read .*Move this folder away"):
        checkpoint.load(checkpoints, 3, student.model, optimizer)


@pytest.fixture(scope="module")
def just_written(tmp_path_factory):
    """Checkpoints of the student after its first two steps, and what was saved."""
    import torch

    from mpd_data.common.models import resolve_model
    from mpd_train import checkpoint
    from mpd_train.config import OptimizerConfig
    from mpd_train.distributed import Ranks
    from mpd_train.model.causal_lm import CausalLM
    from mpd_train.optimizer import make_optimizer

    folder = tmp_path_factory.mktemp("written")
    student = CausalLM(resolve_model(str(STUDENT)), torch.device("cpu"), torch.float32, False)
    optimizer = make_optimizer(student.model, OptimizerConfig())
    for step in (1, 2):
        checkpoint.save(
            folder, step, student.model, optimizer, checkpoint.Progress(0.5, step), Ranks()
        )
    checkpoint.save_best(folder, 2, student.model, Ranks())
    return folder, student.model, optimizer


@pytest.mark.parametrize("how", ["zeros", "one bit", "cut", "gone"])
def test_a_checkpoint_that_is_not_as_it_was_written_is_named(just_written, tmp_path, how):
    """Zeros and a bit leave a file that can be read."""
    from mpd_train import checkpoint

    written, model, optimizer = just_written
    folder = shutil.copytree(written, tmp_path / "checkpoints")
    for name in ("step-000002", "best-000002"):
        file = sorted((folder / name).glob("*.safetensors"))[-1]
        content = bytearray(file.read_bytes())
        if how == "zeros":
            content[-100_000:] = bytes(100_000)
        elif how == "one bit":
            content[-1] ^= 1
        else:
            del content[-10:]
        file.write_bytes(content)
        if how == "gone":
            file.unlink()
    what = "is missing" if how == "gone" else "damaged: .*another content"
    with pytest.raises(DataError, match=f"step-000002: .*{what}.* Move this folder away"):
        checkpoint.load(folder, 2, model, optimizer)
    with pytest.raises(DataError, match=f"best-000002: .*{what}"):
        checkpoint.load_best(folder, checkpoint.Progress(0.5, 2), model)
    with pytest.raises(DataError, match=f"step-000002: .*{what}"):
        checkpoint.load_weights(folder / "step-000002", model)
    # The remedy.
    shutil.rmtree(folder / "step-000002")
    assert checkpoint.newest(folder) == 1
    assert checkpoint.load(folder, 1, model, optimizer) == checkpoint.Progress(0.5, 1)


def test_only_errors_of_the_disk_are_told_as_such(tmp_path):
    from mpd_train import checkpoint

    full = checkpoint.stopped_by(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert "free space or fix the permissions" in str(full)
    other = str(checkpoint.stopped_by(ConnectionResetError("the host is gone"), tmp_path))
    assert "free space" not in other
    assert "the host is gone" in other


@pytest.mark.parametrize(
    "line, message",
    [
        ("1", "expected a JSON object, found int"),
        ('{"loss": 1}', "step: Field required"),
        ('{"step": 2, "tokens": 5}', "step 2 after 3"),
        (DEEP, "nested too deeply"),
        ("\x7f", "Expecting value"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "tokens": 9, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "to')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    path.write_text("\n".join([*lines, line]) + "\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line 4: .*{message}"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"step": 2, "row": "00000000000000aa"}', "kl: Field required"),
        ('{"step": "2", "row": "00000000000000aa", "kl": 0.1}', "step: "),
        ('{"step": 2, "row": "00AA", "kl": 0.1}', "row: "),
        ('{"step": 2, "row": "00000000000000aa", "kl": NaN}', "kl: |NaN"),
        (DEEP, "nested too deeply"),
    ],
)
def test_a_damaged_line_of_a_trainings_rows_is_named(tmp_path, line, message):
    path = row_log(tmp_path, 0)
    path.parent.mkdir()
    lines = [json.dumps({"step": i, "row": f"{i:016x}", "kl": 0.5}) for i in (1, 2)]
    path.write_text("\n".join(lines) + '\n{"step": 3, "ro')
    assert [found["step"] for found in read_row_log(path)] == [1, 2]
    path.write_text("\n".join([*lines, line]) + "\n")
    with pytest.raises(DataError, match=rf"rank-0\.jsonl, line 3: .*({message})"):
        read_row_log(path)


@pytest.mark.parametrize("line", ["", "[]", '{"command": ["mpd-gen"], "inputs": {}}', DEEP])
def test_a_damaged_record_of_finished_steps_is_named(tmp_path, line):
    from mpd_rounds.run.runner import Finished

    (tmp_path / "finished.jsonl").write_text(f"{line}\n")
    with pytest.raises(
        DataError, match=r"finished\.jsonl, line 1: (not|expected) .*Remove the line"
    ):
        Finished(tmp_path)


def test_a_prompt_that_is_longer_than_a_name_is_no_input_file(tmp_path):
    from mpd_data.config import RolloutsConfig
    from mpd_rounds.run.runner import Finished
    from mpd_rounds.run.steps import Step

    config = RolloutsConfig(
        model="m", prompts=["p.jsonl"], out=tmp_path, system_prompt="think " * 60
    )
    command = ["rollouts", "--system-prompt", config.system_prompt, "--out", str(tmp_path)]
    step = Step("base: evaluate", "why", "mpd-gen", command, tmp_path, config)
    assert not Finished(tmp_path).holds(step)
    record = {"command": ["mpd-gen", *command], "inputs": {}, "exit_code": 0}
    (tmp_path / "finished.jsonl").write_text(json.dumps(record) + "\n")
    assert Finished(tmp_path).holds(step)
