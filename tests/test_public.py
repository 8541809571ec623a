"""The public names: they exist, are documented, and are all that a package shows."""

import ast
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from conftest import STUDENT, TEACHER, TEMPLATE

import mpd_data
import mpd_train
import mpd_train.kl
from mpd_data import (
    ConfigError,
    EngineConfig,
    PartsConfig,
    RewriteConfig,
    RewriteSamplingConfig,
    RolloutsConfig,
    SamplingConfig,
    compare,
    round_stats,
    run_rewrite,
    run_rollouts,
    scan_round,
)
from mpd_train import TrainConfig, train

PACKAGES = [mpd_data, mpd_train, mpd_train.kl]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_exported_members(package):
    values = {name: getattr(package, name) for name in package.__all__}
    assert list(values) == sorted(values)
    for name, value in values.items():
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
        assert value.__module__.startswith(package.__name__), name
    everything = {}
    exec(f"from {package.__name__} import *", everything)  # noqa: S102
    assert everything.keys() - {"__builtins__"} == values.keys()
    # What is neither private nor a module is public.
    leaked = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert leaked <= values.keys()
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = package.missing


@pytest.mark.parametrize("package", PACKAGES[:2], ids=lambda package: package.__name__)
def test_type_checkers_see_the_names_that_exist(package):
    source = ast.parse(Path(inspect.getfile(package)).read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
        if alias.name != "__version__"
    }
    assert sorted(typed) == package.__all__ == dir(package)
    for name, module in typed.items():
        assert getattr(import_module(module), name) is getattr(package, name)


def test_from_prompts_to_a_trained_student_in_python(prompts, tmp_path):
    engine = EngineConfig(backend="transformers", dtype="float32")

    def sample(model, out):
        outcome = run_rollouts(
            RolloutsConfig(
                model=str(model),
                prompts=[str(prompts)],
                out=out,
                id_column="id",
                answer_column="answer",
                num_prompts=6,
                sampling=SamplingConfig(max_tokens=300),
                engine=engine,
            )
        )
        assert outcome.total == outcome.written == 6

    before, after = tmp_path / "before", tmp_path / "after"
    sample(STUDENT, before)
    outcome = run_rewrite(
        RewriteConfig(
            teacher=str(TEACHER),
            shards=before,
            template=str(TEMPLATE),
            score_context="rewrite",
            sampling=RewriteSamplingConfig(max_tokens=200),
            engine=engine,
        )
    )
    kept = scan_round(before, "distill").filter(pl.col("status") == "ok").collect()
    assert kept.height == outcome.statuses["ok"] > 0
    model = train(
        TrainConfig(shards=[before], student=str(STUDENT), out=tmp_path / "run", pack_length=600)
    )
    sample(model, after)
    assert compare(str(before), str(after))["new"]["problems"] == 6
    assert round_stats([str(before), after])["rollouts"][0]["folder"] == str(before)
    with pytest.raises(ConfigError, match="no errors here"):
        scan_round(before, "errors")


def test_only_the_commands_start_other_processes(tmp_path):
    workers, ray = ({"parts": PartsConfig(**part)} for part in ({"workers": 2}, {"ray": True}))
    with pytest.raises(ConfigError, match=r"--workers: .* Run `mpd-gen rollouts`"):
        run_rollouts(RolloutsConfig(model="m", prompts=["p"], out=tmp_path / "out", **workers))
    with pytest.raises(ConfigError, match=r"--ray: .* Run `mpd-gen rewrite`"):
        run_rewrite(RewriteConfig(teacher="t", shards=tmp_path, **ray))
    assert not list(tmp_path.iterdir())
