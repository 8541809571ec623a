"""Packs: which rows go together, in which order."""

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, train_config

from mpd_data.common.errors import ConfigError
from mpd_data.inspect.stats import round_stats
from mpd_data.store.round import RoundDir
from mpd_data.store.writer import ShardWriter
from mpd_train.data.batches import load_pack
from mpd_train.data.packing import make_packs, split_packs
from mpd_train.data.shard_set import WINDOW_TOKENS, ShardSet


@pytest.fixture(scope="module")
def shards(round_dir):
    return ShardSet([round_dir])


@pytest.mark.parametrize("pack_length", [512, 2000])
def test_every_kept_row_is_in_exactly_one_pack(shards, round_dir, pack_length):
    packs = make_packs(shards, pack_length, seed=3, epoch=1)
    rows = [row for pack in packs for row in pack.rows]
    assert len(rows) == len(set(rows)) == shards.num_rows
    kept = pl.scan_parquet(round_dir / "distill" / "*.parquet").filter(pl.col("status") == "ok")
    assert shards.num_rows == kept.select(pl.len()).collect().item()
    assert (
        sum(p.num_loss_tokens for p in packs)
        == kept.select(pl.col("num_rewritten_tokens").sum()).collect().item()
    )
    assert max(p.num_tokens for p in packs) <= pack_length


def test_packs_follow_from_seed_and_epoch(shards, round_dir):
    again = ShardSet([round_dir])
    assert make_packs(shards, 512, 0, 0) == make_packs(again, 512, 0, 0)
    assert make_packs(shards, 512, 0, 0) != make_packs(shards, 512, 0, 1)
    assert make_packs(shards, 512, 0, 0) != make_packs(shards, 512, 1, 0)


def test_packs_do_not_depend_on_how_rows_lie_in_the_shards(shards, round_dir, tmp_path):
    """Which row is committed when follows the generation's timing; training must not."""
    rows = [row for file in shards.files for row in pq.read_table(file).to_pylist()]
    metadata = {k: v for k, v in shards.metadata.items() if k not in ("schema_version", "stage")}
    other = RoundDir(tmp_path / "round1")
    with other.lock(), ShardWriter(other, "distill", metadata) as writer:
        for number, row in enumerate(reversed(rows)):
            writer.add(row)
            if number % 50 == 49:
                writer.commit()
    again = ShardSet([other.path])
    assert len(again.files) > len(shards.files)

    def texts(source):
        packs = make_packs(source, 512, 3, 1)
        return [load_pack(source, pack).input_ids.tolist() for pack in packs]

    assert texts(again) == texts(shards)


def test_packs_of_long_tailed_lengths_are_full(shards, monkeypatch):
    """Log-normal lengths as traces have them, in windows; no data is read for it."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(7.3, 0.8, 20_000)), 12_000).astype(np.int64)
    groups = [
        replace(
            shards.groups[0],
            key=rng.integers(0, 2**63, 50).astype(np.uint64),
            num_tokens=part,
            num_loss_tokens=part - 100,
            place=rng.random(50),
        )
        for part in np.split(np.maximum(lengths, 120), 400)
    ]
    monkeypatch.setattr(shards, "groups", groups)
    packs = make_packs(shards, 12_288, 0, 0)
    assert sorted(row for pack in packs for row in pack.rows) == [
        (g, r) for g in range(400) for r in range(50)
    ]
    assert sum(g.kept_tokens for g in groups) > 10 * WINDOW_TOKENS
    assert sum(p.num_tokens for p in packs) / (len(packs) * 12_288) > 0.97
    assert all(p.num_tokens <= 12_288 for p in packs)


def test_a_part_of_an_epoch_has_no_pack_more(shards, round_dir, tmp_path):
    """1.3 - 1 is a little more than 0.3."""
    total = len(make_packs(shards, 256, 0, 0))
    extra = next(k for k in range(1, total) if (1 + k / total - 1) * total > k)
    settings = {"epochs": 1 + extra / total, "pack_length": 256}
    packs, _ = split_packs(shards, train_config(round_dir, STUDENT, tmp_path, **settings))
    assert len(packs) == total + extra


def test_a_round_is_given_once(round_dir, tmp_path):
    (tmp_path / "link").symlink_to(round_dir)
    for again in (round_dir, round_dir / "distill", tmp_path / "link"):
        with pytest.raises(ConfigError, match=f"{again}: the same round as {round_dir}; .* once"):
            ShardSet([round_dir, again])
    with pytest.raises(ConfigError, match="the same round"):
        round_stats([round_dir, round_dir])


def test_a_row_that_does_not_fit_is_refused(shards):
    with pytest.raises(ConfigError, match="do not fit --pack-length 20"):
        make_packs(shards, 20, 0, 0)
