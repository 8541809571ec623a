"""The rows of rounds that are too large for one page. What filters and sorts is in memory, some 60
bytes a row. Texts and scores stay in the shards: they are read for the rows that are shown, and a
search scans them.

A row has the values that it has in a page of one file (rows.py), so that both show the same.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from mpd_data.common.errors import ConfigError, DataError, did_you_mean
from mpd_data.inspect.stats import collect, scan_round, scan_shards
from mpd_data.inspect.view.rows import (
    DISTILL,
    ROLLOUT,
    SCORED,
    Divergences,
    draft_row,
    metadata_of,
    rewrite_row,
    spell,
    spelling_of,
    tokens_of,
)
from mpd_data.prompts.special import Spelling
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import STATUSES, Stage
from mpd_data.store.shards import read_all, read_metadata, read_rows

# Rows of a list. Each of their problems is in another shard.
_LINES = 100
# Of a key of the metadata by which rows can be chosen; as in page.js.
_MOST_VALUES = 60
# Letters of a problem in a list.
_MOST_TEXT = 200
# Shards that are scanned together. Between them a search looks whether it is still wanted.
_TOGETHER = 32
# Of the latest choices of filters the rows are remembered: 4 bytes for each.
_REMEMBERED = 8
_STATUSES = pl.Enum([*STATUSES, "draft"])
# The names are those of page.js.
_VERDICTS = {
    "kept": pl.col("o") & pl.col("k"),
    "broke": pl.col("o") & ~pl.col("k"),
    "mended": ~pl.col("o") & pl.col("k"),
    "both": ~pl.col("o") & ~pl.col("k"),
    "right": pl.col("o"),
    "wrong": ~pl.col("o"),
    "unknown": ~pl.col("g").fill_null(False),
}
_STORED = {
    "ratio": "compression_ratio", "overlap": "draft_overlap", "repetition": "repetition",
    "support": "answer_support", "step": "weakest_step", "pass": "pass_rate",
}  # fmt: skip
_MEASURES = {
    "ratio": pl.col("ratio"),
    "saved": pl.col("n") - pl.col("t"),
    "rewrite": pl.col("t"),
    "draft": pl.col("n"),
    **{name: pl.col(name).cast(pl.Float64).round(3) for name in (*_STORED, "kl")},
}


def _finite(column: str) -> pl.Expr:
    return pl.when(pl.col(column).is_finite()).then(pl.col(column))


# What is in memory of a draft and of a rewrite. `g`: whether there is a gold answer.
_OF_DRAFTS = {
    "o": pl.col("is_correct"),
    "g": pl.col("gold_answer").is_not_null(),
    "n": pl.col("num_completion_tokens"),
    "repetition": _finite("repetition"),
}
_OF_REWRITES = {
    "s": pl.col("status").cast(_STATUSES),
    "k": pl.col("is_correct"),
    "n": pl.col("num_original_tokens"),
    "t": pl.col("num_rewritten_tokens"),
    **{name: _finite(column) for name, column in _STORED.items()},
}


# Is called now and then, and raises where an answer is not wanted any more.
GoOn = Callable[[], object]
_T = TypeVar("_T")
_NO_ROWS = pl.DataFrame(
    schema={"k": pl.Boolean, "t": pl.Int32, **dict.fromkeys([*_STORED, "kl"], pl.Float32)}
)


class _Codes:
    """The metadata's values as numbers from 1 on, by key and value; 0 stands for no value."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, int]] = {}

    def read(self, texts: pl.Series) -> dict[str, npt.NDArray[np.uint8]]:
        """Return a column of numbers for each key in the metadata of some rows."""
        each = texts.drop_nulls().unique()
        found: dict[str, npt.NDArray[np.uint8]] = {}
        for at, text in enumerate(each):
            for name, value in metadata_of({"metadata": text}).items():
                codes = self.known.setdefault(name, {})
                if len(codes) <= _MOST_VALUES:
                    codes.setdefault(_as_in_javascript(value), len(codes) + 1)
                column = found.setdefault(name, np.zeros(len(each) + 1, np.uint8))
                column[at] = codes.get(_as_in_javascript(value), 0)
        indices = texts.replace_strict(
            each, range(len(each)), default=len(each), return_dtype=pl.UInt32
        ).to_numpy()
        return {self.column(name): column[indices] for name, column in found.items()}

    def column(self, name: str) -> str:
        """Return the name of a key's column: its own may be none that Polars can take."""
        return f"meta:{list(self.known).index(name)}"


