"""Histograms, and stats and comparisons by a metadata key, against plain loops over the rows."""

import json
import shutil
from collections import defaultdict
from itertools import cycle, groupby
from statistics import fmean, quantiles

import polars as pl
import pytest
from conftest import edit_rows, run
from conftest import rows as all_rows

from mpd_data.common.errors import ConfigError
from mpd_data.common.hashing import content_key
from mpd_data.common.text import format_histogram
from mpd_data.inspect.compare import (
    MIN_PROBLEMS,
    compare,
    evaluate,
    hard_third,
    on_hard_third,
    show,
    verdict,
)
from mpd_data.inspect.stats import BINS, round_stats
from mpd_rounds.report.queries import rollout_lengths

HOSTILE = "\x1b[31mred"
# Read as a glob pattern, this name matches nothing.
ODD_FOLDER = f"round[1]{HOSTILE}\n with a name that is longer than its column"


def rows(folder):
    return rows_of(folder, "rollouts")


def rows_of(folder, stage):
    return all_rows(folder, stage).to_dicts()


def lengthen(row):
    row["num_completion_tokens"] = 3 * row["num_completion_tokens"] + int(row["prompt_id"][-2:])


@pytest.fixture(scope="module")
def longer(round_dir, tmp_path_factory):
    """The real round with longer traces, every fifth answer wrong, and some samples fewer."""
    folder = shutil.copytree(round_dir, tmp_path_factory.mktemp("longer") / "new")

    def change(row):
        lengthen(row)
        row["is_correct"] = row["is_correct"] and int(row["row_id"], 16) % 5 > 0
        return row["sample_idx"] < 3 or not row["prompt_id"].endswith("1")

    edit_rows(folder, "rollouts", change)
    return folder


def test_lengths_are_those_of_the_samples(round_dir, longer):
    """Of counts of equal lengths the tables are made; here each sample is looked at."""
    tables = round_stats([round_dir, longer])
    for folder in (round_dir, longer):
        frame = all_rows(folder)
        (found,) = [row for row in tables["rollouts"] if row["folder"] == str(folder)]
        (behaviour,) = [row for row in tables["behaviour"] if row["folder"] == str(folder)]
        parts = {
            (row["finish_reason"], row["is_correct"]): row
            for row in tables["rollouts_by"]
            if row["folder"] == str(folder)
        }
        for key, part in frame.group_by("finish_reason", "is_correct"):
            same_lengths(parts.pop(key), part["num_completion_tokens"])
        assert not parts
        same_lengths(found, frame["num_completion_tokens"])
        for name, right in (("right_tokens", True), ("wrong_tokens", False)):
            tokens = frame.filter(pl.col("is_correct") == right)["num_completion_tokens"]
            assert behaviour[name] == pytest.approx(tokens.mean())


def same_lengths(found, tokens):
    assert found["samples"] == len(tokens)
    assert found["mean_tokens"] == pytest.approx(tokens.mean())
    assert found["max"] == tokens.max()
    for q in (0.1, 0.5, 0.9, 0.99):
        assert found[f"p{round(100 * q)}"] == tokens.quantile(q, "nearest"), q


def test_what_a_damaged_cell_makes_of_a_mean_is_null(round_dir, tmp_path):
    """JSON has no NaN."""
    damaged = shutil.copytree(round_dir, tmp_path / "round")
    edit_rows(damaged, "rollouts", lambda row: row.update(repetition=float("nan")))
    said = run("mpd-gen", "stats", damaged, "--json").stdout
    tables = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["repetition"] for row in tables["behaviour"]] == [None]


def test_histograms_count_the_rows_in_the_same_bins(round_dir, longer):
    tables = json.loads(run("mpd-gen", "stats", round_dir, longer, "--json").stdout)
    edges = []
    for folder in (round_dir, longer):
        bins = [row for row in tables["trace_lengths"] if row["folder"] == str(folder)]
        lengths = [row["num_completion_tokens"] for row in rows(folder)]
        for row in bins:
            end = float("inf") if row["below"] is None else row["below"]
            assert row["samples"] == sum(row["from"] <= length < end for length in lengths)
            assert row["share"] == row["samples"] / len(lengths)
        assert sum(row["samples"] for row in bins) == len(lengths)
        edges.append([(row["from"], row["below"]) for row in bins])
    assert edges[0] == edges[1]
    starts = [start for start, _ in edges[0]]
    assert [below for _, below in edges[0]] == [*starts[1:], None]
    assert BINS / 2.5 <= len(starts) <= BINS
    # The open bin is the tail of the longest round, not most of it.
    assert starts[-1] <= quantiles(lengths, n=100)[98] <= starts[-1] + 2 * starts[1]


