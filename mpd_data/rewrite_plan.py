"""What a rewrite stage works with, checked without an engine, and what it would do.

The real run and the dry run share this preparation, so that they cannot drift apart.
"""

import itertools
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from mpd_data.choice import choosing_student, waiting_rollouts
from mpd_data.config import RewriteConfig
from mpd_data.engine import context_of, server_notes
from mpd_data.errors import ConfigError
from mpd_data.keys import KeySet
from mpd_data.models import (
    ModelFiles,
    chat_template_hash,
    load_tokenizer,
    provenance,
    require_same_tokenizer,
    resolve_model,
)
from mpd_data.options import arguments
from mpd_data.plan import (
    Learned,
    Lengths,
    Shown,
    StagePlan,
    as_saved,
    distill_bytes,
    first_reasons,
    learn,
)
from mpd_data.prompts import ChatFormatter, PromptError
from mpd_data.shards import RoundDir, is_whole, read_metadata, scratch_of
from mpd_data.template import RewriteTemplate, load_template

# What a rewrite needs of a rollout.
ROLLOUT_COLUMNS = [
    "row_id",
    "prompt_id",
    "round",
    "prompt",
    "prompt_ids",
    "completion",
    "completion_ids",
    "num_completion_tokens",
    "finish_reason",
    "problem",
    "answer",
    "gold_answer",
    "is_correct",
    "metadata",
]

# What decides how many bytes a rewritten token takes.
_SIZE = ("num_candidates", "choose", "num_logprobs", "score_context")


@dataclass(frozen=True)
class Asked:
    """What the teacher is asked about a rollout: the rewrite prompt, and the context under which
    the rewrite would be scored with it."""

    text: str
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]


@dataclass(frozen=True)
class Prepared:
    """All that a run settles before it starts an engine. `student` is the rollouts' metadata;
    `spare`: the teacher's embedding rows beyond the student's."""

    config: RewriteConfig
    student: dict[str, Any]
    template: RewriteTemplate
    teacher: ModelFiles
    tokenizer: Any
    writing: ChatFormatter
    scoring: ChatFormatter
    context: int
    vocab_size: int
    k: int
    row_identity: dict[str, Any]
    identity: dict[str, Any]

    @property
    def spare(self) -> int:
        return self.teacher.vocab_size - self.vocab_size

    def metadata(self) -> dict[str, Any]:
        """What the stage's shards say of themselves."""
        template, student = self.template, self.student
        return {
            **self.identity,
            "teacher": {"name": self.config.teacher, **self.teacher.identity()},
            "template": {
                "name": template.name,
                "version": template.version,
                "hash": template.hash(),
            },
            "student": student["model"],
            "round": student["round"],
            "tokenizer": student["tokenizer"],
            "vocab_size": self.vocab_size,
            "eos_token_id": student["eos_token_id"],
            "score_temperature": 1.0,
            "backend": self.config.engine.backend,
            **provenance(),
        }

    def ask(self, problem: str, draft: str) -> Asked:
        """Renders the rewrite prompt. Raises PromptError where it cannot be used."""
        message = self.template.message(problem, draft)
        text, prompt_ids = self.writing.render(message)
        scored = self.scoring.layout(message)
        # The two differ in their settings at most, and tokenising is the dear part.
        return Asked(
            text, prompt_ids, prompt_ids if scored == text else self.scoring.encode(scored)
        )

    def ask_about(self, rollout: dict[str, Any]) -> Asked:
        """The same for a row of rollouts."""
        # Control tokens that the student sampled would be obeyed in the teacher's prompt.
        draft = self.tokenizer.decode(rollout["completion_ids"], skip_special_tokens=True)
        return self.ask(rollout["problem"], draft)

    def fits(self, asked: Asked) -> bool:
        """Whether the teacher's context has room for the prompt and the longest rewrite."""
        return len(asked.prompt_ids) + self.config.sampling.max_tokens <= self.context


