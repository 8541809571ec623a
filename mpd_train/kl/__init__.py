"""Fused distillation losses: the divergence of a student's head from a teacher, without its logits.

    from mpd_train.kl import Divergence, dense_kl, sparse_kl

`sparse_kl` takes a teacher's cached top K, `dense_kl` its states and head. Needs torch alone.
"""

from mpd_train.kl.divergence import Divergence
from mpd_train.kl.losses import KLOutput, dense_kl, sparse_kl

__all__ = ["Divergence", "KLOutput", "dense_kl", "sparse_kl"]
