"""Check an engine's settings and start it, or take the one that this process has kept."""

import gc
import sys

from mpd_data.common.errors import ConfigError
from mpd_data.common.hashing import content_key
from mpd_data.common.models import MERGE, ModelFiles, load_tokenizer
from mpd_data.common.weights import require_whole
from mpd_data.config import EngineConfig
from mpd_data.engines.guard import Guarded
from mpd_data.engines.protocol import Engine
from mpd_data.prompts.special import Turn, turn_of

# Settings that a server was started with, so that they cannot be given here.
_SERVER_SETTINGS = (
    "dtype", "max_num_batched_tokens", "gpu_memory_utilization",
    "tensor_parallel_size", "pipeline_parallel_size", "kv_cache_gib",
)  # fmt: skip


def context_of(
    model: ModelFiles, config: EngineConfig, trust_remote_code: bool = False, scores: bool = False
) -> int:
    """Return the context in tokens that the engine runs `model` with. Raise ConfigError for
    settings that do not fit the model or the engine, and like `require_whole`; with `scores` also
    like `require_scores`."""
    if config.max_model_len is not None and config.max_model_len > model.context:
        raise ConfigError(
            f"{model.name}: --max-model-len {config.max_model_len} is over the model's context of"
            f" {model.context_text}. Give {model.context} or less."
        )
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if config.backend == "transformers" and (size := getattr(config, name)) > 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} {size}: the transformers backend runs a model on one"
                " device. Use --backend vllm, or leave the option out."
            )
    _check_server_settings(config)
    if config.backend == "vllm" and (found := set(str(model.path)) & set("*?[")):
        raise ConfigError(
            f"{model.path}: vLLM takes {' '.join(sorted(found))} in a path for a pattern, and would"
            " find no weights. Rename the folder or give a link to it, or use --backend"
            " transformers."
        )
    require_whole(model, trust_remote_code)
    if scores:
        require_scores(model, config)
    return config.max_model_len or model.context


def require_scores(model: ModelFiles, config: EngineConfig) -> None:
    """Raise ConfigError where the engine gives no right scores of `model`. vLLM computes those of a
    prompt as if the adapter's output head saw one position for each request: it dies on a CPU, and
    on a GPU leaves the adapter of the head out (its issues 16668, 51594)."""
    if config.backend == "vllm" and model.adapter is not None:
        raise ConfigError(f"{model.name}: an adapter, and vLLM cannot score with one. {MERGE}")


def _check_server_settings(config: EngineConfig) -> None:
    if config.backend != "openai":
        for name in ("base_url", "served_model"):
            if getattr(config, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} needs --backend openai: add that option.")
        return
    if config.base_url is None:
        raise ConfigError(
            "--backend openai needs the server's URL: --base-url http://HOST:8000. Start one with"
            " vllm serve."
        )
    for name in _SERVER_SETTINGS:
        if getattr(config, name) != EngineConfig.model_fields[name].default:
            raise ConfigError(
                f"--{name.replace('_', '-')}: the server decides this with --backend openai. Leave"
                " the option out here, and start the server with it."
            )


def notes_of(config: EngineConfig, turn: Turn | None = None) -> list[str]:
    """Return what a dry run says of an engine: what the run will say of its model's `turn`, and
    what cannot be known where a server runs the model."""
    notes = [] if turn is None or turn.note is None else [turn.note]
    if config.backend == "openai":
        notes.append(
            f"{config.base_url} was not contacted; the run will check that it serves the model."
        )
    return notes


def start_engine(
    model: ModelFiles, config: EngineConfig, trust_remote_code: bool = False, max_logprobs: int = 1
) -> Engine:
    """Return the engine that `config` names, with `model` loaded, behind a check of its requests
    (guard.py). `max_logprobs`: the largest K of its scores. Say on stderr what must be known of the
    model's turns. Raise EngineError where it cannot start, ConfigError like `context_of`."""
    global _kept
    context = context_of(model, config, trust_remote_code, scores=max_logprobs > 1)
    turn = turn_of(model, load_tokenizer(model, trust_remote_code), trust_remote_code)
    if turn.note is not None:
        print(turn.note, file=sys.stderr)
    settings = [str(model.path), model.identity(), config.model_dump(mode="json")]
    key = content_key([*settings, trust_remote_code, max_logprobs])
    if _kept is not None and _kept.key == key:
        _kept.forget()
        return _kept
    close_kept_engine()
    engine: Engine
    if config.backend == "transformers":
        from mpd_data.engines.transformers import TransformersEngine

        engine = TransformersEngine(model, config, trust_remote_code, context)
    elif config.backend == "openai":
        from mpd_data.engines.openai import OpenAIEngine

        engine = OpenAIEngine(model, config, trust_remote_code, context, max_logprobs)
    else:
        from mpd_data.engines.vllm import VLLMEngine

        engine = VLLMEngine(model, config, trust_remote_code, context, max_logprobs)
    if not _keeps:
        return Guarded(engine, model, turn)
    _kept = _Kept(engine, model, turn)
    _kept.key = key
    return _kept


class _Kept(Guarded):
    """An engine that stays open when a stage closes it, but not after an error or an interrupt, and
    not with requests in it."""

    key: str

    def close(self) -> None:
        if self.in_flight or sys.exc_info()[0] is not None:
            close_kept_engine()


# A process can have one engine at a time.
_keeps = False
_kept: _Kept | None = None


def keep_engine() -> None:
    """Keep the engine of a stage for the next stage of this process that needs the same model with
    the same settings. It closes when another one starts."""
    global _keeps
    _keeps = True


def keeps_engine() -> bool:
    """Return whether this process keeps engines."""
    return _keeps


def close_kept_engine() -> None:
    """Free what a kept engine holds."""
    global _kept
    if _kept is not None:
        _kept.inner.close()
        _kept = None
        # On a CPU, vLLM's memory goes with the last reference to it.
        gc.collect()
        # vLLM has undone the exemption of its imports (vllm.py).
        gc.freeze()
