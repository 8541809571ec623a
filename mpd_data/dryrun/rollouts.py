"""Plan `mpd-gen rollouts` without running it."""

from array import array

from mpd_data.checkers.gold import unreadable_answers
from mpd_data.dryrun.learned import Learned, learn
from mpd_data.dryrun.plan import Lengths, Shown, StagePlan, make_plan, rollout_bytes
from mpd_data.engines.start import notes_of
from mpd_data.prompts.chat import PromptError
from mpd_data.rollouts import RolloutSetup
from mpd_data.store.keys import KeySet
from mpd_data.store.round import RoundDir
from mpd_data.store.samples import Samples


def plan_rollouts(
    setup: RolloutSetup,
    overwrite: bool = False,
    limit: int | None = None,
    learned: Learned | None = None,
) -> StagePlan:
    """Plan what `sample` would do, without an engine and without writing anything. `learned`: of
    other rows, for a round that has none."""
    config, round_dir = setup.config, RoundDir(setup.config.out)
    done, samples = KeySet(), Samples([])
    if not overwrite:
        scan = round_dir.scan_shards("rollouts")
        done, samples = scan.keys(), Samples(scan.paths)
        learned = learn(round_dir, "rollouts", config.engine.backend, scan.paths) or learned
    rows = committed = remaining = prompt_tokens = 0
    shown: list[Shown] = []
    reasons: list[str] = []
    lengths = array("i")
    for prompt in setup.own_prompts:
        try:
            requests = setup.requests(prompt)
        except PromptError as error:
            reasons.append(f"{prompt.source}: {error}")
            continue
        length = len(requests[0].ids)
        shown = shown or [Shown("first prompt", requests[0].text, length)]
        lengths.append(length)
        rows += len(requests)
        new = [request for request in requests if request.row_id not in done]
        for request in new:
            samples.require_new(prompt.id, request.sample_idx, request.text)
        missing = len(new)
        committed += len(requests) - missing
        planned = missing if limit is None else min(missing, limit - remaining)
        remaining += planned
        prompt_tokens += planned * length
    unreadable = unreadable_answers(setup.prompts, config.checker)[1]
    at_most = remaining * config.sampling.max_tokens
    return make_plan(
        "mpd-gen rollouts",
        config,
        config.out,
        learned,
        generated=remaining,
        tokens_at_most=at_most,
        disk_bytes=rollout_bytes(remaining, prompt_tokens, at_most, setup.model.vocab_size),
        rows=rows,
        committed=committed,
        remaining=remaining,
        workers=config.parts.workers,
        shown=shown,
        prompt_tokens=Lengths.of(lengths),
        reasons=reasons,
        refusal=None if lengths or not reasons else "No prompt can be used.",
        details={
            "context": setup.context,
            "longest prompt + completion": max(lengths, default=0) + config.sampling.max_tokens,
        },
        notes=[*([unreadable] if unreadable else []), *notes_of(config.engine, setup.turn)],
    )