def test_a_histogram_fits_a_terminal_and_is_no_markup(round_dir, tmp_path):
    folder = shutil.copytree(round_dir, tmp_path / ODD_FOLDER)
    said = run("mpd-gen", "stats", folder).stdout
    assert "\x1b" not in said
    text = said.partition("trace lengths\n")[2].partition("\nbehaviour")[0]
    assert "…" in text.splitlines()[0]
    assert text.splitlines()[0].endswith("its column")
    lengths = sorted(row["num_completion_tokens"] for row in rows(round_dir))
    middle = lengths[len(lengths) // 2]
    (marked,) = [line for line in text.splitlines() if "%*" in line]
    start, end = marked.split()[0].split("-")
    assert int(start) <= middle <= int(end)
    tallest = max(round_stats([round_dir])["trace_lengths"], key=lambda row: row["share"])
    label, share, bar = max(text.splitlines(), key=lambda line: line.count("█")).split()
    assert label == f"{tallest['from']}-{tallest['below'] - 1}"
    assert share == f"{tallest['share']:.0%}"
    assert bar == 40 * "█"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_histograms_of_many_rounds_stay_narrow(count):
    """One scale for all: a bar half as long is half the share."""
    table = []
    for number in range(count):
        shares = (0.5, 0.5, 0.0) if number else (0.0, 0.999, 0.001)
        for index, share in enumerate(shares):
            below = None if index == 2 else 10_000 * (index + 1)
            row = {"folder": f"data/of/a/run/round{number}", "from": 10_000 * index}
            table.append(row | {"below": below, "samples": round(1000 * share), "share": share})
    lines = format_histogram(table).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert all(f"round{number}" in text for number in range(count))
    blocks = [list(block) for filled, block in groupby(lines, key=bool) if filled]
    assert all(len(block) == 4 for block in blocks[:-1])
    _, first, second, tail = blocks[0]
    assert first.split()[:1] == ["0-9,999"]
    assert second.split()[0] == "10,000-19,999"
    full = second.split()[1].removeprefix("100%*")
    assert set(full) == {"█"}
    assert len(full) >= 9
    assert tail.split() == ["20,000+", "<1%", "▏"]
    if count > 1:
        # As many below as above: the median is the larger one.
        assert first.split()[1] == "50%"
        half = second.split()[2]
        assert half.startswith("50%*")
        assert abs(2 * len(half.removeprefix("50%*")) - len(full)) <= 2


def test_stats_by_a_metadata_key(round_dir, tmp_path):
    other = shutil.copytree(round_dir, tmp_path / "other")
    levels = [10, 9, HOSTILE, None]

    def change(row):
        level = levels[int(row["prompt_id"][-1]) % 4]
        row["metadata"] = None if level is None else json.dumps({"a level": level, "n": 1})
        row["round"] = 1
        if row["sample_idx"] == 3:
            row |= {"finish_reason": "length", "answer": None}
        elif row["sample_idx"] == 2:
            row["answer"] = None

    edit_rows(other, "rollouts", change)
    found = json.loads(run("mpd-gen", "stats", other, "--by", "a level", "--json").stdout)["groups"]
    # Numbers by size, then text, then what has none.
    assert [row["group"] for row in found] == ["9", "10", HOSTILE, None]
    groups = defaultdict(list)
    for row in rows(other):
        groups[json.loads(row["metadata"] or "{}").get("a level")].append(row)
    for line, level in zip(found, [9, 10, HOSTILE, None], strict=True):
        group = groups[level]
        lengths = sorted(row["num_completion_tokens"] for row in group)
        assert line["folder"] == str(other)
        assert line["samples"] == len(group)
        assert line["accuracy"] == pytest.approx(fmean(row["is_correct"] for row in group))
        assert line["no_answer"] == pytest.approx(1 / 3)
        assert line["truncated"] == pytest.approx(1 / 4)
        assert line["mean_tokens"] == pytest.approx(fmean(lengths))
        assert line["p90"] in lengths[round(0.9 * len(group)) - 2 : round(0.9 * len(group)) + 2]
    said = run("mpd-gen", "stats", other, round_dir, "--by", "a level").stdout
    assert "\x1b" not in said
    lines = said.partition("by a level\n")[2].partition("\n\n")[0].splitlines()
    # Rows of the round that lacks the key are next to those of this one that do.
    assert [line.split("  ")[0] for line in lines[2:]] == ["9", "10", "\\x1b[31mred", "-", "-"]
    assert [str(round_dir) in line for line in lines[2:]] == [False, False, False, True, False]


def test_a_key_that_no_row_carries_is_an_error(round_dir, tmp_path):
    said = run("mpd-gen", "stats", round_dir, "--by", "famly", code=1).stderr
    assert "no rollout has a value of it in its metadata. Did you mean 'family'?" in said
    said = run("mpd-gen", "compare", round_dir, round_dir, "--by", "subject", code=1).stderr
    assert "They carry 'family'." in said
    bare = shutil.copytree(round_dir, tmp_path / "bare")
    edit_rows(bare, "rollouts", lambda row: row.update(metadata=None))
    with pytest.raises(ConfigError, match="with --metadata-columns"):
        round_stats([bare], "family")
    shutil.rmtree(bare / "rollouts")
    with pytest.raises(ConfigError, match="no rollouts here"):
        round_stats([bare], "family")


def test_compare_by_a_metadata_key(round_dir, longer, tmp_path):
    """A group's line is what comparing its problems alone gives."""
    asked = ["mpd-gen", "compare", round_dir, longer, "--by", "family"]
    result = json.loads(run(*asked, "--json").stdout)
    whole = compare(round_dir, longer)
    assert {name: value for name, value in result.items() if name != "groups"} == whole
    assert [group["group"] for group in result["groups"]] == ["shop", "tally"]
    assert sum(group["problems"] for group in result["groups"]) == 60
    said = run(*asked).stdout
    for group in result["groups"]:
        sides = []
        for side in (round_dir, longer):
            part = shutil.copytree(side, tmp_path / group["group"] / side.name)
            edit_rows(part, "rollouts", lambda row: group["group"] in row["metadata"])  # noqa: B023
            sides.append(part)
        alone = compare(*sides)
        assert group["problems"] == alone["base"]["problems"] > 10
        for name in ("token_reduction", "accuracy_difference"):
            assert group[name] == alone[name]
            assert group[f"{name}_interval"] == alone[f"{name}_interval"]
        for side, folder in zip(("base", "new"), sides, strict=True):
            mine = rows(folder)
            for name, column in (
                ("accuracy", "is_correct"), ("mean_tokens", "num_completion_tokens"),
            ):  # fmt: skip
                problems = defaultdict(list)
                for row in mine:
                    problems[row["prompt_id"]].append(row[column])
                assert group[side][name] == pytest.approx(fmean(map(fmean, problems.values())))
        low, high = group["accuracy_difference_interval"]
        assert low < group["accuracy_difference"] < high < 0
        (line,) = [line for line in said.splitlines() if line.startswith(group["group"])]
        assert line.split("  ")[-1] == "{:.1f}% [{:.1f}, {:.1f}]".format(
            *(100 * x for x in (group["token_reduction"], *group["token_reduction_interval"]))
        )
        assert f"{group['base']['mean_tokens']:,.1f} -> {group['new']['mean_tokens']:,.1f}" in line


def test_a_problems_group_is_known_from_either_side(round_dir, longer, tmp_path):
    bare = shutil.copytree(longer, tmp_path / "bare")
    edit_rows(bare, "rollouts", lambda row: row.update(metadata=None))
    both = compare(round_dir, longer, "family")["groups"]
    assert compare(round_dir, bare, "family")["groups"] == both
    flipped = compare(bare, round_dir, "family")["groups"]
    assert [group["new"] for group in flipped] == [group["base"] for group in both]
    edit_rows(bare, "rollouts", lambda row: row.update(metadata='{"family":"tally"}'))
    with pytest.raises(ConfigError, match="has 'shop' on one side and 'tally' on the other"):
        compare(round_dir, bare, "family")


def test_the_hard_third_is_chosen_by_other_samples_than_it_is_measured_by(
    round_dir, longer, tmp_path
):
    result = compare(round_dir, longer)
    halves, new = [], []
    for folder, found in ((round_dir, halves), (longer, new)):
        for parity in (0, 1):
            by_prompt = defaultdict(list)
            for row in rows(folder):
                if row["sample_idx"] % 2 == parity:
                    by_prompt[row["prompt_id"]].append(row)
            found.append(by_prompt)

    def mean(rows, column="is_correct"):
        return fmean(row[column] for row in rows)

    gains, before, right = [], [], []
    for choosing, measured, after in zip(halves, halves[::-1], new[::-1], strict=True):
        hardest = sorted(choosing, key=lambda p: (mean(choosing[p]), content_key(p)))[:20]
        gains += [mean(after[p]) - mean(measured[p]) for p in hardest]
        before += [mean(measured[p], "num_completion_tokens") for p in hardest]
        right += [mean(measured[p]) for p in hardest]
    hard = result["hard_third"]
    assert hard["accuracy_difference"] == pytest.approx(fmean(gains))
    assert hard["base"]["mean_tokens"] == pytest.approx(fmean(before))
    low, high = hard["accuracy_difference_interval"]
    assert low < hard["accuracy_difference"] < high
    assert 20 <= hard["problems"] < 40
    assert hard["base"]["accuracy"] == pytest.approx(fmean(right))
    said = run("mpd-gen", "compare", round_dir, longer).stdout.partition("the hard third")[2]
    assert f"{100 * hard['accuracy_difference']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" in said
    assert "mostly chance" not in said
    twice = shutil.copytree(round_dir, tmp_path / "twice")
    edit_rows(twice, "rollouts", lambda row: row["sample_idx"] < 2)
    assert "mostly chance" in show(compare(twice, round_dir), None)
    same = compare(round_dir, round_dir)["hard_third"]
    assert same["accuracy_difference"] == same["token_reduction"] == 0
    # Without a second sample nothing is left to measure with.
    once = shutil.copytree(round_dir, tmp_path / "once")
    edit_rows(once, "rollouts", lambda row: row["sample_idx"] == 0)
    assert compare(once, longer)["hard_third"] is None
    assert on_hard_third(once, longer) is None


def test_of_equally_hard_problems_the_hash_decides():
    names = ["a", "b", "c", "d"]
    problems = pl.DataFrame({"prompt_id": names, "accuracy": [0.5, 0.5, 0.5, 1.0]})
    first, second, _ = sorted("abc", key=content_key)
    assert hard_third(problems) == hard_third(problems.reverse()) == [first, second]


def test_a_problem_counts_once_whatever_its_samples(round_dir, tmp_path):
    """So that the means, their intervals and the saving are of one thing."""
    fewer = shutil.copytree(round_dir, tmp_path / "fewer")
    edit_rows(
        fewer, "rollouts", lambda row: row["sample_idx"] == 0 or row["num_completion_tokens"] > 100
    )
    result = compare(round_dir, fewer)
    base, new = result["base"], result["new"]
    for part in ("token", "thinking", "answer"):
        name = "mean_tokens" if part == "token" else f"{part}_tokens"
        assert result[f"{part}_reduction"] == pytest.approx(1 - new[name] / base[name])
    low, high = new["mean_tokens_interval"]
    assert low < new["mean_tokens"] < high
    assert new["thinking_tokens"] + new["answer_tokens"] == pytest.approx(new["mean_tokens"])
    over_samples = all_rows(fewer)["num_completion_tokens"].mean()
    assert new["mean_tokens"] < over_samples - 5


def test_a_saving_that_moves_behind_the_thinking_shows(round_dir, tmp_path):
    moved = shutil.copytree(round_dir, tmp_path / "moved")

    def half_the_thinking_is_answer(row):
        row["num_thinking_tokens"] -= row["num_thinking_tokens"] // 2

    edit_rows(moved, "rollouts", half_the_thinking_is_answer)
    result = compare(round_dir, moved)
    assert result["token_reduction"] == 0
    assert result["token_reduction_interval"] == [0, 0]
    for side, folder in (("base", round_dir), ("new", moved)):
        frame = all_rows(folder)
        thinking = frame["num_thinking_tokens"]
        assert result[side]["thinking_tokens"] == pytest.approx(thinking.mean())
        answer = (frame["num_completion_tokens"] - thinking).mean()
        assert result[side]["answer_tokens"] == pytest.approx(answer)
    base, new = result["base"], result["new"]
    saved = 1 - new["thinking_tokens"] / base["thinking_tokens"]
    assert result["thinking_reduction"] == pytest.approx(saved) == pytest.approx(0.5, abs=0.02)
    low, high = result["answer_reduction_interval"]
    assert low < result["answer_reduction"] < high < -1
    said = run("mpd-gen", "compare", round_dir, moved).stdout
    assert f"of the thinking part saved {100 * saved:.1f}% [" in said
    assert "thinking" in said.splitlines()[0]
    table = round_stats([moved])["thinking_and_answer"]
    assert [row["traces"] for row in table] == ["rollouts", "kept rewrites"]
    for row, stage, tokens in zip(
        table, ("rollouts", "distill"), ("completion", "rewritten"), strict=True
    ):
        rows_ = [r for r in rows_of(moved, stage) if r.get("status", "ok") == "ok"]
        assert row["samples"] == len(rows_)
        assert row["thinking_tokens"] == pytest.approx(
            fmean(r["num_thinking_tokens"] for r in rows_)
        )
        all_tokens = fmean(r[f"num_{tokens}_tokens"] for r in rows_)
        assert row["thinking_tokens"] + row["answer_tokens"] == pytest.approx(all_tokens)
        assert row["thinking_share"] == pytest.approx(row["thinking_tokens"] / all_tokens)
    # A model without a thinking part has neither.
    for side in (round_dir, moved):
        bare = shutil.copytree(side, tmp_path / "bare" / side.name)
        edit_rows(bare, "rollouts", lambda row: row.update(num_thinking_tokens=None))
        edit_rows(bare, "distill", lambda row: row.update(num_thinking_tokens=None))
    sides = [tmp_path / "bare" / side.name for side in (round_dir, moved)]
    assert compare(*sides)["answer_reduction"] is None
    assert "thinking" not in run("mpd-gen", "compare", *sides).stdout
    assert "thinking_and_answer" not in round_stats(sides)


def test_stats_show_a_set_that_is_biased_to_easy_problems(round_dir):
    by_prompt, kept = defaultdict(list), defaultdict(int)
    for row in rows(round_dir):
        by_prompt[row["prompt_id"]].append(row["is_correct"])
    for row in rows_of(round_dir, "distill"):
        kept[row["prompt_id"]] += row["status"] == "ok"
    of_right = ["0", "(0, 1/3]", "(1/3, 2/3]", "(2/3, 1)", "1"]  # of four samples
    table = round_stats([round_dir])["difficulty"]
    there = sorted({sum(found) for found in by_prompt.values()})
    assert [row["pass_rate"] for row in table] == [of_right[right] for right in there]
    for right, row in zip(there, table, strict=True):
        chosen = [prompt for prompt, found in by_prompt.items() if sum(found) == right]
        assert row["problems"] == len(chosen)
        assert row["drafts"] == 4 * len(chosen)
        assert row["kept"] == sum(kept[prompt] for prompt in chosen)
        assert row["drafts_share"] == pytest.approx(row["drafts"] / 240)
        assert row["kept_share"] == pytest.approx(row["kept"] / sum(kept.values()))
    assert table[-1]["kept_share"] > table[-1]["drafts_share"]


def test_intervals_of_few_problems_come_with_a_warning(round_dir):
    result = compare(round_dir, round_dir)
    assert "too narrow" not in verdict(result)
    result["base"]["problems"] = MIN_PROBLEMS - 1
    assert "only 29 problems: intervals of fewer than 30" in verdict(result)
    result["base"] |= {"problems": 60, "graded": 29}
    assert "only 29 problems with gold answers: intervals of fewer than 30" in verdict(result)
    result["base"]["graded"] = 0  # no accuracy, no interval of it
    assert "too narrow" not in verdict(result)


def test_the_median_is_the_same_everywhere(round_dir, tmp_path):
    """A value of the set: of an even number of samples the larger of the two in the middle."""
    folder = shutil.copytree(round_dir, tmp_path / "round")
    lengths = cycle([10, 20])
    edit_rows(folder, "rollouts", lambda row: row.update(num_completion_tokens=next(lengths)))
    assert evaluate(folder)["median_tokens"] == 20
    assert round_stats([folder])["rollouts"][0]["p50"] == 20
    assert rollout_lengths(folder).quantile(0.5) == 20


def test_one_problem_alone_has_no_interval(round_dir, longer, tmp_path):
    chosen = rows(round_dir)[0]["prompt_id"]

    def change(row):
        row["metadata"] = json.dumps({"family": "one" if row["prompt_id"] == chosen else "z"})

    sides = []
    for side in (round_dir, longer):
        sides.append(shutil.copytree(side, tmp_path / side.name))
        edit_rows(sides[-1], "rollouts", change)
    first, rest = compare(*sides, "family")["groups"]
    assert (first["group"], first["problems"], rest["problems"]) == ("one", 1, 59)
    assert first["token_reduction"] < 0
    assert first["token_reduction_interval"] is None
    assert first["accuracy_difference_interval"] is None
    assert rest["token_reduction_interval"] is not None
    said = run("mpd-gen", "compare", *sides, "--by", "family").stdout
    (line,) = [line for line in said.splitlines() if line.startswith("one")]
    assert line.endswith(f"  {100 * first['token_reduction']:.1f}%")
