"""The README.md of an exported model or adapter: its head, which the Hub reads, and how it was
trained."""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mpd_data.common.files import atomic_file
from mpd_data.common.hub import dataset_of
from mpd_data.common.models import ModelFiles
from mpd_data.common.version import __version__
from mpd_data.inspect.compare import count_text, too_few
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import read_record
from mpd_train.config import TrainConfig

_TAG = "mixed-policy-distillation"
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """What a card says of a training: its settings; the step whose weights are in the folder, and
    the steps planned, where these are known; and the title of the card."""

    config: TrainConfig
    title: str
    step: int | None = None
    planned: int | None = None

    @property
    def length(self) -> str:
        """How long the weights were trained."""
        config, planned = self.config, self.planned
        if self.step is not None and self.step != planned:
            return f"step {self.step:,}" + ("" if planned is None else f" of {planned:,} planned")
        return f"{config.max_steps} steps" if config.max_steps else f"{config.epochs} epoch(s)"


def write_card(folder: Path, student: ModelFiles, trained: Trained) -> None:
    """Write the card of the model, or the adapter, in `folder`. `student`: what was trained.

    The base model and the licence are those that the student's own card declares, where it has one:
    a student of a later round is a folder of an earlier one. A hub id is its own base. Datasets are
    those of the hub that the rounds' prompts come from.
    """
    config = trained.config
    own = _card_of(student.path)
    is_folder = Path(student.name).is_dir()
    data = ModelCardData(
        base_model=own.base_model if is_folder and own else None if is_folder else student.name,
        license=own.license if own else None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag="text-generation",
        datasets=_datasets(config.shards) or None,
        tags=[_TAG],
    )
    loss, optimizer, lora = config.loss, config.optimizer, config.lora
    of_adapters = {"Adapters": f"LoRA of rank {lora.lora_r}"} if lora.lora_r else {}
    facts = {
        "Student": Path(student.name).name if is_folder else student.name,
        **_made_by(config),
        "Loss": loss.divergence + (f", {loss.ce_weight:g} of cross-entropy" * (loss.ce_weight > 0)),
        "Training": f"{trained.length}, learning rate {optimizer.learning_rate:g},"
        f" seed {config.seed}",
        **of_adapters,
    }
    facts["Made with"] = f"mixed-policy-distillation {__version__}"
    text = "\n".join(f"* {name}: {value}" for name, value in facts.items())
    card = ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {trained.title}\n\n"
        "A student of Mixed-Policy Distillation (arXiv:2605.08776): it learns shorter traces from a"
        f" teacher's rewrites of its own.\n\n{text}\n{_prompt(config.shards[-1])}"
    )
    card.save(folder / "README.md")


def _settings(shards: Path, stage: str) -> dict[str, Any]:
    """Return the settings of a round's stage, by its run.json; nothing where it has none."""
    found = read_record(shards).get("stages", {}).get(stage, {}).get("details", {})
    settings: dict[str, Any] = found.get("config", {})
    return settings


def _prompt(shards: Path) -> str:
    """Return a section on the prompt that the student was trained to answer, by a round's run.json.
    Nothing where it is the problem as it is."""
    settings = _settings(shards, "rollouts")
    texts = {
        "System message": settings.get("system_prompt"),
        "User's message": settings.get("prompt_template"),
    }
    shown = {name: text for name, text in texts.items() if text and text != "{{problem}}"}
    if not shown:
        return ""
    # Indented, a line of it is no heading and no fence.
    blocks = (f"{name}:\n\n{indent(text, ' ' * 4)}\n" for name, text in shown.items())
    return "\n## Prompt\n\nIt learned to answer briefly after this prompt.\n\n" + "\n".join(blocks)