def prepare(config: RewriteConfig, student: dict[str, Any], teacher: ModelFiles) -> Prepared:
    """Checks everything that can be checked without an engine. `student`: what the rollouts'
    shards say of themselves. Raises ConfigError."""
    template = load_template(config.template)
    if config.num_candidates > 1 and config.sampling.temperature == 0:
        raise ConfigError(
            f"--num-candidates {config.num_candidates} at --temperature 0 gives the same rewrite so"
            " many times; give a temperature above 0."
        )
    if not template.asks and (config.score_context == "rewrite" or config.num_candidates > 1):
        raise ConfigError(
            "--template draft asks for no rewrite: it goes with --score-context problem and one"
            " candidate."
        )
    tokenizer = load_tokenizer(teacher, config.trust_remote_code)
    require_same_tokenizer(
        student["tokenizer"], tokenizer, f"the student of {config.shards}", config.teacher
    )
    writing = ChatFormatter(
        tokenizer, config.template_kwargs, thinking=config.thinking, default_thinking=False
    )
    # ỹ is in the student's format, so the teacher is to take it as its own turn would be in that
    # mode.
    scoring = ChatFormatter(
        tokenizer,
        config.score_template_kwargs,
        default_thinking=student["thinking"] is not False,
    )
    context = context_of(teacher, config.engine)
    # Rows that one model has beyond the other's are padding of the embedding, not tokens.
    sizes = [student["vocab_size"], teacher.vocab_size]
    if config.student is not None:
        code = config.trust_remote_code
        trained = resolve_model(config.student, trust_remote_code=code, weights=False)
        require_same_tokenizer(
            student["tokenizer"],
            load_tokenizer(trained, code),
            f"the sampler of {config.shards}",
            config.student,
        )
        sizes.append(trained.vocab_size)
    vocab_size = min(sizes)
    k = min(config.num_logprobs, vocab_size)
    row_identity = {
        "teacher": teacher.identity(),
        "template": template.hash(),
        "template_kwargs": config.template_kwargs,
        "thinking": writing.thinking,
        "chat_template": chat_template_hash(tokenizer),
        "sampling": config.sampling.model_dump(),
        "seed": config.seed,
    }
    identity = {
        **row_identity,
        "num_candidates": config.num_candidates,
        "choose": config.choose,
        "filters": config.filters.model_dump(),
        "num_logprobs": k,
        "score_context": config.score_context,
        "score_template_kwargs": config.score_template_kwargs,
        "dtype": config.engine.dtype,
        # Decides which rows are too_long.
        "max_model_len": context,
    }
    return Prepared(
        config=config,
        student=student,
        template=template,
        teacher=teacher,
        tokenizer=tokenizer,
        writing=writing,
        scoring=scoring,
        context=context,
        vocab_size=vocab_size,
        k=k,
        row_identity=row_identity,
        identity=identity,
    )


def prepare_dry(config: RewriteConfig, overwrite: bool = False) -> Prepared:
    """`prepare` without weights, and whether the round takes these settings."""
    round_dir = RoundDir(config.shards)
    student = rollout_metadata(round_dir)
    teacher = resolve_model(
        config.teacher,
        config.revision,
        config.trust_remote_code,
        weights=False,
        served=config.engine.served(config.teacher),
    )
    saved = round_dir.run_info().get("stages", {}).get("distill")
    if saved is not None and not overwrite:
        teacher = as_saved(teacher, saved["identity"]["teacher"])
    if config.choose == "likeliest":
        choosing_student(config, student["model"], student["tokenizer"], weights=False)
    else:
        refuse_half_refiltered(round_dir)
    prepared = prepare(config, student, teacher)
    if not overwrite:
        round_dir.check("distill", prepared.identity)
    return prepared


