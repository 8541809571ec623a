"""How well do measures of a rewrite separate those with their working from those without?

    python benchmarks/support.py                              pocket traces, made with and without
    python benchmarks/support.py --round ROUND --labels labels.jsonl --model STUDENT --strip

Labels have a line {"row_id": …, "working": true or false} for each rewrite to look at. With --strip
each rewrite that has its working gets two counterparts without: its equations' results alone, and
its last paragraph alone. Each model scores all rewrites with the transformers engine. Prints a
Markdown table: for each measure the chance that a rewrite with working has the larger value (AUROC;
ties count half, a rewrite without the measure has the largest value, because it passes the filter),
and the means of both kinds.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.config import EngineConfig
from mpd_data.engines.protocol import Engine, Scores
from mpd_data.engines.transformers import TransformersEngine
from mpd_data.inspect.stats import scan_round
from mpd_data.prompts.chat import ChatFormatter
from mpd_data.select.support import NUM_ALTERNATIVES, Measure, Places
from pipelines.pocket.world import (
    IN_DISTRIBUTION,
    ROUTES,
    Problem,
    concise_trace,
    exact,
    problems,
)

POCKET = Path(__file__).resolve().parents[1] / "pipelines" / "pocket" / "models"


@dataclass(frozen=True)
class Rewrite:
    """A rewrite with its label; `trace_ids` ends with the end token."""

    key: str
    kind: str
    working: bool
    prompt_ids: list[int]
    trace_ids: list[int]
    answer: str


# -- pocket traces ----------------------------------------------------------------------------


def pocket_traces(problem: Problem, route: str) -> dict[str, str]:
    """Return a trace with all its lines ("working") and traces of the same answer that leave lines
    out, by kind."""
    lines: list[tuple[str, str]] = []  # (label, calculation)

    def work(label: str, left: int, sign: str, right: int) -> int:
        result = exact(label, left, sign, right)  # type: ignore[arg-type]  # a Sign
        lines.append((label, f"{left} {sign} {right} = {result}"))
        return result

    ROUTES[problem.family][route](problem, work)
    first = f"{lines[0][0]} : {lines[0][1]} ."
    middle = {
        "answer only": "",
        "announced": " ".join(f"{label} ." for label, _ in lines) + " ",
        "named": f"so now {problem.answer} . ",
        "half": f"{first} so now {problem.answer} . ",
    }
    end = f"</think> answer {problem.answer}"
    bare = {kind: f"<think> plan {route} . {text}{end}" for kind, text in middle.items()}
    return {"working": concise_trace(problem, route), **bare}


def pocket_rewrites(count: int, seed: int = 0) -> list[Rewrite]:
    """Return the traces of `count` problems: one with working and the others of each."""
    rng = random.Random(seed)
    tokenizer = load_tokenizer(resolve_model(str(POCKET / "student")))
    chat = ChatFormatter(tokenizer, {})
    found = []
    for number, problem in zip(range(count), problems(rng, IN_DISTRIBUTION, "test"), strict=False):
        _, prompt_ids = chat.render(problem.text)
        route = rng.choice(sorted(ROUTES[problem.family]))
        for kind, text in pocket_traces(problem, route).items():
            ids = [*chat.spelling.encode(text), tokenizer.eos_token_id]
            key, answer = f"{number} {kind}", str(problem.answer)
            found.append(Rewrite(key, kind, kind == "working", prompt_ids, ids, answer))
    return found


# -- rewrites of a round ----------------------------------------------------------------------


def without_working(trace: str) -> dict[str, str]:
    """Return made counterparts of a trace in LaTeX, by kind: each equation's result ("named"),
    and the last paragraph alone ("answer only")."""

    def result(found: re.Match[str]) -> str:
        opening, content, closing = found.groups()
        return f"{opening}{content.rpartition('=')[2]}{closing}"

    named = re.sub(r"(\\[(\[])(.+?)(\\[)\]])", result, trace, flags=re.DOTALL)
    return {"named": named, "answer only": trace.rpartition("\n\n")[2]}


def stripped(rewrites: list[Rewrite], tokenizer: Any) -> list[Rewrite]:
    """Return the counterparts of the rewrites with working, as `without_working` makes them."""
    made = []
    for one in (one for one in rewrites if one.working):
        *ids, end = one.trace_ids
        for kind, text in without_working(tokenizer.decode(ids)).items():
            trace = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
            made.append(
                Rewrite(f"{one.key} {kind}", kind, False, one.prompt_ids, trace, one.answer)
            )
    return made


def labelled_rewrites(folder: Path, labels: Path) -> list[Rewrite]:
    """Return the rewrites of a round that have a label. Exit where one is not in the round."""
    lines = labels.read_text(encoding="utf-8").splitlines()
    working = {row["row_id"]: row["working"] for row in map(json.loads, lines)}
    columns = ("row_id", "input_ids", "loss_start", "rewrite_answer")
    rows = scan_round(folder, "distill").select(columns).collect().to_dicts()
    found = [
        Rewrite(
            row["row_id"],
            "working" if working[row["row_id"]] else "without",
            bool(working[row["row_id"]]),
            row["input_ids"][: row["loss_start"]],
            row["input_ids"][row["loss_start"] :],
            row["rewrite_answer"],
        )
        for row in rows
        if row["row_id"] in working and row["input_ids"] is not None
    ]
    if missing := working.keys() - {rewrite.key for rewrite in found}:
        raise SystemExit(f"{labels}: {folder} has no rewrite {sorted(missing)[0]}")
    return found


# -- measures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A rewrite, what the package measures of it, and the scores that this follows from."""

    rewrite: Rewrite
    places: Places
    trace: Scores
    columns: dict[str, float | None]

    @property
    def answer(self) -> float | None:
        """log p(answer | rewrite before it), where it stands last."""
        if not self.places.answers:
            return None
        last = self.places.answers[-1]
        return float(self.trace.target_logprobs[last.start : last.stop].sum())

    @property
    def raw_step(self) -> float | None:
        """The least log-probability of a new value, its place included."""
        logs = self.trace.target_logprobs
        values = (float(logs[step.start : step.stop].sum()) for step in self.places.steps)
        return min(values, default=None)


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value is not None), default=None)


