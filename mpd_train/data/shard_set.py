"""Read the kept rows of one or several rounds, and which rows there are.

Packs (packing.py) are planned from the light columns alone (status, lengths): (seed, epoch) gives a
permutation of row groups, and windows of them are shuffled and packed. The plan is the same for
every process and every restart, so progress is one integer, the next step. A round that fits one
window is packed by its rows' keys alone: training does not depend on the order of rows in the
shards, which follows the generation's timing. Packed sequences do not see each other: positions
start at 0 in each, and attention stays inside a run of consecutive positions.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.hashing import differences
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_once
from mpd_data.store.schema import SCORES, SHARED_METADATA
from mpd_data.store.shards import (
    PARQUET_ERRORS,
    open_shard,
    pack_keys,
    read_all,
    read_columns,
    read_metadata,
    with_added_columns,
)
from mpd_train.config import LossConfig
from mpd_train.data.targets import Targets

# Kept tokens of the row groups that are shuffled and packed together: enough for good packing, few
# enough for memory (0.8 GB at K = 64; rows of two windows are held).
WINDOW_TOKENS = 2**21


@dataclass(frozen=True)
class Pack:
    """Rows that go through the model as one sequence: (row group, row in it) pairs."""

    rows: tuple[tuple[int, int], ...]
    num_tokens: int
    num_loss_tokens: int


@dataclass(frozen=True)
class _Group:
    """A Parquet row group and the lengths of its rows; 0 loss tokens means not kept. `key` is the
    start of a row's id. A row's place in [0, 1) is its prompt's hash: rows below the validation
    fraction are held out."""

    path: Path
    index: int
    key: npt.NDArray[np.uint64]
    num_tokens: npt.NDArray[np.int64]
    num_loss_tokens: npt.NDArray[np.int64]
    place: npt.NDArray[np.float64]

    @property
    def kept_tokens(self) -> int:
        return int(self.num_tokens[self.num_loss_tokens > 0].sum())


class ShardSet:
    """The kept rows of one or several rounds.

    Raise ConfigError if there are no shards, if a round is given twice, if they do not fit together
    (another tokenizer, K, score context or temperature) or to the targets of `loss`, or if no row
    was kept; DataError for a file that cannot be read. tokenizer: for targets that differ by token.
    """

    def __init__(self, paths: list[Path], loss: LossConfig | None = None, tokenizer: Any = None):
        require_once(paths)
        self.files = [file for path in paths for file in _shards_of(path)]
        self.metadata = read_metadata(self.files[0])
        for file, found in zip(self.files, read_all(read_metadata, self.files), strict=True):
            unlike = differences(
                {name: self.metadata.get(name) for name in SHARED_METADATA},
                {name: found.get(name) for name in SHARED_METADATA},
            )
            if unlike:
                raise ConfigError(
                    f"{file} cannot be trained on together with {self.files[0]}, whose settings"
                    " are the saved ones here:\n  " + "\n  ".join(unlike)
                )
        if self.metadata.get("stage") != "distill":
            raise ConfigError(
                f"{self.files[0]}: holds {self.metadata.get('stage')}, expected distill shards."
                " Run mpd-gen rewrite on the round first."
            )
        self.targets = Targets.of(loss or LossConfig(), self.metadata["score_context"], paths[0])
        self.numbers = self.targets.numbers(tokenizer, self.metadata["vocab_size"])
        self.groups = [group for part in read_all(_groups_of, self.files) for group in part]
        self.num_rows = sum(int((g.num_loss_tokens > 0).sum()) for g in self.groups)
        if self.num_rows == 0:
            tables = (read_columns(file, ["status"]) for file in self.files)
            counts = Counter(status for table in tables for status in table["status"].to_pylist())
            raise ConfigError(
                f"{', '.join(map(str, paths))}: no kept rewrite to train on; rows by status:"
                f" {dict(counts)}. See `mpd-gen stats`."
            )
        self._cache: dict[int, dict[str, pa.ChunkedArray]] = {}

    def identity(self) -> list[str]:
        """Return the shards' hashes: a training must resume on the same shards."""
        manifests = {
            path: {shard.name: shard.sha256 for shard in RoundDir(path).manifest("distill")}
            for path in {file.parent.parent for file in self.files}
        }
        for file in self.files:
            if file.name not in manifests[file.parent.parent]:
                raise ConfigError(
                    f"{file}: not in its round's manifest. Was it copied alone? Copy the whole"
                    " round, or run mpd-gen rewrite on it, which indexes it."
                )
        return [manifests[file.parent.parent][file.name] for file in self.files]

    def lengths(self) -> list[int]:
        """Return the tokens of each kept row, prompt and rewrite."""
        return [int(n) for g in self.groups for n in g.num_tokens[g.num_loss_tokens > 0]]

    def lengths_of(self, packs: list[Pack]) -> list[int]:
        """Return the tokens of each row in these packs."""
        return [int(self.groups[g].num_tokens[r]) for pack in packs for g, r in pack.rows]

    def load(self, group: int) -> dict[str, pa.ChunkedArray]:
        """Return the training columns of a row group's kept rows. Keep groups of at most two
        windows' tokens in memory. Raise DataError if the group cannot be read."""
        if group not in self._cache:
            source = self.groups[group]
            held = source.kept_tokens + sum(self.groups[g].kept_tokens for g in self._cache)
            while self._cache and held > 2 * WINDOW_TOKENS:
                first = next(iter(self._cache))
                held -= self.groups[first].kept_tokens
                del self._cache[first]
            columns = ["input_ids", *["teacher_prompt_ids"] * self.targets.with_draft]
            for prefix in self.targets.prefixes:
                columns += [prefix + name for name in SCORES]
            try:
                with open_shard(source.path) as file:
                    table = file.read_row_group(source.index, columns=columns)
                    table = with_added_columns(table, source.path, columns)
            except PARQUET_ERRORS as error:
                raise DataError(
                    f"{source.path}, row group {source.index}: cannot be read ({error}). Check the"
                    " round with `mpd-gen validate`."
                ) from error
            # After a refilter, rejected rows may have records too.
            table = table.filter(pa.array(source.num_loss_tokens > 0))
            self._cache[group] = {name: table.column(name) for name in columns}
        return self._cache[group]


