"""A teacher and a student on a real vLLM server, on loopback."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import MappingProxyType

import click
import pytest
from conftest import (
    SCORES,
    STUDENT,
    TEACHER,
    assert_near,
    drained,
    environment,
    invoke,
    num_shards,
    rewrite_arguments,
    rollout_arguments,
    rows,
    run,
    started,
    without_rewrites,
)

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError, EngineError
from mpd_data.common.models import resolve_model
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines import openai as openai_engine
from mpd_data.engines.protocol import Completion, Refused, RequestError
from mpd_data.engines.start import start_engine

KEY = "sk-mpd-test-3f9c"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`vllm serve` as its documentation starts it, on a CPU."""

    def __init__(self, model, log, port=None, max_logprobs=80):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "vllm.entrypoints.openai.api_server",
                    "--model", model, "--served-model-name", "pocket", "--host", "127.0.0.1",
                    "--port", str(self.port), "--dtype", "float32", "--enforce-eager",
                    "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096",
                    "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(1 << 28),
                    "--max-logprobs", str(max_logprobs), "--api-key", KEY,
                ],
                env=environment()
                | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )  # fmt: skip
        while not self.answers():
            assert self.process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self):
        if self.process.poll() is None:
            # Its engine is a process of its own.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    server = Server(TEACHER, tmp_path_factory.mktemp("teacher") / "log")
    yield server
    server.kill()


def served(url, name="pocket"):
    names = {"--engine": "openai", "--base-url": url, "--served-model": name}
    return names | {"--dtype": "auto", "--kv-cache-gib": None}


