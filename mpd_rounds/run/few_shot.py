"""The examples of the baseline few_shot: kept rewrites of round 1, as earlier turns."""

import json
from pathlib import Path

import polars as pl

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import atomic_file
from mpd_data.common.hashing import content_key
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.config import RolloutsConfig
from mpd_data.inspect.stats import collect, scan_round
from mpd_data.prompts.special import turn_of
from mpd_rounds.run.layout import Plan

COUNT = 3


def write_examples(plan: Plan) -> None:
    """Write the examples of each baseline that shows rewrites. Raise as `_write`."""
    by_file: dict[Path, list[RolloutsConfig]] = {}
    for step in plan.baselines(from_rewrites=True):
        assert isinstance(step.config, RolloutsConfig)
        assert step.config.examples is not None
        by_file.setdefault(step.config.examples, []).append(step.config)
    for path, configs in by_file.items():
        _write(path, plan.data(1), configs)


def _write(path: Path, shards: Path, configs: list[RolloutsConfig]) -> None:
    """Write COUNT kept rewrites of the round in `shards` to `path`, as the examples that the
    rollouts of `configs` read.

    The problems are those with the smallest hashes of their ids among the kept ones; the solution
    is the trace that the student would be trained on. A file that holds them is left as it is, so
    that finished steps stay finished. Raise ConfigError if no rewrite was kept.
    """
    kept = scan_round(shards, "distill").filter(pl.col("status") == "ok")
    ids: list[str] = collect(kept.select(pl.col("prompt_id").unique()))["prompt_id"].to_list()
    if not ids:
        raise ConfigError(
            f"{shards}: no rewrite was kept, so there are no examples to show. Look at the"
            f" statuses with mpd-gen stats {shards}, or remove the baseline."
        )
    chosen = sorted(ids, key=content_key)[:COUNT]
    traces = collect(
        kept.filter(pl.col("prompt_id").is_in(chosen))
        .sort("row_id")
        .unique("prompt_id", keep="first", maintain_order=True)
        .select("prompt_id", "rollout_id", "loss_start", "input_ids")
    )
    drafts = scan_round(shards).filter(pl.col("row_id").is_in(traces["rollout_id"].to_list()))
    problems = dict(collect(drafts.select("prompt_id", "problem")).iter_rows())
    config = configs[0]
    model = resolve_model(config.model, config.revision, config.trust_remote_code, weights=False)
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    turn = turn_of(model, tokenizer, config.trust_remote_code)
    by_id = {row["prompt_id"]: row for row in traces.iter_rows(named=True)}
    lines = []
    for prompt_id in chosen:
        row = by_id[prompt_id]
        start = row["loss_start"]
        before, ids_ = row["input_ids"][:start], row["input_ids"][start:]
        solution = turn.read(ids_[:-1] if ids_[-1] in turn.stop_ids else ids_, before)
        # Each set may have its own column for problems.
        example = {config.prompt_column: problems[prompt_id] for config in configs}
        example |= {config.examples_column: solution for config in configs}
        lines.append(json.dumps(example, ensure_ascii=False) + "\n")
    text = "".join(lines)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text)
