"""Which files of a folder are its model, and whether they are all of it.

Libraries fill a tensor that no file has with random numbers or zeros, and leave out one that they
do not know; none calls that an error. Here it is one, for every engine, the trainer and the dry
runs. The headers of the files are enough: transformers loads tensors without contents and says what
did not fit, with all the renaming that it does for a family.
"""

import contextlib
import copy
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpd_data.common.errors import ConfigError, reason_of
from mpd_data.common.models import ModelFiles, weight_files


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype by safetensors' name, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def model_files(path: Path) -> list[Path]:
    """Return the files that are the model of a folder: model.safetensors, or those that its index
    names. Raise ConfigError where that is not plain, so that libraries would read different ones:
    transformers prefers model.safetensors to the index, vLLM the index to model.safetensors, and
    without an index it reads all *.safetensors."""
    found, index = {file.name for file in weight_files(path)}, path / _INDEX
    named: set[str] = set()
    if index.is_file():
        try:
            parts = json.loads(index.read_text(encoding="utf-8"))
            named = set(parts["weight_map"].values())
            # transformers reads it.
            parts["metadata"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{index}: expected JSON with weight_map and metadata, objects both ({reason})."
                " Copy it again."
            ) from error
        if missing := named - found:
            raise ConfigError(
                f"{index}: names files that are not here: {_listed(missing)}. Copy the rest of the"
                " model into the folder, or remove the index if it belongs to another model."
            )
    if _WHOLE in found and named - {_WHOLE}:
        raise ConfigError(
            f"{path}: two sets of weights: {_WHOLE}, and the {len(named):,} files that {_INDEX}"
            " names. Libraries would read different ones: move away the one that is left over (for"
            " the second the index too)."
        )
    chosen = named or found & {_WHOLE}
    if not chosen:
        raise ConfigError(
            f"{path}: its weights ({_listed(found)}) are neither {_WHOLE} nor named by {_INDEX}."
            " Rename a whole model, or copy the index of one in parts into the folder."
        )
    if not named and (others := found - chosen):
        raise ConfigError(
            f"{path}: beside {_WHOLE} there are other weights: {_listed(others)}. vLLM would read"
            " them too: move them away."
        )
    return [path / name for name in sorted(chosen)]


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Return the tensors of `files`, *.safetensors, by name, from their headers. Raise ConfigError
    for a file that cannot be read or is cut short, and for a name that is in two of them."""
    tensors: dict[str, Stored] = {}
    for path in files:
        try:
            with path.open("rb") as opened:
                begin = opened.read(len(_POINTER))
                if begin == _POINTER:
                    raise ConfigError(
                        f"{path}: not the weights but git-lfs's pointer to them. Run git lfs pull"
                        " in its repository, or copy the file again."
                    )
                if not begin:
                    raise ConfigError(f"{path}: is empty. Copy it again.")
                opened.seek(0)
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(size, _LARGEST_HEADER)))
            header.pop("__metadata__", None)
            own = {
                name: Stored(
                    value["dtype"], tuple(value["shape"]), path,
                    *(8 + size + offset for offset in value["data_offsets"]),
                )
                for name, value in header.items()
            }  # fmt: skip
            length = path.stat().st_size
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{path}: not a safetensors file ({reason}). Copy it again."
            ) from error
        expected = max((tensor.end for tensor in own.values()), default=8 + size)
        if length != expected:
            raise ConfigError(
                f"{path}: has {length:,} bytes, its header says {expected:,}. Copy it again."
            )
        if twice := own.keys() & tensors.keys():
            raise ConfigError(
                f"{path}: has tensors that another file of the model has too: {_listed(twice)}."
                " Copy the model again into an empty folder."
            )
        tensors |= own
    return tensors


def count_weights(path: Path) -> int | None:
    """Return the number of weights of the model in a folder, by the headers of its files; None
    where there are none or one cannot be read."""
    try:
        stored = stored_tensors(model_files(path))
    except ConfigError:
        return None
    return sum(math.prod(tensor.shape) for tensor in stored.values()) or None


def require_whole(files: ModelFiles, trust_remote_code: bool = False) -> None:
    """Raise ConfigError unless the files of a model hold what its architecture has: all tensors and
    no others, in its shapes, tied where config.json says so, and those of its adapter. No weights
    are read, but for a tied pair that is stored twice.

    Nothing is compared where the weights are not here (a server has them, or a dry run has not
    fetched them). Where transformers cannot load the architecture without contents, say so on
    stderr. Of a quantised model the modules are compared.
    """
    if files.served is not None:
        return
    if not _is_fetched(files.path):
        return
    folders = [files.path] if files.adapter is None else [files.path, files.adapter]
    present = [file for folder in folders for file in sorted(folder.glob("*.safetensors*"))]
    stats = [file.stat() for file in present]
    state = tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)
    _require_whole(files, json.dumps(files.config, default=str), trust_remote_code, state)


@functools.lru_cache(maxsize=8)
def _require_whole(
    files: ModelFiles, config: str, trust_remote_code: bool, state: tuple[Any, ...]
) -> None:
    """Do the work of `require_whole`, once for each `config` and `state` of the files."""
    stored = stored_tensors(model_files(files.path))
    compare = _compare_modules if is_quantised(files) else _compare
    try:
        model = _skeleton(files, trust_remote_code, None)
        compare(files, model, stored)
    except _CannotLoadError as error:
        # An architecture that only the engine knows, say.
        print(
            f"{files.name}: its tensors were not compared with its architecture, because"
            f" transformers could not load it without contents: {str(error).rstrip('.')}. mpd-train"
            " and --backend transformers compare them when they load the model; vLLM does not.",
            file=sys.stderr,
        )
        return
    if files.adapter is not None:
        _compare_with_adapter(files, model)


def load_model(files: ModelFiles, trust_remote_code: bool, **settings: Any) -> Any:
    """Return transformers' model of `files`, without their adapter, loaded with `settings`. Raise
    ConfigError where its files are not what its architecture has, and what transformers raises."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    require_whole(files, trust_remote_code)
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        str(files.path), trust_remote_code=trust_remote_code, output_loading_info=True, **settings
    )
    if is_quantised(files):
        # What a method of quantisation adds is its own affair.
        info["unexpected_keys"] = set()
    _refuse(files, model, _Unlike.of(info))
    return model


