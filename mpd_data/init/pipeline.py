"""`mpd-gen init`: a commented pipeline for one's own models and prompts.

Looks at the prompts and at both models (`survey`), and writes FOLDER/pipeline.toml with a reason
beside every setting. Without test prompts a local file is split first, so that nothing is measured
on what was trained on. Nothing is written unless everything was in order.
"""

import contextlib
import importlib.util
import json
import os
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpd_data.checkers.builtin import make_checker
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.files import atomic_file
from mpd_data.common.models import ModelFiles
from mpd_data.common.text import plain
from mpd_data.config import InitConfig
from mpd_data.init.detect import (
    Budget,
    CheckerChoice,
    Models,
    PromptSet,
    Shape,
    choose_checker,
    look_at_models,
    plan_budget,
    read_prompt_set,
    split,
)
from mpd_data.prompts.reader import same
from mpd_data.prompts.sources import HUB, hub_splits


def run_init(folder: Path, config: InitConfig) -> list[str]:
    """Writes FOLDER/pipeline.toml (and train.jsonl and test.jsonl where a file is split).
    Returns what was taken for what, in lines for people.

    Raises ConfigError or DataError for input that no pipeline can be made of; then nothing has
    been written.
    """
    splits = ["train.jsonl", "test.jsonl"] if config.test is None else []
    for name in ("pipeline.toml", *splits):
        if (folder / name).exists():
            raise ConfigError(
                f"{folder / name}: is there already, and nothing is overwritten. Choose another"
                " folder, or remove it."
            )
    if config.test is None and config.prompts.startswith(HUB):
        raise ConfigError(
            f"{config.prompts}: a dataset of the hub is not split here: name held-out prompts with"
            f" --test, such as another of its splits ({', '.join(hub_splits(config.prompts))})."
        )
    if config.checker is not None:
        make_checker(config.checker)
    train = read_prompt_set(config.prompts, config, None)
    files: dict[str, str] = {}
    if config.test is None:
        train, test, files = split(train, folder)
    else:
        test = read_prompt_set(config.test, config, train)
    models = look_at_models(config)
    checker = choose_checker(config.checker, train, test)
    budget = plan_budget(models, [*train.prompts, *test.prompts])
    pipeline = _Pipeline(folder, config, train, test, models, checker, budget)
    files["pipeline.toml"] = pipeline.toml()
    _write(folder, files)
    return pipeline.notes()


@dataclass
class _Section:
    header: str
    settings: list[tuple[str, Any, str]] = field(default_factory=list)

    def add(self, name: str, value: Any, why: str) -> None:
        """A setting, with what it does and when to change it."""
        self.settings.append((name, value, why))


