"""The wheel: whole, of the right version, and enough to run the example without a checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from conftest import MODULES, ROOT
from packaging.requirements import Requirement
from packaging.version import Version

import mpd_data

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def built(kind, root, out):
    """Build a "wheel" or an "sdist" of the folder `root` as pip does, without isolation."""
    build = f"import sys, hatchling.build as b; b.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, out], cwd=root, check=True, capture_output=True)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return a function that runs a module in an empty folder, the wheel unpacked beside it."""
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)

    def run(folder, *words):
        environment = {**os.environ, "PYTHONPATH": str(target)}
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_the_wheel_is_whole(wheel):
    """All files of the three packages that git knows, and the example's."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    listed = subprocess.run(
        ["git", "ls-files", "mpd_data", "mpd_train", "mpd_rounds"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    known = {name for name in listed.stdout.split() if (ROOT / name).exists()}
    example = {name for name in names if name.startswith("mpd_rounds/example/pocket/")}
    assert known <= names
    for name in example:
        source = ROOT / name.replace("mpd_rounds/example", "pipelines")
        assert zipfile.ZipFile(wheel).read(name) == source.read_bytes()
    for part in ("templates/tags.toml", "pipeline.toml.j2", ".sbatch", "style.css", "py.typed"):
        assert any(name.endswith(part) for name in names), part
    assert {name.split("/")[0] for name in names} == {"mpd_data", "mpd_train", "mpd_rounds"}


def test_the_sdist_gives_the_same_wheel(wheel, tmp_path):
    for name in ("sdist", "tree", "wheel"):
        (tmp_path / name).mkdir()
    sdist = built("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (root,) = (tmp_path / "tree").iterdir()
    assert (root / "tests" / "test_packaging.py").exists()
    again = built("wheel", root, tmp_path / "wheel")
    assert (again.name, again.read_bytes()) == (wheel.name, wheel.read_bytes())


@pytest.mark.slow
def test_the_example_runs_from_the_wheel(installed, tmp_path):
    """A dry run reads all prompts, both models and the template, and leaves nothing behind."""
    words = ("mpd_rounds", "--example", "pocket", "--out", "demo")
    plan = installed(tmp_path, *words, "--dry-run", "--json", "--set", "rounds=1")
    assert "round 1" in plan.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "pipelines").mkdir()  # a folder of that name is not taken for the example
    where = "import mpd_rounds.example as e; print(e.write(__import__('pathlib').Path('a \"b')))"
    (tmp_path / "where.py").write_text(where)
    installed(tmp_path, "where")
    folder = tmp_path / 'a "b'
    values = tomllib.loads((folder / "pipeline.toml").read_text(encoding="utf-8"))
    files = [values["student"], values["teacher"], values["rewrite"]["template"]]
    files += [p for e in values["evaluation"] for p in e["rollouts"]["prompts"]]
    assert all(name.startswith('a "b/') and (tmp_path / name).exists() for name in files)
    (folder / "pipeline.toml").write_text("edited = 1")
    installed(tmp_path, "where")
    assert (folder / "pipeline.toml").read_text() == "edited = 1"


def test_an_example_or_a_pipeline_is_given():
    from click.testing import CliRunner

    from mpd_rounds.cli import cli

    for words in ([], [str(ROOT / "pipelines/pocket/pipeline.toml"), "--example", "pocket"]):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 2
        assert "either a PIPELINE or --example" in result.output


def test_the_version_is_one(wheel, installed, tmp_path):
    version = mpd_data.__version__
    assert wheel.name.split("-")[1] == version
    for module in ("mpd_data", "mpd_train", "mpd_rounds", *MODULES.values()):
        assert installed(tmp_path, module, "--version").stdout.strip().endswith(version), module
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert f"Version {version}" in page


def test_every_extra_that_is_named_exists():
    """In messages, pages and scripts."""
    files = [ROOT / "README.md", ROOT / "Dockerfile", *(ROOT / "docs").glob("*.md")]
    files += [
        path for name in MODULES.values() for path in (ROOT / name.split(".")[0]).rglob("*.py")
    ]
    named = {"cpu", "gpu"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"(?:'\.|distillation)\[([a-z,-]+)\]", text):
            named.update(found.split(","))
        named.update(re.findall(r'requires\("([a-z-]+)"', text))
    assert named <= set(EXTRAS), named - set(EXTRAS)


def test_the_lowest_versions_are_the_bounds():
    """constraints/lowest.txt pins what pyproject.toml allows at least, and nothing else."""
    texts = [*PROJECT["project"]["dependencies"], *(x for extra in EXTRAS.values() for x in extra)]
    wanted = {}
    for requirement in map(Requirement, texts):
        floors = [s.version for s in requirement.specifier if s.operator == ">="]
        # vLLM brings its own versions of the others, so its lowest is tested by `make test`.
        if floors and not requirement.name.startswith("vllm"):
            wanted[requirement.name] = Version(floors[0])
    lines = (ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = map(Requirement, (line for line in lines if line and line[0] != "#"))
    found = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        found[pin.name] = Version(specifier.version)
    assert found == wanted
