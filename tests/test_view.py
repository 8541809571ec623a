"""`mpd-gen view`: the page against the rows, in a real browser."""

import json
import math
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import click
import polars as pl
import pytest
from conftest import STUDENT, edit_rows, invoke, python, rows

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError
from mpd_data.inspect.view import write_view
from mpd_data.inspect.view.rows import divergences, rewrites_of
from mpd_data.store.trainings import row_log

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e\ud83d"
SHOWN = "[...document.querySelectorAll('#list li')].map(line => line.dataset.key)"


@pytest.fixture(scope="module")
def page(round_dir, tmp_path_factory):
    """The page of a round; its rollouts stand for two models of which the second lost answers."""
    folder = tmp_path_factory.mktemp("view")
    worse = shutil.copytree(round_dir, folder / "worse")
    shutil.rmtree(worse / "distill")

    def spoil(row):
        if row["sample_idx"] == 0:
            row["is_correct"] = False

    edit_rows(worse, "rollouts", spoil)
    invoke(cli, "view", round_dir, "--evaluations", round_dir, worse, "--out", folder / "t.html")
    return folder / "t.html"


@pytest.fixture
def opened(page, browser):
    """A function that opens the page; it must ask for nothing, and say nothing on the console."""
    tabs, said = [], []

    def open_page(part="", **settings):
        tab = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **settings})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda asked: asked.url.startswith("file:") or said.append(asked.url))
        tab.goto(page.as_uri() + part)
        tab.wait_for_selector("#list li")
        tabs.append(tab)
        return tab

    yield open_page
    for tab in tabs:
        tab.close()
    assert not said


def chosen(tab, **settings):
    """The keys of the rows that pass these filters, in order."""
    for name, value in settings.items():
        place = tab.locator(f"[name='{name}']")
        if place.evaluate("field => field.tagName") == "SELECT":
            place.select_option(value)
        else:
            place.fill(str(value))
    return tab.evaluate(SHOWN)


def test_filters_and_order_are_those_of_the_rows(round_dir, opened):
    tab, distill = opened(), rows(round_dir, "distill")
    assert chosen(tab) == sorted(distill["row_id"])
    for status in distill["status"].unique():
        expected = distill.filter(pl.col("status") == status)["row_id"]
        assert chosen(tab, status=status) == sorted(expected)
    rounded = pl.col("compression_ratio").cast(pl.Float64).round(3)
    kept = distill.filter(pl.col("status") == "ok").with_columns(ratio=rounded)
    by_ratio = kept.sort("ratio", "row_id")["row_id"].to_list()
    assert chosen(tab, status="ok", measure="ratio", order="up") == by_ratio
    middle = kept["ratio"].sort()[kept.height // 2]
    assert set(chosen(tab, least=middle)) == set(kept.filter(pl.col("ratio") >= middle)["row_id"])
    assert chosen(tab, status="", measure="", search="no such words") == []
    assert "No row passes" in tab.inner_text("#row")
    drafts = rows(round_dir, "rollouts")
    right = drafts.filter(pl.col("is_correct"))["row_id"].implode()
    broke = distill.filter(pl.col("rollout_id").is_in(right) & ~pl.col("is_correct"))
    assert chosen(tab, search="", verdict="broke") == sorted(broke["row_id"])


def test_what_is_typed_and_chosen_stays_to_be_seen(round_dir, opened):
    tab = opened()
    ratios = rows(round_dir, "distill").drop_nulls("compression_ratio")["compression_ratio"]
    chosen(tab, measure="ratio", order="down")
    shown = tab.inner_text("#list li .value")
    assert float(shown) == pytest.approx(ratios.max(), abs=0.001)
    assert "answer: not known, see mpd-gen rewrite --support" in tab.inner_text("[name=measure]")
    tab.keyboard.press("/")
    tab.keyboard.type("nothing has these words")
    tab.keyboard.press("Escape")
    assert tab.input_value("[name=search]") == "nothing has these words"
    assert "search=nothing" in tab.url
    tab.reload()
    tab.wait_for_selector("text=No row passes these filters.")
    assert tab.input_value("[name=search]") == "nothing has these words"
    tab.click("text=Clear the filters")
    assert chosen(tab) == sorted(rows(round_dir, "distill")["row_id"])
    tab.locator("body").press("ArrowDown")
    assert tab.locator("#list li[aria-selected=true]").count() == 1
    assert tab.get_attribute("#list li:nth-child(2)", "aria-selected") == "true"


def test_what_has_nothing_in_common_is_refused(round_dir, page, tmp_path):
    with pytest.raises(click.UsageError, match="--evaluations BASE NEW"):
        invoke(cli, "view")
    worse = page.parent / "worse"
    invoke(cli, "view", "--evaluations", round_dir, worse, "--out", tmp_path / "pairs.html")
    other = shutil.copytree(worse, tmp_path / "other")

    def rename(row):
        row["prompt_id"] += "-other"

    edit_rows(other, "rollouts", rename)
    with pytest.raises(ConfigError, match="have no problem in common"):
        invoke(cli, "view", "--evaluations", round_dir, other, "--out", tmp_path / "q.html")
    file = row_log(tmp_path / "training", 0)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"row": "0" * 16, "step": 1, "kl": 0.5}) + "\n")
    with pytest.raises(ConfigError, match="this training met no row of"):
        invoke(cli, "view", round_dir, "--training", tmp_path / "training")


