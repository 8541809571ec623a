"""What a study found: figures of each setting over its seeds, tables and plots.

Intervals are 95%, by paired bootstrap over problems, each with its mean over the seeds that had it:
they hold the trained models fixed. What training adds by chance shows in the spread between seeds,
which stands beside them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import write_json_atomic
from mpd_data.config import RewriteConfig
from mpd_data.inspect.compare import paired, per_problem
from mpd_data.inspect.stats import collect, round_stats, scan
from mpd_rounds.study.study import Group, Outcome, Run, Study

# Of the last optimiser step.
_LAST = ("loss", "kl", "student_entropy", "teacher_entropy", "topk_mass")


def write_results(study: Study, outcome: Outcome, out: Path) -> str:
    """Writes OUT/GROUP.json, GROUP.md and GROUP.svg for each group whose settings were asked for;
    returns the tables."""
    asked = {run.setting for run in outcome.runs} | {name for name, _ in outcome.stopped}
    halted = {name for name, _ in outcome.stopped}
    pages = []
    for group in study.group:
        names = [setting.name for setting in group.setting]
        if group.reference not in names:
            names.insert(0, group.reference)
        if not asked.issuperset(names):
            continue
        text = [
            f"# {group.title}\n\n{study.name}, seeds {', '.join(map(str, study.seeds))}"
            f"\n\n![accuracy against tokens]({group.name}.svg)\n"
        ]
        stopped = {
            f"{name}, seed {seed}": why
            for (name, seed), why in outcome.stopped.items()
            if name in names
        }
        found: list[dict[str, Any]] = []
        if group.reference not in halted:
            whole = [name for name in names if name not in halted]
            found = [_setting(group, name, outcome.runs) for name in whole]
            plot(group.title, found, out / f"{group.name}.svg")
            text += [f"{table}\n" for table in tables(group, found)]
        text += [f"Did not come to its end: {label}: {why}\n" for label, why in stopped.items()]
        figures = {"seeds": study.seeds, "settings": found, "stopped": stopped}
        write_json_atomic(out / f"{group.name}.json", figures)
        pages.append("\n".join(text))
        (out / f"{group.name}.md").write_text(pages[-1], encoding="utf-8")
    return "\n".join(pages)


def _setting(group: Group, name: str, runs: list[Run]) -> dict[str, Any]:
    """All that is known of a setting: its runs' costs, and for each round and evaluation set the
    figures of all seeds together."""
    mine = [run for run in runs if run.setting == name]
    against = [run for run in runs if run.setting == group.reference]
    last = max(against[0].evaluations)
    rounds = []
    for round_, sets in mine[0].evaluations.items():
        figures = {}
        for chosen in sets:
            paths = [run.evaluations[round_][chosen] for run in mine]
            bases = [run.evaluations[0][chosen] for run in mine]
            references = [run.evaluations[last][chosen] for run in against]
            figures[chosen] = _figures(paths, bases, references)
        rounds.append({"round": round_, "sets": figures})
    return {"name": name, "costs": [_cost(run) for run in mine], "rounds": rounds}


def _of_problems(paths: list[Path]) -> pl.DataFrame:
    """`per_problem` of all seeds: each problem's mean over the seeds that had it."""
    frames = [per_problem(path) for path in paths]
    return (
        pl.concat(frames)
        .group_by("prompt_id")
        .agg(
            pl.col("samples").sum(),
            # One seed without a gold answer, and the problem has none.
            pl.when(pl.col("accuracy").is_null().any())
            .then(None)
            .otherwise(pl.col("accuracy").mean())
            .alias("accuracy"),
            pl.col("tokens").mean(),
        )
        .sort("prompt_id")
    )


def _mean_accuracy(problems: pl.DataFrame) -> float | None:
    """None where a problem has no gold answer, as in `mpd_data.inspect.compare`."""
    if problems["accuracy"].null_count() > 0:
        return None
    return float(np.mean(problems["accuracy"].to_numpy()))


