"""What the documents say of the code: links, names, signatures, commands, the tour's files."""

import ast
import inspect
import re
import subprocess
import textwrap

import pytest
from conftest import ROOT

import mpd_data
import mpd_train
import mpd_train.kl

DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs").glob("*.ipynb"),
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
    known = commands_of("\n".join(re.findall(r"^```\w*\n(.*?)^```", page, re.M | re.S)))
    base = {"$folder": "pipelines/pocket/models/student", "$model": "base"}
    new = {"$folder": "runs/hand/train/model", "$model": "new"}
    for command in commands_of(script):
        for names in (base, new):
            wanted = command
            for name, value in names.items():
                wanted = wanted.replace(name, value)
            assert wanted in known, wanted


PUBLIC = {
    name: getattr(package, name)
    for package in (mpd_data, mpd_train, mpd_train.kl)
    for name in package.__all__
}


def python_of(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def signature(function):
    return f"{function.name}({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}"


def test_the_api_page_has_the_codes_signatures():
    page = ROOT / "docs" / "api.md"
    code = "\n".join(python_of(page))
    # A definition on the page ends without a body.
    code = re.sub(r"(?m)^((?:def |\)).*?-> .*)$", r"\1: ...", code)
    written = [signature(function) for function in ast.parse(code).body]
    functions = [value for value in PUBLIC.values() if inspect.isfunction(value)]
    wanted = [
        signature(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0])
        for function in functions
    ]
    assert sorted(written) == sorted(wanted)


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if not inspect.isfunction(v)])
def test_the_api_page_describes_each_class(name):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}` \| (.+) \|$", page, re.MULTILINE)
    fields = getattr(PUBLIC[name], "model_fields", None)
    if fields is not None:
        assert row == ", ".join(f"`{field}`" for field in fields)


def test_the_readmes_python_uses_names_that_exist():
    (code,) = python_of(ROOT / "README.md")
    tree = ast.parse(code)
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Assign):
            exec(ast.unparse(node), names)  # noqa: S102
    assert {name for name, value in names.items() if callable(value)} <= PUBLIC.keys()
    settings = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Config")
    ]
    assert len(settings) == 3
    for call in settings:
        eval(ast.unparse(call), names)  # noqa: S307
