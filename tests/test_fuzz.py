"""Damaged input of every kind: an error that names the file, never a traceback, a lost or doubled
row, or a hang.

The number of cases is MPD_FUZZ_CASES (scripts/fuzz.sh: 10,000, other ones each time). Without it a
few hundred run, the same ones each time. The commands run in this process by their real entry.
"""

import contextlib
import faulthandler
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, STUDENT, TEACHER, TEMPLATE
from corruption import damage, damage_round, reindex
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from mpd_data.common.command import run_command
from mpd_data.common.errors import MPDError

RECORDED = ROOT / "tests" / "data" / "recorded"
SOUND = RECORDED / "round"
_CASES = int(os.environ.get("MPD_FUZZ_CASES", "300"))
# A case takes a second or two, on a busy machine more.
_SECONDS = 300
# What a run may leave behind when it is refused: locks, reports, what is set aside or half-written.
_EPHEMERAL = {".lock", ".writers", ".status", ".staging", ".quarantine"}

ENGINE = ("--backend", "transformers", "--dtype", "float32", "--max-tokens", 200)
COLUMNS = ("--id-column", "id", "--answer-column", "answer")
SAMPLING = (*ENGINE, "--model", STUDENT, "--prompts", RECORDED / "prompts.jsonl", *COLUMNS, "-n", 2)
REWRITING = (*ENGINE, "--teacher", TEACHER, "--template", TEMPLATE, "--score-context", "rewrite")
REWRITING += ("--num-logprobs", 8)
TRAINING = ("--student", STUDENT, "--dtype", "float32", "--pack-length", 300, "--epochs", 4)
TRAINING += ("--save-steps", 3, "--lora-r", 1, "--lora-target-modules", "q_proj")
TRAINING += ("--learning-rate", 0.01, "--device", "cpu")


