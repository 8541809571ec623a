"""Compiled layers: the same losses, and few compilations for packs of any length."""

import json

import pytest
from conftest import (
    STUDENT,
    TEACHER,
    command,
    environment,
    finish,
    metrics,
    python,
    run,
    train_config,
)

from mpd_train.loop import train

# In a process of its own: what other tests' engines do to torch.compile stays out of the count.
COMPILED = """
import json, sys
from torch._dynamo.utils import counters
from mpd_train.config import TrainConfig
from mpd_train.loop import train
train(TrainConfig.model_validate_json(sys.argv[1]))
print(json.dumps([counters["stats"]["unique_graphs"], list(counters["graph_break"])]))
"""


def config(round_dir, out, **changed):
    return train_config(round_dir, STUDENT, out, optimizer={"learning_rate": 5e-4}, **changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, graphs",
    [
        ({"validation": {"validation_fraction": 0.2, "eval_steps": 4}}, 2),
        ({"gradient_checkpointing": True}, 1),
        ({"lora": {"lora_r": 4}, "teacher": str(TEACHER)}, 3),
    ],
    ids=["validation", "gradient checkpointing", "adapters and a teacher"],
)
def test_compiled_layers_give_the_same_losses(round_dir, tmp_path, settings, graphs):
    """One graph for all layers and lengths, whole, that is with nothing left to Python in between;
    one more for what runs without gradients, and for a layer whose input has none (the first above
    frozen embeddings)."""
    train(config(round_dir, tmp_path / "plain", **settings))
    asked = config(round_dir, tmp_path / "compiled", compile=True, **settings)
    done = python(COMPILED, asked.model_dump_json())
    plain, compiled = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    assert len(compiled) == len(plain)
    for mine, other in zip(compiled, plain, strict=True):
        for name in ("loss", "validation_loss", "grad_norm"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=1e-4), name
    assert len({r["tokens"] for r in compiled if "tokens" in r}) > 4
    assert json.loads(done.stdout.splitlines()[-1]) == [graphs, []]


@pytest.mark.slow
def test_a_run_goes_on_without_it(round_dir, tmp_path):
    """It is no part of what a run is: a machine without a compiler takes it over."""
    arguments = ["--shards", round_dir, "--student", STUDENT, "--out", tmp_path / "run"]
    bare = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused = finish(command("mpd-train", *arguments, "--compile"), 1, environment() | bare)
    assert "error: --compile: " in refused.stderr
    assert "Run the same command without it" in refused.stderr
    assert "Traceback" not in refused.stderr
    run("mpd-train", *arguments)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