def _figures(paths: list[Path], bases: list[Path], references: list[Path]) -> dict[str, Any]:
    """One model of each seed on one evaluation set, and against the base and the reference. Raises
    ConfigError where they were not sampled on the same problems."""
    together = _of_problems(paths)
    rows = scan(paths, "rollouts")
    assert rows is not None
    tokens = pl.col("num_completion_tokens")
    whole = collect(
        rows.select(tokens.median().alias("median"), tokens.quantile(0.95, "nearest").alias("p95"))
    )
    stats = [round_stats([path]) for path in paths]

    def mean(table: str, column: str) -> float | None:
        """Over the seeds; None where one has none, such as tokens of wrong answers."""
        values = [tables[table][0][column] for tables in stats]
        return None if None in values else float(np.mean(values))

    # The largest k that all have; none without gold answers.
    passes = [tables["pass_at_k"][-1] for tables in stats if "pass_at_k" in tables]
    by_seed = [per_problem(path) for path in paths]
    result: dict[str, Any] = {
        "accuracy": _mean_accuracy(together),
        "accuracy_by_seed": [_mean_accuracy(frame) for frame in by_seed],
        "mean_tokens": float(np.mean(together["tokens"].to_numpy())),
        "mean_tokens_by_seed": [float(np.mean(frame["tokens"].to_numpy())) for frame in by_seed],
        "median_tokens": float(whole["median"].item()),
        "p95_tokens": float(whole["p95"].item()),
        "problems": together.height,
        "samples": int(together["samples"].sum()),
        "k": passes[0]["k"] if passes else None,
        "pass_at_k": float(np.mean([row["pass_at_k"] for row in passes])) if passes else None,
        "truncated": mean("rollouts", "truncated"),
        "no_answer": mean("rollouts", "no_answer"),
        **{
            name: mean("behaviour", name)
            for name in ("repetition", "markers_per_1k", "right_tokens", "wrong_tokens")
        },
    }
    for name, others in (("against_base", bases), ("against_reference", references)):
        other = _of_problems(others)
        if not other["prompt_id"].equals(together["prompt_id"]):
            raise ConfigError(
                f"{others[0]} and {paths[0]} (and the seeds after them) are not of the same"
                " problems. Did rows fail (errors/), or has a group evaluation sets of its own?"
            )
        result[name] = paired(other, together)
    return result


