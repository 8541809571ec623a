"""`mpd-gen validate`: check every shard and row of a round. Nothing is changed."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.files import sha256_of
from mpd_data.common.machine import usable_cores
from mpd_data.store.keys import KeySet, Packed, pack, twice
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind
from mpd_data.store.schema import (
    ENUMS,
    SCHEMAS,
    SCORES,
    SHARED_METADATA,
    STAGES,
    UNUSABLE,
    WITH_DRAFT,
    Stage,
)
from mpd_data.store.shards import (
    PARQUET_ERRORS,
    Shard,
    line_of,
    metadata_of,
    open_shard,
    tokens_of,
    with_added_columns,
)

# float16 rounding lets the stored probabilities sum to slightly more than 1.
_MASS_SLACK = 5e-3
# Rows are read and checked together up to this size: numpy and Arrow take as long to begin with a
# column as they take for a thousand numbers.
_BYTES_AT_ONCE = 64 << 20
_SHARDS_AT_ONCE = 16


def validate_round(path: Path) -> list[str]:
    """Return every breach of the contract, a line each: file, row, expected, found. Empty if the
    round is sound.

    Memory: some ten times _BYTES_AT_ONCE for each core, and for each row of the round two keys and
    a hash. Raise ConfigError if `path` holds no round.
    """
    require_kind(path, "round")
    round_dir = RoundDir(path)
    stages = [stage for stage in STAGES if round_dir.folder(stage).is_dir()]
    if not stages:
        raise ConfigError(f"{path}: not a round; expected rollouts/ or distill/ in it.")
    problems: list[str] = []
    rollouts: _Prompts | None = None
    for stage in stages:
        files = sorted(round_dir.folder(stage).iterdir())
        shards = [file for file in files if file.match("part-*.parquet")]
        of_manifest = _Manifest(round_dir, stage)
        of_shards = [
            f"{file}: a shard folder may hold only part-*.parquet; move this file out."
            for file in files
            if not file.match("part-*.parquet")
        ]
        first: dict[str, Any] | None = None
        keys: list[_Keys] = []
        places: list[_Keys] = []
        prompts: list[tuple[Packed, _Hashes]] = []
        for file, look in zip(shards, _look_at(shards, stage, rollouts), strict=True):
            of_manifest.compare(file, look)
            if look.metadata is not None:
                first = first or look.metadata
                of_shards += [
                    f"{file}: {name} is {look.metadata.get(name)!r}, another shard here has"
                    f" {first.get(name)!r}."
                    for name in (*SHARED_METADATA, "template")
                    if look.metadata.get(name) != first.get(name)
                ]
            of_shards += look.problems
            keys += look.keys
            places += look.places
            prompts += look.prompts
        problems += of_manifest.problems() + of_shards
        problems += _doubled(keys, "its key") or _doubled(places, _PLACES.get(stage, ("",))[-1])
        if prompts:
            rollouts = _Prompts(prompts)
    return problems


# The keys of some rows of a shard: the file, the index of the first row, the keys.
_Keys = tuple[Path, int, Packed]
# A hash of each row's prompt ids.
_Hashes = npt.NDArray[np.uint64]


@dataclass
class _Look:
    """What one shard holds. `sha256`: None where it is no file. `metadata` and `line`, which is the
    manifest's: None where the shard is damaged or not by the contract. `places`: what its rows are
    of. `prompts`: keys of rollouts, and a hash of the prompt of each."""

    sha256: str | None = None
    tokens: int = 0
    line: Shard | None = None
    metadata: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    keys: list[_Keys] = field(default_factory=list)
    places: list[_Keys] = field(default_factory=list)
    prompts: list[tuple[Packed, _Hashes]] = field(default_factory=list)

    def add(self, rows: "_Rows", found: "_Found", start: int) -> None:
        """Add keys, places and prompts of `rows`, which begin at `start` in `found`."""
        own = slice(start, start + rows.count)
        if found.keys is not None:
            self.keys.append((rows.file, rows.first, found.keys[own]))
            if found.prompts is not None:
                self.prompts.append((found.keys[own], found.prompts[own]))
        if found.places is not None:
            self.places.append((rows.file, rows.first, found.places[own]))


@dataclass
class _Found:
    """What some rows are: their keys, None where these are no keys; hashes of their prompts; what
    they are of."""

    keys: Packed | None
    prompts: _Hashes | None = None
    places: Packed | None = None


def _look_at(shards: list[Path], stage: Stage, rollouts: "_Prompts | None") -> Iterator[_Look]:
    """Yield a look at each shard, in order. Each core reads a group of them at a time."""
    cores = usable_cores()
    size = min(-(-len(shards) // cores), _SHARDS_AT_ONCE)
    some = [shards[start : start + size] for start in range(0, len(shards), size or 1)]
    with ThreadPoolExecutor(cores) as pool:
        for looks in pool.map(lambda files: _look(files, stage, rollouts), some):
            yield from looks


def _look(files: list[Path], stage: Stage, rollouts: "_Prompts | None") -> list[_Look]:
    looks: list[_Look] = []
    unread: list[tuple[_Look, str]] = []
    rows = _Gathered(stage, rollouts)
    for file in files:
        look = _Look()
        looks.append(look)
        if file.is_file():
            look.sha256 = sha256_of(file)
        try:
            with open_shard(file) as shard:
                metadata = metadata_of(file, shard)
                if _follows(shard.schema_arrow, SCHEMAS[stage]):
                    look.metadata = metadata
                    for piece in _pieces(file, shard, stage):
                        look.tokens += tokens_of(piece.table, stage)
                        rows.add(piece, metadata, look)
                    look.line = line_of(file, shard.metadata, look.tokens, look.sha256 or "")
                else:
                    problem = f"{file}: its columns or types are not those of the contract."
                    unread.append((look, problem))
        except DataError as error:
            unread.append((look, f"{file}: cannot be read: {error}"))
    rows.check()
    for look, problem in unread:
        look.problems.append(problem)
    return looks


def _follows(found: pa.Schema, contract: pa.Schema) -> bool:
    """Return whether a shard has the contract's columns, but for nullable ones that are newer."""
    if found.equals(contract):
        return True
    expected = [f for f in contract if f.name in found.names or not f.nullable]
    return bool(found.remove_metadata().equals(pa.schema(expected)))


