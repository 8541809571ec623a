"""`mpd-gen init`: a commented pipeline for one's own models and prompts.

Looks at the prompts (columns, answers, lengths) and at both models (tokenizer, chat template,
context, size), and writes FOLDER/pipeline.toml with a reason beside every setting. Without test
prompts a local file is split first, so that nothing is measured on what was trained on. Nothing
is written unless everything was in order.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpd_data.checkers import ChoiceChecker, MathChecker, NumberChecker, make_checker
from mpd_data.config import InitConfig
from mpd_data.errors import ConfigError, MPDError, nearest
from mpd_data.models import (
    ModelFiles,
    gpus,
    load_tokenizer,
    require_same_tokenizer,
    resolve_model,
    tokenizer_hash,
)
from mpd_data.prompts import (
    ChatFormatter,
    Prompt,
    PromptError,
    as_json,
    fill_prompt,
    load_prompts,
    thinking_switch,
)
from mpd_data.schema import content_key
from mpd_data.sources import HUB, columns_of, hub_splits, read_rows
from mpd_data.table import plain
from mpd_data.template import load_template

# The usual names, the surest first; two columns of one line leave it open which is meant.
_PROBLEMS = (("problem", "question"), ("prompt", "instruction", "query"), ("text",))
_ANSWERS = (
    ("answer", "expected_answer", "final_answer", "gold", "gold_answer"),
    ("solution", "target", "label"),
)
# Ids are as good as each other: one line each, the first that is there is taken.
_IDS = (("id",), ("problem_id",), ("question_id",), ("unique_id",), ("uid",), ("uuid",), ("idx",))

_HELD_OUT_SHARE, _HELD_OUT_LEAST, _HELD_OUT_MOST = 0.05, 20, 500

_BOXED = "{{problem}}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
# Of the prompts with the most characters so many are tokenised to find the longest.
_MEASURED = 200
# Drafts and rewrites share a teacher's context as 27,000 and 10,000 tokens do Qwen3's.
_DRAFT, _REWRITE = 27, 10
_GPU_CONTEXT, _CPU_CONTEXT = 40_960, 4_096
_LEAST_TOKENS = 32
_SMALL = 1_000_000_000


def run_init(folder: Path, config: InitConfig) -> list[str]:
    """Writes FOLDER/pipeline.toml (and train.jsonl and test.jsonl where a file is split).
    Returns what was taken for what, in lines for people.

    Raises ConfigError or DataError for input that no pipeline can be made of; then nothing has
    been written.
    """
    for name in ("pipeline.toml", "train.jsonl", "test.jsonl"):
        if (folder / name).exists():
            raise ConfigError(
                f"{folder / name}: is there already, and nothing is overwritten. Choose another"
                " folder, or remove it."
            )
    if config.test is None and config.prompts.startswith(HUB):
        raise ConfigError(f"{config.prompts}: {_test_needed(config.prompts)}")
    if config.checker is not None:
        make_checker(config.checker)
    train = _read(config.prompts, config, None)
    files: dict[str, str] = {}
    if config.test is None:
        train, test, files = _split(train, folder)
    else:
        test = _read(config.test, config, train)
    models = _look_at_models(config)
    checker = _choose_checker(config.checker, train, test)
    budget = _plan_budget(models, [*train.prompts, *test.prompts])
    pipeline = _Pipeline(folder, config, train, test, models, checker, budget)
    files["pipeline.toml"] = pipeline.toml()
    _write(folder, files)
    return pipeline.notes()


# -- prompts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one source, and the columns they were read from. `doubled`: rows that repeat an
    id; `rejected_ids`: a column of that name was there, but its values do not tell rows apart."""

    source: str
    problem: str
    answer: str | None
    id: str | None
    prompts: list[Prompt]
    doubled: int
    rejected_ids: str | None

    def golds(self) -> list[str]:
        return [p.answer for p in self.prompts if p.answer is not None]


def _test_needed(url: str) -> str:
    said = "a dataset of the hub is not split here: name held-out prompts with --test"
    try:
        splits = hub_splits(url)
    except ConfigError as error:
        return f"{said} ({error})."
    return f"{said}, such as another of its splits ({', '.join(splits)})."


