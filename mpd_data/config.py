"""Settings of the generation stages, checked by pydantic.

The same models serve the command line and a pipeline's TOML: a field here is an option there.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from mpd_data.common.errors import ConfigError
from mpd_data.store.locks import Part


def _on_a_file_system(path: Path) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{path}: object stores are not supported, as they have neither links nor locks; give a"
            " folder on a file system and copy the finished round"
        )
    return path


RoundPath = Annotated[Path, AfterValidator(_on_a_file_system)]


class Strict(BaseModel):
    """Unknown keys are errors, values are final."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineConfig(Strict):
    """How the engine runs a model. Of these only `dtype` changes what comes out; with another
    backend the same distributions are sampled with other random numbers. With the backend openai
    a server runs the model, as it was told to when it was started."""

    backend: Literal["vllm", "transformers", "openai"] = Field(
        "vllm",
        description="Engine. transformers: slower, for machines where vLLM does not install."
        " openai: a running vLLM server, for models that are too large for this machine.",
    )
    base_url: str | None = Field(
        None,
        description="URL of the server (openai), as http://HOST:8000. A key that it wants stands"
        " in the environment: MPD_API_KEY or OPENAI_API_KEY.",
    )
    served_model: str | None = Field(
        None,
        description="The server's name for the model (openai); default: the model's name here.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the engine."
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Context in tokens; default: the model's own."
    )
    max_num_seqs: int = Field(
        256, ge=1, description="Sequences the engine runs at once; with a server, requests to it."
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per engine step. Bounds the memory of scoring on a GPU:"
        " tokens x vocabulary x 4 bytes, outside vLLM's own memory profile. Default: vLLM's own;"
        " 2048 with transformers.",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory for weights and cache (vLLM)."
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="GPUs that share each layer of a model (vLLM)."
    )
    pipeline_parallel_size: int = Field(
        1, ge=1, description="GPUs, or groups of them, that share a model's layers out (vLLM)."
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="Cache on a CPU machine, in GiB (vLLM).")

    @field_validator("base_url")
    @classmethod
    def _names_a_server_and_no_secret(cls, url: str | None) -> str | None:
        # The URL is written to run.json and into messages, so that a secret must not stand in it.
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
        """GPUs that one engine takes, where there are any."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def served(self, name: str) -> str | None:
        """What the server calls the model that is `name` here; None where this machine runs it."""
        return (self.served_model or name) if self.backend == "openai" else None


class SamplingConfig(Strict):
    """How one continuation is sampled."""

    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    top_k: int = Field(-1, ge=-1, description="Most probable tokens kept; -1: all.")
    max_tokens: int = Field(2048, ge=1, description="Longest continuation, in tokens.")


class RewriteSamplingConfig(SamplingConfig):
    """Greedy unless asked otherwise: the rewrite is to be the teacher's best, not a sample."""

    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy.")


class OutputConfig(Strict):
    """How results reach the disk. None of it changes a row."""

    rows_per_shard: int = Field(1024, ge=1, description="A shard is closed after so many rows")
    seconds_per_shard: float = Field(300.0, gt=0, description="or after so many seconds.")


class PartsConfig(Strict):
    """How a stage is shared out among processes. None of it changes a row."""

    workers: int = Field(
        1,
        ge=1,
        description="Processes on this machine, each with an engine and GPUs of its own, that share"
        " the work; with --ray, actors of the cluster.",
    )
    ray: bool = Field(
        False,
        description="Do the work on a Ray cluster: the one of RAY_ADDRESS, or one that runs here."
        " All nodes share the round's folder.",
    )
    shard_index: int | None = Field(
        None,
        ge=0,
        description="Do this part of the work, from 0; default: the task's place in a SLURM job"
        " array, or all of it.",
    )
    num_shards: int | None = Field(
        None, ge=1, description="of so many parts; default: the tasks of the SLURM job array."
    )

    @model_validator(mode="after")
    def _index_of_count(self) -> Self:
        if (self.shard_index is None) != (self.num_shards is None):
            raise ValueError("--shard-index and --num-shards go together")
        if self.ray and self.shard_index is not None:
            raise ValueError(
                "--ray divides the work itself: leave out --shard-index and --num-shards"
            )
        if self.shard_index is not None and self.shard_index >= (self.num_shards or 1):
            raise ValueError(
                f"--shard-index {self.shard_index} of --num-shards {self.num_shards}: counted from"
                " 0, the last is one less than their number"
            )
        return self

    @property
    def part(self) -> Part:
        """The part that this process, with its workers, does."""
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
    """When a stage gives up. None of it changes a row."""

    max_error_rate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Stop when more than this share of the requests of a run have failed, 50 or"
        " more of them having been made.",
    )


