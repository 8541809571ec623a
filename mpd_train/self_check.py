"""Compare the trainer's models with the engines that sampled and scored, before the first step.

An engine may compute a family otherwise than transformers does: other rotary factors, a window or a
norm's offset left out, another output embedding. Training then starts from a loss that no weights
explain, and nothing else shows it. The engine's log-probabilities of some of its own tokens are in
the round: of the first drafts (`sampled_logprobs`), and of the rewrites (the stored top K). Here
the model of the same version computes them again, packed, as in training.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import ModelFiles
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import open_shard, read_columns, read_metadata
from mpd_train.config import LossConfig
from mpd_train.data.batches import Batch, load_pack
from mpd_train.data.shard_set import Pack
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import autocast
from mpd_train.setup import TrainSetup

# The mean of the differences over so many tokens is compared with what rounding explains, in nats:
# where both sides compute in float32, and in bfloat16, whose logits of 20 are 0.06 apart.
_TOKENS = 256
_EXACT, _ROUNDED = 0.01, 0.1
_DRAFTS = ["row_id", "prompt_ids", "completion_ids", "sampled_logprobs"]
_ENOUGH = 8


class _Draft(NamedTuple):
    """Token ids of a prompt and of what was sampled, and the log-probabilities of the latter.
    `name`: its file and row."""

    name: str
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]


def require_one_model(
    prepared: TrainSetup, student: CausalLM, teacher: CausalLM | None, pack: Pack
) -> None:
    """Raise ConfigError where a model gives tokens another probability here than in the engine that
    ran it for these shards: the student as the sampler of their drafts, either model as the teacher
    that scored the rows of `pack`. Models of other versions are not compared."""
    shards = prepared.shards
    for folder in dict.fromkeys(file.parent.parent for file in shards.files):
        paths = RoundDir(folder).shard_paths("rollouts")
        if not paths:
            continue
        metadata = read_metadata(paths[0])
        if not _is_of(metadata["model"], student.files):
            continue
        drafts = [
            draft
            for draft in _drafts(paths, prepared.config.pack_length)
            # Padding rows of the embedding, which a model may sample, are not in the loss.
            if max(draft.prompt + draft.ids) < prepared.vocab_size
        ]
        if drafts:
            names = [draft.name for draft in drafts]
            _compare(prepared, student, *_packed(drafts), names, metadata["dtype"])
    # Mixed targets come from two contexts.
    if shards.targets.name == "mixed":
        return
    models = [model for model in (student, teacher) if model is not None]
    for model in models:
        if _is_of(shards.metadata.get("teacher", {}), model.files):
            batch = load_pack(shards, pack)
            at = batch.topk_ids == batch.labels[:, None]
            stored = batch.topk_logprobs.masked_fill(~at, -torch.inf).amax(1)
            batch = replace(
                batch,
                input_ids=batch.teacher_input_ids,
                position_ids=batch.teacher_position_ids,
                loss_positions=batch.teacher_loss_positions,
            )
            places = [(shards.groups[group], row) for group, row in pack.rows]
            names = [f"{group.path}, row {row} of row group {group.index}" for group, row in places]
            _compare(prepared, model, batch, stored, names, shards.metadata["dtype"])


def _is_of(recorded: dict[str, str], files: ModelFiles) -> bool:
    """Whether shards were made with this very model."""
    return {k: v for k, v in recorded.items() if k != "name"} == files.identity()


def _drafts(paths: list[Path], room: int) -> list[_Draft]:
    """Return the drafts with log-probabilities, shortest first, cut to `room` tokens together."""
    drafts = []
    for path in paths:
        known = read_columns(path, ["sampled_logprobs"])["sampled_logprobs"].is_valid().to_numpy()
        if not known.any():
            continue
        with open_shard(path) as file:
            table = file.read(columns=_DRAFTS).filter(pa.array(known))
        drafts += [
            _Draft(f"{path}, row {row_id}", prompt, ids, logprobs)
            for row_id, prompt, ids, logprobs in zip(*table.to_pydict().values(), strict=True)
        ]
        if len(drafts) >= _ENOUGH:
            break
    taken = []
    for draft in sorted(drafts, key=lambda draft: len(draft.ids)):
        rest = room - len(draft.prompt)
        if rest > 0:
            taken.append(draft._replace(ids=draft.ids[:rest], logprobs=draft.logprobs[:rest]))
            room = rest - len(taken[-1].ids)
    return taken


def _packed(drafts: list[_Draft]) -> tuple[Batch, Tensor]:
    """Return the drafts as one pack without records, and their log-probabilities [n]."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    start = 0
    for draft in drafts:
        sequence, first = draft.prompt + draft.ids, len(draft.prompt)
        ids += sequence
        positions += range(len(sequence))
        places += range(start + first - 1, start + len(sequence) - 1)
        labels += draft.ids
        start += len(sequence)
    n = len(labels)
    tokens, at, states = torch.tensor([ids]), torch.tensor([positions]), torch.tensor(places)
    # The loss wants a record; only its cross-entropy is read.
    nothing = torch.full((n, 1), math.log(0.5))
    batch = Batch(
        tokens, at, states, torch.tensor(labels), torch.tensor(labels)[:, None], nothing,
        nothing[:, 0], tokens, at, states, torch.ones(n), torch.zeros(n),
    )  # fmt: skip
    return batch, torch.tensor([x for draft in drafts for x in draft.logprobs])


def _compare(
    prepared: TrainSetup, model: CausalLM, batch: Batch, stored: Tensor, names: list[str],
    dtype: str,
) -> None:  # fmt: skip
    """Raise ConfigError unless `model` gives the labels of `batch` their `stored` log-probabilities
    [n], -inf where unknown. `names`: of the rows. `dtype`: the engine's."""
    was_training = model.model.training
    model.model.eval()
    # Compiled layers would be compiled once more, for this pass alone.
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.no_grad(), autocast(prepared.device, prepared.dtype):
        output = pack_loss(
            model, None, batch.to(prepared.device), prepared.vocab_size, LossConfig(ce_weight=0.5),
            1.0,
        )  # fmt: skip
    model.model.train(was_training)
    known = stored > -torch.inf
    apart = (-output.cross_entropy.float().cpu() - stored)[known].abs()
    row = (batch.position_ids[0] == 0).cumsum(0)[batch.loss_positions][known] - 1
    exact = dtype == "float32" and prepared.dtype == torch.float32
    most = _EXACT if exact else _ROUNDED
    for first in range(0, len(apart), _TOKENS):
        # The last part is longer, not shorter.
        last = first + _TOKENS if first + 2 * _TOKENS <= len(apart) else len(apart)
        part = apart[first:last]
        if not float(part.mean()) <= most:
            name = names[int(row[first + int(part.argmax())])]
            raise ConfigError(
                f"{name}: {model.files.name} gives its tokens"
                " other log-probabilities here than in the engine that made them: by"
                f" {float(part.mean()):.2g} nats a token, expected at most {most:g}. Engine and"
                " trainer compute this model differently, as with other rotary factors, a sliding"
                " window or a norm's offset that one of them leaves out, or another output"
                " embedding. Make the round with --backend transformers, which computes as the"
                " trainer does, in another folder."
            )
        if last == len(apart):
            break
