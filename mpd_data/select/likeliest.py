"""Let the student choose among the rewrites of a rollout: `--choose likeliest`.

It chooses the rewrite with the highest mean log-probability per token, end token included, after
its own prompt: the one that changes the student least. The choice is a second pass over the round
(second_pass.py) with the student's engine, after the teacher's engine has ended. Until then all
rewrites that passed the filters are "not_chosen", and training skips them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """Return the model that chooses: --student, or the model that sampled the drafts.

    sampler: that model's identity in the shards. tokenizer: its tokenizer's hash.
    weights: fetch and hash the weights, too.
    Raise ConfigError when the model does not exist, has changed, or cannot run on this machine.
    """
    if config.engine.backend == "openai":
        raise ConfigError(
            "--choose likeliest needs the student, which does not run on the teacher's server. Run"
            " with --choose all first, then with --refilter --choose likeliest and --backend vllm"
            " or transformers."
        )
    name = sampler["name"]
    if config.student is not None:
        student = resolve_model(config.student, None, config.trust_remote_code, weights)
    elif "served" in sampler:
        raise ConfigError(
            f"--choose likeliest: {name} sampled these drafts on a server. Give its folder or hub"
            " id as --student."
        )
    else:
        # A hub id's version ends with its commit.
        commit = None if Path(name).is_dir() else sampler["version"].rpartition("+")[2]
        try:
            student = resolve_model(name, commit, config.trust_remote_code, weights)
        except ConfigError as error:
            raise ConfigError(
                f"--choose likeliest needs the student that sampled the drafts: {error} Or give its"
                " present folder as --student."
            ) from error
        if weights and {**student.identity(), "name": name} != sampler:
            raise ConfigError(
                f"--choose likeliest: {name} has changed since it sampled these drafts. Give the"
                " model that will be trained as --student, or use another --choose."
            )
    own_tokenizer = load_tokenizer(student, config.trust_remote_code)
    require_same_tokenizer(tokenizer, own_tokenizer, f"the drafts of {config.shards}", student.name)
    return student


def waiting_rollouts(round_dir: RoundDir, paths: list[Path] | None = None) -> int:
    """Return how many rollouts of the round, or of its shards `paths`, wait for the choice."""
    # A scored row has tail_logprobs, the smallest of the score columns.
    rows = round_dir.rows("distill", ["rollout_id", "status", "tail_logprobs"], paths)
    groups = itertools.groupby(rows, key=lambda row: row["rollout_id"])
    return sum(bool(candidates(list(group))) for _, group in groups)


def candidates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rewrites of one rollout among which the student has to choose: those that passed
    and are scored, if none is kept yet."""
    if any(row["status"] == "ok" for row in rows):
        return []
    passed = (row for row in rows if row["status"] == "not_chosen")
    return [row for row in passed if row["tail_logprobs"] is not None]


def choose_rewrites(config: RewriteConfig) -> dict[str, int]:
    """Let the student choose in the round `config.shards`. Return the number of rows by status.

    Raise ConfigError like `choosing_student`, EngineError when the engine fails; the next call
    resumes from there.
    """
    round_dir = RoundDir(config.shards)
    with round_dir.lock("refilter"):
        choose_by_student(round_dir, config)
        return round_dir.count_statuses()


def choose_by_student(round_dir: RoundDir, config: RewriteConfig) -> None:
    """Do the work of `choose_rewrites`; the caller has locked the round. When no rollout waits,
    write nothing."""
    round_dir.recover("distill")
    if not waiting_rollouts(round_dir):
        return
    metadata = read_metadata(round_dir.shard_paths("distill")[0])
    student = choosing_student(config, metadata["student"], metadata["tokenizer"])
    entry = round_dir.run_info()["stages"]["distill"]
    earlier = entry.get("chosen_by")
    if earlier not in (None, student.identity()):
        raise ConfigError(
            f"{round_dir.path}: another student chose some of its rewrites (version"
            f" {earlier['version'][:12]}, now {student.version[:12]}). Give that one as --student,"
            " or choose all again: --refilter --choose first, then --refilter --choose likeliest."
        )
    rework(round_dir, _Choice(config, metadata, student), entry["identity"], student.identity())


@dataclass
class _Choice(Pass):
    """Score the rewrites that wait with the student, and keep the likeliest."""

    label = "choose"
    student: ModelFiles

    def judge(self, rows: list[Row]) -> list[Row]:
        """Return the first row of each different text; keep it if there is one text only."""
        waiting = candidates(rows)
        first_of = {row["rewrite"]: row for row in reversed(waiting)}
        if len(first_of) == 1:
            waiting[0]["status"] = "ok"
            return []
        return [row for row in waiting if row is first_of[row["rewrite"]]]

    def start_engine(self) -> Engine:
        config, student = self.config, self.student
        context = min(config.engine.max_model_len or student.context, student.context)
        engine = config.engine.model_copy(update={"max_model_len": context})
        return start_engine(student, engine, config.trust_remote_code, self.k)

    def decide(self, wanted: list[Row], scores: Mapping[str, Scores]) -> None:
        """Keep the likeliest; of several, the first. What the student cannot read comes last."""
        means = {row_id: score.target_logprobs.mean() for row_id, score in scores.items()}
        max(wanted, key=lambda row: means.get(row["row_id"], -math.inf))["status"] = "ok"
