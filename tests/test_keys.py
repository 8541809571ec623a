"""Compact sets of row keys against Python's own; a restart holds no object for each row."""

import json
import random
import shutil
import time
import tracemalloc
from datetime import datetime
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, TEACHER, TEMPLATE, rows, write_jsonl

from mpd_data import rewrite_setup, rollouts
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.config import RewriteConfig, RolloutsConfig
from mpd_data.dryrun.rollouts import plan_rollouts
from mpd_data.inspect.validate import validate_round
from mpd_data.rewrite import run_rewrite
from mpd_data.rollouts import run_rollouts
from mpd_data.store.keys import KeySet, pack, twice
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import SCHEMA_VERSION, SCHEMAS


def some_keys(rng, count):
    """Random keys, and such as are alike at either end or have zero bytes at the end."""
    keys = [f"{rng.getrandbits(128):032x}" for _ in range(count)]
    keys += [f"{i:032x}" for i in range(count)]
    keys += [f"{i << 96:032x}" for i in range(count)]
    return keys


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_it_is_the_set_that_python_makes(seed, count):
    rng = random.Random(seed)
    ours, theirs = some_keys(rng, count), some_keys(rng, count)
    both = ours[::2] + theirs[::3]
    rng.shuffle(both)
    left, right = KeySet(ours), KeySet(both)
    assert left == set(ours)
    assert right == set(both)
    assert len(left) == len(set(ours))
    assert list(left) == sorted(set(ours))
    assert left - right == set(ours) - set(both)
    assert left - set(both) == set(ours) - set(both)
    assert right - left == set(both) - set(ours)
    assert [key in left for key in theirs] == [key in set(ours) for key in theirs]
    packed = pack(pa.array(theirs, pa.string()))
    assert left.holds(packed).tolist() == [key in set(ours) for key in theirs]
    parts = [pack(pa.array(part, pa.string())) for part in (ours, both)]
    assert KeySet.of(parts) == set(ours) | set(both)


@pytest.mark.parametrize("other", ["", "a", "A" * 32, "g" * 32, "0" * 31, "0" * 33, "é" * 16, None])
def test_what_is_no_key_is_in_no_set_and_not_packed(other):
    keys = ["0" * 32, "a" * 32]
    assert other not in KeySet(keys)
    with pytest.raises(ValueError, match="is not a row key"):
        pack(pa.array([*keys, other, keys[0]], pa.string()))


def test_columns_are_packed_whatever_their_pieces():
    keys = some_keys(random.Random(0), 10)
    whole = pa.array(keys)
    expected = pack(whole).tolist()
    for column in (
        pa.chunked_array([whole[:7], whole[7:7], whole[7:]]),
        whole.cast(pa.large_string()),
        whole.dictionary_encode(),
        pa.array(["x", *keys])[1:],
    ):
        assert pack(column).tolist() == expected
    assert [bytes.fromhex(key).rstrip(b"\0") for key in keys] == expected


def test_what_stands_twice_is_found_where_it_stands_again():
    parts = [["a", "b", "a"], [], ["c", "b"], ["d", "a"]]
    packed = [pack(pa.array([32 * key for key in part], pa.string())) for part in parts]
    assert twice(packed) == [(0, 2), (2, 1), (3, 1)]
    assert twice([]) == twice(packed[1:2]) == []


def write_errors(round_dir, shards):
    """Shards of errors with these keys, as light as rows can be."""
    folder = round_dir.folder("errors")
    folder.mkdir(parents=True)
    round_dir.staging.mkdir()
    metadata = {"mpd": json.dumps({"schema_version": SCHEMA_VERSION, "stage": "errors"})}
    for number, keys in enumerate(shards):
        same = [""] * len(keys)
        table = pa.table([keys, same, same, same], schema=SCHEMAS["errors"])
        pq.write_table(
            table.replace_schema_metadata(metadata), folder / f"part-{number:05d}.parquet"
        )


