"""From shards to batches: which rows, in which order, packed how.

The plan is made from the light columns alone (status, lengths): (seed, epoch) gives a
permutation of row groups, windows of them are shuffled and packed, and the packs follow one
another. It is the same for every process and every restart, so progress is one integer, the
next pack. A round that is one window is packed by its rows' keys alone: however its rows came to
lie in the shards, which follows the generation's timing, training is the same. Packed sequences
do not see each other: positions start anew at each, and attention stays inside a run of
consecutive positions.
"""

import bisect
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mpd_data.errors import ConfigError, DataError
from mpd_data.schema import differences
from mpd_data.shards import ROTTEN, RoundDir, open_shard, read_all, read_metadata
from mpd_train.config import TrainConfig
from mpd_train.parallel import Ranks

# Kept tokens of the row groups that are shuffled and packed together: enough for good packing, few
# enough to hold (0.8 GB at K = 64; of two windows there are some).
_WINDOW_TOKENS = 2**21
# Packs read before they are needed.
_PACKS_AHEAD = 2
# Shards trained together must agree in these.
_SAME = (
    "tokenizer",
    "vocab_size",
    "eos_token_id",
    "num_logprobs",
    "score_context",
    "score_temperature",
)


@dataclass(frozen=True)
class Batch:
    """One pack, ready for the model. T tokens of which n are predicted under the loss.

    input_ids, position_ids int64 [1, T]; loss_positions int64 [n]: the state that predicts each
    loss token, one before it; labels int64 [n]: those tokens' ids; topk_ids int64 [n, K],
    topk_logprobs [n, K] and tail_logprobs [n] float32; the teacher_* are the same sequences in the
    context the teacher scored them in.
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

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: x.to(device, non_blocking=True) for name, x in self.__dict__.items()})

    def pinned(self) -> "Batch":
        """In memory from which a GPU reads by itself."""
        return Batch(**{name: x.pin_memory() for name, x in self.__dict__.items()})

    def without_loss(self) -> "Batch":
        """The same sequences with nothing to predict: the loss is a zero that gradients of zero
        come from."""
        per_token = ("loss_positions", "labels", "topk_ids", "topk_logprobs", "tail_logprobs")
        names = (*per_token, "teacher_loss_positions")
        return replace(self, **{name: getattr(self, name)[:0] for name in names})


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

    Raises ConfigError where there are no shards, where they contradict each other (another
    tokenizer, K, score context or temperature) or where no row was kept; DataError for a file
    that is not sound.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.files = [file for path in paths for file in _shards_of(path)]
        self.metadata = read_metadata(self.files[0])
        for file, found in zip(self.files, read_all(read_metadata, self.files), strict=True):
            unlike = differences(
                {name: self.metadata.get(name) for name in _SAME},
                {name: found.get(name) for name in _SAME},
            )
            if unlike:
                raise ConfigError(
                    f"{file} cannot be trained on together with {self.files[0]} (saved: the"
                    " latter, now: the former):\n  " + "\n  ".join(unlike)
                )
        if self.metadata.get("stage") != "distill":
            raise ConfigError(
                f"{self.files[0]}: holds {self.metadata.get('stage')}, expected distill shards."
                " Run mpd-gen rewrite on the round first."
            )
        self.groups = [group for part in read_all(_groups_of, self.files) for group in part]
        self.num_rows = sum(int((g.num_loss_tokens > 0).sum()) for g in self.groups)
        if self.num_rows == 0:
            counts: dict[str, int] = {}
            for file in self.files:
                for status in pq.read_table(file, columns=["status"]).column("status").to_pylist():
                    counts[status] = counts.get(status, 0) + 1
            raise ConfigError(
                f"{', '.join(map(str, paths))}: no kept rewrite to train on; rows by status:"
                f" {counts}. See `mpd-gen stats`."
            )
        self._cache: dict[int, dict[str, pa.ChunkedArray]] = {}

    def identity(self) -> list[str]:
        """What these shards are (their hashes), for a checkpoint that must resume on the same."""
        manifests = {
            path: {shard.name: shard.sha256 for shard in RoundDir(path).manifest("distill")}
            for path in {file.parent.parent for file in self.files}
        }
        return [_committed_hash(file, manifests[file.parent.parent]) for file in self.files]

    def lengths(self) -> list[int]:
        """Tokens of each kept row, prompt and rewrite."""
        return [int(n) for g in self.groups for n in g.num_tokens[g.num_loss_tokens > 0]]

    def lengths_of(self, packs: list[Pack]) -> list[int]:
        """Tokens of each row in these packs."""
        return [int(self.groups[g].num_tokens[r]) for pack in packs for g, r in pack.rows]

    def load(self, group: int) -> dict[str, pa.ChunkedArray]:
        """The training columns of a row group's kept rows; two windows' worth of groups is
        held."""
        if group not in self._cache:
            source = self.groups[group]
            held = source.kept_tokens + sum(self.groups[g].kept_tokens for g in self._cache)
            while self._cache and held > 2 * _WINDOW_TOKENS:
                first = next(iter(self._cache))
                held -= self.groups[first].kept_tokens
                del self._cache[first]
            columns = [
                "input_ids", "loss_start", "teacher_prompt_ids",
                "topk_ids", "topk_logprobs", "tail_logprobs",
            ]  # fmt: skip
            try:
                with open_shard(source.path) as file:
                    table = file.read_row_group(source.index, columns=columns)
            except ROTTEN as error:
                raise DataError(
                    f"{source.path}, row group {source.index}: cannot be read ({error}). Check the"
                    " round with `mpd-gen validate`."
                ) from error
            # Rejected rows may have their records too, after a refilter.
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


def _committed_hash(path: Path, manifest: dict[str, str]) -> str:
    """sha256 of a shard, from its round's manifest (name -> sha256)."""
    if path.name in manifest:
        return manifest[path.name]
    raise ConfigError(
        f"{path}: not in its round's manifest. Was it copied alone? Copy the whole round, or run"
        " mpd-gen rewrite on it, which indexes it."
    )


