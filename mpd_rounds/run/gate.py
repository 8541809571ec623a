"""The gate: decide after each round, by its accuracy on held-out problems, whether to go on.

A round is compared with the base student, problem by problem, on all problems of an evaluation set
and on its hard third. Samples of one problem are alike, so the problem is the unit (Miller 2024,
arXiv:2411.00640). A round is

* accepted if on both the difference is above -margin at the level of a look (a non-inferiority
  test; both must pass, so two tests need no correction: Berger 1982, Technometrics 24:295),
* refused if on either the difference is below -margin at that level,
* undecided otherwise: the problems are too few to tell.

Each planned round is a look, and a look has the level alpha / rounds (Bonferroni). So the chance to
accept any round that has lost its margin is at most alpha, however the looks depend on each other
and whether or not the run goes on after one that is undecided. O'Brien and Fleming's boundaries are
for looks at one effect while its data grow. Here each look has another student and the same
problems, and they would spend nearly nothing on the first round.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import write_json_atomic
from mpd_data.common.text import format_table
from mpd_data.inspect import compare as comparison
from mpd_data.inspect.frontier import judge
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.steps import Gate

Numbers = npt.NDArray[np.float64]
Outcome = Literal["accepted", "refused", "undecided"]

# The chance that a student as accurate as the base is accepted, for the number of problems needed.
POWER = 0.8
ALL, HARD = "all problems", "the hard third"


# -- statistics ------------------------------------------------------------------------------------


def bounds(sums: Numbers, shares: Numbers, level: float) -> tuple[Numbers, Numbers]:
    """Return the lower and the upper bound of a mean difference, each one-sided at `level`.

    `sums`, `shares` [..., problems]: each problem's difference in [-1, 1] times its share, and its
    share (1, or less where not each choice of the hard third took it). The mean is that of sums
    over that of shares. Other dimensions are independent cases.

    Two problems are added, one won and one lost: without them, problems that all stay as they are
    would have an interval of no width (Bonett and Price 2012, J. Educ. Behav. Stat. 37:479). The
    normal quantiles are corrected for skew, as a loss is often a few problems lost altogether (Hall
    1983, J. R. Stat. Soc. B 45:35).
    """
    z = NormalDist().inv_cdf(1 - level)
    total = shares.sum(-1) + 2
    mean = sums.sum(-1) / total
    rest = sums - mean[..., None] * shares
    second, third = (
        ((rest**k).sum(-1) + (1 - mean) ** k + (-1 - mean) ** k) / total for k in (2, 3)
    )
    error = np.sqrt(second / total)
    skew = third / second**1.5 * (2 * z * z + 1) / (6 * np.sqrt(total))
    return mean - error * (z - skew), mean + error * (z + skew)


def spread(sums: Numbers, shares: Numbers) -> float:
    """Return the variance of a problem's difference. Arguments as for `bounds`."""
    rest = sums - sums.sum() / shares.sum() * shares
    return float((rest**2).sum() / shares.sum())


def problems_needed(variance: float, margin: float, level: float) -> int:
    """Return how many problems accept a student that is as accurate as the base with the chance
    POWER, if a problem's difference has this variance.

    It is the smallest n with (z + z') · standard error <= margin (arXiv:2411.00640, section 5); z
    and z' are the quantiles of level and power, and the error is that of `bounds` without skew: its
    square is (n · variance + 2) / (n + 2)².
    """
    quantiles = NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(POWER)
    k = (quantiles / margin) ** 2
    half = k * variance / 2 - 2
    return math.ceil(half + math.sqrt(half * half + 2 * k - 4))


