"""Stage one, first half: the student samples solutions.

prompts -> chat template -> ids -> engine -> rollouts/part-*.parquet
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from mpd_data.checkers import Checker, make_checker
from mpd_data.checks import CheckPool, CheckRequest, Verdict
from mpd_data.config import RolloutsConfig
from mpd_data.engine import Completion, Engine, RequestError, pump, start_engine
from mpd_data.models import (
    chat_template_hash,
    load_tokenizer,
    provenance,
    resolve_model,
    tokenizer_hash,
)
from mpd_data.progress import Progress
from mpd_data.prompts import (
    ChatFormatter,
    Prompt,
    PromptError,
    choose_prompts,
    fill_prompt,
    load_examples,
    load_prompts,
)
from mpd_data.schema import canonical_json, content_key, repetition, rollout_key, seed_of
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


def read_prompts(config: RolloutsConfig, checker: Checker) -> list[Prompt]:
    """The prompts that `config` names, their gold answers read as the checker reads them."""
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


def read_examples(config: RolloutsConfig) -> list[tuple[str, str]]:
    """Few-shot examples as (user's message, solution)."""
    if config.examples is None:
        return []
    pairs = load_examples(config.examples, config.prompt_column, config.examples_column)
    return [(fill_prompt(config.prompt_template, problem), solution) for problem, solution in pairs]


def make_formatter(
    config: RolloutsConfig, tokenizer: Any, examples: list[tuple[str, str]]
) -> ChatFormatter:
    """How the student's prompts are laid out."""
    return ChatFormatter(
        tokenizer,
        config.template_kwargs,
        thinking=config.thinking,
        system_prompt=config.system_prompt,
        examples=examples,
    )


def run_rollouts(config: RolloutsConfig, overwrite: bool = False) -> Outcome:
    """Samples what the round still owes and commits it shard by shard.

    Raises ConfigError or DataError for bad input and EngineError when the engine dies; rows
    finished before are committed in every case.
    """
    checker = make_checker(config.checker, config.answer_formats)
    prompts = choose_prompts(
        read_prompts(config, checker),
        config.num_prompts,
        f"{config.seed}/{config.round}",
    )
    model = resolve_model(config.model, config.revision, config.trust_remote_code)
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    examples = read_examples(config)
    formatter = make_formatter(config, tokenizer, examples)
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
        "answer_formats": list(config.answer_formats),
        "prompt_template": config.prompt_template,
        "system_prompt": config.system_prompt,
        "examples": content_key(examples),
        "thinking": formatter.thinking,
        "num_samples": config.num_samples,
        "prompts": content_key(
            sorted([p.id, p.text, p.answer or "", canonical_json(p.metadata)] for p in prompts)
        ),
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
        "backend": config.engine.backend,
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
                    text, ids = formatter.render(fill_prompt(config.prompt_template, prompt.text))
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
                with (
                    CheckPool(
                        config.checker,
                        config.answer_formats,
                        config.checks.checker_timeout,
                        config.checks.checker_processes,
                    ) as pool,
                    Progress("rollouts", len(done) + len(owed), len(done)) as progress,
                ):
                    engine = start_engine(model, config.engine, config.trust_remote_code)
                    job = _Job(config, tokenizer, engine, pool, writer, progress)

                    def submit(request: Request) -> None:
                        try:
                            job.submit(request)
                        except RequestError as error:
                            fail(request.row_id, request.prompt, f"the engine refused it: {error}")

                    submissions = (functools.partial(submit, request) for request in owed)
                    for result in pump(engine, submissions, job):
                        assert isinstance(result, Completion)
                        job.take(result)
        return Outcome(len(done) + len(owed), writer.rows_committed, failed)


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

    @property
    def in_flight(self) -> int:
        """Checks begun and not finished."""
        return self.pool.in_flight

    def advance(self, wait: bool) -> None:
        """Takes finished checks; commits shards that are due by age."""
        for verdict in self.pool.ready(1.0 if wait else 0.0):
            self._finish(self._rows.pop(verdict.key), verdict)
        self.writer.commit_if_due()

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
            "completion_ids": result.token_ids,
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