class CheckConfig(Strict):
    """How answers are checked, in worker processes. None of it changes a row of a sound checker."""

    checker_timeout: float = Field(
        5.0, gt=0, description="Seconds for one check; after them it is stopped and has failed."
    )
    checker_processes: int = Field(2, ge=1, description="Processes that check answers.")


AnswerFormat = Literal["boxed", "hashes", "tag", "phrase", "bare"]
ANSWER_FORMATS: tuple[AnswerFormat, ...] = ("boxed", "hashes", "tag", "phrase", "bare")


class RolloutsConfig(Strict):
    """Settings of `run_rollouts` and `mpd-gen rollouts`."""

    model: str = Field(description="Student: a model folder or hub id.")
    revision: str | None = Field(None, description="Hub revision of the student.")
    prompts: list[str] = Field(
        min_length=1,
        description="JSONL, CSV or Parquet files, or Hugging Face datasets as"
        " hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG].",
    )
    out: RoundPath = Field(description="The round's folder.")
    round: int = Field(0, ge=0, description="Number of the round, part of each row's key.")
    num_samples: int = Field(1, ge=1, description="Samples per prompt.")
    num_prompts: int | None = Field(
        None, ge=1, description="Choose so many prompts, by hash of round, seed and prompt id."
    )
    prompt_column: str = Field("problem", description="Column of the problem's text.")
    id_column: str | None = Field(None, description="Column of unique ids; default: text hash.")
    answer_column: str | None = Field(None, description="Column of gold answers, if any.")
    metadata_columns: list[str] = Field(
        default_factory=list, description="Columns to carry through, as JSON in `metadata`."
    )
    duplicates: Literal["refuse", "first"] = Field(
        "refuse", description="Prompts with an id that was there before: refuse, or keep the first."
    )
    prompt_template: str = Field(
        "{{problem}}", description="The user's message; {{problem}} stands for the problem."
    )
    system_prompt: str | None = Field(None, description="System message before the user's.")
    examples: Path | None = Field(
        None, description="Few-shot examples: a JSONL, CSV or Parquet file, shown as earlier turns."
    )
    examples_column: str = Field("solution", description="Column of the examples' solutions.")
    thinking: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Thinking mode of the student's chat template. auto: on where it has a switch.",
    )
    checker: str = Field(
        "number",
        description="How answers are compared: number, math, text, choice, reasoning-gym, or your"
        " own as package.module:Name.",
    )
    answer_formats: list[AnswerFormat] = Field(
        list(ANSWER_FORMATS),
        min_length=1,
        description=r"Where an answer may stand: boxed (\boxed{x}), hashes (#### x), tag"
        " (<answer>x</answer>), phrase (the answer is x), bare (nothing but x).",
    )
    seed: int = Field(0, ge=0, description="Base seed; each row's own is derived from its key.")
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="More settings for the chat template."
    )
    trust_remote_code: bool = Field(False, description="Run code that ships with the model.")
    sampling: SamplingConfig = SamplingConfig()
    checks: CheckConfig = CheckConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()
    parts: PartsConfig = PartsConfig()
    failures: FailureConfig = FailureConfig()


Choice = Literal["shortest", "first", "likeliest", "all"]


class FilterConfig(Strict):
    """Which rewrites are kept. Each rule has its status in the shards; `--refilter` applies
    changed rules to rewrites that are there."""

    drafts: Literal["any", "correct", "incorrect"] = Field(
        "any", description="Rewrites of which drafts are kept, by their gold answers."
    )
    keep_answer: bool = Field(True, description="Only rewrites that keep their draft's answer.")
    require_correct: bool = Field(
        True, description="Only rewrites with the gold answer, where there is one."
    )
    max_ratio: float = Field(
        1.0,
        gt=0,
        description="Longest rewrite kept, as a multiple of its draft's tokens. 1: not longer."
        " Below 1 later rounds starve.",
    )
    min_ratio: float = Field(
        0.0, ge=0, description="Shortest rewrite kept, as a multiple of its draft's tokens."
    )
    max_repetition: float = Field(
        1.0, ge=0, le=1, description="Largest share of repeated 4-grams in a rewrite kept."
    )


