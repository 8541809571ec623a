"""The results of a study: numbers for each setting over its seeds, tables and plots.

Intervals are 95%, by paired bootstrap over problems, each with its mean over the seeds that had it.
They hold the trained models fixed. The spread between seeds shows the chance in training.
"""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import write_json_atomic
from mpd_data.config import RewriteConfig
from mpd_data.inspect.compare import mean_accuracy, paired, per_problem, too_few
from mpd_data.inspect.stats import collect, quantile, round_stats, scan_round
from mpd_data.store.trainings import read_metrics
from mpd_rounds.report.labels import write_names
from mpd_rounds.report.plots import BASELINE
from mpd_rounds.study.study import Group, SettingRun, Study, StudyOutcome

# Of the last optimiser step.
_LAST = ("loss", "kl", "student_entropy", "teacher_entropy", "topk_mass")


def write_results(study: Study, outcome: StudyOutcome, out: Path) -> str:
    """Write OUT/GROUP.json, GROUP.md and GROUP.svg for each group whose settings were run. Return
    the tables."""
    halted = {name for name, _ in outcome.stopped}
    planned = {run.setting for run in outcome.runs} | halted
    pages = []
    for group in study.group:
        names = [setting.name for setting in group.setting]
        if group.reference not in names:
            names.insert(0, group.reference)
        if not planned.issuperset(names):
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
        settings: list[dict[str, Any]] = []
        baselines: dict[str, dict[str, Any]] = {}
        if group.reference not in halted:
            whole = [name for name in names if name not in halted]
            settings = [_setting(group, name, outcome.runs) for name in whole]
            baselines = _baselines(group, outcome.runs)
            plot(group, settings, baselines, out / f"{group.name}.svg")
            text += [f"{table}\n" for table in tables(group, settings, baselines)]
        text += [f"Did not finish: {label}: {why}\n" for label, why in stopped.items()]
        figures = {
            "seeds": study.seeds, "settings": settings, "baselines": baselines, "stopped": stopped,
        }  # fmt: skip
        write_json_atomic(out / f"{group.name}.json", figures)
        pages.append("\n".join(text))
        (out / f"{group.name}.md").write_text(pages[-1], encoding="utf-8")
    return "\n".join(pages)


def _setting(group: Group, name: str, runs: list[SettingRun]) -> dict[str, Any]:
    """Return the results of a setting: the costs of its runs, and for each round and evaluation set
    the figures over all seeds."""
    own = [run for run in runs if run.setting == name]
    reference = [run for run in runs if run.setting == group.reference]
    last = max(reference[0].evaluations)
    rounds = []
    for round_, sets in own[0].evaluations.items():
        figures = {}
        for chosen in sets:
            paths = [run.evaluations[round_][chosen] for run in own]
            bases = [run.evaluations[0][chosen] for run in own]
            references = [run.evaluations[last][chosen] for run in reference]
            figures[chosen] = _figures(paths, bases, references)
        rounds.append({"round": round_, "sets": figures})
    return {"name": name, "costs": [_cost(run) for run in own], "rounds": rounds}


def _baselines(group: Group, runs: list[SettingRun]) -> dict[str, dict[str, Any]]:
    """Return the figures over all seeds of each baseline of the reference, by evaluation set."""
    reference = [run for run in runs if run.setting == group.reference]
    last = max(reference[0].evaluations)
    return {
        f"{BASELINE}{name}": {
            chosen: _figures(
                [run.baselines[name][chosen] for run in reference],
                [run.evaluations[0][chosen] for run in reference],
                [run.evaluations[last][chosen] for run in reference],
            )
            for chosen in sets
        }
        for name, sets in reference[0].baselines.items()
    }


