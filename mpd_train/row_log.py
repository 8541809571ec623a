"""Write how far the student was from the teacher on each row (mpd_data/store/trainings.py)."""

import json
from pathlib import Path

import torch
from torch import Tensor

from mpd_data.common.files import atomic_file
from mpd_data.store.trainings import read_row_log, row_log, row_logs
from mpd_train.data.batches import Batch
from mpd_train.data.shard_set import Pack, ShardSet
from mpd_train.distributed import Ranks


class RowLog:
    """Appends to this process's file. Lines of steps after `done`, which are done again, are cut
    off first. Raise DataError for a damaged line."""

    def __init__(self, out: Path, shards: ShardSet, done: int, ranks: Ranks) -> None:
        own = row_log(out, ranks.rank)
        if ranks.first:
            own.parent.mkdir(exist_ok=True)
            for path in row_logs(out):
                lines = (line for line in read_row_log(path) if line["step"] <= done)
                kept = [json.dumps(line) + "\n" for line in lines]
                with atomic_file(path) as file:
                    file.write("".join(kept))
        ranks.wait()
        self._shards = shards
        self._file = own.open("a", encoding="utf-8")
        self._held: list[tuple[Pack, Tensor]] = []

    def add(self, pack: Pack | None, per_token: Tensor, batch: Batch) -> None:
        """Hold the divergences [n] of a pack's loss tokens; of no pack nothing. Nothing is read
        from the device yet: that would wait for it."""
        if pack is not None:
            self._held.append((pack, torch.stack([per_token, batch.weights])))

    def write(self, step: int) -> None:
        """Write the rows of step `step`, from 1, that were added."""
        for pack, held in self._held:
            groups = [(self._shards.groups[g], r) for g, r in pack.rows]
            sizes = [int(group.num_loss_tokens[r]) for group, r in groups]
            for (group, r), of_row in zip(
                groups, torch.split(held.cpu(), sizes, dim=1), strict=True
            ):
                kl, weight = of_row.double().sum(1).tolist()
                row = f"{int(group.key[r]):016x}"
                line = {"step": step, "row": row, "kl": round(kl / max(weight, 1.0), 6)}
                self._file.write(json.dumps(line) + "\n")
        self._held.clear()
        self._file.flush()

    def close(self) -> None:
        self._file.close()
