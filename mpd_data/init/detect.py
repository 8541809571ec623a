"""What `mpd-gen init` detects: prompt columns, gold answers, both models' limits, token budget."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpd_data.checkers.builtin import ChoiceChecker, MathChecker, NumberChecker, make_checker
from mpd_data.checkers.gold import read_gold_answers, unreadable_answers
from mpd_data.common.errors import ConfigError, DataError, did_you_mean, pip_install
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
from mpd_data.common.weights import count_weights, require_whole
from mpd_data.config import InitConfig, SamplingConfig
from mpd_data.prompts.chat import ChatFormatter, PromptError
from mpd_data.prompts.reader import fill_prompt, load_prompts, same
from mpd_data.prompts.rows import Prompt, prompt_of
from mpd_data.prompts.sources import columns_of, read_rows
from mpd_data.prompts.special import CLOSE, Spelling
from mpd_data.prompts.template import load_template
from mpd_data.prompts.thinking import thinking_switch
from mpd_data.prompts.values import as_json

# Usual column names, the most specific first. Two columns from one group are ambiguous.
_PROBLEMS = (
    ("problem", "question"), ("prompt", "instruction", "query"), ("text",),
    ("messages", "conversations", "conversation"),
)  # fmt: skip
_ANSWERS = (
    ("answer", "expected_answer", "final_answer", "gold", "gold_answer"),
    ("solution", "target", "label", "result"),
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
# Teachers with fewer weights copy the draft when they are asked in one message.
_SMALL = 4_000_000_000
# Tokens that a baseline's sentence may add to a prompt.
_SENTENCE = 16


# -- prompts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one source, its `columns`, and those they were read from. `num_repeated`: rows
    that repeat an id; `rejected_ids`: an id column whose values do not tell rows apart. `unusable`:
    the rows that are no prompts, with the reasons; `left_out`: columns that a split did not write,
    as JSON cannot hold them."""

    source: str
    problem: str
    answer: str | None
    id: str | None
    prompts: list[Prompt]
    num_repeated: int
    rejected_ids: str | None
    unusable: list[Prompt] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def read_prompt_set(source: str, config: InitConfig, train: PromptSet | None) -> PromptSet:
    """Return the prompts of `source`. Test prompts use the columns of `train` if they have them.

    Raise ConfigError if the columns are ambiguous or missing, DataError for a bad row.
    """
    columns = columns_of(source)

    def choose(option: str, role: str, given: str | None, usual: Any) -> str | None:
        if train is not None:
            before: str | None = getattr(train, role)
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

    problem = choose("--prompt-column", "problem", config.prompt_column, _PROBLEMS)
    if problem is None:
        raise ConfigError(
            f"{source}: none of the columns {_names(columns)} has a usual name for problems"
            f" ({', '.join(name for names in _PROBLEMS for name in names)}). Name the"
            " column with --prompt-column."
        )
    answer = choose("--answer-column", "answer", config.answer_column, _ANSWERS)
    named_id = None if train is not None else config.id_column
    id_ = choose("--id-column", "id", named_id, _IDS)
    rejected, rows = None, 0
    texts: dict[Any, Any] = {}
    for _, row, flaw in read_rows(source, [c for c in (problem, id_) if c]):
        rows += 1
        if id_ is None or flaw is not None:
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
    every = load_prompts([source], problem, id_, answer, duplicates="first")
    prompts = [prompt for prompt in every if prompt.flaw is None]
    unusable = [prompt for prompt in every if prompt.flaw is not None]
    repeated = rows - len(every)
    return PromptSet(
        source, problem, answer, id_, prompts, repeated, rejected, unusable, columns=tuple(columns)
    )


def _names(columns: list[str]) -> str:
    return ", ".join(map(repr, columns))