def _over_seeds(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Return `per_problem` over all seeds: each problem's mean over the seeds that had it."""
    return (
        pl.concat(frames)
        .group_by("prompt_id")
        .agg(
            pl.col("samples").sum(),
            # If one seed lacks the gold answer, the problem has none for all.
            pl.when(pl.col("accuracy").null_count() == 0).then(pl.col("accuracy").mean()),
            pl.col("tokens").mean(),
        )
        .sort("prompt_id")
    )


def _figures(paths: list[Path], bases: list[Path], references: list[Path]) -> dict[str, Any]:
    """Return the figures of one model per seed on one evaluation set, also against the base and the
    reference. Raise ConfigError if they were not sampled on the same problems."""
    by_seed = [per_problem(path) for path in paths]
    together = _over_seeds(by_seed)
    tokens = pl.col("num_completion_tokens")
    median, p95 = collect(
        pl.concat(map(scan_round, paths)).select(
            median=quantile(tokens, 0.5), p95=quantile(tokens, 0.95)
        )
    ).row(0)
    stats = [round_stats([path]) for path in paths]

    def mean(table: str, column: str) -> float | None:
        """Return the mean over seeds; None if a seed has no value (no wrong answers)."""
        values = [tables[table][0][column] for tables in stats]
        return None if None in values else float(np.mean(values))

    # pass@k at the largest k; absent without gold answers.
    passes = [tables["pass_at_k"][-1] for tables in stats if "pass_at_k" in tables]
    result: dict[str, Any] = {
        "accuracy": mean_accuracy(together),
        "accuracy_by_seed": [mean_accuracy(frame) for frame in by_seed],
        "mean_tokens": float(np.mean(together["tokens"].to_numpy())),
        "mean_tokens_by_seed": [float(np.mean(frame["tokens"].to_numpy())) for frame in by_seed],
        "median_tokens": float(median),
        "p95_tokens": float(p95),
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
        other = _over_seeds([per_problem(path) for path in others])
        if not other["prompt_id"].equals(together["prompt_id"]):
            raise ConfigError(
                f"{others[0]} and {paths[0]} (or the seeds after them) do not have the same"
                " problems. Did rows fail (errors/), or does a group have other evaluation sets?"
            )
        result[name] = paired(other, together)
    return result


def _cost(run: SettingRun) -> dict[str, Any]:
    """Return what a run generated, kept and trained on, over all its rounds. Rewrites that were not
    in the template's format are not counted: their tokens are not known."""
    rollouts = pl.concat(scan_round(folder) for folder in run.shards)
    distill = pl.concat(scan_round(folder, "distill") for folder in run.shards)
    kept = pl.col("status") == "ok"
    generated = int(collect(rollouts.select(pl.col("num_completion_tokens").sum())).item())
    written = collect(
        distill.select(
            rows=pl.len(),
            kept=kept.sum(),
            ratio=pl.col("compression_ratio").filter(kept).mean(),
        )
    ).row(0, named=True)
    for round_, folder in enumerate(run.shards, start=1):
        rewrite = run.pipeline.section("rewrite", round_)
        if rewrite.get("template") != "draft":
            limit = RewriteConfig.model_validate(
                {**rewrite, "teacher": run.pipeline.teacher, "shards": folder}
            ).sampling.max_tokens
            cut = (pl.col("rewrite_finish_reason") == "length").sum()
            tokens = pl.col("num_rewritten_tokens").sum() + limit * cut
            generated += int(collect(scan_round(folder, "distill").select(tokens)).item())
    metrics = itertools.chain.from_iterable(map(read_metrics, run.trained))
    steps = [step for step in metrics if "loss_tokens" in step]
    return {
        "seed": run.seed,
        "generated_tokens": generated,
        "rewrites": written["rows"],
        "kept": written["kept"],
        "kept_ratio": written["ratio"],
        "steps": len(steps),
        "loss_tokens": sum(step["loss_tokens"] for step in steps),
        **{name: steps[-1][name] for name in _LAST},
        "model": run.model,
    }


# -- tables and plots ---------------------------------------------------------------------------


def tables(
    group: Group, settings: list[dict[str, Any]], baselines: dict[str, dict[str, Any]]
) -> list[str]:
    """Return Markdown tables: baselines and settings against base and reference, on all sets,
    their behaviour, and the settings' costs."""
    sets = list(settings[0]["rounds"][0]["sets"])
    bases: list[Any] = []
    models: list[tuple[str, dict[str, Any]]] = []  # name, figures by evaluation set
    for setting in settings:
        first, last = setting["rounds"][0]["sets"], setting["rounds"][-1]["sets"]
        if first not in bases:
            # Settings that start from another student have another base.
            models.append((f"base of {setting['name']}" if bases else "base", first))
            bases.append(first)
            if len(bases) == 1:
                models += baselines.items()
        models.append((setting["name"], last))
    against = [_against(name, figures[sets[0]]) for name, figures in models]
    others = [_others(name, figures) for name, figures in models]
    behaviour = [_behaviour(name, figures[sets[0]]) for name, figures in models]
    warning = too_few(models[0][1][sets[0]])
    few = f" {warning.capitalize()}." if warning else ""
    return [
        f"Last round on `{sets[0]}`: mean over seeds (lowest to highest seed). The 95% intervals"
        f" against the base and against `{group.reference}` are paired over problems and hold the"
        f" trained models fixed.{few}\n\n{_markdown(against)}",
        f"All evaluation sets: accuracy / mean tokens.\n\n{_markdown(others)}",
        f"Behaviour on `{sets[0]}`.\n\n{_markdown(behaviour)}",
        f"Costs, means over seeds.\n\n{_markdown(list(map(_costs, settings)))}",
    ]


def _spread(mean: float | None, seeds: list[float | None], form: str, factor: float = 1) -> str:
    known = [factor * seed for seed in seeds if seed is not None]
    if mean is None or len(known) < len(seeds):
        return "-"
    text = form.format(factor * mean)
    if len(known) < 2:
        return text
    return f"{text} ({form.format(min(known))} to {form.format(max(known))})"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(factor * value)


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
        chosen: f"{_number(figures['accuracy'], '{:.1f}', 100)} / {figures['mean_tokens']:.1f}"
        for chosen, figures in sets.items()
    }


def _behaviour(name: str, figures: dict[str, Any]) -> dict[str, str]:
    return {
        "setting": name,
        f"pass@{figures['k'] or 'k'}, %": _number(figures["pass_at_k"], "{:.1f}", 100),
        "median": _number(figures["median_tokens"], "{:.0f}"),
        "p95": _number(figures["p95_tokens"], "{:.0f}"),
        "tokens, right": _number(figures["right_tokens"], "{:.1f}"),
        "tokens, wrong": _number(figures["wrong_tokens"], "{:.1f}"),
        "truncated, %": _number(figures["truncated"], "{:.2f}", 100),
        "no answer, %": _number(figures["no_answer"], "{:.2f}", 100),
        "repetition, %": _number(figures["repetition"], "{:.1f}", 100),
        "markers per 1k": _number(figures["markers_per_1k"], "{:.2f}"),
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


_OURS, _OTHERS, _FREE, _BASE = "#1f5fa8", "#b4531a", "#5c636b", "#1a1d21"


def plot(
    group: Group, settings: list[dict[str, Any]], baselines: dict[str, dict[str, Any]], out: Path
) -> None:
    """Plot accuracy against tokens on the first evaluation set.

    Each setting is a line from its base (a square) through its rounds, with the 95% interval of the
    last round's difference from the base. The reference and its variants ("REFERENCE, ...") have
    one colour, the other settings another; baselines are hollow. A value that lies far from all
    others is drawn at the edge, with its figures. Settings without accuracy or intervals (a single
    problem) are left out."""
    first = group.evaluation[0]
    lines = []  # name, colour, figures of base and rounds
    for setting in settings:
        name, points = setting["name"], [r["sets"][first] for r in setting["rounds"]]
        is_ours = name == group.reference or name.startswith(f"{group.reference}, ")
        lines.append((name, _OURS if is_ours else _OTHERS, points))
    base = next(points[0] for name, _, points in lines if name == group.reference)
    for name, figures in baselines.items():
        lines.append((name.removeprefix(BASELINE), _FREE, [base, figures[first]]))
    lines = [
        (name, colour, points) for name, colour, points in lines
        if points[-1]["against_base"]["accuracy_difference_interval"] is not None
    ]  # fmt: skip
    # `parse_math` off: labels are data and may hold dollar signs.
    style = {
        "svg.hashsalt": "study", "svg.fonttype": "path", "text.parse_math": False,
        "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 72,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.25)
        named: list[tuple[str, float, float, str, bool]] = []
        bases = {(points[0]["mean_tokens"], points[0]["accuracy"]) for _, _, points in lines}
        for x, y in sorted(bases):
            axes.plot(x, 100 * y, "s", color=_BASE, markersize=6, zorder=4)
            named.append(("base", x, 100 * y, _BASE, False))
        every = [point for _, _, points in lines for point in points]
        bounds = {name: _bounds(points[0], points[-1]) for name, _, points in lines}
        x_limits = _limits([p["mean_tokens"] for p in every], [x for x, _ in bounds.values()])
        y_limits = _limits([100 * p["accuracy"] for p in every], [y for _, y in bounds.values()])
        for name, colour, points in lines:
            last = points[-1]
            x, y = last["mean_tokens"], 100 * last["accuracy"]
            at = min(max(x, x_limits[0]), x_limits[1]), min(max(y, y_limits[0]), y_limits[1])
            if at != (x, y):
                text = f"{name}: {x:,.0f} tokens, {y:.0f}%"
                axes.plot(*at, marker="X", color=colour, markersize=8, zorder=4, clip_on=False)
                named.append((text, *at, colour, False))
                continue
            is_free = colour == _FREE
            if not is_free:
                way = [(p["mean_tokens"], 100 * p["accuracy"]) for p in points]
                axes.plot(*zip(*way, strict=True), color=colour, linewidth=1, alpha=0.35, zorder=2)
                for round_ in way[1:-1]:
                    axes.plot(*round_, "o", color=colour, markersize=3)
            thin: dict[str, Any] = {"color": colour, "linewidth": 1.2, "alpha": 0.45, "zorder": 3}
            axes.hlines(y, *bounds[name][0], **thin)
            axes.vlines(x, *bounds[name][1], **thin)
            axes.plot(x, y, "o", color=colour, markersize=6.5, markeredgewidth=1.5, zorder=4,
                      markerfacecolor="white" if is_free else colour)  # fmt: skip
            named.append((name, x, y, colour, is_free))
        axes.set_xlim(*x_limits)
        axes.set_ylim(*y_limits)
        axes.set_xlabel("mean tokens of a trace")
        axes.set_ylabel("accuracy, %")
        axes.set_title(group.title, fontsize=11, loc="left")
        write_names(axes, named, "white")
        figure.savefig(out, metadata={"Date": None})


def _bounds(
    base: dict[str, Any], last: dict[str, Any]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the intervals of a model's difference from its base, around its tokens and its
    accuracy in %."""
    change = last["against_base"]
    saved, gained = change["token_reduction_interval"], change["accuracy_difference_interval"]
    tokens = (base["mean_tokens"] * (1 - saved[1]), base["mean_tokens"] * (1 - saved[0]))
    accuracy = (100 * (base["accuracy"] + gained[0]), 100 * (base["accuracy"] + gained[1]))
    return tokens, accuracy


def _limits(values: list[float], bounds: list[tuple[float, float]]) -> tuple[float, float]:
    """Return an axis' limits, with a margin. A value without which the others need less than half
    of the axis is left outside; the intervals `bounds` around the others are inside."""
    ordered = sorted(values)
    if len(ordered) > 4:
        whole = ordered[-1] - ordered[0]
        for rest in (ordered[1:], ordered[:-1]):
            if rest[-1] - rest[0] < whole / 2:
                ordered = rest
                break
    inside = [b for b in bounds if b[0] <= ordered[-1] and ordered[0] <= b[1]]
    low = min([ordered[0], *(b[0] for b in inside)])
    high = max([ordered[-1], *(b[1] for b in inside)])
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin
