"""Read packs ahead and put them on the device."""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpd_data.common.errors import DataError
from mpd_data.store.schema import SCORES
from mpd_train.data.ids import require_ids
from mpd_train.data.shard_set import Pack, ShardSet
from mpd_train.data.targets import Record
from mpd_train.distributed import Ranks

# Packs read before they are needed.
_PACKS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """One pack, ready for the model. T tokens of which n are predicted under the loss.

    input_ids, position_ids int64 [1, T]; loss_positions int64 [n]: the state that predicts each
    loss token, one before it; labels int64 [n]: those tokens' ids; topk_ids int64 [n, K],
    topk_logprobs [n, K] and tail_logprobs [n] float32; the teacher_* are the same sequences in the
    context the teacher scored them in; weights [n] float32: the tokens' factors in the loss;
    given_away [n] float32: 1 where the draft gave the token away, if the targets depend on it.
    """

    input_ids: Tensor
    position_ids: Tensor
    loss_positions: Tensor
    labels: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    tail_logprobs: Tensor
    teacher_input_ids: Tensor
    teacher_position_ids: Tensor
    teacher_loss_positions: Tensor
    weights: Tensor
    given_away: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: x.to(device, non_blocking=True) for name, x in self.__dict__.items()})

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return Batch(**{name: x.pin_memory() for name, x in self.__dict__.items()})

    def without_loss(self) -> "Batch":
        """Return the same sequences with no loss tokens: the loss is 0, with gradients of 0."""
        per_token = ("loss_positions", "labels", *SCORES, "weights", "given_away")
        names = (*per_token, "teacher_loss_positions")
        return replace(self, **{name: getattr(self, name)[:0] for name in names})


class Loader:
    """Reads packs in a thread of its own, ahead of training. A ShardSet must be read through one
    Loader: its cache is not thread-safe."""

    def __init__(self, shards: ShardSet, device: torch.device) -> None:
        self.device = device
        self._shards = shards
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mpd-loader")

    def batches(self, steps: Iterable[list[Pack]], ranks: Ranks) -> Iterator[Batch]:
        """Yield this process's batches of each step, in order, on the device. All processes get the
        same number, because all have to join in each pass through a sharded model: one that has no
        pack left gets another's without its loss. Raise what `load_pack` raises."""
        ahead: deque[Future[Batch]] = deque()
        for packs in steps:
            for own in ranks.share(packs):
                ahead.append(self._thread.submit(self._load, own or packs[0], own is not None))
                if len(ahead) > _PACKS_AHEAD:
                    yield ahead.popleft().result().to(self.device)
        while ahead:
            yield ahead.popleft().result().to(self.device)

    def _load(self, pack: Pack, with_loss: bool) -> Batch:
        batch = load_pack(self._shards, pack)
        if not with_loss:
            batch = batch.without_loss()
        return batch.pinned() if self.device.type == "cuda" else batch

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def load_pack(shards: ShardSet, pack: Pack) -> Batch:
    """Read a pack's rows and concatenate them to one batch. Raise DataError for a broken row."""
    k = shards.metadata["num_logprobs"]
    parts: defaultdict[str, list[npt.NDArray[Any]]] = defaultdict(list)
    start, teacher_start = 0, 0
    for group, row in pack.rows:
        source = shards.groups[group]
        kept_before = int(np.count_nonzero(source.num_loss_tokens[:row]))
        columns = {name: column[kept_before] for name, column in shards.load(group).items()}
        values = {
            name: scalar.values.to_numpy(zero_copy_only=False)
            for name, scalar in columns.items()
            if scalar.is_valid
        }
        sequence = values.get("input_ids", np.empty(0, np.int32))
        if len(sequence) != source.num_tokens[row]:
            raise DataError(
                f"{source.path}, row {row} of row group {source.index}: {len(sequence)} input_ids,"
                f" expected loss_start + num_rewritten_tokens = {source.num_tokens[row]}. Check the"
                " round with `mpd-gen validate`."
            )
        num_loss = int(source.num_loss_tokens[row])
        first = len(sequence) - num_loss
        records = []
        for prefix in shards.targets.prefixes:
            names = [prefix + name for name in SCORES]
            ids, logprobs, tail = (values.get(name, np.empty(0, np.float16)) for name in names)
            if not len(ids) == len(logprobs) == num_loss * k or len(tail) != num_loss:
                raise DataError(
                    f"{source.path}, row {row} of row group {source.index}: {num_loss} loss tokens"
                    f" but {len(ids)} {names[0]}, {len(logprobs)} {names[1]} and {len(tail)}"
                    f" {names[2]}, with K = {k}. Check the round with `mpd-gen validate`."
                )
            records.append(Record(ids.reshape(-1, k), logprobs.reshape(-1, k), tail))
        context = values.get("teacher_prompt_ids", sequence[:first])
        for ids in (sequence, context, *(record.ids for record in records)):
            require_ids(ids, shards.metadata["vocab_size"], source, row)
        taught = shards.targets.taught(sequence[first:], records, shards.numbers)
        read = np.concatenate([context, sequence[first:]])
        of_row = {
            "input_ids": sequence,
            "position_ids": np.arange(len(sequence)),
            # The state at position i predicts the token at i + 1.
            "loss_positions": start + np.arange(first, len(sequence)) - 1,
            "labels": sequence[first:],
            **dict(zip(SCORES, taught.record, strict=True)),
            "weights": taught.weights,
            "given_away": taught.given_away,
            "teacher_input_ids": read,
            "teacher_position_ids": np.arange(len(read)),
            "teacher_loss_positions": teacher_start + len(context) + np.arange(num_loss) - 1,
        }
        for name, part in of_row.items():
            parts[name].append(part)
        start += len(sequence)
        teacher_start += len(read)

    tensors = {}
    for name, arrays in parts.items():
        is_float = name.endswith("logprobs") or name in ("weights", "given_away")
        dtype = np.float32 if is_float else np.int64
        tensors[name] = torch.from_numpy(np.concatenate(arrays).astype(dtype))
        if name.endswith(("input_ids", "position_ids")):
            tensors[name] = tensors[name][None]
    return Batch(**tensors)
