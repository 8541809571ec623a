"""What `mpd-gen init` detects: prompt columns, gold answers, both models' limits, token budget."""

import dataclasses
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpd_data.checkers.builtin import ChoiceChecker, MathChecker, NumberChecker
from mpd_data.common.errors import ConfigError, did_you_mean, pip_install
from mpd_data.common.hashing import content_key
from mpd_data.common.machine import gpus
from mpd_data.common.models import (
    ModelFiles,
    load_tokenizer,
    require_same_tokenizer,
    resolve_model,
    tokenizer_hash,
)
from mpd_data.common.text import plain
from mpd_data.config import InitConfig, SamplingConfig
from mpd_data.prompts.chat import ChatFormatter, PromptError, thinking_switch
from mpd_data.prompts.reader import Prompt, as_json, fill_prompt, load_prompts, same
from mpd_data.prompts.sources import columns_of, read_rows
from mpd_data.prompts.template import load_template

# Usual column names, the most specific first. Two columns from one group are ambiguous.
_PROBLEMS = (("problem", "question"), ("prompt", "instruction", "query"), ("text",))
_ANSWERS = (
    ("answer", "expected_answer", "final_answer", "gold", "gold_answer"),
    ("solution", "target", "label"),
)
# Any id will do: each is a group of its own, so the first that exists is used.
_IDS = (("id",), ("problem_id",), ("question_id",), ("unique_id",), ("uid",), ("uuid",), ("idx",))

_HELD_OUT_SHARE, _HELD_OUT_LEAST, _HELD_OUT_MOST = 0.05, 20, 500

_BOXED = "{{problem}}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
# How many prompts, those with the most bytes, are tokenised to find the longest.
_MEASURED = 1000
# Ratio of draft to rewrite in the teacher's context: 27,000 and 10,000 tokens with Qwen3.
_DRAFT, _REWRITE = 27, 10
_GPU_CONTEXT, _CPU_CONTEXT = 40_960, 2_048
_LEAST_TOKENS = 32
_SMALL = 1_000_000_000


