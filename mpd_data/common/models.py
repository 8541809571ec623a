"""Models: their files, the version that identifies them, their configuration and tokenizer.

A model is named by a local folder or a hub id; an adapter (peft's LoRA) names its base itself. Two
tokenizers are the same if their content is: names and paths say nothing, and one differing merge
shifts every id after it.
"""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mpd_data.common.errors import ConfigError, did_you_mean, reason_of, suggestion
from mpd_data.common.files import read_json, sha256_of
from mpd_data.common.hashing import content_key
from mpd_data.common.positions import context_of_positions, has_longrope

# What to do with an adapter that an engine cannot run.
MERGE = (
    "Merge it into its base and give the merged folder (mpd-train leaves one in OUT/model, peft's"
    " merge_and_unload makes one), or use --backend transformers."
)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    version: the hub's commit, or for a folder a hash of config and weights ("unhashed" in a dry
        run), of the config alone where a server has the weights
    context: the longest sequence in tokens (positions.py)
    served: the server's name for the model
    adapter: the folder of an adapter; `path` is then its base, and `version` names both
    config: the content of config.json
    """

    name: str
    path: Path
    version: str
    vocab_size: int
    context: int
    served: str | None = None
    adapter: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of `config` that describes the language model: all of it, except where the
        model has other modalities too."""
        return cast(Mapping[str, Any], self.config.get("text_config", self.config))

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer: the adapter's where it has one, else the model's."""
        if self.adapter is not None and (self.adapter / "tokenizer.json").is_file():
            return self.adapter
        return self.path

    @property
    def context_text(self) -> str:
        """The context, for messages, with the reason where it is less than the model's own."""
        if not has_longrope(self.text_config):
            return f"{self.context} tokens"
        return (
            f"{self.context} tokens, its original_max_position_embeddings: beyond it LongRoPE gives"
            " all tokens other positions, and engine and trainer would not agree on which"
        )

    def identity(self) -> dict[str, str]:
        """Return what determines the model's rows, as far as it can be known; its path does not."""
        served = {} if self.served is None else {"served": self.served}
        return {"version": self.version, **served}

    def as_saved(self, saved: Mapping[str, str] | None) -> "ModelFiles":
        """Return this model under the version of the identity `saved` where its own weights were
        not hashed: a dry run leaves it to the run to find that they changed."""
        if self.version != "unhashed" or saved is None:
            return self
        return replace(self, version=saved["version"])


def has_softcap(config: Any) -> bool:
    """Return whether a model of transformers' `config` caps the scores of its attention, as Gemma 2
    does. transformers' default, sdpa, silently leaves the cap out; eager has it."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def _version(path: Path, config: str, weights: bool, served: str | None) -> str:
    """Return the version of a folder whose config has the hash `config`."""
    if served is not None:
        return config
    files = weight_files(path)
    if not weights:
        return "unhashed"
    digest = hashlib.sha256(f"config.json:{config}\n".encode())
    for file in files:
        digest.update(f"{file.name}:{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """Return the weights of a model's or adapter's folder. Raise ConfigError where it has none."""
    files = sorted(path.glob("*.safetensors"))
    if not files and (path / _ADAPTER).is_file():
        raise ConfigError(
            f"{path}: no adapter_model.safetensors here, the weights of the adapter that"
            f" {_ADAPTER} describes. Copy it from where the adapter was saved (weights in pickle"
            " formats, *.bin, are not read: save the adapter again with peft)."
        )
    if not files:
        raise ConfigError(
            f"{path}: no *.safetensors here. Expected a Hugging Face model folder; weights in"
            " pickle formats (*.bin, *.pt) are not read: convert them to safetensors first."
        )
    return files


def resolve_model(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    served: str | None = None,
) -> ModelFiles:
    """Return a model's files; download those of a hub id (safetensors, tokenizer, configs).

    Without `weights`, for dry runs, weights are neither fetched nor read, but a folder must have
    some: the version is then "unhashed" for a folder, and the commit for a hub id. `served`: the
    name under which a server runs the model; its weights are not needed.

    Raise ConfigError where `name` is neither a model's or adapter's folder nor a hub id that can
    be downloaded, and where an adapter's base is not available.
    """
    path, commit = Path(name), None
    if not path.is_dir():
        weights = weights and served is None
        path, commit = _download(name, revision, trust_remote_code, weights)
    if (path / _ADAPTER).is_file():
        return _on_base(name, path, commit, trust_remote_code, weights, served)
    if commit is None and not (path / "config.json").is_file():
        # A training has its model in model/; a pipeline's run has a link to its best one.
        inner = [
            path / part for part in ("model", "best") if (path / part / "config.json").exists()
        ]
        raise ConfigError(
            f"{path}: no config.json here. Expected a Hugging Face model folder"
            " (config.json, *.safetensors, tokenizer.json)."
            + suggestion(str(inner[0]) if inner else None)
        )
    version = commit or _version(path, sha256_of(path / "config.json"), weights, served)
    wanted = "a language model's configuration with vocab_size and max_position_embeddings"
    with _expecting(path / "config.json", wanted):
        config = read_json(path / "config.json")
        text = config.get("text_config", config)
        vocab_size, context = int(text["vocab_size"]), context_of_positions(text)
        if min(vocab_size, context) < 1:
            raise ValueError(f"vocab_size {vocab_size}, a context of {context}")
    return ModelFiles(name, path, version, vocab_size, context, served, config=config)


@contextlib.contextmanager
def _expecting(path: Path, wanted: str) -> Iterator[None]:
    """Raise ConfigError, which says what was `wanted`, for other content in the JSON of `path`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: expected the JSON of {wanted} ({reason}).") from error


