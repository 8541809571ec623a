"""How wide is a 95% interval? Of simulated evaluations with nothing gained, by the bootstrap over
problems that `mpd-gen compare` uses:

    python benchmarks/intervals.py

A problem's chance to be solved is drawn from a beta distribution with the set's mean and a + b = 1:
most problems are solved nearly always or nearly never, as they are by models of this kind. Prints a
Markdown table of half-widths in points, the mean of SIMULATIONS evaluations.
"""

import math

import numpy as np
import numpy.typing as npt

from mpd_data.inspect.compare import _interval, _resampled_means

SIMULATIONS = 40
K = 4

Numbers = npt.NDArray[np.float64]


def pass_at_k(right: npt.NDArray[np.int64], samples: int) -> Numbers:
    """The chance that one of K samples is right, of each problem's count of right ones
    [problems]."""
    chances = [1 - math.comb(samples - n, K) / math.comb(samples, K) for n in range(samples + 1)]
    return np.array(chances)[right]


def half_width(draws: Numbers) -> float:
    low, high = _interval(draws)
    return 100 * (high - low) / 2


def half_widths(
    rng: np.random.Generator, problems: int, samples: int, mean: float
) -> tuple[float, float, float, float]:
    """Of avg@n and pass@K of one side, then of their paired differences between two sides that are
    equally good."""
    chance = rng.beta(mean, 1 - mean, problems)
    base, new = (rng.binomial(samples, chance) for _ in range(2))
    columns = [base / samples, new / samples, pass_at_k(base, samples), pass_at_k(new, samples)]
    means = _resampled_means(columns)
    return (
        half_width(means[0]),
        half_width(means[2]),
        half_width(means[1] - means[0]),
        half_width(means[3] - means[2]),
    )


def main() -> None:
    rng = np.random.default_rng(0)
    print("| problems | samples each | mean | avg@n | pass@4 | avg@n, paired | pass@4, paired |")
    print("|---|---|---|---|---|---|---|")
    for problems, samples, mean in (
        (30, 4, 0.65),
        (30, 16, 0.65),
        (30, 64, 0.65),
        (500, 4, 0.65),
        (500, 16, 0.65),
        (500, 4, 0.93),
        (1319, 4, 0.93),
    ):
        found = [half_widths(rng, problems, samples, mean) for _ in range(SIMULATIONS)]
        cells = " | ".join(f"±{width:.1f}" for width in np.mean(found, axis=0))
        print(f"| {problems:,} | {samples} | {mean} | {cells} |")


if __name__ == "__main__":
    main()
