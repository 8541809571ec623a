"""`mpd-gen view --serve` against the page of one file and Polars, in a real browser."""

import json
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager

import httpx
import polars as pl
import pytest
from conftest import (
    ROOT,
    STUDENT,
    command,
    edit_rows,
    environment,
    invoke,
    python,
    row_log,
    rows,
    train_config,
)
from test_view import HOSTILE, SHOWN

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.inspect.view.index import Index
from mpd_train.loop import train

FILTERS = [
    {},
    {"status": "ok"},
    {"status": "ok", "measure": "ratio", "order": "down"},
    {"measure": "saved"},
    {"measure": "draft", "order": "down", "least": "20", "most": "90"},
    {"measure": "repetition", "least": "0.1"},
    {"verdict": "broke"},
    {"verdict": "mended"},
    {"verdict": "unknown"},
    {"meta:family": "tally", "status": "ok"},
    {"at": "1", "verdict": "wrong"},
    {"measure": "kl", "order": "down"},
    {"search": "IS 4", "status": "ok"},
    {"search": "no such words"},
]


@contextmanager
def server(*arguments, code=130):
    """Serve rounds; yield the address. At the end interrupt the server: it must end as it should.
    What it said then is in the list that comes with the address."""
    words = command("mpd-gen", "view", *arguments, "--serve", fresh=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes)
    said = []
    try:
        address = process.stdout.readline().split()
        assert address, process.communicate()
        yield address[0], said
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=30)[1].splitlines()
        assert process.returncode == code
        assert not [line for line in said if "Traceback" in line]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def rounds(round_dir, tmp_path_factory):
    """A round, and one without rewrites."""
    drafts = shutil.copytree(round_dir, tmp_path_factory.mktemp("drafts") / "drafts")
    shutil.rmtree(drafts / "distill")
    return [round_dir, drafts]


@pytest.fixture(scope="module")
def training(round_dir, tmp_path_factory):
    """Some steps on the round, which do not meet all of its rows."""
    out = tmp_path_factory.mktemp("training") / "run"
    train(train_config(round_dir, STUDENT, out, max_steps=4))
    return out


@pytest.fixture(scope="module")
def served(rounds, training):
    more = ("--evaluations", *rounds, "--training", training)
    with server(*rounds, *more, "--port", 0) as (address, _):
        yield address


@pytest.fixture(scope="module")
def file(rounds, training, tmp_path_factory):
    """The same as a page of one file."""
    out = tmp_path_factory.mktemp("view") / "t.html"
    more = ("--evaluations", *rounds, "--training", training)
    invoke(cli, "view", *rounds, *more, "--out", out)
    return out.as_uri()


@pytest.fixture
def opened(browser):
    """A function that opens a page and waits for it; it must say nothing on the console."""
    tabs, said = [], []

    def open_page(address):
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(address)
        tabs.append(tab)
        settle(tab)
        return tab

    open_page.said = said
    yield open_page
    for tab in tabs:
        tab.close()
    assert not said


def settle(tab):
    """Wait until the list and the row are those that were asked for."""
    for part in ("list", "row"):
        tab.wait_for_selector(f"#{part}:not([aria-busy=true])")


def chosen(tab, given):
    """Choose rows. Return their keys, in order, and how many are said to pass."""
    tab.goto(tab.url.partition("#")[0])
    tab.reload()
    settle(tab)
    for name, value in sorted(given.items(), key=lambda each: each[0] in ("least", "most")):
        place = tab.locator(f"[name='{name}']")
        if place.evaluate("field => field.tagName") == "SELECT":
            place.select_option(value)
        else:
            place.fill(value)
        settle(tab)
    found, count = tab.evaluate(SHOWN), tab.inner_text("#count").partition(":")[0]
    while tab.locator("#pages button:last-child:enabled").count():
        tab.click("#pages button:last-child")
        settle(tab)
        found += tab.evaluate(SHOWN)
    return found, count


