"""What a model is: where its files lie, what names it for good, and its tokenizer.

Models are named by a local folder or a hub id; one that is an adapter (peft's LoRA) names its base
itself. Two tokenizers are the same if their content
is: names and paths say nothing, and one differing merge shifts every id after it.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import sha256_of
from mpd_data.common.hashing import content_key


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `version` is the hub's commit, or a hash of config and weights
    ("unhashed" for a dry run's folder). `served`: a server's name for it, which has the weights;
    a folder's version is then a hash of its config. With an `adapter`, the folder of one, `path` is
    its base and `version` names both."""

    name: str
    path: Path
    version: str
    vocab_size: int
    context: int
    served: str | None = None
    adapter: Path | None = None

    @property
    def tokenizer_path(self) -> Path:
        """The adapter's folder where it has a tokenizer of its own."""
        if self.adapter is not None and (self.adapter / "tokenizer.json").is_file():
            return self.adapter
        return self.path

    def identity(self) -> dict[str, str]:
        """What of it determines rows, as far as it can be known; the folder's place does not."""
        served = {} if self.served is None else {"served": self.served}
        return {"version": self.version, **served}

    def as_saved(self, saved: Mapping[str, str] | None) -> "ModelFiles":
        """Return this model under the version of the identity `saved` where its own weights were
        not hashed: a dry run leaves it to the run to find that they changed."""
        if self.version != "unhashed" or saved is None:
            return self
        return replace(self, version=saved["version"])


def has_softcap(config: Any) -> bool:
    """Whether a model of transformers' `config` caps the scores of its attention, as Gemma 2 does.
    transformers' default, sdpa, leaves that out without a word; eager does not."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def _version(path: Path, config: str, weights: bool, served: str | None) -> str:
    """Names the content of a folder whose config has the hash `config`."""
    if served is not None:
        return config
    if weights:
        return _weights_hash(path, config)
    weight_files(path)
    return "unhashed"


def weight_files(path: Path) -> list[Path]:
    """The weights of a model's or adapter's folder. Raises ConfigError where there are none."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{path}: no *.safetensors here. Expected a Hugging Face model folder; weights in"
            " pickle formats (*.bin, *.pt) are not read: convert them to safetensors first."
        )
    return files


def _weights_hash(path: Path, config: str) -> str:
    digest = hashlib.sha256()
    digest.update(f"config.json:{config}\n".encode())
    for file in weight_files(path):
        digest.update(f"{file.name}:{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def resolve_model(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    served: str | None = None,
) -> ModelFiles:
    """Finds a model's files, downloading a hub id (safetensors, tokenizer and configs only).
    Without `weights`, for dry runs, these are neither fetched nor read, but a folder must have
    some: the version is then "unhashed" for a folder, and the commit for a hub id as ever. Weights
    of a model that a server runs, under the name `served`, are not needed.

    Raises ConfigError where `name` is neither a model's or adapter's folder nor a hub id that can
    be had, and where an adapter's base cannot.
    """
    path = Path(name)
    if path.is_dir():
        if (path / _ADAPTER).is_file():
            return _on_base(name, path, None, trust_remote_code, weights, served)
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{path}: no config.json here. Expected a Hugging Face model folder"
                " (config.json, *.safetensors, tokenizer.json)."
            )
        version = _version(path, sha256_of(path / "config.json"), weights, served)
    else:
        weights = weights and served is None
        path, version = _download(name, revision, trust_remote_code, weights)
        if (path / _ADAPTER).is_file():
            return _on_base(name, path, version, trust_remote_code, weights, served)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        vocab_size, context = int(config["vocab_size"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path / 'config.json'}: expected the JSON of a language model's configuration with"
            f" vocab_size and max_position_embeddings ({type(error).__name__}: {error})."
        ) from error
    return ModelFiles(name, path, version, vocab_size, context, served)


