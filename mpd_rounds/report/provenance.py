"""Sections on settings, models and versions, from run.json, pipeline.json and the shards."""

import json
from collections.abc import Iterator
from typing import Any

from mpd_data.common.files import read_json_lines
from mpd_data.store.run_record import read_record
from mpd_rounds.report.document import Block, Table
from mpd_rounds.report.run import Run, round_name, shard_metadata

# Settings that come first in the table.
_FIRST = ("name", "student", "teacher", "rounds", "seed", "licenses")


def provenance(run: Run) -> Iterator[Block]:
    metadata = {}
    for n, folder in run.rounds.items():
        metadata[f"{round_name(n)}, rollouts"] = shard_metadata(folder, "rollouts")
        metadata[f"{round_name(n)}, rewrites"] = shard_metadata(folder, "distill")
    for name, folders in run.evaluations.items():
        for n, folder in folders.items():
            metadata[f"{round_name(n)}, evaluate {name}"] = shard_metadata(folder, "rollouts")
    for n, folder in run.trainings.items():
        metadata[f"{round_name(n)}, train"] = read_record(folder).get("details", {})
    yield from _versions({label: details for label, details in metadata.items() if details})
    yield from _models_measured(run)
    yield from _times(run)
    if run.settings:
        first = {name: run.settings[name] for name in _FIRST if name in run.settings}
        yield _settings("pipeline.json", {**first, **run.settings})


def _models_measured(run: Run) -> Iterator[Block]:
    rows = []
    for n, folder in run.evaluations.get(run.headline or "", {}).items():
        model = shard_metadata(folder, "rollouts").get("model", {})
        rows.append([round_name(n), str(model.get("name")), str(model.get("version"))])
    if rows:
        yield Table("Models measured", ["", "name", "version"], rows, left=3)


def _times(run: Run) -> Iterator[Block]:
    """Yield the seconds that each step took the last time it ran."""
    path = run.path / "finished.jsonl"
    if path.is_file():
        seconds = {
            str(r["label"]): r["seconds"]
            for r in read_json_lines(path, "Remove the line.", ("label", "seconds"))
        }
        rows = [[label, f"{float(taken):,.0f}"] for label, taken in seconds.items()]
        yield Table("Time of the steps", ["", "seconds"], rows)


def _versions(metadata: dict[str, dict[str, Any]]) -> Iterator[Block]:
    """Yield packages and commit, with one row for stages that have the same."""
    alike: dict[str, list[str]] = {}
    for label, details in metadata.items():
        commit = details.get("git_commit") or "not recorded"
        versions = {"commit": commit, **details.get("versions", {})}
        if "backend" in details or "device" in details:
            versions["on"] = details.get("backend") or details.get("device")
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        alike.setdefault(text, []).append(label)
    rows = [[", ".join(labels), text] for text, labels in alike.items()]
    if rows:
        yield Table("Versions", ["stages", "versions"], rows, left=2)


def training_provenance(run: Run) -> Iterator[Block]:
    info = read_record(run.path)
    details = info.get("details", {})
    yield from _versions({run.label: details})
    identity = {k: v for k, v in info.get("identity", {}).items() if k != "config"}
    yield _settings("run.json", flattened(identity) | flattened(details.get("config", {})))


def _settings(caption: str, settings: dict[str, Any]) -> Table:
    # What is off says nothing.
    given = {name: x for name, x in flattened(settings).items() if x is not None and x != []}
    rows = [[name, setting_text(value)] for name, value in given.items()]
    return Table(caption, ["setting", "value"], rows, left=2)


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names; sections in a list by their number."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def setting_text(value: Any) -> str:
    """Return the value of a setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def unlike_settings(runs: list[Run]) -> Iterator[Block]:
    """Yield a table of the settings that differ between the runs, if there are any."""
    flat = [flattened(run.settings) for run in runs]
    names = sorted({name for values in flat for name in values})
    unlike = [n for n in names if len({json.dumps(v.get(n)) for v in flat}) > 1]
    if unlike:
        rows = [[n, *(setting_text(v.get(n)) for v in flat)] for n in unlike]
        head = ["setting", *(run.label for run in runs)]
        yield Table("Settings that differ", head, rows, left=len(head))
