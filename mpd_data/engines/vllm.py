"""The vLLM engine: vLLM's own step loop, fed one request at a time."""

import gc
import logging
import os
import sys
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from mpd_data.common.errors import EngineError, MPDError, reason_of, requires
from mpd_data.common.models import MERGE, ModelFiles, load_tokenizer
from mpd_data.common.weights import is_quantised
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines.protocol import Completion, RequestError, Scores
from mpd_data.prompts.special import turn_of


def prepare_environment(on_cpu: bool) -> None:
    """Set the environment variables that vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # A forked engine would inherit this process's round lock and its CUDA state.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if on_cpu:
        # In-process: starts in seconds instead of twenty, and deterministic.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # 'auto' pins every engine of a machine to the same core.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


class VLLMEngine:
    """vLLM behind the protocol. Raise EngineError where it cannot start."""

    def __init__(
        self,
        model: ModelFiles,
        config: EngineConfig,
        trust_remote_code: bool,
        context: int,
        max_logprobs: int,
    ) -> None:
        with requires("gpu", "--backend vllm"):
            import torch
        # torch then asks the driver's management library, which leaves CUDA uninitialised for vLLM.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        on_cpu = not torch.cuda.is_available()
        prepare_environment(on_cpu)
        if on_cpu:
            if config.pipeline_parallel_size > 1:
                # It starts, and its second part dies at the first step (vLLM 0.32).
                raise EngineError(
                    f"--pipeline-parallel-size {config.pipeline_parallel_size}: vLLM runs pipelines"
                    " on GPUs only. Leave it out here."
                )
            # Compiling one small function of scoring takes a minute on a fresh machine.
            torch._dynamo.config.disable = True
            # They warn about missing Triton, which a CPU machine does not need.
            for name in ("torch._library.triton", "vllm.triton_utils.importing"):
                logging.getLogger(name).setLevel(logging.ERROR)
            if "OMP_NUM_THREADS" not in os.environ:
                # Threads that share cores with others make small models many times slower. Set the
                # variable for a large model on an idle machine.
                os.environ["OMP_NUM_THREADS"] = "1"
                torch.set_num_threads(1)
        is_first = "vllm" not in sys.modules
        with requires("gpu", "--backend vllm"):
            from vllm import LLM
        if is_first:
            # vLLM collects garbage seven times, a third of a second each with the million objects
            # of its imports. Not with an engine that has closed and is garbage: it would stay.
            gc.freeze()

        tokenizer = load_tokenizer(model, trust_remote_code)
        self._stop_ids = turn_of(model, tokenizer, trust_remote_code).stop_ids
        self.max_model_len = context
        self.max_in_flight = 2 * config.max_num_seqs
        self._max_num_seqs = config.max_num_seqs
        self._speculates = config.engine_kwargs.get("speculative_config") is not None
        settings: dict[str, Any] = {
            "dtype": config.dtype,
            "max_model_len": context,
            "max_num_seqs": config.max_num_seqs,
            "max_logprobs": max_logprobs,
            "tokenizer": str(model.tokenizer_path),
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "trust_remote_code": trust_remote_code,
            # Mistral's own, beside them, would come first.
            "load_format": "hf",
            "config_format": "hf",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if config.max_num_batched_tokens is not None:
            settings["max_num_batched_tokens"] = config.max_num_batched_tokens
        if on_cpu:
            settings |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": int(config.kv_cache_gib * (1 << 30)),
                # A seed with chunked prefill kills the CPU engine (no generator offsets there).
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(config.max_num_batched_tokens or 4096, context),
            }
        else:
            settings["gpu_memory_utilization"] = config.gpu_memory_utilization
        if model.adapter is not None:
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(model)}
        float32_quantised = config.dtype == "float32" and is_quantised(model)
        try:
            with warnings.catch_warnings():
                # vLLM's own use of torch, nothing that our users could change.
                warnings.simplefilter("ignore", FutureWarning)
                llm = LLM(str(model.path), **(settings | config.engine_kwargs))
            self._adapter = None if model.adapter is None else _load(llm, model.adapter)
        except MPDError:
            raise
        except Exception as error:  # vLLM raises all kinds, and asserts
            reason = reason_of(error)
            advice = f" {_NO_FLOAT32}" if float32_quantised else ""
            raise EngineError(
                f"{model.name}: vLLM cannot start with this model: {reason}{advice}"
            ) from error
        self.llm = llm
        self._engine = llm.llm_engine
        _wake_when_dead(self._engine.engine_core)
        self._advice = _NO_FLOAT32 if float32_quantised else _LESS_MEMORY
        self._open: dict[str, tuple[str, int, int]] = {}
        self._serial = 0

    @property
    def in_flight(self) -> int:
        return len(self._open)

    def underway(self) -> tuple[int, int]:
        # vLLM's outputs come when a request ends, and its own metrics cost time in each step.
        states = self._engine.output_processor.request_states.values()
        lengths = [state.detokenizer.num_output_tokens() for state in states]
        return sum(length > 0 for length in lengths), sum(lengths)

    def submit_generate(
        self, key: str, prompt_ids: list[int], sampling: SamplingConfig, seed: int,
        logprobs: bool = False, k: int = 0,
    ) -> None:  # fmt: skip
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        k = k if self._can_score(sampling.max_tokens, k) else 0
        params = SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
            seed=seed,
            stop_token_ids=self._stop_ids,
            # 0: of the sampled token alone. Raw ones, before temperature and penalties.
            logprobs=k or (0 if logprobs else None),
            flat_logprobs=k > 0,
            stop=sampling.stop,
            skip_special_tokens=False,
            # Text is only needed to find stop strings.
            detokenize=bool(sampling.stop),
            # Otherwise each step makes an output for each sequence, to be thrown away here.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._submit(key, {"prompt_token_ids": prompt_ids}, params, 0, 0)

    def _can_score(self, max_tokens: int, k: int) -> bool:
        """Return whether continuations are scored while they are generated: the lists of all that
        run together stay small, and no draft model guesses tokens."""
        entries = max_tokens * (k + 1) * self._max_num_seqs
        return entries * _BYTES_PER_SCORE <= _MOST_BYTES and not self._speculates

    def submit_score(self, key: str, context_ids: list[int], target_ids: list[int], k: int) -> None:
        # vLLM gives no log-probabilities where it reads its prefix cache, so by default it computes
        # the whole context again. Here requests to score share what their contexts have in common.
        # The salt keeps them apart from requests that generated the same tokens.
        ids = context_ids + target_ids
        prompt = {"prompt_token_ids": ids, "cache_salt": "scores"}
        self._submit(key, prompt, _scoring(k, cached=True), len(context_ids), k)

    def _submit(self, key: str, prompt: dict[str, Any], params: Any, start: int, k: int) -> None:
        from vllm.exceptions import VLLMClientError

        self._serial += 1
        request_id = str(self._serial)
        try:
            (rendered,) = self._engine.renderer.render_cmpl([prompt])
            self._engine.add_request(request_id, rendered, params, lora_request=self._adapter)
        except (VLLMClientError, ValueError) as error:
            raise RequestError(str(error)) from error
        except Exception as error:  # nor is this engine one to go on with
            raise _died(error, self._advice) from error
        self._open[request_id] = (key, start, k)

    def step(self) -> list[Completion | Scores]:
        from vllm.logprobs import FlatLogprobs

        try:
            outputs = self._engine.step()
        except Exception as error:  # whatever it is, what the engine had in hand is gone
            raise _died(error, self._advice) from error
        results: list[Completion | Scores] = []
        for output in outputs:
            if not output.finished:
                continue
            key, start, k = self._open.pop(output.request_id)
            if k and (output.num_cached_tokens or 0) >= start:
                # The same targets after the same context were scored before.
                ids = output.prompt_token_ids
                prompt = {"prompt_token_ids": ids}
                self._submit(key, prompt, _scoring(k, cached=False), start, k)
                continue
            if k:
                results.append(_scores(key, output.prompt_logprobs, start, k))
                continue
            sample = output.outputs[0]
            if sample.finish_reason not in ("stop", "length"):
                raise EngineError(f"request {key} ended by {sample.finish_reason!r}")
            token_ids, logprobs, scores = list(sample.token_ids), None, None
            if isinstance(sample.logprobs, FlatLogprobs):
                width = sample.logprobs.end_indices[0]
                scores = _scores(key, sample.logprobs, 0, width - 1)
                logprobs = scores.target_logprobs.tolist()
            elif sample.logprobs is not None:
                pairs = zip(sample.logprobs, token_ids, strict=True)
                logprobs = [float(best[token].logprob) for best, token in pairs]
            results.append(Completion(key, token_ids, sample.finish_reason, logprobs, scores))
        return results

    def forget(self) -> None:
        # A prefix that it need not compute again may differ from a new one in the last bit.
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        # vLLM shuts down when the engine is collected as garbage. That may be after the next one
        # has started, and would tear down what the two share.
        self._engine.engine_core.shutdown()


def _scoring(k: int, cached: bool) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=k,
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=not cached,
    )


_LESS_MEMORY = (
    "Finished rows are committed; run the same command again to go on. If it dies again, lower"
    " --max-num-seqs or --max-model-len."
)
# vLLM keeps the scores of a running request in lists of Python: 84 bytes for a token of the top K.
_BYTES_PER_SCORE, _MOST_BYTES = 84, 4 << 30
# Which kernel runs, and what it takes, depends on the machine: int8 on a CPU with AMX is one.
_NO_FLOAT32 = (
    "The model is quantised, and some of vLLM's kernels for such models do not take float32: give"
    " --dtype bfloat16 and another --out."
)


def _died(error: Exception, advice: str) -> EngineError:
    # Some of vLLM's errors have no message, some have many lines.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return EngineError(f"the engine died: {lines[0]} {advice}")


def _wake_when_dead(client: Any) -> None:
    """Make `step` end when the engine's process is killed, by the kernel for lack of memory, say;
    vLLM's client would wait for ever. Does nothing where the engine is in this process."""
    outputs = getattr(client, "outputs_queue", None)
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    if outputs is None or manager is None:
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    def wake() -> None:
        wait([process.sentinel for process in manager.processes])
        outputs.put_nowait(EngineDeadError())

    Thread(target=wake, name="engine-watch", daemon=True).start()


