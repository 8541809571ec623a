"""What scores with the draft in the context cost: those of a second pass over what is kept, beside
those that come while the rewrites are written.

    PYTHONPATH=. python benchmarks/scoring.py ROUND --teacher MODEL --template FILE

ROUND has rollouts; it is copied, not changed. The engine is started once, outside the figures. Both
ways rewrite the same drafts, in interleaved pairs, and give the same rewrites, or the run ends.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import polars as pl

from mpd_data import rewrite, rewrite_setup
from mpd_data.config import RewriteConfig
from mpd_data.engines.start import start_engine


class Kept:
    """An engine that a stage does not end, and that may score nothing while it generates."""

    def __init__(self, inner: Any, second_pass: bool) -> None:
        self.inner, self.second_pass = inner, second_pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def submit_generate(self, *request: Any, k: int = 0, **more: Any) -> None:
        self.inner.submit_generate(*request, k=0 if self.second_pass else k, **more)

    def close(self) -> None:
        pass


def largest_difference(one: pl.DataFrame, other: pl.DataFrame) -> float:
    """The largest difference of log-probabilities of tokens that both have among the top K, where
    it counts: of probabilities above 1%."""
    largest = 0.0
    for a, b in zip(one.iter_rows(named=True), other.iter_rows(named=True), strict=True):
        n = len(a["tail_logprobs"])
        for ids, logprobs, others, theirs in zip(
            *(np.reshape(x[c], (n, -1)) for x in (a, b) for c in ("topk_ids", "topk_logprobs")),
            strict=True,
        ):
            known = dict(zip(others, theirs, strict=True))
            pairs = [(p, known[i]) for i, p in zip(ids, logprobs, strict=True) if i in known]
            largest = max([largest, *(abs(p - q) for p, q in pairs if p > np.log(0.01))])
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("round", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--template", required=True)
    parser.add_argument("--limit", type=int, help="drafts to rewrite")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--drafts", default="any", help="as of mpd-gen rewrite")
    parser.add_argument("--max-tokens", type=int, default=400)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "round"
        shutil.copytree(given.round, out)
        config = RewriteConfig(
            teacher=given.teacher, shards=out, template=given.template, score_context="rewrite",
            sampling={"max_tokens": given.max_tokens}, filters={"drafts": given.drafts},
            engine={"dtype": given.dtype, "max_num_seqs": 32},
        )  # fmt: skip
        prepared = rewrite_setup.setup(config)
        took: dict[bool, list[float]] = {False: [], True: []}
        rows: dict[bool, pl.DataFrame] = {}
        with contextlib.closing(
            start_engine(prepared.teacher, config.engine, max_logprobs=prepared.engine_k)
        ) as engine:
            for second_pass in (True, False) * given.pairs:
                used = Kept(engine, second_pass)
                begun = time.perf_counter()
                rewrite.distill(
                    rewrite_setup.setup(config), overwrite=True, limit=given.limit,
                    start=lambda *_, used=used, **__: used,
                )  # fmt: skip
                took[second_pass].append(time.perf_counter() - begun)
                table = pl.read_parquet(out / "distill" / "*.parquet").sort("row_id")
                rows[second_pass] = table
            columns = ["row_id", "rewrite", "status"]
            assert rows[True].select(columns).equals(rows[False].select(columns)), "other rewrites"
    kept = [table.filter(pl.col("status") == "ok") for table in (rows[True], rows[False])]
    two, one = (statistics.median(took[second_pass]) for second_pass in (True, False))
    ratio = statistics.median(a / b for a, b in zip(took[True], took[False], strict=True))
    print(
        f"{len(rows[True])} rewrites, {len(kept[0])} kept; in a second pass {two:.1f} s, while"
        f" writing {one:.1f} s: **{ratio:.2f} times as fast**. Largest difference of"
        f" log-probabilities above log 1%: {largest_difference(*kept):.2g}"
    )


if __name__ == "__main__":
    main()
