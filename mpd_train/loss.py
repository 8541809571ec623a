"""The loss of a pack, its metrics, and validation."""

from typing import Any

import torch
from torch import Tensor

from mpd_train.config import LossConfig
from mpd_train.data.batches import Batch, Loader
from mpd_train.data.shard_set import Pack
from mpd_train.distributed import Ranks
from mpd_train.kl import Divergence, KLOutput, dense_kl, sparse_kl
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import autocast


def pack_loss(
    student: CausalLM, teacher: CausalLM | None, batch: Batch, vocab_size: int, loss: LossConfig,
    normalizer: float,
) -> KLOutput:  # fmt: skip
    """Return the loss of one pack, from the cached top K or from `teacher`'s full vocabulary: the
    weighted sum over its loss tokens, over `normalizer`. Only the states that predict a loss token
    are multiplied with the head."""
    states = student.states(batch.input_ids, batch.position_ids)[0, batch.loss_positions]
    if torch.is_autocast_enabled(states.device.type):
        # The residual stream is float32; the head product takes the short type, as others do.
        states = states.to(torch.get_autocast_dtype(states.device.type))
    head = student.head(vocab_size)
    common: dict[str, Any] = {
        "normalizer": normalizer,
        "weights": batch.weights,
        "bias": student.bias(vocab_size),
        "softcap": student.softcap,
        "divergence": Divergence(loss.divergence, loss.beta, loss.alpha),
        "temperature": loss.kl_temperature,
        "divergence_clip": loss.divergence_clip,
        "entry_clip": loss.entry_clip,
        "labels": batch.labels if loss.ce_weight > 0 else None,
        "ce_weight": loss.ce_weight,
    }
    if teacher is None:
        tail = batch.tail_logprobs
        if not loss.tail:
            # The loss renormalises the top K.
            tail = torch.full_like(tail, -torch.inf)
        record = batch.topk_ids, batch.topk_logprobs, tail
        return sparse_kl(states, head, *record, **common)
    with torch.no_grad():
        taught = teacher.states(batch.teacher_input_ids, batch.teacher_position_ids)
    taught = taught[0, batch.teacher_loss_positions]
    # An offloaded teacher whose head is tied to its embedding has it in the CPU's memory.
    teacher_head, teacher_bias = teacher.head(vocab_size), teacher.bias(vocab_size)
    return dense_kl(
        states, head, taught, teacher_head.to(states.device), **common,
        teacher_bias=None if teacher_bias is None else teacher_bias.to(states.device),
        teacher_softcap=teacher.softcap,
    )  # fmt: skip


class Sums:
    """Sums of metrics over the loss tokens of an optimiser step, or of a validation."""

    def __init__(self, loss: LossConfig) -> None:
        self._loss = loss
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, output: KLOutput, batch: Batch) -> None:
        parts = {
            "kl": output.per_token,
            "student_entropy": output.student_entropy,
            "teacher_entropy": output.teacher_entropy,
            "topk_mass": output.topk_mass,
            "teacher_tail_mass": batch.weights * batch.tail_logprobs.double().exp(),
            "agreement": output.agreement,
        }
        if self._loss.ce_weight > 0:
            parts["cross_entropy"] = output.cross_entropy
        if self._loss.divergence_clip is not None or self._loss.entry_clip is not None:
            parts["clipped"] = output.clipped < output.per_token
        self._names = list(parts)
        of_tokens = [batch.weights, batch.given_away, *parts.values()]
        sums = [output.loss.detach().double(), *(x.double().sum() for x in of_tokens)]
        # Added on the device: reading a number would wait for it.
        self._sums = torch.stack(sums) + (0.0 if self._sums is None else self._sums)

    def per_token(self, num_tokens: int, ranks: Ranks) -> tuple[float, dict[str, float]]:
        """Return the sum of the weights of `num_tokens`, the loss tokens of all processes; and the
        `loss`, a sum, and means over the tokens, by weight.

        `kl`: the divergence before any clip, in nats, like the entropies; `topk_mass`: the
        student's on the teacher's top K; `teacher_tail_mass`: the teacher's outside its top K;
        `agreement`: share of tokens that both rank first; `cross_entropy`, if it is in the loss;
        `clipped`: share of tokens that the clip changes, if there is one; `given_away`: share of
        all loss tokens that the draft gave away, with mixed and masked targets."""
        assert self._sums is not None
        loss, weight, given_away, *sums = ranks.sum(self._sums.tolist())
        # Weights are 0 or 1. Where all are 0, so are the sums.
        record = {x: y / max(weight, 1.0) for x, y in zip(self._names, sums, strict=True)}
        if self._loss.by_token:
            record["given_away"] = given_away / num_tokens
        return weight, {"loss": loss, **record}


def validate(
    student: CausalLM, teacher: CausalLM | None, loader: Loader, packs: list[Pack],
    vocab_size: int, loss: LossConfig, dtype: torch.dtype, ranks: Ranks,
) -> tuple[float, int]:  # fmt: skip
    """Return the mean loss over the packs' loss tokens, by weight, and their number: divergence
    without a clip, and cross-entropy mixed as in training; no gradients, dropout off."""
    tokens = sum(pack.num_loss_tokens for pack in packs)
    sums = Sums(loss)
    student.model.eval()
    with torch.no_grad(), autocast(loader.device, dtype):
        for batch in loader.batches([packs], ranks):
            output = pack_loss(student, teacher, batch, vocab_size, loss, float(tokens))
            sums.add(output, batch)
    student.model.train()
    _, means = sums.per_token(tokens, ranks)
    divergence = loss.kl_temperature**2 * means["kl"]
    entropy = means.get("cross_entropy", 0.0)
    return (1 - loss.ce_weight) * divergence + loss.ce_weight * entropy, tokens