def toml_value(value: Any) -> str:
    """A setting's value as TOML spells it."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON's strings and numbers are TOML's, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    return "\n".join(
        textwrap.wrap(
            plain(text), 98, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
    )


@dataclass(frozen=True)
class _Pipeline:
    """What was found, and the file made of it."""

    folder: Path
    config: InitConfig
    train: PromptSet
    test: PromptSet
    models: Models
    checker: CheckerChoice
    budget: Budget

    @property
    def overlap(self) -> int:
        """Problems that are in the training and in the test prompts."""
        trained = {same(p.text) for p in self.train.prompts}
        return len(trained & {same(p.text) for p in self.test.prompts})

    @property
    def self_taught(self) -> bool:
        """Whether the student is its own teacher: under the student's prompt the two agree."""
        return self.config.student == self.config.teacher

    def notes(self) -> list[str]:
        """What was taken for what, and what to look at."""
        lines = []
        for name, side in (("training", self.train), ("test", self.test)):
            answers = "none" if side.answer is None else repr(side.answer)
            ids = "hash of the problem" if side.id is None else repr(side.id)
            lines.append(
                f"{name}: {len(side.prompts):,} prompts of {side.source}; problem"
                f" {side.problem!r}, answer {answers}, id {ids}"
            )
            if side.rejected_ids is not None:
                lines.append(
                    f"{name}: {side.rejected_ids!r} gives different problems one value, so it is"
                    " not taken for the id"
                )
        if self.overlap:
            lines.append(
                f"{self.overlap} of the test problems are in the training prompts too: accuracy on"
                " them says little. Take them out of one side."
            )
        budget = self.budget
        lines.append(f"checker: {self.checker.name}. {self.checker.why}")
        lines.append(f"rewrite template: {self.models.template}. {self.models.why_template}")
        lines.append(
            f"tokens: longest prompt {budget.prompt:,}, drafts up to {budget.draft:,}, rewrites up"
            f" to {budget.rewrite:,}"
        )
        lines.append(f"machine: {', '.join(self.models.gpus) or 'no GPU found'}")
        if self.self_taught and self.models.template != "plain":
            lines.append(
                'the student is its own teacher: under score_context = "problem" it learns'
                ' nothing; take "rewrite", with a template whose turn is the trace'
            )
        if not self.models.spelt:
            lines.append(
                "the tokenizer cannot spell the built-in instructions: give a prompt_template and a"
                " rewrite template in words that the models know"
            )
        return [plain(line) for line in lines]

    def toml(self) -> str:
        parts = [self._head()]
        for section in self._sections():
            lines = [section.header] if section.header else []
            for name, value, why in section.settings:
                lines += [_comment(why), f"{name} = {toml_value(value)}"]
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def _head(self) -> str:
        pipeline = shlex.quote(str(self.folder / "pipeline.toml"))
        run = f"mpd-rounds {pipeline} --out {shlex.quote(str(self.folder / 'out'))}"
        machine = ", ".join(self.models.gpus) or "a machine without a GPU"
        text = [
            _comment(
                f"{self.config.student} learns from {self.config.teacher}: written by `mpd-gen"
                f" init` for {machine}. Every setting can be changed; `mpd-gen rollouts --help`,"
                " `mpd-gen rewrite --help` and `mpd-train --help` list the others."
            ),
            "#",
            f"#   {plain(run)} --dry-run    # what would run",
            f"#   mpd-rounds {plain(pipeline)} --dry-run    # what it would cost",
            f"#   {plain(run)}    # run it; again to resume",
            "#",
            _comment(
                "Relative paths are taken from the folder in which these commands are typed, the"
                " one that `mpd-gen init` was run in."
            ),
        ]
        return "\n".join(text)

    def _sections(self) -> list[_Section]:
        top = _Section("")
        gpu = bool(self.models.gpus)
        top.add("name", self.folder.resolve().name, "Stands in the summary.")
        top.add("student", self.config.student, "A model folder or hub id; this one is trained.")
        top.add("teacher", self.config.teacher, "Rewrites and scores; shares the tokenizer.")
        why = "Each round samples anew from the newest student, and takes as long as the first."
        top.add("rounds", 3 if gpu else 1, why)
        top.add("seed", 0, "Another seed: other prompts, samples and order of training.")
        sections = [top, *self._environment(), *self._sampling("rollouts", self.train)]
        sections += self._rewrite()
        evaluation = _Section("[[evaluation]]", [("name", "test", _EVALUATION)])
        measured = self._sampling("evaluation.rollouts", self.test)
        return [*sections, *self._train(), evaluation, *measured]

    def _environment(self) -> list[_Section]:
        if self.models.gpus:
            return []
        section = _Section("[environment]")
        weights = self.models.teacher_shape.weights
        small = weights is not None and weights < 100_000_000
        section.add(
            "OMP_NUM_THREADS",
            "1" if small else str(os.cpu_count() or 1),
            "Threads of each command. Models of a few million weights lose more to waiting between"
            " threads than they win; for larger ones all cores that are idle.",
        )
        section.add("TORCH_CPP_LOG_LEVEL", "ERROR", "Keeps torch's warnings out of the progress.")
        return [section]

    def _sampling(self, name: str, side: PromptSet) -> list[_Section]:
        """How the student samples, of the training prompts or of the test prompts."""
        models, budget, gpu = self.models, self.budget, bool(self.models.gpus)
        main = _Section(f"[{name}]")
        main.add("prompts", [side.source], "Files (*.jsonl, *.csv, *.parquet) or hf:// datasets.")
        main.add("prompt_column", side.problem, "Column of the problem's text.")
        if side.id is not None:
            main.add("id_column", side.id, "Unique ids. Without it: the hash of the problem.")
        if side.answer is not None:
            main.add(
                "answer_column",
                side.answer,
                "Gold answers: rewrites must have them, accuracy is counted by them. Remove the"
                " line where this is not what the column holds.",
            )
        if side.doubled:
            why = f"{side.doubled} rows repeat an id: the first of each is kept."
            main.add("duplicates", "first", why)
        count = len(side.prompts)
        if side is self.train:
            chosen = min(count, 2000 if gpu else 16)
            why = f"Prompts of each round, of {count:,}, chosen anew. More: steadier, and longer."
        else:
            chosen = min(count, 500 if gpu else 20)
            why = f"Of {count:,}; the same in every round. Few give wide intervals."
        main.add("num_prompts", chosen, why)
        why = (
            "Drafts of each prompt. More: more to learn from, and longer."
            if side is self.train
            else "Samples of each prompt. More: narrower intervals, and longer."
        )
        main.add("num_samples", 4 if gpu else 2, why)
        why = (
            "The user's message. An answer in \\boxed{} is the surest to be found."
            if models.spelt
            else "The user's message: the problem alone, as the tokenizer spells no instructions."
        )
        main.add("prompt_template", models.prompt_template, why)
        why = (
            f"{self.checker.why} There are number, math, text, choice, reasoning-gym and your own."
        )
        if side.answer is None:
            why += (
                " Without gold answers rewrites only have to keep their draft's answer: wrong"
                " drafts are learned from too, and accuracy cannot be measured."
            )
        main.add("checker", self.checker.name, why)
        if models.student_switch is not None:
            main.add("thinking", "on", "The student's chat template has a switch: it thinks.")
        sampling = _Section(f"[{name}.sampling]")
        why = (
            "0 is greedy. 1.0, or what the student's generation_config.json says. Lower it where"
            " drafts ramble, as small models' do."
        )
        for setting, value in models.student_sampling.items():
            sampling.add(setting, value, _SAMPLING.get(setting, why))
        sampling.add(
            "max_tokens",
            budget.draft,
            f"Longest draft. Student: {budget.prompt:,} (longest prompt) + {budget.draft:,} <="
            f" {budget.student:,}. Teacher: {budget.asked:,} (instructions and longest problem) +"
            f" {budget.draft:,} + {budget.rewrite:,} (rewrite) + {budget.spare:,} (spare) <="
            f" {budget.teacher:,}. Drafts that are cut off are lost: raise it, and lower the"
            " rewrite's, where many are.",
        )
        return [main, sampling, self._engine(name, models.student, models.student_shape)]

    def _engine(self, name: str, model: ModelFiles, shape: Shape) -> _Section:
        gpu, rewriting = bool(self.models.gpus), name == "rewrite"
        section = _Section(f"[{name}.engine]")
        vllm = importlib.util.find_spec("vllm") is not None
        if not vllm:
            why = "vLLM is not installed here; with it take the line out, it is the faster one."
            section.add("backend", "transformers", why)
        section.add(
            "dtype",
            "bfloat16" if gpu else "float32",
            "Precision of the engine."
            + ("" if gpu else " bfloat16 halves the memory and is slower on most CPUs."),
        )
        why = "Sequences at once. Lower it where memory is short."
        section.add("max_num_seqs", 128 if gpu else 64, why)
        context = self.budget.teacher if rewriting else self.budget.student
        if context < model.context:
            why = f"Tokens planned with, of the model's {model.context:,}: its cache holds fewer."
            section.add("max_model_len", context, why)
        if gpu:
            share = 0.8 if rewriting else 0.9
            why = "Share of the GPU's memory for weights and cache."
            why += " The rest is for scoring." if rewriting else " Lower it where others use it."
            if vllm:
                section.add("gpu_memory_utilization", share, why)
            if rewriting:
                held = 2048 * model.vocab_size * 4 / 1e9
                section.add(
                    "max_num_batched_tokens",
                    2048,
                    f"Tokens per step: tokens x vocabulary x 4 bytes = {held:.1f} GB for each copy"
                    " of the logits when scoring, outside vLLM's memory profile. Lower it where"
                    " scoring runs out of memory.",
                )
        elif vllm and shape.cache_bytes is not None:
            needed = 4 * context * shape.cache_bytes / (1 << 30)
            why = f"Cache in GiB: four sequences of {context:,} tokens take {needed:.2f}."
            section.add("kv_cache_gib", max(1.0, float(-(-needed // 1))), why)
        return section

    def _rewrite(self) -> list[_Section]:
        models, budget = self.models, self.budget
        main = _Section("[rewrite]")
        why = f"{models.why_template} There are tags and plain, or the path of your own."
        main.add("template", models.template, why)
        if models.teacher_switch is not None:
            why = "The teacher's chat template has a switch: it rewrites without thinking."
            main.add("thinking", "off", why)
        why = (
            "What the teacher sees when it scores. problem: the student's prompt, the paper's way;"
            " rewrite: its own, with the draft. Try that where a verbose teacher saves nothing,"
            " with a template whose turn is the trace: not tags."
        )
        if self.self_taught:
            why += " A student that is its own teacher learns nothing under problem."
        turn_is_trace = models.template == "plain"
        context = "rewrite" if self.self_taught and turn_is_trace else "problem"
        main.add("score_context", context, why)
        main.add("num_logprobs", 64, "Log-probabilities stored per token. More: larger shards.")
        sampling = _Section("[rewrite.sampling]")
        sampling.add("temperature", 0.0, "0 is greedy. Above it with num_candidates.")
        sampling.add(
            "max_tokens",
            budget.rewrite,
            "Longest rewrite; the sum stands at the draft's max_tokens. Rewrites that are cut off"
            " are not kept.",
        )
        return [main, sampling, self._engine("rewrite", models.teacher, models.teacher_shape)]

    def _train(self) -> list[_Section]:
        budget, gpu = self.budget, bool(self.models.gpus)
        main = _Section("[train]")
        main.add("epochs", 1, "Passes over the kept rewrites.")
        main.add(
            "pack_length",
            budget.pack,
            f"Tokens of one packed sequence: at least {budget.prompt:,} (prompt) +"
            f" {budget.rewrite:,} (rewrite), rounded up. Lower it with the rewrite's max_tokens"
            " where memory runs out.",
        )
        why = "Packs per optimiser step. Higher: steadier, and fewer steps."
        main.add("gradient_accumulation_steps", 4 if gpu else 1, why)
        if gpu:
            why = "Recomputes activations: less memory, more time. Off where memory is plenty."
            main.add("gradient_checkpointing", True, why)
        loss = _Section("[train.loss]")
        why = "forward_kl, reverse_kl, jsd, skew_kl or skew_reverse_kl: worth a try each."
        if self.self_taught:
            why += " Of a student that is its own teacher forward_kl was reported to be unsteady."
        loss.add("divergence", "reverse_kl" if self.self_taught else "forward_kl", why)
        lora, optimizer = _Section("[train.lora]"), _Section("[train.optimizer]")
        if gpu:
            why = "Rank of the adapters, as in the paper; 0 trains all weights."
            lora.add("lora_r", 64, why)
            lora.add("lora_alpha", 128, "Adapters are scaled by alpha / r, as in the paper.")
            why = "As in the paper, for adapters; for all weights about a tenth of it."
            optimizer.add("learning_rate", 1e-4, why)
            return [main, loss, lora, optimizer]
        why = "For all weights. Adapters ([train.lora] lora_r) and tiny models take more: 1e-4."
        optimizer.add("learning_rate", 1e-5, why)
        return [main, loss, optimizer]


_EVALUATION = "Held-out prompts, never trained on; the first set gives the headline figures."
_SAMPLING = {
    "top_p": "Nucleus mass, of the student's generation_config.json.",
    "top_k": "Most probable tokens kept, of the student's generation_config.json.",
}


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write all files or none; the pipeline comes last. Raises ConfigError, MPDError."""
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
        raise ConfigError(
            "a path or column is not UTF-8, and TOML cannot spell it: rename it."
        ) from error
    except OSError as error:
        raise MPDError(f"{folder}: cannot be written: {error.strerror}.") from error
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
