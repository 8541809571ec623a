"""`mpd-gen validate`: does a round keep the contract? Reads everything, changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mpd_data.errors import ConfigError, DataError
from mpd_data.filters import UNUSABLE
from mpd_data.schema import ENUMS, SCHEMAS
from mpd_data.shards import ROTTEN, STAGES, RoundDir, Stage, read_metadata, sha256_of

# Settings in which all shards of one folder must agree.
_SAME = (
    "tokenizer",
    "vocab_size",
    "num_logprobs",
    "score_context",
    "score_temperature",
    "template",
)
# float16 rounding lets the stored mass pass 1 by a little.
_MASS_SLACK = 5e-3


def validate_round(path: Path) -> list[str]:
    """Every breach of the contract, a line each: file, row, expected, found. Empty if sound.

    Raises ConfigError where `path` holds no round at all.
    """
    round_dir = RoundDir(path)
    stages = [stage for stage in STAGES if round_dir.folder(stage).is_dir()]
    if not stages:
        raise ConfigError(f"{path}: not a round; expected rollouts/ or distill/ in it.")
    problems: list[str] = []
    rollouts: dict[str, list[int]] = {}
    for stage in stages:
        problems += _check_manifest(round_dir, stage)
        seen: set[str] = set()
        first: dict[str, Any] | None = None
        for file in sorted(round_dir.folder(stage).iterdir()):
            if not (file.name.startswith("part-") and file.suffix == ".parquet"):
                problems.append(
                    f"{file}: only part-*.parquet may lie in a shard folder; move it out."
                )
                continue
            try:
                metadata = read_metadata(file)
                table = pq.read_table(file, page_checksum_verification=True)
            except (DataError, *ROTTEN) as error:
                problems.append(f"{file}: cannot be read: {error}")
                continue
            if not table.schema.remove_metadata().equals(SCHEMAS[stage]):
                problems.append(f"{file}: its columns or types are not those of the contract.")
                continue
            first = first or metadata
            problems += [
                f"{file}: {name} is {metadata.get(name)!r}, another shard here has"
                f" {first.get(name)!r}."
                for name in _SAME
                if metadata.get(name) != first.get(name)
            ]
            rows = _Rows(file, table)
            problems += rows.keys_and_enums(seen)
            if stage == "rollouts":
                problems += rows.rollouts()
                rollouts.update(
                    zip(
                        table.column("row_id").to_pylist(),
                        table.column("prompt_ids").to_pylist(),
                        strict=True,
                    )
                )
            elif stage == "distill":
                problems += rows.distill(metadata, rollouts)
    return problems


def _check_manifest(round_dir: RoundDir, stage: Stage) -> list[str]:
    try:
        manifest = {shard.name: shard for shard in round_dir.manifest(stage)}
    except DataError as error:
        return [str(error)]
    files = {file.name: file for file in round_dir.shard_paths(stage)}
    path = round_dir.manifest_path(stage)
    problems = [f"{path}: names {name}, which is not there." for name in manifest.keys() - files]
    problems += [f"{path}: does not name {name}." for name in files.keys() - manifest]
    for name in sorted(manifest.keys() & files.keys()):
        if sha256_of(files[name]) != manifest[name].sha256:
            problems.append(
                f"{files[name]}: its bytes are not the ones that were committed (sha256)."
            )
    return problems


class _Rows:
    """The checks on one shard's rows."""

    def __init__(self, file: Path, table: pa.Table) -> None:
        self._file = file
        self._table = table
        self._ids: list[str] = table.column("row_id").to_pylist()

    def _say(self, index: int, text: str) -> str:
        return f"{self._file}, row {index} ({self._ids[index]}): {text}"

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._table.column(name).to_numpy()
        return values

    def _list(self, name: str, index: int) -> npt.NDArray[Any] | None:
        scalar = self._table.column(name)[index]
        return scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None

    def keys_and_enums(self, seen: set[str]) -> list[str]:
        problems = []
        for index, key in enumerate(self._ids):
            if key in seen:
                problems.append(self._say(index, "this key is in the round twice."))
            seen.add(key)
        for name in ENUMS.keys() & set(self._table.schema.names):
            for index, value in enumerate(self._table.column(name).to_pylist()):
                if value is not None and value not in ENUMS[name]:
                    problems.append(self._say(index, f"{name} is {value!r}, not in {ENUMS[name]}."))
        return problems

    def rollouts(self) -> list[str]:
        problems = []
        for ids, count in (
            ("prompt_ids", "num_prompt_tokens"),
            ("completion_ids", "num_completion_tokens"),
        ):
            found = pa.compute.list_value_length(self._table.column(ids)).to_numpy()
            for index in np.flatnonzero(found != self._numbers(count)):
                problems.append(
                    self._say(index, f"{ids} has {found[index]} ids, {count} says otherwise.")
                )
        return problems

    def distill(self, metadata: dict[str, Any], rollouts: dict[str, list[int]]) -> list[str]:
        problems: list[str] = []
        statuses = self._table.column("status").to_pylist()
        origins = self._table.column("rollout_id").to_pylist()
        for index, status in enumerate(statuses):
            if rollouts and origins[index] not in rollouts:
                problems.append(self._say(index, f"its rollout {origins[index]} is not here."))
            elif status == "ok" or (
                # A refilter leaves a rewrite that it rejects its scores.
                status not in UNUSABLE and self._list("topk_ids", index) is not None
            ):
                problems += [
                    self._say(index, text)
                    for text in self._scored(index, metadata, rollouts.get(origins[index]))
                ]
            elif self._list("topk_ids", index) is not None:
                problems.append(self._say(index, f"{status!r}, yet it has log-probabilities."))
        return problems

    def _scored(self, index: int, metadata: dict[str, Any], prompt: list[int] | None) -> list[str]:
        found = [
            self._list(name, index)
            for name in ("input_ids", "topk_ids", "topk_logprobs", "tail_logprobs")
        ]
        counts = [self._table.column(c)[index] for c in ("loss_start", "num_rewritten_tokens")]
        if any(values is None for values in found) or not all(c.is_valid for c in counts):
            return ["scored or kept (ok), yet ids, counts or log-probabilities are missing."]
        input_ids, ids, logprobs, tail = (values for values in found if values is not None)
        k, vocab = metadata["num_logprobs"], metadata["vocab_size"]
        start = int(self._table.column("loss_start")[index].as_py())
        n = int(self._table.column("num_rewritten_tokens")[index].as_py())
        if len(input_ids) != start + n or n == 0:
            return [f"{len(input_ids)} input ids, expected loss_start {start} + {n} rewritten."]
        if len(ids) != n * k or len(logprobs) != n * k or len(tail) != n:
            return [
                f"expected {n} x {k} log-probabilities and {n} tails, found {len(ids)} ids,"
                f" {len(logprobs)} log-probabilities and {len(tail)} tails."
            ]
        problems = []
        if prompt is not None and list(input_ids[:start]) != prompt:
            problems.append("input_ids do not begin with the rollout's prompt.")
        if input_ids[-1] != metadata["eos_token_id"]:
            problems.append(f"ends with id {input_ids[-1]}, not the end token.")
        if (metadata["score_context"] == "rewrite") != (
            self._list("teacher_prompt_ids", index) is not None
        ):
            problems.append(f"teacher_prompt_ids contradict {metadata['score_context']!r} scoring.")
        ids, logprobs = ids.reshape(n, k), logprobs.reshape(n, k).astype(np.float64)
        if input_ids.min() < 0 or ids.min() < 0 or max(ids.max(), input_ids.max()) >= vocab:
            problems.append(f"ids outside the vocabulary of {vocab}.")
        if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
            problems.append("an id stands twice in one token's top K.")
        if (np.diff(logprobs, axis=1) > 0).any():
            problems.append("log-probabilities are not sorted, most probable first.")
        mass = np.exp(logprobs).sum(axis=1) + np.exp(tail.astype(np.float64))
        if np.isnan(mass).any() or (np.abs(mass - 1) > _MASS_SLACK).any():
            worst = int(np.nanargmax(np.abs(mass - 1)))
            problems.append(f"probabilities and tail of token {worst} sum to {mass[worst]:.4f}.")
        return problems
