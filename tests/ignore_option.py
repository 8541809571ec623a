"""Proves the table in test_options.py: ignore an option, and each test that it names fails.

    .venv/bin/python tests/ignore_option.py                       all
    .venv/bin/python tests/ignore_option.py mpd-train --alpha     those that begin so

The tests run in this process, one option after another, so that torch and vLLM are loaded once;
the processes that they start ignore the option too (ignoring/sitecustomize.py). First all of them
run with nothing ignored, and must pass.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


class Outcomes:
    """The first failure of each test function."""

    def __init__(self):
        self.failures = {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(crash.message if crash else report.longrepr)
            self.failures.setdefault(report.nodeid.partition("[")[0], said.strip().splitlines()[0])


def failures(nodes, *options):
    import pytest

    outcomes = Outcomes()
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts="]
    code = pytest.main([*quiet, *options, *nodes], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code!r} on {nodes}")
    return outcomes.failures


def main():
    os.chdir(ROOT)
    paths = [str(TESTS / "ignoring"), str(ROOT), str(TESTS)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*paths[:2], *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPD_IGNORED": ""}
    import sitecustomize  # noqa: F401  # before anything else is imported
    from conftest import make_prompts, make_round
    from test_options import EXERCISED

    begin = " ".join(sys.argv[1:])
    chosen = {key: tests for key, tests in EXERCISED.items() if " ".join(key).startswith(begin)}
    with tempfile.TemporaryDirectory() as folder:
        made, data = Path(folder) / "made", Path(folder) / "data"
        os.environ["MPD_IGNORED_FOLDER"] = str(Path(folder) / "ignored")
        if "MPD_TEST_DATA" in os.environ:
            made = Path(os.environ["MPD_TEST_DATA"])
        else:
            made.mkdir()
            make_round(make_prompts(made), made / "round1")
        os.environ["MPD_TEST_DATA"] = str(data)
        shutil.copytree(made, data)
        tests = sorted({test for tests in chosen.values() for test in tests})
        if broken := failures(tests):
            raise SystemExit(f"these fail with nothing ignored: {broken}")
        caught = 0
        for key, tests in chosen.items():
            os.environ["MPD_IGNORED"] = name = " ".join(key)
            # A command that ignores its --out or --dry-run may write where it should only read.
            shutil.rmtree(data)
            shutil.copytree(made, data)
            # Of a test with many parameters the first failure says enough.
            found = {test: failures([test], "--exitfirst").get(test) for test in tests}
            caught += all(found.values())
            print(f"{'caught' if all(found.values()) else 'MISSED'}  {name}", flush=True)
            for test, failure in found.items():
                print(f"        {test}: {(failure or 'passes')[:100]}", flush=True)
    print(f"{len(chosen)} options, {caught} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