def test_a_doubled_key_is_named_with_its_file(tmp_path):
    round_dir = RoundDir(tmp_path)
    write_errors(round_dir, [["a" * 32, "b" * 32], ["c" * 32, "b" * 32], ["a" * 32]])
    with pytest.raises(DataError, match=f"part-00001.parquet: row {'b' * 32} is in this round"):
        round_dir.keys("errors")
    with round_dir.lock(), pytest.raises(DataError, match="part-00001.parquet: row bbb"):
        round_dir.recover("errors")


def test_other_keys_are_refused_and_not_taken_for_torn(tmp_path):
    round_dir = RoundDir(tmp_path)
    write_errors(round_dir, [["a" * 32], ["mine"]])
    with round_dir.lock(), pytest.raises(DataError, match="part-00001.*'mine' is not a row key"):
        round_dir.recover("errors")
    assert len(round_dir.shard_paths("errors")) == 2


def test_a_restart_holds_no_object_for_each_row(tmp_path):
    """Strings in a set take some 110 bytes a key; numbers here are those of numpy and Python,
    Arrow's own memory is a shard at a time."""
    count, shards = 300_000, 30
    digits = np.random.default_rng(0).bytes(16 * count).hex()
    keys = [digits[i : i + 32] for i in range(0, 32 * count, 32)]
    round_dir = RoundDir(tmp_path)
    write_errors(round_dir, [keys[i::shards] for i in range(shards)])
    with round_dir.lock():
        round_dir.recover("errors")  # indexes them, and imports what it needs
        tracemalloc.start()
        try:
            found = round_dir.recover("errors")
            remaining = len(found - KeySet(keys[:10]))
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert remaining == count - 10
    assert keys[0] in found
    assert held < 20 * count
    assert peak < 64 * count


# -- samples of a prompt, whatever their keys are -------------------------------------------------

