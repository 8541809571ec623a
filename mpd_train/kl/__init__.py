"""Fused distillation losses. Needs torch alone; importable by itself.

from mpd_train.kl import Divergence, dense_kl, sparse_kl
"""

from mpd_train.kl.divergence import NAMES, Divergence
from mpd_train.kl.fused import workspace_bytes
from mpd_train.kl.losses import Backend, KLOutput, LowRankHead, dense_kl, gathered, sparse_kl

__all__ = [
    "NAMES",
    "Backend",
    "Divergence",
    "KLOutput",
    "LowRankHead",
    "dense_kl",
    "gathered",
    "sparse_kl",
    "workspace_bytes",
]
