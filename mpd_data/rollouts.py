"""Stage one, first half: the student samples solutions.

prompts -> chat template -> ids -> engine -> rollouts/part-*.parquet
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mpd_data.checkers import Checker, judge, make_checker
from mpd_data.config import RolloutsConfig
from mpd_data.engine import Completion, RequestError, VLLMEngine, pump
from mpd_data.models import (
    chat_template_hash,
    load_tokenizer,
    provenance,
    resolve_model,
    tokenizer_hash,
)
from mpd_data.progress import Progress
from mpd_data.prompts import ChatFormatter, Prompt, PromptError, choose_prompts, load_prompts
from mpd_data.schema import content_key, repetition, rollout_key, seed_of
from mpd_data.shards import RoundDir
from mpd_data.writer import ShardWriter


@dataclass(frozen=True)
class Outcome:
    """What the stage left behind: rows owed in all, rows this run wrote, rows that failed for
    good (they stand in errors/)."""

    total: int
    written: int
    failed: int


@dataclass(frozen=True)
class Request:
    """One sample to take: everything a rollout row needs but the completion."""

    row_id: str
    prompt: Prompt
    text: str
    ids: list[int]
    sample_idx: int


def run_rollouts(config: RolloutsConfig, overwrite: bool = False) -> Outcome:
    """Samples what the round still owes and commits it shard by shard.

    Raises ConfigError or DataError for bad input and EngineError when the engine dies; rows
    finished before are committed in every case.
    """
    checker = make_checker(config.checker)
    prompts = choose_prompts(
        load_prompts(config.prompts, config.prompt_column, config.id_column, config.answer_column),
        config.num_prompts,
        f"{config.seed}/{config.round}",
    )
    model = resolve_model(config.model, config.revision, config.trust_remote_code)
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    formatter = ChatFormatter(tokenizer, config.template_kwargs)
    context = config.engine.max_model_len or model.context
    row_identity = {
        "round": config.round,
        "sampling": config.sampling.model_dump(),
        "model": model.identity(),
        "seed": config.seed,
    }
    identity = {
        **row_identity,
        "checker": config.checker,
        "num_samples": config.num_samples,
        "prompts": content_key(sorted([p.id, p.text, p.answer or ""] for p in prompts)),
        "dtype": config.engine.dtype,
        "chat_template": chat_template_hash(tokenizer),
        "template_kwargs": config.template_kwargs,
        "tokenizer": tokenizer_hash(tokenizer),
    }
    shard_metadata = {
        **identity,
        "model": {"name": config.model, **model.identity()},
        "vocab_size": model.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        **provenance(),
    }

    round_dir = RoundDir(config.out)
    with round_dir.lock():
        if overwrite:
            round_dir.discard("rollouts", "distill", "errors")
        round_dir.claim("rollouts", identity, {"config": config.model_dump(mode="json")})
        done = round_dir.recover("rollouts")
        failures = round_dir.failures()
        output = config.output.model_dump()
        with (
            ShardWriter(round_dir, "rollouts", shard_metadata, **output) as writer,
            ShardWriter(round_dir, "errors", shard_metadata, **output) as errors,
        ):
            owed: list[Request] = []
            failed = 0

            def fail(row_id: str, prompt: Prompt, reason: object) -> None:
                nonlocal failed
                failed += 1
                if row_id not in failures:
                    errors.add(
                        {
                            "row_id": row_id,
                            "stage": "rollouts",
                            "prompt_id": prompt.id,
                            "message": f"{prompt.source}: {reason}",
                        }
                    )

            for prompt in prompts:
                try:
                    text, ids = formatter.render(prompt.text)
                    if len(ids) + config.sampling.max_tokens > context:
                        raise PromptError(
                            f"{len(ids)} prompt tokens and {config.sampling.max_tokens} for the"
                            f" completion do not fit the context of {context}; lower --max-tokens"
                            " or raise --max-model-len"
                        )
                except PromptError as error:
                    fail(rollout_key(prompt.id, [], 0, row_identity), prompt, error)
                    continue
                for sample_idx in range(config.num_samples):
                    key = rollout_key(prompt.id, ids, sample_idx, row_identity)
                    if key not in done:
                        owed.append(Request(key, prompt, text, ids, sample_idx))
            if owed:
                engine = VLLMEngine(model, config.engine, config.trust_remote_code)
                waiting = {request.row_id: request for request in owed}

                def submit(request: Request) -> None:
                    try:
                        engine.submit_generate(
                            request.row_id, request.ids, config.sampling, seed_of(request.row_id)
                        )
                    except RequestError as error:
                        fail(request.row_id, request.prompt, f"the engine refused it: {error}")

                submissions: Iterator[Callable[[], None]] = (
                    functools.partial(submit, request) for request in owed
                )
                with Progress("rollouts", len(done) + len(owed), len(done)) as progress:
                    for result in pump(engine, submissions, writer.commit_if_due):
                        assert isinstance(result, Completion)
                        request = waiting.pop(result.key)
                        row = _row(request, result, config.round, tokenizer, checker)
                        writer.add(row)
                        progress.update(
                            len(result.token_ids),
                            result.finish_reason == "length",
                            engine.in_flight,
                        )
        return Outcome(len(done) + len(owed), writer.rows_committed, failed)


def _row(
    request: Request, result: Completion, round_: int, tokenizer: Any, checker: Checker
) -> dict[str, Any]:
    stopped = result.finish_reason == "stop"
    # The end token is in the ids, where the loss needs it, not in the text for people.
    visible = result.token_ids[:-1] if stopped else result.token_ids
    completion = tokenizer.decode(visible, skip_special_tokens=False)
    answer = checker.extract(completion) if stopped else None
    return {
        "row_id": request.row_id,
        "prompt_id": request.prompt.id,
        "round": round_,
        "sample_idx": request.sample_idx,
        "prompt": request.text,
        "completion": completion,
        "prompt_ids": request.ids,
        "completion_ids": result.token_ids,
        "num_prompt_tokens": len(request.ids),
        "num_completion_tokens": len(result.token_ids),
        "finish_reason": result.finish_reason,
        "problem": request.prompt.text,
        "answer": answer,
        "gold_answer": request.prompt.answer,
        "is_correct": judge(checker, answer, request.prompt.answer),
        "check_error": None,
        "repetition": repetition(result.token_ids),
        "metadata": None,
        "seed": seed_of(request.row_id),
    }
