"""A round's folder: its shards, its manifests and its settings."""

import contextlib
import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpd_data.common.errors import DataError
from mpd_data.common.files import atomic_file
from mpd_data.store.keys import KeySet, Packed
from mpd_data.store.locks import WHOLE, Part, member, moment
from mpd_data.store.run_record import (
    read_record,
    require_kind,
    require_same_settings,
    write_record,
)
from mpd_data.store.schema import SCHEMA_VERSION, SCHEMAS, Stage
from mpd_data.store.shards import (
    ROTTEN,
    ROWS_PER_GROUP,
    Shard,
    _pack,
    _read_columns,
    _read_keys,
    _unique,
    describe,
    open_shard,
    read_all,
)

# The settings of rewrites that --refilter changes.
REFILTERED = ("filters", "choose")


@dataclass(frozen=True)
class Survey:
    """The shards of a stage as the folder has them: sound ones with their paths, and the files
    that are torn. `packed` holds the keys of each sound one."""

    shards: list[Shard]
    paths: list[Path]
    torn: list[Path]
    packed: list[Packed]

    def keys(self) -> KeySet:
        """`row_id` of every sound row. Raises DataError where a key occurs twice."""
        return _unique(self.paths, self.packed)


class RoundDir:
    """One round's folder: its stages' shards, manifests and settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_locked = False  # by this object: see `lock`

    def folder(self, stage: Stage) -> Path:
        return self.path / stage

    def manifest_path(self, stage: Stage) -> Path:
        return self.path / f"{stage}.manifest.jsonl"

    @property
    def staging(self) -> Path:
        return self.path / ".staging"

    # -- settings ---------------------------------------------------------------------

    def run_info(self) -> dict[str, Any]:
        """Return the content of run.json; {} where no stage has run."""
        return read_record(self.path)

    def saved_stage(self, stage: Stage) -> dict[str, Any] | None:
        """Return what run.json holds of `stage`; None where it has not run here."""
        saved: dict[str, Any] | None = self.run_info().get("stages", {}).get(stage)
        return saved

    def claim(self, stage: Stage, identity: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Record in run.json what determines the rows of `stage` (`identity`) and what is good to
        know about it (`details`). Raises ConfigError like `check`."""
        with moment(self.path):
            saved = self.check(stage, identity, details)
            if saved is not None and saved["details"] == details:
                return
            info = self.run_info()
            info["schema_version"] = SCHEMA_VERSION
            entry = {**(saved or {}), "identity": dict(identity), "details": dict(details)}
            info.setdefault("stages", {})[stage] = entry
            write_record(self.path, "round", info)

    def check(
        self, stage: Stage, identity: Mapping[str, Any], details: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return `saved_stage`.

        Raises ConfigError where the stage ran here with another identity: rows of two settings
        never belong in one round.
        """
        saved = self.saved_stage(stage)
        counts = {}
        has_counts = saved is not None and "rows" in saved["details"] and "rows" in details
        if saved is not None and has_counts and stage == "rollouts":
            counts["prompts"] = (
                saved["details"]["rows"] // saved["identity"]["num_samples"],
                details["rows"] // identity["num_samples"],
            )
        require_same_settings(
            self.path,
            stage,
            None if saved is None else saved["identity"],
            identity,
            _remedy(stage, saved, identity),
            bool(self.shard_paths(stage)),
            counts,
        )
        return saved

    def record_speed(self, stage: Stage, speed: Mapping[str, Any]) -> None:
        """Keeps in run.json how fast `stage` went: rows, tokens, seconds, device, backend. A run of
        fewer rows on the same device says less than the one before and does not replace it."""
        same = ("device", "backend")
        with moment(self.path):
            info = self.run_info()
            saved = info["stages"][stage].get("speed")
            if (
                saved
                and saved["rows"] > speed["rows"]
                and all(saved.get(name) == speed[name] for name in same)
            ):
                return
            info["stages"][stage]["speed"] = dict(speed)
            write_record(self.path, "round", info)

    def discard(self, *stages: Stage) -> None:
        """Deletes what these stages have written here (the `--overwrite` of a command)."""
        for stage in stages:
            if self.folder(stage).exists():
                # Away at once under its name, so that a kill leaves no half of it behind.
                doomed = self.staging / f"discarded-{stage}-{uuid.uuid4().hex}"
                self.folder(stage).replace(doomed)
                shutil.rmtree(doomed)
            self.manifest_path(stage).unlink(missing_ok=True)
        if "distill" in stages:
            # What a killed pass over them left would be taken for this stage's.
            shutil.rmtree(scratch_of(self).path, ignore_errors=True)
        info = self.run_info()
        for stage in stages:
            info.get("stages", {}).pop(stage, None)
        if info:
            write_record(self.path, "round", info)

    @contextlib.contextmanager
    def lock(self, label: str = "round", part: Part = WHOLE) -> Iterator[None]:
        """Holds `part` of the work `label` on this round for one writing process; the kernel drops
        it if the process dies. Raises ConfigError where another process is in the way, and for the
        folder of something other than a round."""
        require_kind(self.path, "round")

        def clear() -> None:
            self.staging.mkdir(exist_ok=True)
            temporary = (*self.path.glob(".*.tmp"), *self.path.glob(".status/.*.tmp"))
            for leftover in (*self.staging.iterdir(), *temporary):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            # Of the work that begins now, what another division of it said is history.
            for status in self.statuses():
                name, _, count = status.stem.rpartition("-of-")
                if name.rpartition("-")[0] == label and count != str(part.count):
                    status.unlink()

        with member(self.path, label, part, clear):
            self.is_locked = True
            try:
                yield
            finally:
                self.is_locked = False

    def status_path(self, label: str, part: Part) -> Path:
        """Where the process that does `part` of the work `label` says how far it is."""
        return self.path / ".status" / f"{part.name(label)}.json"

    def statuses(self) -> list[Path]:
        """What the processes that write here, or did, say of themselves."""
        return sorted((self.path / ".status").glob("*.json"))

    # -- manifest ---------------------------------------------------------------------

    def manifest(self, stage: Stage) -> list[Shard]:
        """The manifest's lines. An unterminated last line (a kill during the append) counts
        as absent; any other malformed line raises DataError."""
        path = self.manifest_path(stage)
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]
        shards = []
        for number, line in enumerate(lines, start=1):
            try:
                shards.append(Shard(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: not a manifest line ({error}). Delete the manifest:"
                    " it is rebuilt from the shards by the next mpd-gen command."
                ) from error
        return shards

    def append_manifest(self, stage: Stage, shard: Shard) -> None:
        """Indexes a shard that has its final name; call it in the `moment` of that."""
        line = json.dumps(shard.__dict__, separators=(",", ":")).encode() + b"\n"
        fd = os.open(self.manifest_path(stage), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                whole = os.pread(fd, size, 0).rfind(b"\n") + 1
                os.ftruncate(fd, whole)
            if os.write(fd, line) < len(line):
                raise OSError(errno.ENOSPC, "the manifest line was not written whole")
            os.fsync(fd)
        finally:
            os.close(fd)

    def shard_paths(self, stage: Stage) -> list[Path]:
        """The shards under their final names, in order."""
        return sorted(self.folder(stage).glob("part-*.parquet"))

    def unindexed(self, stage: Stage) -> list[Path]:
        """The shards that the manifest does not know, or has of another size."""
        sizes = {shard.name: shard.bytes for shard in self._saved(stage)}
        return [p for p in self.shard_paths(stage) if sizes.get(p.name) != p.stat().st_size]

    def _saved(self, stage: Stage) -> list[Shard]:
        try:
            return self.manifest(stage)
        except DataError:
            # The folder is the truth: an index that cannot be read is made anew.
            return []

    def _whole_paths(self, stage: Stage) -> list[Path]:
        """`shard_paths`, also while others commit more."""
        # Without hard links a shard that is on its way has its name before its content.
        with moment(self.path):
            return self.shard_paths(stage)

    def survey(self, stage: Stage) -> Survey:
        """Looks at every shard by footer, size and key column, and changes nothing. A shard that
        the manifest does not know (a kill between link and append) is described by reading it."""
        known = {shard.name: shard for shard in self._saved(stage)}

        def look(file: Path) -> tuple[Shard, Packed] | None:
            shard = known.get(file.name)
            try:
                column = _read_columns(file, ["row_id"])["row_id"]
                is_indexed = shard is not None and shard.bytes == file.stat().st_size
                if shard is None or not is_indexed:
                    shard = describe(file, stage)
            except DataError:
                return None
            try:
                return shard, _pack(file, "row_id", column)
            except DataError:
                # The manifest knows it, so it had keys once; else somebody else's file lies here.
                if is_indexed:
                    return None
                raise

        found = Survey([], [], [], [])
        files = self.shard_paths(stage)
        for file, seen in zip(files, read_all(look, files), strict=True):
            if seen is None:
                found.torn.append(file)
                continue
            found.shards.append(seen[0])
            found.paths.append(file)
            found.packed.append(seen[1])
        return found

    def reconcile(self, stage: Stage) -> Survey:
        """Brings manifest and folder together; call it with the lock held, in a `moment`.

        A shard the manifest does not know is indexed. A torn one goes to `.quarantine/` and its
        rows are owed again. A manifest line without its file is dropped.
        """
        path = self.manifest_path(stage)
        found = self.survey(stage)
        for file in found.torn:
            quarantine = self.path / ".quarantine"
            quarantine.mkdir(exist_ok=True)
            file.replace(quarantine / f"{stage}-{file.stem}-{uuid.uuid4().hex[:8]}.parquet")
        text = "".join(json.dumps(s.__dict__, separators=(",", ":")) + "\n" for s in found.shards)
        if text.encode() != (path.read_bytes() if path.exists() else b""):
            with atomic_file(path) as out:
                out.write(text)
        return found

    # -- reading ----------------------------------------------------------------------

    def keys(self, stage: Stage) -> KeySet:
        """`row_id` of every committed row. Raises DataError where a key occurs twice."""
        paths = self.shard_paths(stage)
        return _unique(paths, list(read_all(_read_keys, paths)))

    def rewritten(self, paths: list[Path] | None = None) -> KeySet:
        """The rollouts that have rewrites, or have them in the shards at `paths`."""
        paths = self._whole_paths("distill") if paths is None else paths
        return KeySet.of(list(read_all(lambda path: _read_keys(path, "rollout_id"), paths)))

    def table(self, stage: Stage, columns: list[str], paths: list[Path] | None = None) -> pa.Table:
        """Light columns of all committed rows, or of the shards at `paths`, held at once."""
        paths = self.shard_paths(stage) if paths is None else paths
        none = pa.schema([SCHEMAS[stage].field(name) for name in columns]).empty_table()
        tables = read_all(lambda path: _read_columns(path, columns), paths)
        return pa.concat_tables([none, *tables], promote_options="permissive")

    def count_statuses(self, paths: list[Path] | None = None) -> dict[str, int]:
        """Distill rows by status, or those of the shards at `paths`."""
        paths = self._whole_paths("distill") if paths is None else paths
        counts = pc.value_counts(self.table("distill", ["status"], paths)["status"])
        return {found["values"]: found["counts"] for found in counts.to_pylist()}

    def failures(self) -> KeySet:
        """Keys of the rows that failed for good (an over-long prompt, say)."""
        return self.recover("errors")

    def recover(self, stage: Stage) -> KeySet:
        """Mends what a kill or a damaged disk left of `stage`, says so on stderr, and returns
        the keys of the rows that are committed and sound. Call it with the lock held."""
        with moment(self.path):
            found = self.reconcile(stage)
        for file in found.torn:
            print(
                f"{file}: torn; moved to .quarantine, its rows are owed again",
                file=sys.stderr,
            )
        # Of the shards that were whole then: without hard links, the next of another part may have
        # its name and not yet its content.
        return found.keys()

    def rows(
        self,
        stage: Stage,
        columns: list[str],
        paths: list[Path] | None = None,
        done: KeySet | None = None,
    ) -> Iterator[dict[str, Any]]:
        """All committed rows but those in `done`, or those of the shards at `paths`, shard by
        shard and row group by row group (memory: one group). Of a shard whose rows are all `done`
        only the keys are read."""
        for path in self.shard_paths(stage) if paths is None else paths:
            owed = None
            if done is not None:
                owed = ~done.holds(_read_keys(path))
                if not owed.any():
                    continue
            first = 0
            with open_shard(path) as file:
                batches = file.iter_batches(ROWS_PER_GROUP, columns=columns)
                while True:
                    try:
                        batch = next(batches, None)
                    except ROTTEN as error:
                        raise DataError(
                            f"{path}: damaged ({error}). Move it out of its folder and run the"
                            " stage that wrote it again: it makes the missing rows anew."
                        ) from error
                    if batch is None:
                        break
                    rows = batch
                    if owed is not None:
                        rows = batch.take(np.flatnonzero(owed[first : first + len(batch)]))
                    first += len(batch)
                    yield from rows.to_pylist()


def _remedy(stage: Stage, saved: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> str:
    """Return what a user can do who wants other settings for `stage` than it was begun with."""
    if stage == "rollouts":
        return (
            "For other settings give another --out, or delete what this stage has written: run"
            " mpd-gen rollouts with --overwrite."
        )
    if saved is not None and all(
        saved["identity"].get(name) == value
        for name, value in identity.items()
        if name not in REFILTERED
    ):
        return (
            "To apply changed filters and choice to the rewrites that exist, run mpd-gen rewrite"
            " with --refilter: it deletes nothing."
        )
    return (
        "For other settings delete what this stage has written: run mpd-gen rewrite with"
        " --overwrite."
    )


def scratch_of(round_dir: RoundDir) -> RoundDir:
    """Where a pass over the rewrites of `round_dir` gathers its rows (select/second_pass.py)."""
    return RoundDir(round_dir.path / ".refilter")


def is_whole(scratch: RoundDir) -> bool:
    """Whether such a pass has all its rows, which wait to be put in place."""
    return (scratch.path / "complete").exists()
