"""Write FOLDER/pipeline.toml for one's own models and prompts: `mpd-gen init`.

The prompts and both models are looked at (`detect`); the template pipeline.toml.j2 holds the file
and the reason for each setting. Without test prompts a local file is split first, so that no
evaluation uses training prompts.
"""

import contextlib
import importlib.util
import json
import re
import shlex
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mpd_data.checkers.builtin import make_checker
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.files import atomic_file
from mpd_data.common.machine import free_gpu_share, idle_cores, product_speeds
from mpd_data.common.text import plain
from mpd_data.config import InitConfig
from mpd_data.init import detect
from mpd_data.prompts.reader import same
from mpd_data.prompts.sources import HUB, HUB_FILES, hub_splits
from mpd_data.prompts.special import turn_of
from mpd_data.prompts.template import BUILT_IN

_WIDTH = 98  # of a comment, in columns
_SLURM = ("mpd-gen.sbatch", "mpd-train.sbatch")


def run_init(folder: Path, config: InitConfig) -> list[str]:
    """Write FOLDER/pipeline.toml, train.jsonl and test.jsonl where a file is split, rewrite.toml
    where no built-in template fits, and SLURM's job scripts if they are asked for. Return lines
    that say what was detected.

    Raise ConfigError or DataError for input that makes no pipeline; nothing is written then.
    """
    splits = ["train.jsonl", "test.jsonl"] if config.test is None else []
    scripts = _SLURM if config.slurm else ()
    for name in ("pipeline.toml", *splits, *scripts):
        _refuse_existing(folder / name)
    is_split = config.prompts.startswith(HUB) and not config.prompts.startswith(HUB_FILES)
    if config.test is None and is_split:
        raise ConfigError(
            f"{config.prompts}: a dataset of the hub is not split here. Name held-out prompts with"
            f" --test, such as another of its splits ({', '.join(hub_splits(config.prompts))})."
        )
    if config.checker is not None:
        make_checker(config.checker)
    train = detect.read_prompt_set(config.prompts, config, None)
    files: dict[str, str] = {}
    if config.test is None:
        train, test, files = detect.split(train, folder)
    else:
        test = detect.read_prompt_set(config.test, config, train)
    models = detect.look_at_models(config)
    checker, why_checker = detect.choose_checker(config.checker, train, test)
    unreadable = detect.unreadable_answers_of(checker, train, test)
    budget = detect.plan_budget(models, [*train.prompts, *test.prompts])
    template = models.template
    if not models.spells_instructions:
        path = folder / "rewrite.toml"
        _refuse_existing(path)
        template, files[path.name] = str(path), BUILT_IN[template].read_text(encoding="utf-8")
    for name in scripts:
        files[name] = (Path(__file__).parent / "slurm" / name).read_text(encoding="utf-8")
    files["pipeline.toml"] = _render(
        folder, config, models, train=train, test=test, budget=budget,
        checker=checker, why_checker=why_checker, template=template,
    )  # fmt: skip
    _write(folder, files)
    sides = {"training": train, "test": test}
    notes = _notes(sides, models, " ".join([f"{checker}. {why_checker}", *unreadable]), budget)
    return [plain(line) for line in notes]


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ConfigError(
            f"{path}: exists, and is not overwritten. Choose another folder, or remove it."
        )


