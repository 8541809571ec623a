"""What the trace browser shows, as plain values for JSON.

Names are short, since they are repeated for each row. page.js reads them:

    i row id        p prompt id     r round         s status        f problem (text)
    g gold answer   m metadata      d draft         w rewrite       o whether the draft is right
    k whether the rewrite is right  a whether it keeps the draft's answer
    n tokens of the draft           t tokens of the rewrite         x what else is known, by name
    v the rewrite's tokens: `ids`, `q` (of each: -1000 ln p under the teacher; -1: not in its top
      K), `h` (100 times the entropy of its distribution) and `top` (ids and -1000 ln p of the best)
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mpd_data.common.errors import ConfigError, DataError, pip_install
from mpd_data.common.models import load_tokenizer, resolve_model, tokenizer_hash
from mpd_data.inspect.stats import collect, scan, scan_round
from mpd_data.prompts.special import Spelling
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata
from mpd_data.store.trainings import read_row_log, row_logs

# Bytes of text in a page. A browser takes some seconds for more.
_MOST_TEXT = 48_000_000
# Of the teacher's distribution at a token.
_BEST = 4
_MEASURES = (
    "compression_ratio", "draft_overlap", "repetition", "pass_rate", "answer_support",
    "weakest_step",
)  # fmt: skip
DISTILL = (
    "row_id", "rollout_id", "prompt_id", "round", "status", "rewrite", "rewrite_answer",
    "keeps_answer", "is_correct", "num_original_tokens", "num_rewritten_tokens", "check_error",
    *_MEASURES,
)  # fmt: skip
SCORED = ("row_id", "input_ids", "loss_start", "topk_ids", "topk_logprobs", "tail_logprobs")
ROLLOUT = (
    "row_id", "prompt_id", "round", "problem", "gold_answer", "metadata", "completion", "answer",
    "is_correct", "finish_reason", "num_completion_tokens", "repetition",
)  # fmt: skip


# Of a training's rows, by the first 16 digits of their keys.
Divergences = Mapping[str, float]


def divergences(trainings: Sequence[Path], rounds: Sequence[Path]) -> dict[str, float]:
    """Return how far the student was from the teacher on each row of these trainings, in nats per
    token, before the last step that met it, of the training that is given last. Raise ConfigError
    for a folder that does not say and for a training that met no row of the `rounds`, DataError for
    a damaged file."""
    frame = scan(list(rounds), "distill")
    keys = pl.Series("row", [], pl.String)
    if trainings and frame is not None:
        keys = collect(frame.select(row=pl.col("row_id").str.slice(0, 16)))["row"]
    latest: dict[str, float] = {}
    for folder in trainings:
        files = row_logs(folder)
        if not files:
            raise ConfigError(
                f"{folder}: no rows/rank-*.jsonl here, in which mpd-train writes the rows'"
                " divergences. Give the folder of a training."
            )
        own: dict[str, tuple[int, float]] = {}
        for file in files:
            for line in read_row_log(file):
                if line["step"] >= own.get(line["row"], (0, 0.0))[0]:
                    own[line["row"]] = line["step"], line["kl"]
        if not keys.is_in(list(own)).any():
            raise ConfigError(
                f"{folder}: this training met no row of {', '.join(map(str, rounds))}. Give one on"
                " these rounds."
            )
        latest |= {row: kl for row, (_, kl) in own.items()}
    return latest


def rewrites_of(folder: Path, count: int, trained: Divergences) -> dict[str, Any]:
    """Return `rows` of a round, `count` at most, those with the smallest keys; how many there are
    in `total`; the `limits` of the filters; and the text of the tokens in them as `pieces`, by id.
    A round without rewrites gives its drafts. `note` says what cannot be shown."""
    distill = scan([folder], "distill")
    if distill is None:
        rollouts = scan_round(folder)
        total = collect(rollouts.select(pl.len())).item()
        chosen = collect(rollouts.select("row_id").bottom_k(count, by="row_id"))["row_id"]
        rows = [draft_row(row) for row in _of(rollouts, chosen, ROLLOUT)]
        return {"rows": _within(rows), "total": total, "limits": {}, "pieces": {}, "note": ""}
    total = collect(distill.select(pl.len())).item()
    chosen = collect(distill.select("row_id").bottom_k(count, by="row_id"))["row_id"]
    found = _of(distill, chosen, DISTILL)
    drafts = pl.Series([row["rollout_id"] for row in found]).unique()
    by_id = {row["row_id"]: row for row in _of(scan_round(folder), drafts, ROLLOUT)}
    rows = [rewrite_row(row, by_id.get(row["rollout_id"], {}), trained) for row in found]
    rows = _within(rows)
    spelling, note = spelling_of(folder)
    pieces: dict[int, str] = {}
    if spelling is not None:
        kept = pl.Series([row["i"] for row in rows if row["s"] == "ok"], dtype=pl.String)
        scored = {row["row_id"]: row for row in _of(distill, kept, SCORED)}
        for row in rows:
            if row["i"] in scored and scored[row["i"]]["topk_ids"]:
                row["v"] = tokens_of(scored[row["i"]], f"{folder}/distill")
                spell(row["v"], spelling, pieces)
    limits = read_metadata(RoundDir(folder).shard_paths("distill")[0]).get("filters") or {}
    return {"rows": rows, "total": total, "limits": limits, "pieces": pieces, "note": note}


def pairs_of(base: Path, new: Path, count: int) -> list[dict[str, Any]]:
    """Return `count` problems that both models were asked, those with the smallest ids first: `b`
    and `a`, the samples of the base and of the new model, and `c`, how much of its share of right
    samples the problem won."""
    sides = [scan_round(folder) for folder in (base, new)]
    ids = [collect(side.select("prompt_id").unique())["prompt_id"] for side in sides]
    both = ids[0].filter(ids[0].is_in(ids[1].implode())).sort().head(count)
    if both.is_empty():
        raise ConfigError(
            f"{base} and {new} have no problem in common. Give two models' answers to the same"
            " problems."
        )
    found = []
    for side in sides:
        rows = collect(side.filter(pl.col("prompt_id").is_in(both.implode())).select(ROLLOUT))
        found.append(rows.sort("row_id").partition_by("prompt_id", as_dict=True))
    pairs = []
    for prompt in both:
        before, after = (side[(prompt,)].to_dicts() for side in found)
        share, base_share = _share_right(after), _share_right(before)
        change = None if share is None or base_share is None else round(share - base_share, 4)
        pairs.append(
            {
                "i": prompt,
                "f": before[0]["problem"],
                "g": before[0]["gold_answer"],
                "m": metadata_of(before[0]),
                "b": [_sample(row) for row in before],
                "a": [_sample(row) for row in after],
                "c": change,
            }
        )
    return _within(pairs)


def _share_right(rows: Sequence[dict[str, Any]]) -> float | None:
    right = [row["is_correct"] for row in rows if row["is_correct"] is not None]
    return sum(right) / len(right) if right else None


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "d": row["completion"], "o": row["is_correct"], "n": row["num_completion_tokens"],
        "cut": row["finish_reason"] == "length",
    }  # fmt: skip


def _of(frame: pl.LazyFrame, keys: pl.Series, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows with these keys, in order of their keys."""
    rows = collect(frame.filter(pl.col("row_id").is_in(keys.implode())).select(columns))
    return rows.sort("row_id").to_dicts()


