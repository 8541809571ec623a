"""Make the data of test_golden.py: a few rows of a round, and the curves of trainings on them.

    PYTHONPATH=. .venv/bin/python tests/golden.py ROUND    new rows from ROUND, and new curves
    PYTHONPATH=. .venv/bin/python tests/golden.py          new curves from the present rows

If a change alters the curves, its commit must say why.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from mpd_data.store.round import RoundDir
from mpd_data.store.schema import METADATA_KEY
from mpd_data.store.writer import ShardWriter
from mpd_train.config import TrainConfig
from mpd_train.loop import train

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "data" / "golden"
STUDENT = ROOT / "pipelines" / "pocket" / "models" / "student"
TEACHER = ROOT / "pipelines" / "pocket" / "models" / "teacher"
ROWS = 32
# The fields of metrics.jsonl that do not depend on time or machine.
FIELDS = (
    "loss", "kl", "student_entropy", "teacher_entropy", "topk_mass", "teacher_tail_mass",
    "agreement", "grad_norm", "learning_rate", "loss_tokens", "tokens",
)  # fmt: skip
RUNS = {
    "forward_kl": {},
    "reverse_kl_clipped": {"loss": {"divergence": "reverse_kl", "divergence_clip": 0.5}},
    "jsd_ce": {"loss": {"divergence": "jsd", "beta": 0.3, "ce_weight": 0.3}},
    "dense_tempered": {"teacher": str(TEACHER), "loss": {"kl_temperature": 2.0}},
    "adapters": {"lora": {"lora_r": 4}, "gradient_accumulation_steps": 2},
}


def curve(name: str, out: Path) -> list[dict[str, float]]:
    """Train on the golden rows into `out`. Return the FIELDS of each step."""
    settings = {
        "shards": [FOLDER / "round1"], "student": str(STUDENT), "out": out, "pack_length": 600,
        "dtype": "float32", "epochs": 2, "optimizer": {"learning_rate": 5e-4},
    }  # fmt: skip
    train(TrainConfig(**{**settings, **RUNS[name]}))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{field: json.loads(line)[field] for field in FIELDS} for line in lines]


def make_rows(source: Path) -> None:
    """Write the shortest kept rewrites of a round's first shard as the golden rows."""
    file = RoundDir(source).shard_paths("distill")[0]
    table = pq.read_table(file)
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    for name in ("schema_version", "stage"):  # the writer adds these
        del metadata[name]
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    rows.sort(key=lambda row: (len(row["input_ids"]), row["row_id"]))
    shutil.rmtree(FOLDER / "round1", ignore_errors=True)
    golden = RoundDir(FOLDER / "round1")
    with golden.lock(), ShardWriter(golden, "distill", metadata) as writer:
        for row in rows[:ROWS]:
            writer.add(row)


def main() -> None:
    if len(sys.argv) > 1:
        make_rows(Path(sys.argv[1]))
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            curves[name] = curve(name, Path(folder) / name)
    (FOLDER / "curves.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
