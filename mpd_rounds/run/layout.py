"""Where a pipeline run keeps each step's files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpd_rounds.run.baselines import Baseline
from mpd_rounds.run.steps import EvaluationSet, Pipeline, Step


@dataclass(frozen=True)
class BaselineFolder:
    """Where a baseline's rollouts on an evaluation set lie."""

    baseline: Baseline
    chosen: EvaluationSet
    folder: Path

    @property
    def name(self) -> str:
        return self.baseline.name

    @property
    def set(self) -> str:
        return self.chosen.name


@dataclass(frozen=True)
class Plan:
    """The steps of a pipeline, in order, in a run's folder."""

    pipeline: Pipeline
    out: Path

    def student(self, round_: int) -> str:
        """Return the model after `round_` rounds."""
        if round_ == 0:
            return self.pipeline.student
        return str(self.out / "train" / f"round{round_}" / "model")

    def data(self, round_: int) -> Path:
        """Return the folder of a round's rollouts and rewrites."""
        return self.out / "data" / f"round{round_}"

    def evaluation(self, round_: int, name: str) -> Path:
        label = "base" if round_ == 0 else f"round{round_}"
        return self.out / "eval" / f"{label}-{name}"

    def baseline_folders(self) -> list[BaselineFolder]:
        """Return the folder of each baseline on each of its evaluation sets."""
        return [
            BaselineFolder(b, chosen, self.out / "eval" / f"baseline-{b.name}-{chosen.name}")
            for b in self.pipeline.baseline
            for chosen in self.pipeline.evaluation
            if not b.sets or chosen.name in b.sets
        ]

    def examples(self, baseline: Baseline) -> Path:
        """Return the file with the examples of a baseline of the kind few_shot."""
        return self.out / "eval" / f"baseline-{baseline.name}.jsonl"

    def baselines(self, from_rewrites: bool) -> Iterator[Step]:
        """Yield the steps of the baselines: those that show rewrites of round 1, or the others."""
        for found in self.baseline_folders():
            baseline = found.baseline
            if baseline.shows_rewrites == from_rewrites:
                examples = self.examples(baseline)
                yield self.pipeline.baseline_step(baseline, found.chosen, found.folder, examples)

    def training(self, round_: int) -> Iterator[Step]:
        """Yield rollouts, rewrite and train of a round (from 1)."""
        p, data = self.pipeline, self.data(round_)
        student = self.student(round_ - 1)
        yield p.rollouts_step(student, round_, data)
        yield p.rewrite_step(student, round_, data)
        yield p.train_step(student, round_, data, self.out / "train" / f"round{round_}")

    def evaluations(self, round_: int) -> Iterator[Step]:
        """Yield the steps that sample held-out prompts from the student after `round_` rounds."""
        for chosen in self.pipeline.evaluation:
            out = self.evaluation(round_, chosen.name)
            yield self.pipeline.evaluation_step(chosen, self.student(round_), round_, out)

    def all_steps(self) -> list[Step]:
        """Return all steps in the order in which they run."""
        steps = [*self.evaluations(0), *self.baselines(from_rewrites=False)]
        for round_ in range(1, self.pipeline.rounds + 1):
            sampling, rewriting, training = self.training(round_)
            steps += [sampling, rewriting]
            if round_ == 1:
                steps += self.baselines(from_rewrites=True)
            steps += [training, *self.evaluations(round_)]
        return steps