def _shards_of(path: Path) -> list[Path]:
    folder = path if path.name == "distill" else path / "distill"
    files = sorted(folder.glob("part-*.parquet"))
    if not files:
        raise ConfigError(
            f"{path}: no distill shards here (expected {folder}/part-*.parquet). Give --shards the"
            " folder of a round on which mpd-gen rewrite ran."
        )
    return files


def _groups_of(path: Path) -> list[_Group]:
    """Return the row groups of a shard. Raise DataError if it cannot be read, or if a kept row has
    no place for its rewrite."""
    columns = ["row_id", "prompt_id", "status", "loss_start", "num_rewritten_tokens"]
    with open_shard(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    table = read_columns(path, columns)
    kept = pc.equal(table["status"], "ok").fill_null(False).to_numpy()
    loss = table["num_rewritten_tokens"].fill_null(0).to_numpy().astype(np.int64)
    start = table["loss_start"].fill_null(0).to_numpy()
    for row in np.flatnonzero(kept & ((loss < 1) | (start < 1)))[:1]:
        raise DataError(
            f"{path}, row {row}: kept, with {loss[row]} num_rewritten_tokens from loss_start"
            f" {start[row]} on; expected at least 1 of both. Check the round with `mpd-gen"
            " validate`."
        )
    num_tokens = start + loss
    num_loss_tokens = np.where(kept, loss, 0)
    # Each prompt is hashed once for each shard: its samples are mostly next to each other.
    prompts = table["prompt_id"].combine_chunks().dictionary_encode()
    places = np.array([_place(prompt) for prompt in prompts.dictionary.to_pylist()])
    place = places[prompts.indices.to_numpy()]
    # The first 8 of a key's 16 bytes as a number.
    key_bytes = pack_keys(path, "row_id", table["row_id"]).tobytes()
    key = np.frombuffer(key_bytes, ">u8")[::2].astype(np.uint64)
    ends = np.cumsum(sizes)
    return [
        _Group(path, index, key[rows], num_tokens[rows], num_loss_tokens[rows], place[rows])
        for index, rows in enumerate(map(slice, ends - sizes, ends))
    ]


def _place(prompt_id: str) -> float:
    """Return a prompt's place in [0, 1), the same for every run and seed."""
    digest = hashlib.sha256(prompt_id.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2.0**48