def _made_by(config: TrainConfig) -> dict[str, str]:
    """Return who wrote the rewrites of the last round, by its run.json, and what is learned."""
    shards = config.shards[-1]
    told = _settings(shards, "distill")
    if not told:
        return {}
    teacher = str(told["teacher"])
    name = Path(teacher).name if Path(teacher).is_dir() else teacher
    counts = RoundDir(shards).count_statuses()
    seen = {
        "problem": "after the problem alone",
        "rewrite": "after the problem and the draft",
        "mixed": "after the problem and the draft; of numbers that the draft gives away, after the"
        " problem alone",
        "masked": "after the problem and the draft, without numbers that the draft gives away",
        # A training from before --targets was required.
        "both": "after the problem alone",
    }
    return {
        "Teacher": name,
        "Rewrites": f"{counts.get('ok', 0):,} kept of {sum(counts.values()):,}, of the last round",
        "Teacher's probabilities": seen[config.loss.targets or told["score_context"]],
    }


def _datasets(rounds: list[Path]) -> list[str]:
    """Return the hub's datasets that the prompts of `rounds` come from, by their run.json."""
    prompts = (_settings(each, "rollouts").get("prompts", []) for each in rounds)
    found = (dataset_of(source) for sources in prompts for source in sources)
    return list(dict.fromkeys(name for name in found if name))


def _card_of(model: Path) -> ModelCardData | None:
    """Return the head of a model folder's README.md; None where there is none that can be read."""
    path = model / "README.md"
    if not path.is_file():
        return None
    try:
        data: ModelCardData = ModelCard.load(path, ignore_metadata_errors=True).data
    except ValueError:  # no YAML, or no text
        return None
    return data


def add_results(folder: Path, name: str, base: Results, results: Results) -> None:
    """Write a model's results into its card in `folder`, as the model `name`, beside those of the
    `base` that the first round began with.

    Results are what `mpd_data.inspect.compare.evaluate` returns, by evaluation set. A card that is
    not there, or has another head than ours, is left alone.
    """
    path = folder / "README.md"
    data = _card_of(folder)
    if data is None or _TAG not in (data.tags or []):
        return
    card = ModelCard.load(path)
    card.data.model_name = name
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=chosen,
            dataset_name=chosen,
            metric_type=metric,
            metric_name=f"{metric}, 95% interval {low:.4g} to {high:.4g}",
            metric_value=round(result[metric], 4),
        )
        for chosen, result in results.items()
        for metric in ("accuracy", "mean_tokens")
        if result[metric] is not None and (interval := result[f"{metric}_interval"])
        for low, high in [interval]
    ]
    before = re.split("^## Results$", card.text, maxsplit=1, flags=re.M)[0].rstrip()
    titled = re.sub("^# .*", lambda _: f"# {name}", before, count=1, flags=re.M)
    card.text = f"{titled}\n\n## Results\n\n{_table(base, results)}"
    with atomic_file(path) as file:
        file.write(str(card))


def _table(base: Results, results: Results) -> str:
    lines = ["| problems | | base | this model |", "|---|---|---|---|"]
    for chosen, result in results.items():
        for metric in ("accuracy", "mean_tokens"):
            before, now = (_with_interval(each, metric) for each in (base[chosen], result))
            words = metric.replace("_", " ")
            lines.append(f"| {chosen}: {count_text(result)} | {words} | {before} | {now} |")
    notes = ["With 95% intervals over the problems."]
    if any(result["graded"] < result["problems"] for result in results.values()):
        notes.append("Accuracy is that of the problems with gold answers.")
    few = ((chosen, too_few(result)) for chosen, result in results.items())
    notes += [f"{chosen}: {warning}." for chosen, warning in few if warning]
    return "\n".join([*lines, "", " ".join(notes), ""])


def _with_interval(result: dict[str, Any], metric: str) -> str:
    """Return a value as a cell: percent or tokens; a dash without gold answers."""
    value, interval = result[metric], result[f"{metric}_interval"]
    if value is None:
        return "-"
    scale, unit = (100, "%") if metric == "accuracy" else (1, "")
    around = "" if interval is None else " [{:.1f}, {:.1f}]".format(*(scale * x for x in interval))
    return f"{scale * value:.1f}{unit}{around}"
