"""Compare trained models with what costs nothing: the base and its baselines on one evaluation set.

The free points are the base and each baseline, by mean tokens and accuracy. The frontier joins
those that no other free point dominates: none is as short and as accurate, and better in one.

A model is *beyond* a free point if, on the problems that both answered, with the paired 95%
intervals of `compare`:

* it saves tokens (the interval of the tokens saved lies above 0), and its accuracy is not below the
  point's by MARGIN or more (the lower end of the difference lies above -MARGIN), or
* it is more accurate (the interval of the difference lies above 0).

It is beyond the frontier if it is beyond each free point. As it must pass with each, the number of
points needs no correction: more points make the test harder, never easier.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.common.errors import ConfigError
from mpd_data.inspect.compare import evaluate, paired, per_problem, too_few

MARGIN = 0.02


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points, (mean tokens, accuracy), that no other dominates, the
    shortest first."""
    best, names = float("-inf"), []
    for name, (_, accuracy) in sorted(points.items(), key=lambda p: (p[1][0], -p[1][1])):
        if accuracy > best:
            best = accuracy
            names.append(name)
    return names


def is_beyond(against: Mapping[str, Any], margin: float = MARGIN) -> bool:
    """Return whether a model is beyond a free point. `against`: differences of `compare.paired`,
    free point to model. Without intervals (one problem) or accuracy it is not."""
    saved, gained = against["token_reduction_interval"], against["accuracy_difference_interval"]
    if saved is None or gained is None:
        return False
    is_shorter, is_as_accurate, is_better = saved[0] > 0, gained[0] > -margin, gained[0] > 0
    return bool((is_shorter and is_as_accurate) or is_better)


def judge(free: Mapping[str, Path], models: Mapping[str, Path]) -> dict[str, Any] | None:
    """Compare `models` with the `free` points, both folders of rollouts by name; the first free
    point is the base.

    Return `points` (`compare.evaluate` of each free point, and its paired differences from the
    base), `frontier` (their names, the shortest first), `margin`, and for each of `models`:
    `beyond` (of the whole frontier), `verdict` (a sentence) and `against` (for each free point:
    `beyond`, `problems` and the paired differences). None without gold answers. Raise
    ConfigError if two share no problem.
    """
    points = {name: evaluate(folder) for name, folder in free.items()}
    if any(point["accuracy"] is None for point in points.values()):
        return None
    means = {name: per_problem(folder) for name, folder in free.items()}
    base = next(iter(free))
    for name in free:
        points[name] |= _paired(means[base], means[name], free[base], free[name])
    judged = {}
    for model, folder in models.items():
        own, against = per_problem(folder), {}
        for name in free:
            differences = _paired(means[name], own, free[name], folder)
            against[name] = {"beyond": is_beyond(differences), **differences}
        judged[model] = {
            "beyond": all(one["beyond"] for one in against.values()),
            "verdict": verdict(model, against),
            "against": against,
        }
    line = frontier({n: (p["mean_tokens"], p["accuracy"]) for n, p in points.items()})
    return {"points": points, "frontier": line, "margin": MARGIN, "models": judged}


def _paired(left: pl.DataFrame, right: pl.DataFrame, *names: Path) -> dict[str, Any]:
    """Return `compare.paired` of the problems that both sides have, which may be fewer where rows
    failed, and their number as `problems`."""
    left, right = (
        one.join(other, on="prompt_id", how="semi").sort("prompt_id")
        for one, other in ((left, right), (right, left))
    )
    if not left.height:
        raise ConfigError(
            f"{names[0]} and {names[1]} share no prompt. A paired comparison needs the same prompts"
            " on both sides."
        )
    return {"problems": left.height, **paired(left, right)}


def verdict(model: str, against: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence that says whether `model` is beyond the frontier, with its differences from
    the strongest free point.

    That is, of the points that it is not beyond (else of all), the shortest of those whose accuracy
    is not shown to be below the model's; where there is none, the most accurate.
    """
    passed = all(one["beyond"] for one in against.values())
    rivals = [name for name, one in against.items() if passed or not one["beyond"]]
    level = [n for n in rivals if not _is_less_accurate(against[n])]
    if level:
        name = min(level, key=lambda n: against[n]["token_reduction"])
    else:
        name = min(rivals, key=lambda n: against[n]["accuracy_difference"])
    one = against[name]
    saved = one["token_reduction"]
    bounds = one["token_reduction_interval"]
    sign = 1 if saved >= 0 else -1
    tokens = f"{100 * abs(saved):.0f}%"
    if bounds is not None:
        tokens += " [{:.0f}, {:.0f}]".format(*sorted(100 * sign * bound for bound in bounds))
    gained = f"{100 * one['accuracy_difference']:+.1f} points"
    if (bounds := one["accuracy_difference_interval"]) is not None:
        gained += " [{:+.1f}, {:+.1f}]".format(*(100 * bound for bound in bounds))
    head = "is beyond all that is free" if passed else "is not shown to be beyond what is free"
    others = ", ".join(n for n in rivals if n != name)
    more = f", nor is it beyond {others}" if others and not passed else ""
    sentence = (
        f"{model} {head}: it uses {tokens} {'fewer' if saved >= 0 else 'more'} tokens than the"
        f" {name}; its accuracy differs by {gained}{more}."
    )
    warning = too_few(one)
    return f"{sentence} {warning.capitalize()}." if warning else sentence


def _is_less_accurate(one: Mapping[str, Any]) -> bool:
    """Return whether the free point is shown to be less accurate than the model."""
    interval = one["accuracy_difference_interval"]
    return interval is not None and interval[0] > 0