def skeleton(files: ModelFiles, trust_remote_code: bool, dtype: Any) -> Any:
    """Return the model without weights, on torch's meta device; for an adapter its base. Without a
    `dtype` it has torch's. Raise ConfigError if its configuration cannot be used."""
    try:
        return _skeleton(files, trust_remote_code, dtype)
    except _CannotLoadError as error:
        raise ConfigError(f"{files.name}: cannot be loaded: {error}") from error


def _skeleton(files: ModelFiles, trust_remote_code: bool, dtype: Any) -> Any:
    """Return like `skeleton`. Raise _CannotLoadError if the configuration cannot be used."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(files.path), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, dtype=dtype or torch.float32
            )
    except Exception as error:  # transformers raises all kinds
        raise _CannotLoadError(reason_of(error)) from error


def is_quantised(files: ModelFiles) -> bool:
    """Return whether the weights are quantised, as the folder says."""
    # A model of several modalities may have it for the text alone.
    configs = (files.config, files.text_config)
    if any(config.get("quantization_config") is not None for config in configs):
        return True
    return any((files.path / name).is_file() for name in _QUANTISED)


class _CannotLoadError(Exception):
    """transformers cannot load an architecture without contents. The message is its reason."""


@dataclass(frozen=True)
class _Unlike:
    """How tensors differ from those of an architecture: names that are in no file, names that the
    architecture does not have, and shapes, stored and expected, by name."""

    missing: frozenset[str]
    unknown: frozenset[str]
    shapes: Mapping[str, tuple[Any, Any]]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "_Unlike":
        """Return what transformers says of a loading."""
        shapes = {name: (tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]}
        return cls(frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), shapes)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unknown) + len(self.shapes)


def _refuse(files: ModelFiles, model: Any, unlike: _Unlike, remedy: str = "") -> None:
    """Raise ConfigError if anything is `unlike`."""
    if not unlike:
        return
    said = []
    if unlike.missing:
        what = "weights of its architecture are in none of its files"
        said.append(f"{len(unlike.missing):,} {what} ({_listed(unlike.missing)})")
    if unlike.unknown:
        what = "tensors in its files are not of its architecture"
        said.append(f"{len(unlike.unknown):,} {what} ({_listed(unlike.unknown)})")
    if unlike.shapes:
        name = min(unlike.shapes)
        found, expected = unlike.shapes[name]
        what = f"have another shape ({name}: {found}, expected {expected})"
        said.append(f"{len(unlike.shapes):,} {what}")
    head = model.get_output_embeddings()
    if not remedy and unlike.missing and all(_is_of(model, name, head) for name in unlike.missing):
        remedy = (
            "The output head is missing, and config.json does not say that it is the input"
            " embedding: if it is, set tie_word_embeddings to true there."
        )
    remedy = remedy or "Copy the model again, with the config.json that belongs to it."
    raise ConfigError(f"{files.name} ({type(model).__name__}): {'; '.join(said)}. {remedy}")


def _is_of(model: Any, name: str, module: Any) -> bool:
    return module is not None and model.get_submodule(name.rpartition(".")[0]) is module


def _compare(files: ModelFiles, model: Any, stored: Mapping[str, Stored]) -> None:
    """Raise ConfigError unless the tensors `stored` are those of `model`, a skeleton."""
    unlike = _as_loaded(model, stored)
    remedy = ""
    if unlike.unknown:
        for prefix, left in _PREFIXES.items():
            renamed = {_without(prefix, name): tensor for name, tensor in stored.items()}
            if renamed.keys() != stored.keys() and not _as_loaded(model, renamed):
                remedy = (
                    f"The names are its own behind a prefix, {prefix!r}, which {left}."
                    " Take it off each name (safetensors.torch.load_file and save_file), or save"
                    " the model again without the wrapper."
                )
                break
    _refuse(files, model, unlike, remedy)
    floating = {name for name, x in model.state_dict().items() if x.is_floating_point()}
    packed = {
        name: tensor for name, tensor in stored.items()
        if name in floating and tensor.dtype not in _FLOATS
    }  # fmt: skip
    if packed:
        name = min(packed)
        raise ConfigError(
            f"{files.name}: {len(packed):,} weights are stored as {packed[name].dtype} ({name}),"
            " but config.json names no quantization_config. Copy the model again, with the"
            " config.json that belongs to it."
        )
    prefix = f"{model.base_model_prefix}."
    for pair in model.all_tied_weights_keys.items():
        # transformers takes a checkpoint with the prefix or without.
        twice = [stored.get(name) or stored.get(name.removeprefix(prefix)) for name in pair]
        if None not in twice and not _equal(*twice):
            first, second = pair
            raise ConfigError(
                f"{files.name}: config.json says that {first} and {second} are one"
                " (tie_word_embeddings), but the files hold two that differ. Libraries do not agree"
                " on what that means. Set tie_word_embeddings to false in config.json to use both,"
                f" or delete {first} from the files."
            )


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix) if prefix in _LEADING else name.replace(prefix, "")


def _equal(a: Any, b: Any) -> bool:
    """Return whether two stored tensors are the same, bit by bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as first, b.file.open("rb") as second:
        first.seek(a.begin)
        second.seek(b.begin)
        for begin in range(0, a.end - a.begin, _BLOCK):
            size = min(_BLOCK, a.end - a.begin - begin)
            if first.read(size) != second.read(size):
                return False
    return True


