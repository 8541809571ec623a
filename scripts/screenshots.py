"""Take the pictures of the documentation: python scripts/screenshots.py runs/demo

Needs a finished run of the demo and the tests' browser. Writes docs/view*.png and docs/report.png.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import HOW, find_browser  # noqa: E402  # a module of the tests

BIN = Path(sys.executable).parent
SIZES = {"wide": (1200, 760), "phone": (390, 780)}


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

        def opened(file: Path, size: str, scheme: str) -> object:
            width, height = SIZES[size]
            tab = chromium.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            tab.goto(file.as_uri())
            return tab

        def taken(tab: object, name: str) -> None:
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
        taken(opened(folder / "report.html", "wide", "light"), "report.png")
        chromium.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as made:
        main(Path(sys.argv[1]), Path(made))
