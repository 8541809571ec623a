"""Plan `mpd-gen rollouts` without running it."""

from array import array

from mpd_data.common.options import arguments
from mpd_data.dryrun.learned import Learned, learn
from mpd_data.dryrun.plan import Lengths, Shown, StagePlan, rollout_bytes
from mpd_data.dryrun.show import first_reasons
from mpd_data.engines.start import server_notes
from mpd_data.prompts.chat import PromptError
from mpd_data.rollouts import RolloutSetup
from mpd_data.store.keys import KeySet
from mpd_data.store.round import RoundDir


def learn_rollouts(prepared: RolloutSetup) -> Learned | None:
    """What rollouts that are there say of those to come."""
    return learn(
        prepared.config.out,
        "rollouts",
        prepared.identity["tokenizer"],
        prepared.config.model,
        {"sampling": prepared.identity["sampling"]},
    )


def plan_rollouts(
    prepared: RolloutSetup, overwrite: bool = False, limit: int | None = None
) -> StagePlan:
    """Plan what `sample` would do, without an engine and without writing anything."""
    config, model = prepared.config, prepared.model
    round_dir = RoundDir(config.out)
    done = KeySet()
    if not overwrite:
        done = round_dir.survey("rollouts").keys()
    rows = committed = owed = prompt_tokens = 0
    first: Shown | None = None
    reasons: list[str] = []
    lengths = array("i")
    for prompt in prepared.own_prompts:
        try:
            asked = prepared.requests(prompt)
        except PromptError as error:
            reasons.append(f"{prompt.source}: {error}")
            continue
        first = first or Shown("first prompt", asked[0].text, len(asked[0].ids))
        lengths.append(len(asked[0].ids))
        rows += len(asked)
        left = sum(request.row_id not in done for request in asked)
        committed += len(asked) - left
        now = left if limit is None else min(left, limit - owed)
        owed += now
        prompt_tokens += now * len(asked[0].ids)
    learned = learn_rollouts(prepared)
    at_most = owed * config.sampling.max_tokens
    expected = seconds = None
    disk = rollout_bytes(owed, prompt_tokens, at_most, model.vocab_size)
    if learned is not None:
        expected = min(round(owed * learned.tokens_per_row), at_most)
        disk = round(expected * learned.bytes_per_token)
        seconds = learned.seconds(expected / config.parts.workers)
    return StagePlan(
        command="mpd-gen rollouts",
        out=str(config.out),
        settings=arguments(config),
        rows=rows,
        committed=committed,
        owed=owed,
        shown=[] if first is None else [first],
        prompt_tokens=Lengths.of(lengths),
        tokens_expected=expected,
        tokens_at_most=at_most,
        failing=len(reasons),
        reasons=first_reasons(reasons),
        disk_bytes=disk,
        seconds=seconds,
        device=None if learned is None else learned.device,
        learned_from=None if learned is None else learned.source,
        details={
            "context": prepared.context,
            "longest prompt + completion": max(lengths, default=0) + config.sampling.max_tokens,
        },
        notes=server_notes(config.engine),
    )