def _as_loaded(model: Any, stored: Mapping[str, Stored]) -> _Unlike:
    """Return what transformers would say after it has loaded the tensors `stored`. Raise
    _CannotLoadError for a family whose own code cannot do it without contents."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.utils import logging

    class OnMeta(TorchFunctionMode):
        """All tensors are on the meta device, those too that a model computes when it is built."""

        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = "meta"
            if func is torch.Tensor.to:
                args = ["meta" if isinstance(x, str | torch.device) else x for x in args]
            result = func(*args, **kwargs)
            # An empty tensor tells which device is the default one, and that must not be "meta".
            if isinstance(result, torch.Tensor) and result.numel():
                result = result.to("meta")
            return result

    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        # As if it were not quantised: what does fit is as in the model before.
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with OnMeta(), _one_thread():
            _, info = type(model).from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True,
                ignore_mismatched_sizes=True, dtype=torch.float32,
            )  # fmt: skip
    except (
        RuntimeError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError
    ) as error:  # fmt: skip
        raise _CannotLoadError(reason_of(error)) from error
    finally:
        logging.set_verbosity(verbosity)
    found = _Unlike.of(info)
    # transformers takes names with the prefix of its decoder or without, and also with two.
    prefix = 2 * f"{model.base_model_prefix}."
    doubled = {name for name in stored if name.startswith(prefix)} - model.state_dict().keys()
    return replace(found, unknown=found.unknown | doubled)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have transformers load in this thread, where the mode above is set."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _compare_modules(files: ModelFiles, model: Any, stored: Mapping[str, Stored]) -> None:
    """Raise ConfigError where a quantised model has tensors that belong to none of its modules, and
    where it has none for a module. What a module's tensors are is the method's own affair, and
    modules that transformers puts together from others are not looked at."""
    unlike = _as_loaded(model, stored)
    modules = {name: module for name, module in model.named_modules() if name}
    packed, containers, unknown = set(), set(), set()
    for name in unlike.unknown:
        owner = name.rpartition(".")[0]
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        if not owner:
            unknown.add(name)
        elif next(modules[owner].children(), None) is None:
            packed.add(owner)
        else:
            containers.add(f"{owner}.")
    missing = {
        name for name in unlike.missing
        if name.rpartition(".")[0] not in packed and not name.startswith(tuple(containers))
    }  # fmt: skip
    _refuse(files, model, _Unlike(frozenset(missing), frozenset(unknown), {}))


def _compare_with_adapter(files: ModelFiles, model: Any) -> None:
    """Raise ConfigError unless the weights of the adapter are those that its settings put into
    `model`, its base on the meta device. Does nothing without peft: vLLM has its own reader."""
    try:
        import peft
    except ImportError:
        return
    try:
        settings = peft.LoraConfig.from_pretrained(str(files.adapter))
        # Others compute with the base's weights.
        settings.init_lora_weights = True
        settings.base_model_name_or_path = None
        adapted = peft.get_peft_model(model, settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{files.name}: does not fit its base: {error}") from error
    compare_adapter(files, adapted)


def compare_adapter(files: ModelFiles, adapted: Any, alone: bool = False) -> None:
    """Raise ConfigError unless the stored weights of the adapter of `files` are those of `adapted`,
    peft's wrapper of its base. With `alone` they must be adapters; else peft also stores trained
    embeddings, whole."""
    from peft import get_peft_model_state_dict

    assert files.adapter is not None
    if not _is_fetched(files.adapter):
        return
    stored = stored_tensors(weight_files(files.adapter))
    if any(".experts." in name for name in stored):
        # Which experts are one module differs between libraries; whoever loads them says so.
        return
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = expected if alone else {**adapted.state_dict(), **expected}
    if unlike := sorted((stored.keys() - known.keys()) | (expected.keys() - stored.keys())):
        prefixed = {re.sub(r"^(base_model\.model\.)*", _PEFT, name) for name in stored}
        is_prefix = prefixed >= expected.keys() and prefixed != stored.keys()
        hint = f" Names begin with {_PEFT} once." if is_prefix else ""
        raise ConfigError(
            f"{files.adapter}: its weights are not those of its adapter_config.json:"
            f" {unlike[0]} is known to one of the two alone ({len(unlike)} such in all).{hint}"
            " Save the adapter again with peft, or merge it with peft and give the merged folder."
        )
    for name, tensor in sorted(stored.items()):
        if tensor.shape != tuple(known[name].shape):
            raise ConfigError(
                f"{files.name}: does not fit its base: {name} has the shape {tensor.shape},"
                f" expected {tuple(known[name].shape)}. Give the base and the settings that it was"
                " trained with in adapter_config.json."
            )


def _is_fetched(path: Path) -> bool:
    """Return whether a folder's weights are here: a dry run fetches none of the hub, and a snapshot
    of the hub may have any part of them."""
    if path.parent.name != "snapshots":
        return True
    index = path / _INDEX
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((path / name).is_file() for name in names)
    return any(path.glob("*.safetensors"))


def _listed(names: Iterable[str]) -> str:
    """Return the first three names, in order."""
    first = sorted(names)
    return ", ".join(first[:3]) + (", …" if len(first) > 3 else "")


_POINTER = b"version https://git-lfs"
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Beside config.json, where older quantised checkpoints say so.
_QUANTISED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# The safetensors format's limit.
_LARGEST_HEADER = 100_000_000
_BLOCK = 1 << 24
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PEFT = "base_model.model."
# What tools leave before or in the names of tensors.
_PREFIXES = {
    "_orig_mod.": "torch.compile leaves",
    "_fsdp_wrapped_module.": "FSDP leaves",
    "_checkpoint_wrapped_module.": "gradient checkpointing leaves",
    "module.": "DDP and DeepSpeed leave",
    _PEFT: "peft leaves",
    "model.": "a wrapper leaves",
    "language_model.": "a model of several modalities leaves",
}
_LEADING = {"module.", _PEFT, "model.", "language_model."}