# The chat template of the shipped student, which prints a time that no two renderings share.
DATED = """<|im_start|>system
{{ strftime_now("%d%H%M%S%f") | list | join(" ") }}<|im_end|>
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
IN_PROCESS = {"backend": "transformers", "dtype": "float32", "max_num_seqs": 16}


def with_chat_template(folder, model, template):
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def sampling(tmp_path, template, prompts, max_tokens=40):
    return RolloutsConfig(
        model=with_chat_template(tmp_path / "student", STUDENT, template),
        prompts=[str(prompts)], id_column="id", answer_column="answer", num_prompts=4,
        num_samples=2, out=tmp_path / "r", engine=IN_PROCESS, sampling={"max_tokens": max_tokens},
    )  # fmt: skip


def test_a_template_that_prints_the_time_samples_nothing_twice(prompts, tmp_path):
    config = sampling(tmp_path, DATED, prompts)
    run_rollouts(config, limit=3)
    assert plan_rollouts(rollouts.setup(config, weights=False)).committed == 3
    run_rollouts(config)
    frame = rows(config.out)
    assert len(frame) == 8
    assert frame.select("prompt_id", "sample_idx").is_unique().all()
    begun = RoundDir(config.out).saved_stage("rollouts")["begun"]
    printed = " ".join(datetime.fromisoformat(begun).strftime("%d%H%M%S%f"))
    assert set(frame["prompt"].str.split("\n").list[1]) == {f"{printed}<|im_end|>"}
    assert run_rollouts(config).written == 0
    # Started anew, it is another day.
    time.sleep(1.1)
    run_rollouts(config, overwrite=True)
    assert RoundDir(config.out).saved_stage("rollouts")["begun"] > begun


def test_rewrite_prompts_are_of_the_time_when_the_rewriting_began(prompts, tmp_path):
    drafts = sampling(tmp_path, DATED, prompts, max_tokens=250)
    run_rollouts(drafts)
    config = RewriteConfig(
        teacher=with_chat_template(tmp_path / "teacher", TEACHER, DATED), shards=drafts.out,
        template=str(TEMPLATE), score_context="rewrite", engine=IN_PROCESS,
        sampling={"max_tokens": 200},
    )  # fmt: skip
    run_rewrite(config, limit=3)
    run_rewrite(config)
    begun = RoundDir(config.shards).saved_stage("distill")["begun"]
    now = rewrite_setup.setup(config)
    then, planned = now.at(begun), rewrite_setup.setup(config, weights=False)
    asked = [each.ask("1", "2").text for each in (now, then, planned)]
    assert asked[0] != asked[1] == asked[2]
    written = rows(config.shards, "distill").filter(pl.col("teacher_prompt_ids").is_not_null())
    assert len(written) > 3
    by_id = {row["row_id"]: row for row in rows(config.shards).to_dicts()}
    for row in written.to_dicts():
        expected = then.ask_about(by_id[row["rollout_id"]]).teacher_prompt_ids
        assert row["teacher_prompt_ids"] == expected


def test_a_prompt_that_is_laid_out_otherwise_is_refused(prompts, tmp_path):
    """Here the template draws lots; another version of a library does the same for all prompts."""
    lots = "(" + " ~ ' ' ~ ".join(["(range(10, 99) | random)"] * 4) + ")"
    template = DATED.replace('strftime_now("%d%H%M%S%f") | list | join(" ")', lots)
    config = sampling(tmp_path, template, prompts)
    run_rollouts(config, limit=3)
    message = r"sample \d of prompt '.*' was taken with another prompt .*\n  saved .* / now "
    with pytest.raises(ConfigError, match=message):
        run_rollouts(config)
    with pytest.raises(ConfigError, match=message):
        plan_rollouts(rollouts.setup(config, weights=False))
    assert len(rows(config.out)) == 3


def test_prompts_that_changed_are_named(tmp_path):
    """One that has rows is gone, one without rows is new, and the file has another name."""
    path = tmp_path / "p.jsonl"
    lines = [{"id": f"n{i}", "problem": f"{i} + {i}", "answer": str(2 * i)} for i in range(4)]
    write_jsonl(path, lines)
    config = sampling(tmp_path, DATED, path)
    run_rollouts(config, limit=1)
    (done,) = rows(config.out)["prompt_id"]
    gone = [line for line in lines if line["id"] != done]
    changed = [line if line["id"] == done else line | {"answer": "9"} for line in lines]
    cases = [
        ([*gone, lines[0] | {"id": "new"}], f"has rows of the prompt '{done}' \\('{done[1:]} [+]"),
        (changed, "are among them by their ids: others were added or removed, or an answer"),
    ]
    for now, message in cases:
        write_jsonl(path, now)
        said = (
            rf"prompts: the content differs\n[\s\S]*The prompts are those of {path}\. .*{message}"
        )
        for call in (run_rollouts, partial(rollouts.setup, weights=False)):
            with pytest.raises(ConfigError, match=said):
                call(config)
    other = write_jsonl(tmp_path / "other.jsonl", changed)
    moved = config.model_copy(update={"prompts": [str(other)]})
    with pytest.raises(ConfigError, match=f"those of {other}, they were those of {path}"):
        run_rollouts(moved)
    write_jsonl(path, lines)
    run_rollouts(config)
    assert len(rows(config.out)) == 8


@pytest.mark.parametrize(
    "stage, message",
    [("rollouts", "this sample of its prompt"), ("distill", "this candidate of its rollout")],
)
def test_validate_finds_a_row_that_is_there_under_two_keys(round_dir, tmp_path, stage, message):
    other = shutil.copytree(round_dir, tmp_path / "r")
    file = RoundDir(other).shard_paths(stage)[0]
    table = pq.read_table(file)
    again = table.slice(2, 1).to_pylist()[0] | {"row_id": "0" * 32}
    again = pa.Table.from_pylist([again], schema=table.schema)
    pq.write_table(again, file.with_name("part-99999.parquet"))
    problems = [line for line in validate_round(other) if "twice" in line]
    shard = file.with_name("part-99999.parquet")
    assert problems == [f"{shard}, row 0: {message} is in the round twice."]
