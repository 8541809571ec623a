"""Sample solutions with the student: `mpd-gen rollouts`.

prompts -> chat template -> token ids -> engine -> check -> rollouts/part-*.parquet
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpd_data.checkers.builtin import make_checker
from mpd_data.checkers.gold import read_gold_answers, require_readable, unreadable_answers
from mpd_data.checkers.pool import CheckRequest, Verdict
from mpd_data.common.hashing import canonical_json, content_key
from mpd_data.common.ids import unknown_id
from mpd_data.common.machine import provenance
from mpd_data.common.models import ModelFiles, chat_template_hash, load_tokenizer, tokenizer_hash
from mpd_data.common.ngrams import repetition
from mpd_data.config import RolloutsConfig
from mpd_data.engines.protocol import Completion, Refused, RequestError, Scores, StartEngine
from mpd_data.engines.start import context_of, start_engine
from mpd_data.prompts.budget import Budget, budget_of
from mpd_data.prompts.chat import ChatFormatter, PromptError
from mpd_data.prompts.reader import choose_prompts, fill_prompt, load_examples, load_prompts
from mpd_data.prompts.rows import Prompt
from mpd_data.prompts.special import Turn, turn_of
from mpd_data.prompts.thinking import ThinkingCounter
from mpd_data.prompts.values import written
from mpd_data.stage import CheckedRun, Outcome, model_of, open_round, open_run
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind
from mpd_data.store.samples import Samples
from mpd_data.store.schema import rollout_key, seed_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One sample to take: everything that a row of rollouts needs except the completion."""

    row_id: str
    prompt: Prompt
    text: str
    ids: list[int]
    sample_idx: int


def read_prompts(config: RolloutsConfig) -> list[Prompt]:
    """Return all prompts that `config` names, with the answer that the checker reads in each gold
    answer. Raise ConfigError or DataError."""
    checker = make_checker(config.checker, config.answer_formats)
    prompts = load_prompts(
        config.prompts, config.prompt_column, config.id_column, config.answer_column,
        config.metadata_columns, config.duplicates,
    )  # fmt: skip
    return read_gold_answers(prompts, checker, config.checker)


@dataclass(frozen=True)
class RolloutSetup:
    """What a run knows before it starts an engine. A dry run has the same without weights."""

    config: RolloutsConfig
    prompts: list[Prompt]
    model: ModelFiles
    tokenizer: Any
    formatter: ChatFormatter
    turn: Turn
    context: int
    budget: Budget | None
    row_identity: dict[str, Any]
    identity: dict[str, Any]

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that the stage's shards carry."""
        return {
            **self.identity,
            "model": {"name": self.config.model, **self.model.identity()},
            "vocab_size": self.model.vocab_size,
            "eos_token_id": self.tokenizer.eos_token_id,
            "turn": self.turn.record(),
            "backend": self.config.engine.backend,
            **provenance(),
        }

    def details(self) -> dict[str, Any]:
        """Return what run.json records of the stage besides its identity."""
        return {
            "config": self.config.model_dump(mode="json", exclude={"parts"}),
            "rows": len(self.prompts) * self.config.num_samples,
        }

    @property
    def own_prompts(self) -> list[Prompt]:
        """The prompts of this process's part. All samples of a prompt are in one part and share the
        engine's cache of it."""
        part = self.config.parts.part
        return [prompt for prompt in self.prompts if part.holds(prompt.id)]

    def at(self, moment: str | None) -> "RolloutSetup":
        """Return this setup with prompts laid out as of `moment`, as `ChatFormatter.at` says."""
        return dataclasses.replace(self, formatter=self.formatter.at(moment))

    def requests(self, prompt: Prompt) -> list[Request]:
        """Return the samples to take of a prompt. Raise PromptError where it cannot be used or
        leaves no room for its completion."""
        if prompt.flaw is not None:
            raise PromptError(prompt.flaw)
        text, ids = self.formatter.render(
            fill_prompt(self.config.prompt_template, prompt.message), prompt.turns
        )
        if unknown := unknown_id(ids, self.model.vocab_size, self.model.name):
            raise PromptError(unknown)
        room = self.config.sampling.max_tokens
        if len(ids) + room > self.context:
            raise PromptError(
                f"{len(ids)} prompt tokens and {room} for the completion do not fit the context of"
                f" {self.context}; lower --max-tokens or raise --max-model-len"
            )
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
    """Check everything that can be checked without an engine. Raise ConfigError or DataError.

    Without `weights`, for a dry run, the model's weights are neither fetched nor hashed, and the
    round must have been started with these settings unless `overwrite`, as a run finds when it
    claims the round. `model` and `prompts` replace what `config` names: a student that is yet to be
    trained, prompts that were read before.
    """
    round_dir = RoundDir(config.out)
    require_kind(config.out, "round")
    model = model or model_of(config, weights)
    if not weights:
        saved = round_dir.saved_stage("rollouts")
        model = model.as_saved(saved and saved["identity"].get("model"))
    prompts = read_prompts(config) if prompts is None else prompts
    chosen = choose_prompts(prompts, config.num_prompts, f"{config.seed}/{config.round}")
    if overwrite or round_dir.saved_stage("rollouts") is None:  # a begun round goes on
        require_readable(chosen, config.checker, config.max_unreadable_answers)
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    examples: list[tuple[str, str]] = []
    if config.examples is not None:
        pairs = load_examples(config.examples, config.prompt_column, config.examples_column)
        examples = [(fill_prompt(config.prompt_template, user), answer) for user, answer in pairs]
    formatter = ChatFormatter(
        tokenizer, config.template_kwargs, config.thinking,
        system_prompt=config.system_prompt, examples=examples,
    )  # fmt: skip
    row_identity = {
        "round": config.round,
        "sampling": config.sampling.model_dump(),
        "model": model.identity(),
        "seed": config.seed,
    }
    turn = turn_of(model, tokenizer, config.trust_remote_code)
    budget = budget_of(config, tokenizer, formatter)
    if budget is not None:
        row_identity["token_budget"] = dataclasses.asdict(budget)
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
            sorted(
                [p.id, p.text, p.answer or p.missing, canonical_json(p.metadata), *p.turns]
                for p in chosen
            )
        ),
        **config.engine.identity,
        "chat_template": chat_template_hash(tokenizer),
        "template_kwargs": config.template_kwargs,
        "tokenizer": tokenizer_hash(tokenizer),
        "stop_ids": turn.stop_ids,
    }
    context = context_of(model, config.engine, config.trust_remote_code)
    prepared = RolloutSetup(
        config, chosen, model, tokenizer, formatter, turn, context, budget, row_identity, identity
    )
    if not overwrite:
        saved = round_dir.check("rollouts", identity, prepared.details(), {p.id for p in chosen})
        prepared = prepared.at(saved["begun"] if saved and "begun" in saved else None)
    return prepared