def load_config(model: ModelFiles, trust_remote_code: bool = False) -> Any:
    """Return transformers' configuration of the model, its family's defaults included. Raise
    ConfigError where transformers has none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(model.path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises all kinds
        raise ConfigError(f"{model.name}: cannot be loaded: {reason_of(error)}") from error


def end_tokens(model: ModelFiles, tokenizer: Any, trust_remote_code: bool = False) -> list[int]:
    """Return the ids that end a turn, as vLLM and transformers take them: the tokenizer's end
    token, then those of the generation config, or of config.json where there is none. Raise
    ConfigError for one that cannot be read."""
    from transformers import GenerationConfig

    path = model.path / "generation_config.json"
    if path.exists():
        try:
            generation = GenerationConfig.from_pretrained(str(model.path))
        except Exception as error:  # transformers raises all kinds for what the file may hold
            raise ConfigError(f"{path}: cannot be read: {reason_of(error)}") from error
    else:
        generation = GenerationConfig.from_model_config(load_config(model, trust_remote_code))
    named = generation.eos_token_id
    more = named if isinstance(named, list) else [] if named is None else [named]
    for token in more:
        if type(token) is not int or abs(token) >= 2**31:
            place = path if path.exists() else model.name
            raise ConfigError(f"{place}: eos_token_id is {token!r}, expected an id.")
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def base_of(path: Path) -> str | None:
    """Return what the adapter in `path` names as its base; None for a folder with no adapter. Raise
    ConfigError where its configuration names none."""
    if not (path / _ADAPTER).is_file():
        return None
    return _adapter_settings(path)[2]


def _adapter_settings(path: Path) -> tuple[dict[str, Any], Any, str]:
    """Return an adapter's configuration, its type and its base. Raise ConfigError where it names no
    base."""
    with _expecting(path / _ADAPTER, f"peft's configuration with peft_type and {_BASE}"):
        settings = read_json(path / _ADAPTER)
        kind, base = settings["peft_type"], settings[_BASE]
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{path / _ADAPTER}: {_BASE} is {json.dumps(base)}. Set it to the folder or hub id"
            " of the model that the adapter was trained on."
        )
    return settings, kind, base


def _on_base(
    name: str, path: Path, commit: str | None, code: bool, weights: bool, served: str | None
) -> ModelFiles:
    """Return the model that consists of the adapter in `path` and its base."""
    settings, kind, base_name = _adapter_settings(path)
    if kind != "LORA":
        raise ConfigError(
            f"{name}: an adapter of type {kind}; LORA is the one that engines run. Merge it into"
            " its base and give the merged folder."
        )
    try:
        base = resolve_model(base_name, settings.get("revision"), code, weights, served)
    except ConfigError as error:
        raise ConfigError(
            f"{name} is an adapter, and its base is not available: {error} {path / _ADAPTER} names"
            f" it: set {_BASE} there to the folder or hub id of the model that the adapter was"
            " trained on, or give the two merged."
        ) from error
    if base.adapter is not None:
        raise ConfigError(
            f"{name}: an adapter on {base_name}, which is an adapter too. Merge that one first."
        )
    # Where the base lies does not change what the two compute.
    del settings[_BASE]
    settings.pop("revision", None)
    version = commit or _version(path, content_key(settings), weights, served)
    both = "unhashed" if "unhashed" in (base.version, version) else f"{base.version}+{version}"
    return replace(base, name=name, adapter=path, version=both)


def hub_failures() -> tuple[type[Exception], ...]:
    """Return the errors that huggingface_hub raises where something cannot be downloaded."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    failures: list[type[Exception]] = [HfHubHTTPError, HFValidationError, LocalEntryNotFoundError]
    # Version 1 uses httpx, version 2 httpx2, and neither catches their errors.
    for client in ("httpx", "httpx2"):
        with contextlib.suppress(ImportError):
            failures.append(importlib.import_module(client).HTTPError)
    return (*failures, OSError)