def test_a_row_shows_its_traces_and_the_teachers_probabilities(round_dir, opened):
    scored = rows(round_dir, "distill").filter(pl.col("status") == "ok").row(0, named=True)
    tab = opened(f"#{scored['row_id']}")
    (draft,) = rows(round_dir, "rollouts").filter(row_id=scored["rollout_id"]).to_dicts()
    assert tab.inner_text(".problem") == draft["problem"]
    texts = tab.locator(".trace pre").all_text_contents()
    assert texts == [draft["completion"], scored["rewrite"]]
    assert tab.locator(".trace del").count() > 0
    tab.keyboard.press("t")
    ids = scored["input_ids"][scored["loss_start"] :]
    assert tab.locator(".token").count() == len(ids)
    k = len(scored["topk_ids"]) // len(ids)
    at = next(i for i in range(1, len(ids)) if scored["topk_logprobs"][i * k] < -0.01)
    tab.locator(".token").nth(at).hover()
    best = math.exp(scored["topk_logprobs"][at * k])
    said = tab.inner_text("#token").splitlines()
    assert float(said[1].split()[0]) == pytest.approx(best, abs=0.002)
    assert sum(float(line.split()[0]) for line in said[1:]) <= 1.003
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#token").splitlines() != said
    assert tab.locator(".token.pinned").get_attribute("data-at") == str(at + 1)


def test_answers_lost_stand_side_by_side(round_dir, opened):
    tab = opened()
    tab.click("#tab-pairs")
    first = rows(round_dir, "rollouts").filter(pl.col("sample_idx") == 0)
    lost = first.filter(pl.col("is_correct"))["prompt_id"].to_list()
    assert lost
    assert chosen(tab, change="lost") == [f"pair-{prompt}" for prompt in sorted(lost)]
    assert (
        tab.locator(".trace .right").count() > tab.locator(".trace:nth-child(even) .right").count()
    )
    assert re.search(r"lost: \d/4 right before, \d/4 after", tab.inner_text("h2"))
    tab.reload()
    tab.wait_for_selector("#list li")
    assert tab.evaluate(SHOWN) == [f"pair-{prompt}" for prompt in sorted(lost)]
    assert chosen(tab, change="won") == []


def test_the_keyboard_steps_and_the_address_names_the_row(round_dir, opened):
    tab, keys = opened(), sorted(rows(round_dir, "distill")["row_id"])
    tab.keyboard.press("Escape")
    for key in ("j", "ArrowDown", "k"):
        tab.keyboard.press(key)
    assert tab.evaluate("location.hash") == f"#{keys[1]}"
    for key, at in (("End", -1), ("Home", 0)):
        tab.keyboard.press(key)
        assert tab.evaluate("location.hash") == f"#{keys[at]}"
    assert tab.locator("[aria-selected=true][role=option]").count() == 1
    tab.keyboard.press("/")
    tab.keyboard.type("jk")
    assert tab.locator("[name=search]").input_value() == "jk"
    prompt = rows(round_dir, "rollouts")["prompt_id"][0]
    tab = opened("#" + quote(f"pair-{prompt}"))
    assert tab.locator("#tab-pairs").get_attribute("aria-selected") == "true"
    assert tab.locator(".trace").count() > 1


def test_back_goes_to_the_row_before_and_its_filters(round_dir, opened):
    tab, keys = opened(), sorted(rows(round_dir, "distill")["row_id"])
    began = tab.evaluate("history.length")
    tab.keyboard.press("j")
    assert chosen(tab, status="ok")
    tab.locator("[name=search]").press_sequentially("is")
    address = tab.evaluate("location.hash")
    assert "&status=ok&search=is" in address.replace("search=is&status=ok", "status=ok&search=is")
    assert tab.evaluate("history.length") == began + 1
    tab.keyboard.press("Escape")
    tab.keyboard.press("j")
    assert tab.evaluate("history.length") == began + 2
    tab.go_back()
    assert tab.evaluate("location.hash") == address
    assert tab.locator("[name=search]").input_value() == "is"
    tab.go_back()
    assert tab.evaluate("location.hash") == f"#{keys[0]}"
    tab.wait_for_selector(f"[data-key='{keys[0]}'][aria-selected=true]")
    assert tab.evaluate(SHOWN) == keys
    tab.go_forward()
    tab.wait_for_function("document.querySelector('[name=status]').value === 'ok'")


