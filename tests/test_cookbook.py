"""The queries of docs/polars.md give what plain loops over the rows give."""

import ast
import json
import math
import re
import shutil
from collections import Counter, defaultdict
from itertools import pairwise
from statistics import fmean

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, edit_rows

TEXT = (ROOT / "docs" / "polars.md").read_text(encoding="utf-8")
PREAMBLE, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Data:
    """Two rounds in `folder`, and their rows as lists of dicts."""

    def __init__(self, folder):
        self.folder = folder
        self.rollouts = self._rows("rollouts")
        self.distill = self._rows("distill")
        self.kept = [row for row in self.distill if row["status"] == "ok"]
        self.by_id = {row["row_id"]: row for row in self.rollouts}

    def _rows(self, stage):
        files = sorted(self.folder.glob(f"round*/{stage}/*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]

    def answer(self, heading):
        """What the heading's query gives, as rows."""
        (section,) = (text for text in SECTIONS if text.startswith(heading + "\n"))
        (code,) = BLOCK.findall(section)
        names = {}
        exec(self._here(*BLOCK.findall(PREAMBLE)), names)  # noqa: S102
        tree = ast.parse(self._here(code))
        query = tree.body.pop()
        exec(compile(tree, heading, "exec"), names)  # noqa: S102
        return eval(ast.unparse(query), names).to_dicts()  # noqa: S307

    def _here(self, code):
        return code.replace('"data/round*/', f'"{self.folder}/round*/')


def become_second_round(row):
    """What the real round may lack: truncated samples, prompts without gold answer or family,
    prompts of which nothing was kept."""
    number = int(row["prompt_id"][-5:])
    row |= {"round": 2, "row_id": f"second-{row['row_id']}"}
    if "rollout_id" in row:
        row["rollout_id"] = f"second-{row['rollout_id']}"
        if number < 4:
            row["status"] = ("longer", "repetitive")[len(row["rewrite"]) % 2]
    elif number in (5, 6):
        row |= {"metadata": None, "gold_answer": None, "is_correct": None}
    elif number in (7, 8) and row["sample_idx"] < number - 6:
        row |= {"finish_reason": "length", "is_correct": False}


def reject_one_prompt(row):
    if row["prompt_id"].endswith("00003"):
        row["status"] = "longer"


@pytest.fixture(scope="module")
def data(round_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cookbook")
    shutil.copytree(round_dir, folder / "round1")
    shutil.copytree(round_dir, folder / "round2")
    edit_rows(folder / "round1", "distill", reject_one_prompt)
    for stage in ("rollouts", "distill"):
        edit_rows(folder / "round2", stage, become_second_round)
    return Data(folder)


def grouped(rows, *names):
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def same(found, expected, ordered=True):
    """Equal rows, floats nearly (float32 columns are summed in another order here)."""
    if not ordered:
        found, expected = (sorted(side, key=lambda row: str(row)) for side in (found, expected))
    assert len(found) == len(expected) > 0
    for got, wanted in zip(found, expected, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-5)
            assert got[name] == value, (name, got, wanted)


def lengths_by_correctness(found, data):
    same(
        found,
        [
            {
                "round": round_,
                "is_correct": correct,
                "samples": len(rows),
                "mean": fmean(row["num_completion_tokens"] for row in rows),
                "median": sorted(row["num_completion_tokens"] for row in rows)[len(rows) // 2],
            }
            for (round_, correct), rows in sorted(
                grouped(data.rollouts, "round", "is_correct").items(),
                key=lambda item: (item[0][0], {None: 0, False: 1, True: 2}[item[0][1]]),
            )
        ],
    )
    assert len(found) == 5


def shortening_by_prompt(found, data):
    expected = []
    for (prompt_id,), rows in grouped(data.distill, "prompt_id").items():
        kept = [row for row in rows if row["status"] == "ok"]
        expected.append(
            {
                "prompt_id": prompt_id,
                "rewrites": len(rows),
                "kept": len(kept),
                "original": fmean(row["num_original_tokens"] for row in kept) if kept else None,
                "ratio": fmean(row["compression_ratio"] for row in kept) if kept else None,
                "reasons": sorted({row["status"] for row in rows} - {"ok"}),
            }
        )
    same(
        sorted(found, key=lambda row: row["prompt_id"]),
        sorted(expected, key=lambda row: row["prompt_id"]),
    )
    ratios = [row["ratio"] for row in found]
    never = [row["prompt_id"] for row in found if row["ratio"] is None]
    assert any(prompt_id.endswith("00003") for prompt_id in never)
    assert ratios[: -len(never)] == sorted(ratios[: -len(never)])


def ratio_by_length(found, data):
    assert [(row["round"], row["quarter"]) for row in found] == [
        (round_, quarter) for round_ in (0, 2) for quarter in (1, 2, 3, 4)
    ]
    for round_ in (0, 2):
        rows = [row for row in data.distill if row["round"] == round_]
        rows = [row for row in rows if row["compression_ratio"] is not None]
        lengths = sorted(row["num_original_tokens"] for row in rows)
        ours = [row for row in found if row["round"] == round_]
        ends = [math.ceil(len(rows) * quarter / 4) for quarter in (1, 2, 3, 4)]
        assert [row["longest"] for row in ours] == [lengths[end - 1] for end in ends]
        # Drafts of one length may fall on either side of a bound: means are compared as a whole.
        sizes = [end - start for start, end in pairwise([0, *ends])]
        for name, values in (
            ("ratio", [row["compression_ratio"] for row in rows]),
            ("kept", [row["status"] == "ok" for row in rows]),
        ):
            whole = sum(size * row[name] for size, row in zip(sizes, ours, strict=True))
            assert whole / len(rows) == pytest.approx(fmean(values), rel=1e-5)
        assert ours[0]["ratio"] > ours[3]["ratio"]


def share_by_status(found, data):
    counts = Counter((row["round"], row["status"]) for row in data.distill)
    totals = Counter(row["round"] for row in data.distill)
    order = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    same(
        found,
        [
            {"round": r, "status": status, "rows": n, "share": n / totals[r]}
            for (r, status), n in order
        ],
    )


def changed_answers(found, data):
    changed = []
    for row in data.distill:
        if row["status"] == "answer_changed":
            draft = data.by_id[row["rollout_id"]]
            changed.append(
                {
                    **{name: row[name] for name in ("round", "prompt_id")},
                    **{name: draft[name] for name in ("gold_answer", "answer")},
                    "rewrite_answer": row["rewrite_answer"],
                    "problem": draft["problem"],
                    "draft": draft["completion"],
                    "rewrite": row["rewrite"],
                }
            )
    assert len(found) == 20 < len(changed)
    assert all(row in changed for row in found)
    places = sorted((row["round"], row["prompt_id"]) for row in changed)
    assert [(row["round"], row["prompt_id"]) for row in found] == places[:20]
    assert all(row["answer"] != row["rewrite_answer"] for row in found)


def truncated_prompts(found, data):
    expected = []
    for (round_, prompt_id), rows in grouped(data.rollouts, "round", "prompt_id").items():
        truncated = sum(row["finish_reason"] == "length" for row in rows)
        if truncated:
            row = {"round": round_, "prompt_id": prompt_id, "samples": len(rows)}
            expected.append(row | {"truncated": truncated})
    expected.sort(key=lambda row: (-row["truncated"], row["round"], row["prompt_id"]))
    same(found, expected)
    ours = [(row["prompt_id"][-1], row["truncated"]) for row in found if row["round"] == 2]
    assert {("8", 2), ("7", 1)} <= set(ours)


def difficulty(found, data):
    prompts = defaultdict(list)
    for (round_, _), rows in grouped(data.rollouts, "round", "prompt_id").items():
        if rows[0]["gold_answer"] is not None:
            right = sum(row["is_correct"] for row in rows)
            tokens = fmean(row["num_completion_tokens"] for row in rows)
            prompts[round_, len(rows), right].append(tokens)
    same(
        found,
        [
            {"round": r, "n": n, "right": right, "prompts": len(tokens), "tokens": fmean(tokens)}
            for (r, n, right), tokens in sorted(prompts.items())
        ],
    )
    assert sum(row["prompts"] for row in found if row["round"] == 2) == 58


def uncertainty(found, data):
    expected = []
    for (round_,), rows in sorted(grouped(data.kept, "round").items()):
        top, tail = [], []
        for row in rows:
            count = row["num_rewritten_tokens"]
            k = len(row["topk_logprobs"]) // count
            assert k == 64
            for position in range(count):
                top.append(max(row["topk_logprobs"][position * k : (position + 1) * k]))
            tail += row["tail_logprobs"]
        expected.append(
            {
                "round": round_,
                "tokens": len(top),
                "top_logprob": fmean(top),
                "unsure": fmean(math.exp(value) < 0.5 for value in top),
                "tail_mass": fmean(math.exp(value) for value in tail),
            }
        )
    same(found, expected)


def by_family(found, data):
    groups = defaultdict(list)
    for row in data.rollouts:
        family = json.loads(row["metadata"] or "{}").get("family")
        groups[row["round"], family].append(row)
    order = sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    expected = []
    for (round_, family), rows in order:
        graded = [row["is_correct"] for row in rows if row["is_correct"] is not None]
        expected.append(
            {
                "round": round_,
                "family": family,
                "samples": len(rows),
                "accuracy": fmean(graded) if graded else None,
                "tokens": fmean(row["num_completion_tokens"] for row in rows),
            }
        )
    same(found, expected)
    assert [row["family"] for row in found] == ["shop", "tally", None, "shop", "tally"]


def repeated_text(found, data):
    def share(ids):
        seen, repeated = set(), 0
        for start in range(len(ids) - 3):
            gram = tuple(ids[start : start + 4])
            repeated += gram in seen
            seen.add(gram)
        return repeated / max(len(ids) - 3, 1)

    names = [
        "round", "prompt_id", "sample_idx", "repetition", "finish_reason", "is_correct",
        "completion",
    ]  # fmt: skip
    order = sorted(
        data.rollouts,
        key=lambda row: (-row["repetition"], row["round"], row["prompt_id"], row["sample_idx"]),
    )
    same(
        found,
        [
            {name: row[name] for name in names} | {"repetition": share(row["completion_ids"])}
            for row in order[:20]
        ],
    )


def side_by_side(found, data):
    order = sorted(
        data.kept, key=lambda row: (row["compression_ratio"], row["round"], row["prompt_id"])
    )
    same(
        found,
        [
            {
                **{name: row[name] for name in ("round", "prompt_id", "compression_ratio")},
                "problem": data.by_id[row["rollout_id"]]["problem"],
                "draft": data.by_id[row["rollout_id"]]["completion"],
                "rewrite": row["rewrite"],
            }
            for row in order[:20]
        ],
    )


def to_train_on(found, data):
    same(
        found,
        [
            {
                "rows": len(data.kept),
                "loss_tokens": sum(len(r["input_ids"]) - r["loss_start"] for r in data.kept),
                "tokens": sum(len(row["input_ids"]) for row in data.kept),
                "bytes": sum(
                    json.loads(line)["bytes"]
                    for manifest in data.folder.glob("round*/distill.manifest.jsonl")
                    for line in manifest.open()
                ),
            }
        ],
    )


CHECKS = {
    "Are wrong answers longer than right ones?": lengths_by_correctness,
    "Which prompts got shorter most, and which were never kept?": shortening_by_prompt,
    "Do long drafts shrink more?": ratio_by_length,
    "What share is kept, and why is the rest not?": share_by_status,
    "Where did the teacher change the answer?": changed_answers,
    "Which prompts run into the length limit?": truncated_prompts,
    "How hard are the prompts?": difficulty,
    "How sure is the teacher of what it wrote?": uncertainty,
    "How does accuracy differ by family?": by_family,
    "Which traces repeat themselves?": repeated_text,
    "What do rewrites look like beside their drafts?": side_by_side,
    "How much is there to train on?": to_train_on,
}


def test_every_query_of_the_document_is_checked():
    assert [section.splitlines()[0] for section in SECTIONS] == list(CHECKS)


@pytest.mark.parametrize("heading", CHECKS)
def test_a_query_gives_what_the_rows_say(data, heading):
    CHECKS[heading](data.answer(heading), data)