def _download(name: str, revision: str | None, code: bool, weights: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    patterns += ["*.safetensors"] * weights + ["*.py"] * code
    # Mistral's own format, beside the same weights in the one that is read here.
    others = ["consolidated*.safetensors"]
    try:
        path = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=others
            )
        )
    except hub_failures() as error:
        folders = [str(folder) for folder in Path(name).parent.glob("*") if folder.is_dir()]
        hint = did_you_mean(name, folders)
        if name.startswith((".", "/")) or hint:
            raise ConfigError(f"{name}: no such folder, and no model of the hub.{hint}") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"{name}: not a folder here, and it cannot be downloaded from the hub ({reason}). Give"
            " the path of a model folder, or a hub id with the network (and HF_TOKEN for gated"
            " models)."
        ) from error
    # Weights in other formats; or, offline with an older huggingface_hub, what a dry run fetched.
    if weights and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{name}: no *.safetensors among its files. Use a model that has them (pickle"
            " formats are not read). If it has them, unset HF_HUB_OFFLINE and fetch it with the"
            " network."
        )
    # The hub's cache keeps each snapshot in a folder named by its commit.
    return path, path.name


def load_tokenizer(model: ModelFiles, trust_remote_code: bool = False) -> Any:
    """Return the model's fast tokenizer. Raise ConfigError where it has none."""
    from transformers import AutoTokenizer

    path = str(model.tokenizer_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer("1")  # some settings are first read here
    except Exception as error:  # tokenizers raises plain ones, transformers all kinds
        raise ConfigError(
            f"{model.name}: its tokenizer cannot be loaded ({type(error).__name__}: {error})."
            f" Check tokenizer.json, tokenizer_config.json and config.json in {path}: all three"
            " must come from one download."
        ) from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ConfigError(f"{model.name}: needs a fast tokenizer (tokenizer.json), found {kind}.")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{model.name}: its tokenizer names no end token. Set eos_token in"
            " tokenizer_config.json to the token that ends a turn."
        )
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of what turns text into ids: the tokenizer's model (vocabulary, merges),
    added tokens, normaliser and pre-tokeniser."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = sorted((t["id"], t["content"]) for t in content["added_tokens"])
    return content_key([content["model"], added, content["normalizer"], content["pre_tokenizer"]])


def chat_template_hash(tokenizer: Any) -> str:
    """Return the hash of the tokenizer's chat template."""
    return content_key(tokenizer.chat_template)


def require_same_tokenizer(
    saved_hash: str, tokenizer: Any, saved: str, now: str, model: str
) -> None:
    """Raise ConfigError unless `tokenizer`, that of `now`, has the content hash that `saved` was
    made with. `model` had that hash then; where it has it still, the message says what differs."""
    hash_now = tokenizer_hash(tokenizer)
    if hash_now != saved_hash:
        what = f"content {hash_now[:12]} and {saved_hash[:12]}"
        with contextlib.suppress(ConfigError):
            other = load_tokenizer(resolve_model(model, weights=False))
            if tokenizer_hash(other) == saved_hash:
                what = f"{_how_they_differ(tokenizer, other)}; {what}"
        raise ConfigError(
            f"{now} and {saved} have different tokenizers ({what}). Token"
            " ids are compared position by position, so both models must share one vocabulary:"
            " choose models of one family."
        )


def _how_they_differ(tokenizer: Any, other: Any) -> str:
    """Return how two tokenizers differ, for a message: sizes and the first id with another token,
    or else the parts of them that differ."""
    tokens, others = ({i: t for t, i in each.get_vocab().items()} for each in (tokenizer, other))
    for number in range(max([*tokens, *others], default=-1) + 1):
        one, two = tokens.get(number), others.get(number)
        if one != two:
            said = ["no token" if token is None else repr(token) for token in (one, two)]
            first = f"id {number:,} is {said[0]} in one and {said[1]} in the other"
            return f"{len(tokens):,} and {len(others):,} tokens; {first}"
    both = [json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, other)]
    names = ("model", "added_tokens", "normalizer", "pre_tokenizer")
    parts = [name for name in names if both[0][name] != both[1][name]]
    return f"the same tokens, but in tokenizer.json {' and '.join(parts)} differ"


_ADAPTER, _BASE = "adapter_config.json", "base_model_name_or_path"
