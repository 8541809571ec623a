"""Checkers: the answers that they extract and hold equal, and the processes that run them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from mpd_data.checkers.builtin import NumberChecker, make_checker
from mpd_data.checkers.pool import CheckPool, CheckRequest
from mpd_data.common.errors import ConfigError


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<think> 1 + 1 = 2 . </think> answer 2", "2"),
        ("<think>answer 3</think>\n\nThe answer is: -4.5.", "-4.5"),
        ("so \\boxed{1} and then \\boxed{ 1/2 }", "1/2"),
        ("#### 1,234", "1,234"),
        ("<think>x</think> 7", "7"),
        ("<think> answer 2", None),
        ("<think>x</think> seven", None),
        ("", None),
        ("answer", None),
        ("\\boxed{" * 5000, None),
        ("1" * 100_000 + "x", None),
        ("answer" + " " * 300_000, None),
        (" " * 300_000 + "x", None),
    ],
)
def test_number_checker_reads(completion, answer):
    assert NumberChecker().extract(completion) == answer


@pytest.mark.parametrize(
    "left, right, equal",
    [
        ("2", "2.0", True),
        ("1,234", "1234", True),
        ("1/2", "0.5", True),
        ("$5", "5", True),
        ("3", "4", False),
        ("1/0", "1/0", False),
        ("9" * 5000, "9" * 5000, False),
        ("1e999999999", "1e999999999", False),
    ],
)
def test_number_checker_compares(left, right, equal):
    assert NumberChecker().equal(left, right) is equal


def test_unknown_checkers_are_named():
    with pytest.raises(ConfigError, match="there are choice.*mean 'number'"):
        make_checker("nummber")


PAIRS = Path(__file__).parent / "data" / "answer_pairs.jsonl"


def test_checkers_agree_with_hand_labels():
    by_checker = defaultdict(list)
    for line in PAIRS.read_text().splitlines():
        pair = json.loads(line)
        by_checker[pair["checker"]].append(pair)
    for name, pairs in by_checker.items():
        checker = make_checker(name)
        wrong = [p for p in pairs if checker.equal(p["answer"], p["gold"]) is not p["equal"]]
        for pair in wrong:
            print({key: str(value)[:80] for key, value in pair.items()})
        assert len(wrong) <= 0.005 * len(pairs), f"{name}: {len(wrong)} of {len(pairs)}"
    assert min(len(by_checker[name]) for name in ("number", "math")) >= 300


@pytest.mark.parametrize(
    "name, completion, answer",
    [
        ("math", r"so \boxed{\frac{1}{2}}. No: \boxed{\frac{\sqrt{3}}{2}}.", r"\frac{\sqrt{3}}{2}"),
        ("math", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("math", r"\boxed{\boxed{5}}", "5"),
        ("math", r"\boxed{7} then \boxed{8", "7"),
        ("math", r"\boxed{1} #### 2", "1"),
        ("math", "<answer> 3 </answer> the answer is 4", "3"),
        ("math", "**Answer:** $x^2$", "x^2"),
        ("math", "The answer is 3.5. I hope it is right.", "3.5"),
        ("math", r"<think>\boxed{1}</think> $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("math", "I do not know", None),
        ("math", r"<think>\boxed{1}", None),
        ("math", "\\boxed{" * 5000 + "9" + "}" * 5000, "9"),
        ("number", "The answer is 12 apples.", "12"),
        ("number", r"\boxed{\$1,234}", "$1,234"),
        ("number", r"\boxed{x} \boxed{3} \boxed{y}", "3"),
        ("math", r"$x = \boxed{3}$ and $y = \boxed{5}$.", "3, 5"),
        ("math", r"\boxed{3} or \boxed{5}, so their sum is \boxed{8}", "8"),
        ("math", r"\boxed{7}, and \boxed{7}", "7"),
        ("number", r"\boxed{3}, \boxed{5}", None),
        ("choice", r"\boxed{A} and \boxed{C}", None),
        ("number", r"so it is \fbox{7} .", "7"),
        ("number", "The answer is **73** residents.", "73"),
        ("number", "The answer is 4. No: the answer is 5.", "5"),
        ("math", "The answer is: `73`", "73"),
        ("number", "The answer is 2**3", None),
        ("number", "#### Step 1\n#### 5\n#### Done", "5"),
        ("text", "The answer is: Paris. It lies on the Seine.", "Paris"),
        ("text", "answer the question of " + "x " * 200, None),
        ("choice", "The answer is (B).", "B"),
        ("choice", r"\boxed{\text{C}}", "C"),
        ("choice", "D) 12", "D"),
        ("choice", "A dog sat down", None),
        ("reasoning-gym", "<answer>1 2\n3 4</answer>", "1 2\n3 4"),
        ("reasoning-gym", "<think>x</think>\n1 2\n3 4\n", "1 2\n3 4"),
    ],
)
def test_checkers_read(name, completion, answer):
    assert make_checker(name).extract(completion) == answer


@pytest.mark.parametrize(
    "mark", ["\\boxed{", "}", "<answer>", "</answer>", "#### ", "answer: ", "answer is", "\\text{"]
)
@pytest.mark.parametrize("name", ["number", "math", "text", "choice"])
def test_hostile_text_is_read(name, mark):
    answer = make_checker(name).extract(mark * 5_000 + "x" * 100_000)
    assert answer is None or len(answer) <= 2000


def test_only_declared_formats_count():
    text = r"\boxed{1} the answer is 2"
    assert make_checker("number", ["phrase"]).extract(text) == "2"
    assert make_checker("number", ["phrase", "boxed"]).extract(text) == "1"
    assert make_checker("number", ["tag"]).extract(text) is None
    assert make_checker("number", ["boxed"]).extract("7") is None


@pytest.mark.parametrize(
    "name, cell, gold",
    [
        ("number", "She has 40 + 2 = 42.\n#### 42", "42"),
        ("math", r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("text", "The answer is Paris", "The answer is Paris"),
        ("number", "42", "42"),
        ("reasoning-gym", "#### 42", "#### 42"),
    ],
)
def test_what_a_gold_cell_means(name, cell, gold):
    assert make_checker(name).gold(cell) == gold


def test_reasoning_gym_scores_by_its_own_task():
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    checker = make_checker("reasoning-gym")
    gold = checker.gold(entry["answer"])
    for metadata in (
        entry["metadata"],
        {"metadata": entry["metadata"]},
        {"metadata": json.dumps(entry["metadata"])},
    ):
        assert checker.correct(gold, gold, metadata) is True
        assert checker.correct(gold + "1", gold, metadata) is False
    with pytest.raises(ValueError, match="source_dataset"):
        checker.correct(gold, gold, {})


HOSTILE = """
import os, time
from mpd_data.checkers import Checker

