"""What the documents say of the code: the tour's files, links, and the commands of the tutorial."""

import re
import subprocess

import pytest
from conftest import ROOT

DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / "pipelines").glob("*/README.md"),
        *(ROOT / "data").glob("*.md"),
    ]
)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(text):
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{path.name}: {target}"


def test_the_readme_is_short_and_begins_with_the_installation():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:40])
    assert "pip install" in first
    assert "mpd-rounds" in first


def test_the_tours_path_is_short():
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8").split("## Where the rest")[0]
    path = re.findall(r"^\d+\. \[`([^`]+)`\]", text, re.MULTILINE)
    assert 0 < len(path) <= 16
    lengths = [len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in path]
    assert sum(lengths) <= 3000, dict(zip(path, lengths, strict=True))


def commands_of(text):
    """The mpd-… commands of a script or page, one line each."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if re.match(r"\s*mpd-", line)]


def test_the_tutorial_does_what_the_script_does():
    script = (ROOT / "pipelines" / "pocket" / "by_hand.sh").read_text(encoding="utf-8")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    known = commands_of("\n".join(re.findall(r"^```\n(.*?)^```", page, re.M | re.S)))
    base = {"$folder": "pipelines/pocket/models/student", "$model": "base"}
    new = {"$folder": "runs/hand/train/model", "$model": "new"}
    for command in commands_of(script):
        for names in (base, new):
            wanted = command
            for name, value in names.items():
                wanted = wanted.replace(name, value)
            assert wanted in known, wanted
