"""A token's loss: logit caps, divergence, temperature, clip and share of cross-entropy."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpd_train.kl.divergence import Divergence, logit_gradient


@dataclass(frozen=True)
class Objective:
    """(1 - ce_weight) temperature^2 F' + ce_weight (-log q[label]), per token, where F' is the
    divergence F after the clip: min(F, clip), or the sum of F's entries clamped at entry_clip;
    logits are softcap tanh(z / softcap) if there is a softcap. Raise ValueError for values out of
    range."""

    divergence: Divergence
    temperature: float
    clip: float | None
    entry_clip: float | None
    ce_weight: float
    softcap: float | None = None
    teacher_softcap: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature needs to be above 0, found {self.temperature}")
        for name, clip in (("divergence_clip", self.clip), ("entry_clip", self.entry_clip)):
            if clip is not None and not clip > 0:
                raise ValueError(f"{name} needs to be above 0, found {clip}")
        if self.clip is not None and self.entry_clip is not None:
            raise ValueError("divergence_clip and entry_clip: give one of the two")
        for name in ("softcap", "teacher_softcap"):
            cap = getattr(self, name)
            if cap is not None and not 0 < cap < math.inf:
                raise ValueError(f"{name} needs to be finite and above 0, found {cap}")
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight needs to be within [0, 1], found {self.ce_weight}")

    @property
    def share(self) -> float:
        """Factor of the divergence in the loss."""
        return (1 - self.ce_weight) * self.temperature**2

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For log_p, log_q [c, B] at the temperature, return F [c], F after the clip [c], and the
        gradient [c, B] of the divergence's part of the loss with respect to the logits before the
        temperature."""
        terms, score = self.divergence.terms_and_score(log_p, log_q)
        value = clipped = terms.sum(-1)
        if self.entry_clip is not None:
            terms, score = self.divergence.clip_entries(terms, score, log_p, log_q, self.entry_clip)
            clipped = terms.sum(-1)
        # d/dz of F(z / temperature) is divided by the temperature once; the loss is multiplied by
        # its square.
        gradient = self._share_of(logit_gradient(log_q, score), self.share / self.temperature)
        if self.clip is not None:
            gradient = torch.where(value[:, None] > self.clip, 0.0, gradient)
            clipped = value.clamp(max=self.clip)
        return value, clipped, gradient

    def loss(self, clipped: Tensor, cross_entropy: Tensor) -> Tensor:
        """Return the tokens' losses [n] from F after the clip [n] and -log q[label] [n]."""
        value = self._share_of(clipped, self.share)
        return value if self.ce_weight == 0 else value + self.ce_weight * cross_entropy

    @staticmethod
    def capped(z: Tensor, softcap: float | None) -> Tensor:
        """Return the logits z [c, V] after the cap. A logit of -inf stays -inf."""
        if softcap is None:
            return z
        return (softcap * torch.tanh(z / softcap)).masked_fill(z.isneginf(), -torch.inf)

    def _share_of(self, x: Tensor, factor: float) -> Tensor:
        # An infinite divergence times a factor of 0 would be a NaN.
        if self.ce_weight == 1:
            return torch.zeros_like(x)
        return x if factor == 1 else factor * x
