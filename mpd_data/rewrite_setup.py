"""Check and prepare a rewrite stage, for the run and for the dry run."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from mpd_data.prompts.special import CLOSE, Turn, after_thinking, turn_of
from mpd_data.prompts.template import RewriteTemplate, load_template
from mpd_data.select.student import choosing_student
from mpd_data.stage import model_of, refuse_half_refiltered
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind
from mpd_data.store.shards import read_metadata

# What a rewrite needs of a rollout.
ROLLOUT_COLUMNS = [
    "row_id", "prompt_id", "round", "prompt", "prompt_ids", "completion", "completion_ids",
    "num_completion_tokens", "finish_reason", "problem", "answer", "gold_answer", "is_correct",
    "metadata",
]  # fmt: skip


def thinks(rollout: dict[str, Any]) -> bool:
    """Return whether a rollout has a thinking part, closed or not."""
    completion = rollout["completion"]
    return CLOSE in completion or after_thinking(rollout["prompt"], completion) is None


# Stands in a rewrite prompt where the middle of the draft is left out.
OMISSION = "\n[... the middle is left out ...]\n"


@dataclass(frozen=True)
class Asked:
    """The rewrite prompt of a rollout, and the context that its rewrite is scored after with
    --score-context rewrite or both. `draft_ids`: the tokens of the draft that it shows."""

    text: str
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    draft_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RewriteSetup:
    """What a run knows before it starts an engine. A dry run has the same without weights.
    `student` is the rollouts' metadata; `turn` is the student's; `k` log-probabilities are stored
    for each token; `vocab_size` is the student's."""

    config: RewriteConfig
    student: dict[str, Any]
    template: RewriteTemplate
    teacher: ModelFiles
    tokenizer: Any
    turn: Turn
    teacher_turn: Turn
    writing: ChatFormatter
    scoring: ChatFormatter
    context: int
    vocab_size: int
    k: int
    row_identity: dict[str, Any]
    identity: dict[str, Any]

    @property
    def engine_k(self) -> int:
        """How many log-probabilities the engine returns for each token. The teacher's embedding
        rows beyond the student's may be among them; `score_columns` drops these."""
        return self.k + self.teacher.vocab_size - self.vocab_size

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that the stage's shards carry."""
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
            "eos_token_id": self.turn.end_id,
            # A draft that is its own rewrite ends as it was sampled.
            "end_ids": [self.turn.end_id] if template.asks else self.turn.stop_ids,
            "score_temperature": 1.0,
            "backend": self.config.engine.backend,
            **provenance(),
        }

    def at(self, moment: str | None) -> "RewriteSetup":
        """Return this setup with prompts laid out as of `moment`, as `ChatFormatter.at` says."""
        return replace(self, writing=self.writing.at(moment), scoring=self.scoring.at(moment))

    def ask(self, problem: str, draft: str, draft_ids: Sequence[int] = ()) -> Asked:
        """Render the rewrite prompt. Raise PromptError where it cannot be used."""
        message = self.template.message(problem, draft)
        text, prompt_ids = self.writing.render(message)
        scored = self.scoring.layout(message)
        # Both are often the same text, and tokenising is the slow part.
        scoring_ids = prompt_ids if scored == text else self.scoring.spelling.encode(scored)
        return Asked(text, prompt_ids, scoring_ids, list(draft_ids))

    def takes_parts(self, rollout: dict[str, Any]) -> bool:
        """Return whether the teacher rewrites what there is of the rollout where that is not all:
        --cut-drafts, if the gold answer can check the result."""
        return self.config.cut_drafts and rollout["gold_answer"] is not None

    def ask_about(self, rollout: dict[str, Any]) -> Asked | None:
        """Render the rewrite prompt of a rollout. Return None if the teacher's context has no room
        for it and the longest rewrite, and the rollout may not be cut or is nothing without its
        draft. Raise PromptError where it cannot be used."""
        ids, shown = rollout["completion_ids"], len(rollout["completion_ids"])
        while shown > 0:
            asked = self._show(rollout, ids, shown)
            needed = len(asked.prompt_ids) + self.config.sampling.max_tokens
            if needed <= self.context:
                return asked
            if not self.takes_parts(rollout):
                return None
            # The mark, and text that is tokenised again, may take more tokens than were saved.
            shown -= needed - self.context
        return None

    def _show(self, rollout: dict[str, Any], ids: list[int], count: int) -> Asked:
        """Render the rewrite prompt with `count` tokens of the draft `ids`, from both ends."""
        parts = [ids]
        if count < len(ids):
            parts = [ids[: (count + 1) // 2], ids[len(ids) - count // 2 :]]
        texts = [self.turn.shown(part, rollout["prompt_ids"]) for part in parts]
        # A cut may divide a character of several tokens, and so may the limit of a draft.
        if len(texts) == 2:
            texts = [texts[0].rstrip("\ufffd"), texts[1].lstrip("\ufffd")]
        if rollout["finish_reason"] == "length":
            texts[-1] = texts[-1].rstrip("\ufffd")
        return self.ask(rollout["problem"], OMISSION.join(texts), list(itertools.chain(*parts)))


def setup(
    config: RewriteConfig,
    weights: bool = True,
    overwrite: bool = False,
    student: dict[str, Any] | None = None,
    teacher: ModelFiles | None = None,
) -> RewriteSetup:
    """Check everything that can be checked without an engine. Raise ConfigError.

    Without `weights`, for a dry run, no weights are fetched or hashed, and the round must have been
    started with these settings unless `overwrite`, as a run finds when it claims the round.
    `student` and `teacher` replace what is not made yet: the metadata of rollouts to come, a
    teacher that is yet to be trained.
    """
    code, round_dir = config.trust_remote_code, RoundDir(config.shards)
    drafts_exist = student is None
    if student is None:
        require_kind(round_dir.path, "round")
        paths = round_dir.shard_paths("rollouts")
        if not paths:
            raise ConfigError(
                f"{round_dir.path}: no rollouts here (rollouts/part-*.parquet). Run mpd-gen"
                " rollouts with this folder as --out first."
            )
        student = read_metadata(paths[0])
    teacher = teacher or model_of(config, weights)
    if not weights:
        saved = round_dir.saved_stage("distill")
        teacher = teacher.as_saved(saved and saved["identity"].get("teacher"))
    if config.student_option is not None:
        if drafts_exist:
            choosing_student(config, student["model"], student["tokenizer"], weights)
    elif not weights:
        refuse_half_refiltered(round_dir)
    template = load_template(config.template)
    if config.num_candidates > 1 and config.sampling.temperature == 0:
        raise ConfigError(
            f"--num-candidates {config.num_candidates} at --temperature 0 gives"
            f" {config.num_candidates} times the same rewrite. Give a temperature above 0."
        )
    if not template.asks and (
        config.score_context != "problem" or config.num_candidates > 1 or config.cut_drafts
    ):
        raise ConfigError(
            "--template draft makes no rewrite. Use it with --score-context problem, one candidate"
            " and without --cut-drafts."
        )
    tokenizer = load_tokenizer(teacher, code)
    drafted, name = student["tokenizer"], f"the student of {config.shards}"
    require_same_tokenizer(drafted, tokenizer, name, config.teacher, student["model"]["name"])
    writing = template.formatter(
        tokenizer, config.template_kwargs, thinking=config.thinking, default_thinking=False
    )
    # The trace is in the student's format: the teacher scores it as its own turn in that mode.
    scoring = template.formatter(
        tokenizer, config.score_template_kwargs, default_thinking=student["thinking"] is not False
    )
    context = context_of(teacher, config.engine, code, scores=True)
    # Embedding rows that one model has beyond the others are padding, not tokens.
    sizes = [student["vocab_size"], teacher.vocab_size]
    if config.student is not None:
        trained = resolve_model(config.student, trust_remote_code=code, weights=False)
        own, name = load_tokenizer(trained, code), f"the sampler of {config.shards}"
        require_same_tokenizer(drafted, own, name, config.student, student["model"]["name"])
        sizes.append(trained.vocab_size)
    vocab_size = min(sizes)
    k = min(config.num_logprobs, vocab_size)
    teacher_turn = turn_of(teacher, tokenizer, code)
    turn = teacher_turn.recorded(student, chat_template_hash(tokenizer))
    row_identity = {
        "teacher": teacher.identity(),
        "template": template.hash(),
        "template_kwargs": config.template_kwargs,
        "thinking": writing.thinking,
        "chat_template": chat_template_hash(tokenizer),
        "sampling": config.sampling.model_dump(),
        "seed": config.seed,
        **({"cut_drafts": True} if config.cut_drafts else {}),
    }
    identity = {
        **row_identity,
        "num_candidates": config.num_candidates,
        "choose": config.choose,
        "filters": config.filters.identity(),
        "num_logprobs": k,
        "score_context": config.score_context,
        "score_template_kwargs": config.score_template_kwargs,
        **config.engine.identity,
        # It decides which rows are too_long.
        "max_model_len": context,
        **({"stop_ids": teacher_turn.stop_ids} if template.asks else {}),
    }
    if turn.end_id != student["eos_token_id"]:
        identity["eos_token_id"] = turn.end_id
    prepared = RewriteSetup(
        config, student, template, teacher, tokenizer, turn, teacher_turn, writing, scoring,
        context, vocab_size, k, row_identity, identity,
    )  # fmt: skip
    if not weights and not overwrite:
        saved = round_dir.check("distill", identity, {})
        prepared = prepared.at(saved["begun"] if saved and "begun" in saved else None)
    return prepared