class RewriteConfig(Strict):
    """Settings of `run_rewrite` and `mpd-gen rewrite`."""

    teacher: str = Field(description="Teacher: a model folder or hub id.")
    revision: str | None = Field(None, description="Hub revision of the teacher.")
    shards: RoundPath = Field(description="The round's folder, with its rollouts.")
    student: str | None = Field(
        None,
        description="The model that will be trained, where it is not the one that sampled: the"
        " scores are over its vocabulary.",
    )
    template: str = Field(
        "tags",
        description="Rewrite template: a TOML file, or one that is built in: tags (for models that"
        " follow instructions well), plain (for small ones), draft (no rewrite: the draft itself is"
        " scored and learned, which is on-policy distillation).",
    )
    num_candidates: int = Field(1, ge=1, description="Rewrites per rollout.")
    choose: Choice = Field(
        "shortest",
        description="Which of a rollout's rewrites to keep, of those that pass. likeliest: the one"
        " with the highest mean log-probability under the student, whose engine follows the"
        " teacher's.",
    )
    score_context: Literal["problem", "rewrite"] = Field(
        "problem",
        description="What the teacher sees when it scores: the student's prompt, or the rewrite"
        " prompt with the draft.",
    )
    num_logprobs: int = Field(64, ge=1, description="K: log-probabilities stored per token.")
    seed: int = Field(0, ge=0, description="Base seed; each row's own is derived from its key.")
    thinking: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Thinking mode of the teacher's chat template when it rewrites. auto: off where"
        " it has a switch. (When it scores, it has the student's.)",
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="More settings for the teacher's chat template when it rewrites.",
    )
    score_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="More settings for the teacher's chat template when it scores under the rewrite"
        " prompt.",
    )
    trust_remote_code: bool = Field(False, description="Run code that ships with the model.")
    sampling: RewriteSamplingConfig = RewriteSamplingConfig()
    filters: FilterConfig = FilterConfig()
    checks: CheckConfig = CheckConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()
    parts: PartsConfig = PartsConfig()
    failures: FailureConfig = FailureConfig()


class InitConfig(Strict):
    """`mpd-gen init`."""

    student: str = Field(description="Student: a model folder or hub id.")
    teacher: str = Field(description="Teacher: a model folder or hub id, of the same family.")
    prompts: str = Field(
        description="Training prompts: a JSONL, CSV or Parquet file, or"
        " hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG]."
    )
    test: str | None = Field(
        None, description="Held-out prompts; default: a part of --prompts, where it is a file."
    )
    prompt_column: str | None = Field(
        None, description="Column of the problem's text; default: found by its usual names."
    )
    answer_column: str | None = Field(
        None, description="Column of gold answers; default: found by its usual names, if any."
    )
    id_column: str | None = Field(
        None, description="Column of unique ids; default: found by its usual names, if any."
    )
    checker: str | None = Field(
        None,
        description="How answers are compared, as for rollouts; default: by the gold answers.",
    )


class ContaminationConfig(Strict):
    """`mpd-gen contamination`."""

    prompts: list[str] = Field(
        min_length=1,
        description="Training prompts: JSONL, CSV or Parquet files, or datasets as"
        " hf://OWNER/NAME[@REVISION]?split=SPLIT[&config=CONFIG].",
    )
    against: list[str] = Field(
        min_length=1, description="Evaluation prompts, in the same forms; they are held in memory."
    )
    prompt_column: str = Field("problem", description="Column of the problem's text.")
    id_column: str | None = Field(
        None, description="Column that names a training prompt in the report; default: its row."
    )
    against_prompt_column: str | None = Field(
        None, description="Column of the evaluation problem's text; default: --prompt-column."
    )
    against_id_column: str | None = Field(
        None, description="Column that names an evaluation prompt; default: its row."
    )
    n: int = Field(13, ge=1, description="Words of an n-gram.")
    fail_above: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Exit with 1 where a larger part of the evaluation prompts overlaps.",
    )