def test_arrow_keys_move_among_the_tabs(opened):
    tab = opened()
    tab.locator("#tab-rows").focus()
    for key, name in (("ArrowRight", "pairs"), ("ArrowRight", "rows"), ("ArrowLeft", "pairs"),
                      ("Home", "rows"), ("End", "pairs")):  # fmt: skip
        tab.keyboard.press(key)
        assert tab.evaluate("document.activeElement.id") == f"tab-{name}"
        assert tab.locator("[role=tab][aria-selected=true]").get_attribute("id") == f"tab-{name}"
        assert tab.locator("[role=tab][tabindex='0']").count() == 1
        panel = tab.locator("[role=tabpanel]")
        assert panel.get_attribute("aria-labelledby") == f"tab-{name}"
        assert tab.evaluate(SHOWN)[0].startswith("pair-") is (name == "pairs")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(opened, scheme):
    tab = opened(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.keyboard.press("t")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    style = "getComputedStyle(document.documentElement)"
    ink, paper = (
        sum(map(int, re.findall(r"\d+", tab.evaluate(f"{style}.{name}"))))
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) is (scheme == "dark")


def test_hostile_text_stays_text(round_dir, tmp_path, browser):
    folder = shutil.copytree(round_dir, tmp_path / "round")

    def spoil(row):
        for name in ("problem", "completion", "rewrite", "gold_answer"):
            if row.get(name) is not None:
                row[name] = row[name] + HOSTILE.encode("utf-8", "ignore").decode()
        if "metadata" in row:
            row["metadata"] = json.dumps({HOSTILE: HOSTILE, "half": row["sample_idx"]})

    edit_rows(folder, "rollouts", spoil)
    edit_rows(folder, "distill", spoil)
    write_view([folder], tmp_path / "t.html")
    tab, alerts = browser.new_page(), []
    tab.on("dialog", lambda dialog: (alerts.append(1), dialog.dismiss()))
    tab.goto((tmp_path / "t.html").as_uri())
    tab.wait_for_selector("#list li")
    assert tab.evaluate("document.images.length") == 0
    assert tab.evaluate("document.scripts.length") == 2
    text = tab.inner_text("body")
    assert "<img src=x onerror=alert(2)>" in text
    assert not set(text) & {"\x1b", "\u202e"}
    assert not alerts
    tab.close()


def test_a_page_holds_no_more_rows_than_asked_and_says_so(round_dir, tmp_path, browser):
    invoke(cli, "view", round_dir, "--rows", 7, "--out", tmp_path / "t.html")
    tab = browser.new_page()
    tab.goto((tmp_path / "t.html").as_uri())
    tab.wait_for_selector("#list li")
    assert tab.evaluate(SHOWN) == sorted(rows(round_dir, "distill")["row_id"])[:7]
    assert "7 of 240 rows" in tab.inner_text("#notes")
    tab.close()


def test_a_round_whose_model_is_gone_is_shown_without_tokens(round_dir, tmp_path, browser):
    folder = shutil.copytree(round_dir, tmp_path / "round")
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["rollouts"]["details"]["config"]["model"] = "/no/such/model"
    (folder / "run.json").write_text(json.dumps(record))
    write_view([folder], tmp_path / "t.html")
    tab = browser.new_page()
    tab.goto((tmp_path / "t.html").as_uri())
    tab.wait_for_selector("#list li")
    assert "they need the tokenizer of /no/such/model, which is not here" in tab.inner_text(
        "#notes"
    )
    assert tab.locator(".colours").count() == 0
    tab.close()


def test_a_round_is_shown_without_the_libraries_of_models(round_dir, tmp_path):
    words = ["view", str(round_dir), "--out", str(tmp_path / "t.html")]
    code = f"import sys; sys.modules['transformers'] = None; sys.argv[1:] = {words!r}\n"
    done = python(f"{code}from mpd_data.cli import main; main()")
    assert "not shown" in done.stderr
    assert "mixed-policy-distillation[train]" in done.stderr
    assert (tmp_path / "t.html").stat().st_size > 10_000


def test_a_round_is_shown_with_its_tokens_from_any_folder(round_dir, tmp_path, monkeypatch):
    """Its record names the student relative to the folder where its command ran."""
    place = tmp_path / "place"
    folder = Path(shutil.copytree(round_dir, place / "data" / "round1"))
    shutil.copytree(STUDENT, place / "models" / "student")
    record = json.loads((folder / "run.json").read_text())
    settings = record["stages"]["rollouts"]["details"]["config"]
    settings |= {"model": "models/student", "out": "data/round1"}
    (folder / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    found = rewrites_of(folder, 20, {})
    assert found["note"] == ""
    assert found["pieces"]


def test_a_rows_divergence_is_the_last_of_the_training_given_last(round_dir, tmp_path):
    first, second = (row[:16] for row in rows(round_dir, "distill")["row_id"][:2])
    for name, met in (
        ("a", [(first, 1, 0.9), (first, 5, 0.2), (second, 2, 0.4)]),
        ("b", [(first, 3, 0.7), (second, 4, 0.1)]),
    ):
        log = row_log(tmp_path / name, 0)
        log.parent.mkdir(parents=True)
        lines = [{"row": row, "step": step, "kl": kl, "tokens": 9} for row, step, kl in met]
        log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = divergences([tmp_path / "a", tmp_path / "b"], [round_dir])
    assert found == {first: 0.7, second: 0.1}
    found = divergences([tmp_path / "b", tmp_path / "a"], [round_dir])
    assert found == {first: 0.2, second: 0.4}