def _groups_of(path: Path) -> list[_Group]:
    """The row groups of a shard. Raises DataError where it cannot be read."""
    columns = ["row_id", "prompt_id", "status", "loss_start", "num_rewritten_tokens"]
    try:
        with open_shard(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            table = file.read(columns=columns, use_threads=False)
    except ROTTEN as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    kept = pc.equal(table["status"], "ok").to_numpy()
    loss = table["num_rewritten_tokens"].fill_null(0).to_numpy().astype(np.int64)
    num_tokens = table["loss_start"].fill_null(0).to_numpy() + loss
    num_loss_tokens = np.where(kept, loss, 0)
    # The samples of a prompt lie side by side, mostly: each prompt is hashed once a shard.
    prompts = table["prompt_id"].combine_chunks().dictionary_encode()
    places = np.array([_place(prompt) for prompt in prompts.dictionary.to_pylist()])
    place = places[prompts.indices.to_numpy()]
    key = _keys(table["row_id"].combine_chunks())
    ends = np.cumsum(sizes)
    return [
        _Group(path, index, key[rows], num_tokens[rows], num_loss_tokens[rows], place[rows])
        for index, rows in enumerate(map(slice, ends - sizes, ends))
    ]


def _keys(row_ids: pa.StringArray) -> npt.NDArray[np.uint64]:
    """The first 16 hexadecimal digits of each id as a number."""
    digits = np.array(row_ids.to_pylist(), dtype="S16").view(np.uint8).reshape(-1, 16)
    # "0" … "9" are 0x30 …, "a" … "f" 0x61 ….
    values = ((digits & 15) + 9 * (digits >> 6)).astype(np.uint64)
    powers = np.uint64(16) ** np.arange(15, -1, -1, dtype=np.uint64)
    keys: npt.NDArray[np.uint64] = (values * powers).sum(axis=1, dtype=np.uint64)
    return keys


def _place(prompt_id: str) -> float:
    """A prompt's place in [0, 1): its own in every run, whatever the seed."""
    digest = hashlib.sha256(prompt_id.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2.0**48


def split_packs(shards: ShardSet, config: TrainConfig) -> tuple[list[Pack], list[Pack]]:
    """The packs to train on, epoch after epoch, and those of the held-out prompts.

    All samples of a prompt are on one side. Raises ConfigError where a side is left empty.
    """
    length, fraction = config.pack_length, config.validation.validation_fraction
    wanted = config.max_steps and config.max_steps * config.gradient_accumulation_steps
    packs: list[Pack] = []
    for epoch in itertools.count():
        if epoch == config.epochs if wanted is None else len(packs) >= wanted:
            break
        more = make_packs(shards, length, config.seed, epoch, (fraction, 1.0))
        if not more:
            break
        packs += more
    packs = packs[:wanted]
    held_out = make_packs(shards, length, 0, 0, (0.0, fraction)) if fraction > 0 else []
    if not packs or (fraction > 0 and not held_out):
        side = "validate" if packs else "train"
        raise ConfigError(
            f"--validation-fraction {fraction}: no kept row left to {side} on, of"
            f" {shards.num_rows}. Change it, or give more shards."
        )
    return packs, held_out


def make_packs(
    shards: ShardSet,
    pack_length: int,
    seed: int,
    epoch: int,
    places: tuple[float, float] = (0.0, 1.0),
) -> list[Pack]:
    """The packs of one epoch: at most `pack_length` tokens each, every kept row whose prompt's
    place is in `places` (from, below) in exactly one.

    Best-fit decreasing inside a window of shuffled row groups, whose packs are then shuffled; the
    rows of a window's emptiest pack go on to the next. Raises ConfigError naming a row that is
    longer than a pack.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(shards.groups))
    windows = _windows(shards.groups, order)
    packs: list[Pack] = []
    left: tuple[tuple[int, int], ...] = ()
    for number, window in enumerate(windows):
        rng = np.random.default_rng([seed, epoch, number])
        rows = [*left, *_rows(shards.groups, window, places)]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        lengths = [int(shards.groups[g].num_tokens[r]) for g, r in rows]
        loss_lengths = [int(shards.groups[g].num_loss_tokens[r]) for g, r in rows]
        for (group, row), length in zip(rows, lengths, strict=True):
            if length > pack_length:
                raise ConfigError(_too_long(shards.groups[group], row, pack_length))
        made = [
            Pack(
                tuple(rows[i] for i in members),
                sum(lengths[i] for i in members),
                sum(loss_lengths[i] for i in members),
            )
            for members in _best_fit(lengths, pack_length)
        ]
        if made and number < len(windows) - 1:
            emptiest = min(range(len(made)), key=lambda i: made[i].num_tokens)
            left = made.pop(emptiest).rows
        # Inside the window only: the row groups that a pack draws on are then still in memory.
        packs += [made[i] for i in rng.permutation(len(made))]
    return packs


def _windows(groups: list[_Group], order: npt.NDArray[np.int64]) -> list[list[int]]:
    """Row groups in `order`, as many together as have `_WINDOW_TOKENS` kept tokens."""
    windows: list[list[int]] = [[]]
    tokens = 0
    for group in map(int, order):
        if windows[-1] and tokens + groups[group].kept_tokens > _WINDOW_TOKENS:
            windows.append([])
            tokens = 0
        windows[-1].append(group)
        tokens += groups[group].kept_tokens
    return windows


def _rows(
    groups: list[_Group], window: list[int], places: tuple[float, float]
) -> list[tuple[int, int]]:
    """The kept rows of a window's groups with a place in `places`, in the order of their keys."""
    found = [
        np.flatnonzero(
            (groups[g].num_loss_tokens > 0)
            & (groups[g].place >= places[0])
            & (groups[g].place < places[1])
        )
        for g in window
    ]
    row = np.concatenate(found)
    group = np.repeat(window, [len(rows) for rows in found])
    key = np.concatenate([groups[g].key[rows] for g, rows in zip(window, found, strict=True)])
    return [(int(group[i]), int(row[i])) for i in np.lexsort((row, group, key))]


def overlong(shards: ShardSet, pack_length: int) -> list[str]:
    """Why `make_packs` would refuse, for every kept row that is longer than a pack."""
    return [
        _too_long(group, int(row), pack_length)
        for group in shards.groups
        for row in np.flatnonzero((group.num_loss_tokens > 0) & (group.num_tokens > pack_length))
    ]


def _too_long(group: _Group, row: int, pack_length: int) -> str:
    return (
        f"{group.path}, row {row} of row group {group.index}: {int(group.num_tokens[row])} tokens"
        f" do not fit --pack-length {pack_length}. Raise it; nothing is cut off here."
    )


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bins of indices into `lengths`."""
    bins: list[list[int]] = []
    # (room left, bin), sorted: the tightest bin that still fits is found by bisection.
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[index], -1))
        if at == len(room):
            bins.append([index])
            bisect.insort(room, (capacity - lengths[index], len(bins) - 1))
        else:
            left, chosen = room.pop(at)
            bins[chosen].append(index)
            bisect.insort(room, (left - lengths[index], chosen))
    return bins


class Loader:
    """Reads packs in a thread of its own, ahead of the training. All reading of a ShardSet has to
    go through one Loader: its cache is not made for two threads."""

    def __init__(self, shards: ShardSet, device: torch.device) -> None:
        self.device = device
        self._shards = shards
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mpd-loader")

    def batches(self, steps: Iterable[list[Pack]], ranks: Ranks) -> Iterator[Batch]:
        """This process's batches of each step, in their order, on the device. All processes have
        as many: one that has no pack left gets one of the others' without its loss, because all
        have to join in each pass through a sharded model. Raises what `load_pack` raises."""
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
    """Reads a pack's rows and lays them out as one batch."""
    k = shards.metadata["num_logprobs"]
    ids: list[npt.NDArray[np.int32]] = []
    teacher_ids: list[npt.NDArray[np.int32]] = []
    loss_positions, teacher_positions, labels = [], [], []
    topk_ids, topk_logprobs, tails = [], [], []
    start, teacher_start = 0, 0
    for group, row in pack.rows:
        kept_before = int(np.count_nonzero(shards.groups[group].num_loss_tokens[:row]))
        columns = {name: column[kept_before] for name, column in shards.load(group).items()}
        values = {
            name: scalar.values.to_numpy(zero_copy_only=False)
            for name, scalar in columns.items()
            if name != "loss_start" and scalar.is_valid
        }
        sequence = values["input_ids"]
        first = int(columns["loss_start"].as_py())
        num_loss = len(sequence) - first
        if len(values["topk_ids"]) != num_loss * k or len(values["tail_logprobs"]) != num_loss:
            source = shards.groups[group]
            raise DataError(
                f"{source.path}, row {row} of row group {source.index}: {num_loss} loss tokens but"
                f" {len(values['topk_ids'])} top-{k} ids and {len(values['tail_logprobs'])} tails."
                " Check the round with `mpd-gen validate`."
            )
        context = values.get("teacher_prompt_ids", sequence[:first])
        ids.append(sequence)
        labels.append(sequence[first:])
        teacher_ids.append(np.concatenate([context, sequence[first:]]))
        # The state at position i predicts the token at i + 1.
        loss_positions.append(start + np.arange(first, len(sequence)) - 1)
        teacher_positions.append(teacher_start + len(context) + np.arange(num_loss) - 1)
        topk_ids.append(values["topk_ids"].reshape(num_loss, k))
        topk_logprobs.append(values["topk_logprobs"].reshape(num_loss, k))
        tails.append(values["tail_logprobs"])
        start += len(sequence)
        teacher_start += len(teacher_ids[-1])

    return Batch(
        input_ids=_int64(np.concatenate(ids))[None],
        position_ids=_int64(np.concatenate([np.arange(len(s)) for s in ids]))[None],
        loss_positions=_int64(np.concatenate(loss_positions)),
        labels=_int64(np.concatenate(labels)),
        topk_ids=_int64(np.concatenate(topk_ids)),
        topk_logprobs=torch.from_numpy(np.concatenate(topk_logprobs).astype(np.float32)),
        tail_logprobs=torch.from_numpy(np.concatenate(tails).astype(np.float32)),
        teacher_input_ids=_int64(np.concatenate(teacher_ids))[None],
        teacher_position_ids=_int64(np.concatenate([np.arange(len(s)) for s in teacher_ids]))[None],
        teacher_loss_positions=_int64(np.concatenate(teacher_positions)),
    )


def _int64(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
