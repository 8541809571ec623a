"""Take the pictures of the documentation: python scripts/screenshots.py runs/demo

Needs a finished run of the demo and the tests' browser. Writes docs/view*.png, docs/report*.png and
docs/status*.png.
"""

import html
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import HOW, find_browser  # noqa: E402  # a module of the tests

BIN = Path(sys.executable).parent
SIZES = {"wide": (1200, 760), "phone": (390, 780)}


# A terminal, as a page.
TERMINAL = """<!doctype html><meta name="color-scheme" content="light dark"><style>
body { margin: 0; } pre { display: inline-block; margin: 0; padding: 16px 20px; color: #1a1d21;
background: #f5f7f9; font: 13px/1.45 "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { pre { color: #e8ebee; background: #14171b; } }
</style><pre>{}</pre>"""


def status_of_a_job(folder: Path) -> str:
    """Sample with the pocket student, and return what `mpd-gen status` says halfway."""
    pocket = ROOT / "pipelines" / "pocket"
    job = subprocess.Popen(
        [BIN / "mpd-gen", "rollouts", "--model", pocket / "models" / "student", "--prompts",
         ROOT / "data" / "pocket" / "train.jsonl", "--out", "data/round1", "--num-samples", "4",
         "--id-column", "id", "--answer-column", "answer", "--max-tokens", "400", "--dtype",
         "float32"], cwd=folder, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    status = [BIN / "mpd-gen", "status", "data/round1"]

    def asked(*more: str) -> str:
        environment = {**os.environ, "COLUMNS": "100"}
        return subprocess.run(
            [*status, *more], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE,
            text=True,
        ).stdout  # fmt: skip

    try:
        while not (folder / "data" / "round1" / ".status").exists():
            time.sleep(0.5)
        while True:
            (said,) = json.loads(asked("--json"))["data/round1"]["writers"]
            if said["state"] == "running" and said["rows"] > 0.4 * said["total"]:
                return "$ mpd-gen status data/round1 --watch\n" + asked()
            time.sleep(0.5)
    finally:
        job.kill()
        job.wait()


def main(run: Path, folder: Path) -> None:
    """Open the pages of `run` and take their pictures."""
    page = folder / "traces.html"
    evaluations = [run / "eval" / name for name in ("base-test", "round2-test")]
    subprocess.run(
        [BIN / "mpd-gen", "view", *sorted((run / "data").glob("round*")), "--evaluations",
         *evaluations, "--out", page], check=True,
    )  # fmt: skip
    subprocess.run([BIN / "mpd-report", run, "--out", folder], check=True)
    with sync_playwright() as playwright:
        path = find_browser(playwright.chromium.executable_path)
        if path is None:
            sys.exit(HOW)
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])

        def opened(file: Path, size: str, scheme: str) -> Page:
            width, height = SIZES[size]
            tab = chromium.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            tab.goto(file.as_uri())
            return tab

        def taken(tab: Page, name: str) -> None:
            tab.screenshot(path=ROOT / "docs" / name)
            tab.close()

        for name, size, scheme in (
            ("view.png", "wide", "light"), ("view-dark.png", "wide", "dark"),
            ("view-phone.png", "phone", "light"),
        ):  # fmt: skip
            tab = opened(page, size, scheme)
            tab.wait_for_selector("#list li")
            tab.select_option("[name=status]", "ok")
            tab.select_option("[name=measure]", "worst")
            tab.select_option("[name=order]", "down")
            if name == "view-dark.png":
                tab.click("#tab-pairs")
                tab.select_option("[name=change]", "lost")
            else:
                tab.keyboard.press("t")
                tab.locator(".token").nth(8).hover()
            if size == "phone":
                tab.locator("#row").scroll_into_view_if_needed()
                tab.evaluate("document.querySelector('#row').scrollIntoView()")
            taken(tab, name)
        for name, size, scheme in (
            ("report.png", "wide", "light"), ("report-dark.png", "wide", "dark"),
            ("report-phone.png", "phone", "light"),
        ):  # fmt: skip
            taken(opened(folder / "report.html", size, scheme), name)
        terminal = folder / "status.html"
        terminal.write_text(TERMINAL.replace("{}", html.escape(status_of_a_job(folder))))
        for name, scheme in (("status.png", "light"), ("status-dark.png", "dark")):
            tab = opened(terminal, "wide", scheme)
            tab.locator("pre").screenshot(path=ROOT / "docs" / name)
            tab.close()
        chromium.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as made:
        main(Path(sys.argv[1]), Path(made))
