"""`mpd-report` on a real run: its figures against the rows, and its page in a real browser."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import polars as pl
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import (
    ROOT,
    STUDENT,
    TEACHER,
    command,
    edit_rows,
    environment,
    invoke,
    losses,
    python,
    rows,
    run,
    slow,
    write_jsonl,
)

from mpd_data.cli import cli as gen_cli
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.inspect.compare import compare
from mpd_data.store.round import RoundDir
from mpd_data.store.writer import ShardWriter
from mpd_rounds.report.cli import cli
from mpd_rounds.report.examples import shortened, word_diff
from mpd_rounds.report.write import write_report

FILES = ["report.html", "report.md", "data_card.md"]
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e$x^2$ | `a` *b*"
)

PIPELINE = """
name = "tiny"
student = "{student}"
teacher = "{teacher}"
rounds = 1
[environment]
OMP_NUM_THREADS = "1"
HF_HUB_OFFLINE = "1"
[rollouts]
prompts = ["{prompts}"]
num_prompts = 12
num_samples = 4
id_column = "id"
answer_column = "answer"
metadata_columns = ["family"]
sampling = {{ temperature = 1.0, max_tokens = 200 }}
engine = {{ dtype = "float32", backend = "transformers" }}
[rewrite]
template = "pipelines/pocket/rewrite.toml"
score_context = "rewrite"
sampling = {{ max_tokens = 200 }}
engine = {{ dtype = "float32", backend = "transformers" }}
[train]
pack_length = 1024
optimizer = {{ learning_rate = 2e-3 }}
validation = {{ validation_fraction = 0.2, eval_steps = 1 }}
[[evaluation]]
name = "test"
[evaluation.rollouts]
prompts = ["{prompts}"]
num_prompts = 12
num_samples = 4
id_column = "id"
answer_column = "answer"
sampling = {{ temperature = 1.0, max_tokens = 200 }}
engine = {{ dtype = "float32", backend = "transformers" }}
output = {{ rows_per_shard = 8 }}
[[baseline]]
name = "cut"
kind = "token_budget"
tokens = 40
rollouts = {{ budget_text = " answer", sampling = {{ max_tokens = 45 }} }}
[[baseline]]
kind = "few_shot"
"""


@pytest.fixture(scope="module")
def made(prompts, tmp_path_factory):
    """A small run by the real commands. Read it, never write it."""
    folder = tmp_path_factory.mktemp("report")
    text = PIPELINE.format(student=STUDENT, teacher=TEACHER, prompts=prompts)
    (folder / "tiny.toml").write_text(text)
    arguments = [folder / "tiny.toml", "--out", folder / "made"]
    # Killed while a baseline is measured, which must lose nothing.
    killed_in(folder / "made" / "eval" / "baseline-cut-test" / "rollouts.manifest.jsonl", arguments)
    done = run("mpd-rounds", *arguments)
    assert "base: evaluate test: done before" in done.stderr
    assert "baseline cut: evaluate test: done before" not in done.stderr
    assert f"mpd-report {folder / 'made'} draws the report" in done.stderr
    (folder / "made" / "stdout").write_text(done.stdout)
    return folder / "made"


def killed_in(path, arguments):
    """Run a pipeline and kill it, with its steps, as soon as `path` is there."""
    process = subprocess.Popen(
        command("mpd-rounds", *arguments), env=environment(), cwd=ROOT,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def copied(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def longer(made, tmp_path_factory):
    """The run with a second round, which is the first one's rows again with other lengths."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("longer") / "run")
    for place, one, two in (
        ("data", "round1", "round2"),
        ("train", "round1", "round2"),
        ("eval", "round1-test", "round2-test"),
    ):
        shutil.copytree(folder / place / one, folder / place / two)

    def change(row):
        row["num_completion_tokens"] = 2 * row["num_completion_tokens"] + 1

    edit_rows(folder / "eval" / "round2-test", "rollouts", change)
    settings = json.loads((folder / "pipeline.json").read_text())
    (folder / "pipeline.json").write_text(json.dumps({**settings, "rounds": 2}))
    return folder


