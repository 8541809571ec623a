"""A round's folder: what lies where in it, its settings, its lock, and the rows of its shards."""

import contextlib
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mpd_data.common.errors import DataError, OtherSettingsError
from mpd_data.store.card import update_card
from mpd_data.store.keys import KeySet, Packed
from mpd_data.store.locks import WHOLE, Part, part_lock, short_lock
from mpd_data.store.manifest import read_manifest, write_manifest
from mpd_data.store.run_record import read_record, require_kind, require_same_settings, write_record
from mpd_data.store.schema import SCHEMA_VERSION, SCHEMAS, Stage
from mpd_data.store.shards import (
    Shard,
    describe,
    pack_keys,
    read_all,
    read_batches,
    read_columns,
    read_keys,
    read_metadata,
    unique_keys,
)

# What others need of a round. errors/ and the reports of processes stay here.
PUBLISHED = ("README.md", "run.json", "*.manifest.jsonl", "*/part-*.parquet")

# The settings of rewrites that --refilter changes.
REFILTERED = ("filters", "choose")


@dataclass(frozen=True)
class ShardScan:
    """The shards of a stage as the folder has them: of each sound one its description, its path
    and its keys (`packed`), and the files that are `torn`."""

    shards: list[Shard] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    packed: list[Packed] = field(default_factory=list)
    torn: list[Path] = field(default_factory=list)

    def keys(self) -> KeySet:
        """Return `row_id` of every sound row. Raise DataError where a key occurs twice."""
        return unique_keys(self.paths, self.packed)