def run_rollouts(
    config: RolloutsConfig, overwrite: bool = False, limit: int | None = None
) -> Outcome:
    """Take the samples that the round in `config.out` does not have yet, and write their rows.

    overwrite: delete the round's rows first. limit: the largest number of samples to take.
    Raise ConfigError or DataError for bad input, EngineError when the engine fails. Rows that were
    finished before an error are kept, and the next call resumes from there.
    """
    config.parts.require_one_process("mpd-gen rollouts")
    return sample(setup(config, overwrite=overwrite), overwrite, limit)


def sample(
    prepared: RolloutSetup,
    overwrite: bool = False,
    limit: int | None = None,
    start: StartEngine = start_engine,
) -> Outcome:
    """Run the stage that `run_rollouts` has prepared, with the engine that `start` returns. It is
    closed at the end."""
    config, identity, details = prepared.config, prepared.identity, prepared.details()
    if (unreadable := unreadable_answers(prepared.prompts, config.checker)[1]) is not None:
        _log.warning(unreadable)
    round_dir, metadata = RoundDir(config.out), prepared.metadata()
    with open_round(round_dir, "rollouts", config, identity, overwrite, details) as opened:
        total = len(prepared.own_prompts) * config.num_samples
        if limit is not None:
            total = min(total, len(opened.done) + limit)
        with open_run(opened, metadata, config.checker, config.answer_formats, total) as run:
            job = RolloutJob(prepared.at(opened.begun), run, Samples.of(round_dir))
            submissions = job.submissions()
            run.work(
                itertools.islice(submissions, limit),
                job.take,
                lambda: start(prepared.model, config.engine, config.trust_remote_code),
            )
            remaining = sum(1 for _ in submissions)
        return Outcome(run.progress.done, run.writer.rows_committed, run.failures.count, remaining)


