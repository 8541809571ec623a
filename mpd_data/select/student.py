"""Let the student have the last word on the rewrites of a rollout that the teacher has scored.

It measures how well each carries its answer (support.py), for `--min-support`, `--min-step` and
`--choose support`; and with `--choose likeliest` it chooses the one with the highest mean
log-probability per token, end token included, after its own prompt: the one that changes the
student least. This is a second pass over the round (second_pass.py) with the student's engine,
after the teacher's engine has ended. Until then all rewrites that passed the other filters are
"not_chosen", and training skips them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import ModelFiles, load_tokenizer, require_same_tokenizer, resolve_model
from mpd_data.common.weights import require_whole
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Engine
from mpd_data.engines.start import require_scores, start_engine
from mpd_data.select.filters import choose_among, status_of
from mpd_data.select.second_pass import (
    CHOSEN_BY,
    MEASURED_BY,
    Group,
    Pass,
    Request,
    Row,
    prompt_of,
    rework,
    trace_of,
)
from mpd_data.select.support import NOWHERE, NUM_ALTERNATIVES, Measure, Places
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata

# Added to a row's key for the request that scores the answer alone.
_ALONE = "/answer"


def choosing_student(
    config: RewriteConfig, sampler: Mapping[str, str], tokenizer: str, weights: bool = True
) -> ModelFiles:
    """Return the model that measures and chooses: --student, or the model that sampled the drafts.

    sampler: that model's identity in the shards. tokenizer: its tokenizer's hash.
    weights: fetch and hash the weights, too.
    Raise ConfigError when the model does not exist, has changed, or cannot run on this machine.
    """
    option = config.student_option
    if config.engine.backend == "openai":
        raise ConfigError(
            f"{option} needs the student, which does not run on the teacher's server. Run without"
            f" it and with --choose all first, then with --refilter, {option} and --backend vllm or"
            " transformers."
        )
    name = sampler["name"]
    if config.student is not None:
        student = resolve_model(config.student, None, config.trust_remote_code, weights)
    elif "served" in sampler:
        raise ConfigError(
            f"{option}: {name} sampled these drafts on a server. Give its folder or hub"
            " id as --student."
        )
    else:
        # A hub id's version ends with its commit.
        commit = None if Path(name).is_dir() else sampler["version"].rpartition("+")[2]
        try:
            student = resolve_model(name, commit, config.trust_remote_code, weights)
        except ConfigError as error:
            raise ConfigError(
                f"{option} needs the student that sampled the drafts: {error} Or give its"
                " present folder as --student."
            ) from error
        if weights and {**student.identity(), "name": name} != sampler:
            raise ConfigError(
                f"{option}: {name} has changed since it sampled these drafts. Give the model that"
                f" will be trained as --student, or leave {option} out."
            )
    own_tokenizer = load_tokenizer(student, config.trust_remote_code)
    drafts = f"the drafts of {config.shards}"
    require_same_tokenizer(tokenizer, own_tokenizer, drafts, student.name, name)
    require_whole(student, config.trust_remote_code)
    require_scores(student, config.engine)
    return student


def waiting_rollouts(round_dir: RoundDir, paths: list[Path] | None = None) -> int:
    """Return how many rollouts of the round, or of its shards `paths`, wait for the student."""
    # A scored row has tail_logprobs, the smallest of the score columns.
    rows = round_dir.rows("distill", ["rollout_id", "status", "tail_logprobs"], paths)
    groups = itertools.groupby(rows, key=lambda row: row["rollout_id"])
    return sum(bool(candidates(list(group))) for _, group in groups)


def candidates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rewrites of one rollout that wait for the student: those that passed and are
    scored, if none is kept yet."""
    if any(row["status"] == "ok" for row in rows):
        return []
    passed = (row for row in rows if row["status"] == "not_chosen")
    return [row for row in passed if row["tail_logprobs"] is not None]


