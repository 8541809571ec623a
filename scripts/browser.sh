#!/bin/sh
# Find or install a headless Chromium, in which the tests open the page of mpd-report. As root, apt
# installs it; otherwise playwright downloads one into ~/.cache. Without a browser these tests are
# skipped, or fail if CI is set.
set -eu
cd "$(dirname "$0")/.."

found() { .venv/bin/python tests/browser.py >/dev/null 2>&1; }

if ! found && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "install: chromium (apt), for the tests of the report's page" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq \
        --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
if ! found; then
    echo "install: chromium (playwright), for the tests of the report's page" >&2
    .venv/bin/python -m playwright install --only-shell chromium >/dev/null 2>&1 || true
fi
if found; then
    touch .venv/.browser
else
    .venv/bin/python tests/browser.py || true
fi