# -- prompts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one source, and the columns they were read from. `num_repeated`: rows that repeat
    an id; `rejected_ids`: an id column whose values do not tell rows apart."""

    source: str
    problem: str
    answer: str | None
    id: str | None
    prompts: list[Prompt]
    num_repeated: int
    rejected_ids: str | None

    def golds(self) -> list[str]:
        return [p.answer for p in self.prompts if p.answer is not None]


def read_prompt_set(source: str, config: InitConfig, train: PromptSet | None) -> PromptSet:
    """Return the prompts of `source`. Test prompts use the columns of `train` if they have them.

    Raises ConfigError if the columns are ambiguous or missing, DataError for a bad row.
    """
    columns = columns_of(source)

    def choose(option: str, given: str | None, before: str | None, usual: Any) -> str | None:
        if train is not None:
            given = before if before in columns else None
        if given is not None:
            if given not in columns:
                raise ConfigError(
                    f"{source}: no column {given!r}; found {_names(columns)}."
                    f"{did_you_mean(given, columns)} Name one of them with {option}."
                )
            return given
        for names in usual:
            matching = [c for c in columns if c.lower() in names]
            if len(matching) > 1:
                raise ConfigError(
                    f"{source}: {_names(matching)} could each be meant, of the columns"
                    f" {_names(columns)}. Name one with {option}."
                )
            if matching:
                return matching[0]
        return None

    problem = choose(
        "--prompt-column", config.prompt_column, train.problem if train else None, _PROBLEMS
    )
    if problem is None:
        raise ConfigError(
            f"{source}: none of the columns {_names(columns)} has a usual name for problems"
            f" ({', '.join(name for names in _PROBLEMS for name in names)}). Name the"
            " column with --prompt-column."
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
                    f" of {_names(columns)}, or none to use the hash of the problem."
                )
            rejected, id_ = id_, None
    prompts = load_prompts([source], problem, id_, answer, duplicates="first")
    return PromptSet(source, problem, answer, id_, prompts, rows - len(prompts), rejected)


def _names(columns: list[str]) -> str:
    return ", ".join(map(repr, columns))


def held_out(texts: list[str]) -> set[str]:
    """Return the problems (as `same` writes them) to hold out for the test: 5% of those in `texts`,
    chosen by hash, at least 20 and at most 500, never more than half.

    Raises ConfigError if there are fewer than two problems.
    """
    distinct = sorted({same(text) for text in texts}, key=content_key)
    count = min(max(round(_HELD_OUT_SHARE * len(distinct)), _HELD_OUT_LEAST), _HELD_OUT_MOST)
    count = min(count, len(distinct) // 2)
    if count == 0:
        raise ConfigError("only one problem, which cannot be split. Name test prompts with --test.")
    return set(distinct[:count])


def split(whole: PromptSet, folder: Path) -> tuple[PromptSet, PromptSet, dict[str, str]]:
    """Split one file. Return its training and test prompts, and the content of both new files by
    name; all columns are kept."""
    try:
        test_problems = held_out([p.text for p in whole.prompts])
    except ConfigError as error:
        raise ConfigError(f"{whole.source}: {error}") from error
    lines: dict[bool, list[str]] = {False: [], True: []}
    for number, row in read_rows(whole.source, None):
        where = f"{whole.source}, row {number}"
        values = {name: as_json(value, f"{where}: column {name!r}") for name, value in row.items()}
        for_test = same(values[whole.problem]) in test_problems
        lines[for_test].append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")

    def side(name: str, for_test: bool) -> PromptSet:
        prompts = [p for p in whole.prompts if (same(p.text) in test_problems) == for_test]
        num_repeated = len(lines[for_test]) - len(prompts)
        source = str(folder / name)
        return dataclasses.replace(whole, source=source, prompts=prompts, num_repeated=num_repeated)

    files = {"train.jsonl": "".join(lines[False]), "test.jsonl": "".join(lines[True])}
    return side("train.jsonl", False), side("test.jsonl", True), files


@dataclass(frozen=True)
class CheckerChoice:
    name: str
    why: str


_MATHS = re.compile(r"[\\^=+*/\d]")


def choose_checker(given: str | None, train: PromptSet, test: PromptSet) -> CheckerChoice:
    golds = train.golds() or test.golds()
    if given is not None:
        return CheckerChoice(given, "Chosen with --checker.")
    if not golds:
        return CheckerChoice("text", "Without gold answers it compares drafts with their rewrites.")
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
    # A few answers in words are usual among mathematics; `math` compares those as text.
    if mathematical < 0.9 * len(answers):
        return CheckerChoice("text", "The gold answers are words, or of several kinds.")
    if importlib.util.find_spec("math_verify") is None:
        return CheckerChoice(
            "text",
            "The gold answers look like mathematics. The checker `math` is better for them; it"
            f" needs math-verify ({pip_install('checkers')}).",
        )
    return CheckerChoice("math", "The gold answers look like mathematics.")


# -- models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Approximate number of weights, and bytes of float32 cache per token, from a model's config.
    None if the config lacks the usual fields."""

    weights: int | None
    cache_bytes: int | None

    @classmethod
    def of(cls, model: ModelFiles) -> "Shape":
        config = model.text_config
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
    """Both models, and the settings chosen for them. `spells_instructions`: whether the tokenizer
    can spell the built-in instructions."""

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
    spells_instructions: bool
    gpus: list[str]


def look_at_models(config: InitConfig) -> Models:
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
            " for a student that thinks. Look at the statuses; if many rewrites are malformed,"
            " write a template of your own."
        )
    else:
        template = "plain"
        why = f"`plain`, for a small teacher ({_billions(shape.weights)} weights, by its config)."
    spells_instructions = _spells(student_tokenizer, _BOXED)
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
        prompt_template=_BOXED if spells_instructions else "{{problem}}",
        spells_instructions=spells_instructions,
        gpus=gpus(),
    )


