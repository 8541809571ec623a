"""Plan a whole pipeline without running it: every stage of every round, and the evaluations.

A stage whose inputs exist is planned by its own dry run. A later stage is planned as far as it can
be known: the student of a later round has the tokenizer and context of the first, drafts are as
long as they may be. Lengths, speeds and the share of kept rows are those of the stage's own rows,
or else of the same stage in the newest earlier round.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from mpd_data.common.models import ModelFiles, resolve_model
from mpd_data.common.text import json_text, plain_lines
from mpd_data.config import RewriteConfig, RolloutsConfig
from mpd_data.dryrun.learned import Learned, learn
from mpd_data.dryrun.plan import Lengths, Shown, StagePlan
from mpd_data.dryrun.rewrite import notes_on, plan_rewrite, predict
from mpd_data.dryrun.rollouts import plan_rollouts
from mpd_data.dryrun.show import few_rows, free_bytes, shown_text, size_text, steps_table, totals
from mpd_data.inspect.compare import graded, per_problem
from mpd_data.prompts.chat import PromptError
from mpd_data.prompts.rows import Prompt
from mpd_data.rewrite_setup import setup as rewrite_setup
from mpd_data.rollouts import RolloutSetup, read_prompts
from mpd_data.rollouts import setup as rollout_setup
from mpd_data.store.round import RoundDir
from mpd_rounds.run.few_shot import COUNT
from mpd_rounds.run.gate import decide, size_note
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.runner import Finished
from mpd_rounds.run.steps import Pipeline, Step
from mpd_train.config import TrainConfig
from mpd_train.dryrun.plan import RoundAhead, learn_steps, plan_train, plan_train_ahead
from mpd_train.setup import setup as train_setup

_DRAFT = "(the draft)"
# The settings that decide which prompts are read.
_SOURCE = {
    "prompts", "prompt_column", "id_column", "answer_column", "metadata_columns", "duplicates",
    "checker", "answer_formats",
}  # fmt: skip
# The rate of a command.
_RATE_OF = {"mpd-gen rollouts": "rollouts", "mpd-gen rewrite": "rewrite", "mpd-train": "train"}


@dataclass
class PipelinePlan:
    """Each step with its plan, None where it has finished; the first rendered prompts by name;
    notes."""

    out: Path
    steps: list[tuple[str, StagePlan | None]] = field(default_factory=list)
    shown: dict[str, Shown] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, label: str, plan: StagePlan | None) -> None:
        self.steps.append((label, plan))
        if plan is not None:
            for item in plan.shown:
                self.shown.setdefault(item.name, item)
            notes = [*plan.reasons, *([plan.refusal] if plan.refusal else []), *plan.notes]
            self.notes += [f"{label}: {note}" for note in notes]

    def remaining(self) -> list[StagePlan]:
        """Return the plans of the steps that have not finished."""
        return [plan for _, plan in self.steps if plan is not None]

    def as_json(self) -> dict[str, Any]:
        steps = [
            {"label": label, "done": plan is None, "plan": plan and asdict(plan)}
            for label, plan in self.steps
        ]
        total = totals(self.remaining())
        return {"out": str(self.out), "steps": steps, "total": total, "notes": self.notes}


def plan_pipeline(
    pipeline: Pipeline, out: Path, rates: Mapping[str, float] | None = None
) -> PipelinePlan:
    """Plan and check the steps of `pipeline` that have not finished in `out`. `rates`: tokens per
    second of a stage (rollouts, rewrite, train), in place of the recorded ones. Raise what a stage
    would raise before it starts its engine."""
    planner = _Planner(pipeline, out)
    result = PipelinePlan(out, notes=[*pipeline.changes_text(), *planner.engines_apart()])
    planner.evaluate(result, 0)
    planner.baselines(result, from_rewrites=False)
    if pipeline.gate is not None:
        result.notes.append(planner.size_of_gate(result))
    for round_ in range(1, pipeline.rounds + 1):
        planner.train(result, round_)
        planner.evaluate(result, round_)
        if planner.is_stopped(round_):
            result.notes.append(f"gate: round {round_} was the last; see {out / 'gate.json'}")
            break
    if rates:
        result.steps = [(label, plan and _at_rate(plan, rates)) for label, plan in result.steps]
    needed = sum(plan.disk_bytes or 0 for plan in result.remaining())
    if needed > (free := free_bytes(out)):
        result.notes.append(
            f"{out}: all steps may take {size_text(needed)} of disk, {size_text(free)} are free."
        )
    return result


def _at_rate(plan: StagePlan, rates: Mapping[str, float]) -> StagePlan:
    """Return `plan` with the time that its tokens take at the rate given for its stage."""
    rate = rates.get(_RATE_OF[plan.command])
    if rate is None or plan.tokens is None:
        return plan
    device = f"{rate:,.0f} tokens/s, given"
    return dataclasses.replace(plan, seconds=round(plan.tokens / rate, 1), device=device)


class _Planner:
    def __init__(self, pipeline: Pipeline, out: Path) -> None:
        self._pipeline = pipeline
        self._commands = Plan(pipeline, out)
        self._commands.all_steps()
        self._finished = Finished(out)
        self._prompts: dict[str, list[Prompt]] = {}
        # What the newest rows of a stage tell, by the stage's label without its round.
        self._newest: dict[str, Learned] = {}

    def _learn(self, step: Step) -> Learned | None:
        """Return what the rows of `step` tell, or else those of the same step in a round before."""
        config, stage = step.config, step.label.partition(": ")[2]
        if isinstance(config, TrainConfig):
            learned = learn_steps(config.out)
        elif isinstance(config, RewriteConfig):
            learned = learn(RoundDir(config.shards), "distill", config.engine.backend)
        else:
            learned = learn(RoundDir(config.out), "rollouts", config.engine.backend)
        if learned is not None:
            self._newest[stage] = learned
        return self._newest.get(stage)

    def engines_apart(self) -> list[str]:
        """Return a note for each step that samples the first student with another engine than the
        first such step, and so cannot use its engine."""
        first, *others = (
            step
            for step in self._commands.all_steps()
            if isinstance(step.config, RolloutsConfig)
            and step.config.model == self._pipeline.student
        )
        notes = []
        for step in others:
            mine, its = map(_engine_settings, (step, first))
            if unlike := [name for name in mine if mine[name] != its[name]]:
                notes.append(
                    f"{step.label}: has another {' and '.join(unlike)} than {first.label}, so the"
                    " student's engine starts once more"
                )
        return notes

    def baselines(self, result: PipelinePlan, from_rewrites: bool) -> None:
        """Plan the baselines that show rewrites of round 1, or the others."""
        for step in self._commands.baselines(from_rewrites):
            config, label = step.config, step.label
            assert isinstance(config, RolloutsConfig)
            if self._finished.holds(step):
                result.add(label, None)
                continue
            if from_rewrites and config.examples is not None and not config.examples.exists():
                # The rewrites that it shows are yet to be made.
                config = config.model_copy(update={"examples": None})
            # As long as the base's rows, if it has none of its own.
            learned = self._newest.get(label.partition(": ")[2])
            plan, setup = self._rollouts(dataclasses.replace(step, config=config), learned)
            if config is not step.config:
                budget = self._examples(plan, setup)
                plan = dataclasses.replace(plan, notes=[*plan.notes, budget], shown=[])
            name, before = label.partition(":")[0], [x.text for x in result.shown.values()]
            shown = [
                dataclasses.replace(x, name=f"{x.name}, {name}")
                for x in plan.shown
                if x.text not in before
            ]
            result.add(label, dataclasses.replace(plan, shown=shown))

    def _examples(self, plan: StagePlan, setup: RolloutSetup) -> str:
        """Return the context budget of prompts to which rewrites will be added that do not exist
        yet."""
        _, rewriting, _ = self._commands.training(1)
        assert isinstance(rewriting.config, RewriteConfig)
        prompt = (plan.prompt_tokens or Lengths(0.0, 0)).max
        rewrite, room = rewriting.config.sampling.max_tokens, setup.config.sampling.max_tokens
        parts = f"{COUNT} x (prompt {prompt:,} + rewrite {rewrite:,}) + prompt + sampled {room:,}"
        total = COUNT * (prompt + rewrite) + prompt + room
        limit = f"the student's context of {setup.context:,}"
        return _budget(parts, total, limit, setup.context, "problems that do not fit are left out")

    def evaluate(self, result: PipelinePlan, round_: int) -> None:
        """Plan the evaluations of the student after `round_` rounds."""
        for step in self._commands.evaluations(round_):
            learned = self._learn(step)
            done = self._finished.holds(step)
            result.add(step.label, None if done else self._rollouts(step, learned)[0])

    def size_of_gate(self, result: PipelinePlan) -> str:
        """Return how many problems the gate needs, beside those of its evaluation, which is planned
        in `result`."""
        commands, gated = self._commands, self._pipeline.gated
        assert self._pipeline.gate is not None
        (step,) = (s for s in commands.evaluations(0) if s.out == commands.evaluation(0, gated))
        assert isinstance(step.config, RolloutsConfig)
        samples, plan = step.config.num_samples, dict(result.steps)[step.label]
        problems = graded(per_problem(step.out)).height if plan is None else plan.rows // samples
        return size_note(commands, self._pipeline.gate, problems, samples, plan is None)

    def is_stopped(self, round_: int) -> bool:
        """Return whether the gate has stopped the run after a round."""
        gate, steps = self._pipeline.gate, self._commands.evaluations
        if gate is None or not all(map(self._finished.holds, (*steps(0), *steps(round_)))):
            return False
        return not decide(self._commands, gate, round_).goes_on

    def train(self, result: PipelinePlan, round_: int) -> None:
        """Plan rollouts, rewrite and training of a round."""
        sampling, rewriting, training = self._commands.training(round_)
        of_drafts, of_rewrites, of_steps = map(self._learn, (sampling, rewriting, training))
        drafts = None if self._finished.holds(sampling) else self._rollouts(sampling, of_drafts)
        result.add(sampling.label, drafts and drafts[0])
        plan = ahead = None
        if not self._finished.holds(rewriting):
            assert isinstance(rewriting.config, RewriteConfig)
            drafts_exist = drafts is None or not (drafts[0].remaining or drafts[0].refusal)
            if drafts_exist:
                with self._pipeline.explaining(rewriting):
                    setup = rewrite_setup(rewriting.config, weights=False)
                    plan = plan_rewrite(setup, learned=of_rewrites)
            if plan is None or plan.remaining:
                # The training's rows are those of rewrites to come.
                drafts = drafts or self._rollouts(sampling, of_drafts)
                with self._pipeline.explaining(rewriting):
                    planned, ahead = self._rewrite(
                        rewriting.config, *drafts, of_drafts, of_rewrites
                    )
                plan = plan or planned
        result.add(rewriting.label, plan)
        if round_ == 1:
            self.baselines(result, from_rewrites=True)
        plan = None
        if not self._finished.holds(training):
            assert isinstance(training.config, TrainConfig)
            with self._pipeline.explaining(training):
                if ahead is None:
                    plan = plan_train(train_setup(training.config, weights=False), learned=of_steps)
                else:
                    plan = self._train(training.config, ahead, of_steps)
        result.add(training.label, plan)

    def _ahead(
        self, name: str, config: RolloutsConfig | RewriteConfig | TrainConfig
    ) -> ModelFiles | None:
        """Return the files of the first student for a model that is not trained yet, else None."""
        first = self._pipeline.student
        if name in (first, self._pipeline.teacher) or Path(name).is_dir():
            return None
        files = resolve_model(first, config.revision, config.trust_remote_code, weights=False)
        return dataclasses.replace(files, name=name, version="unhashed")

    def _rollouts(self, step: Step, learned: Learned | None) -> tuple[StagePlan, RolloutSetup]:
        config = step.config
        assert isinstance(config, RolloutsConfig)
        key = config.model_dump_json(include=_SOURCE)
        with self._pipeline.explaining(step):
            if key not in self._prompts:
                self._prompts[key] = read_prompts(config)
            model = self._ahead(config.model, config)
            setup = rollout_setup(config, weights=False, model=model, prompts=self._prompts[key])
            return plan_rollouts(setup, learned=learned), setup

    def _rewrite(
        self, config: RewriteConfig, rollouts: StagePlan, drafts: RolloutSetup,
        of_drafts: Learned | None, learned: Learned | None,
    ) -> tuple[StagePlan, RoundAhead]:  # fmt: skip
        """Plan the rewrite of rollouts that do not exist yet."""
        teacher = self._ahead(config.teacher, config)
        setup = rewrite_setup(config, weights=False, student=drafts.metadata(), teacher=teacher)
        asks = setup.template.asks
        if asks:
            setup.template.layout(bool(drafts.formatter.thinking))
        shown: list[Shown] = []
        longest_asked = longest_scored = 0
        reasons: list[str] = []
        for prompt in drafts.prompts if asks else ():
            if prompt.flaw is not None:
                continue  # it will have no draft
            try:
                request = setup.ask(prompt.text, _DRAFT)
            except PromptError as error:
                reasons.append(f"{prompt.source}: {error}")
                continue
            length = len(request.prompt_ids)
            shown = shown or [Shown("first rewrite prompt", request.text, length)]
            longest_asked = max(longest_asked, length)
            longest_scored = max(longest_scored, len(request.teacher_prompt_ids))
        prompts = rollouts.prompt_tokens or Lengths(0.0, 0)
        draft = drafts.config.sampling.max_tokens
        room = config.sampling.max_tokens if asks else draft
        # The filter rejects a longer one.
        rewrite = min(room, int(config.filters.largest_ratio * draft))
        notes, in_all, teachers = [], 0, f"the teacher's context of {setup.context:,}"
        if asks:
            in_all = longest_asked + draft + room
            parts = f"rewrite prompt {longest_asked:,} + draft {draft:,} + rewrite {room:,}"
            what = "are cut" if config.cut_drafts else "get the status too_long"
            dropped = f"drafts that do not fit {what}"
            notes.append(_budget(parts, in_all, teachers, setup.context, dropped))
        rows = rollouts.rows
        truncated = 0.0 if of_drafts is None or config.cut_drafts else of_drafts.truncated
        asked = round(rows * (1 - truncated))
        contexts, parts, context = round(rows * prompts.mean), "prompt", prompts.max
        if config.score_context != "problem":
            parts, context = "rewrite prompt + draft", longest_scored + draft
            contexts += rows * context
        dropped = "rewrites that do not fit get the status too_long"
        parts, scored = f"scoring: {parts} + rewrite", context + rewrite + 1
        notes.append(_budget(parts, scored, teachers, setup.context, dropped))
        plan = predict(
            setup,
            learned,
            asked=asked,
            contexts=contexts,
            kept_at_most=asked * rewrite,
            rows=rows,
            committed=0,
            remaining=rows,
            shown=shown,
            reasons=reasons,
            details={"longest rewrite prompt + draft + rewrite": in_all},
            notes=[*notes, *notes_on(setup)],
        )
        most = asked * (config.num_candidates if config.choose == "all" else 1)
        expected = None
        if learned is not None and learned.kept:
            kept = min(round(asked * config.num_candidates * learned.kept), most)
            expected = kept, round(kept * (prompts.mean + learned.kept_tokens))
        tokenizer, tokens = drafts.identity["tokenizer"], round(most * (prompts.mean + rewrite))
        return plan, RoundAhead(
            tokenizer, config.score_context, most, tokens, prompts.max, rewrite, expected
        )

    def _train(self, config: TrainConfig, ahead: RoundAhead, learned: Learned | None) -> StagePlan:
        student = self._ahead(config.student, config) or resolve_model(
            config.student, config.revision, config.trust_remote_code, weights=False
        )
        prompt, rewrite, room = ahead.longest_prompt, ahead.longest_rewrite, config.pack_length
        parts, limit = f"prompt {prompt:,} + rewrite {rewrite:,}", f"pack_length {room:,}"
        dropped = "training does not start with a row that does not fit"
        note = _budget(parts, prompt + rewrite, limit, room, dropped)
        return dataclasses.replace(plan_train_ahead(config, student, ahead, learned), notes=[note])


def _engine_settings(step: Step) -> dict[str, Any]:
    assert not isinstance(step.config, TrainConfig)
    return {"workers": step.config.parts.workers, **step.config.engine.model_dump()}


def _budget(parts: str, total: int, limit_name: str, limit: int, otherwise: str) -> str:
    """Return one line of the context budget."""
    fits = "fits" if total <= limit else f"OVER by {total - limit:,}: {otherwise}"
    return f"{parts} = {total:,} of {limit_name}: {fits}"


def show_pipeline(plan: PipelinePlan, as_json: bool) -> None:
    """Print a pipeline's plan: as JSON or as text. Raise Exit with code 1 where a step would end
    without a result."""
    click.echo(json_text(plan.as_json()) if as_json else _text(plan))
    if any(step.refusal is not None for step in plan.remaining()):
        raise click.exceptions.Exit(1)


def _text(plan: PipelinePlan) -> str:
    lines = list(dict.fromkeys(plan.notes))
    sources: dict[str, list[str]] = {}
    for label, step in plan.steps:
        if step is not None and step.learned_from is not None:
            sources.setdefault(step.learned_from, []).append(label)
    lines += [f"learned from {source}: {', '.join(labels)}" for source, labels in sources.items()]
    notes = "\n".join(f"* {plain_lines(line)}" for line in lines)
    parts = [*shown_text(list(plan.shown.values())), f"{steps_table(plan.steps)}\n\n{notes}"]
    remaining = [step for step in plan.remaining() if step.remaining]
    if any(step.is_bound or step.seconds is None for step in remaining):
        parts.append(
            'Steps with "at most" or "not known" have no rows yet. Make a few rows of the first'
            " round, then plan again; the pipeline continues from them:"
        )
        few = [
            f"    {step.command} {shlex.join(step.settings)} {few_rows(step)}".rstrip()
            for label, step in plan.steps
            if step is not None and step.command.startswith("mpd-gen") and "evaluate" not in label
        ]
        parts.append(plain_lines("\n".join(few[:2])))
    return "\n\n".join(parts)
