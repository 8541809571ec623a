"""Settings of `mpd-gen`, checked by pydantic.

The command line and a pipeline's TOML use the same models: a field here is an option there.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mpd_data.common.errors import ConfigError
from mpd_data.store.locks import Part


def _on_a_file_system(path: Path) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{path}: object stores are not supported, because they have no links and no locks;"
            " give a folder on a file system and copy the finished round"
        )
    return path


RoundPath = Annotated[Path, AfterValidator(_on_a_file_system)]


class Strict(BaseModel):
    """Base of all settings: unknown keys are errors, and values cannot be changed."""

    heading: ClassVar[str | None] = None  # of the settings' section in --help

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# Arguments of vLLM's LLM that the toolkit sets, and what sets them.
_OWN_KWARGS = {
    "model": "the model's option",
    "tokenizer": "the model's own tokenizer",
    "tokenizer_mode": "the model's own tokenizer",
    "skip_tokenizer_init": "the model's own tokenizer",
    "revision": "--revision or --teacher-revision",
    "trust_remote_code": "--trust-remote-code",
    "seed": "--seed",
    "logprobs_mode": "raw log-probabilities, which are what is stored",
    "max_logprobs": "--num-logprobs",
    "enable_prefix_caching": "what the engine chooses; scores are checked for it",
    "enable_lora": "the folder of an adapter as the model",
    "generation_config": "the model's own, and the sampling options",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "kv_cache_memory_bytes": "--kv-cache-gib",
}

# Those that change speed or memory and not the model. What is not listed is taken to change it.
_NEUTRAL_KWARGS = {
    "block_size", "compilation_config", "cpu_offload_gb", "cudagraph_capture_sizes",
    "data_parallel_size", "disable_custom_all_reduce", "disable_log_stats",
    "distributed_executor_backend", "enable_chunked_prefill", "enable_expert_parallel",
    "enforce_eager", "load_format", "long_prefill_token_threshold",
    "max_parallel_loading_workers", "num_gpu_blocks_override", "scheduling_policy",
    "speculative_config", "use_tqdm_on_load", "download_dir", "async_scheduling",
}  # fmt: skip


class EngineConfig(Strict):
    """How the engine runs a model. Only `dtype` and some of `engine_kwargs` change the
    distributions that are sampled; another backend draws other random numbers. With the backend
    openai a server runs the model, with the settings that the server was started with."""

    heading = "Engine"

    backend: Literal["vllm", "transformers", "openai"] = "vllm"
    """Engine that runs the model. transformers is slower and needs no vLLM; openai is a running
    vLLM server, for models that are too large for this machine."""
    base_url: str | None = None
    """URL of the server (openai), as http://HOST:8000. Set MPD_API_KEY or OPENAI_API_KEY in the
    environment if the server needs a key."""
    served_model: str | None = None
    """Name of the model on the server (openai). Default: its name here."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and activations."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest context, in tokens. Default: the model's own."""
    max_num_seqs: int = Field(256, ge=1)
    """Maximum concurrent sequences (vllm, transformers) or requests (openai)."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Maximum tokens per engine step. It bounds the memory of scoring on a GPU: tokens x vocabulary
    x 4 bytes, which vLLM's memory profile does not count. Default: vLLM's own; 2048 with
    transformers."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Fraction of the GPU's memory for weights and cache (vllm)."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Number of GPUs that each layer is split over (vllm)."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Number of groups of GPUs that hold successive layers (vllm)."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Size of the KV cache on a CPU machine, in GiB (vllm)."""
    engine_kwargs: dict[str, Any] = {}
    """More arguments of vLLM's LLM, such as {"quantization": "fp8", "enforce_eager": true}. Those
    that can change what is sampled belong to the round's settings."""

    @field_validator("engine_kwargs")
    @classmethod
    def _leaves_the_toolkits_own(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if option := _OWN_KWARGS.get(name):
                raise ValueError(f"{name}: use {option}")
        return given

    @model_validator(mode="after")
    def _has_kwargs_for_vllm_alone(self) -> Self:
        if self.engine_kwargs and self.backend != "vllm":
            raise ValueError(
                f"engine_kwargs: arguments of vLLM; the backend is {self.backend}"
                + (", whose server has its own" if self.backend == "openai" else "")
            )
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What can change the distributions that are sampled and scored."""
        changing = {k: v for k, v in self.engine_kwargs.items() if k not in _NEUTRAL_KWARGS}
        return {"dtype": self.dtype} | ({"engine_kwargs": changing} if changing else {})

    @field_validator("base_url")
    @classmethod
    def _names_a_server_and_no_secret(cls, url: str | None) -> str | None:
        # The URL is written to run.json and into messages, so it must not hold a secret.
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            raise ValueError("expected the URL of a server, as http://HOST:8000")
        if parts.username is not None or parts.password is not None:
            raise ValueError("no user or password in the URL; set MPD_API_KEY instead")
        if parts.query or parts.fragment:
            raise ValueError("nothing after ? or # in the URL; set MPD_API_KEY for a key")
        return url.rstrip("/").removesuffix("/v1")

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that one engine takes, on a machine that has GPUs."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def served(self, name: str) -> str | None:
        """Return the server's name of the model `name`, or None if this machine runs the model."""
        return (self.served_model or name) if self.backend == "openai" else None


class SamplingConfig(Strict):
    """How one completion is sampled."""

    heading = "Sampling"

    temperature: float = Field(1.0, ge=0, le=2)
    """Temperature. 0 is greedy: always the most probable token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most probable tokens that together have this probability."""
    top_k: int = Field(-1, ge=-1)
    """Sample from this many most probable tokens. -1: from all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample from the tokens with at least this share of the most probable token's probability."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtract this from the logit of each token that the completion has already (vllm, openai)."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Divide the logit of each token of prompt and completion by this if it is positive, else
    multiply it (vllm, openai). Above 1 the model repeats less."""
    max_tokens: int = Field(2048, ge=1)
    """Longest completion, in tokens. Longer ones are truncated."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Strings before which a completion ends, as if the model had ended its turn there. For base
    models, which may go on with a next problem."""

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Rounds that were begun before these settings existed must find their identity again.
        off = {"min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "stop": []}
        values: dict[str, Any] = dump(self)
        return {k: v for k, v in values.items() if k not in off or v != off[k]}


class RewriteSamplingConfig(SamplingConfig):
    """How one rewrite is sampled. Greedy by default: the teacher's best rewrite is wanted."""

    temperature: float = Field(0.0, ge=0, le=2)
    """Temperature. 0 is greedy: always the most probable token."""


class OutputConfig(Strict):
    """How rows are written to disk. These settings change no row."""

    heading = "Shards"

    rows_per_shard: int = Field(1024, ge=1)
    """Maximum rows per shard."""
    seconds_per_shard: float = Field(300.0, gt=0)
    """Maximum seconds before a partly filled shard is committed."""


class PartsConfig(Strict):
    """How the work is divided among processes. These settings change no row."""

    heading = "Several processes"

    workers: int = Field(1, ge=1)
    """Number of processes on this machine that share the work, each with its own engine and GPUs.
    With --ray: number of actors on the cluster."""
    ray: bool = False
    """Run on a Ray cluster: the one in RAY_ADDRESS, or one on this machine. All nodes must share
    the round's folder."""
    shard_index: int | None = Field(None, ge=0)
    """Number of the part that this process does, from 0. Default: the task's position in the SLURM
    job array."""
    num_shards: int | None = Field(None, ge=1)
    """Total number of parts. Default: the size of the SLURM job array, else 1."""

    @model_validator(mode="after")
    def _index_of_count(self) -> Self:
        if (self.shard_index is None) != (self.num_shards is None):
            raise ValueError("--shard-index and --num-shards go together")
        if self.ray and self.shard_index is not None:
            raise ValueError("--ray divides the work itself: remove --shard-index and --num-shards")
        if self.shard_index is not None and self.shard_index >= (self.num_shards or 1):
            raise ValueError(
                f"--shard-index {self.shard_index} of --num-shards {self.num_shards}: parts are"
                f" counted from 0, so the last is {(self.num_shards or 1) - 1}"
            )
        return self

    @property
    def part(self) -> Part:
        """The part of the work that this process and its workers do."""
        return Part(self.shard_index or 0, self.num_shards or 1)

    def require_one_process(self, command: str) -> None:
        """Raise ConfigError if the work is to be shared among processes, which `command` starts."""
        if self.ray or self.workers > 1:
            raise ConfigError(
                f"--{'ray' if self.ray else 'workers'}: a Python call works in its own process. Run"
                f" `{command}` to share the work among several, or call with shard_index and"
                " num_shards in each of them."
            )


class FailureConfig(Strict):
    """When a stage stops with an error. These settings change no row."""

    heading = "Failures"

    max_error_rate: float = Field(0.5, ge=0, le=1)
    """Stop when more than this fraction of the requests has failed, counted after 50 requests."""


class CheckConfig(Strict):
    """How answers are checked, in worker processes. These settings change no row, unless a check
    takes longer than its timeout."""

    heading = "Answer checks"

    checker_timeout: float = Field(5.0, gt=0)
    """Seconds after which a check is stopped and counts as failed."""
    checker_processes: int = Field(2, ge=1)
    """Number of processes that check answers."""


AnswerFormat = Literal["boxed", "hashes", "tag", "phrase", "bare"]
ANSWER_FORMATS: tuple[AnswerFormat, ...] = ("boxed", "hashes", "tag", "phrase", "bare")


class _Stage(Strict):
    """What the stages with an engine check of both their settings together."""

    @model_validator(mode="after")
    def _penalties_that_the_engine_has(self) -> Self:
        engine, sampling = (getattr(self, name) for name in ("engine", "sampling"))
        if engine.backend == "transformers" and (
            sampling.presence_penalty != 0 or sampling.repetition_penalty != 1
        ):
            raise ValueError(
                "--presence-penalty and --repetition-penalty: the backend transformers has none;"
                " use --backend vllm or openai"
            )
        return self


class RolloutsConfig(_Stage):
    """Settings of `run_rollouts` and `mpd-gen rollouts`."""

    heading = "Prompts and answers"

    model: str
    """Student: a model folder or a hub id."""
    revision: str | None = None
    """Revision of the student on the hub."""
    prompts: list[str] = Field(min_length=1)
    """Prompts: JSONL, CSV or Parquet files, folders of them, or Hugging Face datasets as
    hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG] or
    hf://datasets/OWNER/NAME[@REVISION]/PATH."""
    out: RoundPath
    """Folder of the round."""
    round: int = Field(0, ge=0)
    """Number of the round. It is part of each row's key."""
    num_samples: int = Field(1, ge=1)
    """Number of samples per prompt."""
    num_prompts: int | None = Field(None, ge=1)
    """Number of prompts to use, chosen by hash of round, seed and prompt id. Default: all."""
    prompt_column: str = "problem"
    """Column with the problem's text."""
    id_column: str | None = None
    """Column with unique ids. Default: the hash of the text."""
    answer_column: str | None = None
    """Column with gold answers, if any."""
    metadata_columns: list[str] = Field(default_factory=list)
    """Columns to copy into each row, as JSON in `metadata`."""
    duplicates: Literal["refuse", "first"] = "refuse"
    """Several prompts with one id: refuse them, or keep the first."""
    prompt_template: str = "{{problem}}"
    """The user's message. {{problem}} is replaced by the problem."""
    system_prompt: str | None = None
    """System message, placed before the user's message."""
    examples: Path | None = None
    """Few-shot examples, shown as earlier turns: a JSONL, CSV or Parquet file."""
    examples_column: str = "solution"
    """Column with the examples' solutions."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Thinking mode of the student's chat template. auto: on, if the template has a switch for
    it."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens after which a student that has not ended must answer: --budget-text is put there, and
    sampling goes on, up to --max-tokens in all. A student that thinks must end its thinking then; a
    later answer goes on. Default: no such limit."""
    budget_text: str | None = None
    """Text that asks for the answer. Default: the end of thinking for a student that thinks, else
    the beginning of an answer in \\boxed{}."""
    checker: str = "number"
    """How an answer is compared with the gold answer: number, math, text, choice, reasoning-gym, or
    your own checker as package.module:Name."""
    max_unreadable_answers: float = Field(0.05, ge=0, le=1)
    """Largest fraction of gold answers that the checker may be unable to read. A new round with
    more is refused before the first sample."""
    answer_formats: list[AnswerFormat] = Field(list(ANSWER_FORMATS), min_length=1)
    r"""Forms of an answer that are recognised: boxed (\boxed{x}), hashes (#### x), tag
    (<answer>x</answer>), phrase (the answer is x), bare (nothing but x)."""
    seed: int = Field(0, ge=0)
    """Base seed. Each row derives its own seed from its key."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Additional variables for the chat template."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the model to run."""
    sampling: SamplingConfig = SamplingConfig()
    checks: CheckConfig = CheckConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()
    parts: PartsConfig = PartsConfig()
    failures: FailureConfig = FailureConfig()

    @model_validator(mode="after")
    def _samples_that_differ(self) -> Self:
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"--num-samples {self.num_samples} at --temperature 0 gives the same sample"
                f" {self.num_samples} times: give a temperature above 0, or one sample"
            )
        return self

    @model_validator(mode="after")
    def _budget_below_the_limit(self) -> Self:
        if self.budget_text is not None and self.token_budget is None:
            raise ValueError("--budget-text goes with --token-budget")
        if self.token_budget is not None and self.token_budget >= self.sampling.max_tokens:
            raise ValueError(
                f"--token-budget {self.token_budget} leaves no room for an answer within"
                f" --max-tokens {self.sampling.max_tokens}: lower it"
            )
        return self


Choice = Literal["shortest", "first", "likeliest", "support", "all"]


class FilterConfig(Strict):
    """Which rewrites are kept. A rewrite that a rule rejects has the rule's status in the shards;
    `--refilter` applies changed rules to existing rewrites."""

    heading = "Filters"

    drafts: Literal["any", "correct", "incorrect"] = "any"
    """Rewrite only drafts that are correct, or incorrect, or any. Without a gold answer a draft is
    of both kinds. "correct" saves the teacher's time for drafts whose rewrites --keep-answer and
    --require-correct reject together."""
    keep_answer: bool = True
    """Keep only rewrites with the same answer as their draft."""
    corrections: bool = False
    """Keep also rewrites with another answer than their draft, if it is the gold answer. Without
    gold answers nothing is kept that --keep-answer rejects."""
    require_correct: bool = True
    """Keep only rewrites with the gold answer, for prompts that have one."""
    max_ratio: float = Field(1.0, gt=0)
    """Longest rewrite to keep, as a multiple of its draft's tokens. 1: not longer than the draft.
    Below 1, later rounds keep few rewrites."""
    min_ratio: float = Field(0.0, ge=0)
    """Shortest rewrite to keep, as a multiple of its draft's tokens."""
    max_ratio_hard: float | None = Field(None, gt=0)
    """--max-ratio of a problem that the student never solves. --max-ratio is then that of one that
    it always solves; between them the ratio is linear in the share of right rollouts. Default: the
    same for all."""
    min_ratio_hard: float | None = Field(None, ge=0)
    """--min-ratio of a problem that the student never solves, likewise."""
    max_repetition: float = Field(1.0, ge=0, le=1)
    """Largest fraction of repeated 4-grams in a rewrite to keep."""
    max_overlap: float | None = Field(None, ge=0, le=1)
    """Largest fraction of its draft's 4-grams that a rewrite to keep repeats. A copy repeats nearly
    all: 0.9 rejects it. Default: no limit."""
    support: bool | None = None
    """Measure whether each rewrite carries its answer, for `mpd-gen stats`: the student, which runs
    after the teacher, scores it. The two limits below measure too."""
    min_support: float | None = None
    """Least answer support to keep, in nats: how much likelier the student finds the answer after
    the rewrite than without it."""
    min_step: float | None = Field(None, le=0)
    """Least weakest step to keep, in nats: the student's log-probability of the least expected
    value that the rewrite is first to state."""

    def identity(self) -> dict[str, Any]:
        """Return what a round records. It leaves `corrections` out while it is off: rounds that
        were begun before it existed resume."""
        return self.model_dump(exclude=None if self.corrections else {"corrections"})

    @property
    def largest_ratio(self) -> float:
        """The longest rewrite of any problem, as a multiple of its draft's tokens."""
        return max(self.max_ratio, self.max_ratio_hard or 0.0)


class RewriteConfig(_Stage):
    """Settings of `run_rewrite` and `mpd-gen rewrite`."""

    heading = "Rewrites and scores"

    teacher: str
    """Teacher: a model folder or a hub id."""
    revision: str | None = None
    """Revision of the teacher on the hub."""
    shards: RoundPath
    """Folder of the round, with its rollouts."""
    student: str | None = None
    """Model that will be trained, if another model sampled the rollouts. Scores are over its
    vocabulary."""
    template: str = "tags"
    """Rewrite template: a TOML file or a built-in one. tags is for models that follow instructions
    well. examples shows worked examples, for models of under about 4 billion weights; plain shows
    none. draft rewrites nothing: the draft itself is scored and trained on, which is on-policy
    distillation."""
    cut_drafts: bool = False
    """Rewrite also drafts that hit their length limit, and those that do not fit the teacher's
    context: their beginning and end are shown, as much as fits. Only for prompts with a gold
    answer, which the rewrite must have; the others cannot be checked and are still rejected."""
    num_candidates: int = Field(1, ge=1)
    """Number of rewrites per rollout."""
    choose: Choice = "shortest"
    """Which rewrite of a rollout to keep, among those that pass the filters. likeliest: the one
    with the highest mean log-probability under the student, which runs after the teacher. support:
    the one with the highest sum of answer support and weakest step."""
    score_context: Literal["problem", "rewrite", "both"] = "problem"
    """Prompt before the rewrite when the teacher scores it: the student's prompt (problem), the
    rewrite prompt with the draft (rewrite), or one after the other (both): twice the scoring and
    nearly twice the disk, and mpd-train --targets chooses."""
    num_logprobs: int = Field(64, ge=1)
    """Number of log-probabilities to store per token (K)."""
    seed: int = Field(0, ge=0)
    """Base seed. Each row derives its own seed from its key."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Thinking mode of the teacher's chat template when it rewrites. auto: off, if the template has
    a switch for it. For scoring it is the student's mode."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Additional variables for the teacher's chat template when it rewrites."""
    score_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Additional variables for the teacher's chat template when it scores under the rewrite
    prompt."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the model to run."""
    sampling: RewriteSamplingConfig = RewriteSamplingConfig()
    filters: FilterConfig = FilterConfig()
    checks: CheckConfig = CheckConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()
    parts: PartsConfig = PartsConfig()
    failures: FailureConfig = FailureConfig()

    @property
    def measures(self) -> bool:
        """Whether the student measures how well each rewrite carries its answer."""
        return self.student_option not in (None, "--choose likeliest")

    @property
    def student_option(self) -> str | None:
        """The option for which the student runs after the teacher; None without one."""
        given = {
            "--choose support": self.choose == "support",
            "--min-support": self.filters.min_support is not None,
            "--min-step": self.filters.min_step is not None,
            "--support": bool(self.filters.support),
            "--choose likeliest": self.choose == "likeliest",
        }
        return next((option for option, is_given in given.items() if is_given), None)


class InitConfig(Strict):
    """Settings of `mpd-gen init`."""

    student: str
    """Student: a model folder or a hub id."""
    teacher: str
    """Teacher: a model folder or a hub id. It must have the student's tokenizer."""
    prompts: str
    """Training prompts: a JSONL, CSV or Parquet file, a folder of them, or
    hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG]."""
    test: str | None = None
    """Held-out prompts. Default: a part of --prompts, if that is a file."""
    prompt_column: str | None = None
    """Column with the problem's text. Default: the first usual name."""
    answer_column: str | None = None
    """Column with gold answers. Default: the first usual name, if any."""
    id_column: str | None = None
    """Column with unique ids. Default: the first usual name, if any."""
    checker: str | None = None
    """How answers are compared, as for rollouts. Default: the one that fits the gold answers."""
    slurm: bool = False
    """Also write mpd-gen.sbatch and mpd-train.sbatch, job scripts for SLURM."""


class ContaminationConfig(Strict):
    """Settings of `mpd-gen contamination`."""

    prompts: list[str] = Field(min_length=1)
    """Training prompts: JSONL, CSV or Parquet files, or datasets as
    hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG]."""
    against: list[str] = Field(min_length=1)
    """Evaluation prompts, in the same forms. They are kept in memory."""
    prompt_column: str = "problem"
    """Column with the problem's text."""
    id_column: str | None = None
    """Column that names a training prompt in the report. Default: its row."""
    against_prompt_column: str | None = None
    """Column with the evaluation problem's text. Default: --prompt-column."""
    against_id_column: str | None = None
    """Column that names an evaluation prompt. Default: its row."""
    n: int = Field(13, ge=1)
    """Number of words in an n-gram."""
    fail_above: float | None = Field(None, ge=0, le=1)
    """Exit with 1 if a larger fraction of the evaluation prompts overlaps."""
