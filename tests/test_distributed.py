"""Several processes under torchrun: what a step is made of does not depend on how many do it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    STUDENT,
    TEACHER,
    command,
    environment,
    finish,
    invoke,
    metrics,
    metrics_lines,
    row_log,
    run,
    saved_weights,
    slow,
    tied_student,
    weights,
)
from safetensors.torch import load_file, save_file

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.store.locks import is_held
from mpd_train import checkpoint
from mpd_train.distributed import ranks
from mpd_train.export_cli import cli as export


def settings(round_dir, out, **changed):
    """Five packs a step: among two or four processes some have one less, and go on without loss."""
    arguments = {
        "--shards": round_dir, "--student": STUDENT, "--out": out, "--pack-length": 600,
        "--gradient-accumulation-steps": 5, "--save-steps": 2, "--dtype": "float32",
        "--learning-rate": 5e-4, "--epochs": 2,
    }  # fmt: skip
    return {**arguments, **changed}


def words(arguments):
    return [str(x) for pair in arguments.items() for x in pair]


def torchrun(size, arguments, program=("-m", "mpd_train.cli"), fresh=False):
    among = ("--standalone", "--nproc-per-node", size)
    return command("torch.distributed.run", *among, *program, *words(arguments), fresh=fresh)


def with_ranks(size, arguments, code=0, *switches, **told):
    return finish([*torchrun(size, arguments), *switches], code, environment() | told).stderr


def alone(arguments):
    run("mpd-train", *words(arguments))


def killed_after(steps, size, arguments, out):
    """Several processes that train, killed after so many steps of theirs."""
    launch = torchrun(size, arguments, fresh=True)
    process = subprocess.Popen(launch, env=environment(), stderr=subprocess.DEVNULL)
    while len(metrics_lines(out)) < steps:
        assert process.poll() is None
        time.sleep(0.01)
    # torchrun gives each a session of its own, and they would go on without it.
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    for pid in (process.pid, *(int(pid) for file in children for pid in file.read_text().split())):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while is_held(out / ".lock"):
        time.sleep(0.01)


def assert_same(found, expected, student=STUDENT):
    """The same curve to rounding, and the same weights."""
    ours, theirs = metrics(found), metrics(expected)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "kl", "student_entropy", "agreement", "validation_loss"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name
        assert mine.get("loss_tokens") == other.get("loss_tokens")
        assert mine.get("tokens") == other.get("tokens")
    ours, theirs = row_log(found), row_log(expected)
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    kl = [one[2] for one in theirs]
    assert [one[2] for one in ours] == pytest.approx(kl, rel=2e-3, abs=2e-5)
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    start = load_file(student / "model.safetensors")
    for name, weight in b.items():
        moved = (weight.float() - start[name].float()).norm()
        assert (a[name].float() - weight.float()).norm() <= 0.02 * moved + 1e-6, name


def alone_and_together(round_dir, folder, more, student=STUDENT):
    """Train the same with one process and with two."""
    alone(settings(round_dir, folder / "one", **more))
    with_ranks(2, settings(round_dir, folder / "two", **more))
    assert_same(folder / "two", folder / "one", student)


@pytest.fixture(scope="module")
def one(round_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    alone(settings(round_dir, out))
    return out


@pytest.mark.parametrize("size", [2, slow(4)])
def test_several_processes_do_what_one_does(one, round_dir, tmp_path, size):
    said = with_ranks(size, settings(round_dir, tmp_path / "run"))
    assert f"on {size} x cpu" in said
    assert said.count("filled), ") == 1
    assert_same(tmp_path / "run", one)


@pytest.mark.slow
def test_the_mean_is_over_the_weights_of_all_processes(both_dir, tmp_path):
    alone_and_together(
        both_dir, tmp_path, {"--targets": "masked", "--leak-nats": 0.005, "--max-steps": 2}
    )
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["given_away"] == pytest.approx(other["given_away"])
        assert 0.005 < mine["given_away"] < 0.9


@pytest.mark.slow
def test_a_crash_while_python_ends_does_not_fail_a_finished_training(round_dir, tmp_path):
    """Threads of torch's that outlive the training can abort a process that is being taken down;
    the abort here comes at the same time."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, os\nfrom mpd_train.cli import main\natexit.register(os.abort)\nmain()\n"
    )
    out = tmp_path / "run"
    launch = torchrun(2, settings(round_dir, out, **{"--max-steps": 1}), [str(program)])
    assert finish(launch).stderr.count("wrote ") == 2
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_killed_and_resumed_with_another_number_of_processes(one, round_dir, tmp_path):
    """No example twice and none missed: the steps are those of an undisturbed run."""
    out = tmp_path / "run"
    arguments = settings(round_dir, out)
    total = len(metrics_lines(one))
    for size, after in ((2, 3), (4, 7)):
        killed_after(after, size, arguments, out)
        assert after <= len(metrics_lines(out)) < total
    alone(arguments)
    assert_same(out, one)


@pytest.mark.slow
def test_what_two_processes_saved_is_exported(one, round_dir, tmp_path):
    out = tmp_path / "run"
    killed_after(3, 2, settings(round_dir, out), out)
    saved = checkpoint.checkpoints(out / "checkpoints")[-1]
    run("mpd-export", out, "--out", tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model" / "model.safetensors")
    expected = saved_weights(saved)
    assert found.keys() == expected.keys() == load_file(STUDENT / "model.safetensors").keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    # Each wrote half of every weight: without either of them there is none that is whole.
    files = sorted(saved.glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        aside = file.rename(file.with_suffix(".aside"))
        with pytest.raises(DataError, match="deletes all but its newest two"):
            invoke(export, out, "--out", tmp_path / "half")
        aside.rename(file)
    assert not (tmp_path / "half").exists()
    alone(settings(round_dir, out))
    assert_same(out, one)


@pytest.mark.slow
def test_adapters_a_teacher_and_validation(round_dir, tmp_path):
    """Frozen weights among trained ones, a second sharded model, early stopping's best weights."""
    more = {
        "--lora-r": 4, "--teacher": TEACHER, "--validation-fraction": 0.25, "--eval-steps": 2,
        "--early-stopping-patience": 8, "--epochs": 1,
    }  # fmt: skip
    alone_and_together(round_dir, tmp_path, more)
    a, b = (load_file(tmp_path / x / "adapter/adapter_model.safetensors") for x in ("one", "two"))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert torch.allclose(b[name], weight, atol=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"--lora-r": 4}])
