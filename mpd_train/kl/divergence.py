"""Divergences between two categorical distributions, with their gradients in closed form.

p is the teacher's distribution, q the student's; both are given as natural-log probabilities
over B outcomes ("buckets": vocabulary entries, or the top K and one tail).

    forward_kl        KL(p | q)
    reverse_kl        KL(q | p)
    jsd               b KL(p | m) + (1-b) KL(q | m),  m = b p + (1-b) q
    skew_kl           KL(p | m),  m = a p + (1-a) q
    skew_reverse_kl   KL(q | m),  m = (1-a) p + a q

Where p = 0 < q, reverse_kl would be infinite without a gradient: log p is clamped to at least
LOG_FLOOR.

jsd as in GKD (arXiv:2306.13649), the skewed ones as in DistiLLM (arXiv:2402.03898).
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

Name = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]
NAMES: tuple[Name, ...] = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")

LOG_FLOOR = -100.0


@dataclass(frozen=True)
class Divergence:
    """A divergence and its parameter: `beta` in (0, 1) for jsd, `alpha` in (0, 1) for the skewed
    ones; the others ignore both."""

    name: Name = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"divergence {self.name!r}: expected one of {', '.join(NAMES)}")
        if self.name == "jsd" and not 0 < self.beta < 1:
            raise ValueError(f"jsd needs 0 < beta < 1, found {self.beta}; its ends are the two KLs")
        if self.name.startswith("skew") and not 0 < self.alpha < 1:
            raise ValueError(f"{self.name} needs 0 < alpha < 1, found {self.alpha}")

    @property
    def parameter(self) -> float:
        """`beta` for jsd, else `alpha`."""
        return self.beta if self.name == "jsd" else self.alpha

    @property
    def entry_constants(self) -> tuple[float, float]:
        """What is left out of the terms and scores of `terms_and_score`: an outcome's term by the
        definition has the first times (p - q) more, its score the second times q. Over a row the
        first adds up to 0, and `logit_gradient` cancels the second."""
        if self.name == "forward_kl":
            return 1.0, 0.0
        if self.name == "reverse_kl":
            return -1.0, 1.0
        if self.name == "jsd":
            return 0.0, -(1 - self.beta) * math.log1p(-self.beta)
        if self.name == "skew_kl":
            return 1 - self.alpha, 0.0
        if self.name == "skew_reverse_kl":
            return self.alpha - 1, -math.log(self.alpha)
        assert_never(self.name)

    def clip_entries(
        self, terms: Tensor, score: Tensor, log_p: Tensor, log_q: Tensor, clip: float
    ) -> tuple[Tensor, Tensor]:
        """Clamp each outcome's term by the definition, such as p log(p / q), at `clip`. Given what
        `terms_and_score` returned, return terms [n, B] whose sum over a row is that of the clamped
        ones, and the scores [n, B], 0 where a term is clamped."""
        p, q = log_p.exp(), log_q.exp()
        more, at_q = self.entry_constants
        difference = more * (p - q)
        above = terms + difference > clip
        terms = torch.where(above, clip - difference, terms)
        return terms, torch.where(above, 0.0, score + at_q * q)

    def terms_and_score(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """For log_p, log_q [n, B], return terms [n, B], none negative, whose sum over a row is the
        divergence F, and the score s [n, B], s_b = q_b g_b with g = dF/dq up to a constant per row,
        which `logit_gradient` cancels.

        Working with q dF/dq rather than dF/dq keeps every term finite where q underflows, and
        leaving the constants out keeps the gradient exact where the divergence saturates.
        """
        p, q = log_p.exp(), log_q.exp()
        if self.name == "forward_kl":
            return _kl(log_p, log_q), -p
        if self.name == "reverse_kl":
            log_p = log_p.clamp(min=LOG_FLOOR)
            return _kl(log_q, log_p), _times(q, log_q - log_p)
        if self.name == "jsd":
            b = self.beta
            log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log1p(-b))
            value = b * _kl(log_p, log_m) + (1 - b) * _kl(log_q, log_m)
            return value, (b - 1) * _times(q, _share(log_p - log_q, b / (1 - b)))
        a = self.alpha
        if self.name == "skew_kl":
            log_m = torch.logaddexp(log_p + math.log(a), log_q + math.log1p(-a))
            score = (a - 1) * _times(p, torch.exp(log_q - log_m))
            return _kl(log_p, log_m), score
        if self.name == "skew_reverse_kl":
            log_m = torch.logaddexp(log_p + math.log1p(-a), log_q + math.log(a))
            share = _share(log_p - log_q, (1 - a) / a)
            return _kl(log_q, log_m), -_times(q, share + torch.expm1(-share))
        assert_never(self.name)


def _share(log_ratio: Tensor, odds: float) -> Tensor:
    """log(1 + odds p / q) from log(p / q): log(m / q) less its constant."""
    x = log_ratio + math.log(odds)
    return torch.logaddexp(x, torch.zeros_like(x))


def _times(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight * log_ratio, 0 where the weight is 0 (0 log 0 = 0)."""
    return torch.where(weight > 0, weight * log_ratio, 0.0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms [n, B] of KL(p | q), as p (exp(d) - 1 - d) with d = log q - log p.

    They add up to sum p log(p / q) because p and q both sum to 1, but no term is negative and the
    rounding of the two normalisations does not enter to first order: for distributions that
    nearly agree the plain sum is mostly that rounding. An outcome that has no mass in either (a
    padded bucket) adds nothing.
    """
    d = torch.where(log_q == log_p, 0.0, log_q - log_p)
    p = log_p.exp()
    near = p * (torch.expm1(d) - d)
    far = log_q.exp() - p - _times(p, d)
    return torch.where(d.abs() < 1, near, far)


def logit_gradient(log_q: Tensor, score: Tensor) -> Tensor:
    """dF/dz [n, B] for q = softmax(z): dF/dz_b = q_b (g_b - sum q g), from s = q g."""
    return score - log_q.exp() * score.sum(-1, keepdim=True)