def held_out(texts: list[str]) -> set[str]:
    """Return the problems (as `same` writes them) to hold out for the test: 5% of those in `texts`,
    chosen by hash, at least 20 and at most 500, never more than half."""
    distinct = sorted({same(text) for text in texts}, key=content_key)
    count = min(max(round(_HELD_OUT_SHARE * len(distinct)), _HELD_OUT_LEAST), _HELD_OUT_MOST)
    return set(distinct[: min(count, len(distinct) // 2)])


def split(whole: PromptSet, folder: Path) -> tuple[PromptSet, PromptSet, dict[str, str]]:
    """Split one source. Return its training and test prompts, and the content of both new files by
    name. Rows that are no prompts and columns that JSON cannot hold are left out. Raise ConfigError
    if there are fewer than two problems."""
    test_problems = held_out([p.text for p in whole.prompts])
    if not test_problems:
        raise ConfigError(
            f"{whole.source}: only one problem, which cannot be split. Name test prompts with"
            " --test."
        )
    rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    left_out: dict[str, None] = {}
    for row in read_rows(whole.source, None):
        prompt = prompt_of(row, whole.problem, whole.id, whole.answer)
        if prompt.flaw is not None:
            continue
        values = {}
        for name, value in row.cells.items():
            try:
                values[name] = as_json(value, f"{row.place}: column {name!r}")
            except DataError:
                left_out[name] = None
        rows[same(prompt.text) in test_problems].append(values)

    def side(name: str, for_test: bool) -> PromptSet:
        prompts = [p for p in whole.prompts if (same(p.text) in test_problems) == for_test]
        num_repeated = len(rows[for_test]) - len(prompts)
        return dataclasses.replace(
            whole, source=str(folder / name), prompts=prompts, num_repeated=num_repeated,
            left_out=tuple(left_out), unusable=[] if for_test else whole.unusable,
        )  # fmt: skip

    def content(for_test: bool) -> str:
        kept = ({k: v for k, v in row.items() if k not in left_out} for row in rows[for_test])
        dumps = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in kept)
        return "".join(f"{line}\n" for line in dumps)

    files = {"train.jsonl": content(False), "test.jsonl": content(True)}
    return side("train.jsonl", False), side("test.jsonl", True), files


_MATHS = re.compile(r"[\\^=+*/\d]")


def choose_checker(given: str | None, train: PromptSet, test: PromptSet) -> tuple[str, str]:
    """Return the checker for the gold answers, and why it was chosen."""
    if given is not None:
        return given, "Chosen with --checker."
    golds: list[str] = []
    for side in (train, test):
        golds = golds or [p.answer for p in side.prompts if p.answer is not None]
    if not golds:
        return "text", "Without gold answers it compares drafts with their rewrites."
    # Cells may hold whole solutions; the answer marked in them counts.
    number, maths, choice = NumberChecker(), MathChecker(), ChoiceChecker()
    if all(number.read_bare(number.gold(gold).strip()) is not None for gold in golds):
        return "number", "All gold answers are plain numbers."
    if all(choice.read_bare(choice.gold(gold).strip()) is not None for gold in golds):
        return "choice", "All gold answers are single letters from A to J."
    answers = [maths.gold(gold).strip() for gold in golds]
    mathematical = sum(
        _MATHS.search(a) is not None and ("\\" in a or maths.read_bare(a) is not None)
        for a in answers
    )
    # A few answers in words are usual among mathematics; `math` compares those as text.
    if mathematical < 0.9 * len(answers):
        return "text", "The gold answers are words, or of several kinds."
    why = "The gold answers look like mathematics."
    if importlib.util.find_spec("math_verify") is None:
        needed = f"it needs math-verify ({pip_install('checkers')})"
        return "text", f"{why} The checker `math` is better for them; {needed}."
    return "math", why


def unreadable_answers_of(name: str, *sides: PromptSet) -> list[str]:
    """Return a sentence for each side of whose gold answers the checker cannot read some."""
    checker = make_checker(name)
    return [
        sentence
        for side in sides
        if (sentence := unreadable_answers(read_gold_answers(side.prompts, checker, name), name)[1])
    ]


# -- models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model that is looked at. `switch`: the variable by which its chat `template` turns thinking
    on and off. `weights`: their number, approximate where the config says it, else by the files;
    None if neither does. `cache_bytes`: bytes of float32 cache per token; None if the config lacks
    the usual fields."""

    files: ModelFiles
    tokenizer: Any
    template: str
    switch: str | None
    weights: int | None
    cache_bytes: int | None

    @classmethod
    def of(cls, files: ModelFiles, tokenizer: Any) -> "Model":
        ChatFormatter(tokenizer)  # refuses one without a chat template
        template = tokenizer.get_chat_template()
        config, weights, cache_bytes = files.text_config, None, None
        with contextlib.suppress(KeyError, TypeError, ValueError):
            width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
            heads = int(config["num_attention_heads"])
            groups = int(config.get("num_key_value_heads") or heads)
            head = int(config.get("head_dim") or width // heads)
            experts = config.get("num_experts") or config.get("num_local_experts")
            inner = int(config.get("moe_intermediate_size") or config["intermediate_size"])
            attention = 2 * width * head * (heads + groups)
            forward = 3 * width * inner * int(experts or 1)
            embeddings = files.vocab_size * width * (1 if config.get("tie_word_embeddings") else 2)
            weights = embeddings + layers * (attention + forward)
            cache_bytes = 2 * layers * groups * head * 4
        if weights is None:
            weights = count_weights(files.path)
        return cls(files, tokenizer, template, thinking_switch(template), weights, cache_bytes)


@dataclass(frozen=True)
class Models:
    """Both models, and the settings chosen for them. `spells_instructions`: whether the tokenizer
    can spell the built-in instructions."""

    student: Model
    teacher: Model
    student_sampling: dict[str, Any]
    template: str
    why_template: str
    prompt_template: str
    spells_instructions: bool
    gpus: list[str]

    @property
    def self_taught(self) -> bool:
        return self.student.files.name == self.teacher.files.name


def look_at_models(config: InitConfig) -> Models:
    """Return what both models are. Raise ConfigError for models that cannot be used together."""
    names = (config.student, config.teacher)
    files = [resolve_model(name, weights=False) for name in names]
    tokenizers = [load_tokenizer(each) for each in files]
    require_same_tokenizer(tokenizer_hash(tokenizers[0]), tokenizers[1], *names, names[0])
    for each in files:
        require_whole(each)
    student, teacher = map(Model.of, files, tokenizers)
    thinks = (
        student.switch is not None
        or CLOSE in student.template
        or CLOSE in student.tokenizer.get_vocab()
    )
    spells = Spelling(student.tokenizer).place([], _BOXED) is not None
    weights = teacher.weights
    if weights is None or weights >= _SMALL:
        size = "of unknown size" if weights is None else f"of about {_billions(weights)}"
        template, why = "tags", f"`tags`, for a teacher {size} weights."
    elif thinks:
        template = "tags"
        why = (
            f"The teacher is small ({_billions(weights)} weights), but `examples` cannot write the"
            " trace of a student that thinks."
        )
        if spells:
            why += (
                " Look at the statuses; if many rewrites are malformed or copied, write a template"
                " with examples of your own."
            )
    else:
        template = "examples"
        why = f"`examples`, for a small teacher ({_billions(weights)} weights)."
        try:
            load_template(template).formatter(teacher.tokenizer)
        except ConfigError:
            template = "plain"
            why = (
                f"The teacher is small ({_billions(weights)} weights), but its chat template does"
                " not take the system message and the examples of `examples`."
            )
    prompt_template, sampling = _BOXED if spells else "{{problem}}", _own_sampling(student.files)
    return Models(student, teacher, sampling, template, why, prompt_template, spells, gpus())


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _own_sampling(model: ModelFiles) -> dict[str, Any]:
    """Return the sampling settings of the model's generation_config.json that exist here too."""
    try:
        saved = json.loads((model.path / "generation_config.json").read_text(encoding="utf-8"))
        sampling = {"temperature": float(saved.get("temperature") or 1.0)}
        if saved.get("top_p") is not None:
            sampling["top_p"] = float(saved["top_p"])
        if saved.get("top_k"):
            sampling["top_k"] = int(saved["top_k"])
        SamplingConfig(**sampling)
        if not all(map(math.isfinite, sampling.values())):
            raise ValueError(sampling)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
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
    """Divide both contexts. Raise ConfigError if the longest prompt leaves no room."""
    asking = load_template(models.template)
    students = ChatFormatter(models.student.tokenizer)
    teachers = asking.formatter(models.teacher.tokenizer, default_thinking=False)
    prompt, rewrite_prompt, longest, reason = 0, 0, "", PromptError()
    for candidate in sorted(prompts, key=lambda p: len(p.text.encode()), reverse=True)[:_MEASURED]:
        try:
            message = fill_prompt(models.prompt_template, candidate.message)
            _, ids = students.render(message, candidate.turns)
            _, rewriting = teachers.render(asking.message(candidate.text, ""))
        except PromptError as error:
            reason = error
            continue  # its stage will record it as an error row, with the reason
        if len(rewriting) > rewrite_prompt:
            longest = candidate.source
        prompt, rewrite_prompt = max(prompt, len(ids)), max(rewrite_prompt, len(rewriting))
    if not rewrite_prompt:
        raise ConfigError(
            f"{prompts[0].source}: the chat templates of {models.student.files.name} and"
            f" {models.teacher.files.name} can lay out none of the prompts. The last one: {reason}"
        )
    # A system message and examples come on top: the teacher keeps them in its cache.
    plain_teachers = ChatFormatter(models.teacher.tokenizer, default_thinking=False)
    shown = len(teachers.render("1")[1]) - len(plain_teachers.render("1")[1])
    cap = max(_GPU_CONTEXT if models.gpus else _CPU_CONTEXT, 4 * (rewrite_prompt - shown))
    student = min(models.student.files.context, cap)
    teacher = min(models.teacher.files.context, cap + shown)
    spare = teacher // 20
    room = teacher - rewrite_prompt - spare
    by_teacher = room * _DRAFT // (_DRAFT + _REWRITE)
    draft = _round_down(min(student - prompt - _SENTENCE, by_teacher))
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
