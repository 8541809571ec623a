"""What each row's divergence was when the training met it: OUT/rows/rank-N.jsonl.

Each process writes a file of its own, a line for each row of its packs: `step`, from 1; `row`, the
first 16 digits of its `row_id`; `kl`, the mean over its loss tokens, by weight, in nats, before the
step changed the student.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from mpd_data.common.files import atomic_file, read_json_lines
from mpd_train.data.batches import Batch
from mpd_train.data.shard_set import Pack, ShardSet
from mpd_train.distributed import Ranks

FOLDER = "rows"
_REMEDY = "Remove the line."


class RowLog:
    """Appends to this process's file. Lines of steps after `done`, which are done again, are cut
    off first. Raise DataError for a damaged line."""

    def __init__(self, out: Path, shards: ShardSet, done: int, ranks: Ranks) -> None:
        folder = out / FOLDER
        if ranks.first:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("rank-*.jsonl"):
                lines = read_json_lines(path, _REMEDY, ("step", "row", "kl"))
                kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= done]
                with atomic_file(path) as file:
                    file.write("".join(kept))
        ranks.wait()
        self._shards = shards
        self._file = (folder / f"rank-{ranks.rank}.jsonl").open("a", encoding="utf-8")
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