@pytest.mark.slow
def test_a_server_shows_the_rows_of_a_page_in_its_order(rounds, served, file, opened):
    here, there = opened(served), opened(file)
    for given in FILTERS:
        assert chosen(here, given) == chosen(there, given), given
    distill, drafts = rows(rounds[0], "distill"), rows(rounds[1])
    found, count = chosen(here, {})
    assert found == [*sorted(distill["row_id"]), *sorted(drafts["row_id"])]
    assert count == f"{len(found)} of {len(found)} rows"
    worst = distill.filter(pl.col("status") == "ok").with_columns(
        ratio=pl.col("compression_ratio").cast(pl.Float64).round(3)
    )
    expected = worst.sort("ratio", "row_id", descending=[True, False])["row_id"].to_list()
    assert chosen(here, {"status": "ok", "measure": "ratio", "order": "down"})[0] == expected
    options = "[...document.querySelectorAll('#filters option')].map(option => option.text)"
    not_there = {name for name in there.evaluate(options) if name.startswith("teacher's")}
    assert len(not_there) == 3
    assert here.evaluate(options) == [x for x in there.evaluate(options) if x not in not_there]


def test_rows_are_in_order_of_what_the_training_found(training, served, opened):
    found = {row: kl for _, row, kl in row_log(training)}
    tab = opened(served)
    keys, _ = chosen(tab, {"measure": "kl", "order": "down", "least": "0", "most": "100"})
    assert len(keys) == len(found) > 20
    assert [round(found[key[:16]], 3) for key in keys] == sorted(
        (round(kl, 3) for kl in found.values()), reverse=True
    )
    assert (
        f"divergence in training, nats per token\n{round(found[keys[0][:16]], 3)}"
        in tab.inner_text("#row")
    )


def test_a_folder_without_divergences_is_refused(round_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"no rows/rank-\*.jsonl here"):
        invoke(cli, "view", round_dir, "--training", round_dir, "--out", tmp_path / "t.html")


def test_an_address_opens_its_row(rounds, served, file, opened):
    distill, drafts = rows(rounds[0], "distill").sort("row_id"), rows(rounds[1])
    kept = distill.with_row_index().filter(pl.col("status") == "ok")
    rejected = distill.filter(pl.col("status") != "ok")
    last = kept.row(-1, named=True)
    assert last["index"] > 100
    for key in (last["row_id"], rejected["row_id"][0], drafts["row_id"][3]):
        here, there = (opened(f"{page}#{key}") for page in (served, file))
        assert here.locator("#list [aria-selected=true]").get_attribute("data-key") == key
        for _ in range(3):
            assert here.inner_html("#row") == there.inner_html("#row")
            for tab in (here, there):
                tab.keyboard.press("t")
    assert opened(f"{served}#{last['row_id']}").locator(".colours button").count() == 3
    at = f"{served}#{rejected['row_id'][0]}&status=ok"  # a row that its own filters reject
    assert opened(at).locator("h2").inner_text().startswith(rejected["status"][0])
    assert "not here: #nothing" in opened(f"{served}#nothing").inner_text("#notes")


def test_keys_go_on_to_the_next_list_and_back_to_the_row_before(rounds, served, opened):
    keys = sorted(rows(rounds[0], "distill")["row_id"])
    tab = opened(f"{served}#{keys[98]}")
    for key in keys[99:102]:
        tab.keyboard.press("j")
        settle(tab)
        assert tab.evaluate("location.hash") == f"#{key}"
    tab.keyboard.press("k")
    tab.keyboard.press("k")
    settle(tab)
    assert tab.evaluate("location.hash") == f"#{keys[99]}"
    tab.go_back()
    tab.wait_for_function(f"location.hash == '#{keys[100]}'")
    settle(tab)
    assert tab.locator("#list [aria-selected=true]").get_attribute("data-key") == keys[100]
    tab.locator("#list").focus()
    tab.keyboard.press("End")
    settle(tab)
    last = tab.locator("#list li").last
    assert last.get_attribute("data-key") == max(rows(rounds[1])["row_id"])
    assert last.get_attribute("aria-selected") == "true"


def test_a_search_finds_texts_and_keys(rounds, served, opened):
    tab, distill = opened(served), rows(rounds[0], "distill")
    drafts = rows(rounds[0]).rename({"row_id": "rollout_id"}).select("rollout_id", "completion")
    texts = distill.join(drafts, on="rollout_id")
    row = texts.filter(pl.col("rewrite") != pl.col("completion")).row(0, named=True)
    for name in ("rewrite", "completion", "row_id"):
        words = row[name][:40]
        columns = [name] if name == "row_id" else ["rewrite", "completion"]
        hit = pl.any_horizontal(pl.col(columns).str.contains(words, literal=True))
        expected = texts.filter(hit)["row_id"].sort().to_list()
        found, _ = chosen(tab, {"search": words, "at": "0"})
        assert found == expected, name


