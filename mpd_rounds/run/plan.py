"""`mpd-rounds --dry-run`: every stage of every round, before any of them runs.

A stage whose inputs are there is planned by its own dry run. What comes after it is planned as far
as it can be known: the student of a later round has the first one's tokenizer and context, the
drafts are as long as they may be, and of what the filter keeps nothing is known unless a round is
there to learn from.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mpd_data.common.models import ModelFiles, resolve_model
from mpd_data.common.text import plain_lines
from mpd_data.config import RewriteConfig, RolloutsConfig
from mpd_data.dryrun.plan import Shown, StagePlan
from mpd_data.dryrun.rewrite import learn_rewrites, plan_rewrite, predict
from mpd_data.dryrun.rollouts import learn_rollouts, plan_rollouts
from mpd_data.dryrun.show import (
    first_reasons,
    free_bytes,
    shown_text,
    size_text,
    steps_table,
    totals,
)
from mpd_data.engines.start import server_notes
from mpd_data.prompts.chat import PromptError
from mpd_data.prompts.reader import Prompt
from mpd_data.rewrite_setup import setup as rewrite_setup
from mpd_data.rollouts import RolloutSetup, read_prompts
from mpd_data.rollouts import setup as rollout_setup
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.runner import Finished
from mpd_rounds.run.steps import Pipeline, Step
from mpd_train.config import TrainConfig
from mpd_train.dryrun.plan import plan_train, plan_train_ahead
from mpd_train.setup import setup as train_setup

_DRAFT = "(here stands the draft)"
# What decides which rows a source of prompts gives.
_SOURCE = {
    "prompts", "prompt_column", "id_column", "answer_column", "metadata_columns", "duplicates",
    "checker", "answer_formats",
}  # fmt: skip
# What decides which share of rewrites is kept.
_KEEPING = ("num_candidates", "choose", "filters")
# The rate that holds for a command.
_RATE_OF = {"mpd-gen rollouts": "rollouts", "mpd-gen rewrite": "rewrite", "mpd-train": "train"}


@dataclass(frozen=True)
class Ahead:
    """What a round that is not there yet hands from one stage to the next, in tokens: the longest
    and the mean prompt, the longest draft, and the rows, asked rewrites, and longest rewrite of
    its distillation; `kept` rows and tokens to expect of them, where that is known."""

    tokenizer: str
    rows: int
    longest_prompt: int
    mean_prompt: float
    longest_rewrite: int
    kept: tuple[int, int] | None


@dataclass
class PipelinePlan:
    """Each step with its plan, None where it has finished; the first rendered prompts; notes."""

    out: Path
    steps: list[tuple[str, StagePlan | None]] = field(default_factory=list)
    shown: dict[str, Shown] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, label: str, plan: StagePlan | None) -> None:
        self.steps.append((label, plan))
        if plan is not None:
            for item in plan.shown:
                self.shown.setdefault(item.name, item)
            self.notes += [f"{label}: {note}" for note in (*plan.reasons, *plan.notes)]

    def as_json(self) -> dict[str, Any]:
        steps = [
            {"label": label, "done": plan is None, "plan": None if plan is None else plan.as_json()}
            for label, plan in self.steps
        ]
        owed = [plan for _, plan in self.steps if plan is not None]
        total = dict(zip(("tokens", "disk", "time"), totals(owed), strict=True))
        return {"out": str(self.out), "steps": steps, "total": total, "notes": self.notes}


def plan_pipeline(
    pipeline: Pipeline, out: Path, rates: Mapping[str, float] | None = None
) -> PipelinePlan:
    """Plans what is not finished of `pipeline` in `out`, and checks all of it. `rates`: tokens per
    second of a stage (rollouts, rewrite, train), where they are not to be the recorded ones. Raises
    what a stage would raise before it starts its engine."""
    planner = _Planner(pipeline, out)
    result = PipelinePlan(out)
    planner.evaluate(result, 0)
    for round_ in range(1, pipeline.rounds + 1):
        planner.train(result, round_)
        planner.evaluate(result, round_)
    result.steps = [
        (label, None if plan is None else _at_rate(plan, rates or {}))
        for label, plan in result.steps
    ]
    needed = sum(plan.disk_bytes or 0 for _, plan in result.steps if plan is not None)
    if needed > (free := free_bytes(out)):
        result.notes.append(
            f"{out}: {size_text(free)} of disk are free, all steps may take {size_text(needed)}."
        )
    return result


def _at_rate(plan: StagePlan, rates: Mapping[str, float]) -> StagePlan:
    """`plan` with the time that its tokens take at a given rate, where one is given."""
    rate = rates.get(_RATE_OF[plan.command])
    tokens = plan.tokens_at_most if plan.tokens_expected is None else plan.tokens_expected
    if rate is None or tokens is None:
        return plan
    device = f"{rate:,.0f} tokens/s, given"
    return dataclasses.replace(plan, seconds=round(tokens / rate, 1), device=device)


class _Planner:
    def __init__(self, pipeline: Pipeline, out: Path) -> None:
        self._pipeline = pipeline
        self._commands = Plan(pipeline, out)
        self._commands.all_steps()
        self._finished = Finished(out)
        self._prompts: dict[str, list[Prompt]] = {}

    def evaluate(self, result: PipelinePlan, round_: int) -> None:
        for step in self._commands.evaluations(round_):
            done = self._finished.holds(step)
            result.add(step.label, None if done else plan_rollouts(self._drafts(step)))

    def train(self, result: PipelinePlan, round_: int) -> None:
        """Rollouts, rewrite and training of a round."""
        sampling, rewriting, training = self._commands.training(round_)
        drafts = planned = None
        if not self._finished.holds(sampling):
            drafts = self._drafts(sampling)
            planned = plan_rollouts(drafts)
        result.add(sampling.label, planned)
        ahead = None
        if self._finished.holds(rewriting):
            result.add(rewriting.label, None)
            rewritten = True
        elif drafts is None or planned is None or not planned.owed:
            assert isinstance(rewriting.config, RewriteConfig)
            plan = plan_rewrite(rewrite_setup(rewriting.config, weights=False))
            result.add(rewriting.label, plan)
            rewritten = not plan.owed
            if not rewritten:
                # The training's rows are those of rewrites to come.
                drafts = self._drafts(sampling)
                ahead = self._rewrite(rewriting, plan_rollouts(drafts), drafts)[1]
        else:
            plan, ahead = self._rewrite(rewriting, planned, drafts)
            result.add(rewriting.label, plan)
            rewritten = False
        if self._finished.holds(training):
            result.add(training.label, None)
            return
        assert isinstance(training.config, TrainConfig)
        if rewritten:
            result.add(training.label, plan_train(train_setup(training.config, weights=False)))
            return
        assert ahead is not None
        result.add(training.label, self._train_ahead(training.config, ahead))

    def _model(
        self, name: str, revision: str | None, code: bool, served: str | None = None
    ) -> ModelFiles:
        """A model; for a student that is still to be trained, the files of the first."""
        given = (self._pipeline.student, self._pipeline.teacher)
        if name in given or Path(name).is_dir():
            return resolve_model(name, revision, code, weights=False, served=served)
        first = resolve_model(self._pipeline.student, revision, code, weights=False)
        return dataclasses.replace(first, name=name, version="unhashed")

    def _drafts(self, step: Step) -> RolloutSetup:
        config = step.config
        assert isinstance(config, RolloutsConfig)
        key = config.model_dump_json(include=_SOURCE)
        if key not in self._prompts:
            self._prompts[key] = read_prompts(config)
        model = self._model(config.model, config.revision, config.trust_remote_code)
        return rollout_setup(config, weights=False, model=model, prompts=self._prompts[key])

    def _rewrite(
        self, step: Step, rollouts: StagePlan, drafts: RolloutSetup
    ) -> tuple[StagePlan, Ahead]:
        """The rewrite of rollouts that are not there yet."""
        config = step.config
        assert isinstance(config, RewriteConfig)
        served = config.engine.served(config.teacher)
        teacher = self._model(config.teacher, config.revision, config.trust_remote_code, served)
        prepared = rewrite_setup(config, weights=False, student=drafts.metadata(), teacher=teacher)
        asks = prepared.template.asks
        if asks:
            prepared.template.layout(bool(drafts.formatter.thinking))
        first: Shown | None = None
        writing: list[int] = []
        scoring: list[int] = []
        reasons: list[str] = []
        for prompt in drafts.prompts if asks else ():
            try:
                asked = prepared.ask(prompt.text, _DRAFT)
            except PromptError as error:
                reasons.append(f"{prompt.source}: {error}")
                continue
            first = first or Shown("first rewrite prompt", asked.text, len(asked.prompt_ids))
            writing.append(len(asked.prompt_ids))
            scoring.append(len(asked.teacher_prompt_ids))
        longest_prompt = rollouts.prompt_tokens.max if rollouts.prompt_tokens else 0
        mean_prompt = rollouts.prompt_tokens.mean if rollouts.prompt_tokens else 0.0
        draft = drafts.config.sampling.max_tokens
        room = config.sampling.max_tokens if asks else draft
        # A longer one is not kept.
        rewrite = min(room, int(config.filters.max_ratio * draft))
        longest_asked = max(writing, default=0) + draft + room if asks else 0
        scored = longest_prompt + rewrite + 1
        under = "prompt"
        if config.score_context == "rewrite":
            scored, under = max(scoring, default=0) + draft + rewrite + 1, "rewrite prompt + draft"
        notes = [
            _budget(
                f"rewrite prompt {max(writing, default=0):,} + draft {draft:,} + rewrite {room:,}",
                longest_asked,
                f"the teacher's context of {prepared.context:,}",
                prepared.context,
                "drafts that do not fit get the status too_long",
            ),
            _budget(
                f"scoring: {under} + rewrite",
                scored,
                f"the teacher's context of {prepared.context:,}",
                prepared.context,
                "rewrites that do not fit get the status too_long",
            ),
            *server_notes(config.engine),
        ]
        if not asks:
            del notes[0]
        known = learn_rollouts(drafts)
        rows = rollouts.rows or 0
        asked_about = rows if known is None else round(rows * (1 - known.truncated))
        contexts = round(rows * mean_prompt)
        if config.score_context == "rewrite":
            contexts += rows * (max(scoring, default=0) + draft)
        plan = predict(
            prepared,
            total=rows,
            owed=rows,
            asked=asked_about,
            contexts=contexts,
            kept_at_most=asked_about * rewrite,
            committed=0,
            shown=[] if first is None else [first],
            failing=len(reasons),
            reasons=first_reasons(reasons),
            details={"longest rewrite prompt + draft + rewrite": longest_asked},
            notes=notes,
        )
        learned = learn_rewrites(prepared)
        kept = None
        stored = config.num_candidates if config.choose == "all" else 1
        # Other rules or another choice keep another share.
        if learned is not None and learned.kept and learned.has(prepared.identity, _KEEPING):
            count = min(
                round(asked_about * config.num_candidates * learned.kept), asked_about * stored
            )
            kept = count, round(count * (mean_prompt + learned.kept_tokens))
        return plan, Ahead(
            drafts.identity["tokenizer"],
            asked_about * stored,
            longest_prompt,
            mean_prompt,
            rewrite,
            kept,
        )

    def _train_ahead(self, config: TrainConfig, ahead: Ahead) -> StagePlan:
        longest = ahead.longest_prompt + ahead.longest_rewrite
        plan = plan_train_ahead(
            config,
            self._model(config.student, config.revision, config.trust_remote_code),
            ahead.tokenizer,
            ahead.rows,
            longest,
            ahead.kept,
            round(ahead.rows * (ahead.mean_prompt + ahead.longest_rewrite)),
        )
        note = _budget(
            f"prompt {ahead.longest_prompt:,} + rewrite {ahead.longest_rewrite:,}",
            longest,
            f"pack_length {config.pack_length:,}",
            config.pack_length,
            "training would refuse a row that does not fit",
        )
        return dataclasses.replace(plan, notes=[note])


def _budget(parts: str, total: int, limit_name: str, limit: int, otherwise: str) -> str:
    """One line of the context budget."""
    fits = "fits" if total <= limit else f"OVER by {total - limit:,}: {otherwise}"
    return f"{parts} = {total:,} of {limit_name}: {fits}"


def show_pipeline(plan: PipelinePlan, as_json: bool, prompts: bool) -> None:
    """Prints a pipeline's plan; `prompts`: the first rendered ones too."""
    if as_json:
        click.echo(json.dumps(plan.as_json(), indent=2))
        return
    if prompts:
        for text in shown_text(list(plan.shown.values())):
            click.echo(f"{text}\n", err=True)
    click.echo(steps_table(plan.steps), err=True)
    lines = list(dict.fromkeys(plan.notes))
    sources: dict[str, list[str]] = {}
    for label, step in plan.steps:
        if step is not None and step.learned_from is not None:
            sources.setdefault(step.learned_from, []).append(label)
    lines += [f"learned from {source}: {', '.join(of)}" for source, of in sources.items()]
    owed = [step for _, step in plan.steps if step is not None and step.owed]
    click.echo("\n" + "\n".join(f"* {plain_lines(line)}" for line in lines), err=True)
    if any(step.tokens_expected is None or step.seconds is None for step in owed):
        click.echo(
            '\nWhat says "at most" or "not known" has no rows to learn from. Make a few of the'
            " first round's, then plan again; the pipeline goes on from them:\n",
            err=True,
        )
        few = [
            f"    {step.command} {shlex.join(step.settings)} --limit 64"
            for label, step in plan.steps
            if step is not None and step.command.startswith("mpd-gen") and "evaluate" not in label
        ]
        click.echo(plain_lines("\n".join(few[:2])), err=True)
