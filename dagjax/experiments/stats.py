"""Paired statistics over seeds: times to a target, win rates, intervals, Holm.

Every figure is paired by seed, and every function is safe for diverged runs: a
loss that is not finite reaches no target, wins nothing and is on par with nothing.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 9999

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Rate(NamedTuple):
    """Wins among `n` seeds, their rate and its Clopper-Pearson interval."""

    wins: int
    n: int
    rate: float
    low: float
    high: float


class Interval(NamedTuple):
    """A mean over seeds and its bootstrap interval."""

    mean: float
    low: float
    high: float


class Test(NamedTuple):
    """A one-sided test: its p value, its answer, the upper confidence bound."""

    __test__ = False  # for pytest: not a class of tests

    pvalue: float
    passed: bool
    bound: float


def smooth(losses: ArrayLike, window: int = 3) -> Floats:
    """Trailing moving average along the last axis, `[..., T]`.

    `s[t] = mean(l[max(0, t - window + 1) : t + 1])`: it never looks ahead, so that a
    smoothed time is never earlier than the losses it is made of.

    >>> smooth([4.0, 2.0, 0.0, 1.0], window=2).tolist()
    [4.0, 3.0, 1.0, 0.5]
    """
    if window < 1:
        raise ValueError(f"window is {window}; give at least 1 (1 is no smoothing)")
    values = np.asarray(losses, np.float64)
    length = values.shape[-1]
    total = np.zeros_like(values)
    # Shifted sums, not a cumulative sum: one nan spoils its own windows only.
    with np.errstate(invalid="ignore"):
        for lag in range(min(window, length)):
            total[..., lag:] += values[..., : length - lag]
    return total / np.minimum(np.arange(length) + 1, window)


def time_to(losses: ArrayLike, steps: ArrayLike, target: ArrayLike) -> Floats:
    """First step at which a loss is at or below its target.

    `K = min{steps[t] : losses[t] <= target}`, nan where there is none (censored).

    Args:
      losses: losses, `[..., T]`.
      steps: the increasing steps at which they were measured, `[T]`.
      target: broadcast over the leading axes; one that is not finite is not reached.

    >>> time_to([[3.0, 2.0, 1.0], [3.0, 3.0, 3.0]], [0, 10, 20], 2.0).tolist()
    [10.0, nan]
    """
    values, when = np.asarray(losses, np.float64), np.asarray(steps, np.float64)
    if when.ndim != 1 or not when.size or values.shape[-1:] != when.shape:
        raise ValueError(
            f"losses have shape {values.shape} and steps {when.shape}; give one step "
            "for each entry of the last axis of losses"
        )
    if not np.all(np.diff(when) > 0):
        raise ValueError(
            f"steps {when.tolist()} do not increase; sort them, none twice"
        )
    goal = np.asarray(target, np.float64)[..., None]
    hit = np.isfinite(values) & np.isfinite(goal) & (values <= goal)
    return np.where(hit.any(-1), when[hit.argmax(-1)], np.nan)


def not_later(times_sub: ArrayLike, times_dense: ArrayLike) -> Bools:
    """Where the sub-network reached its target, and not later than the dense one.

    Times are `[seed]`, nan where censored; a tie is a win.

    >>> not_later([5.0, 7.0, float("nan")], [5.0, 6.0, 6.0]).tolist()
    [True, False, False]
    """
    sub, dense = _paired(times_sub, times_dense)
    return np.isfinite(sub) & (sub <= np.where(np.isnan(dense), np.inf, dense))


def rate_of(wins: ArrayLike, *, level: float = 0.95) -> Rate:
    """Rate of wins with its exact interval (Clopper and Pearson, 1934).

    >>> rate_of([True] * 10)[:3]
    (10, 10, 1.0)
    """
    from scipy.stats import binomtest

    won = _seeds(wins).astype(bool)
    count, n = int(won.sum()), won.size
    low, high = binomtest(count, n).proportion_ci(level, method="exact")
    return Rate(count, n, count / n, float(low), float(high))


def win_rate(times_sub: ArrayLike, times_dense: ArrayLike) -> Rate:
    """Rate of seeds in which the sub-network was `not_later`, with a 95% interval.

    >>> rate = win_rate([1.0, 2.0, 3.0], [1.0, 1.0, 9.0])
    >>> rate.wins, rate.n, round(rate.low, 3), round(rate.high, 3)
    (2, 3, 0.094, 0.992)
    """
    return rate_of(not_later(times_sub, times_dense))


def mcnemar(
    wins_a: ArrayLike,
    wins_b: ArrayLike,
    *,
    alternative: Literal["greater", "less", "two-sided"] = "greater",
) -> float:
    """P value of McNemar's exact test that `a` wins more often than `b`.

    Only the discordant seeds speak: `p = P(Bin(n10 + n01, 1/2) >= n10)`, 1 where there
    are none (McNemar 1947, in the exact form).

    >>> mcnemar([True] * 5, [False] * 4 + [True])
    0.0625
    """
    from scipy.stats import binomtest

    a, b = (x.astype(bool) for x in _paired(wins_a, wins_b))
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, alternative=alternative).pvalue)


def mean_interval(values: ArrayLike, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean over seeds with its percentile bootstrap interval (Efron, 1979).

    The interval is a point for equal values, nan for a single seed.

    >>> mean_interval([2.0, 2.0, 2.0])
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    data = _seeds(values).astype(np.float64)
    if data.size == 1 or not np.isfinite(data).all():
        return _without_interval(data)
    if np.ptp(data) == 0:
        return Interval(*[float(data[0])] * 3)
    # Drawn here: scipy.stats.bootstrap renamed its seed argument between versions.
    draws = np.random.default_rng(seed).choice(data, (RESAMPLES, data.size)).mean(-1)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def t_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean over seeds with Student's interval, wide enough for few seeds too.

    >>> round(t_interval([1.0, 2.0, 3.0]).high, 3)
    4.484
    """
    from scipy.stats import t

    data = _seeds(values).astype(np.float64)
    if data.size == 1 or not np.isfinite(data).all():
        return _without_interval(data)
    mean = float(data.mean())
    half = t.ppf((1 + level) / 2, data.size - 1) * data.std(ddof=1) / data.size**0.5
    return Interval(mean, float(mean - half), float(mean + half))


