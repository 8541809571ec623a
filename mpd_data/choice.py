"""`--choose likeliest`: of a rollout's rewrites, the one that the student itself finds likeliest.

It is the one that moves the student least. Likelihood is the mean log-probability per token, end
token included, after the student's own prompt. A rollout waits for this choice while its rewrites
that passed are all "not_chosen"; nothing of it is trained on. The choice is a pass over the
round (mpd_data/rework.py) with the student's engine, which starts when the teacher's has ended.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mpd_data.config import RewriteConfig
from mpd_data.engine import Engine, Scores, start_engine
from mpd_data.errors import ConfigError
from mpd_data.models import ModelFiles, resolve_model
from mpd_data.rework import Pass, put_in_place, rework
from mpd_data.shards import RoundDir, read_metadata


def choosing_student(
    config: RewriteConfig, sampler: Mapping[str, str], weights: bool = True
) -> ModelFiles:
    """The model that chooses: --student, or else `sampler`, what the shards say of the model that
    sampled the drafts. Without `weights` it is only looked whether it is there.

    Raises ConfigError where it is not, or not the same any more, or cannot run here.
    """
    if config.engine.backend == "openai":
        raise ConfigError(
            "--choose likeliest: the student chooses, and it does not run on the teacher's server."
            " Keep all that pass (--choose all), then run it again with --refilter --choose"
            " likeliest and a backend of this machine."
        )
    if config.student is not None:
        return resolve_model(config.student, None, config.trust_remote_code, weights)
    name = sampler["name"]
    # A hub id's version is its commit.
    commit = None if Path(name).is_dir() else sampler["version"]
    try:
        student = resolve_model(name, commit, config.trust_remote_code, weights)
    except ConfigError as error:
        raise ConfigError(
            f"--choose likeliest needs the student that sampled the drafts: {error} Or give where"
            " it lies now as --student."
        ) from error
    if weights and {**student.identity(), "name": name} != sampler:
        raise ConfigError(
            f"--choose likeliest: {name} has changed since it sampled these drafts. Give the model"
            " that is to be trained as --student, or choose otherwise."
        )
    return student


def waiting_rollouts(round_dir: RoundDir) -> int:
    """Rollouts of the round that wait for the student's choice."""
    rows = round_dir.rows("distill", ["rollout_id", "status"])
    groups = itertools.groupby(rows, key=lambda row: row["rollout_id"])
    return sum(bool(_candidates(list(group))) for _, group in groups)


def choose_rewrites(config: RewriteConfig) -> dict[str, int]:
    """Lets the student choose in the round `config.shards`; rows by status afterwards.

    Raises ConfigError like `choosing_student`, EngineError when the engine dies: run it again.
    """
    round_dir = RoundDir(config.shards)
    with round_dir.lock("refilter"):
        # A kill while an earlier choice was put in place.
        put_in_place(round_dir, config)
        choose_by_student(round_dir, config)
        return round_dir.count_statuses()


def choose_by_student(round_dir: RoundDir, config: RewriteConfig) -> None:
    """`choose_rewrites` for who holds the round. Without a rollout that waits there is no engine,
    and nothing is written."""
    round_dir.recover("distill")
    if not waiting_rollouts(round_dir):
        return
    metadata = read_metadata(round_dir.shard_paths("distill")[0])
    identity = round_dir.run_info()["stages"]["distill"]["identity"]
    rework(round_dir, _Choice(config, metadata), identity)


def _candidates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the student is to choose among, of one rollout's rewrites; nothing where one is kept."""
    if any(row["status"] == "ok" for row in rows):
        return []
    return [row for row in rows if row["status"] == "not_chosen"]


@dataclass
class _Choice(Pass):
    label: ClassVar[str] = "choose"
    k: int = 1
    _means: dict[str, float] = field(default_factory=dict)

    def judge(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first of each different text."""
        candidates = _candidates(rows)
        first_of = {row["rewrite"]: row for row in reversed(candidates)}
        if len(first_of) == 1:
            candidates[0]["status"] = "ok"
            return []
        return [row for row in candidates if row is first_of[row["rewrite"]]]

    def start_engine(self) -> Engine:
        config = self.config
        student = choosing_student(config, self.metadata["student"])
        context = min(config.engine.max_model_len or student.context, student.context)
        engine = config.engine.model_copy(update={"max_model_len": context})
        return start_engine(student, engine, config.trust_remote_code, self.k)

    def context_of(self, row: dict[str, Any]) -> list[int]:
        ids: list[int] = row["input_ids"][: row["loss_start"]].tolist()
        return ids

    def note(self, row: dict[str, Any], scores: Scores) -> None:
        self._means[row["row_id"]] = float(scores.target_logprobs.mean())

    def decide(self, rows: list[dict[str, Any]]) -> None:
        scored = [row for row in rows if row["row_id"] in self._means]
        if scored:
            # Ties go to the first.
            max(scored, key=lambda row: self._means[row["row_id"]])["status"] = "ok"
        for row in scored:
            del self._means[row["row_id"]]