def _within(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first rows, as many as `_MOST_TEXT` allows."""
    size = 0
    for number, row in enumerate(rows):
        size += len(json.dumps(row, ensure_ascii=False))
        if size > _MOST_TEXT:
            return rows[:number]
    return rows


def metadata_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a rollout whose values are plain, by name."""
    try:
        values = json.loads(row.get("metadata") or "{}")
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    # NaN is no JSON.
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, str | int) or (isinstance(value, float) and np.isfinite(value))
    }


def draft_row(row: dict[str, Any]) -> dict[str, Any]:
    known = {"finish_reason": row["finish_reason"], "draft answer": row["answer"]}
    return {
        "i": row["row_id"], "p": row["prompt_id"], "r": row["round"], "s": "draft",
        "f": row["problem"], "g": row["gold_answer"], "m": metadata_of(row), "d": row["completion"],
        "w": None, "o": row["is_correct"], "k": None, "a": None,
        "n": row["num_completion_tokens"], "t": None,
        "x": known | {"repetition": _rounded(row["repetition"])},
    }  # fmt: skip


def rewrite_row(row: dict[str, Any], draft: dict[str, Any], trained: Divergences) -> dict[str, Any]:
    measures = {name: _rounded(row[name]) for name in _MEASURES}
    measures["divergence"] = _rounded(trained.get(row["row_id"][:16]))
    known = {
        "draft answer": draft.get("answer"), "rewrite answer": row["rewrite_answer"],
        "check error": row["check_error"],
    }  # fmt: skip
    return {
        "i": row["row_id"], "p": row["prompt_id"], "r": row["round"], "s": row["status"],
        "f": draft.get("problem", ""), "g": draft.get("gold_answer"), "m": metadata_of(draft),
        "d": draft.get("completion", ""), "w": row["rewrite"], "o": draft.get("is_correct"),
        "k": row["is_correct"], "a": row["keeps_answer"], "n": row["num_original_tokens"],
        "t": row["num_rewritten_tokens"],
        "x": {name: value for name, value in (known | measures).items() if value is not None},
    }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    # NaN is no JSON.
    return None if value is None or not np.isfinite(value) else round(value, 3)