def plan_rewrite(
    config: RewriteConfig, overwrite: bool = False, limit: int | None = None
) -> StagePlan:
    """What `run_rewrite` would do, found without an engine or weights and without writing
    anything. Raises what the run would raise before it starts its engine."""
    prepared = prepare_dry(config, overwrite)
    round_dir, part = RoundDir(config.shards), config.parts.part
    done, waiting = KeySet(), 0
    if not overwrite:
        paths = round_dir.survey("distill").paths
        done = round_dir.rewritten(paths)
        if config.choose == "likeliest":
            waiting = waiting_rollouts(round_dir, paths)
    found = round_dir.survey("rollouts")
    rollouts = found.keys()
    total = part.share(rollouts)
    committed = total - part.share(rollouts - done)
    owed = asked_about = 0
    first: Shown | None = None
    reasons: list[str] = []
    unasked: Counter[str] = Counter()
    lengths = array("i")
    contexts = kept_at_most = 0
    rows = round_dir.rows("rollouts", ROLLOUT_COLUMNS, found.paths, done)
    own = (rollout for rollout in rows if part.holds(rollout["row_id"]))
    for rollout in itertools.islice(own, limit):
        owed += 1
        if rollout["finish_reason"] == "length":
            unasked["draft_truncated"] += 1
            continue
        if not prepared.template.asks:
            asked_about += 1
            contexts += len(rollout["prompt_ids"])
            kept_at_most += rollout["num_completion_tokens"]
            continue
        prepared.template.layout(closes_thinking(rollout))
        try:
            asked = prepared.ask_about(rollout)
        except PromptError as error:
            reasons.append(f"rollout {rollout['row_id']}: {error}")
            continue
        if not prepared.fits(asked):
            unasked["too_long"] += 1
            continue
        asked_about += 1
        first = first or Shown("first rewrite prompt", asked.text, len(asked.prompt_ids))
        lengths.append(len(asked.prompt_ids))
        contexts += len(rollout["prompt_ids"])
        if config.score_context == "rewrite":
            contexts += len(asked.teacher_prompt_ids)
        longest = int(config.filters.max_ratio * rollout["num_completion_tokens"])
        kept_at_most += min(longest, config.sampling.max_tokens)
    return predict(
        prepared,
        total=total,
        owed=owed + waiting,
        asked=asked_about,
        contexts=contexts,
        kept_at_most=kept_at_most,
        shown=[] if first is None else [first],
        prompt_tokens=Lengths.of(lengths),
        committed=committed - waiting,
        failing=len(reasons),
        reasons=first_reasons(reasons),
        details={
            **{f"not asked: {status}": n for status, n in sorted(unasked.items())},
            **({"rollouts for the student to choose": waiting} if waiting else {}),
        },
        notes=server_notes(config.engine)
        + [
            "The student chooses afterwards: its time is not in the plan, and neither is a second"
            " copy of the rewrites while it does."
        ]
        * (config.choose == "likeliest"),
    )


def predict(
    prepared: Prepared, total: int, owed: int, asked: int, contexts: int, kept_at_most: int,
    **known: Any,
) -> StagePlan:  # fmt: skip
    """The plan for `asked` rollouts that the teacher is asked about, of `owed`: tokens, disk and
    time. `contexts`: tokens of the contexts that are stored with their rewrites; `kept_at_most`:
    tokens of the longest rewrites that the filter keeps, one for each rollout; `known`: other
    fields of the plan."""
    config = prepared.config
    learned = learn_rewrites(prepared)
    rewrites = asked * config.num_candidates
    at_most = rewrites * config.sampling.max_tokens if prepared.template.asks else kept_at_most
    # The student chooses among what is scored.
    stored = config.num_candidates if config.choose in ("all", "likeliest") else 1
    expected = seconds = None
    kept = kept_at_most * stored
    if learned is not None:
        expected = min(round(rewrites * learned.tokens_per_row), at_most)
        seconds = learned.seconds(expected / config.parts.workers)
        kept = min(kept, expected)
    contexts *= config.num_candidates
    disk = distill_bytes(owed, contexts, kept, prepared.k, prepared.vocab_size)
    if learned is not None and expected is not None and learned.has(prepared.identity, _SIZE):
        disk = round(expected * learned.bytes_per_token)
    return StagePlan(
        command="mpd-gen rewrite",
        out=str(config.shards),
        settings=arguments(config),
        rows=total,
        owed=owed,
        tokens_expected=expected,
        tokens_at_most=at_most,
        disk_bytes=disk,
        seconds=seconds,
        device=None if learned is None else learned.device,
        learned_from=None if learned is None else learned.source,
        **known,
    )


def learn_rewrites(prepared: Prepared) -> Learned | None:
    """What rewrites that are there say of those to come."""
    same = ("sampling", "num_candidates", "choose", "filters", "num_logprobs", "score_context")
    return learn(
        prepared.config.shards,
        "distill",
        prepared.student["tokenizer"],
        prepared.config.teacher,
        {name: prepared.identity[name] for name in same},
    )


def refuse_half_refiltered(round_dir: RoundDir) -> None:
    """Raises ConfigError where a refilter, or the student's choice, has all its rows and was killed
    before they took the old ones' place."""
    if is_whole(scratch_of(round_dir)):
        raise ConfigError(
            f"{round_dir.path}: a refilter, or the student's choice, was killed while its rows were"
            " put in place. Run the same command again, with --refilter; it takes a moment."
        )


def closes_thinking(rollout: dict[str, Any]) -> bool:
    """Whether a draft has a thinking part."""
    return "</think>" in rollout["completion"]


def rollout_metadata(round_dir: RoundDir) -> dict[str, Any]:
    paths = round_dir.shard_paths("rollouts")
    if not paths:
        raise ConfigError(
            f"{round_dir.path}: no rollouts here (rollouts/part-*.parquet). Run mpd-gen rollouts"
            " with this folder as --out first."
        )
    return read_metadata(paths[0])