@pytest.mark.slow
def test_rewrites_are_those_of_an_engine_here(round_dir, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("MPD_API_KEY", KEY)
    folder = without_rewrites(round_dir, tmp_path / "r")
    # As a user may write it, with the path of the interface.
    said = run("mpd-gen", *rewrite_arguments(folder, **served(teacher.url + "/v1/"))).stderr
    ours, theirs = rows(folder, "distill"), rows(round_dir, "distill")
    assert ours.height == theirs.height == 240
    # The server's name is a part of the teacher's identity, and so of the keys.
    ours, theirs = (frame.drop("row_id").sort("rollout_id") for frame in (ours, theirs))
    assert ours.drop(SCORES).equals(theirs.drop(SCORES))
    assert (theirs["topk_logprobs"].explode() > -10).sum() > 1000
    assert_near(ours, theirs)
    run("mpd-gen", "validate", folder)
    # The key is in no file and in nothing that was said.
    assert KEY not in said
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    info = json.loads((folder / "run.json").read_text())["stages"]["distill"]
    assert info["identity"]["teacher"]["served"] == "pocket"


@pytest.mark.slow
def test_stop_strings_end_a_rewrite(round_dir, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("MPD_API_KEY", KEY)
    folder = without_rewrites(round_dir, tmp_path / "r")
    told = {"--stop": "answer", "--limit": 20, **served(teacher.url)}
    run("mpd-gen", *rewrite_arguments(folder, **told))
    whole = dict(rows(round_dir, "distill").select("rollout_id", "rewrite").iter_rows())
    cut = rows(folder, "distill")
    assert cut.height == 20
    for rollout_id, rewrite in cut.select("rollout_id", "rewrite").iter_rows():
        assert rewrite.strip() == whole[rollout_id].partition("answer")[0].strip()


@pytest.mark.slow
def test_scores_are_exact_and_samples_follow_their_seed(round_dir, teacher, monkeypatch):
    """Float32 on both sides: scores within 1e-4, samples token for token."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    row = rows(round_dir, "rollouts").row(0, named=True)
    ids, targets = row["prompt_ids"], row["completion_ids"]
    model = resolve_model(str(TEACHER))
    here = start_engine(model, EngineConfig(dtype="float32"), max_logprobs=20)
    results = {}
    try:
        there = start_engine(
            resolve_model(str(TEACHER), served="pocket"),
            EngineConfig(backend="openai", base_url=teacher.url),
            max_logprobs=20,
        )
        try:
            for name, engine in (("here", here), ("there", there)):
                for seed in range(6):
                    engine.submit_generate(
                        f"s{seed}", ids, SamplingConfig(max_tokens=40, temperature=1.0), seed
                    )
                engine.submit_generate("cut", ids, SamplingConfig(max_tokens=3), 1)
                engine.submit_score("score", ids, targets, 20)
                assert engine.in_flight == 8
                results[name] = drained(engine)
        finally:
            there.close()
    finally:
        here.close()
    ours, theirs = results["there"], results["here"]
    assert ours.keys() == theirs.keys()
    for key in theirs.keys() - {"score"}:
        assert ours[key].token_ids == theirs[key].token_ids
        assert ours[key].finish_reason == theirs[key].finish_reason
    assert len({tuple(ours[f"s{seed}"].token_ids) for seed in range(6)}) > 1
    reasons = {found.finish_reason for found in ours.values() if hasattr(found, "token_ids")}
    assert reasons == {"stop", "length"}
    assert (ours["score"].topk_ids == theirs["score"].topk_ids).mean() > 0.95
    for name in ("topk_logprobs", "target_logprobs"):
        assert abs(getattr(ours["score"], name) - getattr(theirs["score"], name)).max() < 1e-4


def test_what_the_server_cannot_do_is_said_at_the_start(round_dir, teacher, tmp_path, monkeypatch):
    def refused(message, key=KEY, **changed):
        folder = without_rewrites(round_dir, tmp_path / message.replace(" ", "-"))
        monkeypatch.setenv("MPD_API_KEY", key)
        settings = served(teacher.url) | {"--seconds-per-shard": 1.0} | changed
        with pytest.raises(EngineError, match=message) as caught:
            invoke(cli, *rewrite_arguments(folder, **settings))
        assert key not in str(caught.value)
        assert not list((folder / "distill").glob("*"))

    refused("--served-model NAME", **{"--served-model": "other"})
    refused("HTTP 401", key="sk-wrong")
    refused("--max-logprobs", **{"--num-logprobs": 100})
    refused("Is the server running", **{"--base-url": f"http://127.0.0.1:{free_port()}"})


class Plain(http.server.BaseHTTPRequestHandler):
    """A server of the OpenAI kind that knows neither token ids nor a prompt's log-probabilities."""

    choice = MappingProxyType({})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"data": [{"id": "pocket"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/tokenize":
            self.send_error(404)
        else:
            self.answer({"choices": [{"text": "a", "finish_reason": "length", **self.choice}]})

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "choice, message",
    [({}, "returns no token ids"), ({"token_ids": [1]}, "no log-probabilities of the prompt")],
)
def test_a_server_without_vllms_additions_is_refused(choice, message):
    handler = type("Handler", (Plain,), {"choice": choice})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = EngineConfig(backend="openai", base_url=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(EngineError, match=message):
            start_engine(resolve_model(str(TEACHER), served="pocket"), config)
        server.shutdown()


@pytest.mark.slow
def test_a_server_that_dies_ends_the_job_and_the_rest_follows(prompts, tmp_path, monkeypatch):
    """A connection that fails is tried again: a server that is back in time loses nothing. An
    error of its own ends the job."""
    monkeypatch.setenv("MPD_API_KEY", KEY)
    log = tmp_path / "log"
    server = Server(STUDENT, log)
    out = tmp_path / "r"
    slow = served(server.url) | {"--max-num-seqs": 2, "--num-prompts": 25}
    arguments = [*rollout_arguments(prompts, out, **slow), "--rows-per-shard", 5]
    try:
        two = {"until": lambda: num_shards(out) >= 2, "stderr": subprocess.PIPE}
        process = started("mpd-gen", *arguments, **two)
        server.kill()
        server = Server(STUDENT, log, server.port)
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert "retrying for" in said
        assert rows(out, "rollouts").height == 100
        run("mpd-gen", "validate", out)

        class Gone(Plain):
            def do_POST(self):
                self.send_error(500, "CUDA error")

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gone) as broken:
            threading.Thread(target=broken.serve_forever, daemon=True).start()
            bad = served(f"http://127.0.0.1:{broken.server_port}")
            said = run("mpd-gen", *rollout_arguments(prompts, tmp_path / "b", **bad), code=1).stderr
            assert "HTTP 500" in said
            broken.shutdown()
    finally:
        server.kill()


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_job(prompts, tmp_path, monkeypatch):
    """With three seconds of patience in place of two minutes."""
    monkeypatch.setenv("MPD_API_KEY", KEY)
    monkeypatch.setattr(openai_engine, "_RETRY_SECONDS", 3.0)
    out = tmp_path / "r"
    server = Server(STUDENT, tmp_path / "log")

    def end():
        while num_shards(out) < 2:
            time.sleep(0.01)
        server.kill()

    slow = served(server.url) | {"--max-num-seqs": 2}
    arguments = [*rollout_arguments(prompts, out, **slow), "--rows-per-shard", 5]
    try:
        threading.Thread(target=end, daemon=True).start()
        with pytest.raises(EngineError, match=r"tried for \d s.*when the server is back"):
            invoke(cli, *arguments)
    finally:
        server.kill()
    assert 10 <= rows(out, "rollouts").height < 240
    run("mpd-gen", "validate", out)


def test_one_refused_request_hurts_no_other(teacher, tmp_path, monkeypatch):
    """An id that the model does not have, sent past the guard: vLLM answers 400, and the row is an
    error."""
    monkeypatch.setenv("MPD_API_KEY", KEY)
    engine = start_engine(
        resolve_model(str(TEACHER), served="pocket"),
        EngineConfig(backend="openai", base_url=teacher.url),
    )
    try:
        with pytest.raises(RequestError, match="1000000 has no embedding"):
            engine.submit_generate("bad", [5, 10**6], SamplingConfig(max_tokens=4), 0)
        engine.inner.submit_generate("bad", [5, 10**6], SamplingConfig(max_tokens=4), 0)
        engine.submit_generate("good", [5, 9], SamplingConfig(max_tokens=4), 0)
        with pytest.raises(RequestError, match="leave no room"):
            engine.submit_generate("long", [5] * 10**5, SamplingConfig(max_tokens=4), 0)
        found = drained(engine)
    finally:
        engine.close()
    assert isinstance(found["bad"], Refused)
    assert "HTTP 400" in found["bad"].message
    assert isinstance(found["good"], Completion)


@pytest.mark.parametrize(
    "url, message",
    [
        ("https://me:secret@host:8000", "no user or password"),
        ("host:8000", "expected the URL of a server"),
        ("http://host:8000?key=secret", "nothing after"),
    ],
)
def test_a_url_is_a_servers_and_no_secret(prompts, tmp_path, url, message):
    with pytest.raises(click.UsageError, match=message) as caught:
        invoke(cli, *rollout_arguments(prompts, tmp_path, **served(url)))
    assert "secret" not in str(caught.value)


def test_a_server_and_its_settings_go_together(prompts, tmp_path):
    for changed in (
        {"--engine": "openai", "--kv-cache-gib": None},
        {"--base-url": "http://h:1", "--kv-cache-gib": None},
        {**served("http://h:1"), "--tensor-parallel-size": 2},
        {**served("http://h:1"), "--pipeline-parallel-size": 2},
    ):
        with pytest.raises(ConfigError):
            invoke(cli, *rollout_arguments(prompts, tmp_path, **changed), "--dry-run")
