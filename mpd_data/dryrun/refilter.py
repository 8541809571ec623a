"""Plan `mpd-gen rewrite --refilter` without running it."""

import itertools
from collections import Counter

from mpd_data.config import RewriteConfig
from mpd_data.dryrun.plan import StagePlan, distill_bytes, make_plan
from mpd_data.engines.start import notes_of
from mpd_data.select.filters import settle
from mpd_data.select.pass_rates import PassRates
from mpd_data.select.refilter import (
    changed_rules,
    check_refilter,
    require_asked,
    require_teacher,
)
from mpd_data.select.second_pass import LIGHT
from mpd_data.select.student import candidates, choosing_student
from mpd_data.stage import model_of, refuse_half_refiltered
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import STATUSES
from mpd_data.store.shards import read_metadata


def plan_refilter(config: RewriteConfig) -> StagePlan:
    """Plan what `run_refilter` would do, without an engine or weights and without writing anything.
    Raise what the run would raise before it starts its engine."""
    round_dir = RoundDir(config.shards)
    refuse_half_refiltered(round_dir)
    saved = check_refilter(round_dir, config)
    unchanged = changed_rules(config, saved) is None
    paths = round_dir.scan_shards("distill").paths
    require_asked(config, round_dir, paths)
    before = Counter(round_dir.count_statuses(paths))
    after: Counter[str] = Counter()
    rollouts = unscored = tokens = waiting = 0
    rates = PassRates(round_dir, round_dir.scan_shards("rollouts").paths)
    # A scored row has tails, which are the smallest of its columns.
    rows = round_dir.rows("distill", [*LIGHT, "tail_logprobs"], paths)
    for _, group in itertools.groupby(rows, key=lambda row: row["rollout_id"]):
        rewrites = sorted(group, key=lambda row: row["candidate_idx"])
        rollouts += 1
        if unchanged:
            waiting += config.student_option is not None and bool(candidates(rewrites))
        else:
            rates.fill(rewrites)
            wanted = settle(rewrites, config.filters, config.choose, config.measures)
            waiting += bool(wanted) and all(row["status"] == "not_chosen" for row in wanted)
            not_scored = [row for row in wanted if row["tail_logprobs"] is None]
            unscored += len(not_scored)
            tokens += sum(row["num_rewritten_tokens"] for row in not_scored)
        after.update(row["status"] for row in rewrites)
    metadata = read_metadata(paths[0]) if paths else {}
    if config.student_option is not None and metadata:
        choosing_student(config, metadata["student"], metadata["tokenizer"], weights=False)
    if unscored:
        teacher = model_of(config, weights=False)
        teacher = teacher.as_saved(saved.get("teacher"))
        require_teacher(config, teacher, metadata, saved)
    size = sum(path.stat().st_size for path in paths)
    in_both, vocab_size = config.score_context == "both", metadata.get("vocab_size", 2)
    more = distill_bytes(0, 0, tokens, metadata.get("num_logprobs", 1), vocab_size, in_both)
    is_finished = unchanged and not waiting
    return make_plan(
        "mpd-gen rewrite --refilter",
        config,
        config.shards,
        learned=None,
        rows=rollouts,
        committed=rollouts if is_finished else 0,
        remaining=0 if is_finished else rollouts,
        disk_bytes=0 if is_finished else size + more,
        details={
            "rewrites to score": unscored,
            "tokens to score": 2 * tokens if in_both else tokens,
            **({"rollouts for the student to choose": waiting} if waiting else {}),
            **{
                status: f"{before[status]:,} -> {after[status]:,}"
                for status in STATUSES
                if before[status] or after[status]
            },
        },
        notes=["The existing rewrites were chosen by these rules."] * is_finished
        + (notes_of(config.engine) if unscored else []),
    )
