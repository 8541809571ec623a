"""What the commands load, and how settings become options and back."""

import json
import re
import shlex
import subprocess

import pytest
from click.testing import CliRunner
from conftest import (
    ROOT,
    STUDENT,
    command,
    finish,
    invoke,
    python,
    rewrite_arguments,
    rollout_arguments,
    run,
    write_jsonl,
)

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError
from mpd_data.common.models import resolve_model
from mpd_data.common.options import _fields, arguments, parse
from mpd_data.common.text import format_table
from mpd_data.config import RewriteConfig, RolloutsConfig
from mpd_rounds.cli import cli as rounds_cli
from mpd_rounds.study.cli import cli as study_cli
from mpd_train.cli import cli as train_cli
from mpd_train.config import TrainConfig
from mpd_train.export_cli import cli as export_cli

HEAVY = {"torch", "vllm", "transformers", "ray"}


def modules_after(code):
    """Heavy modules that a fresh interpreter has loaded after `code`."""
    probe = f"{code}\nimport sys; print(*sorted(sys.modules))"
    return HEAVY & set(python(probe).stdout.splitlines()[-1].split())


def running(module, words):
    """Return code that runs a command, which succeeds."""
    call = f"try: cli.main({words!r})\nexcept SystemExit as e: assert not e.code"
    return f"from {module} import cli\n{call}"


@pytest.mark.parametrize(
    "module, arguments_",
    [
        ("mpd_data.cli", ["--help"]),
        ("mpd_data.cli", ["rollouts", "--help"]),
        ("mpd_data.cli", ["rewrite", "--help"]),
        ("mpd_data.cli", ["init", "--help"]),
        ("mpd_data.cli", ["contamination", "--help"]),
        ("mpd_train.cli", ["--help"]),
        ("mpd_train.export_cli", ["--help"]),
        ("mpd_rounds.cli", ["--help"]),
        ("mpd_rounds.report.cli", ["--help"]),
    ],
)
def test_help_loads_nothing_heavy(module, arguments_):
    assert modules_after(running(module, arguments_)) == set()


@pytest.mark.parametrize("name", ["stats", "validate", "contamination"])
def test_inspection_loads_nothing_heavy(round_dir, prompts, name):
    words = [name, str(round_dir)]
    if name == "contamination":
        words = [name, "--prompts", str(prompts), "--against", str(prompts)]
    assert modules_after(running("mpd_data.cli", words)) == set()


@pytest.mark.slow
def test_import_weights():
    assert modules_after("import mpd_train") == set()
    assert modules_after("import mpd_train.kl") == {"torch"}
    assert "vllm" not in modules_after("import mpd_train.loop")


@pytest.mark.parametrize(
    "model, command, required",
    [
        (RolloutsConfig, cli.commands["rollouts"], {"model": "m", "prompts": ["p"], "out": "o"}),
        (RewriteConfig, cli.commands["rewrite"], {"teacher": "t", "shards": "s"}),
        (TrainConfig, train_cli, {"shards": ["s"], "student": "m", "out": "o"}),
    ],
)
def test_settings_survive_the_way_to_the_command_line_and_back(model, command, required):
    """Every setting is an option, and `arguments` writes what the command reads."""
    from mpd_data.common.options import build

    config = model(**required)
    changed = {}
    for section, name, _, default, _ in _fields(model):
        value = {
            bool: not default, int: 7, float: 0.25, str: "x", dict: {"a": 1},
        }.get(type(default))  # fmt: skip
        # vLLM alone takes engine_kwargs.
        if value is None or name in required or name == "backend":
            continue
        choices = next(p.type for p in command.params if p.name == name)
        if getattr(choices, "choices", None):
            value = choices.choices[-1]
        (changed.setdefault(section, {}) if section else changed)[name] = value
    config = model(**{**required, **changed})
    assert len(arguments(config)) > 2 * len(required)
    seen = {}

    def capture(**options):
        options.pop("overwrite")
        seen["config"] = build(model, options)

    original, command.callback = command.callback, capture
    try:
        result = CliRunner().invoke(command, arguments(config))
    finally:
        command.callback = original
    assert result.exit_code == 0, result.output
    assert seen["config"] == config


def test_unknown_settings_get_the_nearest_name():
    values = {"model": "m", "prompts": ["p"], "out": "o"}
    with pytest.raises(ConfigError, match=r"sampling.temprature: unknown.*'sampling.temperature'"):
        parse(RolloutsConfig, values | {"sampling": {"temprature": 1}}, "x.toml")
    with pytest.raises(ConfigError, match="num_samples: .*found 'four'"):
        parse(RolloutsConfig, values | {"num_samples": "four"}, "x.toml")


def test_unknown_values_in_a_toml_get_the_nearest_name():
    values = {"shards": ["s"], "student": "m", "out": "o"}
    with pytest.raises(ConfigError, match=r"found 'foward_kl'\. Did you mean 'forward_kl'\?"):
        parse(TrainConfig, values | {"loss": {"divergence": "foward_kl"}}, "x.toml")
    with pytest.raises(ConfigError, match=r"report_to.0: .*Did you mean 'tensorboard'\?"):
        parse(TrainConfig, values | {"report_to": ["tensorbord"]}, "x.toml")