def _notes(
    sides: dict[str, detect.PromptSet], models: detect.Models, checker: str, budget: detect.Budget
) -> list[str]:
    """Return what was detected, and what to look at, in lines."""
    lines = []
    for name, side in sides.items():
        answers = repr(side.answer)
        if side.answer is None:
            answers = f"none (of {', '.join(side.columns)}; --answer-column names one)"
        ids = "hash of the problem" if side.id is None else repr(side.id)
        lines.append(
            f"{name}: {len(side.prompts):,} prompts from {side.source}; problem {side.problem!r},"
            f" answer {answers}, id {ids}"
        )
        if side.rejected_ids is not None:
            lines.append(
                f"{name}: {side.rejected_ids!r} gives different problems one value, so it is not"
                " used as the id"
            )
        if side.unusable:
            first = side.unusable[0]
            lines.append(
                f"{name}: {len(side.unusable):,} rows cannot be used; the first is {first.source}:"
                f" {first.flaw}"
            )
    if left_out := sides["training"].left_out:
        lines.append(
            f"left out: {', '.join(map(repr, left_out))}, whose values are neither text nor JSON"
        )
    train, test = ({same(prompt.text) for prompt in side.prompts} for side in sides.values())
    if overlap := train & test:
        lines.append(
            f"{len(overlap)} of the test problems are in the training prompts too: accuracy on"
            " them says little. Remove them from one side."
        )
    lines += [
        f"checker: {checker}",
        f"rewrite template: {models.template}. {models.why_template}",
        f"tokens: longest prompt {budget.prompt:,}, drafts up to {budget.draft:,}, rewrites up to"
        f" {budget.rewrite:,}",
        f"machine: {', '.join(models.gpus) or 'no GPU found'}",
    ]
    if models.self_taught and models.template == "tags":
        lines.append(
            'the student is its own teacher: with score_context = "problem" it learns nothing. Set'
            ' "rewrite", with a template whose turn is the trace.'
        )
    if not models.gpus:
        lines.append(
            "without a GPU a round has few prompts and few test problems: enough to see that all"
            " works, too few to judge a model by. Raise both num_prompts for that."
        )
    if not models.spells_instructions:
        lines.append(
            "the tokenizer cannot spell the words of the built-in templates, so rewriting with them"
            f" fails. rewrite.toml is a copy of `{models.template}`, with the format in its"
            " comments: write it anew in words that the models know"
        )
    turns = (turn_of(model.files, model.tokenizer) for model in (models.student, models.teacher))
    lines += dict.fromkeys(turn.note for turn in turns if turn.note is not None)
    return lines


def _render(folder: Path, config: InitConfig, models: detect.Models, **values: Any) -> str:
    """Return the content of pipeline.toml."""
    environment = Environment(
        loader=PackageLoader("mpd_data", "init"),
        undefined=StrictUndefined,
        finalize=_in_comment,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["toml"] = lambda value: Markup(toml_value(value))
    weights = models.teacher.weights
    is_small = weights is not None and weights < 100_000_000
    speeds = {} if models.gpus or is_small else product_speeds()
    pipeline, out = (shlex.quote(str(folder / name)) for name in ("pipeline.toml", "out"))
    text = environment.get_template("pipeline.toml.j2").render(
        folder=folder,
        config=config,
        models=models,
        gpu=bool(models.gpus),
        tiny=is_small,
        vllm=importlib.util.find_spec("vllm") is not None,
        speeds={dtype: f"{speed:.2f}" for dtype, speed in speeds.items()},
        bfloat16=bool(models.gpus) or (bool(speeds) and speeds["bfloat16"] > speeds["float32"]),
        gpu_share=int(100 * free_gpu_share()) / 100,
        threads=1 if is_small else idle_cores(),
        run_command=f"mpd-rounds {pipeline} --out {out}",
        **values,
    )
    return _wrap_comments(text)


def toml_value(value: Any) -> str:
    """Return a setting's value as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON's strings and numbers are also TOML, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _in_comment(value: Any) -> str:
    """Return what a template inserts without the filter `toml`: on one line, without control
    characters, numbers with separators."""
    if isinstance(value, Markup):
        return value
    return f"{value:,}" if isinstance(value, int) else plain(str(value))


def _wrap_comments(text: str) -> str:
    """Return the TOML with each paragraph of comment lines wrapped. Lines after "#   ", tables and
    settings in comments stay as they are."""
    lines = []
    for is_prose, group in groupby(
        text.split("\n"), lambda line: re.match(r"# (?!  |\[|\w+ = )", line) is not None
    ):
        if is_prose:
            prose = " ".join(line[2:] for line in group)
            lines += textwrap.wrap(
                prose, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
            )
        else:
            lines += group
    return "\n".join(lines)


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write all files or none; the pipeline comes last. Raise ConfigError, MPDError."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # The first that is opened is the last to take its name.
            for name in reversed(files):
                file = stack.enter_context(atomic_file(folder / name))
                file.write(files[name])
                file.flush()  # a full disk is noticed before any file has its name
    except UnicodeEncodeError as error:
        line = error.object[: error.start].rpartition("\n")[2] + error.object[error.start :]
        raise ConfigError(
            f"{folder}: TOML cannot spell {plain(line.splitlines()[0])}, which is not UTF-8. Rename"
            " that path or column."
        ) from error
    except OSError as error:
        raise MPDError(f"{folder}: cannot be written: {error.strerror}.") from error
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