def ask_student(config: RewriteConfig) -> dict[str, int]:
    """Let the student measure and choose in the round `config.shards`. Return the number of rows by
    status.

    Raise ConfigError like `choosing_student`, EngineError when the engine fails; the next call
    resumes from there.
    """
    round_dir = RoundDir(config.shards)
    with round_dir.lock("refilter"):
        decide_by_student(round_dir, config)
        return round_dir.count_statuses()


def decide_by_student(round_dir: RoundDir, config: RewriteConfig) -> None:
    """Do the work of `ask_student`; the caller has locked the round. When no rollout waits, write
    nothing."""
    round_dir.recover("distill")
    if not waiting_rollouts(round_dir):
        return
    metadata = read_metadata(round_dir.shard_paths("distill")[0])
    student = choosing_student(config, metadata["student"], metadata["tokenizer"])
    entry = round_dir.run_info()["stages"]["distill"]
    own = student.identity()
    earlier = entry.get(CHOSEN_BY) or (entry.get(MEASURED_BY) if config.measures else None)
    if earlier not in (None, own):
        raise ConfigError(
            f"{round_dir.path}: another student judged some of its rewrites (version"
            f" {earlier['version'][:12]}, now {student.version[:12]}). Give that one as --student,"
            f" or begin again: --refilter --choose first, then --refilter {config.student_option}."
        )
    measured_by = own if config.measures else entry.get(MEASURED_BY)
    rework(round_dir, _Student(config, metadata, student), entry["identity"], own, measured_by)


@dataclass
class _Student(Pass):
    """Score the rewrites that wait with the student; measure, filter and choose by that."""

    label = "choose"
    student: ModelFiles
    _measure: Measure | None = field(default=None, init=False)
    # Of the rewrites that are being measured, by row_id.
    _places: dict[str, Places] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.config.measures:
            self.k = NUM_ALTERNATIVES
            self._measure = Measure(load_tokenizer(self.student, self.config.trust_remote_code))

    def judge(self, rows: list[Row]) -> list[Row]:
        """Return the rewrites to score: those that are not measured, and of those among which the
        likeliest is chosen the first of each different text."""
        waiting = candidates(rows)
        wanted = {}
        if self._measure is not None:
            for row in waiting:
                places = self._measure.places(
                    prompt_of(row), trace_of(row)[:-1], row["rewrite_answer"]
                )
                if (places.steps and row["weakest_step"] is None) or (
                    places.answers and row["answer_support"] is None
                ):
                    self._places[row["row_id"]] = places
                    wanted[row["row_id"]] = row
        if self.config.choose == "likeliest":
            first_of = {row["rewrite"]: row for row in reversed(waiting)}
            if len(first_of) > 1:
                wanted |= {row["row_id"]: row for row in first_of.values()}
        return list(wanted.values())

    def start_engine(self) -> Engine:
        config, student = self.config, self.student
        context = min(config.engine.max_model_len or student.context, student.context)
        engine = config.engine.model_copy(update={"max_model_len": context})
        return start_engine(student, engine, config.trust_remote_code, self.k)

    def requests(self, row: Row) -> list[Request]:
        """The trace; and to measure it, its answer alone after the lead-in."""
        requests, trace = super().requests(row), trace_of(row)
        places = self._places.get(row["row_id"], NOWHERE)
        if self._measure is not None and places.answers:
            alone = self._measure.alone(places, prompt_of(row), trace)
            requests.append(Request(row["row_id"] + _ALONE, *alone))
        return requests

    def decide(self, group: Group) -> None:
        """Measure, filter and choose. A rewrite that the student's context cannot hold has no
        measures, and no likelihood."""
        waiting, scores = candidates(group.rows), group.scores
        for row in group.wanted:
            row_id = row["row_id"]
            places = self._places.pop(row_id, None)
            if places is not None and self._measure is not None and row_id in scores:
                row |= self._measure.columns(
                    places, trace_of(row), scores[row_id], scores.get(row_id + _ALONE)
                )
        for row in waiting:
            row["status"] = status_of(row, self.config.filters)
        passed = [row for row in waiting if row["status"] == "ok"]
        means = {row_id: float(score.target_logprobs.mean()) for row_id, score in scores.items()}
        choose_among(passed, self.config.choose, means)
