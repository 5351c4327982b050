"""Figures of synthetic records: what is drawn is what the record says."""

import builtins

import matplotlib as mpl
import numpy as np
import pytest

from dagjax.experiments import stats
from dagjax.report import figures
from dagjax.report.style import spread
from tests.report.records import CONTROLS, DENSITIES, EVALS, drawn, make_record, texts


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


@pytest.fixture
def record():
    return make_record()


def test_accuracy_draws_the_means(record):
    ax = drawn(figures.accuracy(record)).axes[0]
    for name in ("ticket", *CONTROLS):
        means = record.test_metric[name].mean(-1)
        np.testing.assert_allclose(lines(ax)[name].get_ydata(), means)
        shift = lines(ax)[name].get_xdata() / (100 * np.array(DENSITIES))
        np.testing.assert_allclose(shift, 1, atol=0.05)
    dense = record.test_metric["dense"][0]
    assert any(np.allclose(x.get_ydata(), dense.mean()) for x in ax.get_lines())


def test_accuracy_draws_the_intervals(record):
    ax = figures.accuracy(record).axes[0]
    bars = [np.array(c.get_segments()) for c in ax.collections]
    assert len(bars) == 1 + len(CONTROLS)
    ticket = [stats.t_interval(x) for x in record.test_metric["ticket"]]
    np.testing.assert_allclose(bars[0][:, :, 1], [x[1:] for x in ticket])
    low, high = stats.t_interval(record.test_metric["dense"][0])[1:]
    (band,) = [p for p in ax.patches if p.get_alpha() == 0.1]
    assert (band.get_y(), band.get_height()) == pytest.approx((low, high - low))


def test_accuracy_has_an_axis_of_densities(record):
    ax = drawn(figures.accuracy(record)).axes[0]
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["67", "45", "30", "20"]
    left, right = ax.get_xlim()
    assert left > right
    assert ax.get_ylabel() == "test accuracy"
    assert ax.get_xlabel() == "weights remaining (%)"


def test_accuracy_names_every_arm_without_overlap(record):
    figure = drawn(figures.accuracy(record))
    named = [t for t in figure.axes[0].texts if t.get_text()]
    assert {t.get_text() for t in named} == {"dense", "ticket", *CONTROLS}
    boxes = [t.get_window_extent() for t in named]
    for i, box in enumerate(boxes):
        assert figure.bbox.x1 >= box.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_ticket_is_in_front(record):
    found = lines(figures.accuracy(record).axes[0])
    ticket = found.pop("ticket")
    others = list(found.values())
    assert all(ticket.get_zorder() > x.get_zorder() for x in others)
    assert all(ticket.get_linewidth() > x.get_linewidth() for x in others)


def test_curves_draw_smoothed_means(record):
    panels = drawn(figures.curves(record)).axes
    assert [ax.get_title("left") for ax in panels] == [
        "67% of weights", "45% of weights", "30% of weights", "20% of weights"
    ]  # fmt: skip
    for i, ax in enumerate(panels):
        assert ax.get_yscale() == "log"
        for name in ("ticket", *CONTROLS):
            smoothed = stats.smooth(record.loss[name][i])
            np.testing.assert_array_equal(lines(ax)[name].get_xdata(), EVALS)
            np.testing.assert_allclose(lines(ax)[name].get_ydata(), smoothed.mean(0))
        final = stats.smooth(record.loss["dense"][0])[:, -1].mean()
        line = lines(ax)["dense, final loss"]
        np.testing.assert_allclose(line.get_ydata(), final)
        assert line.get_linestyle() == ":"
        assert len(ax.collections) == 2 + len(CONTROLS)


def test_curves_mark_the_first_passage(record):
    target = stats.smooth(record.loss["dense"][0])[:, -1].mean()
    for i, ax in enumerate(figures.curves(record).axes):
        mean = stats.smooth(record.loss["ticket"][i]).mean(0)
        step = stats.time_to(mean, EVALS, target)
        (dot,) = [x for x in ax.get_lines() if x.get_marker() == "o"]
        assert dot.get_xdata() == [step]
        assert dot.get_ydata() == [mean[np.flatnonzero(step == EVALS)[0]]]
        assert f"{step:,.0f}" in [t.get_text() for t in ax.texts]


def test_curves_without_passage_have_no_mark(record):
    record.loss["ticket"][:] += 10
    panels = drawn(figures.curves(record)).axes
    assert not any(x.get_marker() == "o" for ax in panels for x in ax.get_lines())


def test_curves_are_linear_when_a_loss_is_not_positive(record):
    record.loss["random"][0, 0, 5] = 0.0
    assert drawn(figures.curves(record)).axes[0].get_yscale() == "linear"


def test_curves_wrap_into_rows():
    record = make_record(densities=(0.8, 0.6, 0.5, 0.4, 0.3, 0.2), seeds=2)
    assert len(drawn(figures.curves(record)).axes) == 6


def test_diverged_runs_are_left_out_and_counted(record):
    record.loss["random"][3, 1, 20:] = np.nan
    record.loss["fresh"][3, :2, 9] = np.inf
    record.test_metric["random"][3, 1] = np.nan
    panel = drawn(figures.curves(record)).axes[3]
    assert "diverged: random 1, fresh 2" in [t.get_text() for t in panel.texts]
    good = stats.smooth(record.loss["random"][3])[[0, 2, 3, 4]].mean(0)
    np.testing.assert_allclose(lines(panel)["random"].get_ydata(), good)
    assert "random (diverged)" in texts(figures.accuracy(record))


@pytest.mark.parametrize("arm", ["dense", "ticket", "random"])
def test_an_arm_of_nothing_but_nan(record, arm):
    record.loss[arm][:] = np.nan
    record.test_metric[arm][:] = np.nan
    drawn(figures.curves(record))
    assert f"{arm} (diverged)" in texts(drawn(figures.accuracy(record)))


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("controls", [(), ("random",)])
def test_one_density_and_few_seeds(seeds, controls):
    record = make_record(densities=(0.5,), controls=controls, seeds=seeds)
    for make in (figures.accuracy, figures.curves, figures.mask_pictures):
        drawn(make(record))
    (note,) = [t for t in texts(figures.accuracy(record)) if t.startswith("mean of")]
    assert note == (
        "mean of 1 seed" if seeds == 1 else "mean of 2 seeds, 95% intervals"
    )


def test_equal_densities_do_not_break_the_axis():
    drawn(figures.accuracy(make_record(densities=(0.5, 0.5), seeds=2)))


def test_settings_of_the_user_stay(record):
    before = dict(mpl.rcParams)
    for make in (figures.accuracy, figures.curves, figures.mask_pictures):
        drawn(make(record))
    assert dict(mpl.rcParams) == before


def test_without_matplotlib_the_message_helps(record, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install dagjax\[report\]"):
        figures.accuracy(record)


def test_spread_keeps_the_gap_and_the_order():
    placed = spread([0.3, 0.9, 0.31, 0.29], 0.1)
    np.testing.assert_allclose(placed, [0.3, 0.9, 0.4, 0.2])