def tokens_of(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Return what the page shows of a scored row. Raise DataError where scores and tokens do not
    belong together."""
    counts = [len(row[name] or ()) for name in ("topk_ids", "topk_logprobs", "tail_logprobs")]
    n = len((row["input_ids"] or ())[row["loss_start"] or 0 :])
    is_whole = n and counts[0] == counts[1] and counts[0] % n == 0 and counts[2] == n
    if not is_whole or None in (*row["input_ids"], *row["topk_ids"], *row["topk_logprobs"]):
        raise DataError(
            f"{source}: the scores of row {row['row_id']} do not fit its tokens. mpd-gen validate"
            " says what is damaged."
        )
    ids = np.asarray(row["input_ids"][row["loss_start"] :])
    top_ids = np.asarray(row["topk_ids"]).reshape(len(ids), -1)
    top = np.asarray(row["topk_logprobs"], dtype=np.float64).reshape(len(ids), -1)
    tail = np.asarray(row["tail_logprobs"], dtype=np.float64)
    is_target = top_ids == ids[:, None]
    chosen = np.where(is_target.any(1), (top * is_target).sum(1), np.inf)
    mass = np.concatenate([np.exp(top), np.exp(tail)[:, None]], axis=1)
    logs = np.concatenate([top, tail[:, None]], axis=1)
    terms = np.where(mass > 0, mass * np.where(mass > 0, logs, 0.0), 0.0)
    return {
        "ids": ids.tolist(),
        "q": [-1 if value == np.inf else _thousandths(value) for value in chosen],
        "h": np.rint(-100 * terms.sum(1)).astype(int).tolist(),
        "top": [
            [part for pair in zip(of, map(_thousandths, at), strict=True) for part in pair]
            for of, at in zip(top_ids[:, :_BEST].tolist(), top[:, :_BEST].tolist(), strict=True)
        ],
    }


def _thousandths(logprob: float) -> int:
    return min(round(-1000 * logprob), 99_999) if np.isfinite(logprob) else 99_999


def spelling_of(folder: Path) -> tuple[Spelling | None, str]:
    """Return what spells the round's tokens, or why there is none."""
    stages = RoundDir(folder).run_info().get("stages", {})
    config = stages.get("rollouts", {}).get("details", {}).get("config", {})
    name = config.get("model")
    if not isinstance(name, str):
        return None, "The round does not say which model sampled it, so tokens are not shown."
    try:
        path = _where_it_ran(folder, config, name)
        files = resolve_model(path, config.get("revision"), weights=False)
        tokenizer = load_tokenizer(files)
    except ConfigError:
        return (
            None,
            f"Tokens and their colours are not shown: they need the tokenizer of {name}, which is"
            " not here. Run mpd-gen view in the folder in which the round was made.",
        )
    except ModuleNotFoundError as error:
        return (
            None,
            f"Tokens are not shown ({error}). Install what reads them: {pip_install('train')}.",
        )
    saved = read_metadata(RoundDir(folder).shard_paths("distill")[0]).get("tokenizer")
    if saved != tokenizer_hash(tokenizer):
        return None, f"Tokens are not shown: the tokenizer of {name} is not the round's any more."
    return Spelling(tokenizer), ""


def _where_it_ran(folder: Path, config: dict[str, Any], name: str) -> str:
    """Return the path of a model that the round names relative to where its command ran: that is
    known where `folder` ends with the round's own --out."""
    out = Path(str(config.get("out", ""))).parts
    here = folder.resolve().parts
    if not out or here[-len(out) :] != out:
        return name
    there = Path(*here[: -len(out)]) / name
    return str(there) if there.is_dir() else name


def spell(tokens: dict[str, Any], spelling: Spelling, pieces: dict[int, str]) -> None:
    """Add the text of ids that are not known yet, each as it stands after another token."""
    for before, token in _neighbours(tokens):
        if token not in pieces and min(before, token) >= 0:
            first, both = spelling.decode([before]), spelling.decode([before, token])
            pieces[token] = both[len(first) :] if both.startswith(first) else both


def _neighbours(tokens: dict[str, Any]) -> Iterator[tuple[int, int]]:
    ids = tokens["ids"]
    for at, token in enumerate(ids):
        before = ids[at - 1] if at else ids[-1]
        yield before, token
        for other in tokens["top"][at][::2]:
            yield before, other
