"""The verdict on the weak lottery-ticket hypothesis: is there a ticket here?

Definition. With the smoothed losses of one seed, the target is the final loss of
the dense run, `tau = F_dense`. The sub-network *wins* the seed when it reaches `tau`
not later than the dense run does, and ends at or below it:

    win = [K_sub(tau) <= K_dense(tau)] and [F_sub <= tau].

A ticket is *found* when two one-sided null hypotheses are both rejected at `alpha`:

    time:  P(win) <= 1/2            exact binomial (sign) test on the wins;
    loss:  E[F_sub - F_dense] >= margin     paired t test of non-inferiority.

The p value is the larger of the two (an intersection-union test, Berger 1982, which
needs no correction), and Holm's adjustment over the densities decides.

Level. If the dense and the sub curve of a seed are exchangeable and their final
losses do not tie, then `P(win) <= P(F_sub <= F_dense) = 1/2`, whatever the noise, the
smoothing and the spacing of the evaluations; over independent seeds the test holds
its level. The second clause of the win is what buys this: first passage alone is won
too often by chance, about 69% of the time on a plateau of white noise, since a shared
evaluation is a tie and the target is the dense run's own. With 10 seeds it takes 9
wins (11/1024), and below 5 seeds no ticket can be found at 5%.

Ties. Curves equal up to `rounding` are equal, and equal is a win: a sub-network that
reproduces the dense run is a ticket, so "exchangeable" above excludes coinciding ones.
A sub-network merely as good as a second dense run, winning half its seeds, is not
found; read `Verdict.on_par` for it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dagjax.experiments import stats
from dagjax.experiments.stats import Bools, Floats, Interval, Rate


class Curves(NamedTuple):
    """Training losses of paired runs at one density, each `[seed, eval]`."""

    dense: ArrayLike
    ticket: ArrayLike
    random: ArrayLike | None = None


class Race(NamedTuple):
    """First passages of a sub-network and its dense network, and who won."""

    times: Floats  # [seed]
    dense_times: Floats  # [seed]
    wins: Bools  # [seed]


@dataclass(frozen=True)
class Verdict:
    """All figures on one density; `found` is the answer."""

    wins: Rate  # seeds won by the ticket
    control: Rate | None  # seeds won by the random mask, if that control was run
    mcnemar: float | None  # p value that the ticket wins more often than that mask
    difference: Interval  # final smoothed loss, ticket minus dense
    on_par: stats.Test  # non-inferiority of the final loss
    time: Interval  # restricted mean time of the ticket to the target
    dense_time: Interval  # the same for the dense network
    targets: tuple[float, ...]  # of each seed
    times: tuple[float, ...]  # of the ticket for each seed, nan where censored
    dense_times: tuple[float, ...]  # of the dense network
    sign: float  # p value of the sign test on the wins
    pvalue: float  # the larger of `sign` and `on_par.pvalue`
    adjusted: float  # after Holm over the densities; `pvalue` for one alone
    alpha: float  # the level
    found: bool  # `adjusted <= alpha`


def race(dense: Floats, sub: Floats, steps: ArrayLike) -> Race:
    """Who reaches the dense run's final loss first, and stays there to the end.

    Losses are smoothed, `[seed, eval]`, of the same seeds; `steps` are `[eval]`.

    >>> curve = np.array([[3.0, 2.0, 1.0]])
    >>> race(curve, curve, [0, 1, 2]).wins.tolist()
    [True]
    """
    target = dense[:, -1]
    times = stats.time_to(sub, steps, target)
    dense_times = stats.time_to(dense, steps, target)
    final = sub[:, -1]
    ends = np.isfinite(final) & (final <= target)
    wins = stats.not_later(times, dense_times) & ends
    return Race(times, dense_times, wins)


def verdict(
    dense: ArrayLike,
    ticket: ArrayLike,
    random: ArrayLike | None,
    steps: ArrayLike,
    *,
    margin: float,
    window: int = 3,
    alpha: float = 0.05,
    rounding: float = 1e-6,
    seed: int = 0,
) -> Verdict:
    """Whether a density holds a weak ticket, by the definition above.

    Args:
      dense: losses of the dense network, `[seed, eval]`.
      ticket: losses of the ticket with the same seeds, `[seed, eval]`.
      random: losses of a random mask of the same density, `[seed, eval]`, or None.
      steps: the increasing steps of the evaluations, `[eval]`.
      margin: tolerated difference of the final losses, fixed in advance.
      window: evaluations in the moving average.
      alpha: level of the tests; intervals have confidence `1 - alpha`.
      rounding: relative difference up to which two losses are equal.
      seed: seed of the bootstrap.

    Returns:
      The figures and the answer.

    Raises:
      ValueError: if shapes do not match, there are no seeds, `margin < 0`, or
        `alpha` or `rounding` is out of range.

    >>> curves = np.linspace(2.0, 1.0, 5) + np.arange(10)[:, None]
    >>> v = verdict(curves, curves, curves + 1, range(5), margin=0.1)
    >>> v.wins.wins, v.control.wins, v.pvalue == 2**-10, v.found
    (10, 0, True, True)
    """
    from scipy.stats import binomtest

    _check_levels(alpha, rounding)
    curves = Curves(dense, ticket, random)
    base, sub, *controls = _prepare(curves, steps, window, rounding)
    ours = race(base, sub, steps)
    theirs = [race(base, control, steps).wins for control in controls]
    final, final_dense = sub[:, -1], base[:, -1]
    level, horizon = 1 - alpha, float(np.asarray(steps)[-1])
    on_par = stats.non_inferior(final, final_dense, margin, level=level)
    wins = binomtest(int(ours.wins.sum()), ours.wins.size, alternative="greater")
    sign = float(wins.pvalue)
    pvalue = max(sign, on_par.pvalue)

    def mean_time(times: Floats) -> Interval:
        return stats.restricted_mean_time(times, horizon, level=level, seed=seed)

    return Verdict(
        wins=stats.rate_of(ours.wins, level=level),
        control=stats.rate_of(theirs[0], level=level) if theirs else None,
        mcnemar=stats.mcnemar(ours.wins, theirs[0]) if theirs else None,
        difference=stats.paired_bootstrap(final, final_dense, level=level, seed=seed),
        on_par=on_par,
        time=mean_time(ours.times),
        dense_time=mean_time(ours.dense_times),
        targets=tuple(final_dense.tolist()),
        times=tuple(ours.times.tolist()),
        dense_times=tuple(ours.dense_times.tolist()),
        sign=sign,
        pvalue=pvalue,
        adjusted=pvalue,
        alpha=alpha,
        found=pvalue <= alpha,
    )


def verdicts(
    curves: Mapping[float, Curves],
    steps: ArrayLike,
    *,
    margin: float,
    window: int = 3,
    alpha: float = 0.05,
    rounding: float = 1e-6,
    seed: int = 0,
) -> dict[float, Verdict]:
    """The verdict at each density, Holm's adjusted p values deciding.

    The chance of any false ticket among the densities is at most `alpha`; the other
    arguments are those of `verdict`, whose errors name the density.

    >>> good = np.linspace(2.0, 1.0, 5) + np.arange(10)[:, None]
    >>> family = {0.5: Curves(good, good, good + 1), 0.2: Curves(good, good + 1, good)}
    >>> [v.found for v in verdicts(family, range(5), margin=0.1).values()]
    [True, False]
    """
    one = functools.partial(verdict, steps=steps, margin=margin, window=window)
    alone = {}
    for density, losses in curves.items():
        try:
            alone[density] = one(*losses, alpha=alpha, rounding=rounding, seed=seed)
        except ValueError as error:
            raise ValueError(f"at density {density}: {error}") from error
    adjusted = stats.holm([v.pvalue for v in alone.values()]).tolist()
    return {
        density: replace(v, adjusted=p, found=p <= alpha)
        for (density, v), p in zip(alone.items(), adjusted, strict=True)
    }


def sentence(verdicts: Mapping[float, Verdict]) -> str:
    """The verdicts in one sentence, p values rounded up.

    Where tickets were found, in how many seeds, where none was, and where a found one
    was not shown to beat a random mask (McNemar, not adjusted).

    >>> good = np.linspace(2.0, 1.0, 5) + np.arange(10)[:, None]
    >>> family = {0.5: Curves(good, good, good + 1), 0.2: Curves(good, good + 1, good)}
    >>> sentence(verdicts(family, range(5), margin=0.1))
    'Weak ticket at density 0.5 (10 of 10 seeds; Holm p <= 0.002); none at 0.2.'
    """
    if not verdicts:
        raise ValueError("there are no verdicts; give at least one density")
    ordered = sorted(verdicts.items(), reverse=True)
    tickets = {d: v for d, v in ordered if v.found}
    if not tickets:
        return "No weak ticket at any density."
    return "; ".join([_claim(tickets), *_exceptions(dict(ordered))]) + "."


def _claim(tickets: Mapping[float, Verdict]) -> str:
    """Where tickets are, in how many seeds, and the largest adjusted p value."""
    noun = "ticket at density" if len(tickets) == 1 else "tickets at densities"
    seeds = _listed([f"{v.wins.wins} of {v.wins.n}" for v in tickets.values()])
    p = _round_up(max(v.adjusted for v in tickets.values()))
    return f"Weak {noun} {_densities(tickets)} ({seeds} seeds; Holm p <= {p:.2g})"


def _exceptions(verdicts: Mapping[float, Verdict]) -> list[str]:
    """Where no ticket was found, and where one may be no better than chance."""
    cases = {
        "none at": [d for d, v in verdicts.items() if not v.found],
        "not shown to beat a random mask at": [
            d
            for d, v in verdicts.items()
            if v.found and v.mcnemar is not None and v.mcnemar > v.alpha
        ],
    }
    return [f"{words} {_densities(ds)}" for words, ds in cases.items() if ds]


def _densities(densities: Mapping[float, Verdict] | Sequence[float]) -> str:
    return _listed([f"{d:.3g}" for d in densities])


def _listed(words: Sequence[str]) -> str:
    """The words as an English list: "a", "a and b", "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _round_up(p: float) -> float:
    """The least value of two significant digits not below `p > 0`."""
    scale = 10.0 ** (1 - math.floor(math.log10(p)))
    return math.ceil(round(p * scale, 9)) / scale


