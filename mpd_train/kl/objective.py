"""A token's loss: logit caps, divergence, temperature, clip and share of cross-entropy."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpd_train.kl.divergence import Divergence, logit_gradient


@dataclass(frozen=True)
class Objective:
    """(1 - ce_weight) temperature^2 min(F, clip) + ce_weight (-log q[label]), per token; logits are
    softcap tanh(z / softcap) if there is a softcap. Raise ValueError for values out of range."""

    divergence: Divergence
    temperature: float
    clip: float | None
    ce_weight: float
    softcap: float | None = None
    teacher_softcap: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature needs to be above 0, found {self.temperature}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"divergence_clip needs to be above 0, found {self.clip}")
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

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """For log_p, log_q [c, B] at the temperature, return F [c] and the gradient [c, B] of the
        divergence's part of the loss with respect to the logits before the temperature."""
        value, score = self.divergence.value_and_score(log_p, log_q)
        # d/dz of F(z / temperature) is divided by the temperature once; the loss is multiplied by
        # its square.
        gradient = self._share_of(logit_gradient(log_q, score), self.share / self.temperature)
        if self.clip is not None:
            gradient = torch.where(value[:, None] > self.clip, 0.0, gradient)
        return value, gradient

    def loss(self, value: Tensor, cross_entropy: Tensor) -> Tensor:
        """Return the tokens' losses [n] from F [n] and -log q[label] [n]."""
        if self.clip is not None:
            value = value.clamp(max=self.clip)
        value = self._share_of(value, self.share)
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
