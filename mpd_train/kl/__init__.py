"""Fused distillation losses. Needs torch alone; importable by itself.

from mpd_train.kl import Divergence, dense_kl, sparse_kl
"""

from mpd_train.kl.chunked import KLOutput, dense_kl, sparse_kl
from mpd_train.kl.divergence import NAMES, Divergence

__all__ = ["NAMES", "Divergence", "KLOutput", "dense_kl", "sparse_kl"]