class Page(HTMLParser):
    """The elements of a page and its text, as a browser's parser would take them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def report(path, out):
    assert invoke(cli, path, "--out", out) == 0
    return {name: (out / name).read_text(encoding="utf-8") for name in FILES}


def table(text, caption):
    """The cells of a table of the Markdown, by the first of each line."""
    lines = text.partition(f"**{caption}**\n\n")[2].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_figures_are_those_of_the_rows(made, tmp_path):
    text = report(made, tmp_path)["report.md"]
    rollouts, distill = (rows(made / "data" / "round1", s) for s in ("rollouts", "distill"))
    kept = distill.filter(pl.col("status") == "ok")
    assert 0 < kept.height < distill.height

    results = text.partition("**test: results**")[2].partition("**test: behaviour**")[0]
    assert "Only 12 problems: intervals of fewer than 30 problems are too narrow" in results

    left = table(text, "What is left after each stage")
    left = {name: cells["round 1"] for name, cells in left.items()}
    assert left["prompts"] == str(rollouts["prompt_id"].n_unique())
    whole = rollouts.filter(pl.col("finish_reason") == "stop").height
    answered = distill["rewrite"].is_not_null().sum()
    for name, count in (("not cut off", whole), ("rewrites", answered), ("kept", kept.height)):
        assert left[name] == f"{count} · {100 * count / rollouts.height:.1f}%"
    rejected = table(text, "Why rewrites were rejected")
    counts = dict(distill.filter(pl.col("status") != "ok")["status"].value_counts().iter_rows())
    assert {name.replace("\\", "").partition(":")[0] for name in rejected} == set(counts)
    for name, cells in rejected.items():
        count = counts[name.replace("\\", "").partition(":")[0]]
        assert cells["round 1"].startswith(f"{count} · ")

    rate = pl.col("is_correct").mean().over("prompt_id")
    easiest = rollouts.filter(rate == 1)["prompt_id"].unique().to_list()
    shares = table(text, "How hard their problems are")["1"]
    for name, frame in (("drafts", rollouts), ("kept", kept)):
        share = frame["prompt_id"].is_in(easiest).mean()
        assert shares[f"round 1, {name}"] == f"{100 * share:.1f}%"

    result = compare(made / "eval" / "base-test", made / "eval" / "round1-test")
    line = table(text, "test: the hard third")["round 1"]
    assert line["accuracy, base"] == f"{100 * result['hard_third']['base']['accuracy']:.1f}%"
    assert line["problems"] == str(result["hard_third"]["problems"])
    line = table(text, "test: thinking and answer")["round 1"]
    assert line["answer tokens"] == f"{result['new']['answer_tokens']:.1f}"
    line = table(text, "test: results")["round 1"]
    low, high = (100 * bound for bound in result["token_reduction_interval"])
    assert line["saved \\[95%\\]"] == (
        f"{100 * result['token_reduction']:.1f}% \\[{low:.1f}, {high:.1f}\\]".replace("-", "\u2212")
    )
    assert line["mean tokens \\[95%\\]"].startswith(f"{result['new']['mean_tokens']:.1f} ")
    assert line["accuracy \\[95%\\]"].startswith(f"{100 * result['new']['accuracy']:.1f}% ")

    lengths = table(text, "Tokens per trace")
    for label, frame, column in (
        ("test, base", rows(made / "eval" / "base-test"), "num_completion_tokens"),
        ("round 1, drafts", rollouts, "num_completion_tokens"),
        ("round 1, kept rewrites", kept, "num_rewritten_tokens"),
    ):
        values, thinking = sorted(frame[column]), frame["num_thinking_tokens"].mean()
        assert lengths[label] == {
            "traces": str(len(values)),
            "mean": f"{sum(values) / len(values):.1f}",
            "thinking": f"{thinking:.1f}",
            "answer": f"{sum(values) / len(values) - thinking:.1f}",
            # Of an even number of samples the upper one, as numpy rounds a rank of one half up.
            "median": str(values[int(0.5 * (len(values) - 1) + 0.5)]),
            "95%": str(values[int(0.95 * (len(values) - 1) + 0.5)]),
            "longest": str(values[-1]),
        }
    course = losses(made / "train" / "round1")
    trained = table(text, "Trainings")["round 1"]
    assert trained["steps"] == str(len(course))
    assert trained["loss"] == f"{course[0]:.4g} → {course[-1]:.4g}"
    assert "→" in trained["validation loss"]


def test_rounds_are_beside_what_is_free(made, tmp_path):
    folder = made / "eval"
    assert json.loads((made / "summary.json").read_text())["frontier"]["test"]["points"].keys() == {
        "base", "baseline cut", "baseline few-shot"
    }  # fmt: skip
    base = rows(folder / "base-test")
    for name in ("cut", "few-shot"):
        own = rows(folder / f"baseline-{name}-test")
        assert (
            own.select("prompt_id", "sample_idx")
            .sort(pl.all())
            .equals(base.select("prompt_id", "sample_idx").sort(pl.all()))
        )
    assert 41 < rows(folder / "baseline-cut-test")["num_completion_tokens"].max() <= 45
    # The examples are kept rewrites, as the student would say them.
    kept = rows(made / "data" / "round1", "distill").filter(pl.col("status") == "ok")
    shown = [json.loads(x) for x in (folder / "baseline-few-shot.jsonl").open(encoding="utf-8")]
    assert len({one["problem"] for one in shown}) == 3
    assert {one["kept_rewrite"] for one in shown} <= set(kept["rewrite"])
    prompt = rows(folder / "baseline-few-shot-test")["prompt"][0]
    assert all(f"assistant\n{one['kept_rewrite']}<|im_end|>" in prompt for one in shown)

    text = report(made, tmp_path)["report.md"]
    result = compare(folder / "baseline-few-shot-test", folder / "round1-test")
    lines = text.partition("**test: rounds against what is free**")[2].partition("\n\nBeyond")[0]
    (line,) = [x for x in lines.splitlines() if "| baseline few-shot |" in x]
    low, high = (100 * bound for bound in result["token_reduction_interval"])
    saved = f"{100 * result['token_reduction']:.1f}% \\[{low:.1f}, {high:.1f}\\]"
    assert saved.replace("-", "\u2212") in line
    free = table(text, "test: what costs no training")
    assert free["baseline cut"]["mean tokens \\[95%\\]"].startswith(
        f"{rows(folder / 'baseline-cut-test')['num_completion_tokens'].mean():.1f} "
    )
    # The verdict is the same sentence everywhere.
    (verdict,) = re.findall(r"^test: (round 1 is .*)$", (made / "stdout").read_text(), re.MULTILINE)
    assert Page(tmp_path / "report.html").text.count(verdict) == 2
    plots = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)
    (plot,) = [plot for plot in plots if "what is free" in plot]
    assert all(f">{name}</text>" in plot for name in ("base", "cut", "few-shot", "round 1"))


def test_baselines_of_a_run_without_settings_are_found(copied, tmp_path):
    """Also those that are not finished, or have only begun."""
    whole = report(copied, tmp_path / "before")["report.md"]
    shutil.rmtree(copied / "eval" / "baseline-cut-test")
    text = report(copied, tmp_path / "without")["report.md"]
    assert "> * baseline cut: evaluate test: not begun" in text
    (copied / "pipeline.json").unlink()
    text = report(copied, tmp_path / "after")["report.md"]
    free = "test: what costs no training"
    before, after = (table(x, free)["baseline few-shot"] for x in (whole, text))
    assert before | {"on the frontier": after["on the frontier"]} == after
    assert table(text, free).keys() == {"base", "baseline few-shot"}


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(made, tmp_path, monkeypatch):
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        run("mpd-report", made, "--out", tmp_path / seed)
    for name in FILES:
        first = (tmp_path / "1" / name).read_bytes()
        assert first == (tmp_path / "2" / name).read_bytes()
        assert len(first) > 1000


def test_no_engine_is_loaded(made, tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mpd_rounds.report.write import write_report\n"
        "write_report([Path(sys.argv[1])], Path(sys.argv[2]))\n"
        "print(*{'torch', 'transformers', 'vllm'} & set(sys.modules))"
    )
    assert python(code, made, tmp_path).stdout == "\n"


def test_token_lists_are_not_read(copied, tmp_path):
    """They are most of a round: here reading them would fail."""
    before = report(copied, tmp_path / "before")
    spoiled = 0
    for file in copied.glob("*/*/*/*.parquet"):
        metadata, content = pq.read_metadata(file), bytearray(file.read_bytes())
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                if ".list." in column.path_in_schema:
                    start = column.dictionary_page_offset or column.data_page_offset
                    content[start : start + column.total_compressed_size] = bytes(
                        column.total_compressed_size
                    )
                    spoiled += 1
        file.write_bytes(content)
    assert spoiled > 10
    with pytest.raises(Exception):  # noqa: B017, whatever Polars makes of it
        rows(copied / "data" / "round1", "distill")
    assert report(copied, tmp_path / "after") == before


def test_the_reports_command_writes_the_browser_of_its_traces(made, tmp_path):
    text = report(made, tmp_path)["report.md"]
    (line,) = re.findall("^mpd-gen (view .*)$", text, re.MULTILINE)
    assert str(made / "eval" / "round1-test") in line
    invoke(gen_cli, *shlex.split(line), "--out", tmp_path / "traces.html")
    assert (tmp_path / "traces.html").stat().st_size > 10_000


def test_hostile_text_stays_text(longer, tmp_path, browser):
    folder = shutil.copytree(longer, tmp_path / f"{HOSTILE.replace('/', '')}")

    def spoil(row):
        for name in ("problem", "completion", "rewrite", "gold_answer"):
            if row.get(name) is not None:
                row[name] = f"{row[name]} {HOSTILE}"

    for place in ("data/round1", "data/round2", "eval/base-test", "eval/round2-test"):
        edit_rows(folder / place, "rollouts", spoil)
        if place.startswith("data"):
            edit_rows(folder / place, "distill", spoil)
    settings = json.loads((folder / "pipeline.json").read_text())
    settings |= {"name": HOSTILE, "licenses": {"prompts": HOSTILE}}
    (folder / "pipeline.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    texts = report(folder, out)
    # Two runs, so that the folder's name is in the plot.
    write_report([folder, longer], tmp_path / "both")
    for page in (out / "report.html", tmp_path / "both" / "report.html"):
        found = Page(page)
        assert not {tag for tag, _ in found.tags} & {"script", "img", "iframe", "link", "object"}
        assert not any(name.startswith("on") for _, of in found.tags for name in of)
        # In the page's markup, and in its attributes, it is there as text.
        assert "<img src=x onerror=alert(2)>" in found.text
        assert "$x^2$" in found.text
        for text in (page.read_text(encoding="utf-8"), *texts.values()):
            assert not set(text) & {"\x1b", "\u202e"}
        tab = browser.new_page()
        alerts = []
        tab.on("dialog", lambda dialog, alerts=alerts: (alerts.append(1), dialog.dismiss()))
        tab.goto(page.as_uri())
        assert tab.evaluate("document.scripts.length + document.images.length") == 0
        assert not alerts
        tab.close()
    prose = re.sub(r"^```.*?^```", "", texts["report.md"], flags=re.DOTALL | re.MULTILINE)
    assert "img src=x" in prose
    assert not re.search(r"(?<!\\)<", prose)
    assert "\\| \\`a\\` \\*b\\*" in texts["data_card.md"]


@pytest.mark.parametrize(
    "width, scheme", [(390, "dark"), (1280, "light"), slow(390, "light"), slow(1280, "dark")]
)
def test_the_page_in_a_browser(longer, tmp_path, browser, width, scheme):
    report(longer, tmp_path)
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    page = (tmp_path / "report.html").as_uri()
    tab.goto(page, wait_until="networkidle")
    assert said == []
    assert asked == [page]
    wide = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    assert tab.evaluate(wide) <= width
    # What is wider than the page scrolls in a box of its own.
    assert tab.evaluate(
        """[...document.querySelectorAll('table, svg, pre, .trace')].every(e => {
             const box = (e.closest('.scroll') || e).getBoundingClientRect();
             return box.left >= 0 && box.right <= document.documentElement.clientWidth; })"""
    )
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    plots = tab.evaluate(
        """[...document.querySelectorAll('svg')].map(s => {
             const box = s.getBoundingClientRect(), drawn = s.getBBox();
             return [box.width, box.height, drawn.width, drawn.height,
                     s.getAttribute('role') === 'img' && s.getAttribute('aria-label').length,
                     s.querySelectorAll('path').length]; })"""
    )
    assert len(plots) >= 9
    assert all(min(numbers) > 4 for numbers in plots)
    # Text keeps its contrast in either scheme (WCAG AA).
    assert tab.evaluate(CONTRASTS) == []
    tags = [tag for tag, _ in Page(tmp_path / "report.html").tags]
    levels = [int(tag[1]) for tag in tags if re.match(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    tab.close()


# Texts of the page whose colour is too near to what is behind them.
CONTRASTS = """() => {
  const part = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(part);
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const clear = c => c === 'transparent' || c.endsWith(', 0)');
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!clear(c)) return c; } return 'rgb(255, 255, 255)'; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.tagName === 'STYLE') continue;
    const style = getComputedStyle(e);
    const colour = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [a, b] = [light(colour), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.textContent.slice(0, 30), colour, ratio]);
  }
  return bad; }"""


def test_the_page_on_paper(longer, tmp_path, browser):
    report(longer, tmp_path)
    tab = browser.new_page(color_scheme="dark")
    tab.goto((tmp_path / "report.html").as_uri())
    tab.emulate_media(media="print")
    style = tab.evaluate(
        """(() => { const s = getComputedStyle(document.documentElement);
             return [s.color, s.backgroundColor]; })()"""
    )
    assert style == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    # As wide as A4 without its margins: nothing is cut off, and nothing left to scroll to.
    tab.set_viewport_size({"width": 688, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 688
    cut = """[...document.querySelectorAll('table, pre, .trace-text')].filter(e =>
        e.getBoundingClientRect().right > 689 || e.scrollHeight > e.clientHeight + 1)
        .map(e => e.textContent.slice(0, 60))"""
    assert tab.evaluate(cut) == []
    printed = tab.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 3
    tab.close()


def test_plots_are_whole_xml_with_their_labels(longer, tmp_path):
    html = report(longer, tmp_path)["report.html"]
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) >= 9
    identifiers = []
    for plot in plots:
        root = ElementTree.fromstring(plot.replace("xlink:href", "href"))
        identifiers += [e.get("id") for e in root.iter() if e.get("id")]
        used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", plot))
        assert used <= {e.get("id") for e in root.iter()}
    assert len(set(identifiers)) == len(identifiers)
    pareto = next(plot for plot in plots if "mean tokens per trace" in plot)
    assert all(f">{label}</text>" in pareto for label in ("base", "round 1", "round 2"))
    assert "var(--base)" in pareto
    assert not re.search(r"(fill|stroke): #", pareto)


def test_a_run_that_was_killed_is_shown_with_what_is_missing(longer, tmp_path):
    folder = shutil.copytree(longer, tmp_path / "killed")
    shutil.rmtree(folder / "eval" / "round2-test")
    shutil.rmtree(folder / "train" / "round2" / "model")
    shutil.rmtree(folder / "data" / "round2" / "distill")
    metrics = folder / "train" / "round2" / "metrics.jsonl"
    first = metrics.read_text().splitlines()[0]
    metrics.write_text(f'{first}\n{{"step": 2, "lo')
    # A rollout whose rewrite failed for good is not missing.
    first_round = RoundDir(folder / "data" / "round1")
    shard = first_round.shard_paths("distill")[0]
    table_ = pq.read_table(shard)
    lost = table_["rollout_id"][0]
    pq.write_table(table_.filter(pc.not_equal(table_["rollout_id"], lost)), shard)
    failed = {"row_id": "f" * 32, "stage": "rewrite", "prompt_id": "p"}
    with first_round.lock(), ShardWriter(first_round, "errors", {}) as writer:
        writer.add(failed | {"message": f"rollout {lost}: the engine refused it: why"})
    details = folder / "data" / "round1" / "run.json"
    info = json.loads(details.read_text())
    info["stages"]["rollouts"]["details"]["rows"] = 50
    details.write_text(json.dumps(info))
    text = report(folder, tmp_path / "out")["report.md"]
    assert re.findall(r"^> \* (.*)$", text, re.MULTILINE) == [
        "round 1: rollouts: 48 of 50 samples",
        "round 2: rewrite: not begun",
        "round 2: train: 1 steps, not finished",
        "round 2: evaluate test: not begun",
    ]
    assert "round 1" in table(text, "test: results")
    assert table(text, "Trainings")["round 2"]["steps"] == "1"
    # Of a run that has only begun there is its plan.
    shutil.rmtree(tmp_path / "out")
    for name in ("data", "train", "eval"):
        shutil.rmtree(folder / name)
    text = report(folder, tmp_path / "out")["report.md"]
    assert re.findall(r"^> \* (.*)$", text, re.MULTILINE) == [
        "base: evaluate test: not begun",
        "baseline cut: evaluate test: not begun",
        "baseline few-shot: evaluate test: not begun",
        "rounds 1 to 2: not begun",
    ]
    metrics = folder / "train" / "round1" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("not JSON\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 1: not JSON"):
        write_report([folder], tmp_path / "out")


def test_a_training_alone(made, tmp_path):
    found = write_report([made / "train" / "round1"], tmp_path)
    assert [path.name for path in found] == ["report.html", "report.md"]
    html, text = (path.read_text(encoding="utf-8") for path in found)
    assert table(text, "run.json")["pack\\_length"] == {"value": "1024"}
    titles = re.findall(r'<svg role="img" aria-label="([^,]*), ', html)
    assert titles[:2] == ["loss", "divergence"]
    assert "gradient norm" in titles


def test_several_runs_are_compared(made, longer, tmp_path):
    settings = json.loads((longer / "pipeline.json").read_text())
    seeds = tmp_path / "seeds"
    for seed in (0, 1):
        shutil.copytree(longer, seeds / f"seed{seed}")
        (seeds / f"seed{seed}" / "pipeline.json").write_text(json.dumps({**settings, "seed": seed}))
    # The folder of seeds stands for them.
    assert invoke(cli, seeds) == 0
    text = (seeds / "report" / "report.md").read_text(encoding="utf-8")
    assert table(text, "Settings that differ") == {"seed": {"seed0": "0", "seed1": "1"}}
    results = text.partition("**test: results**")[2].partition("\n\nIntervals")[0]
    assert re.findall(r"\| (seed\d) \| ([^|]*) \|", results) == [
        (f"seed{seed}", model) for seed in (0, 1) for model in ("base", "round 1", "round 2")
    ]
    html = (seeds / "report" / "report.html").read_text(encoding="utf-8")
    pareto = next(p for p in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "mean tokens" in p)
    assert all(f">seed{seed}</text>" in pareto for seed in (0, 1))
    anchors = [of["id"] for _, of in Page(seeds / "report" / "report.html").tags if "id" in of]
    sections = [anchor for anchor in anchors if anchor.startswith("run-")]
    assert len(set(sections)) == len(sections) > 10
    assert "Shards of seed1" in (seeds / "report" / "data_card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "paths, message",
    [
        (["nowhere"], "nowhere: no such folder"),
        (["data/round1"], "the folder of a round, not of a run"),
        (["data"], "not a run. Expected the OUT of mpd-rounds"),
        (["", "."], "given twice"),
        (["", "train/round1"], "the folder of a training"),
    ],
)
def test_what_is_no_run_is_refused(made, tmp_path, paths, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_report([made / path for path in paths], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_runs_need_a_place(made):
    with pytest.raises(ConfigError, match="--out is needed"):
        write_report([made, made])


def test_damaged_files_are_named(copied, tmp_path):
    (file,) = (copied / "data" / "round1" / "distill").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    said = run("mpd-report", copied, "--out", tmp_path / "out", code=1).stderr
    assert f"{file}: not a whole Parquet file" in said
    (copied / "pipeline.json").write_text("{")
    said = run("mpd-report", copied, "--out", tmp_path / "out", code=1).stderr
    assert "pipeline.json: not JSON" in said
    assert not (tmp_path / "out").exists()


def licences(text):
    return {part: cells["licence"] for part, cells in table(text, "Licences").items()}


def test_the_data_card(made, copied, tmp_path):
    text = report(made, tmp_path / "before")["data_card.md"]
    parts = ("sampled by", "rewritten and scored by", "prompts")
    assert licences(text) == dict.fromkeys(parts, "not declared")
    # The same prompts are trained on and measured with here.
    found = table(text, "Evaluation prompts among the training prompts")["test"]
    assert found["evaluation prompts"] == "12"
    train, test = (set(rows(made / x)["prompt_id"]) for x in ("data/round1", "eval/base-test"))
    assert int(found["the same"]) >= len(train & test) > 0
    models = text.partition("**Models**")[2]
    metadata = json.loads(
        pq.read_metadata(next((made / "data/round1/distill").glob("*.parquet"))).metadata[b"mpd"]
    )
    assert metadata["teacher"]["version"] in models
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    names = {}
    exec(code, names)  # noqa: S102, as a reader of the card would
    distill = rows(made / "data" / "round1", "distill")
    assert names["kept"].height == distill.filter(pl.col("status") == "ok").height

    model = shutil.copytree(STUDENT, tmp_path / "student")
    (model / "README.md").write_text("---\nlicense: 'mit'\ntags: [a]\n---\nlicense: none\n")

    info_files = sorted((copied / "data" / "round1" / "distill").glob("*.parquet"))
    for file in info_files:
        shard = pq.read_table(file)
        of = json.loads(shard.schema.metadata[b"mpd"])
        of["student"]["name"] = str(model)
        pq.write_table(shard.replace_schema_metadata({b"mpd": json.dumps(of).encode()}), file)
    settings = json.loads((copied / "pipeline.json").read_text())
    settings["licenses"] = {"prompts": "CC-BY-4.0", "student": None, "teacher": None}
    (copied / "pipeline.json").write_text(json.dumps(settings))
    text = report(copied, tmp_path / "after")["data_card.md"]
    assert licences(text) == dict(zip(parts, ("mit", "not declared", "CC-BY-4.0"), strict=True))


def test_a_pipeline_declares_licences(prompts, tmp_path):
    from mpd_rounds.run.steps import load_pipeline

    text = PIPELINE.format(student=STUDENT, teacher=TEACHER, prompts=prompts)
    path = tmp_path / "p.toml"
    path.write_text(text)
    assert load_pipeline(path, ("licenses.prompts=MIT",)).licenses.prompts == "MIT"
    with pytest.raises(ConfigError, match="licenses.promts: unknown setting"):
        load_pipeline(path, ("licenses.promts=MIT",))


@pytest.mark.parametrize(
    "draft, rewrite, removed, added",
    [
        ("a b c d e", "a b d e", ["c "], []),
        ("first x = 1 . wait , check . so 1", "first x = 1 . so 1", ["wait , check . "], []),
        ("one two", "three", ["one two"], ["three"]),
        ("", "new", [], ["new"]),
        ("same", "same", [], []),
    ],
)
def test_a_diff_marks_what_went_and_what_came(draft, rewrite, removed, added):
    before, after = word_diff(draft, rewrite)
    assert "".join(part.text for part in before) == draft
    assert "".join(part.text for part in after) == rewrite
    assert [part.text for part in before if part.kind == "removed"] == removed
    assert [part.text for part in after if part.kind == "added"] == added


def test_long_traces_are_cut_in_the_middle():
    text = " ".join(map(str, range(1000)))
    cut = shortened(text, 100)
    assert cut.startswith("0 1 2 ") and cut.endswith(" 998 999")
    assert "[… 900 words left out …]" in cut
    assert len(cut.split()) == 100 + 6
    assert shortened("short", 100) == "short"


def test_metrics_lines_lie_about_nothing(copied, tmp_path):
    """A value that is no number is no point; a line without a step is an error."""
    path = copied / "train" / "round1" / "metrics.jsonl"
    write_jsonl(path, [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.5}])
    assert table(report(copied, tmp_path)["report.md"], "Trainings")["round 1"]["steps"] == "2"
    write_jsonl(path, [{"loss": 1}])
    with pytest.raises(DataError, match=r"metrics.jsonl, line 1: .*step: Field required"):
        write_report([copied], tmp_path)