@dataclass
class RolloutJob:
    """What happens to one sample: request -> (engine) -> completion -> (check) -> row."""

    prepared: RolloutSetup
    run: CheckedRun
    samples: Samples
    _requests: dict[str, Request] = field(default_factory=dict)
    # What a sample that must answer has said, with the text that asks it to.
    _begun: dict[str, list[int]] = field(default_factory=dict)

    @functools.cached_property
    def _thinking(self) -> ThinkingCounter:
        return ThinkingCounter(self.prepared.tokenizer)

    def submissions(self) -> Iterator[Callable[[], None]]:
        """Yield a call that submits each missing sample, prompt by prompt. A prompt is read when
        its turn comes, so memory does not grow with the number of prompts."""
        run, prepared = self.run, self.prepared
        for prompt in prepared.own_prompts:
            try:
                requests = prepared.requests(prompt)
            except PromptError as error:
                row_id = rollout_key(prompt.id, [], 0, prepared.row_identity)
                run.progress.fail(prepared.config.num_samples)
                run.failures.tried += 1
                run.failures.add(row_id, prompt.id, f"{prompt.source}: {error}")
                continue
            for request in requests:
                if request.row_id in run.opened.done:
                    run.progress.skip()
                else:
                    self.samples.require_new(prompt.id, request.sample_idx, request.text)
                    run.failures.tried += 1
                    yield functools.partial(self._submit, request)

    def _submit(self, request: Request) -> None:
        """Submit a sample, or the rest of one that has begun."""
        row_id, sampling = request.row_id, self.prepared.config.sampling
        begun, budget = self._begun.get(row_id, []), self.prepared.budget
        if budget is not None:
            limit = sampling.max_tokens - len(begun) if begun else budget.tokens
            sampling = sampling.model_copy(update={"max_tokens": limit})
        # The rest draws other random numbers than the beginning.
        seed = seed_of(content_key([row_id, "answer"]) if begun else row_id)
        try:
            # Some log-probabilities, for the trainer to compare (mpd_train/self_check.py).
            known = request.sample_idx == 0 and request.prompt in self.prepared.prompts[:8]
            known = known and budget is None
            self.run.engine.submit_generate(row_id, request.ids + begun, sampling, seed, known)
            self._requests[row_id] = request
        except RequestError as error:
            self._begun.pop(row_id, None)
            self._fail(request, str(error))

    def _must_answer(self, request: Request, result: Completion) -> bool:
        """Whether a completion has ended at the token budget. Its rest is then to be submitted."""
        budget = self.prepared.budget
        if budget is None or result.finish_reason == "stop" or result.key in self._begun:
            return False
        text = self.prepared.turn.read(result.token_ids, request.ids)
        self._begun[result.key] = budget.continuation(result.token_ids, text)
        return True

    def _fail(self, request: Request, reason: str) -> None:
        self.run.progress.fail()
        message = f"{request.prompt.source}: the engine refused it: {reason}"
        self.run.failures.add(request.row_id, request.prompt.id, message)

    def take(self, result: Completion | Scores | Refused) -> None:
        """Make a row of what the engine finished."""
        request = self._requests.pop(result.key)
        if isinstance(result, Refused):
            self._begun.pop(result.key, None)
            self._fail(request, result.message)
            return
        assert isinstance(result, Completion)
        if self._must_answer(request, result):
            self._submit(request)
            return
        token_ids = self._begun.pop(result.key, []) + list(result.token_ids)
        stopped = result.finish_reason == "stop"
        # The loss needs the end token among the ids; people do not need it in the text.
        visible = token_ids[:-1] if stopped else token_ids
        completion = self.prepared.turn.read(visible, request.ids)
        prompt = request.prompt
        metadata, gold = written(prompt.metadata), None if prompt.unreadable else prompt.answer
        row = {
            "row_id": request.row_id,
            "prompt_id": prompt.id,
            "round": self.prepared.config.round,
            "sample_idx": request.sample_idx,
            "prompt": request.text,
            "completion": completion,
            "prompt_ids": request.ids,
            # Arrow takes an array at once, a list number by number.
            "completion_ids": np.array(token_ids, dtype=np.int32),
            "num_prompt_tokens": len(request.ids),
            "num_completion_tokens": len(token_ids),
            "finish_reason": result.finish_reason,
            "problem": prompt.text,
            "gold_answer": prompt.answer,
            "repetition": repetition(token_ids),
            "metadata": canonical_json(metadata) if metadata else None,
            "seed": seed_of(request.row_id),
            "sampled_logprobs": result.logprobs,
            "num_thinking_tokens": self._thinking.count(request.text, completion, token_ids),
        }
        if stopped:
            self.run.check(
                CheckRequest(request.row_id, completion, gold, metadata, None, request.text),
                functools.partial(self._finish, row),
            )
        else:
            # A completion that was cut off has no final answer, whatever its text contains.
            correct = None if gold is None else False
            self._finish(row, Verdict(request.row_id, None, correct, None, None))

    def _finish(self, row: dict[str, Any], verdict: Verdict) -> None:
        row |= {"answer": verdict.answer, "is_correct": verdict.is_correct}
        row["check_error"] = verdict.error
        self.run.writer.add(row)
        tokens, truncated = row["num_completion_tokens"], row["finish_reason"] == "length"
        self.run.progress.update(tokens, truncated)
