"""Find the browser in which the tests open pages.

`python tests/browser.py` prints its path, or how to install one.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
HOW = (
    "No Chromium found. As root, run apt-get install chromium; otherwise .venv/bin/python -m"
    " playwright install --only-shell chromium, or put a `chromium` on PATH."
)


def find_browser(own):
    """Return the path of a Chromium: this machine's, or playwright's `own` download, or None."""
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    return own if Path(own).exists() else None


if __name__ == "__main__":
    with sync_playwright() as playwright:
        path = find_browser(playwright.chromium.executable_path)
        if path is None:
            sys.exit(HOW)
        # Launch it: some distributions have a `chromium` that only names another package.
        playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]).close()
    print(path)
