"""The loss of a pack, and what is recorded about it."""

import torch

from mpd_train.config import LossConfig
from mpd_train.kl import Divergence, KLOutput, dense_kl, sparse_kl
from mpd_train.models import CausalLM, autocast
from mpd_train.stream import Batch, Pack, ShardSet, load_pack


def pack_loss(
    student: CausalLM,
    teacher: CausalLM | None,
    batch: Batch,
    vocab_size: int,
    loss: LossConfig,
    normalizer: float,
) -> KLOutput:
    """The loss of one pack: from the cached top K, or from the whole of `teacher`. Only the
    states that predict a loss token reach the vocabulary."""
    states = student.states(batch.input_ids, batch.position_ids)[0, batch.loss_positions]
    if torch.is_autocast_enabled(states.device.type):
        # The residual stream is float32; the head product takes the short type, as others do.
        states = states.to(torch.get_autocast_dtype(states.device.type))
    head = student.head(vocab_size)
    divergence = Divergence(loss.divergence, loss.beta, loss.alpha)
    labels = batch.labels if loss.ce_weight > 0 else None
    if teacher is None:
        return sparse_kl(
            states,
            head,
            batch.topk_ids,
            batch.topk_logprobs,
            batch.tail_logprobs,
            normalizer=normalizer,
            divergence=divergence,
            divergence_clip=loss.divergence_clip,
            labels=labels,
            ce_weight=loss.ce_weight,
        )
    with torch.no_grad():
        teacher_states = teacher.states(batch.teacher_input_ids, batch.teacher_position_ids)
    return dense_kl(
        states,
        head,
        teacher_states[0, batch.teacher_loss_positions],
        teacher.head(vocab_size),
        normalizer=normalizer,
        divergence=divergence,
        divergence_clip=loss.divergence_clip,
        labels=labels,
        ce_weight=loss.ce_weight,
    )


def validate(
    student: CausalLM,
    teacher: CausalLM | None,
    shards: ShardSet,
    packs: list[Pack],
    loss: LossConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, int]:
    """Mean loss over the packs' loss tokens, and their number: divergence, never clipped, and
    cross-entropy mixed as in training; no gradients, dropout off."""
    tokens = sum(pack.num_loss_tokens for pack in packs)
    sums = Sums(loss)
    student.model.eval()
    with torch.no_grad(), autocast(device, dtype):
        for pack in packs:
            batch = load_pack(shards, pack).to(device)
            vocab_size = int(shards.metadata["vocab_size"])
            sums.add(pack_loss(student, teacher, batch, vocab_size, loss, float(tokens)))
    student.model.train()
    found = sums.per_token(tokens)
    entropy = found.get("cross_entropy", 0.0)
    return (1 - loss.ce_weight) * found["kl"] + loss.ce_weight * entropy, tokens


class Sums:
    """Sums over the loss tokens of an optimiser step."""

    def __init__(self, loss: LossConfig) -> None:
        self._loss = loss
        self._kl, self._cross_entropy, self._clipped = 0.0, 0.0, 0

    def add(self, output: KLOutput) -> None:
        self._kl += float(output.per_token.sum())
        if self._loss.ce_weight > 0:
            self._cross_entropy += float(output.cross_entropy.sum())
        if self._loss.divergence_clip is not None:
            self._clipped += int((output.per_token > self._loss.divergence_clip).sum())

    def per_token(self, num_tokens: int) -> dict[str, float]:
        """`kl`: mean divergence, never clipped, in nats; `cross_entropy` in nats where it is in
        the loss; `clipped`: share of tokens above the clip, where there is one."""
        record = {"kl": self._kl / num_tokens}
        if self._loss.ce_weight > 0:
            record["cross_entropy"] = self._cross_entropy / num_tokens
        if self._loss.divergence_clip is not None:
            record["clipped"] = self._clipped / num_tokens
        return record
