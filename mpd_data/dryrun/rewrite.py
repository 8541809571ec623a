"""Plan `mpd-gen rewrite` without running it."""

import itertools
from array import array
from collections import Counter
from typing import Any

from mpd_data.common.text import plain
from mpd_data.dryrun.learned import Learned, learn
from mpd_data.dryrun.plan import Lengths, Shown, StagePlan, distill_bytes, make_plan
from mpd_data.engines.start import notes_of
from mpd_data.prompts.chat import PromptError
from mpd_data.rewrite_setup import ROLLOUT_COLUMNS, RewriteSetup, thinks
from mpd_data.select.filters import wants_draft
from mpd_data.select.pass_rates import PassRates
from mpd_data.select.student import waiting_rollouts
from mpd_data.store.keys import KeySet
from mpd_data.store.round import RoundDir

# Why the teacher is not asked about a rollout, and what to change.
_REMEDIES = {
    "draft_truncated": "sample the drafts with a higher --max-tokens, or rewrite with --cut-drafts",
    "draft_rejected": "give another --drafts",
    "too_long": "lower --max-tokens, raise --max-model-len, or give --cut-drafts",
}


def plan_rewrite(
    setup: RewriteSetup,
    overwrite: bool = False,
    limit: int | None = None,
    learned: Learned | None = None,
) -> StagePlan:
    """Plan what `distill` would do, without an engine and without writing anything. `learned`: of
    other rows, for a round that has none."""
    config, part = setup.config, setup.config.parts.part
    round_dir = RoundDir(config.shards)
    done, waiting = KeySet(), 0
    if not overwrite:
        paths = round_dir.scan_shards("distill").paths
        done = round_dir.rewritten(paths)
        learned = learn(round_dir, "distill", config.engine.backend, paths) or learned
        if config.student_option is not None:
            waiting = waiting_rollouts(round_dir, paths)
    scan = round_dir.scan_shards("rollouts")
    rollouts = scan.keys()
    total, unfinished = part.share(rollouts), rollouts - done
    committed = total - part.share(unfinished)
    not_ready = PassRates(round_dir, scan.paths).waiting
    later = part.share(unfinished) - part.share(unfinished - not_ready)
    remaining = asked = contexts = kept_at_most = 0
    shown: list[Shown] = []
    reasons: list[str] = []
    not_asked: Counter[str] = Counter()
    lengths = array("i")
    rows = round_dir.rows("rollouts", ROLLOUT_COLUMNS, scan.paths, done)
    own = (
        rollout
        for rollout in rows
        if part.holds(rollout["row_id"]) and rollout["row_id"] not in not_ready
    )
    for rollout in itertools.islice(own, limit):
        remaining += 1
        if rollout["finish_reason"] == "length" and not setup.takes_parts(rollout):
            not_asked["draft_truncated"] += 1
            continue
        if not wants_draft(rollout["is_correct"], config.filters):
            not_asked["draft_rejected"] += 1
            continue
        if not setup.template.asks:
            asked += 1
            contexts += len(rollout["prompt_ids"])
            kept_at_most += rollout["num_completion_tokens"]
            continue
        setup.template.layout(thinks(rollout))
        try:
            request = setup.ask_about(rollout)
        except PromptError as error:
            reasons.append(f"rollout {rollout['row_id']}: {error}")
            continue
        if request is None:
            not_asked["too_long"] += 1
            continue
        asked += 1
        shown = shown or [Shown("first rewrite prompt", request.text, len(request.prompt_ids))]
        lengths.append(len(request.prompt_ids))
        contexts += len(rollout["prompt_ids"])
        if config.score_context != "problem":
            contexts += len(request.teacher_prompt_ids)
        longest = int(config.filters.largest_ratio * rollout["num_completion_tokens"])
        kept_at_most += min(longest, config.sampling.max_tokens)
    notes, refusal = notes_on(setup), None
    if config.student_option is not None:
        notes.append(
            "The student judges the rewrites afterwards. The plan leaves out its time, and the disk"
            " of the copy of the rewrites that it makes."
        )
    if remaining and remaining == total and not asked:
        causes = [f"{n:,} {name} ({_REMEDIES[name]})" for name, n in sorted(not_asked.items())]
        refusal = f"No rollout can be rewritten. {'; '.join(causes)}".strip()
    return predict(
        setup,
        learned,
        asked=asked,
        contexts=contexts,
        kept_at_most=kept_at_most,
        rows=total,
        committed=committed - waiting,
        remaining=remaining + waiting,
        shown=shown,
        prompt_tokens=Lengths.of(lengths),
        reasons=reasons,
        refusal=refusal,
        details={
            **{f"not asked: {status}": n for status, n in sorted(not_asked.items())},
            **({"rollouts for the student to choose": waiting} if waiting else {}),
            **({"rollouts that wait for samples of their prompts": later} if later else {}),
        },
        notes=notes,
    )


def notes_on(setup: RewriteSetup) -> list[str]:
    """Return what a plan says of the teacher, its engine and the template."""
    notes = notes_of(setup.config.engine, setup.teacher_turn)
    words = setup.template.message("", "") if setup.template.asks else ""
    if unspelt := setup.writing.spelling.unspelt(words):
        notes.append(
            f"The teacher's tokenizer cannot spell {len(unspelt)} words of the template, as"
            f" {plain(unspelt[0])!r}. Write one in words that it knows (--template FILE)."
        )
    return notes


def predict(
    setup: RewriteSetup, learned: Learned | None, asked: int, contexts: int, kept_at_most: int,
    remaining: int, **fields: Any,
) -> StagePlan:  # fmt: skip
    """Plan the rewrites of `asked` out of `remaining` rollouts. `contexts`: tokens of the contexts
    that are stored with their rewrites; `kept_at_most`: tokens of the longest rewrites that the
    filter keeps, one for each rollout; `fields`: others of the plan."""
    config, at_most = setup.config, kept_at_most
    rewrites = asked * config.num_candidates
    # The student judges scored rewrites.
    all_scored = config.choose == "all" or config.student_option is not None
    stored = config.num_candidates if all_scored else 1
    if setup.template.asks:
        at_most = rewrites * config.sampling.max_tokens
    contexts *= config.num_candidates
    return make_plan(
        "mpd-gen rewrite",
        config,
        config.shards,
        learned,
        generated=rewrites,
        tokens_at_most=at_most,
        disk_bytes=distill_bytes(
            remaining,
            contexts,
            kept_at_most * stored,
            setup.k,
            setup.vocab_size,
            in_both=config.score_context == "both",
        ),
        remaining=remaining,
        workers=config.parts.workers,
        **fields,
    )
