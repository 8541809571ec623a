"""What a rewrite stage works with, checked without an engine, and what it would do.

The real run and the dry run share this preparation, so that they cannot drift apart.
"""

from dataclasses import dataclass
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.common.machine import provenance
from mpd_data.common.models import (
    ModelFiles,
    chat_template_hash,
    load_tokenizer,
    require_same_tokenizer,
    resolve_model,
)
from mpd_data.config import RewriteConfig
from mpd_data.engines.start import context_of
from mpd_data.prompts.chat import ChatFormatter
from mpd_data.prompts.template import RewriteTemplate, load_template
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind
from mpd_data.store.shards import read_metadata

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


def closes_thinking(rollout: dict[str, Any]) -> bool:
    """Whether a draft has a thinking part."""
    return "</think>" in rollout["completion"]


def rollout_metadata(round_dir: RoundDir) -> dict[str, Any]:
    require_kind(round_dir.path, "round")
    paths = round_dir.shard_paths("rollouts")
    if not paths:
        raise ConfigError(
            f"{round_dir.path}: no rollouts here (rollouts/part-*.parquet). Run mpd-gen rollouts"
            " with this folder as --out first."
        )
    return read_metadata(paths[0])