def test_a_student_that_is_an_adapter(round_dir, tmp_path, more):
    """Merged, and trained further."""
    first = {"--lora-r": 4, "--max-steps": 3, "--learning-rate": 3e-3}
    alone(settings(round_dir, tmp_path / "first", **first))
    more = {**more, "--student": tmp_path / "first" / "adapter", "--epochs": 1}
    alone_and_together(round_dir, tmp_path, more)
    assert (tmp_path / "two" / "adapter").exists() == ("--lora-r" in more)


def test_a_teacher_is_taken_to_the_cpu_when_told(round_dir, tmp_path):
    arguments = words(settings(round_dir, tmp_path / "run"))
    said = run("mpd-train", *arguments, "--teacher-offload", code=1).stderr
    assert "--teacher-offload: give --teacher too" in said


@pytest.mark.slow
@pytest.mark.parametrize("tied, size", [(False, 2), (True, 1)])
def test_a_teacher_in_the_cpus_memory_teaches_the_same(round_dir, tmp_path, tied, size):
    """That its weights lie there shows on a GPU alone."""
    teacher = tied_student(tmp_path / "tied", "float32") if tied else TEACHER
    more = {"--teacher": teacher, "--epochs": 1}
    alone(settings(round_dir, tmp_path / "here", **more))
    arguments = settings(round_dir, tmp_path / "there", **more)
    if size == 1:
        run("mpd-train", *words(arguments), "--teacher-offload")
    else:
        with_ranks(size, arguments, 0, "--teacher-offload")
    assert_same(tmp_path / "there", tmp_path / "here")


@pytest.mark.slow
def test_the_shipped_job_script_trains_with_a_process_for_each_gpu(round_dir, tmp_path):
    """As SLURM runs it on one node: bash, with its environment."""
    arguments = settings(round_dir, tmp_path / "run", **{"--epochs": 1})
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "PATH": path}
    script = ROOT / "mpd_data" / "init" / "slurm" / "mpd-train.sbatch"
    done = finish(["bash", script, *words(arguments)], env=environment() | slurm)
    assert "on 2 x cpu" in done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_tied_head_is_trained_from_both_its_ends(round_dir, tmp_path):
    tied = tied_student(tmp_path / "tied", "float32")
    more = {"--student": tied, "--epochs": 1}
    alone_and_together(round_dir, tmp_path, more, tied)


def made(family, folder, **changed):
    """A small model of another family, with the pocket student's tokenizer and random weights."""
    shutil.copytree(STUDENT, folder)
    vocab_size = transformers.AutoConfig.from_pretrained(STUDENT).vocab_size
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **changed,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family, changed", [("Granite", {"logits_scaling": 4.0}), ("Phi", {})])
def test_a_scaled_head_and_one_with_a_bias_are_sharded(round_dir, tmp_path, family, changed):
    """The first process alone reads weights; all need what it learns from them."""
    student = made(family, tmp_path / "student", **changed)
    more = {"--student": student, "--epochs": 1, "--learning-rate": 3e-3}
    alone_and_together(round_dir, tmp_path, more, student)


def test_an_output_bias_beside_a_tied_head_is_refused_in_parts(round_dir, tmp_path):
    teacher = made("Phi", tmp_path / "teacher", tie_word_embeddings=True)
    arguments = settings(round_dir, tmp_path / "run", **{"--teacher": teacher})
    stderr = run("mpd-train", *words(arguments), "--teacher-offload", code=1).stderr
    assert re.search("output bias, .* one process and without --teacher-offload", stderr)


def test_one_process_can_fail_and_begin_again():
    """A process group that an error left open would be in the way of the next training."""
    for _ in range(2):
        with pytest.raises(ConfigError, match="failed"), ranks(sharded=True):
            raise ConfigError("failed")


@pytest.mark.slow
def test_compiled_layers_are_sharded(one, round_dir, tmp_path):
    """With recomputation too, in all the order that FSDP asks for."""
    arguments = settings(round_dir, tmp_path / "run")
    switches = ["--compile", "--gradient-checkpointing"]
    said = with_ranks(2, arguments, 0, *switches, TORCH_LOGS="graph_breaks,recompiles")
    assert "Graph break" not in said
    # Once for each process, after the first pass; never for another length.
    assert said.count("Recompiling") <= 2
    assert_same(tmp_path / "run", one)


def test_a_model_that_cannot_be_loaded_is_said_once(round_dir, tmp_path):
    """The first process reads it; the others do not wait for ever."""
    broken = shutil.copytree(STUDENT, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = with_ranks(2, settings(round_dir, tmp_path / "run", **{"--student": broken}), code=1)
    assert said.count("error: " + str(broken) + ": its logits are not finite") == 1
    assert said.count("error: the first process could not load a model; its error says why") == 1


def test_too_few_packs_for_the_processes_are_refused(round_dir, tmp_path):
    arguments = settings(round_dir, tmp_path / "run", **{"--gradient-accumulation-steps": 1})
    assert "Give 2 or a multiple" in with_ranks(2, arguments, code=1)
