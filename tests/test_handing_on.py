"""What others do with a round: open it with `datasets`, see it on the Hub."""

import os
import shutil

from conftest import python, rewrite_arguments, run

from mpd_data.inspect.stats import scan_round
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import SCHEMAS


def loaded(round_dir, tmp_path):
    """Return the number of rows and the columns that `datasets` finds by stage, and by default."""
    out = python(
        """
        import sys
        from datasets import load_dataset
        for name in (*sys.argv[2:], None):
            data = load_dataset(sys.argv[1], name, split="train")
            print(name, len(data), "|".join(data.column_names))
        """,
        round_dir,
        "rollouts",
        "distill",
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    ).stdout
    rows = (line.split(" ", 2) for line in out.strip().splitlines())
    return {name: (int(count), columns.split("|")) for name, count, columns in rows}


def test_datasets_opens_each_stage_of_a_round(round_dir, tmp_path):
    found = loaded(round_dir, tmp_path)
    for stage in ("rollouts", "distill"):
        rows = scan_round(round_dir, stage).select("row_id").collect().height
        assert found[stage] == (rows, SCHEMAS[stage].names)
    assert found["None"] == found["distill"]
    card = (round_dir / "README.md").read_text()
    assert (
        "`student` sampled" in card and "by `teacher`" in card and "/" not in card.split("---")[2]
    )


def test_the_card_follows_the_stages_until_someone_changes_it(round_dir, tmp_path):
    copy = shutil.copytree(round_dir, tmp_path / "round")
    path = copy / "README.md"
    with RoundDir(copy).lock():
        RoundDir(copy).discard("distill")
    assert "distill" not in path.read_text()
    path.write_text(path.read_text() + "licence: mine\n")
    run("mpd-gen", *rewrite_arguments(copy), "--limit", "2")
    assert path.read_text().endswith("licence: mine\n")
