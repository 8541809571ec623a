"""Choose the attention implementation, and register torch's own for packs.

The sequences of a pack do not see each other. flash-attn and `varlen` compute each by itself; the
others compute the whole pack's square under a mask, which for a pack of 32k tokens takes more time
than the rest of a small model.
"""

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import ModelFiles, has_softcap, load_config
from mpd_train.config import TrainConfig

VARLEN = "varlen"


def attention(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, models: Sequence[ModelFiles]
) -> str | None:
    """Return the implementation that `models` are loaded with, registered with transformers; None
    leaves the choice to it. Raise ConfigError for one that cannot run or that would leave out a
    part of a model's attention."""
    short, on_cpu = dtype == torch.bfloat16, device.type == "cpu"
    fits = short and device.type == "cuda"
    if on_cpu:
        # The loop over sequences has another length for each pack: it would be compiled each time.
        fits_varlen = short and not config.compile
    else:
        # The devices that torch's kernels support.
        fits_varlen = fits and torch.cuda.get_device_capability(device) >= (8, 0)
    name = config.attn_implementation
    configs = [(x.name, load_config(x, config.trust_remote_code)) for x in models]
    for model, settings in configs:
        _require_one_chunk(model, settings.get_text_config(), config.pack_length)
    capped = [model for model, settings in configs if has_softcap(settings)]
    if capped and name in ("sdpa", VARLEN):
        raise ConfigError(
            f"--attn-implementation {name}: leaves out the soft cap that {capped[0]}'s attention"
            " has. Leave the option out, or give eager or flash_attention_2."
        )
    if name is None:
        from transformers.utils import is_flash_attn_2_available

        if fits and is_flash_attn_2_available() and (not capped or _flash_has_softcap()):
            return "flash_attention_2"
        if capped:
            return "eager"
        name = VARLEN if fits_varlen else None
    if name == VARLEN:
        if not fits_varlen:
            raise ConfigError(
                "--attn-implementation varlen: runs in bfloat16 alone, on CUDA (Ampere or newer)"
                " or on a CPU without --compile. Leave it out, or give sdpa."
            )
        _register()
    return name


def _require_one_chunk(model: str, text_config: Any, pack_length: int) -> None:
    """Raise ConfigError for attention in chunks (Llama 4) that are shorter than a pack:
    transformers counts them from the pack's start, so that a row would see more or less by where it
    lies."""
    chunk = getattr(text_config, "attention_chunk_size", None)
    in_chunks = "chunked_attention" in (getattr(text_config, "layer_types", None) or ())
    if in_chunks and chunk is not None and chunk < pack_length:
        raise ConfigError(
            f"--pack-length {pack_length}: layers of {model} attend in chunks of {chunk} tokens,"
            " which the rows of a longer pack would share. Give"
            f" --pack-length {chunk} or less."
        )


def _flash_has_softcap() -> bool:
    """Return whether this flash-attn has soft caps; others would silently leave them out."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    return "softcap" in inspect.signature(flash_attn_varlen_func).parameters


def is_short(name: str | None) -> bool:
    """Return whether the implementation computes in bfloat16 only, and each sequence by itself."""
    return name == VARLEN or (name or "").startswith("flash")


def boundaries(position_ids: Tensor) -> dict[str, Any]:
    """Return `varlen`'s arguments for a pack [1, T], under transformers' names: the starts of its
    sequences, and T, int32 [sequences + 1]; tokens of the longest. One wait for the device."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].int()
    ends = torch.nn.functional.pad(starts, (0, 1), value=position_ids.shape[1])
    longest = int(ends.diff().max())
    return {
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(VARLEN, _varlen)
    # It needs no mask; this makes none.
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)


def _varlen(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention with transformers' signature: query [1, heads, T, width], key and value
    with the same number of heads or a divisor of it. Without boundaries there is one sequence.
    Return [1, T, heads, width]."""
    length = query.shape[2]
    on_cpu = query.device.type == "cpu"
    unsupported = any(x is not None for x in (softcap, s_aux, attention_mask))
    if unsupported or (not on_cpu and (dropout > 0 or value.shape[-1] != query.shape[-1])):
        raise ConfigError(
            f"{type(module).__name__}: uses attention features that varlen does not support"
            " (dropout, a soft cap, sinks, a mask, or values of another width). Give"
            " --attn-implementation sdpa, or eager if the family has no sdpa."
        )
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.tensor([0, length], dtype=torch.int32, device=query.device)
        max_length_q = length
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        # Norms with float32 weights leave queries and keys in float32.
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if on_cpu:
        ends = cu_seq_lens_q.tolist()
        out = _one_by_one(query, key, value, ends, dropout, scaling, sliding_window)
        return out.transpose(1, 2), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    more: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        # Before torch 2.12 fewer heads of keys are accepted without this option.
        more["enable_gqa"] = True
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    # A Tensor, unless the logsumexp is requested too.
    out = varlen_attn(  # type: ignore[assignment]
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=window, **more,
    )  # fmt: skip
    return out.unsqueeze(0), None


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], dropout: float,
    scaling: float | None, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """Compute the attention [1, heads, T, width] of each sequence of a pack by torch's kernel for
    one. `ends`: 0 and the end of each."""
    grouped, parts = query.shape[1] != key.shape[1], []
    for start, end in pairwise(ends):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask = None
        if sliding_window is not None and end - start > sliding_window:
            places = torch.arange(end - start)
            distance = places[:, None] - places
            mask = (distance >= 0) & (distance < sliding_window)
        part = scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        parts.append(part)
    return torch.cat(parts, 2)