class Hang(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def watched():
    """Raise Hang after `_SECONDS`; where Python does not get to that, end the process."""

    def end(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(_SECONDS)
    faulthandler.dump_traceback_later(3 * _SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def fuzz(share):
    """Run a function of `draw` and an empty folder on its `share` of all cases."""

    def decorate(case):
        @settings(
            max_examples=max(1, round(share * _CASES)),
            derandomize="MPD_FUZZ_CASES" not in os.environ,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def test(data):
            with tempfile.TemporaryDirectory() as folder, watched():
                case(data.draw, Path(folder))

        test.__name__, test.__doc__ = case.__name__, case.__doc__
        return test

    return decorate


@pytest.fixture(scope="module", autouse=True)
def offline():
    """A damaged name may be that of a model of the hub. What loads slowly is loaded here: half a
    module would stay behind where the watchdog ends an import."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # noqa: F401

    import mpd_rounds.run.plan  # noqa: F401
    import mpd_train.loop  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


# -- running ----------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def command_of(program):
    if program == "mpd-gen":
        from mpd_data.cli import cli
    elif program == "mpd-train":
        from mpd_train.cli import cli
    elif program == "mpd-export":
        from mpd_train.export_cli import cli
    elif program == "mpd-report":
        from mpd_rounds.report.cli import cli
    else:
        from mpd_rounds.cli import cli
    return cli


def call(program, *arguments, names=()):
    """Run a command as its entry does. Fail where it ends otherwise than by success or by a message
    that names one of `names`; an exception that users would see as a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    words = [program, *map(str, arguments)]
    note(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.chdir(ROOT)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run_command(command_of(program))
        except SystemExit as end:
            ended = Ended(end.code, out.getvalue(), err.getvalue())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    note(f"exit {ended.code}\n{ended.out[-2000:]}\n{ended.err[-2000:]}")
    assert ended.code in (0, 1, 2, 3), "an exit code without a meaning here"
    if ended.code in (1, 2):
        said = ended.out + ended.err
        # A dry run says in its notes why a step would be refused.
        assert "rror: " in said or "\n* " in said or "reasons" in said, "an error without a message"
        if names:
            known = ["Find it with mpd-gen validate", *map(str, names)]
            assert any(name in said for name in known), f"the message names none of {known}"
    return ended


def files_of(folder, without=_EPHEMERAL):
    """Return the content of everything in a folder, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if without & set(relative.parts):
            continue
        if path.is_symlink():
            found[str(relative)] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def strict_json(text):
    """Read what a command printed with --json."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def readable_rows(folder, stage):
    """Return the rows in a stage's shards, by their footers."""
    return sum(
        pq.ParquetFile(path).metadata.num_rows for path in (folder / stage).glob("part-*.parquet")
    )


def rows_of(folder, stage):
    """The key of each row, and what it is of, as far as its shard has the columns."""
    place = {"rollouts": ("prompt_id", "sample_idx"), "distill": ("rollout_id", "candidate_idx")}
    rows = []
    for path in sorted((folder / stage).glob("part-*.parquet")):
        names = pq.read_schema(path).names
        columns = [name for name in ("row_id", *place[stage]) if name in names]
        rows += pq.read_table(path, columns=columns, partitioning=None).to_pylist()
    return [(row["row_id"], tuple(map(row.get, place[stage]))) for row in rows]


def content_of(folder, stage):
    frames = [pl.read_parquet(path) for path in sorted((folder / stage).glob("part-*.parquet"))]
    return pl.concat(frames).sort("row_id")


# -- rounds -----------------------------------------------------------------------------------

INSPECTIONS = ("stats", "stats --json", "stats --by", "validate", "compare", "status", "view")


@fuzz(0.4)
def test_a_damaged_round_is_inspected(draw, folder):
    round_ = folder / "round"
    shutil.copytree(SOUND, round_)
    command = draw(st.sampled_from(INSPECTIONS))
    if command == "stats --by":
        for path in (round_ / "rollouts").iterdir():
            table = pq.read_table(path, partitioning=None)
            at, column = table.schema.get_field_index("metadata"), ['{"family":"add"}'] * len(table)
            field = table.schema.field(at)
            pq.write_table(table.set_column(at, field, pa.array(column)), path)
        reindex(round_, "rollouts")
    if draw(st.integers(0, 9)) == 0:
        (round_ / ".status").mkdir()
        (round_ / ".status" / "rollouts-0-of-1.json").write_text(json.dumps(STATUS))
        report = round_ / ".status" / "rollouts-0-of-1.json"
        done, names = damage(draw, report, round_ / "run.json"), [report.name]
        command = "status"
    else:
        done, names = damage_round(draw, round_)
    note(done)
    before = files_of(round_, set())
    arguments = {
        "stats": [round_],
        "stats --json": [round_, "--json"],
        "stats --by": [round_, "--by", "family"],
        "validate": [round_],
        "compare": draw(st.permutations([round_, SOUND])),
        "status": [round_, *draw(st.sampled_from([[], ["--json"]]))],
        "view": [round_, "--evaluations", round_, SOUND, "--out", folder / "traces.html"],
    }[command]
    ended = call("mpd-gen", command.split()[0], *arguments, names=[*names, round_])
    assert files_of(round_, set()) == before, "it only reads"
    if ended.code:
        return
    if command == "stats --json":
        tables = strict_json(ended.out)
        found = sum(row["samples"] for row in tables.get("rollouts", []))
        assert found == readable_rows(round_, "rollouts")
        found = sum(row["rows"] for row in tables.get("rewrites", []))
        assert found == readable_rows(round_, "distill")
    elif command == "validate":
        for stage in ("rollouts", "distill"):
            if (round_ / stage).is_dir():
                assert content_of(round_, stage).equals(content_of(SOUND, stage))
    elif command == "status" and "--json" in arguments:
        strict_json(ended.out)


STATUS = {
    "state": "running", "host": "node1", "pid": 17, "started": 1790000000.0,
    "updated": 1790000060.0, "rows": 3, "total": 6, "failed": 0, "tokens": 292,
    "tokens_per_second": 73.0, "recent_tokens_per_second": 70.0, "in_flight": 3,
    "truncated": 0, "seconds_left": 4.0,
}  # fmt: skip


@fuzz(0.1)
def test_a_damaged_round_is_planned(draw, folder):
    round_ = folder / "round"
    shutil.copytree(SOUND, round_)
    done, names = damage_round(draw, round_)
    note(done)
    before = files_of(round_, set())
    words = draw(st.sampled_from([
        ("mpd-gen", "rollouts", *SAMPLING, "--out", round_),
        ("mpd-gen", "rewrite", *REWRITING, "--shards", round_),
        ("mpd-gen", "rewrite", *REWRITING, "--shards", round_, "--refilter", "--max-ratio", 0.5),
        ("mpd-train", *TRAINING, "--shards", round_, "--out", folder / "run"),
    ]))  # fmt: skip
    ended = call(*words, "--dry-run", "--json", names=[*names, round_])
    assert files_of(round_, set()) == before, "it only reads"
    if not ended.code:
        strict_json(ended.out)


@fuzz(0.1)
def test_a_damaged_round_is_trained_on(draw, folder):
    """What the trainer reads: each kept row once, or an error."""
    from mpd_train.data.batches import load_pack
    from mpd_train.data.packing import make_packs
    from mpd_train.data.shard_set import ShardSet

    round_ = folder / "round"
    shutil.copytree(SOUND, round_)
    done, names = damage_round(draw, round_)
    note(done)
    try:
        shards = ShardSet([round_])
        shards.identity()
        packs = make_packs(shards, 600, 0, 0)
        assert sum(len(pack.rows) for pack in packs) == shards.num_rows
        for pack in packs:
            load_pack(shards, pack)
    except MPDError as error:
        assert any(str(name) in str(error) for name in [*names, round_])


@fuzz(0.06)
def test_a_stage_goes_on_after_damage(draw, folder):
    """Finished rows are there once each, or the stage is refused and leaves all as it was."""
    stage = draw(st.sampled_from(["rollouts", "distill"]))
    round_ = folder / "round"
    shutil.copytree(SOUND, round_)
    done, names = damage_round(draw, round_)
    note(done)
    before = files_of(round_)
    words = {
        "rollouts": ("rollouts", *SAMPLING, "--out", round_),
        "distill": ("rewrite", *REWRITING, "--shards", round_),
    }[stage]
    ended = call("mpd-gen", *words, names=[*names, round_, "prompts.jsonl"])
    after = files_of(round_)
    if ended.code in (0, 3):
        keys, places = map(list, zip(*rows_of(round_, stage), strict=True))
        assert len(keys) == len(set(keys)), "a row twice"
        # A row whose key was overwritten still says what it is of.
        lost = [p for key, p in rows_of(SOUND, stage) if key not in keys and p not in places]
        assert not lost, "a row lost"
    else:
        for name, digest in before.items():
            if name.endswith(".parquet") and name not in after:
                quarantined = files_of(round_ / ".quarantine", set()).values()
                assert digest in quarantined, f"{name} is gone"


# -- prompts and settings ---------------------------------------------------------------------


def write_prompts(draw, folder):
    """Write the recorded prompts in one of the formats."""
    rows = [json.loads(line) for line in (RECORDED / "prompts.jsonl").read_text().splitlines()]
    rows += [{**row, "id": f"{row['id']}x", "problem": row["problem"] + " ?"} for row in rows]
    kind = draw(st.sampled_from(["jsonl", "jsonl", "csv", "parquet", "json"]))
    path = folder / f"prompts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        pl.DataFrame(rows).select("id", "problem", "answer").write_csv(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@fuzz(0.14)
def test_damaged_prompts_are_read(draw, folder):
    path = write_prompts(draw, folder)
    note(damage(draw, path, draw(st.sampled_from([TEMPLATE, *SOUND.glob("*/*.parquet")]))))
    out = folder / "out"
    planning = ("rollouts", *ENGINE, "--model", STUDENT, "--out", out, "--dry-run")
    words = draw(st.sampled_from([
        ("contamination", "--prompts", path, "--against", RECORDED / "prompts.jsonl", "--n", 5),
        ("contamination", "--prompts", RECORDED / "prompts.jsonl", "--against", path, "--json"),
        ("init", out, "--prompts", path, "--student", STUDENT, "--teacher", TEACHER),
        (*planning, "--prompts", path, *COLUMNS),
        (*planning, "--prompts", path, "--answer-column", "answer", "--metadata-columns", "id",
         "--duplicates", "first"),
        (*planning, "--prompts", RECORDED / "prompts.jsonl", "--examples", path,
         "--examples-column", "answer"),
    ]))  # fmt: skip
    ended = call("mpd-gen", *words, names=[path.name])
    if ended.code and words[0] == "init":
        assert not out.exists() or not any(out.iterdir())


@fuzz(0.05)
def test_a_damaged_template_is_read(draw, folder):
    path = shutil.copy(draw(st.sampled_from([TEMPLATE, *TEMPLATES])), folder / "template.toml")
    note(damage(draw, Path(path), RECORDED / "prompts.jsonl"))
    words = ("rewrite", *REWRITING, "--template", path, "--shards", SOUND, "--overwrite")
    call("mpd-gen", *words, "--dry-run", names=["template"])


TEMPLATES = sorted((ROOT / "mpd_data" / "prompts" / "templates").glob("*.toml"))


@fuzz(0.07)
def test_a_damaged_pipeline_is_read(draw, folder):
    path = folder / "pipeline.toml"
    text = (ROOT / "pipelines" / "pocket" / "pipeline.toml").read_text()
    for split in ("train", "test", "ood"):
        text = text.replace(f"data/pocket/{split}.jsonl", str(RECORDED / "prompts.jsonl"))
    for size in ("320", "500", "250"):
        text = text.replace(f"num_prompts = {size}", "num_prompts = 3")
    path.write_text(text)
    note(damage(draw, path, RECORDED / "prompts.jsonl"))
    call("mpd-rounds", path, "--out", folder / "out", "--dry-run")
    assert not (folder / "out").exists()


# -- models and trainings ---------------------------------------------------------------------

MODEL_FILES = sorted(path.name for path in STUDENT.iterdir() if path.is_file())


@fuzz(0.04)
def test_a_damaged_model_is_refused_or_runs(draw, folder):
    model = folder / "model"
    shutil.copytree(STUDENT, model)
    name = draw(st.sampled_from(MODEL_FILES))
    note(damage(draw, model / name, model / draw(st.sampled_from(MODEL_FILES))))
    prompts, out = RECORDED / "prompts.jsonl", folder / "out"
    words = draw(st.sampled_from([
        ("mpd-gen", "rollouts", *SAMPLING, "--model", model, "--out", out, "--dry-run"),
        ("mpd-gen", "rollouts", *SAMPLING, "--model", model, "--out", out, "--limit", 1),
        ("mpd-gen", "init", out, "--prompts", prompts, "--student", model, "--teacher", TEACHER),
        ("mpd-train", *TRAINING, "--student", model, "--shards", SOUND, "--out", out, "--dry-run"),
    ]))  # fmt: skip
    call(*words, names=[model, "model"])


@fuzz(0.04)
def test_a_damaged_training_goes_on(draw, folder):
    """It ends with each step once, or it is refused."""
    out = folder / "training"
    shutil.copytree(RECORDED / "training", out)
    checkpoint = out / "checkpoints" / "step-000003"
    tensors = next(checkpoint.glob("*.safetensors"))
    found = out / "rows" / "rank-0.jsonl"
    found.parent.mkdir()
    lines = [{"step": 1 + i % 4, "row": f"{i:016x}", "kl": i / 7} for i in range(9)]
    found.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [out / "run.json", out / "metrics.jsonl", checkpoint / "state.json", tensors, found]
    victim = draw(st.sampled_from(files))
    done = damage(draw, victim, draw(st.sampled_from(files)))
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(["step-last", "step-000009", "best-x"]))
        done += f", {name} more"
        (out / "checkpoints" / name).mkdir()
    note(done)
    words = draw(st.sampled_from([
        ("mpd-train", *TRAINING, "--shards", SOUND, "--out", out, "--dry-run"),
        ("mpd-train", *TRAINING, "--shards", SOUND, "--out", out),
        ("mpd-export", out, "--out", folder / "model", "--student", STUDENT),
        ("mpd-report", out, "--out", folder / "report"),
        ("mpd-gen", "status", out),
        ("mpd-gen", "view", SOUND, "--training", out, "--out", folder / "traces.html"),
    ]))  # fmt: skip
    ended = call(*words, names=["training", "step-"])
    if words[0] == "mpd-train" and "--dry-run" not in words and not ended.code:
        steps, expected = (
            [json.loads(line)["step"] for line in path.read_text().splitlines()]
            for path in (out / "metrics.jsonl", RECORDED / "curve.jsonl")
        )
        assert len(steps) == len(set(steps)), "a step twice"
        assert steps[-1] == expected[-1], "a step is missing at the end"