def _read(source: str, config: InitConfig, train: PromptSet | None) -> PromptSet:
    """The prompts of `source`. Test prompts take the columns of `train` where they have them.
    Raises ConfigError where the columns cannot be told, DataError for a bad row."""
    columns = columns_of(source)

    def choose(option: str, given: str | None, before: str | None, usual: Any) -> str | None:
        if train is not None:
            given = before if before in columns else None
        if given is not None:
            if given not in columns:
                close = nearest(given, columns)
                hint = "" if close is None else f" (did you mean {close!r}?)"
                raise ConfigError(
                    f"{source}: no column {given!r}{hint}; found {_names(columns)}. Name one of"
                    f" them with {option}."
                )
            return given
        for names in usual:
            found = [c for c in columns if c.lower() in names]
            if len(found) > 1:
                raise ConfigError(
                    f"{source}: {_names(found)} could each be meant, of the columns"
                    f" {_names(columns)}. Name one with {option}."
                )
            if found:
                return found[0]
        return None

    problem = choose(
        "--prompt-column", config.prompt_column, train.problem if train else None, _PROBLEMS
    )
    if problem is None:
        raise ConfigError(
            f"{source}: none of the columns {_names(columns)} has a usual name of problems"
            f" ({', '.join(name for names in _PROBLEMS for name in names)}). Name the one that"
            " holds them with --prompt-column."
        )
    answer = choose(
        "--answer-column", config.answer_column, train.answer if train else None, _ANSWERS
    )
    named_id = None if train is not None else config.id_column
    id_ = choose("--id-column", named_id, train.id if train else None, _IDS)
    rejected = None
    rows = 0
    texts: dict[Any, Any] = {}
    for _, row in read_rows(source, [c for c in (problem, id_) if c]):
        rows += 1
        if id_ is None:
            continue
        value, text = row[id_], row[problem]
        unfit = not isinstance(value, str | int) or isinstance(value, bool)
        if unfit or texts.setdefault(str(value), text) != text:
            if named_id is not None:
                raise ConfigError(
                    f"{source}: column {id_!r} is no id: {plain(value)!r} is given to different"
                    f" problems, or is neither text nor a whole number. Name another --id-column"
                    f" of {_names(columns)}, or none: then the hash of the problem is the id."
                )
            rejected, id_ = id_, None
    prompts = load_prompts([source], problem, id_, answer, duplicates="first")
    return PromptSet(source, problem, answer, id_, prompts, rows - len(prompts), rejected)


def _names(columns: list[str]) -> str:
    return ", ".join(map(repr, columns))


def _same(text: str) -> str:
    """Problems that differ in spacing and case only are one problem."""
    return " ".join(text.split()).casefold()


