"""Plan `mpd-gen rewrite` without running it."""

import itertools
from array import array
from collections import Counter
from typing import Any

from mpd_data.common.options import arguments
from mpd_data.dryrun.learned import Learned, learn
from mpd_data.dryrun.plan import Lengths, Shown, StagePlan, distill_bytes
from mpd_data.dryrun.show import first_reasons
from mpd_data.engines.start import server_notes
from mpd_data.prompts.chat import PromptError
from mpd_data.rewrite_setup import (
    ROLLOUT_COLUMNS,
    RewriteSetup,
    closes_thinking,
)
from mpd_data.select.likeliest import waiting_rollouts
from mpd_data.store.keys import KeySet
from mpd_data.store.round import RoundDir

# What decides how many bytes a rewritten token takes.
_SIZE = ("num_candidates", "choose", "num_logprobs", "score_context")


def plan_rewrite(
    prepared: RewriteSetup, overwrite: bool = False, limit: int | None = None
) -> StagePlan:
    """Plan what `distill` would do, without an engine and without writing anything."""
    config = prepared.config
    round_dir, part = RoundDir(config.shards), config.parts.part
    done, waiting = KeySet(), 0
    if not overwrite:
        paths = round_dir.survey("distill").paths
        done = round_dir.rewritten(paths)
        if config.choose == "likeliest":
            waiting = waiting_rollouts(round_dir, paths)
    found = round_dir.survey("rollouts")
    rollouts = found.keys()
    total = part.share(rollouts)
    committed = total - part.share(rollouts - done)
    owed = asked_about = 0
    first: Shown | None = None
    reasons: list[str] = []
    unasked: Counter[str] = Counter()
    lengths = array("i")
    contexts = kept_at_most = 0
    rows = round_dir.rows("rollouts", ROLLOUT_COLUMNS, found.paths, done)
    own = (rollout for rollout in rows if part.holds(rollout["row_id"]))
    for rollout in itertools.islice(own, limit):
        owed += 1
        if rollout["finish_reason"] == "length":
            unasked["draft_truncated"] += 1
            continue
        if not prepared.template.asks:
            asked_about += 1
            contexts += len(rollout["prompt_ids"])
            kept_at_most += rollout["num_completion_tokens"]
            continue
        prepared.template.layout(closes_thinking(rollout))
        try:
            asked = prepared.ask_about(rollout)
        except PromptError as error:
            reasons.append(f"rollout {rollout['row_id']}: {error}")
            continue
        if not prepared.fits(asked):
            unasked["too_long"] += 1
            continue
        asked_about += 1
        first = first or Shown("first rewrite prompt", asked.text, len(asked.prompt_ids))
        lengths.append(len(asked.prompt_ids))
        contexts += len(rollout["prompt_ids"])
        if config.score_context == "rewrite":
            contexts += len(asked.teacher_prompt_ids)
        longest = int(config.filters.max_ratio * rollout["num_completion_tokens"])
        kept_at_most += min(longest, config.sampling.max_tokens)
    return predict(
        prepared,
        total=total,
        owed=owed + waiting,
        asked=asked_about,
        contexts=contexts,
        kept_at_most=kept_at_most,
        shown=[] if first is None else [first],
        prompt_tokens=Lengths.of(lengths),
        committed=committed - waiting,
        failing=len(reasons),
        reasons=first_reasons(reasons),
        details={
            **{f"not asked: {status}": n for status, n in sorted(unasked.items())},
            **({"rollouts for the student to choose": waiting} if waiting else {}),
        },
        notes=server_notes(config.engine)
        + [
            "The student chooses afterwards: its time is not in the plan, and neither is a second"
            " copy of the rewrites while it does."
        ]
        * (config.choose == "likeliest"),
    )


def predict(
    prepared: RewriteSetup, total: int, owed: int, asked: int, contexts: int, kept_at_most: int,
    **known: Any,
) -> StagePlan:  # fmt: skip
    """The plan for `asked` rollouts that the teacher is asked about, of `owed`: tokens, disk and
    time. `contexts`: tokens of the contexts that are stored with their rewrites; `kept_at_most`:
    tokens of the longest rewrites that the filter keeps, one for each rollout; `known`: other
    fields of the plan."""
    config = prepared.config
    learned = learn_rewrites(prepared)
    rewrites = asked * config.num_candidates
    at_most = rewrites * config.sampling.max_tokens if prepared.template.asks else kept_at_most
    # The student chooses among what is scored.
    stored = config.num_candidates if config.choose in ("all", "likeliest") else 1
    expected = seconds = None
    kept = kept_at_most * stored
    if learned is not None:
        expected = min(round(rewrites * learned.tokens_per_row), at_most)
        seconds = learned.seconds(expected / config.parts.workers)
        kept = min(kept, expected)
    contexts *= config.num_candidates
    disk = distill_bytes(owed, contexts, kept, prepared.k, prepared.vocab_size)
    if learned is not None and expected is not None and learned.has(prepared.identity, _SIZE):
        disk = round(expected * learned.bytes_per_token)
    return StagePlan(
        command="mpd-gen rewrite",
        out=str(config.shards),
        settings=arguments(config),
        rows=total,
        owed=owed,
        tokens_expected=expected,
        tokens_at_most=at_most,
        disk_bytes=disk,
        seconds=seconds,
        device=None if learned is None else learned.device,
        learned_from=None if learned is None else learned.source,
        **known,
    )


def learn_rewrites(prepared: RewriteSetup) -> Learned | None:
    """What rewrites that are there say of those to come."""
    same = ("sampling", "num_candidates", "choose", "filters", "num_logprobs", "score_context")
    return learn(
        prepared.config.shards,
        "distill",
        prepared.student["tokenizer"],
        prepared.config.teacher,
        {name: prepared.identity[name] for name in same},
    )
