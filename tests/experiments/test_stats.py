"""Statistics over seeds against brute force, known values and scipy."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats

from dagjax.experiments import stats
from dagjax.experiments.verdict import Curves, race, sentence, verdict, verdicts

NAN, INF = float("nan"), float("inf")
STEPS = np.arange(5) * 10
GOOD = np.linspace(2.0, 1.0, 5) + np.arange(10)[:, None]


def test_smooth_is_the_trailing_mean():
    losses = np.random.default_rng(0).normal(size=(2, 3, 9))
    for window in (1, 2, 4, 20):
        want = [losses[..., max(0, t - window + 1) : t + 1].mean(-1) for t in range(9)]
        got = stats.smooth(losses, window)
        np.testing.assert_allclose(got, np.stack(want, -1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_smooth_confines_a_diverged_loss_to_its_windows(bad):
    got = stats.smooth([1.0, bad, 1.0, 1.0, -INF, bad], 2)
    assert np.isfinite(got).tolist() == [True, False, False, True, False, False]


def test_time_to_is_the_first_passage():
    rng = np.random.default_rng(1)
    losses, target = rng.integers(0, 9, (4, 6)), rng.integers(0, 9, 4)
    steps = np.cumsum(rng.integers(1, 5, 6))
    for got, row, goal in zip(
        stats.time_to(losses, steps, target), losses, target, strict=True
    ):
        want = next(
            (float(s) for s, x in zip(steps, row, strict=True) if x <= goal), NAN
        )
        np.testing.assert_equal(got, want)


def test_time_to_broadcasts_a_grid_of_targets():
    grid = stats.time_to(GOOD[:2], STEPS, np.array([[2.0], [1.5], [0.5]]))
    np.testing.assert_equal(grid, [[0.0, 40.0], [20.0, NAN], [NAN, NAN]])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_reaches_and_is_reached_by_nothing(bad):
    assert np.isnan(stats.time_to([bad, bad], [1, 2], 3.0))
    assert np.isnan(stats.time_to([1.0, 1.0], [1, 2], bad))
    assert stats.time_to([bad, 1.0], [1, 2], 3.0) == 2


def test_win_rate_counts_censoring_and_ties():
    rate = stats.win_rate([1.0, 2.0, 3.0, NAN, INF], [1.0, 1.0, NAN, 5.0, NAN])
    assert (rate.wins, rate.n, rate.rate) == (2, 5, 0.4)


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (9, 10), (10, 10), (1, 1)])
def test_rate_interval_is_clopper_pearson(wins, n):
    rate = stats.rate_of(np.arange(n) < wins)
    beta = scipy.stats.beta
    low = beta.ppf(0.025, wins, n - wins + 1) if wins else 0.0
    high = beta.ppf(0.975, wins + 1, n - wins) if wins < n else 1.0
    np.testing.assert_allclose((rate.low, rate.high), (low, high), atol=1e-9)


def test_mcnemar_is_the_binomial_tail_of_discordant_seeds():
    pairs = [(1, 0)] * 6 + [(0, 1)] * 2 + [(1, 1)] * 5 + [(0, 0)]
    a, b = np.array(pairs, bool).T
    tail = sum(math.comb(8, k) for k in range(6, 9)) / 2**8
    assert stats.mcnemar(a, b) == pytest.approx(tail)
    assert stats.mcnemar(b, a, alternative="less") == pytest.approx(tail)
    assert stats.mcnemar(a, b, alternative="two-sided") == pytest.approx(2 * tail)
    assert stats.mcnemar(a, a) == 1.0


def test_paired_bootstrap_agrees_with_scipy():
    a, b = np.random.default_rng(2).normal(size=(2, 12))
    got = stats.paired_bootstrap(a, b, level=0.9, seed=3)
    want = scipy.stats.bootstrap(
        (a - b,), np.mean, confidence_level=0.9, method="percentile"
    ).confidence_interval
    assert got.mean == pytest.approx(np.mean(a - b))
    np.testing.assert_allclose(got[1:], want, atol=0.03)
    assert got == stats.paired_bootstrap(a, b, level=0.9, seed=3)


def test_bootstrap_of_two_seeds_against_enumeration():
    got = stats.mean_interval([0.0, 1.0], level=0.4)
    means = np.mean(list(itertools.product([0.0, 1.0], repeat=2)), 1)
    assert got == (0.5, *np.quantile(means, [0.3, 0.7], method="inverted_cdf"))


@pytest.mark.parametrize(
    ("a", "want"),
    [
        ([2.0, 3.0], (1.0, 1.0, 1.0)),
        ([2.0, NAN], (NAN, NAN, NAN)),
        ([INF, 3.0], (NAN, NAN, NAN)),
    ],
)
def test_degenerate_bootstrap(a, want):
    np.testing.assert_equal(tuple(stats.paired_bootstrap(a, [1.0, 2.0])), want)
    one = stats.paired_bootstrap([2.0], [0.5])
    assert one.mean == 1.5
    assert np.isnan(one[1:]).all()


def test_infinite_pairs_have_no_difference():
    assert np.isnan(stats.paired_bootstrap([INF, 1.0], [INF, 1.0]).mean)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_non_inferior_is_the_paired_t_test(margin):
    sub, dense = np.random.default_rng(4).normal(size=(2, 10))
    got = stats.non_inferior(sub, dense, margin)
    want = scipy.stats.ttest_1samp(sub - dense, margin, alternative="less")
    assert got.pvalue == pytest.approx(want.pvalue)
    assert got.bound == pytest.approx(want.confidence_interval(0.95).high)
    assert got.passed == (got.bound < margin)


def test_non_inferior_holds_its_level():
    diffs = np.random.default_rng(5).normal(0.2, 1.0, (2000, 8))
    passed = sum(stats.non_inferior(d, 0 * d, 0.2).passed for d in diffs)
    low, high = scipy.stats.binom.ppf([0.001, 0.999], 2000, 0.05)
    assert low <= passed <= high


def test_non_inferior_without_variance_is_exact():
    dense = np.arange(4.0)
    assert stats.non_inferior(dense, dense, 0.0) == (0.0, True, 0.0)
    assert stats.non_inferior(dense + 0.5, dense, 0.5) == (0.0, True, 0.5)
    assert stats.non_inferior(dense + 0.75, dense, 0.5) == (1.0, False, 0.75)


@pytest.mark.parametrize("sub", [[1.0], [1.0, NAN], [INF, 1.0], [-INF, 1.0]])
def test_non_inferior_needs_two_runs_that_all_finish(sub):
    assert stats.non_inferior(sub, np.ones(len(sub)), 9.0) == (1.0, False, INF)


def test_restricted_mean_time_counts_the_horizon():
    got = stats.restricted_mean_time([10.0, NAN, 90.0, 30.0], 50.0)
    assert got.mean == 35.0
    assert 10.0 <= got.low < 35.0 < got.high <= 50.0
    assert stats.restricted_mean_time([NAN, NAN], 50.0) == (50.0, 50.0, 50.0)


def test_holm_equals_its_closed_testing_form():
    # Holm is the closure of Bonferroni: reject H_i when every subset holding it is.
    p = np.random.default_rng(6).uniform(size=5) ** 3
    subsets = [s for r in range(1, 6) for s in itertools.combinations(range(5), r)]
    want = [
        max(min(1.0, len(s) * p[list(s)].min()) for s in subsets if i in s)
        for i in range(5)
    ]
    np.testing.assert_allclose(stats.holm(p), want, rtol=1e-14)


def test_holm_leaves_nan_out():
    np.testing.assert_equal(stats.holm([NAN, 0.6, 0.6]), [NAN, 1.0, 1.0])
    np.testing.assert_equal(stats.holm([NAN, 0.02]), [NAN, 0.02])
    assert stats.holm([]).size == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stats.smooth([1.0], 0), "window is 0"),
        (lambda: stats.time_to([1.0, 2.0], [1], 0.0), "one step for each"),
        (lambda: stats.time_to([1.0, 2.0], [2, 1], 0.0), "do not increase"),
        (lambda: stats.time_to([], [], 0.0), "one step for each"),
        (lambda: stats.win_rate([1.0], [1.0, 2.0]), "got 1 and 2 seeds"),
        (lambda: stats.win_rate([], []), "at least one seed"),
        (lambda: stats.mcnemar([True], [True, False]), "got 1 and 2 seeds"),
        (lambda: stats.paired_bootstrap([1.0], [1.0, 2.0]), "got 1 and 2 seeds"),
        (lambda: stats.non_inferior([1.0], [1.0], -0.1), "margin is -0.1"),
        (lambda: stats.non_inferior([1.0], [1.0], NAN), "margin is nan"),
        (lambda: stats.restricted_mean_time([], 3.0), "at least one seed"),
        (lambda: stats.holm([0.5, 1.5]), "in [0, 1]"),
        (lambda: verdict(GOOD, GOOD[:3], GOOD, STEPS, margin=0.1), "paired by seed"),
        (lambda: verdict(GOOD, GOOD, GOOD, STEPS[1:], margin=0.1), "steps [eval]"),
        (lambda: verdict(*GOOD[None, :0].repeat(3, 0), STEPS, margin=0), "nonempty"),
        (lambda: verdict(GOOD, GOOD, GOOD, STEPS, margin=-1), "margin is -1"),
        (lambda: verdict(GOOD, GOOD, GOOD, STEPS, margin=0, alpha=5), "alpha is 5"),
        (lambda: verdict(GOOD, GOOD, GOOD, STEPS, margin=0, rounding=-1), "rounding"),
        (lambda: verdicts({0.3: (GOOD,) * 3}, STEPS, margin=-1), "at density 0.3"),
        (lambda: sentence({}), "at least one density"),
    ],
)
def test_errors_say_what_was_got(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert words in str(error.value)


def test_a_win_is_reached_in_time_and_kept():
    dense = np.array([[4.0, 3.0, 2.0]] * 6 + [[4.0, 2.0, NAN]])
    sub = np.array(
        [
            [4.0, 3.0, 2.0],  # the same curve
            [4.0, 2.0, 1.0],  # sooner and lower
            [4.0, 1.0, 3.0],  # sooner, then lost again
            [4.0, 3.0, 2.5],  # never there
            [4.0, 1.0, NAN],  # diverged after it
            [4.0, 1.0, -INF],  # diverged downwards
            [4.0, 2.0, 1.0],  # no target: the dense run diverged
        ]
    )
    wins = race(dense, sub, [0, 1, 2]).wins
    assert wins.tolist() == [True, True, False, False, False, False, False]


def test_lower_but_later_than_the_dense_run_is_no_win():
    dense = np.array([[4.0, 2.0, 2.0]])
    assert not race(dense, np.array([[4.0, 3.0, 1.0]]), [0, 1, 2]).wins[0]


def test_verdict_reports_every_figure():
    random = GOOD + np.where(np.arange(10) < 4, -0.5, 0.5)[:, None]
    v = verdict(GOOD, GOOD - 0.25, random, STEPS, margin=0.1, window=1)
    assert v.wins[:3] == (10, 10, 1.0)
    assert v.control[:3] == (4, 10, 0.4)
    assert v.mcnemar == pytest.approx(2**-6)
    np.testing.assert_allclose(v.difference, -0.25, atol=1e-12)
    assert v.on_par.passed
    assert v.time == (30.0, 30.0, 30.0)
    assert v.dense_time == (40.0, 40.0, 40.0)
    assert v.targets == tuple(GOOD[:, -1])
    assert v.times == (30.0,) * 10
    assert v.sign == v.pvalue == v.adjusted == pytest.approx(2**-10)
    assert v.found
    assert json.loads(json.dumps(asdict(v)))["found"] is True


def test_intervals_follow_alpha():
    v = verdict(GOOD, GOOD, GOOD, STEPS, margin=0.1, alpha=0.2)
    np.testing.assert_allclose(v.wins.low, 0.1**0.1, rtol=1e-9)


def test_a_great_loss_in_one_seed_is_not_on_par():
    ticket = GOOD - 0.1
    ticket[0] += 5.0
    v = verdict(GOOD, ticket, GOOD, STEPS, margin=0.1)
    assert v.sign < 0.05 < v.on_par.pvalue == v.pvalue
    assert not v.found


def test_diverged_runs_never_win_and_never_raise():
    v = verdict(GOOD, GOOD * NAN, GOOD + INF, STEPS, margin=0.1)
    assert (v.wins.wins, v.control.wins, v.pvalue, v.found) == (0, 0, 1.0, False)
    assert not verdict(GOOD * NAN, GOOD, GOOD, STEPS, margin=0.1).found


def test_fewer_than_five_seeds_find_nothing():
    four, five = GOOD[:4], GOOD[:5]
    assert not verdict(four, four, four, STEPS, margin=0.1).found
    assert verdict(five, five, five, STEPS, margin=0.1).found
    assert not verdict(GOOD[:1], GOOD[:1], GOOD[:1], STEPS, margin=0.1).found


def _ticket(wins: int) -> Curves:
    """A ticket that wins so many seeds, and a random mask that wins none."""
    shift = np.where(np.arange(10) < wins, -0.01, 0.01)[:, None]
    return Curves(GOOD, GOOD + shift, GOOD + 1)


def test_holm_over_densities_decides():
    # 9 of 10 seeds give 11/1024: enough for four densities, too much for five.
    four = {d: _ticket(9) for d in (0.8, 0.6, 0.4, 0.2)}
    assert all(v.found for v in verdicts(four, STEPS, margin=0.1).values())
    five = verdicts({**four, 0.1: _ticket(9)}, STEPS, margin=0.1)
    assert not any(v.found for v in five.values())
    assert {v.adjusted for v in five.values()} == {5 * 11 / 1024}


@pytest.mark.parametrize(
    ("wins", "want"),
    [
        (
            {0.2: 3, 0.51: 10, 0.36: 9},
            "Weak tickets at densities 0.51 and 0.36 (10 of 10 and 9 of 10 seeds; "
            "Holm p <= 0.022); none at 0.2.",
        ),
        ({0.5: 10}, "Weak ticket at density 0.5 (10 of 10 seeds; Holm p <= 0.00098)."),
        (
            {0.5: 10, 0.3: 5, 0.2: 0, 0.1: 1},
            "Weak ticket at density 0.5 (10 of 10 seeds; Holm p <= 0.004); none at "
            "0.3, 0.2 and 0.1.",
        ),
        ({0.5: 5, 0.2: 0}, "No weak ticket at any density."),
    ],
)
def test_sentence(wins, want):
    family = {density: _ticket(k) for density, k in wins.items()}
    assert sentence(verdicts(family, STEPS, margin=0.1)) == want


def test_sentence_admits_that_a_random_mask_does_as_well():
    got = sentence(verdicts({0.9: Curves(GOOD, GOOD, GOOD)}, STEPS, margin=0.1))
    assert got.endswith("; not shown to beat a random mask at 0.9.")
