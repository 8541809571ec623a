"""A causal language model split into states and head, as the losses need it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mpd_data.common.errors import ConfigError, MPDError, reason_of
from mpd_data.common.models import ModelFiles, has_softcap
from mpd_data.common.weights import load_model, skeleton
from mpd_train.kl.losses import gathered
from mpd_train.model import lora
from mpd_train.model.attention import VARLEN, boundaries, is_short
from mpd_train.model.device import autocast


class CausalLM:
    """A causal language model split into states and head. On the meta device it has layers and
    sizes, but no weights or buffers. An adapter is merged into its base, unless `merged` is False:
    then this is the base.

    Its logits are the states times the head, plus the head's bias if it has one, and go through
    `softcap` if it has one (see `mpd_train.kl`). A factor of the family's logits, `logit_scale`, is
    in the states.

    Raise ConfigError for a model that cannot be loaded, or that the loss does not support.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def __init__(
        self, files: ModelFiles, device: torch.device, weights_dtype: torch.dtype,
        trust_remote_code: bool, attn_implementation: str | None = None, merged: bool = True,
    ) -> None:  # fmt: skip
        self.files = files
        # peft's wrapper of the model, if adapters are trained.
        self.adapted: Any = None
        # The context that stores activations for the backward pass.
        self.kept: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.model: Any
        if device.type == "meta":
            self.model = skeleton(files, trust_remote_code, weights_dtype)
            if files.adapter is not None and merged:
                lora.merge(self.model, files)
            return
        try:
            self.model = load_model(
                files, trust_remote_code, dtype=weights_dtype,
                attn_implementation=attn_implementation,
            ).to(device)  # fmt: skip
            if attn_implementation is None and has_softcap(self.model.config):
                self.model.set_attn_implementation("eager")
            if files.adapter is not None and merged:
                lora.merge(self.model, files)
            short = torch.bfloat16 if is_short(attn_implementation) else torch.float32
            with torch.no_grad(), autocast(device, short):
                self._find_head(device)
                self._require_separate_sequences(device)
        except (MPDError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers, and a model's own code, raise all kinds
            reason = reason_of(error)
            raise ConfigError(f"{files.name}: cannot be loaded: {reason}") from error

    def _find_head(self, device: torch.device) -> None:
        """Determine `logit_scale` and `softcap` from the model's own logits. Some families scale or
        cap them, and their configurations say by how much, but not whether to multiply or divide;
        a wrong guess would be silently wrong. Raise ConfigError if nothing fits."""
        if self.model.base_model is self.model:
            raise ConfigError(
                f"{self.files.name}: transformers does not name the layers below its output head"
                " (base_model_prefix). Such models are not supported."
            )
        ids = torch.arange(1, 9, device=device)[None]
        self.model.eval()
        bias = self.bias()
        expected = self.model(input_ids=ids).logits.float()
        product = (self.states(ids, None) @ self.head().T).float()
        if not expected.isfinite().all():
            raise ConfigError(
                f"{self.files.name}: its logits are not finite; the weights are broken."
            )
        config = self.model.config.get_text_config()
        scaling, scale, softcap = (
            getattr(config, name, None)
            for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
        )
        # MPT's may be a string, which transformers ignores.
        factors = [x for x in (scaling, scale) if isinstance(x, int | float) and x]
        near = 1e-2 * float(expected.abs().max())
        # The cap first: small logits look the same without it, but do not once they have grown.
        for cap in dict.fromkeys([softcap or None, None]):
            fits = []
            for factor in dict.fromkeys([1.0, *factors, *(1 / x for x in factors)]):
                logits = factor * product if bias is None else factor * product + bias
                if cap is not None:
                    logits = cap * torch.tanh(logits / cap)
                if torch.allclose(expected, logits, rtol=1e-2, atol=near):
                    fits.append((float((expected - logits).abs().max()), factor))
            if fits:
                self.logit_scale, self.softcap = min(fits)[1], cap
                return
        raise ConfigError(
            f"{self.files.name}: its logits are not its last hidden states times its output"
            " embedding, nor a scale or cap of that from its configuration (logits_scaling,"
            " logit_scale, final_logit_softcapping). Such models are not supported."
        )

    def _require_separate_sequences(self, device: torch.device) -> None:
        """Raise ConfigError for a family that ignores positions: they alone separate packed
        sequences, and it would silently train across sequences."""
        a, b = torch.arange(2, 7, device=device)[None], torch.arange(3, 10, device=device)[None]
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None].to(device)
        packed = self.states(torch.cat([a, b], 1), positions)[:, 5:].float()
        alone = self.states(b, None).float()
        if not torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max())):
            raise ConfigError(
                f"{self.files.name}: sequences packed into one see each other in this architecture."
                " Such models are not supported."
            )

    def states(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return the last hidden states [1, T, H] of packed ids [1, T], times the logits' scale.
        Packed sequences, each with positions from 0, do not see each other."""
        more = {}
        if position_ids is not None and self.model.config._attn_implementation == VARLEN:
            more = boundaries(position_ids)
        with self.kept():
            output = self.model.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **more
            )
        states: Tensor = output.last_hidden_state
        return states if self.logit_scale == 1 else states * self.logit_scale

    def bias(self, vocab_size: int | None = None) -> Tensor | None:
        """Return the output embedding's bias [V], cut like `head`; None without one."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return None if bias is None else gathered(bias)[:vocab_size]

    def head(self, vocab_size: int | None = None) -> Tensor:
        """Return the output embedding [V, H], without its padding rows beyond `vocab_size`."""
        weight = gathered(self.model.get_output_embeddings().weight)
        return weight if vocab_size in (None, weight.shape[0]) else weight[:vocab_size]


def decoder_layers(model: Any) -> list[Any]:
    """Return the layers of `model`, a transformers causal language model. Raise ConfigError for one
    that does not name them."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__}: does not name its layers (_no_split_modules). Train it with"
            " one process and without --compile."
        )
    return layers