# The adapter ranks that vLLM supports.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _rank(model: ModelFiles) -> int:
    """Return the rank to make room for. Raise EngineError for an adapter that vLLM would refuse
    after its start, or would run only in part."""
    from safetensors import safe_open
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    assert model.adapter is not None
    try:
        settings = PEFTHelper.from_local_dir(str(model.adapter), None)
        largest = max(settings.r, *settings.rank_pattern.values(), 1)
        rank = next((rank for rank in _RANKS if rank >= largest), _RANKS[-1])
        settings.validate_legal(LoRAConfig(max_lora_rank=rank))
    except (ValueError, TypeError) as error:
        raise EngineError(f"{model.name}: vLLM cannot run it: {error} {MERGE}") from error
    for file in sorted(model.adapter.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            # vLLM silently leaves trained embeddings and heads out.
            ends = (".lora_A.weight", ".lora_B.weight")
            other = [name for name in tensors.keys() if not name.endswith(ends)]  # noqa: SIM118
        if other:
            raise EngineError(
                f"{model.name}: vLLM runs the low-rank factors of linear layers alone, and this"
                f" adapter also has {', '.join(sorted(other)[:3])}. {MERGE}"
            )
    return rank


def _load(llm: Any, adapter: Path) -> Any:
    """Load the adapter; return its name for requests. Raise RuntimeError where it does not fit."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(adapter))
    try:
        llm.llm_engine.add_lora(request)
    except Exception as error:  # from an engine's own process it comes as nothing more specific
        raise RuntimeError(f"{error} {MERGE}") from error
    return request


def _scores(key: str, flat: Any, start: int, k: int) -> Scores:
    """Return scores from vLLM's flat log-probabilities of a prompt or a completion: each position
    from `start` on holds the sequence's own token and then the k best, which may contain it again.
    A prompt's first position is empty."""
    first = flat.start_indices[start]
    ids = np.asarray(flat.token_ids[first:], dtype=np.int32)
    logprobs = np.asarray(flat.logprobs[first:], dtype=np.float32)
    rows = len(flat) - start
    if len(ids) != rows * (k + 1):
        raise EngineError(
            f"scoring {key}: expected {rows} positions of {k + 1} log-probabilities, found"
            f" {len(ids)}. This vLLM has another layout of log-probabilities; use a version that"
            " pyproject.toml names."
        )
    ids, logprobs = ids.reshape(rows, k + 1), logprobs.reshape(rows, k + 1)
    if np.isnan(logprobs).any():
        raise FloatingPointError(f"scores of {key}")
    if not (np.diff(logprobs[:, 1:]) <= 0).all() or not (logprobs <= 1e-3).all():
        raise EngineError(
            f"scoring {key}: vLLM returned no log-probabilities for some of its tokens. Use a"
            " version that pyproject.toml names."
        )
    return Scores(key, ids[:, 1:], logprobs[:, 1:], logprobs[:, 0])
