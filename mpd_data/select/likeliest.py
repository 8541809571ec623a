"""`--choose likeliest`: of a rollout's rewrites, the one that the student itself finds likeliest.

It is the one that moves the student least. Likelihood is the mean log-probability per token, end
token included, after the student's own prompt. A rollout waits for this choice while its rewrites
that passed are all "not_chosen"; nothing of it is trained on. The choice is a pass over the
round (second_pass.py) with the student's engine, which starts when the teacher's has ended.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import ModelFiles, load_tokenizer, require_same_tokenizer, resolve_model
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Engine, Scores
from mpd_data.engines.start import start_engine
from mpd_data.select.second_pass import Pass, Row, rework
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata


def choosing_student(
    config: RewriteConfig, sampler: Mapping[str, str], tokenizer: str, weights: bool = True
) -> ModelFiles:
    """The model that chooses: --student, or else the one that sampled the drafts, of which the
    shards say `sampler`, and by `tokenizer` what its tokens are (`models.tokenizer_hash`). Without
    `weights` it is only looked whether it is there.

    Raises ConfigError where it is not, or not the same any more, or cannot run here.
    """
    if config.engine.backend == "openai":
        raise ConfigError(
            "--choose likeliest: the student chooses, and it does not run on the teacher's server."
            " Keep all that pass (--choose all), then run it again with --refilter --choose"
            " likeliest and a backend of this machine."
        )
    name = sampler["name"]
    if config.student is not None:
        student = resolve_model(config.student, None, config.trust_remote_code, weights)
    elif "served" in sampler:
        raise ConfigError(
            f"--choose likeliest: {name} sampled these drafts on a server. Give the model, as it"
            " lies on this machine or the hub, as --student."
        )
    else:
        # A hub id's version ends with its commit.
        commit = None if Path(name).is_dir() else sampler["version"].rpartition("+")[2]
        try:
            student = resolve_model(name, commit, config.trust_remote_code, weights)
        except ConfigError as error:
            raise ConfigError(
                f"--choose likeliest needs the student that sampled the drafts: {error} Or give"
                " where it lies now as --student."
            ) from error
        if weights and {**student.identity(), "name": name} != sampler:
            raise ConfigError(
                f"--choose likeliest: {name} has changed since it sampled these drafts. Give the"
                " model that is to be trained as --student, or choose otherwise."
            )
    found = load_tokenizer(student, config.trust_remote_code)
    require_same_tokenizer(tokenizer, found, f"the drafts of {config.shards}", student.name)
    return student


def waiting_rollouts(round_dir: RoundDir, paths: list[Path] | None = None) -> int:
    """Rollouts of the round, or of its shards at `paths`, that wait for the student's choice."""
    # The tails are there where the scores are, and are the smallest of their columns.
    rows = round_dir.rows("distill", ["rollout_id", "status", "tail_logprobs"], paths)
    groups = itertools.groupby(rows, key=lambda row: row["rollout_id"])
    return sum(bool(candidates(list(group))) for _, group in groups)


def candidates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the student is to choose among, of one rollout's rewrites: those that passed and are
    scored, where none is kept."""
    if any(row["status"] == "ok" for row in rows):
        return []
    passed = (row for row in rows if row["status"] == "not_chosen")
    return [row for row in passed if row["tail_logprobs"] is not None]


def choose_rewrites(config: RewriteConfig) -> dict[str, int]:
    """Lets the student choose in the round `config.shards`; rows by status afterwards.

    Raises ConfigError like `choosing_student`, EngineError when the engine dies: run it again.
    """
    round_dir = RoundDir(config.shards)
    with round_dir.lock("refilter"):
        choose_by_student(round_dir, config)
        return round_dir.count_statuses()


def choose_by_student(round_dir: RoundDir, config: RewriteConfig) -> None:
    """`choose_rewrites` for who holds the round. Where no rollout waits nothing is written."""
    round_dir.recover("distill")
    if not waiting_rollouts(round_dir):
        return
    metadata = read_metadata(round_dir.shard_paths("distill")[0])
    student = choosing_student(config, metadata["student"], metadata["tokenizer"])
    entry = round_dir.run_info()["stages"]["distill"]
    before = entry.get("chosen_by")
    if before not in (None, student.identity()):
        raise ConfigError(
            f"{round_dir.path}: a part of its rewrites was chosen by another student (version"
            f" {before['version'][:12]}, now {student.version[:12]}). Give that one as --student;"
            " or choose all anew: --refilter --choose first, then --refilter --choose likeliest."
        )
    work = _Choice(config, metadata, student)
    rework(round_dir, work, entry["identity"], chosen_by=student.identity())


class _Choice(Pass):
    label = "choose"
    k = 1

    def __init__(
        self, config: RewriteConfig, metadata: dict[str, Any], student: ModelFiles
    ) -> None:
        super().__init__(config, metadata)
        self._student = student

    def judge(self, rows: list[Row]) -> list[Row]:
        """The first of each different text."""
        waiting = candidates(rows)
        first_of = {row["rewrite"]: row for row in reversed(waiting)}
        if len(first_of) == 1:
            waiting[0]["status"] = "ok"
            return []
        return [row for row in waiting if row is first_of[row["rewrite"]]]

    def start_engine(self) -> Engine:
        config, student = self.config, self._student
        context = min(config.engine.max_model_len or student.context, student.context)
        engine = config.engine.model_copy(update={"max_model_len": context})
        return start_engine(student, engine, config.trust_remote_code, self.k)

    def context_of(self, row: Row) -> list[int]:
        ids: list[int] = row["input_ids"][: row["loss_start"]].tolist()
        return ids

    def decide(self, wanted: list[Row], scores: Mapping[str, Scores]) -> None:
        """Keep the likeliest; of several, the first. What the student cannot read comes last."""
        means = {row_id: score.target_logprobs.mean() for row_id, score in scores.items()}
        max(wanted, key=lambda row: means.get(row["row_id"], -math.inf))["status"] = "ok"