class Hostile(Checker):
    def equal(self, answer, gold):
        if answer == "sleep":
            time.sleep(600)
        if answer == "exit":
            os._exit(7)
        if answer == "raise":
            raise ValueError("a bad answer")
        if answer == "print":
            print('{"verdict": [false, false], "error": null}', flush=True)
            os.system("echo noise")
        return answer == gold

class Refuses:
    def __init__(self):
        raise OSError("no such table")

class Half:
    def extract(self, completion):
        return completion

class Plain:
    def extract(self, completion):
        return completion.strip()
    def equal(self, answer, gold):
        return answer == gold
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "hostile:Hostile"
    sys.modules.pop("hostile", None)


def collect(pool, requests):
    for request in requests:
        pool.submit(request)
    verdicts = {}
    until = time.monotonic() + 60
    while pool.in_flight and time.monotonic() < until:
        verdicts.update((v.key, v) for v in pool.ready(1.0))
    return verdicts


def test_a_check_that_fails_costs_its_own_verdict_only(hostile):
    answers = ["sleep", "exit", "raise", "print", "fine", "print"]
    requests = [
        CheckRequest(str(i), f"<answer>{a}</answer>", gold=a, draft_answer=a)
        for i, a in enumerate(answers)
    ]
    requests += [CheckRequest("none", "<think>", "1", {}, "1"), CheckRequest("no gold", "x")]
    with CheckPool(hostile, ("tag", "bare"), 1.0, 2) as pool:
        verdicts = collect(pool, requests)
        assert pool.in_flight == 0
    assert set(verdicts) == {r.key for r in requests}
    errors = ["timed out after 1 s", "the checking process died (exit status 7)"]
    for i, error in enumerate([*errors, "ValueError: a bad answer"]):
        verdict = verdicts[str(i)]
        assert (verdict.answer, verdict.error) == (answers[i], error)
        assert (verdict.is_correct, verdict.keeps_answer) == (False, None)
    for key in ("3", "4", "5"):
        assert (verdicts[key].is_correct, verdicts[key].keeps_answer, verdicts[key].error) == (
            True,
            True,
            None,
        )
    nothing = verdicts["none"]
    assert (nothing.answer, nothing.is_correct, nothing.keeps_answer) == (None, False, False)
    ungraded = verdicts["no gold"]
    assert (ungraded.answer, ungraded.is_correct, ungraded.keeps_answer) == ("x", None, None)