MEASURES: dict[str, Callable[[Scored], float | None]] = {
    "answer_support": lambda s: s.columns["answer_support"],
    "weakest_step": lambda s: s.columns["weakest_step"],
    "log p(answer, rewrite before it)": lambda s: s.answer,
    "mean log-probability": lambda s: float(s.trace.target_logprobs.mean()),
    "weakest new number, raw": lambda s: s.raw_step,
    "min(weakest_step, log p(answer))": lambda s: _least(s.columns["weakest_step"], s.answer),
    "min(weakest_step, answer_support)": lambda s: _least(*s.columns.values()),
    "weakest_step + answer_support": lambda s: sum(v for v in s.columns.values() if v is not None),
}


def score(rewrites: list[Rewrite], model_name: str, dtype: str) -> list[Scored]:
    """Return the rewrites as a model scores them."""
    model = resolve_model(model_name)
    measure = Measure(load_tokenizer(model))
    config = EngineConfig(backend="transformers", dtype=dtype)  # type: ignore[arg-type]
    found: dict[str, Scores] = {}
    places = {}
    with closing(TransformersEngine(model, config, False, model.context)) as engine:
        for one in rewrites:
            place = measure.places(one.prompt_ids, one.trace_ids[:-1], one.answer)
            places[one.key] = place
            engine.submit_score(one.key, one.prompt_ids, one.trace_ids, NUM_ALTERNATIVES)
            if place.answers:
                alone = measure.alone(place, one.prompt_ids, one.trace_ids)
                engine.submit_score(f"{one.key}/", *alone, NUM_ALTERNATIVES)
        drain(engine, found)
    scored = []
    for one in rewrites:
        trace, place = found[one.key], places[one.key]
        columns = measure.columns(place, one.trace_ids, trace, found.get(f"{one.key}/"))
        scored.append(Scored(one, place, trace, columns))
    return scored


def drain(engine: Engine, found: dict[str, Scores]) -> None:
    while engine.in_flight:
        for result in engine.step():
            assert isinstance(result, Scores)
            found[result.key] = result


def auroc(positive: list[float], negative: list[float]) -> float:
    """Return the chance that a positive is larger than a negative; ties count half."""
    pairs = np.array(positive)[:, None], np.array(negative)[None]
    return float((pairs[0] > pairs[1]).mean() + (pairs[0] == pairs[1]).mean() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--round", type=Path, help="Folder of a round. Default: pocket traces.")
    parser.add_argument("--labels", type=Path, help="Labels of its rewrites, JSONL.")
    parser.add_argument(
        "--strip", action="store_true", help="Add made ones without working to those with it."
    )
    parser.add_argument("--model", action="append", help="Models that score; repeatable.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--problems", type=int, default=60, help="Pocket problems.")
    parser.add_argument("--out", type=Path, help="Also write the values of each rewrite, JSONL.")
    given = parser.parse_args()
    if (given.round is None) != (given.labels is None):
        parser.error("--round and --labels go together")
    if given.round is None:
        rewrites = pocket_rewrites(given.problems)
    else:
        rewrites = labelled_rewrites(given.round, given.labels)
    models = given.model or [str(POCKET / "student"), str(POCKET / "teacher")]
    if given.strip:
        rewrites += stripped(rewrites, load_tokenizer(resolve_model(models[0])))
    kinds = list(dict.fromkeys(one.kind for one in rewrites if not one.working))
    lines = []
    print("| model | measure | " + " | ".join(["AUROC", *kinds, "means", "null"]) + " |")
    print("|---" * (5 + len(kinds)) + "|")
    for name in models:
        scored = score(rewrites, name, given.dtype)
        table = {measure: [of(one) for one in scored] for measure, of in MEASURES.items()}
        for measure, values in table.items():
            of_kind: dict[str, list[float]] = {}
            for one, value in zip(scored, values, strict=True):
                of_kind.setdefault(one.rewrite.kind, []).append(
                    math.inf if value is None else value
                )
            right = of_kind.pop("working", [])
            wrong = [value for kind in of_kind.values() for value in kind]
            cells = [auroc(right, wrong), *(auroc(right, of_kind[kind]) for kind in kinds)]
            means = (np.mean([v for v in side if v < math.inf]) for side in (right, wrong))
            print(
                f"| {Path(name).name} | {measure} | "
                + " | ".join(f"{cell:.3f}" for cell in cells)
                + " | {:.2f}, {:.2f}".format(*means)
                + f" | {values.count(None)} |",
                flush=True,
            )
        for index, one in enumerate(scored):
            values_of = {measure: values[index] for measure, values in table.items()}
            labels = {"row_id": one.rewrite.key, "working": one.rewrite.working, "model": name}
            lines.append(json.dumps(labels | values_of))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