def _as_in_javascript(value: str | int | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


class _Shards:
    """The rows of one stage of a round, numbered through its shards."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        scan_round(folder, stage)  # which raises where a shard is none of ours
        self._stage = stage
        self._paths = RoundDir(folder).shard_paths(stage)
        self._ends: list[int] = []

    def load(
        self, keys: Sequence[str], columns: Mapping[str, pl.Expr], codes: _Codes | None = None
    ) -> pl.DataFrame:
        """Return the `columns` of all rows, their `keys` as two numbers each, and their metadata's
        `codes`."""
        halves = {
            f"{key}_{half}": pl.col(key)
            .str.slice(16 * half, 16)
            .str.to_integer(base=16, dtype=pl.UInt64)
            for key in keys
            for half in (0, 1)
        }
        more = ["path", "metadata"] if codes else ["path"]
        parts, lengths = list[pl.DataFrame](), dict[str, int]()
        for rows in self._groups("path"):
            part = collect(rows.select(*more, **columns, **halves))
            lengths |= part.group_by("path").len().iter_rows()
            if codes:
                part = part.with_columns(**codes.read(part["metadata"]))
            parts.append(part.drop(more))
        self._ends = list(itertools.accumulate(lengths.get(str(path), 0) for path in self._paths))
        return pl.concat(parts, how="diagonal", rechunk=True)

    def read(self, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows with these `numbers`, in their order."""
        wanted: dict[Path, dict[int, int]] = {}
        for number in numbers:
            at = bisect.bisect_right(self._ends, number)
            first = self._ends[at - 1] if at else 0
            wanted.setdefault(self._paths[at], {})[number] = number - first

        def read(path: Path) -> list[dict[str, Any]]:
            return read_rows(path, list(wanted[path].values()), list(columns))

        found: dict[int, dict[str, Any]] = {}
        for places, rows in zip(wanted.values(), read_all(read, wanted), strict=True):
            found |= zip(places, rows, strict=True)
        return [found[number] for number in numbers]

    def holding(self, words: str, columns: Sequence[str], go_on: GoOn) -> pl.Series:
        """Return for each row whether a text of it holds `words`, which are in small letters."""
        texts = (pl.col(name).str.to_lowercase() for name in columns)
        holds = pl.any_horizontal(text.str.contains(words, literal=True) for text in texts)
        found = []
        for rows in self._groups():
            go_on()
            found.append(collect(rows.select(holds.fill_null(False).alias("holds")))["holds"])
        return pl.concat(found)

    def _groups(self, path_column: str | None = None) -> Iterator[pl.LazyFrame]:
        for first in range(0, len(self._paths), _TOGETHER):
            yield scan_shards(self._paths[first : first + _TOGETHER], self._stage, path_column)


class _Round:
    """A round: `frame` has its rows by their keys, rewrites, or drafts where it has no rewrites."""

    def __init__(self, folder: Path, codes: _Codes, trained: Divergences) -> None:
        self._drafts = _Shards(folder, "rollouts")
        self._rewrites: _Shards | None = None
        self._spelling: Spelling | None = None
        self._folder, self.note, self._trained = folder, "", trained
        self.limits: dict[str, Any] = {}
        drafts = self._drafts.load(["row_id"], _OF_DRAFTS, codes).with_row_index("draft")
        if shards := RoundDir(folder).shard_paths("distill"):
            self.limits = read_metadata(shards[0]).get("filters") or {}
            self._spelling, self.note = spelling_of(folder)
            self._rewrites = _Shards(folder, "distill")
            rows = self._rewrites.load(["row_id", "rollout_id"], _OF_REWRITES)
            if trained:
                keys = pl.Series([int(row, 16) for row in trained], dtype=pl.UInt64)
                kl = pl.DataFrame({"row_id_0": keys, "kl": list(trained.values())})
                rows = rows.join(
                    kl.cast({"kl": pl.Float32}), on="row_id_0", how="left", maintain_order="left"
                )
            rows = rows.with_row_index("number").join(
                drafts.drop("n", "repetition"),
                left_on=["rollout_id_0", "rollout_id_1"],
                right_on=["row_id_0", "row_id_1"],
                how="left",
            )
            self.frame = rows.drop("rollout_id_0", "rollout_id_1").sort("row_id_0", "row_id_1")
        else:
            rows = drafts.with_columns(number="draft", s=pl.lit("draft", _STATUSES))
            self.frame = rows.sort("row_id_0", "row_id_1")

    def problems(self, drafts: Sequence[int]) -> list[str]:
        """Return the problems of drafts."""
        return [row["problem"] for row in self._drafts.read(drafts, ["problem"])]

    def holding(self, words: str, go_on: GoOn) -> pl.Series:
        """Return for each row of `frame` whether its key or a text of it holds `words`."""
        drafts = ["problem", "gold_answer", "completion"]
        if self._rewrites is None:
            found = self._drafts.holding(words, [*drafts, "row_id"], go_on)
            return found.gather(self.frame["number"])
        found = self._drafts.holding(words, drafts, go_on).gather(self.frame["draft"])
        rewrites = self._rewrites.holding(words, ["rewrite", "row_id"], go_on)
        return found.fill_null(False) | rewrites.gather(self.frame["number"])

    def whole(self, key: str, number: int, draft: int | None) -> tuple[dict[str, Any], Any]:
        """Return a row as the page shows it, and the texts of the tokens in it by their ids."""
        found = [] if draft is None else self._drafts.read([draft], ROLLOUT)
        (row,) = found if self._rewrites is None else self._rewrites.read([number], DISTILL)
        if row["row_id"] != key:
            raise DataError(
                f"{self._folder}: row {key} is not where it was: its shards were written anew."
                " Start mpd-gen view again."
            )
        if self._rewrites is None:
            return draft_row(row), {}
        shown = rewrite_row(row, found[0] if found else {}, self._trained)
        pieces: dict[int, str] = {}
        if self._spelling is not None and row["status"] == "ok":
            (scored,) = self._rewrites.read([number], SCORED)
            if scored["topk_ids"]:
                shown["v"] = tokens_of(scored, f"{self._folder}/distill")
                spell(shown["v"], self._spelling, pieces)
        return shown, pieces


class Index:
    """The rows of rounds, those of one after those of another."""

    def __init__(self, folders: Sequence[Path], trained: Divergences) -> None:
        codes = _Codes()
        self._rounds = [_Round(folder, codes, trained) for folder in folders]
        frames = [
            one.frame.with_columns(at=pl.lit(at, pl.UInt16)) for at, one in enumerate(self._rounds)
        ]
        # Of drafts alone there is nothing of rewrites.
        self._frame = pl.concat([*frames, _NO_ROWS], how="diagonal")
        self._codes = codes
        self._remembered: dict[frozenset[tuple[str, str]], pl.Series] = {}
        self.rounds = [
            {"name": str(folder), "total": len(one.frame), "limits": one.limits, "note": one.note}
            for folder, one in zip(folders, self._rounds, strict=True)
        ]

    def facets(self) -> dict[str, Any]:
        """Return what the filters can choose among: see `facets` in page.js."""
        frame = self._frame
        there = frame.select(expr.count().alias(name) for name, expr in _MEASURES.items())
        metadata = []
        for name, codes in self._codes.known.items():
            used = set(frame[self._codes.column(name)].unique())
            values = [value for value, code in codes.items() if code in used]
            metadata.append((name, sorted(values)))
        return {
            "size": len(frame),
            "statuses": frame.group_by("s", maintain_order=True).len().rows(),
            "measures": [name for name, count in there.row(0, named=True).items() if count],
            "metadata": metadata,
        }

    def find(self, given: Mapping[str, str], go_on: GoOn = bool) -> dict[str, Any]:
        """Return the rows of a list, and how many pass the filters: see `find` in page.js. Raise
        ConfigError for filters that there are not."""
        wanted = {name: given[name] for name in given if name not in ("key", "number")}
        choice = frozenset(wanted.items())
        if (passing := self._remembered.get(choice)) is None:
            passing = self._remembered[choice] = self._passing(wanted, go_on)
            if len(self._remembered) > _REMEMBERED:
                self._remembered.pop(next(iter(self._remembered)))
        number = min(max(_number(given.get("number", "0"), int), 0), len(passing))
        if "key" in given:
            places = passing.index_of(self._place(given["key"]))
            number = 0 if places is None else places
        offset = number - number % _LINES
        shown = self._frame[passing[offset : offset + _LINES]]
        if measure := given.get("measure"):
            shown = shown.with_columns(value=_known(_MEASURES, "measure", measure))
        problems: dict[tuple[int, int], str] = {}
        for at, one in enumerate(self._rounds):
            drafts = shown.filter(pl.col("at") == at)["draft"].drop_nulls().to_list()
            problems |= zip(((at, draft) for draft in drafts), one.problems(drafts), strict=True)
        lines = [
            {
                "i": f"{row['row_id_0']:016x}{row['row_id_1']:016x}",
                "f": problems.get((row["at"], row["draft"]), "")[:_MOST_TEXT],
                **{name: row[name] for name in ("at", "s", "n", "t", "value") if name in row},
            }
            for row in shown.to_dicts()
        ]
        return {"total": len(passing), "offset": offset, "rows": lines}

    def whole(self, key: str) -> dict[str, Any]:
        """Return a row with its texts, and those of its tokens. Raise ConfigError where there is
        none with this key."""
        place = self._place(key)
        if place is None:
            raise ConfigError(f"No row has the key {key!r}.")
        row = self._frame.row(place, named=True)
        shown, pieces = self._rounds[row["at"]].whole(key, row["number"], row["draft"])
        return {"row": shown, "pieces": pieces}

    def _place(self, key: str) -> int | None:
        if re.fullmatch("[0-9a-f]{32}", key) is None:
            return None
        is_it = pl.all_horizontal(
            pl.col(f"row_id_{half}") == int(key[16 * half :][:16], 16) for half in (0, 1)
        )
        place: int | None = self._frame.select(is_it.arg_true().first()).item()
        return place

    def _passing(self, asked: dict[str, str], go_on: GoOn) -> pl.Series:
        """Return the places in `_frame` of the rows that pass these filters, in order."""
        measure, down = asked.pop("measure", None), asked.pop("order", None) == "down"
        least, most = (
            _number(asked.pop(name, bound), float)
            for name, bound in (("least", "-inf"), ("most", "inf"))
        )
        tests = [self._test(name, value, go_on) for name, value in asked.items()]
        rows = self._frame.lazy().with_row_index("place")
        if measure is None:
            return rows.filter(*tests).collect()["place"]
        value = _known(_MEASURES, "measure", measure)
        if isfinite(least) or isfinite(most):
            tests.append(value.is_between(least, most))
        rows = rows.filter(*tests).sort(
            value, descending=down, nulls_last=True, maintain_order=True
        )
        return rows.select("place").collect()["place"]

    def _test(self, name: str, value: str, go_on: GoOn) -> pl.Expr:
        """Return whether a row passes the filter `name` with this value."""
        if name == "search":
            words = value.lower()
            return pl.lit(pl.concat([one.holding(words, go_on) for one in self._rounds]))
        if name == "verdict":
            return _known(_VERDICTS, name, value)
        if name == "status":
            return pl.col("s").cast(pl.String).eq(value)
        if name == "at":
            return pl.col("at").cast(pl.String).eq(value)
        key = name.removeprefix("meta:")
        codes = _known(self._codes.known, "filter", key)
        return pl.col(self._codes.column(key)).eq(codes.get(value))


def _known(choices: Mapping[str, _T], what: str, name: str) -> _T:
    if name not in choices:
        raise ConfigError(f"There is no {what} {name!r}.{did_you_mean(name, choices)}")
    return choices[name]


def _number(text: str, kind: Callable[[str], _T]) -> _T:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number.") from None
