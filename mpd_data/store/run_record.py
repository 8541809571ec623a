"""What a folder says of itself: its kind, and the settings that its content was made with.

Rounds and trainings keep this in run.json, pipeline runs in pipeline.json, studies in
settings.json. A folder that was made before kinds were written is known by what it holds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.files import read_json, write_json_atomic
from mpd_data.common.hashing import differences

Kind = Literal["round", "training", "pipeline", "study"]

# The file of each kind, its name in messages, and who reads it.
_KINDS: dict[Kind, tuple[str, str, str]] = {
    "round": ("run.json", "a round", "mpd-gen stats shows it."),
    "training": ("run.json", "a training", "mpd-train resumes it, mpd-report draws its report."),
    "pipeline": (
        "pipeline.json", "a pipeline run", "mpd-rounds resumes it, mpd-report draws its report; its"
        " rounds are in data/ and eval/, its trainings in train/.",
    ),
    "study": (
        "settings.json", "a study", "mpd-study resumes it; its rounds and trainings are in stages/."
    ),
}  # fmt: skip


def read_record(folder: Path, kind: Kind = "round") -> dict[str, Any]:
    """Return what the file of a folder of `kind` holds; {} where there is none. Raise DataError
    where it is not what `write_record` writes."""
    path = folder / _KINDS[kind][0]
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    stages = record.get("stages", {})
    works = list(stages.values()) if isinstance(stages, dict) else [stages]
    if "identity" in record:  # of a training
        works.append(record)
    for work in works:
        if not isinstance(work, dict) or not all(
            isinstance(work.get(name), dict) for name in ("identity", "details")
        ):
            raise DataError(
                f"{path}: expected `identity` and `details` of each stage or training, as the"
                " commands write them. Restore it from a copy."
            )
    return record


def write_record(folder: Path, kind: Kind, record: Mapping[str, Any]) -> None:
    """Replace the file of a folder of `kind` by `record` and its kind."""
    write_json_atomic(folder / _KINDS[kind][0], {"kind": kind, **record})


def kind_of(folder: Path) -> Kind | None:
    """Return the kind of a folder; None where it is of none, new ones included."""
    record = read_record(folder)
    if record.get("kind") == "training" or "identity" in record:
        return "training"
    if record or any(folder.glob("*.manifest.jsonl")):
        return "round"
    if any((folder / name).is_file() for name in ("pipeline.json", "seeds.json")):
        return "pipeline"
    study = read_record(folder, "study")
    if study.get("kind") == "study" or {"seeds", "group"} <= study.keys():
        return "study"
    return None


def require_kind(folder: Path, kind: Kind) -> None:
    """Raise ConfigError where `folder` is of another kind, naming the command that reads it."""
    actual = kind_of(folder)
    if actual not in (None, kind):
        _, name, readers = _KINDS[actual]
        raise ConfigError(f"{folder}: the folder of {name}, not of {_KINDS[kind][1]}. {readers}")


def require_same_settings(
    folder: Path,
    label: str,
    saved: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    remedy: str,
    has_results: bool,
    counts: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Raise ConfigError where `label` began in `folder` with other settings than `settings`.
    `saved`: its recorded settings, None where it has none; results without a record are refused
    too. `remedy`: what the user can do. `counts`: as for `differences`."""
    if saved is None:
        if has_results:
            raise ConfigError(
                f"{folder}: holds results of {label}, but run.json does not say how they were made."
                f" Restore run.json. {remedy}"
            )
    elif lines := differences(saved, settings, counts=counts):
        listing = "\n  ".join(lines)
        raise ConfigError(
            f"{folder}: {label} was started here with other settings:\n  {listing}\n"
            f"Give the saved settings to resume. {remedy}"
        )
