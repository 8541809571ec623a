"""Where a pipeline run keeps each step's files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpd_rounds.run.steps import Pipeline, Step


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

    def evaluation(self, round_: int, name: str) -> Path:
        label = "base" if round_ == 0 else f"round{round_}"
        return self.out / "eval" / f"{label}-{name}"

    def training(self, round_: int) -> Iterator[Step]:
        """Yield rollouts, rewrite and train of a round (from 1)."""
        p, data = self.pipeline, self.out / "data" / f"round{round_}"
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
        steps = list(self.evaluations(0))
        for round_ in range(1, self.pipeline.rounds + 1):
            steps += [*self.training(round_), *self.evaluations(round_)]
        return steps