def _without_interval(data: Floats) -> Interval:
    """The mean of one seed; nan where a value is not finite."""
    mean = float(data.mean()) if np.isfinite(data).all() else np.nan
    return Interval(mean, np.nan, np.nan)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """`mean_interval` of `a - b`, resampling seeds and so keeping the pairs.

    >>> paired_bootstrap([1.5, 2.5], [1.0, 2.0])
    Interval(mean=0.5, low=0.5, high=0.5)
    """
    return mean_interval(_difference(a, b), level=level, seed=seed)


def non_inferior(
    loss_sub: ArrayLike, loss_dense: ArrayLike, margin: float, *, level: float = 0.95
) -> Test:
    """Test that the sub-network is worse by less than a margin fixed in advance.

    The one-sided paired t test of `H0: E[d] >= margin` for `d = sub - dense`:
    `t = (mean d - margin) / (sd d / sqrt n)`, `p = P(T_{n-1} <= t)`. Without
    variance the answer is exact: `p = 0` if `d <= margin` (equal is on par), else 1.
    With fewer than two seeds or a diverged run, p is 1.

    >>> non_inferior([1.0, 1.1, 1.2], [1.0, 1.2, 1.1], margin=0.5).passed
    True
    """
    if not margin >= 0:
        raise ValueError(f"margin is {margin}; give a tolerated loss difference >= 0")
    diff = _difference(loss_sub, loss_dense)
    if diff.size < 2 or not np.isfinite(diff).all():
        return Test(1.0, False, np.inf)
    pvalue, bound = _t_test_below(diff, margin, level)
    return Test(pvalue, pvalue <= 1 - level, bound)


def _t_test_below(diff: Floats, margin: float, level: float) -> tuple[float, float]:
    """P value of `E[diff] < margin` and the upper bound of the mean."""
    from scipy.stats import t

    if np.ptp(diff) == 0:
        return float(diff[0] > margin), float(diff[0])
    mean, error = diff.mean(), diff.std(ddof=1) / np.sqrt(diff.size)
    pvalue = t.cdf((mean - margin) / error, diff.size - 1)
    return float(pvalue), float(mean + t.ppf(level, diff.size - 1) * error)


def restricted_mean_time(
    times: ArrayLike, horizon: float, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over seeds of `min(time, horizon)`, censored runs counting the horizon.

    The restricted mean survival time (Irwin, 1949), here with censoring at the
    horizon only, so that no Kaplan-Meier curve is needed.

    >>> restricted_mean_time([10.0, float("nan")], 20.0).mean
    15.0
    """
    # fmin passes over nan, which is exactly the rule for a censored run.
    restricted = np.fmin(_seeds(times).astype(np.float64), float(horizon))
    return mean_interval(restricted, level=level, seed=seed)


def holm(pvalues: ArrayLike) -> Floats:
    """P values adjusted for the size of their family (Holm, 1979).

    `adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))` for sorted `p_(1..m)`; nan
    stays nan and does not count.

    >>> holm([0.01, 0.04, float("nan"), 0.03]).tolist()
    [0.03, 0.06, nan, 0.06]
    """
    p = np.asarray(pvalues, np.float64)
    if p.ndim != 1 or np.any((p < 0) | (p > 1)):
        raise ValueError(f"pvalues are {p.tolist()}; give a vector of values in [0, 1]")
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # nan sorts last
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted


def _seeds(values: ArrayLike) -> NDArray[np.generic]:
    """The values as a vector with one entry a seed, at least one."""
    array = np.asarray(values)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"got values of shape {array.shape}; give a vector with one entry for each "
            "of at least one seed"
        )
    return array


def _paired(
    a: ArrayLike, b: ArrayLike
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Both as vectors over the same seeds."""
    left, right = _seeds(a), _seeds(b)
    if left.shape != right.shape:
        raise ValueError(
            f"got {left.size} and {right.size} seeds; pair the runs, one of each a seed"
        )
    return left, right


def _difference(a: ArrayLike, b: ArrayLike) -> Floats:
    """Paired difference, nan where both runs are infinite."""
    left, right = (x.astype(np.float64) for x in _paired(a, b))
    with np.errstate(invalid="ignore"):
        return left - right