class _Manifest:
    """Compares the lines of a manifest with the shards."""

    def __init__(self, round_dir: RoundDir, stage: Stage) -> None:
        self._path = round_dir.manifest_path(stage)
        self._missing: dict[str, Shard] = {}
        self._damage: str | None = None
        self._problems: list[str] = []
        try:
            self._missing = {shard.name: shard for shard in round_dir.manifest(stage)}
        except DataError as error:
            self._damage = str(error)

    def compare(self, file: Path, look: _Look) -> None:
        if look.sha256 is None:
            return  # the look says that it is no file
        line = self._missing.pop(file.name, None)
        if line is None:
            self._problems.append(f"{self._path}: does not name {file.name}.")
        elif look.sha256 != line.sha256:
            self._problems.append(
                f"{file}: its bytes have changed since it was committed (sha256)."
            )
        elif look.line is not None and look.line != line:
            self._problems.append(
                f"{self._path}: the counts of {file.name} are not those of its rows."
            )

    def problems(self) -> list[str]:
        """Return what differs, after all shards were compared."""
        if self._damage is not None:
            return [self._damage]
        gone = [f"{self._path}: names {name}, which does not exist." for name in self._missing]
        return gone + self._problems


# What a row is of, whatever its key: the columns, and their name in messages.
_PLACES: dict[Stage, tuple[str, str, str]] = {
    "rollouts": ("prompt_id", "sample_idx", "this sample of its prompt"),
    "distill": ("rollout_id", "candidate_idx", "this candidate of its rollout"),
}


def _doubled(keys: list[_Keys], what: str) -> list[str]:
    """Return a line for each row whose key occurred before; `what` names what it stands for."""
    packed = [part for _, _, part in keys]
    if len(KeySet.of(packed)) == sum(map(len, packed)):
        return []
    problems = []
    for part, index in twice(packed):
        file, first, _ = keys[part]
        problems.append(f"{file}, row {first + index}: {what} is in the round twice.")
    return problems


class _Prompts:
    """The hash of the prompt ids of each rollout."""

    def __init__(self, parts: list[tuple[Packed, _Hashes]]) -> None:
        keys = np.concatenate([keys for keys, _ in parts])
        order = np.argsort(keys)
        self._keys = keys[order]
        self._hashes = np.concatenate([hashes for _, hashes in parts])[order]

    def find(self, keys: Packed) -> tuple[npt.NDArray[np.bool_], _Hashes]:
        """Return whether each rollout of `keys` [n] exists, and its hash (arbitrary if not)."""
        if not len(self._keys):
            return np.zeros(len(keys), bool), np.zeros(len(keys), np.uint64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[at] == keys, self._hashes[at]


def _hash_lists(ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> _Hashes:
    """Return a hash of each of the lists that `ids` holds one after another: the sum of one for
    each id and its position, by splitmix64 (Steele, Lea and Flood, 2014), modulo 2^64."""
    ends = np.cumsum(lengths)
    positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    x = (positions.astype(np.uint64) << 32) | ids.astype(np.uint32)
    x += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(x)])
    of_list: _Hashes = sums[ends] - sums[ends - lengths]
    return of_list