def test_open_thinking_has_no_answer_whatever_the_checker(hostile):
    texts = ("the answer is 5", "a </think> answer: 5", "<think> 5", "</think> 5 <think> answer: 5")
    requests = [
        CheckRequest(f"{i}{prompt}", text, "5", prompt=prompt)
        for prompt in ("ask", "ask <think>\n", "ask <think></think>")
        for i, text in enumerate(texts)
    ]
    for checker in ("hostile:Plain", "number"):
        with CheckPool(checker, ("phrase",), 5.0, 1) as pool:
            verdicts = collect(pool, requests)
        closed = {"0ask", "1ask", "1ask <think>\n", "0ask <think></think>", "1ask <think></think>"}
        assert {key for key, verdict in verdicts.items() if verdict.answer is not None} == closed


def test_workers_go_on_while_nobody_asks(hostile):
    """A stage reads verdicts once for each engine step, which may end many samples at once."""
    with CheckPool(hostile, ("bare",), 1.0, 1) as pool:
        pool.submit(CheckRequest("first", "fine", "fine"))
        assert len(pool.ready(60)) == 1
        verdicts = collect(pool, [CheckRequest(str(i), "fine", "fine") for i in range(20)])
        assert list(verdicts) == [str(i) for i in range(20)]
        for i in range(20):
            pool.submit(CheckRequest(str(i), "fine", "fine"))
        (worker,) = pool._workers
        assert [task.request.key for task in worker.tasks] == [str(i) for i in range(20)]


def test_text_that_overfills_a_pipe_holds_nobody_up(hostile):
    """A worker that hangs reads nothing, so the parent must keep what the pipe cannot hold."""
    with CheckPool(hostile, ("tag",), 1.0, 1) as pool:
        pool.submit(CheckRequest("first", "<answer>fine</answer>", "fine"))
        assert len(pool.ready(60)) == 1
        requests = [CheckRequest("sleep", "<answer>sleep</answer>", "sleep")]
        text = "x" * 20_000 + "<answer>fine</answer>"
        requests += [CheckRequest(str(i), text, "fine") for i in range(12)]
        for request in requests:
            pool.submit(request)
        (worker,) = pool._workers
        assert 1 < len(worker.tasks) < 5
        verdicts = collect(pool, [])
        assert {v.is_correct for key, v in verdicts.items() if key != "sleep"} == {True}
        assert len(verdicts) == len(requests)


def test_checkers_that_cannot_be_used_are_named(hostile):
    for name, message in [
        ("hostile:Refuses", "OSError: no such table"),
        ("hostile:Half", "Half has no method equal"),
        ("hostile:Absent", "AttributeError"),
        ("nowhere_at_all:X", "ModuleNotFoundError"),
    ]:
        with pytest.raises(ConfigError, match=message):
            CheckPool(name, ("bare",), 1.0, 1)
    plain = make_checker("hostile:Plain")
    assert plain.correct("a", plain.gold("a"), {}) is True


def test_a_killed_parent_leaves_no_worker(hostile, tmp_path):
    script = """
import sys
from mpd_data.checkers.pool import CheckPool, CheckRequest
pool = CheckPool("hostile:Hostile", ("bare",), 1.0, 2)
for answer in ("fine", "sleep"):
    pool.submit(CheckRequest(answer, answer, answer))
assert [v.key for v in pool.ready(60)] == ["fine"]
print(*(w.process.pid for w in pool._workers), flush=True)
sys.stdin.read()
"""
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.communicate()

    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, pids))
