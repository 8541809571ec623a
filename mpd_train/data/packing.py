"""Pack rows into sequences of one length."""

import bisect
import itertools
import math

import numpy as np
import numpy.typing as npt

from mpd_data.common.errors import ConfigError
from mpd_train.config import TrainConfig
from mpd_train.data.shard_set import WINDOW_TOKENS, Pack, ShardSet, _Group


def split_packs(shards: ShardSet, config: TrainConfig) -> tuple[list[Pack], list[Pack]]:
    """Return the packs to train on, of all epochs, and those of the held-out prompts.

    All samples of a prompt are on one side. Raise ConfigError if a side is empty.
    """
    length, fraction = config.pack_length, config.validation.validation_fraction
    wanted = config.max_steps and config.max_steps * config.gradient_accumulation_steps
    packs: list[Pack] = []
    for epoch in itertools.count():
        part = config.epochs - epoch if wanted is None else float(len(packs) < wanted)
        if part <= 0:
            break
        more = make_packs(shards, length, config.seed, epoch, (fraction, 1.0))
        if not more:
            break
        # Rounded first: 0.3 of ten packs are 3.0000000000000004.
        packs += more[: math.ceil(round(part * len(more), 6))]
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
    shards: ShardSet, pack_length: int, seed: int, epoch: int,
    places: tuple[float, float] = (0.0, 1.0),
) -> list[Pack]:  # fmt: skip
    """Return the packs of one epoch: at most `pack_length` tokens each, every kept row whose
    prompt's place is in `places` (from, below) in exactly one.

    Best-fit decreasing inside a window of shuffled row groups, whose packs are then shuffled; the
    rows of a window's emptiest pack move to the next window. Raise ConfigError naming a row that is
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
        # Shuffled inside the window only, so that a pack's row groups are still in memory.
        packs += [made[i] for i in rng.permutation(len(made))]
    return packs


def _windows(groups: list[_Group], order: npt.NDArray[np.int64]) -> list[list[int]]:
    """Split the row groups, in `order`, into windows of at most `WINDOW_TOKENS` kept tokens."""
    windows: list[list[int]] = [[]]
    tokens = 0
    for group in map(int, order):
        if windows[-1] and tokens + groups[group].kept_tokens > WINDOW_TOKENS:
            windows.append([])
            tokens = 0
        windows[-1].append(group)
        tokens += groups[group].kept_tokens
    return windows


def _rows(
    groups: list[_Group], window: list[int], places: tuple[float, float]
) -> list[tuple[int, int]]:
    """Return the kept rows of a window's groups with a place in `places`, sorted by key."""
    kept_rows = [
        np.flatnonzero(
            (groups[g].num_loss_tokens > 0)
            & (groups[g].place >= places[0])
            & (groups[g].place < places[1])
        )
        for g in window
    ]
    row = np.concatenate(kept_rows)
    group = np.repeat(window, [len(rows) for rows in kept_rows])
    key = np.concatenate([groups[g].key[rows] for g, rows in zip(window, kept_rows, strict=True)])
    return [(int(group[i]), int(row[i])) for i in np.lexsort((row, group, key))]


def overlong(shards: ShardSet, pack_length: int) -> list[str]:
    """Return `make_packs`' error for every kept row that is longer than a pack."""
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
    """Return best-fit-decreasing bins of indices into `lengths`."""
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