def test_a_section_keeps_its_own_defaults():
    """Rewriting is greedy by default, also where a TOML sets something else of its sampling."""
    config = parse(RewriteConfig, {"teacher": "t", "shards": "s", "sampling": {"top_p": 0.9}}, "x")
    assert config.sampling.temperature == 0
    assert RewriteConfig(teacher="t", shards="s").sampling.temperature == 0
    assert RolloutsConfig(model="m", prompts=["p"], out="o").sampling.temperature == 1


def test_tables_show_hostile_text_and_obey_none_of_it():
    table = format_table([{"name": "\x1b[31mred\x1b[0m [bold]x[/bold]\n", "n": 1234}])
    assert "\x1b" not in table
    assert "\\x1b[31mred" in table
    assert "[bold]x[/bold]" in table
    assert "1,234" in table


@pytest.mark.parametrize("missing", ["torch", "transformers", "huggingface_hub"])
def test_a_missing_extra_is_a_message(tmp_path, missing):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"problem": "a"}])
    arguments_ = [
        "rollouts",
        "--model",
        "some/model",
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "x"),
    ]
    arguments_ += ["--max-tokens", "20"]
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {arguments_!r}\n"
        "from mpd_data.cli import main; main()"
    )
    if missing != "huggingface_hub":
        code = code.replace("some/model", str(STUDENT))
    done = python(code, code=1)
    assert "is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_printed():
    assert "version" in run("mpd-gen", "--version").stdout


def test_env_names_versions_and_machine_and_loads_no_engine():
    found = json.loads(run("mpd-gen", "env", "--json").stdout)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found["commit"] == (head.stdout.strip() or "-")
    assert "in bfloat16 (TFLOP/s" in found["products"]
    assert re.search(r", \d+ cores, \d+ of them idle$", found["cpu"])
    assert found["torch"].startswith("2.")
    assert found["python"].startswith("3.")
    assert "polars" in run("mpd-gen", "env").stdout
    assert modules_after(running("mpd_data.cli", ["env"])) == {"torch"}


@pytest.mark.parametrize("program", ["mpd-train", "mpd-rounds"])
def test_json_without_a_dry_run_is_refused(tmp_path, program):
    (tmp_path / "p.toml").write_text("")
    arguments_ = {
        "mpd-train": ["--shards", tmp_path, "--student", STUDENT, "--out", tmp_path / "o"],
        "mpd-rounds": [tmp_path / "p.toml", "--out", tmp_path / "o"],
    }[program]
    said = run(program, "--json", *arguments_, code=2).stderr
    assert "--json goes with --dry-run" in said


def test_a_mistyped_name_gets_the_nearest_one():
    assert "'rollouts'" in run("mpd-gen", "rolouts", code=2).stderr
    assert "--model" in run("mpd-gen", "rollouts", "--modle", "x", code=2).stderr


def test_options_of_other_trainers_are_known(tmp_path):
    """By their names there, or with the reason why they are not."""
    ours = {"--shards": tmp_path, "--student": "m", "--out": tmp_path / "o", "--epochs": "0.5"}
    theirs = {
        "--shards": tmp_path,
        "--model-name-or-path": "m",
        "--output_dir": tmp_path / "o",
        "--num_train_epochs": "0.5",
    }
    said = [
        CliRunner().invoke(train_cli, [str(word) for pair in words.items() for word in pair])
        for words in (ours, theirs)
    ]
    assert str(said[0].exception) == str(said[1].exception)
    assert "m: not a folder here" in str(said[0].exception)
    for epochs in ("inf", "nan", "0"):
        given = [str(word) for pair in (ours | {"--epochs": epochs}).items() for word in pair]
        assert "--epochs" in CliRunner().invoke(train_cli, given).output
    refused = CliRunner().invoke(train_cli, ["--per_device_train_batch_size", "4"])
    assert refused.exit_code == 2
    assert "--pack-length" in refused.output


@pytest.mark.parametrize(
    "arguments_, near",
    [
        (["--divergence", "foward_kl"], "'forward_kl'"),
        (["--report-to", "tensorbord"], "'tensorboard'"),
    ],
)
def test_a_mistyped_choice_gets_the_nearest_one(arguments_, near):
    required = ["--shards", "s", "--student", "m", "--out", "o"]
    result = CliRunner().invoke(train_cli, [*required, *arguments_])
    assert result.exit_code == 2
    assert f"Did you mean {near}?" in result.output
    far = CliRunner().invoke(train_cli, [*required, arguments_[0], "zzz"])
    assert "is not one of" in far.output
    assert "Did you mean" not in far.output