class _Gathered:
    """Rows of several shards, which are checked together."""

    def __init__(self, stage: Stage, rollouts: _Prompts | None) -> None:
        self._stage, self._rollouts = stage, rollouts
        # With the metadata of each: an error in it names its shard.
        self._waiting: list[tuple[_Rows, dict[str, Any], _Look]] = []
        self._bytes = 0

    def add(self, rows: "_Rows", metadata: dict[str, Any], look: _Look) -> None:
        """Check `rows` with others of the same `metadata`, now or at the next call of `check`, and
        add to `look` what they are."""
        is_other = any(metadata != before for _, before, _ in self._waiting[-1:])
        if is_other or self._bytes + rows.table.nbytes > _BYTES_AT_ONCE:
            self.check()
        self._waiting.append((rows, metadata, look))
        self._bytes += rows.table.nbytes

    def check(self) -> None:
        """Check the rows that wait: together, and by themselves only where something is wrong, so
        that it is said of the right row."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if len(waiting) > 1:
            (first, metadata, _), *_ = waiting
            whole = _Rows(first.file, 0, pa.concat_tables(rows.table for rows, _, _ in waiting))
            with contextlib.suppress(DataError):
                found = whole.check(self._stage, metadata, self._rollouts)
                if whole.is_sound():
                    start = 0
                    for rows, _, look in waiting:
                        look.add(rows, found, start)
                        start += rows.count
                    return
        for rows, metadata, look in waiting:
            try:
                look.add(rows, rows.check(self._stage, metadata, self._rollouts), 0)
            except DataError as error:
                problem = f"{rows.file}: cannot be read: {error}"
                if problem not in look.problems:
                    look.problems.append(problem)
            look.problems += rows.problems()


def _pieces(file: Path, shard: pq.ParquetFile, stage: Stage) -> Iterator["_Rows"]:
    """Yield the rows of a shard, some row groups at a time. Raise DataError where they cannot be
    read."""
    first = 0
    for groups in _groups(shard.metadata):
        try:
            table = shard.read_row_groups(groups, use_threads=False)
            table = with_added_columns(table, file, SCHEMAS[stage].names)
            table.validate(full=True)
        except PARQUET_ERRORS as error:
            raise DataError(f"row groups {groups[0]} to {groups[-1]}: {error}") from error
        yield _Rows(file, first, table)
        first += len(table)


def _groups(footer: pq.FileMetaData) -> Iterator[list[int]]:
    """Yield the row groups of a shard that are read together."""
    groups: list[int] = []
    size = 0
    for index in range(footer.num_row_groups):
        more = footer.row_group(index).total_byte_size
        if groups and size + more > _BYTES_AT_ONCE:
            yield groups
            groups, size = [], 0
        groups.append(index)
        size += more
    if groups:
        yield groups


class _Rows:
    """Checks of some rows of the shard `file`, of which `first` is the index of the first; or of
    several shards, to see whether all are sound."""

    def __init__(self, file: Path, first: int, table: pa.Table) -> None:
        self.file, self.first, self.count = file, first, len(table)
        self.table = table
        self._problems: dict[int, list[str]] = defaultdict(list)
        self._other: list[str] = []

    def check(self, stage: Stage, metadata: dict[str, Any], rollouts: _Prompts | None) -> "_Found":
        """Return what the rows are, and gather their problems. Raise DataError where `metadata`
        lacks something."""
        self.table = self.table.combine_chunks()
        found = _Found(self._packed("row_id"))
        self._enums()
        if stage == "rollouts":
            self._rollouts(metadata)
            found.prompts = self._prompts()
        elif stage == "distill":
            self._distill(metadata, rollouts)
        if stage in _PLACES:
            found.places = self._places(*_PLACES[stage][:2])
        return found

    def is_sound(self) -> bool:
        """Return whether no problem was found."""
        return not (self._other or self._problems)

    def problems(self) -> list[str]:
        """Return all problems, row by row."""
        ids = self.table.column("row_id")
        return self._other + [
            f"{self.file}, row {self.first + index} ({ids[index]}): {text}"
            for index in sorted(self._problems)
            for text in self._problems[index]
        ]

    def _say(self, indices: npt.ArrayLike, text: str) -> None:
        for index in np.unique(indices):
            self._problems[int(index)].append(text)

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        """Return a column of numbers, or the lengths of its lists [rows], with -1 for null."""
        column = self.table.column(name)
        if pa.types.is_list(column.type):
            column = pc.list_value_length(column)
        return np.asarray(column.fill_null(-1) if column.null_count else column)

    def _flat(self, name: str, rows: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
        """Return the concatenated lists of these rows."""
        return np.asarray(pc.list_flatten(self.table.column(name).take(pa.array(rows))))

    def _packed(self, name: str) -> Packed | None:
        """Return a column of keys. If they are not keys, record a problem and return None."""
        try:
            return pack(self.table.column(name))
        except ValueError as error:
            self._other.append(f"{self.file}: {name} {error}.")
            return None

    def _places(self, owner: str, index: str) -> Packed:
        """Return a hash of two columns for each row; S16 [rows]."""
        pairs = pl.DataFrame(self.table.select([owner, index]))
        hashes = [pairs.hash_rows(seed).to_numpy() for seed in (0, 1)]
        return np.stack(hashes, axis=1).view("S16")[:, 0]

    def _enums(self) -> None:
        for name in ENUMS.keys() & set(self.table.schema.names):
            column = self.table.column(name)
            known = pc.is_in(column, pa.array([*ENUMS[name], None], pa.string())).to_numpy()
            for index in np.flatnonzero(~known):
                self._say(index, f"{name} is {column[index].as_py()!r}, not in {ENUMS[name]}.")

    def _prompts(self) -> _Hashes:
        lengths = np.maximum(self._numbers("prompt_ids"), 0)
        ids = self._flat("prompt_ids", np.arange(self.count))
        return _hash_lists(ids, lengths)

    def _rollouts(self, metadata: dict[str, Any]) -> None:
        vocab = metadata["vocab_size"]
        for text in ("prompt", "completion"):
            ids, count = f"{text}_ids", f"num_{text}_tokens"
            lengths, counts = self._numbers(ids), self._numbers(count)
            for index in np.flatnonzero(lengths != counts):
                self._say(index, f"{ids} has {lengths[index]} ids, {count} is {counts[index]}.")
            tokens = self._flat(ids, np.arange(self.count))
            of_token = np.repeat(np.arange(self.count), np.maximum(lengths, 0))
            strange = of_token[(tokens < 0) | (tokens >= vocab)]
            self._say(strange, f"{ids} outside the vocabulary of {vocab}.")
        self._thinking("num_completion_tokens")

    def _thinking(self, tokens: str) -> None:
        found, most = self._numbers("num_thinking_tokens"), self._numbers(tokens)
        for index in np.flatnonzero(found > most):
            text = f"num_thinking_tokens is {found[index]}, {tokens} is {most[index]}."
            self._say(index, text)

    def _distill(self, metadata: dict[str, Any], rollouts: _Prompts | None) -> None:
        self._thinking("num_rewritten_tokens")
        rates = self._numbers("pass_rate")
        self._say(np.flatnonzero(rates > 1), "its pass_rate is above 1.")
        statuses = self.table.column("status")
        has_scores = (self._numbers("topk_ids") >= 0) | (self._numbers("draft_topk_ids") >= 0)
        exists = np.ones(self.count, bool)
        prompts = None
        origins = self._packed("rollout_id")
        if rollouts is not None and origins is not None:
            exists, prompts = rollouts.find(origins)
            for index in np.flatnonzero(~exists):
                origin = self.table.column("rollout_id")[index]
                self._say(index, f"its rollout {origin} is not in the round.")
        kept = pc.equal(statuses, "ok").to_numpy()
        # A rewrite that a refilter rejects keeps its scores.
        usable = ~pc.is_in(statuses, pa.array(sorted(UNUSABLE))).to_numpy()
        scored = exists & (kept | (usable & has_scores))
        for index in np.flatnonzero(exists & ~scored & has_scores):
            status = statuses[index].as_py()
            self._say(index, f"status {status!r}, but it has log-probabilities.")
        self._scored(np.flatnonzero(scored), metadata, prompts)

    def _scored(
        self,
        rows: npt.NDArray[np.intp],
        metadata: dict[str, Any],
        prompts: _Hashes | None,
    ) -> None:
        """Check rows with log-probabilities, all tokens of all rows at once."""
        vocab, score_context = metadata["vocab_size"], metadata["score_context"]
        start, n = self._numbers("loss_start"), self._numbers("num_rewritten_tokens")
        inputs = self._numbers("input_ids")
        prefixes = ("", WITH_DRAFT) if score_context == "both" else ("",)
        lists = [prefix + name for prefix in prefixes for name in SCORES]
        present = [start, n, inputs, *map(self._numbers, lists)]
        whole = (np.stack(present)[:, rows] >= 0).all(axis=0)
        self._say(
            rows[~whole], "scored or kept (ok), but ids, counts or log-probabilities are missing."
        )
        if score_context != "both":
            second = np.any([self._numbers(WITH_DRAFT + x)[rows] >= 0 for x in SCORES], axis=0)
            self._say(rows[second], f"{WITH_DRAFT}* columns contradict {score_context!r} scoring.")
        rows = rows[whole]
        right = (inputs == start + n) & (n > 0)
        for i in rows[~right[rows]]:
            self._say(
                i, f"{inputs[i]} input ids, expected loss_start {start[i]} + {n[i]} rewritten."
            )
        rows = rows[right[rows]]
        if not len(rows):
            return
        input_ids = self._flat("input_ids", rows)
        ends = np.cumsum(inputs[rows])
        if prompts is not None:
            positions = np.arange(len(input_ids)) - np.repeat(ends - inputs[rows], inputs[rows])
            of_prompt = positions < np.repeat(start[rows], inputs[rows])
            wrong = _hash_lists(input_ids[of_prompt], start[rows]) != prompts[rows]
            self._say(rows[wrong], "input_ids do not begin with the rollout's prompt.")
        last = input_ids[ends - 1]
        known = metadata.get("end_ids") or [metadata["eos_token_id"]]
        for at in np.flatnonzero(~np.isin(last, known)):
            self._say(rows[at], f"ends with id {last[at]}, not the end token.")
        context = self._numbers("teacher_prompt_ids") >= 0
        self._say(
            rows[context[rows] != (score_context != "problem")],
            f"teacher_prompt_ids contradict {score_context!r} scoring.",
        )
        strange = np.repeat(rows, inputs[rows])[(input_ids < 0) | (input_ids >= vocab)]
        self._say(strange, f"ids outside the vocabulary of {vocab}.")
        for prefix in prefixes:
            self._scores(rows, n, metadata["num_logprobs"], vocab, prefix)

    def _scores(
        self, rows: npt.NDArray[np.intp], n: npt.NDArray[Any], k: int, vocab: int, prefix: str
    ) -> None:
        """Check the score columns that begin with `prefix`, in `rows`, where none is null. `n`: the
        rewritten tokens of all rows."""
        names = [prefix + name for name in SCORES]
        tops, logs, tails = map(self._numbers, names)
        right = (tops == n * k) & (logs == n * k) & (tails == n)
        for i in rows[~right[rows]]:
            self._say(
                i,
                f"expected {n[i]} x {k} log-probabilities and {n[i]} tails, found {tops[i]}"
                f" {names[0]}, {logs[i]} {names[1]} and {tails[i]} {names[2]}.",
            )
        rows = rows[right[rows]]
        if not len(rows):
            return
        of_token = np.repeat(rows, n[rows])
        ids, logprobs, tail = (self._flat(name, rows) for name in names)
        ids, tail = ids.reshape(-1, k), tail.astype(np.float64)
        logprobs = logprobs.reshape(-1, k).astype(np.float64)
        strange = of_token[((ids < 0) | (ids >= vocab)).any(axis=1)]
        self._say(strange, f"{names[0]} outside the vocabulary of {vocab}.")
        doubled = (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(axis=1)
        self._say(of_token[doubled], f"{names[0]}: an id occurs twice in the top K of one token.")
        unsorted = (np.diff(logprobs, axis=1) > 0).any(axis=1)
        self._say(of_token[unsorted], f"{names[1]} are not sorted, most probable first.")
        mass = np.exp(logprobs).sum(axis=1) + np.exp(tail)
        error = np.where(np.isnan(mass), np.inf, np.abs(mass - 1))
        for i in np.unique(of_token[error > _MASS_SLACK]):
            mine = slice(*np.searchsorted(of_token, [i, i + 1]))
            worst = int(error[mine].argmax())
            self._say(
                i,
                f"{names[1]} and {names[2]}: the probabilities of token {worst} sum to"
                f" {mass[mine][worst]:.4f}.",
            )
