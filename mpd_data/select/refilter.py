"""`mpd-gen rewrite --refilter`: other rules and another choice over rewrites that are there.

A pass over them (second_pass.py) with the teacher's engine, for what is newly kept. Nothing is
generated and nothing is thrown away: rows keep the log-probabilities they have, also where they
are rejected now, so that going back costs nothing.
"""

from collections.abc import Mapping
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.common.hashing import differences
from mpd_data.common.models import ModelFiles, load_tokenizer, require_same_tokenizer, resolve_model
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Engine, Scores
from mpd_data.engines.scores import score_columns
from mpd_data.engines.start import start_engine
from mpd_data.select.filters import settle
from mpd_data.select.likeliest import choose_by_student, choosing_student
from mpd_data.select.second_pass import RULES, Pass, Row, put_in_place, rework
from mpd_data.stage import Outcome
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata


def run_refilter(config: RewriteConfig) -> Outcome:
    """Applies the filters and the choice of `config` to the rewrites in `config.shards`.

    Raises ConfigError where there are none, or where another setting than those changed;
    EngineError when the engine dies: what was scored before is kept, run it again.
    """
    round_dir = RoundDir(config.shards)
    with round_dir.lock("refilter"):
        # A kill while an earlier one was put in place.
        put_in_place(round_dir, config)
        saved = check_refilter(round_dir, config)
        if (rules := _changed_rules(config, saved)) is not None:
            round_dir.recover("distill")
            metadata = read_metadata(round_dir.shard_paths("distill")[0])
            if config.choose == "likeliest":
                # Before what was chosen by other rules is chosen no more.
                choosing_student(config, metadata["student"], metadata["tokenizer"])
            rework(round_dir, _Refilter(config, metadata), {**saved, **rules})
        if config.choose == "likeliest":
            choose_by_student(round_dir, config)
        counts = round_dir.count_statuses()
        total = sum(counts.values())
        return Outcome(total, total, 0, statuses=counts)


def check_refilter(round_dir: RoundDir, config: RewriteConfig) -> dict[str, Any]:
    """The identity of the rewrites in `round_dir`. Raises ConfigError where there are none, or
    where another setting than filters and choice changed."""
    saved = round_dir.run_info().get("stages", {}).get("distill")
    if saved is None:
        raise ConfigError(
            f"{config.shards}: no rewrites here to filter anew; run mpd-gen rewrite first."
        )
    identity: dict[str, Any] = saved["identity"]
    given = {
        "num_candidates": config.num_candidates,
        "score_context": config.score_context,
        "seed": config.seed,
        "sampling": config.sampling.model_dump(),
    }
    unlike = differences({name: identity[name] for name in given}, given)
    if unlike:
        raise ConfigError(
            f"{config.shards}: --refilter changes filters and choice, nothing else:\n  "
            + "\n  ".join(unlike)
            + "\nGive the saved settings, or run without --refilter and with --overwrite."
        )
    return identity


def _changed_rules(config: RewriteConfig, saved: dict[str, Any]) -> dict[str, Any] | None:
    """Filters and choice of `config`, None where they are the saved ones."""
    rules = {"filters": config.filters.model_dump(), "choose": config.choose}
    return None if rules == {name: saved[name] for name in RULES} else rules


def _teacher(config: RewriteConfig, weights: bool = True) -> ModelFiles:
    served = config.engine.served(config.teacher)
    return resolve_model(config.teacher, config.revision, config.trust_remote_code, weights, served)


def _require_teacher(config: RewriteConfig, teacher: ModelFiles, metadata: dict[str, Any]) -> None:
    """Raises ConfigError unless `teacher` made the rewrites that `metadata` is of."""
    if {**teacher.identity(), "name": metadata["teacher"]["name"]} != metadata["teacher"]:
        raise ConfigError(
            f"{config.teacher} is not the teacher that made these rewrites"
            f" ({metadata['teacher']['name']}); newly kept ones need its scores."
        )
    tokenizer = load_tokenizer(teacher, config.trust_remote_code)
    require_same_tokenizer(metadata["tokenizer"], tokenizer, str(config.shards), config.teacher)


class _Refilter(Pass):
    """Filter and choice -> (teacher's scores of what is newly kept)."""

    label = "refilter"

    def __init__(self, config: RewriteConfig, metadata: dict[str, Any]) -> None:
        super().__init__(config, metadata)
        self.k = metadata["num_logprobs"]

    def judge(self, rows: list[Row]) -> list[Row]:
        wanted = settle(rows, self.config.filters, self.config.choose)
        return [row for row in wanted if row["topk_ids"] is None]

    def start_engine(self) -> Engine:
        config = self.config
        teacher = _teacher(config)
        _require_teacher(config, teacher, self.metadata)
        # Its padding rows may be among the best; they are dropped afterwards.
        self.k += teacher.vocab_size - self.metadata["vocab_size"]
        return start_engine(teacher, config.engine, config.trust_remote_code, self.k)

    def context_of(self, row: Row) -> list[int]:
        given = row["teacher_prompt_ids"]
        context: list[int] = (
            row["input_ids"][: row["loss_start"]] if given is None else given
        ).tolist()
        return context

    def decide(self, wanted: list[Row], scores: Mapping[str, Scores]) -> None:
        k, vocab_size = self.metadata["num_logprobs"], self.metadata["vocab_size"]
        for row in wanted:
            if row["row_id"] in scores:
                row |= score_columns(scores[row["row_id"]], k, vocab_size)
            else:
                row["status"] = "too_long"