@pytest.mark.parametrize(
    "kind, name, old",
    [
        ("round", "run.json", {"stages": {}, "schema_version": 2}),
        ("training", "run.json", {"identity": {}, "details": {}}),
        ("pipeline", "pipeline.json", {"rounds": 1}),
        ("study", "settings.json", {"seeds": [0], "group": []}),
    ],
)
def test_each_command_refuses_a_folder_of_another_kind(kind, name, old, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    recipe = ROOT / "pipelines" / "pocket"
    dry, anew = ["--dry-run"], ["--overwrite"]
    training = ["--shards", out, "--out", out, "--student", STUDENT]
    commands = [
        ("round", cli, rollout_arguments(recipe / "x.jsonl", out), [[], dry, anew, dry + anew]),
        ("round", cli, rewrite_arguments(out), [[], dry, anew, dry + anew, ["--refilter"]]),
        ("round", cli, ["view", out, "--out", tmp_path / "page"], [[]]),
        ("round", cli, ["stats", out], [[]]),
        ("round", cli, ["validate", out], [[]]),
        ("training", train_cli, training, [[], dry, anew, dry + anew]),
        ("training", export_cli, [out, "--out", tmp_path / "exported"], [[]]),
        ("pipeline", rounds_cli, [recipe / "pipeline.toml", "--out", out], [[], dry]),
        ("study", study_cli, [recipe / "study.toml", "--out", out], [[], dry]),
    ]
    for record in (old, {"kind": kind}):  # as written before folders knew their kind, and now
        (out / name).write_text(json.dumps(record))
        for reader, program, words, variants in commands:
            for more in variants if reader != kind else ():
                with pytest.raises(ConfigError, match="the folder of a .*, not of a"):
                    invoke(program, *words, *more)
        assert [path.name for path in out.iterdir()] == [name]
        assert json.loads((out / name).read_text()) == record


def parsed(*words):
    """The settings that `mpd-train` reads from a command line."""
    seen = {}
    original, train_cli.callback = train_cli.callback, lambda **options: seen.update(options)
    try:
        result = CliRunner().invoke(train_cli, [*map(str, words)])
    finally:
        train_cli.callback = original
    assert result.exit_code == 0, result.output
    return seen


def test_list_options_take_several_values_repetition_and_patterns(tmp_path):
    rounds = [tmp_path / f"round{number}" for number in (1, 2, 3)]
    for folder in rounds:
        folder.mkdir()
    rest = ["--student", "m", "--out", "--odd"]  # a value may look like an option
    for words in ([*rounds], [tmp_path / "round*"], [rounds[0], "--shards", *rounds[1:]]):
        options = parsed("--shards", *words, *rest, "--report_to", "wandb", "trackio")
        assert options["shards"] == tuple(rounds)
        assert (options["out"].name, options["report_to"]) == ("--odd", ("wandb", "trackio"))
    odd = tmp_path / "round[1]"
    odd.mkdir()
    assert parsed("--shards", odd, *rest)["shards"] == (odd,)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shards", "nowhere/*"], "no file or folder matches 'nowhere/*'"),
        (["--shards", "s"], "Missing option '--student'"),
        (["--lr", "1"], "--learning-rate"),
        (["--steps", "1"], "--max-steps"),
        (["--report-to", "wandb,trackio"], "by spaces: --report-to wandb trackio"),
        (["--shards=s", "--student=m", "--out=o", "--lora-target-modules", "q,v"], "q_proj"),
    ],
)
def test_a_wrong_command_line_is_told_the_right_one(words, message):
    result = CliRunner().invoke(train_cli, words)
    assert result.exit_code == 2
    assert message in result.output


def test_a_command_that_is_gone_names_what_replaced_it():
    said = CliRunner().invoke(cli, ["plan", "p.toml"])
    assert said.exit_code == 2
    assert "mpd-rounds PIPELINE --dry-run" in said.output


def test_help_has_sections_the_common_options_first():
    text = CliRunner().invoke(cli, ["rollouts", "--help"], terminal_width=200).output
    titles = [line for line in text.splitlines() if re.fullmatch(r"\w[\w ]*:", line)]
    assert titles[:3] == ["Options:", "Prompts and answers:", "Sampling:"]
    first = text.partition("Prompts and answers:")[0]
    assert all(name in first for name in ("--model", "--prompts", "--out", "-n,", "--dry-run"))
    assert "--temperature" not in first
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "Example:\n    mpd-gen rollouts --model" in text


def test_a_pipe_that_closes_early_is_no_error(round_dir):
    words = shlex.join(command("mpd-gen", "stats", round_dir))
    done = finish(["bash", "-c", f"{words} | head -n 1"])
    assert (done.stdout, done.stderr) == ("rollouts\n", "")


def test_a_round_is_found_from_its_folders(round_dir):
    outputs = [
        CliRunner().invoke(cli, ["status", str(round_dir / name)]).stdout
        for name in ("", "rollouts", "distill")
    ]
    assert outputs[0].startswith(f"{round_dir}\nstage")
    assert {text.splitlines()[0] for text in outputs} == {str(round_dir)}
    with pytest.raises(ConfigError, match=f"not a round. The rounds in it: {round_dir}"):
        invoke(cli, "stats", round_dir.parent)


def test_a_mistyped_model_gets_the_folder_next_to_it(tmp_path):
    (tmp_path / "student").mkdir()
    with pytest.raises(ConfigError) as raised:
        resolve_model(str(tmp_path / "studnt"))
    assert str(raised.value).endswith(f"Did you mean '{tmp_path / 'student'}'?")