def _on_base(
    name: str,
    path: Path,
    commit: str | None,
    trust_remote_code: bool,
    weights: bool,
    served: str | None,
) -> ModelFiles:
    """The model that is the adapter in `path` on its base."""
    try:
        settings = json.loads((path / _ADAPTER).read_text(encoding="utf-8"))
        kind, base_name = settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path / _ADAPTER}: expected the JSON of peft's configuration with peft_type and"
            f" base_model_name_or_path ({type(error).__name__}: {error})."
        ) from error
    if kind != "LORA":
        raise ConfigError(
            f"{name}: an adapter of type {kind}; LORA is the one that engines run. Merge it into"
            " its base and give the merged folder."
        )
    try:
        revision = settings.get("revision")
        base = resolve_model(str(base_name), revision, trust_remote_code, weights, served)
    except ConfigError as error:
        raise ConfigError(f"{name} is an adapter, and its base cannot be had: {error}") from error
    if base.adapter is not None:
        raise ConfigError(f"{name}: an adapter on {base_name}, itself one. Merge that first.")
    # Where the base lies is no part of what the two compute.
    kept = {k: v for k, v in settings.items() if k not in ("base_model_name_or_path", "revision")}
    version = commit or _version(path, content_key(kept), weights, served)
    both = "unhashed" if "unhashed" in (base.version, version) else f"{base.version}+{version}"
    return replace(base, name=name, adapter=path, version=both)


def hub_failures() -> tuple[type[Exception], ...]:
    """The errors by which huggingface_hub says that something is not to be had."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    failures: list[type[Exception]] = [HfHubHTTPError, HFValidationError, LocalEntryNotFoundError]
    # Version 1 speaks through httpx, version 2 through httpx2, and lets their errors out.
    for client in ("httpx", "httpx2"):
        try:
            failures.append(importlib.import_module(client).HTTPError)
        except ImportError:
            continue
    return (*failures, OSError)


def _download(name: str, revision: str | None, code: bool, weights: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    patterns += ["*.safetensors"] * weights + ["*.py"] * code
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except hub_failures() as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"{name}: not a folder here, and not to be had from the hub ({reason}). Give the path"
            " of a model folder, or a hub id with the network (and HF_TOKEN for gated models)."
        ) from error
    # Weights in other formats; or, with an older huggingface_hub offline, a dry run's files alone.
    if weights and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{name}: no *.safetensors among its files. Use a model that has them (pickle"
            " formats are not read); if it does, fetch it with the network: unset HF_HUB_OFFLINE."
        )
    # The hub's cache keeps each snapshot in a folder named by its commit.
    return path, path.name


def load_tokenizer(model: ModelFiles, trust_remote_code: bool = False) -> Any:
    """The model's fast tokenizer. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model.tokenizer_path), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises plain ones, transformers all kinds
        raise ConfigError(
            f"{model.name}: its tokenizer cannot be loaded ({type(error).__name__}: {error})."
            " Check tokenizer.json, tokenizer_config.json and config.json in"
            f" {model.tokenizer_path}; they come from one download."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{model.name}: needs a fast tokenizer (tokenizer.json), found"
            f" {type(tokenizer).__name__}."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{model.name}: its tokenizer names no end token. Set eos_token in"
            " tokenizer_config.json to the token that ends a turn."
        )
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """Names a fast tokenizer by what turns text into ids: its model (vocabulary, merges),
    added tokens, normaliser and pre-tokeniser."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = sorted((t["id"], t["content"]) for t in content["added_tokens"])
    parts = [content["model"], added, content["normalizer"], content["pre_tokenizer"]]
    return content_key(parts)


def chat_template_hash(tokenizer: Any) -> str:
    return content_key(tokenizer.chat_template)


def require_same_tokenizer(saved_hash: str, tokenizer: Any, saved: str, now: str) -> None:
    """Raises ConfigError unless `tokenizer` has the content hash that `saved` was made with."""
    found = tokenizer_hash(tokenizer)
    if found != saved_hash:
        raise ConfigError(
            f"{now} and {saved} have different tokenizers (content {found[:12]} and"
            f" {saved_hash[:12]}). Token ids are compared position by position, so both models"
            " must share one vocabulary: choose models of one family."
        )


_ADAPTER = "adapter_config.json"