# -- one round -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """The test of a round's accuracy on some problems. `difference` is that from the base, `low`
    and `high` its one-sided bounds, as fractions. `needed`: problems that the whole set must have
    for this margin."""

    on: str
    problems: int
    margin: float
    difference: float
    low: float
    high: float
    outcome: Outcome
    needed: int


@dataclass(frozen=True)
class Free:
    """A baseline beside a model. The differences are those of the model from the baseline, with
    their paired 95% intervals. The baseline `does_as_well` if it takes no more tokens and is no
    less accurate."""

    baseline: str
    does_as_well: bool
    token_reduction: float
    token_reduction_interval: list[float] | None
    accuracy_difference: float
    accuracy_difference_interval: list[float] | None


@dataclass(frozen=True)
class Decision:
    """What the gate says of a round, and why. `level`: that of this look; `problems`: of the set;
    `token_reduction`: tokens saved against the base."""

    round: int
    outcome: Outcome
    goes_on: bool
    why: str
    problems: int
    level: float
    token_reduction: float
    findings: list[Finding]


def shown(decision: dict[str, Any]) -> str:
    """Return a decision, as gate.json holds it, and its numbers in lines."""
    rows = [
        {
            "accuracy on": finding["on"],
            "problems": finding["problems"],
            "difference": _points(finding["difference"]),
            f"bounds at {100 * decision['level']:.3g}%": (
                f"{_points(finding['low'])} to {_points(finding['high'])}"
            ),
            "margin": _points(-finding["margin"]),
            "outcome": finding["outcome"],
            "problems the set needs": finding["needed"],
        }
        for finding in decision["findings"]
    ]
    return f"gate, round {decision['round']}: {decision['why']}\n{format_table(rows)}"


def _points(value: float) -> str:
    # A zero, or what rounds to it, has no minus.
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def decide(plan: Plan, gate: Gate, round_: int) -> Decision:
    """Judge a round whose evaluations have finished. The same rows and settings always give the
    same decision.

    Raise ConfigError where the round and the base cannot be compared problem by problem.
    """
    base, new = (plan.evaluation(r, plan.pipeline.gated) for r in (0, round_))
    compared = comparison.compare(base, new)
    total, level = compared["base"]["problems"], gate.alpha / plan.pipeline.rounds
    findings = []
    for on, (sums, shares) in _differences(base, new).items():
        margin = gate.margin if on == ALL else gate.margin_on_hard
        low, high = (float(bound) for bound in bounds(sums, shares, level))
        outcome: Outcome = "undecided"
        if low > -margin:
            outcome = "accepted"
        elif high < -margin:
            outcome = "refused"
        needed = problems_needed(spread(sums, shares), margin, level) * total / shares.sum()
        difference = float(sums.sum() / shares.sum())
        numbers = (margin, difference, low, high, outcome, math.ceil(needed))
        findings.append(Finding(on, sums.size, *numbers))
    outcome, goes_on, why = _outcome(plan, gate, findings, total)
    saved = compared["token_reduction"]
    return Decision(round_, outcome, goes_on, why, total, level, saved, findings)


def _differences(base: Path, new: Path) -> dict[str, tuple[Numbers, Numbers]]:
    """Return `sums` and `shares`, as for `bounds`, of the accuracy of `new` less that of `base`, on
    all problems with gold answers and on their hard third. Raise ConfigError without either."""
    left, right = (comparison.per_problem(path) for path in (base, new))
    hard = comparison.on_hard_third(base, new)
    gains = (right["accuracy"] - left["accuracy"]).drop_nulls().to_numpy()
    if hard is None or not gains.size:
        raise ConfigError(
            f"{base}: the gate needs problems with gold answers, and two samples of each. Complete"
            " the prompts of this evaluation, or remove [gate]."
        )
    easier, harder, times = hard
    # A row of the hard third is a sum over the one or two choices that took its problem.
    return {
        ALL: (gains, np.ones(gains.size)),
        HARD: ((harder["accuracy"] - easier["accuracy"]).to_numpy() / 2, times.to_numpy() / 2),
    }


def _outcome(
    plan: Plan, gate: Gate, findings: list[Finding], problems: int
) -> tuple[Outcome, bool, str]:
    """Return the outcome of a round, whether the run goes on after it, and why."""
    lost = [f for f in findings if f.outcome == "refused"]
    if lost:
        which = " and on ".join(f"{f.on} more than {100 * f.margin:.1f} points" for f in lost)
        return "refused", False, f"refused: of its accuracy it has lost, on {which}."
    if all(finding.outcome == "accepted" for finding in findings):
        return "accepted", True, "accepted: it has kept its accuracy within both margins."
    needed = max(finding.needed for finding in findings)
    why = (
        f"undecided: {problems:,} problems do not show whether it has lost more than the margin."
        f" Of students as accurate as the base, {needed:,} problems accept {100 * POWER:.0f}%."
        f" Raise num_prompts of evaluation {plan.pipeline.gated!r}, or the margin."
    )
    return "undecided", gate.undecided == "continue", why


def beside(plan: Plan, round_: int) -> list[Free]:
    """Compare a round (0: the base) with each baseline on the gate's set, problem by problem."""
    model = plan.evaluation(round_, plan.pipeline.gated)
    folders = {f.name: f.folder for f in plan.baseline_folders() if f.set == plan.pipeline.gated}
    judged = judge(folders, {"model": model}) if folders else None
    free = []
    for name, one in judged["models"]["model"]["against"].items() if judged else ():
        tokens, accuracy = one["token_reduction"], one["accuracy_difference"]
        free.append(
            Free(
                baseline=name,
                does_as_well=tokens <= 0 and accuracy <= 0,
                token_reduction=tokens,
                token_reduction_interval=one["token_reduction_interval"],
                accuracy_difference=accuracy,
                accuracy_difference_interval=one["accuracy_difference_interval"],
            )
        )
    return free


# -- the run ---------------------------------------------------------------------------------------