def test_a_search_that_nobody_waits_for_ends(round_dir):
    index = Index([round_dir], {})
    with pytest.raises(ZeroDivisionError):
        index.find({"search": "is"}, lambda: 1 / 0)
    assert index.find({"search": "is"})["total"] > 0


def test_hostile_text_stays_text_when_it_is_served(round_dir, tmp_path, opened):
    folder = shutil.copytree(round_dir, tmp_path / "round")

    def spoil(row):
        for name in ("problem", "completion", "rewrite", "gold_answer"):
            if row.get(name) is not None:
                row[name] += HOSTILE.encode("utf-8", "ignore").decode()
        if "metadata" in row:
            row["metadata"] = json.dumps({HOSTILE: HOSTILE, "half": row["sample_idx"]})

    edit_rows(folder, "rollouts", spoil)
    edit_rows(folder, "distill", spoil)
    with server(folder, "--port", 0) as (address, _):
        tab = opened(address)
        tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
        assert tab.evaluate("document.images.length") == 0
        assert tab.evaluate("document.scripts.length") == 2
        text = tab.inner_text("body")
        assert "<img src=x onerror=alert(2)>" in text
        assert not set(text) & {"\x1b", "\u202e"}


def test_another_hosts_name_is_refused(served):
    for path in ("", "rows", "row"):
        refused = httpx.get(served + path, headers={"Host": "attacker.example"})
        assert (refused.status_code, refused.text) == (400, "Invalid host header")
    answer = httpx.get(served, headers={"Host": "localhost:1"})
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    assert "script-src 'sha256-" in policy


def test_a_server_has_the_port_that_it_is_told(round_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: Address already in use"):
            invoke(cli, "view", round_dir, "--serve", "--port", port)
    with server(round_dir, "--port", port) as (address, said):
        assert address == f"http://127.0.0.1:{port}/"
    assert said[-1].startswith("interrupted")


def test_what_does_not_go_with_a_server_is_refused(round_dir, tmp_path):
    code = (
        "import sys; sys.modules['starlette'] = None; sys.argv[1:] = ['view', "
        f"{str(round_dir)!r}, '--serve']\nfrom mpd_data.cli import main; main()"
    )
    assert "mixed-policy-distillation[serve]" in python(code, code=1).stderr
    for words in (["--serve", "--out", tmp_path / "x"], ["--port", 0]):
        with pytest.raises(Exception, match="--serve"):
            invoke(cli, "view", round_dir, *words)


@pytest.mark.slow
def test_damage_is_said_in_the_page_and_in_the_terminal(round_dir, tmp_path, opened):
    folder = shutil.copytree(round_dir, tmp_path / "round")
    with server(folder, "--port", 0) as (address, said):
        tab, other = opened(address), opened(address)
        for shard in (folder / "rollouts").glob("*.parquet"):
            shard.write_bytes(shard.read_bytes()[:-9])
        tab.keyboard.press("j")
        settle(tab)
        assert "parquet: not a whole Parquet file" in tab.inner_text("#row [role=alert]")
        tab.locator("[name=search]").fill("words")
        settle(tab)
        assert "a shard is damaged" in tab.inner_text("#row [role=alert]")
        shutil.rmtree(folder / "rollouts")
    assert any(line.startswith(f"error: {folder}/rollouts/part-") for line in said)
    other.keyboard.press("j")
    settle(other)
    assert "mpd-gen view --serve has ended" in other.inner_text("#row [role=alert]")
    assert all("Failed to load resource" in text for text in opened.said)  # the browser's own
    opened.said.clear()


def test_a_damaged_round_is_not_served(round_dir, tmp_path):
    folder = shutil.copytree(round_dir, tmp_path / "round")
    shard = next((folder / "distill").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{shard.name}: not a whole Parquet file"):
        invoke(cli, "view", folder, "--serve", "--port", 0)