def _cost(run: Run) -> dict[str, Any]:
    """What a run generated, kept and trained on, over all its rounds. Of rewrites that were not in
    the template's format the tokens are not known and not counted."""
    rollouts, distill = scan(run.shards, "rollouts"), scan(run.shards, "distill")
    assert rollouts is not None and distill is not None
    kept = pl.col("status") == "ok"
    sampled = collect(rollouts.select(pl.col("num_completion_tokens").sum().alias("tokens")))
    written = collect(
        distill.select(
            pl.len().alias("rows"),
            kept.sum().alias("kept"),
            pl.col("num_rewritten_tokens").sum().alias("tokens"),
            (pl.col("rewrite_finish_reason") == "length").sum().alias("cut"),
            pl.col("compression_ratio").filter(kept).mean().alias("ratio"),
        )
    )
    rewrite = run.pipeline.rewrite
    generated = int(sampled.item())
    if rewrite.get("template") != "draft":
        limit = RewriteConfig.model_validate(
            {**rewrite, "teacher": run.pipeline.teacher, "shards": run.shards[0]}
        ).sampling.max_tokens
        generated += int(written["tokens"].item()) + limit * int(written["cut"].item())
    steps = [
        json.loads(line)
        for folder in run.trained
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [step for step in steps if "loss_tokens" in step]
    return {
        "seed": run.seed,
        "generated_tokens": generated,
        "rewrites": int(written["rows"].item()),
        "kept": int(written["kept"].item()),
        "kept_ratio": written["ratio"].item(),
        "steps": len(steps),
        "loss_tokens": sum(step["loss_tokens"] for step in steps),
        **{name: steps[-1][name] for name in _LAST},
        "model": run.model,
    }


# -- tables and plots ---------------------------------------------------------------------------


def tables(group: Group, settings: list[dict[str, Any]]) -> list[str]:
    """Markdown: the settings against the base and the reference, then on the other sets, then how
    they behave and what they cost."""
    sets = list(settings[0]["rounds"][0]["sets"])
    against: list[dict[str, str]] = []
    others: list[dict[str, str]] = []
    behaviour: list[dict[str, str]] = []
    costs: list[dict[str, str]] = []
    bases: list[Any] = []
    for setting in settings:
        first, last = setting["rounds"][0]["sets"], setting["rounds"][-1]["sets"]
        if first not in bases:
            # Settings that begin with another student have another base.
            label = "base" if not bases else f"base of {setting['name']}"
            bases.append(first)
            against.append(_against(label, first[sets[0]]))
            others.append(_others(label, first))
            behaviour.append(_behaviour(label, first[sets[0]]))
        against.append(_against(setting["name"], last[sets[0]]))
        others.append(_others(setting["name"], last))
        behaviour.append(_behaviour(setting["name"], last[sets[0]]))
        costs.append(_costs(setting))
    of = f"on `{sets[0]}`"
    return [
        f"Last round {of}: mean over seeds (lowest to highest seed); paired 95% intervals over"
        f" problems against the base and against `{group.reference}`, which hold the trained models"
        f" fixed.\n\n{_markdown(against)}",
        f"All evaluation sets: accuracy / mean tokens.\n\n{_markdown(others)}",
        f"Behaviour {of}.\n\n{_markdown(behaviour)}",
        f"Costs, means over seeds.\n\n{_markdown(costs)}",
    ]


def _spread(mean: float | None, seeds: list[float | None], form: str, factor: float = 1) -> str:
    known = [factor * seed for seed in seeds if seed is not None]
    if mean is None or len(known) < len(seeds):
        return "-"
    said = form.format(factor * mean)
    if len(known) < 2:
        return said
    return f"{said} ({form.format(min(known))} to {form.format(max(known))})"


def _change(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return "-"
    return f"{100 * value:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def _against(name: str, figures: dict[str, Any]) -> dict[str, str]:
    line = {
        "setting": name,
        "accuracy, %": _spread(figures["accuracy"], figures["accuracy_by_seed"], "{:.1f}", 100),
        "tokens": _spread(figures["mean_tokens"], figures["mean_tokens_by_seed"], "{:.1f}"),
    }
    for label, other in (("base", "against_base"), ("reference", "against_reference")):
        change = figures[other]
        line[f"accuracy against {label}, points"] = _change(
            change["accuracy_difference"], change["accuracy_difference_interval"]
        )
        line[f"tokens saved against {label}, %"] = _change(
            change["token_reduction"], change["token_reduction_interval"]
        )
    return line


def _others(name: str, sets: dict[str, Any]) -> dict[str, str]:
    return {"setting": name} | {
        chosen: f"{_spread(figures['accuracy'], [0.0], '{:.1f}', 100)}"
        f" / {figures['mean_tokens']:.1f}"
        for chosen, figures in sets.items()
    }


def _behaviour(name: str, figures: dict[str, Any]) -> dict[str, str]:
    def number(key: str, form: str, factor: float = 1.0) -> str:
        return "-" if figures[key] is None else form.format(factor * figures[key])

    return {
        "setting": name,
        f"pass@{figures['k'] or 'k'}, %": number("pass_at_k", "{:.1f}", 100),
        "median": number("median_tokens", "{:.0f}"),
        "p95": number("p95_tokens", "{:.0f}"),
        "tokens, right": number("right_tokens", "{:.1f}"),
        "tokens, wrong": number("wrong_tokens", "{:.1f}"),
        "truncated, %": number("truncated", "{:.2f}", 100),
        "no answer, %": number("no_answer", "{:.2f}", 100),
        "repetition, %": number("repetition", "{:.1f}", 100),
        "markers per 1k": number("markers_per_1k", "{:.2f}"),
    }


def _costs(setting: dict[str, Any]) -> dict[str, str]:
    def mean(key: str) -> float:
        return float(np.mean([cost[key] for cost in setting["costs"]]))

    return {
        "setting": setting["name"],
        "generated tokens": f"{mean('generated_tokens'):,.0f}",
        "kept, %": f"{100 * mean('kept') / mean('rewrites'):.1f}",
        "kept / draft tokens": f"{mean('kept_ratio'):.2f}",
        "updates": f"{mean('steps'):.0f}",
        "loss tokens": f"{mean('loss_tokens'):,.0f}",
        "last KL, nats": f"{mean('kl'):.4f}",
        "entropy of student / teacher": f"{mean('student_entropy'):.3f} /"
        f" {mean('teacher_entropy'):.3f}",
    }


def _markdown(rows: list[dict[str, str]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(title: str, settings: list[dict[str, Any]], out: Path) -> None:
    """Accuracy against tokens on the first evaluation set: each setting a line from the base
    through its rounds, with the 95% interval of its difference from the base at the last. Those
    without accuracy or intervals (one problem alone) are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "study", "svg.fonttype": "path"})
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for number, setting in enumerate(settings):
        points = [next(iter(r["sets"].values())) for r in setting["rounds"]]
        if points[-1]["against_base"]["accuracy_difference_interval"] is None:
            continue
        colour = colours[number % len(colours)]
        x = [p["mean_tokens"] for p in points]
        y = [100 * p["accuracy"] for p in points]
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        axes.plot(x[1:-1], y[1:-1], "o", color=colour, markersize=3)
        change, base = points[-1]["against_base"], points[0]
        low, high = change["accuracy_difference_interval"]
        saved = change["token_reduction_interval"]
        at_x = sorted(base["mean_tokens"] * (1 - part) for part in saved)
        axes.errorbar(
            x[-1],
            y[-1],
            xerr=[[max(x[-1] - at_x[0], 0)], [max(at_x[1] - x[-1], 0)]],
            yerr=[
                [max(y[-1] - y[0] - 100 * low, 0)],
                [max(100 * high - (y[-1] - y[0]), 0)],
            ],
            fmt="o",
            color=colour,
            markersize=6,
            linewidth=1,
            label=setting["name"],
        )
        axes.plot(x[0], y[0], "s", color="black", markersize=6)
    axes.set_xlabel("mean tokens of a trace")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{title} (squares: before training)", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    legend = axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for words in (axes.title, *legend.get_texts()):
        words.set_parse_math(False)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