def conclude(plan: Plan, decisions: list[Decision]) -> dict[str, Any]:
    """Return what the gate says of the run so far: of each of its `rounds` the decision and the
    baselines beside it (`free`), the `best` model (of the last accepted round, else the base),
    after which round it `stopped` the run (or None), and `text`.

    Write it to OUT/gate.json, and make OUT/best a link to the best model. There is no link if that
    is the base.
    """
    last = decisions[-1]
    best = max((d.round for d in decisions if d.outcome == "accepted"), default=0)
    model, name = plan.student(best), f"round {best}" if best else "the base student"
    stopped = None if last.goes_on else last.round
    head = f"round {last.round} was the last."
    if stopped is not None:
        head = f"stopped after round {stopped}, which is {last.outcome}."
    elif last.round < plan.pipeline.rounds:
        head = f"goes on after round {last.round}."
    tail = f"The model to take is that of {name}: {model}"
    if best == 0:
        tail = f"No round was accepted. Keep {name}: {model}"
    text = [f"gate: {head} {tail}"]
    text += _advice(name, best, beside(plan, best))
    link = plan.out / "best"
    if link.exists() and not link.is_symlink():
        raise ConfigError(f"{link}: expected a link that the gate makes. Move this folder away.")
    link.unlink(missing_ok=True)
    if best:
        link.symlink_to(Path(model).relative_to(plan.out))
    result = {
        "set": plan.pipeline.gated,
        "rounds": [
            {**asdict(decision), "free": [asdict(f) for f in beside(plan, decision.round)]}
            for decision in decisions
        ],
        "stopped": stopped,
        "best": {"round": best, "model": model},
        "text": text,
    }
    write_json_atomic(plan.out / "gate.json", result)
    return result


def _advice(name: str, best: int, free: list[Free]) -> list[str]:
    """Return what the baselines say of a model: of round `best`, or of the base (0)."""
    if not free:
        return []
    as_well = [f for f in free if f.does_as_well]
    if not as_well:
        return [f"No baseline does as well as {name}: each is longer or less accurate."]
    one = min(as_well, key=lambda f: f.token_reduction)
    lead = "Do not train: the" if best else "The"
    # The other way round: of the baseline against the model.
    saved, gained = 1 - 1 / (1 - one.token_reduction), -one.accuracy_difference
    return [
        f"{lead} baseline {one.baseline} costs nothing and does as well as {name}:"
        f" {100 * saved:.1f}% fewer tokens, accuracy {_points(gained)} points"
        f"{_interval(one.accuracy_difference_interval)}."
    ]


def _interval(bounds_: list[float] | None) -> str:
    if bounds_ is None:
        return ""
    low, high = (-bound for bound in reversed(bounds_))
    return f" (95% interval {_points(low)} to {_points(high)})"


def remove(out: Path) -> None:
    """Remove what an earlier run with a gate has left in `out`."""
    (out / "gate.json").unlink(missing_ok=True)
    if (out / "best").is_symlink():
        (out / "best").unlink()


# -- before the run --------------------------------------------------------------------------------


def size_note(plan: Plan, gate: Gate, problems: int, samples: int, is_measured: bool) -> str:
    """Return a line: how many problems the margins need, with the variance of the base's rows if it
    `is_measured`, else of problems that are each solved half the time. `problems`, `samples` of
    each: of the set."""
    level = gate.alpha / plan.pipeline.rounds
    variances = dict.fromkeys((ALL, HARD), _variance(0.5, samples))
    source = "each problem solved half the time, the worst case"
    if is_measured:
        variances = _of_base(plan.evaluation(0, plan.pipeline.gated))
        source = "the base's rows"
    on_all = problems_needed(variances[ALL], gate.margin, level)
    on_hard = 3 * problems_needed(variances[HARD], gate.margin_on_hard, level)
    most = max(on_all, on_hard)
    enough = "enough" if problems >= most else f"SHORT by {most - problems:,}"
    return (
        f"gate: a margin of {100 * gate.margin:.1f} points needs {on_all:,} problems, one of"
        f" {100 * gate.margin_on_hard:.1f} on the hard third {on_hard:,}; evaluation"
        f" {plan.pipeline.gated!r} has {problems:,}, {samples} samples of each: {enough}. With"
        f" that many, {100 * POWER:.0f}% of the students that solve each problem as often as the"
        f" base are accepted, at {100 * level:.3g}% a look (arXiv:2411.00640; {source}). More"
        " samples of a problem lower the number of problems."
    )


def _variance(chance: float, samples: float) -> float:
    """Return the variance of the difference of two means of `samples` with this chance each."""
    return 2 * chance * (1 - chance) / samples


def _of_base(base: Path) -> dict[str, float]:
    """Return the variance of a problem's difference between the base and an equal student."""
    _differences(base, base)
    problems = comparison.graded(comparison.per_problem(base))
    rates, samples = problems["accuracy"].to_numpy(), problems["samples"].to_numpy()
    hard = comparison.on_hard_third(base, base)
    assert hard is not None
    chance = float(hard[0]["accuracy"].to_numpy().sum() / hard[2].to_numpy().sum())
    return {
        # Without bias: rates of few samples are nearer to 0 and 1 than the chances behind them.
        ALL: float((2 * rates * (1 - rates) / np.maximum(samples - 1, 1)).mean()),
        # The hard problems were chosen by their rates, so their spread is not known; none is most.
        HARD: _variance(chance, float(samples.mean())),
    }
