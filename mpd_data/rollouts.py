"""Stage one, first half: the student samples solutions.

prompts -> chat template -> ids -> engine -> rollouts/part-*.parquet
"""

import dataclasses
import functools
import itertools
from collections.abc import Container, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpd_data.checkers.builtin import make_checker
from mpd_data.checkers.pool import CheckPool, CheckRequest, Verdict
from mpd_data.common.errors import MPDError
from mpd_data.common.hashing import canonical_json, content_key
from mpd_data.common.machine import provenance
from mpd_data.common.models import (
    ModelFiles,
    chat_template_hash,
    load_tokenizer,
    resolve_model,
    tokenizer_hash,
)
from mpd_data.config import RolloutsConfig
from mpd_data.engines.protocol import Completion, Engine, Refused, RequestError, StartEngine, pump
from mpd_data.engines.start import context_of, start_engine
from mpd_data.prompts.chat import ChatFormatter, PromptError
from mpd_data.prompts.reader import Prompt, choose_prompts, fill_prompt, load_examples, load_prompts
from mpd_data.stage import Failures, RolloutsOutcome
from mpd_data.store.progress import Progress
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import Stage, repetition, rollout_key, seed_of
from mpd_data.store.writer import ShardWriter

# What --overwrite deletes: later stages' rows are of rollouts that are gone.
OVERWRITTEN: tuple[Stage, ...] = ("rollouts", "distill", "errors")


@dataclass(frozen=True)
class Request:
    """One sample to take: everything a rollout row needs but the completion."""

    row_id: str
    prompt: Prompt
    text: str
    ids: list[int]
    sample_idx: int


def read_prompts(config: RolloutsConfig) -> list[Prompt]:
    """Return all prompts that `config` names, with the answer that the checker reads in each gold
    answer. Raises ConfigError or DataError."""
    checker = make_checker(config.checker, config.answer_formats)
    prompts = load_prompts(
        config.prompts,
        config.prompt_column,
        config.id_column,
        config.answer_column,
        config.metadata_columns,
        config.duplicates,
    )
    return [
        dataclasses.replace(p, answer=None if p.answer is None else checker.gold(p.answer))
        for p in prompts
    ]


def _read_examples(config: RolloutsConfig) -> list[tuple[str, str]]:
    """Return the few-shot examples as (user's message, solution)."""
    if config.examples is None:
        return []
    pairs = load_examples(config.examples, config.prompt_column, config.examples_column)
    return [(fill_prompt(config.prompt_template, problem), solution) for problem, solution in pairs]


@dataclass(frozen=True)
class RolloutSetup:
    """What a run knows before it starts an engine. A dry run has the same without weights."""

    config: RolloutsConfig
    prompts: list[Prompt]
    model: ModelFiles
    tokenizer: Any
    formatter: ChatFormatter
    context: int
    row_identity: dict[str, Any]
    identity: dict[str, Any]

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that the stage's shards carry."""
        return {
            **self.identity,
            "model": {"name": self.config.model, **self.model.identity()},
            "vocab_size": self.model.vocab_size,
            "eos_token_id": self.tokenizer.eos_token_id,
            "backend": self.config.engine.backend,
            **provenance(),
        }

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        """Return a prompt's text and token ids. Raises PromptError where it cannot be used or
        leaves no room for its completion."""
        if prompt.flaw is not None:
            raise PromptError(prompt.flaw)
        text, ids = self.formatter.render(fill_prompt(self.config.prompt_template, prompt.text))
        room = self.config.sampling.max_tokens
        if len(ids) + room > self.context:
            raise PromptError(
                f"{len(ids)} prompt tokens and {room} for the completion do not fit the context of"
                f" {self.context}; lower --max-tokens or raise --max-model-len"
            )
        return text, ids

    @property
    def own_prompts(self) -> list[Prompt]:
        """The prompts of this process's part. All samples of a prompt are in one part and share the
        engine's cache of it."""
        part = self.config.parts.part
        return [prompt for prompt in self.prompts if part.holds(prompt.id)]

    def requests(self, prompt: Prompt) -> list[Request]:
        """Return the samples to take of a prompt. Raises PromptError like `render`."""
        text, ids = self.render(prompt)
        return [
            Request(rollout_key(prompt.id, ids, i, self.row_identity), prompt, text, ids, i)
            for i in range(self.config.num_samples)
        ]


