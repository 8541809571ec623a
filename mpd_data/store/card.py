"""A round's README.md: what the folder holds, and the front matter by which `datasets` and the
Hub's viewer find the shards of each stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpd_data.common.files import atomic_file

_SAYS = {
    "rollouts": "a row is a solution that {model} sampled (a draft): its prompt, text and token"
    " ids, and whether its answer is right.",
    "distill": "a row is a rewrite of a draft by {teacher}, with its log-probabilities of the"
    " rewrite's tokens. Train on the rows whose `status` is `ok`; in the others it says why they"
    " were rejected.",
}


def round_card(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the card of a round, by the `stages` of its run.json.

    Each stage is a configuration of its own, because their columns differ. The last one, which is
    trained on, is the default.
    """
    names = [name for name in _SAYS if name in stages]
    front, body = [], []
    for name in reversed(names):
        front += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
        front += ["  default: true"] * (name == names[-1])
    for name in names:
        config = stages[name].get("details", {}).get("config", {})
        models = {part: _shown(config.get(part)) for part in ("model", "teacher")}
        body.append(f"* `{name}`: {_SAYS[name].format(**models)}")
    loads = [f'{name} = load_dataset(".", "{name}", split="train")' for name in names]
    return "\n".join([
        "---", "configs:", *front, "tags:", "- mixed-policy-distillation", "---",
        "# A round of Mixed-Policy Distillation", "",
        *body, "",
        "In place of `.`: the path of this folder, or its repository on the Hub.", "",
        "```python", "from datasets import load_dataset", "", *loads, "```", "",
        "`run.json` has the settings. No licence is declared: those of the prompts and of the"
        " models decide.", "",
    ])  # fmt: skip


def update_card(
    folder: Path, old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the card of the stages `new` to `folder`, unless someone has changed that of `old`."""
    path = folder / "README.md"
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != round_card(old):
        return
    with atomic_file(path) as file:
        file.write(round_card(new))


def _shown(model: Any) -> str:
    """Return a model's name without the folders of this machine."""
    name = str(model)
    return f"`{Path(name).name if Path(name).is_dir() else name}`"