def held_out(texts: list[str]) -> set[str]:
    """The problems (as `_same` writes them) that are kept for the test: 5% of those in `texts`,
    chosen by hash, at least 20 and at most 500, never more than half. Raises ConfigError where
    there are not two."""
    distinct = sorted({_same(text) for text in texts}, key=content_key)
    count = min(max(round(_HELD_OUT_SHARE * len(distinct)), _HELD_OUT_LEAST), _HELD_OUT_MOST)
    count = min(count, len(distinct) // 2)
    if count == 0:
        raise ConfigError("only one problem: it cannot be split. Name test prompts with --test.")
    return set(distinct[:count])


def _split(whole: PromptSet, folder: Path) -> tuple[PromptSet, PromptSet, dict[str, str]]:
    """The training and the test prompts of one file, and the files' content, all columns kept."""
    try:
        kept_back = held_out([p.text for p in whole.prompts])
    except ConfigError as error:
        raise ConfigError(f"{whole.source}: {error}") from error
    lines: dict[bool, list[str]] = {False: [], True: []}
    for number, row in read_rows(whole.source, None):
        where = f"{whole.source}, row {number}"
        values = {name: as_json(value, f"{where}: column {name!r}") for name, value in row.items()}
        for_test = _same(values[whole.problem]) in kept_back
        lines[for_test].append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")

    def side(name: str, for_test: bool) -> PromptSet:
        prompts = [p for p in whole.prompts if (_same(p.text) in kept_back) == for_test]
        doubled = len(lines[for_test]) - len(prompts)
        source = str(folder / name)
        return dataclasses.replace(whole, source=source, prompts=prompts, doubled=doubled)

    files = {"train.jsonl": "".join(lines[False]), "test.jsonl": "".join(lines[True])}
    return side("train.jsonl", False), side("test.jsonl", True), files


@dataclass(frozen=True)
class CheckerChoice:
    name: str
    why: str


_MATHS = re.compile(r"[\\^=+*/\d]")


def _choose_checker(given: str | None, train: PromptSet, test: PromptSet) -> CheckerChoice:
    golds = train.golds() or test.golds()
    if given is not None:
        return CheckerChoice(given, "As asked for with --checker.")
    if not golds:
        return CheckerChoice("text", "Without gold answers: compares drafts with their rewrites.")
    # Cells may hold whole solutions; the answer marked in them counts.
    number, maths, choice = NumberChecker(), MathChecker(), ChoiceChecker()
    if all(number.read_bare(number.gold(gold).strip()) is not None for gold in golds):
        return CheckerChoice("number", "All gold answers are plain numbers.")
    if all(choice.read_bare(choice.gold(gold).strip()) is not None for gold in golds):
        return CheckerChoice("choice", "All gold answers are single letters from A to J.")
    answers = [maths.gold(gold).strip() for gold in golds]
    mathematical = sum(
        _MATHS.search(a) is not None and ("\\" in a or maths.read_bare(a) is not None)
        for a in answers
    )
    # Sets of mathematics hold a few answers in words; `math` compares those as they are spelt.
    if mathematical < 0.9 * len(answers):
        return CheckerChoice("text", "The gold answers are words, or of several kinds.")
    if importlib.util.find_spec("math_verify") is None:
        return CheckerChoice(
            "text",
            "The gold answers look like mathematics, for which `math` is better: it needs"
            " math-verify (pip install 'mixed-policy-distillation[checkers]').",
        )
    return CheckerChoice("math", "The gold answers look like mathematics.")


# -- models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a model's configuration: how many weights it has, about, and the bytes of cache that one
    token takes in float32. None where the configuration does not have the usual fields."""

    weights: int | None
    cache_bytes: int | None

    @classmethod
    def of(cls, model: ModelFiles) -> "Shape":
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        try:
            width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
            heads = int(config["num_attention_heads"])
            groups = int(config.get("num_key_value_heads") or heads)
            head = int(config.get("head_dim") or width // heads)
            experts = config.get("num_experts") or config.get("num_local_experts")
            inner = int(config.get("moe_intermediate_size") or config["intermediate_size"])
        except (KeyError, TypeError, ValueError):
            return cls(None, None)
        attention = 2 * width * head * (heads + groups)
        forward = 3 * width * inner * int(experts or 1)
        embeddings = model.vocab_size * width * (1 if config.get("tie_word_embeddings") else 2)
        cache = 2 * layers * groups * head * 4
        return cls(embeddings + layers * (attention + forward), cache)


@dataclass(frozen=True)
class Models:
    """Both models, and what was chosen for them. `spelt`: the tokenizer can spell the built-in
    instructions."""

    student: ModelFiles
    teacher: ModelFiles
    student_shape: Shape
    teacher_shape: Shape
    student_tokenizer: Any
    teacher_tokenizer: Any
    student_switch: str | None
    teacher_switch: str | None
    student_sampling: dict[str, Any]
    template: str
    why_template: str
    prompt_template: str
    spelt: bool
    gpus: list[str]


def _look_at_models(config: InitConfig) -> Models:
    student = resolve_model(config.student, weights=False)
    teacher = resolve_model(config.teacher, weights=False)
    student_tokenizer, teacher_tokenizer = load_tokenizer(student), load_tokenizer(teacher)
    require_same_tokenizer(
        tokenizer_hash(student_tokenizer), teacher_tokenizer, config.student, config.teacher
    )
    switches, templates = [], []
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        ChatFormatter(tokenizer)  # refuses one without a chat template
        templates.append(tokenizer.get_chat_template())
        switches.append(thinking_switch(templates[-1]))
    thinks = (
        switches[0] is not None
        or "</think>" in templates[0]
        or "</think>" in student_tokenizer.get_vocab()
    )
    shape = Shape.of(teacher)
    size = "of unknown size" if shape.weights is None else f"of about {_billions(shape.weights)}"
    if shape.weights is None or shape.weights >= _SMALL:
        template, why = "tags", f"`tags`, for a teacher {size} weights."
    elif thinks:
        template = "tags"
        why = (
            f"The teacher is small ({_billions(shape.weights)} weights), but `plain` has no layout"
            " for a student that thinks: look at the statuses, and write a template of your own if"
            " many rewrites are malformed."
        )
    else:
        template = "plain"
        why = f"`plain`, for a small teacher ({_billions(shape.weights)} weights, of the config)."
    spelt = _spells(student_tokenizer, _BOXED)
    return Models(
        student=student,
        teacher=teacher,
        student_shape=Shape.of(student),
        teacher_shape=shape,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        student_switch=switches[0],
        teacher_switch=switches[1],
        student_sampling=_own_sampling(student),
        template=template,
        why_template=why,
        prompt_template=_BOXED if spelt else "{{problem}}",
        spelt=spelt,
        gpus=gpus(),
    )


def _spells(tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return "".join(tokenizer.decode(ids).split()) == "".join(text.split())


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _own_sampling(model: ModelFiles) -> dict[str, Any]:
    """How the model's makers say it is to be sampled, of the settings that we have."""
    try:
        text = (model.path / "generation_config.json").read_text(encoding="utf-8")
        found = json.loads(text)
        taken = {"temperature": float(found.get("temperature") or 1.0)}
        if found.get("top_p") is not None:
            taken["top_p"] = float(found["top_p"])
        if found.get("top_k"):
            taken["top_k"] = int(found["top_k"])
    except (OSError, ValueError, TypeError, AttributeError):
        return {"temperature": 1.0}
    return taken


@dataclass(frozen=True)
class Budget:
    """Tokens. `prompt`: the longest student's prompt; `asked`: the longest rewrite prompt without
    its draft; `spare`: what is left free, since a draft's text may come to more tokens when it is
    tokenised anew; the contexts are those planned with."""

    prompt: int
    asked: int
    student: int
    teacher: int
    spare: int
    draft: int
    rewrite: int
    pack: int


def _plan_budget(models: Models, prompts: list[Prompt]) -> Budget:
    """Divides both contexts. Raises ConfigError where the longest prompt leaves no room."""
    asking = load_template(models.template)
    students = ChatFormatter(models.student_tokenizer)
    teachers = ChatFormatter(models.teacher_tokenizer, default_thinking=False)
    prompt, asked, longest = 0, 0, ""
    for candidate in sorted(prompts, key=lambda p: len(p.text), reverse=True)[:_MEASURED]:
        try:
            _, ids = students.render(fill_prompt(models.prompt_template, candidate.text))
            _, rewriting = teachers.render(asking.message(candidate.text, ""))
        except PromptError:
            continue  # it becomes an error row of its stage, with the reason
        if len(rewriting) > asked:
            longest = candidate.source
        prompt, asked = max(prompt, len(ids)), max(asked, len(rewriting))
    if not asked:
        raise ConfigError(
            f"{prompts[0].source}: neither it nor the other prompts can be laid out by the chat"
            " template (empty, or they spell control tokens)."
        )
    cap = max(_GPU_CONTEXT if models.gpus else _CPU_CONTEXT, 4 * asked)
    student, teacher = min(models.student.context, cap), min(models.teacher.context, cap)
    spare = teacher // 20
    room = teacher - asked - spare
    draft = _round_down(min(student - prompt, room * _DRAFT // (_DRAFT + _REWRITE)))
    rewrite = _round_down(min(room - draft, draft))
    if min(draft, rewrite) < _LEAST_TOKENS:
        raise ConfigError(
            f"{longest}: the longest prompt leaves no room for a draft and its rewrite: the student"
            f" has a context of {student} tokens, {prompt} of them for the prompt; the teacher"
            f" {teacher}, {asked} of them for the problem and the instructions. Take such prompts"
            " out, or models with more context."
        )
    pack = -(-(prompt + rewrite + spare) // 256) * 256
    return Budget(prompt, asked, student, teacher, spare, draft, rewrite, pack)


def _round_down(count: int) -> int:
    """To two digits; to 0 what is below it."""
    step: int = 10 ** max(len(str(count)) - 2, 0)
    return max(count, 0) // step * step


# -- the file -----------------------------------------------------------------------------


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
        trained = {_same(p.text) for p in self.train.prompts}
        return len(trained & {_same(p.text) for p in self.test.prompts})

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
            f"#   mpd-gen plan {plain(pipeline)}    # what it would cost",
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
        why = "0 is greedy. 1.0, or what the student's generation_config.json says."
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
        elif shape.cache_bytes is not None:
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
        main.add(
            "score_context",
            "problem",
            "What the teacher sees when it scores. problem: the student's prompt, the paper's way;"
            " rewrite: its own, with the draft. Try that where a verbose teacher saves nothing.",
        )
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
        loss.add("divergence", "forward_kl", why)
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
    """Writes all files or none; the pipeline comes last. Raises ConfigError, MPDError."""
    try:
        encoded = {name: text.encode("utf-8") for name, text in files.items()}
    except UnicodeEncodeError as error:
        raise ConfigError(
            "a path or column is not UTF-8, and TOML cannot spell it: rename it."
        ) from error
    made = not folder.exists()
    partials = {folder / name: folder / f"{name}.partial" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, partial in partials.items():
            partial.write_bytes(encoded[path.name])
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        if made and folder.is_dir():
            folder.rmdir()
        raise MPDError(f"{folder}: cannot be written: {error.strerror}. Nothing was.") from error