def _prepare(
    curves: Curves, steps: ArrayLike, window: int, rounding: float
) -> list[Floats]:
    """Smoothed curves, each sub-network equal to the dense one where it rounds so."""
    given = {name: c for name, c in curves._asdict().items() if c is not None}
    arrays = {name: np.asarray(c, np.float64) for name, c in given.items()}
    _check_shapes(arrays, np.shape(steps))
    dense, *subs = (stats.smooth(c, window) for c in arrays.values())
    # Compaction reorders sums, so even a perfect ticket differs in the last bits.
    equal = lambda sub: np.isclose(sub, dense, rtol=rounding, atol=0.0)
    return [dense, *(np.where(equal(sub), dense, sub) for sub in subs)]


def _check_shapes(curves: Mapping[str, Floats], steps: tuple[int, ...]) -> None:
    shapes = {name: np.shape(c) for name, c in curves.items()}
    shape = shapes["dense"]
    if set(shapes.values()) != {shape} or shape[1:] != steps or 0 in shape:
        raise ValueError(
            f"losses have shapes {shapes} and steps {steps}; give the same nonempty "
            "[seed, eval] for all, with runs paired by seed, and steps [eval]"
        )


def _check_levels(alpha: float, rounding: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; give a level between 0 and 1, as 0.05")
    if not 0 <= rounding < 1:
        raise ValueError(f"rounding is {rounding}; give a relative size, as 1e-6")
