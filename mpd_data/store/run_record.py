"""What a folder says of itself: its kind, and the settings that its content was made with.

Rounds and trainings keep this in run.json, pipeline runs in pipeline.json, studies in
settings.json. A folder that was made before kinds were written is known by what it holds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mpd_data.common.errors import ConfigError, DataError, OtherSettingsError
from mpd_data.common.files import read_json, write_json_atomic
from mpd_data.common.hashing import differences
from mpd_data.common.records import Record, require

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


class _Model(Record):
    version: str


class _Identity(Record):
    model: _Model | None = None
    teacher: _Model | None = None
    student: _Model | None = None
    num_samples: int = Field(1, ge=1)


class _Details(Record):
    config: dict[str, Any] = Field(default_factory=dict)
    rows: int | None = Field(None, ge=0)
    steps: int | None = Field(None, ge=0)


class _Speed(Record):
    device: str
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    start_seconds: float = Field(ge=0)
    seconds: float = Field(ge=0)


class _Stage(Record):
    identity: _Identity
    details: _Details
    speed: _Speed | None = None


class _RunRecord(Record):
    """run.json of a round (`stages`) or of a training (the others)."""

    stages: dict[str, _Stage] = Field(default_factory=dict)
    identity: _Identity = Field(default_factory=_Identity)
    details: _Details = Field(default_factory=_Details)


def read_record(folder: Path, kind: Kind = "round") -> dict[str, Any]:
    """Return what the file of a folder of `kind` holds; {} where there is none. Raise DataError
    where it cannot be read, is not a JSON object, or is not what its readers rely on."""
    path = folder / _KINDS[kind][0]
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise DataError(f"{path}: a link to nothing. Restore it from a copy.") from error
        return {}
    if path.name == "run.json":
        require(_RunRecord, record, str(path), "Restore it from a copy.")
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


def require_once(rounds: Sequence[Path]) -> None:
    """Raise ConfigError where two of the folders `rounds`, or of their distill/, are one round, and
    where one is of another kind."""
    seen: dict[Path, Path] = {}
    for path in rounds:
        require_kind(path, "round")
        folder = (path.parent if path.name == "distill" else path).resolve()
        if folder in seen:
            raise ConfigError(
                f"{path}: the same round as {seen[folder]}; its rows would count twice. Give each"
                " round once."
            )
        seen[folder] = path


def require_same_settings(
    folder: Path,
    label: str,
    saved: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    remedy: str,
    has_results: bool,
    counts: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Raise OtherSettingsError where `label` began in `folder` with others than `settings`.
    `saved`: its recorded settings, None where it has none; results without a record are refused
    too. `remedy`: what the user can do. `counts`: as for `differences`."""
    if saved is None:
        if has_results:
            raise OtherSettingsError(
                f"{folder}: holds results of {label}, but run.json does not say how they were made."
                f" Restore run.json. {remedy}"
            )
    elif lines := differences(saved, settings, counts=counts):
        listing = "\n  ".join(lines)
        raise OtherSettingsError(
            f"{folder}: {label} was started here with other settings:\n  {listing}\n"
            f"Give the saved settings to resume. {remedy}"
        )
