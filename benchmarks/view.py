"""What browsing costs.

    PYTHONPATH=. python benchmarks/view.py --out /tmp/scale

makes the synthetic round of a million rewrites of scale.py there, unless it exists, serves it, and
prints the seconds until the server answers and of each kind of request, and the server's peak
memory.

    PYTHONPATH=.:tests python benchmarks/view.py --page runs/demo/data/round1

writes the page of one file and prints the seconds in which a real browser opens it and filters it.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.scale import ROWS_PER_SHARD, make_round

# The server remembers which rows pass, so that each choice is asked for the first time here.
REQUESTS = {
    "first list": {},
    "a list in the middle": {"number": "500000"},
    "filter by status": {"status": "ok"},
    "filter by answers": {"verdict": "broke"},
    "filter by metadata and a bound": {"meta:level": "3", "measure": "repetition", "least": "0.5"},
    "order": {"measure": "ratio", "order": "down"},
    "search": {"search": "hmm it holds"},
    "the next list of a search": {"search": "hmm it holds", "number": "100"},
}


def peak_memory(process: int) -> float:
    """The peak resident memory of a process in GB."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def measure(folder: Path) -> None:
    """Serve the round in `folder` and print the table."""
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "mpd_data.cli", "view", folder, "--serve", "--port", "0"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        print("| | seconds | rows |\n|---|---|---|")
        print(f"| start | {time.perf_counter() - began:.2f} | |")
        with httpx.Client(base_url=address, timeout=600) as client:
            for name, given in REQUESTS.items():
                began = time.perf_counter()
                found = client.get("/rows", params=given).raise_for_status().json()
                print(f"| {name} | {time.perf_counter() - began:.2f} | {found['total']:,} |")
            began = time.perf_counter()
            client.get("/row", params={"key": found["rows"][-1]["i"]}).raise_for_status()
            print(f"| a row | {time.perf_counter() - began:.2f} | 1 |")
        print(f"\npeak memory of the server: {peak_memory(server.pid):.2f} GB")
    finally:
        server.kill()
        server.wait()


# From an event on a filter to the frame after the list is there again.
FILTER = """([name, value]) => new Promise((done) => {
  const field = document.querySelector(`[name=${name}]`), began = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  const look = () => document.querySelector("#list").ariaBusy === "false"
    ? setTimeout(() => done(performance.now() - began)) : requestAnimationFrame(look);
  requestAnimationFrame(look);
})"""


def measure_page(folder: Path) -> None:
    """Print the table of the page of one file of the round in `folder`."""
    from browser import HOW, find_browser
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as made, sync_playwright() as playwright:
        page = Path(made) / "traces.html"
        subprocess.run(
            [sys.executable, "-m", "mpd_data.cli", "view", folder, "--out", page],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        path = find_browser(playwright.chromium.executable_path)
        if path is None:
            sys.exit(HOW)
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = chromium.new_page()
        tab.goto("about:blank")
        began = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_selector("#list li")
        opened = time.perf_counter() - began
        print(f"{page.stat().st_size / 1e6:.1f} MB, {tab.text_content('#count')}\n")
        print(f"| | ms |\n|---|---|\n| open | {1000 * opened:.0f} |")
        for name, value in (
            ("status", "ok"), ("verdict", "kept"), ("measure", "ratio"), ("order", "down"),
            ("search", "check"), ("search", ""),
        ):  # fmt: skip
            took = tab.evaluate(FILTER, [name, value])
            print(f"| {name} {value!r} | {took:.0f} |")
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the synthetic round; kept")
    where.add_argument("--page", type=Path, help="a round for the page of one file")
    parser.add_argument("--rows", type=int, default=1_070_000, help="of drafts, if it is made")
    arguments = parser.parse_args()
    if arguments.page:
        measure_page(arguments.page)
        return
    folder = arguments.out / "whole"
    if not folder.exists():
        make_round(arguments.out, math.ceil(arguments.rows / ROWS_PER_SHARD), 2)
    measure(folder)


if __name__ == "__main__":
    main()