def _spells(tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return "".join(tokenizer.decode(ids).split()) == "".join(text.split())


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _own_sampling(model: ModelFiles) -> dict[str, Any]:
    """Return the sampling settings of the model's generation_config.json that exist here too."""
    try:
        text = (model.path / "generation_config.json").read_text(encoding="utf-8")
        saved = json.loads(text)
        sampling = {"temperature": float(saved.get("temperature") or 1.0)}
        if saved.get("top_p") is not None:
            sampling["top_p"] = float(saved["top_p"])
        if saved.get("top_k"):
            sampling["top_k"] = int(saved["top_k"])
        SamplingConfig(**sampling)
        if not all(map(math.isfinite, sampling.values())):
            raise ValueError(sampling)
    except (OSError, ValueError, TypeError, AttributeError):
        # Missing, or unusable values.
        return {"temperature": 1.0}
    return sampling


@dataclass(frozen=True)
class Budget:
    """Numbers of tokens. `prompt`: the student's longest prompt; `rewrite_prompt`: the longest
    rewrite prompt without its draft; `student` and `teacher`: the contexts to plan with; `spare`:
    left free in the teacher's, since a draft may have more tokens when its text is tokenised again.
    """

    prompt: int
    rewrite_prompt: int
    student: int
    teacher: int
    spare: int
    draft: int
    rewrite: int
    pack: int


def plan_budget(models: Models, prompts: list[Prompt]) -> Budget:
    """Divide both contexts. Raises ConfigError if the longest prompt leaves no room."""
    asking = load_template(models.template)
    students = ChatFormatter(models.student_tokenizer)
    teachers = ChatFormatter(models.teacher_tokenizer, default_thinking=False)
    prompt, rewrite_prompt, longest = 0, 0, ""
    for candidate in sorted(prompts, key=lambda p: len(p.text.encode()), reverse=True)[:_MEASURED]:
        try:
            _, ids = students.render(fill_prompt(models.prompt_template, candidate.text))
            _, rewriting = teachers.render(asking.message(candidate.text, ""))
        except PromptError:
            continue  # its stage will record it as an error row, with the reason
        if len(rewriting) > rewrite_prompt:
            longest = candidate.source
        prompt, rewrite_prompt = max(prompt, len(ids)), max(rewrite_prompt, len(rewriting))
    if not rewrite_prompt:
        raise ConfigError(
            f"{prompts[0].source}: the chat template can lay out none of the prompts: they are"
            " empty, or contain control tokens."
        )
    cap = max(_GPU_CONTEXT if models.gpus else _CPU_CONTEXT, 4 * rewrite_prompt)
    student, teacher = min(models.student.context, cap), min(models.teacher.context, cap)
    spare = teacher // 20
    room = teacher - rewrite_prompt - spare
    draft = _round_down(min(student - prompt, room * _DRAFT // (_DRAFT + _REWRITE)))
    rewrite = _round_down(min(room - draft, draft))
    if min(draft, rewrite) < _LEAST_TOKENS:
        raise ConfigError(
            f"{longest}: the longest prompt leaves no room for a draft and its rewrite. The"
            f" student has a context of {student} tokens, of which the prompt takes {prompt}; the"
            f" teacher has {teacher}, of which problem and instructions take {rewrite_prompt}."
            " Remove such prompts, or use models with a longer context."
        )
    pack = -(-(prompt + rewrite + spare) // 256) * 256
    return Budget(prompt, rewrite_prompt, student, teacher, spare, draft, rewrite, pack)


def _round_down(count: int) -> int:
    """Return `count` rounded down to two significant digits; 0 for a negative count."""
    step: int = 10 ** max(len(str(count)) - 2, 0)
    return max(count, 0) // step * step