def setup(
    config: RolloutsConfig,
    weights: bool = True,
    overwrite: bool = False,
    model: ModelFiles | None = None,
    prompts: list[Prompt] | None = None,
) -> RolloutSetup:
    """Check everything that can be checked without an engine. Raises ConfigError or DataError.

    Without `weights`, for a dry run, the model's weights are neither fetched nor hashed, and the
    round must have been started with these settings unless `overwrite`, as a run finds when it
    claims the round. `model` and `prompts` replace what `config` names: a student that is yet to be
    trained, prompts that were read before.
    """
    code, round_dir = config.trust_remote_code, RoundDir(config.out)
    if model is None:
        served = config.engine.served(config.model)
        model = resolve_model(config.model, config.revision, code, weights, served)
    if not weights:
        saved = round_dir.run_info().get("stages", {}).get("rollouts")
        model = model.as_saved(saved and saved["identity"]["model"])
    prompts = read_prompts(config) if prompts is None else prompts
    chosen = choose_prompts(prompts, config.num_prompts, f"{config.seed}/{config.round}")
    tokenizer = load_tokenizer(model, code)
    examples = _read_examples(config)
    formatter = ChatFormatter(
        tokenizer,
        config.template_kwargs,
        thinking=config.thinking,
        system_prompt=config.system_prompt,
        examples=examples,
    )
    row_identity = {
        "round": config.round,
        "sampling": config.sampling.model_dump(),
        "model": model.identity(),
        "seed": config.seed,
    }
    identity = {
        **row_identity,
        "checker": config.checker,
        "answer_formats": list(config.answer_formats),
        "prompt_template": config.prompt_template,
        "system_prompt": config.system_prompt,
        "examples": content_key(examples),
        "thinking": formatter.thinking,
        "num_samples": config.num_samples,
        "prompts": content_key(
            sorted([p.id, p.text, p.answer or "", canonical_json(p.metadata)] for p in chosen)
        ),
        "dtype": config.engine.dtype,
        "chat_template": chat_template_hash(tokenizer),
        "template_kwargs": config.template_kwargs,
        "tokenizer": tokenizer_hash(tokenizer),
    }
    context = context_of(model, config.engine)
    if not weights and not overwrite:
        round_dir.check("rollouts", identity)
    return RolloutSetup(
        config, chosen, model, tokenizer, formatter, context, row_identity, identity
    )


def run_rollouts(
    config: RolloutsConfig, overwrite: bool = False, limit: int | None = None
) -> RolloutsOutcome:
    """Samples what the round still owes, at most `limit` of it, and commits it shard by shard.

    Raises ConfigError or DataError for bad input and EngineError when the engine dies; rows
    finished before are committed in every case.
    """
    return sample(setup(config), overwrite, limit)


def sample(
    prepared: RolloutSetup,
    overwrite: bool = False,
    limit: int | None = None,
    start: StartEngine = start_engine,
) -> RolloutsOutcome:
    """`run_rollouts` from where all is prepared. `start` gives the engine; it is closed at the end,
    so whoever keeps one for the next call gives out one whose `close` spares it."""
    config, model = prepared.config, prepared.model
    metadata, part = prepared.metadata(), config.parts.part
    prompts = prepared.own_prompts
    total = len(prompts) * config.num_samples

    round_dir = RoundDir(config.out)
    with round_dir.lock("rollouts", part):
        if overwrite:
            round_dir.discard(*OVERWRITTEN)
        details = {
            "config": config.model_dump(mode="json", exclude={"parts"}),
            "rows": len(prepared.prompts) * config.num_samples,
        }
        round_dir.claim("rollouts", prepared.identity, details)
        done = round_dir.recover("rollouts")
        failures = round_dir.failures()
        if limit is not None:
            total = min(total, len(done) + limit)
        output = config.output.model_dump()
        with (
            ShardWriter(round_dir, "rollouts", metadata, **output) as writer,
            ShardWriter(round_dir, "errors", metadata, **output) as errors,
            Progress("rollouts", total, round_dir.status_path("rollouts", part)) as progress,
        ):
            failed = Failures("rollouts", errors, failures, config.failures)
            # One after another, as the engine takes them: memory does not grow with the job.
            every = _owed(prepared, prompts, done, failed, progress)
            owed = itertools.islice(every, limit)
            first = next(owed, None)
            if first is not None:
                with (
                    CheckPool(
                        config.checker,
                        config.answer_formats,
                        config.checks.checker_timeout,
                        config.checks.checker_processes,
                    ) as pool,
                    closing(start(model, config.engine, config.trust_remote_code)) as engine,
                ):
                    job = _Job(config, prepared.tokenizer, engine, pool, writer, progress)

                    def refuse(request: Request, reason: str) -> None:
                        progress.fail()
                        message = f"{request.prompt.source}: the engine refused it: {reason}"
                        failed.add(request.row_id, request.prompt.id, message)

                    def submit(request: Request) -> None:
                        try:
                            job.submit(request)
                        except RequestError as error:
                            refuse(request, str(error))

                    submissions = (
                        functools.partial(submit, request)
                        for request in itertools.chain([first], owed)
                    )
                    progress.engine_started()
                    try:
                        for result in pump(engine, submissions, job):
                            if isinstance(result, Refused):
                                refuse(job.give_up(result.key), result.message)
                                continue
                            assert isinstance(result, Completion)
                            job.take(result)
                    finally:
                        # Not worth an error in place of the one that may be on its way.
                        with suppress(MPDError, OSError):
                            if (speed := progress.speed(config.engine.backend)) is not None:
                                round_dir.record_speed("rollouts", speed)
            left = sum(1 for _ in every)
        return RolloutsOutcome(progress.done, writer.rows_committed, failed.count, left)