class RoundDir:
    """One round's folder. The stages write it, everything else reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_locked = False  # by this object: see `lock`

    # -- what lies where ----------------------------------------------------------------

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage's shards."""
        return self.path / stage

    def shard_paths(self, stage: Stage) -> list[Path]:
        """Return the shards under their final names, in order."""
        return sorted(self.folder(stage).glob("part-*.parquet"))

    def manifest_path(self, stage: Stage) -> Path:
        """Return the file of a stage's manifest."""
        return self.path / f"{stage}.manifest.jsonl"

    def manifest(self, stage: Stage) -> list[Shard]:
        """Return the shards that the manifest lists. Raise DataError like `read_manifest`."""
        return read_manifest(self.manifest_path(stage))

    @property
    def staging(self) -> Path:
        """The folder of half-written files."""
        return self.path / ".staging"

    def status_path(self, label: str, part: Part) -> Path:
        """Return the file in which the process that does `part` of the work `label` reports."""
        return self.path / ".status" / f"{part.name(label)}.json"

    def statuses(self) -> list[Path]:
        """Return the reports of the processes that write here, or did."""
        return sorted((self.path / ".status").glob("*.json"))

    # -- settings ---------------------------------------------------------------------

    def run_info(self) -> dict[str, Any]:
        """Return the content of run.json; {} where no stage has run."""
        return read_record(self.path)

    def saved_stage(self, stage: Stage) -> dict[str, Any] | None:
        """Return what run.json holds of `stage`; None where it has not run here."""
        saved: dict[str, Any] | None = self.run_info().get("stages", {}).get(stage)
        return saved

    def claim(
        self, stage: Stage, identity: Mapping[str, Any], details: Mapping[str, Any]
    ) -> str | None:
        """Record in run.json what determines the rows of `stage` (`identity`) and what is good to
        know about it (`details`), and write the round's README.md. Return when the stage began, as
        ISO 8601 in local time; None of a stage that an older version began. Raise ConfigError like
        `check`."""
        with short_lock(self.path):
            saved = self.check(stage, identity, details)
            # All processes and runs of a stage lay out prompts as of its first start.
            entry: dict[str, Any] = saved or {"begun": datetime.now().isoformat(timespec="seconds")}
            if saved is None or saved["details"] != details:
                info = self.run_info()
                old = info.get("stages", {})
                entry = {**entry, "identity": dict(identity), "details": dict(details)}
                new = {**old, stage: entry}
                info |= {"schema_version": SCHEMA_VERSION, "stages": new}
                write_record(self.path, "round", info)
                update_card(self.path, old, new)
            begun: str | None = entry.get("begun")
            return begun

    def check(
        self, stage: Stage, identity: Mapping[str, Any], details: Mapping[str, Any],
        prompt_ids: Set[str] | None = None,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Return `saved_stage`. Raise OtherSettingsError where the stage ran here with another
        identity: rows of two settings never belong in one round. With `prompt_ids`, those that
        there are now, it says what is known of prompts that changed."""
        saved = self.saved_stage(stage)
        old = saved or {"identity": None, "details": {}}
        counts = {}
        sides = ((old["details"], old["identity"] or {}), (details, identity))
        if all("rows" in each and "num_samples" in settings for each, settings in sides):
            before, now = (each["rows"] // settings["num_samples"] for each, settings in sides)
            counts["prompts"] = (before, now)
        try:
            require_same_settings(
                self.path,
                "mpd-gen rewrite" if stage == "distill" else f"mpd-gen {stage}",
                saved and self._with_stop_ids(stage, saved["identity"], identity),
                identity,
                _remedy(stage, old["identity"] or {}, identity),
                bool(self.shard_paths(stage)),
                counts,
            )
        except OtherSettingsError as error:
            if saved is None or prompt_ids is None:
                raise
            if saved["identity"].get("prompts") == identity["prompts"]:
                raise
            what = self._changed_prompts(saved["details"], details, prompt_ids)
            raise OtherSettingsError(f"{error}\n{what}") from error
        return saved

    def _changed_prompts(
        self, saved: Mapping[str, Any], details: Mapping[str, Any], prompt_ids: Set[str]
    ) -> str:
        """Return, as sentences, what is known of prompts that changed since the round began."""
        before, now = (each.get("config", {}).get("prompts", []) for each in (saved, details))
        said = f"The prompts are those of {', '.join(map(str, now))}"
        said += "." if before == now else f", they were those of {', '.join(map(str, before))}."
        try:
            rows = self.table("rollouts", ["prompt_id", "problem"])
        except DataError:
            return said
        for name, problem in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            if name not in prompt_ids:
                start = problem if len(problem) <= 60 else f"{problem[:60]}…"
                return (
                    f"{said} The round has rows of the prompt {name!r} ({start!r}), which is not"
                    " among them now."
                )
        return (
            f"{said} All prompts that the round has rows of are among them by their ids: others"
            " were added or removed, or an answer, a text or a metadata column changed."
        )

    def _with_stop_ids(
        self, stage: Stage, saved: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return `saved` with the tokens at which generation stops. Older records lack them: they
        are then those of the shards, or of `identity` where these do not say either."""
        if "stop_ids" in saved or "stop_ids" not in identity:
            return saved
        paths = self.shard_paths(stage)
        turn = (read_metadata(paths[0]).get("turn") if paths else None) or {}
        return {**saved, "stop_ids": turn.get("stop_ids", identity["stop_ids"])}

    def record_speed(self, stage: Stage, speed: Mapping[str, Any]) -> None:
        """Record in run.json how fast `stage` was: rows, tokens, seconds, device, backend. A run
        with fewer tokens on the same device does not replace the record of the one before. Rows do
        not tell: those that need no engine are many and take no time."""
        with short_lock(self.path):
            info = self.run_info()
            saved = info["stages"][stage].get("speed", {})
            is_same = all(saved.get(name) == speed[name] for name in ("device", "backend"))
            if is_same and saved["tokens"] > speed["tokens"]:
                return
            info["stages"][stage]["speed"] = dict(speed)
            write_record(self.path, "round", info)

    def discard(self, *stages: Stage) -> None:
        """Delete what these stages have written here (the `--overwrite` of a command)."""
        for stage in stages:
            if self.folder(stage).exists():
                # Renamed first, so that a kill leaves no half of it under its name.
                doomed = self.staging / f"discarded-{stage}-{uuid.uuid4().hex}"
                self.folder(stage).replace(doomed)
                shutil.rmtree(doomed)
            self.manifest_path(stage).unlink(missing_ok=True)
        if "distill" in stages:
            # The rows of a killed pass over the old rewrites would be taken for new ones.
            shutil.rmtree(scratch_of(self).path, ignore_errors=True)
        info = self.run_info()
        old = info.get("stages", {})
        new = {stage: entry for stage, entry in old.items() if stage not in stages}
        if info:
            write_record(self.path, "round", {**info, "stages": new})
            update_card(self.path, old, new)

    @contextlib.contextmanager
    def lock(self, label: str = "round", part: Part = WHOLE) -> Iterator[None]:
        """Hold `part` of the work `label` on this round for one writing process. Raise ConfigError
        where another process is in the way, and for the folder of something other than a round."""
        require_kind(self.path, "round")

        def clear() -> None:
            self.staging.mkdir(exist_ok=True)
            temporary = (*self.path.glob(".*.tmp"), *self.path.glob(".status/.*.tmp"))
            for leftover in (*self.staging.iterdir(), *temporary):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            # Reports of the same work divided into another number of parts are out of date.
            for status in self.statuses():
                name, _, count = status.stem.rpartition("-of-")
                if name.rpartition("-")[0] == label and count != str(part.count):
                    status.unlink()

        with part_lock(self.path, label, part, clear):
            self.is_locked = True
            try:
                yield
            finally:
                self.is_locked = False

    # -- which shards are sound -----------------------------------------------------------

    def _indexed(self, stage: Stage) -> dict[str, Shard]:
        """Return the shards that the manifest lists, by name; {} where it cannot be read."""
        try:
            return {shard.name: shard for shard in self.manifest(stage)}
        except DataError:
            return {}  # the folder is the truth: such an index is made anew

    def unindexed(self, stage: Stage) -> list[Path]:
        """Return the shards that the manifest does not list, or lists with another size."""
        sizes = {name: shard.bytes for name, shard in self._indexed(stage).items()}
        paths = self.shard_paths(stage)
        return [path for path in paths if sizes.get(path.name) != path.stat().st_size]

    def scan_shards(self, stage: Stage) -> ShardScan:
        """Look at every shard by footer, size and key column; change nothing. A shard that the
        manifest does not list (a kill between link and append) is described by reading it."""
        indexed = self._indexed(stage)

        def look(path: Path) -> tuple[Shard, Packed] | None:
            shard = indexed.get(path.name)
            try:
                column = read_columns(path, ["row_id"])["row_id"]
                is_indexed = shard is not None and shard.bytes == path.stat().st_size
                if shard is None or not is_indexed:
                    shard = describe(path, stage)
            except DataError:
                return None
            try:
                return shard, pack_keys(path, "row_id", column)
            except DataError:
                # The manifest lists it, so it had keys once; else mpd-gen did not write the file.
                if is_indexed:
                    return None
                raise

        scan = ShardScan()
        paths = self.shard_paths(stage)
        for path, sound in zip(paths, read_all(look, paths), strict=True):
            if sound is None:
                scan.torn.append(path)
            else:
                scan.shards.append(sound[0])
                scan.paths.append(path)
                scan.packed.append(sound[1])
        return scan

    def reconcile(self, stage: Stage) -> ShardScan:
        """Bring manifest and folder together; call it with the lock held, under a `short_lock`. A
        shard that the manifest does not list is added. A torn one goes to `.quarantine/`, and its
        rows are missing again. A line without its file is dropped."""
        scan = self.scan_shards(stage)
        for path in scan.torn:
            quarantine = self.path / ".quarantine"
            quarantine.mkdir(exist_ok=True)
            path.replace(quarantine / f"{stage}-{path.stem}-{uuid.uuid4().hex[:8]}.parquet")
        write_manifest(self.manifest_path(stage), scan.shards)
        return scan

    def recover(self, stage: Stage) -> KeySet:
        """Mend what a kill or a damaged disk left of `stage`, report it on stderr, and return the
        keys of the rows that are committed and sound. Call it with the lock held."""
        with short_lock(self.path):
            scan = self.reconcile(stage)
        for path in scan.torn:
            message = "torn; moved to .quarantine, its rows are missing again"
            print(f"{path}: {message}", file=sys.stderr)
        # Of the shards that were whole then: without hard links, the next of another part may have
        # its name and not yet its content.
        return scan.keys()

    def failures(self) -> KeySet:
        """Return the keys of the rows that failed for good (an over-long prompt, say)."""
        return self.recover("errors")

    # -- rows ---------------------------------------------------------------------------

    def _whole_paths(self, stage: Stage) -> list[Path]:
        """Return `shard_paths`, also while other processes commit more."""
        # Without hard links a shard has its name before its content.
        with short_lock(self.path):
            return self.shard_paths(stage)

    def keys(self, stage: Stage) -> KeySet:
        """Return `row_id` of every committed row. Raise DataError where a key occurs twice."""
        paths = self.shard_paths(stage)
        return unique_keys(paths, list(read_all(read_keys, paths)))

    def rewritten(self, paths: list[Path] | None = None) -> KeySet:
        """Return the keys of the rollouts that have rewrites; with `paths`, in those shards."""
        paths = self._whole_paths("distill") if paths is None else paths
        return KeySet.of(list(read_all(lambda path: read_keys(path, "rollout_id"), paths)))

    def table(self, stage: Stage, columns: list[str], paths: list[Path] | None = None) -> pa.Table:
        """Return light columns of all committed rows, or of the shards at `paths`, in memory."""
        paths = self.shard_paths(stage) if paths is None else paths
        none = pa.schema([SCHEMAS[stage].field(name) for name in columns]).empty_table()
        tables = read_all(lambda path: read_columns(path, columns), paths)
        return pa.concat_tables([none, *tables], promote_options="permissive")

    def count_statuses(self, paths: list[Path] | None = None) -> dict[str, int]:
        """Return the number of distill rows by status, in all shards or in those at `paths`."""
        paths = self._whole_paths("distill") if paths is None else paths
        counts = pc.value_counts(self.table("distill", ["status"], paths)["status"])
        return {pair["values"]: pair["counts"] for pair in counts.to_pylist()}

    def rows(
        self,
        stage: Stage,
        columns: list[str],
        paths: list[Path] | None = None,
        done: KeySet | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield all committed rows but those in `done`, or those of the shards at `paths`, shard
        by shard and row group by row group (memory: one group). Of a shard whose rows are all
        `done` only the keys are read."""
        for path in self.shard_paths(stage) if paths is None else paths:
            missing = None
            if done is not None:
                missing = ~done.holds(read_keys(path))
                if not missing.any():
                    continue
            first = 0
            for batch in read_batches(path, columns):
                rows = batch
                if missing is not None:
                    rows = batch.take(np.flatnonzero(missing[first : first + len(batch)]))
                first += len(batch)
                yield from rows.to_pylist()


def _remedy(stage: Stage, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Return what a user can do who wants other settings for `stage` than it was begun with."""
    command, place = "mpd-gen rewrite", ""
    if stage == "rollouts":
        command, place = "mpd-gen rollouts", " give another --out, or"
    elif all(saved.get(name) == identity[name] for name in identity if name not in REFILTERED):
        return (
            "To apply changed filters and choice to the rewrites that exist, run mpd-gen rewrite"
            " with --refilter: it deletes nothing."
        )
    other = f"For other settings{place} delete what this stage has written:"
    return f"{other} run {command} with --overwrite."


def scratch_of(round_dir: RoundDir) -> RoundDir:
    """Return where a pass over the rewrites of `round_dir` gathers its rows (second_pass.py)."""
    return RoundDir(round_dir.path / ".refilter")


def is_whole(scratch: RoundDir) -> bool:
    """Return whether such a pass has all its rows, which wait to be put in place."""
    return (scratch.path / "complete").exists()