def _owed(
    prepared: RolloutSetup,
    prompts: list[Prompt],
    done: Container[str],
    failed: Failures,
    progress: Progress,
) -> Iterator[Request]:
    """The samples that are not there yet, prompt by prompt."""
    for prompt in prompts:
        try:
            asked = prepared.requests(prompt)
        except PromptError as error:
            row_id = rollout_key(prompt.id, [], 0, prepared.row_identity)
            progress.fail(prepared.config.num_samples)
            failed.tried += 1
            failed.add(row_id, prompt.id, f"{prompt.source}: {error}")
            continue
        for request in asked:
            if request.row_id in done:
                progress.skip()
            else:
                failed.tried += 1
                yield request


@dataclass
class _Job:
    """What happens to one sample: submit -> (generate) -> take -> (check) -> row."""

    config: RolloutsConfig
    tokenizer: Any
    engine: Engine
    pool: CheckPool
    writer: ShardWriter
    progress: Progress

    def __post_init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._rows: dict[str, dict[str, Any]] = {}

    def submit(self, request: Request) -> None:
        """Asks the engine for the sample. Raises RequestError if it refuses."""
        row_id = request.row_id
        self.engine.submit_generate(row_id, request.ids, self.config.sampling, seed_of(row_id))
        self._requests[row_id] = request

    def give_up(self, row_id: str) -> Request:
        """Forgets a sample that the engine refuses, and returns what was asked for."""
        return self._requests.pop(row_id)

    @property
    def in_flight(self) -> int:
        """Checks begun and not finished."""
        return self.pool.in_flight

    def advance(self, wait: bool) -> None:
        """Takes finished checks; commits shards that are due by age."""
        for verdict in self.pool.ready(1.0 if wait else 0.0):
            self._finish(self._rows.pop(verdict.key), verdict)
        self.writer.commit_if_due()
        self.progress.tick()

    def take(self, result: Completion) -> None:
        """Handles what the engine finished."""
        request = self._requests.pop(result.key)
        stopped = result.finish_reason == "stop"
        # The end token is in the ids, where the loss needs it, not in the text for people.
        visible = result.token_ids[:-1] if stopped else result.token_ids
        completion = self.tokenizer.decode(visible, skip_special_tokens=False)
        gold, metadata = request.prompt.answer, request.prompt.metadata
        row = {
            "row_id": request.row_id,
            "prompt_id": request.prompt.id,
            "round": self.config.round,
            "sample_idx": request.sample_idx,
            "prompt": request.text,
            "completion": completion,
            "prompt_ids": request.ids,
            # An array: Arrow takes it at once, a list number by number.
            "completion_ids": np.array(result.token_ids, dtype=np.int32),
            "num_prompt_tokens": len(request.ids),
            "num_completion_tokens": len(result.token_ids),
            "finish_reason": result.finish_reason,
            "problem": request.prompt.text,
            "gold_answer": gold,
            "repetition": repetition(result.token_ids),
            "metadata": canonical_json(request.prompt.metadata)
            if request.prompt.metadata
            else None,
            "seed": seed_of(request.row_id),
        }
        if stopped:
            self._rows[request.row_id] = row
            self.pool.submit(CheckRequest(request.row_id, completion, gold, metadata, None))
        else:
            # A trace that was cut off has no final answer, whatever stands in it.
            correct = None if gold is None else False
            self._finish(row, Verdict(request.row_id, None, correct, None, None))

    def _finish(self, row: dict[str, Any], verdict: Verdict) -> None:
        self.writer.add(
            row
            | {
                "answer": verdict.answer,
                "is_correct": verdict.is_correct,
                "check_error": verdict.error,
            }
        )
        self.progress.update(
            row["num_completion_tokens"], row["finish_reason"] == "length", self.engine.in_flight
        )
