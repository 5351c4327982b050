"""Figures of a record: the metric against density, and the training curves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dagjax.experiments import stats
from dagjax.experiments.result import Record
from dagjax.report.pictures import mask_pictures as mask_pictures
from dagjax.report.style import FAINT, MARKERS, MUTED, canvas, color, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4  # panels in a row
_TOP = 10  # in front: the ticket, which is what the figure is about


def accuracy(record: Record) -> Figure:
    """The test metric against density, one line an arm, dense as a band.

    Lines are means, bars and band 95 percent intervals over seeds. Density falls from
    left to right on a log axis, with ticks at the densities that were run.
    """
    count = len(record.densities)
    with canvas(min(max(3.2 + 0.7 * count, 5.6), 12), 4.0, "constrained") as figure:
        ax = figure.add_subplot()
        names = _controls(record)
        ends = {"dense": [_dense_band(ax, record)]}
        factors = _dodge(record.densities, len(names))
        for name, factor in zip(names, factors, strict=True):
            ends[name] = _arm(ax, record, name, factor)
        _density_axis(ax, record)
        ax.set_ylabel(f"test {record.settings.get('metric', 'metric')}")
        ax.grid(axis="y", color="#ececec", linewidth=0.8)
        n = record.test_metric["dense"].shape[1]
        note = f"mean of {n} seeds, 95% intervals" if n > 1 else "mean of 1 seed"
        ax.set_title(note, loc="left", color=MUTED, fontsize=8)
        _label_ends(ax, ends)
    return figure


def curves(record: Record) -> Figure:
    """Training loss against steps, one panel a density.

    Lines are means over seeds of the smoothed loss, bands go from the smallest to the
    largest. The dotted line is the dense network's final loss; the dot marks where the
    mean of the tickets first reaches it. Runs that diverged are left out and counted.
    """
    count = len(record.densities)
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    size = (max(2.6 * columns + 0.7, 5.2), 2.4 * rows + 1.0)
    with canvas(*size, layout="constrained") as figure:
        shared: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False}
        grid: Any = figure.subplots(rows, columns, **shared)
        panels = grid.ravel()
        for i, ax in enumerate(panels[:count]):
            _panel(ax, record, i)
        for ax in panels[count:]:
            ax.remove()
        for ax in panels[max(count - columns, 0) : count]:
            ax.tick_params(labelbottom=True)
        if _all_positive(record):
            panels[0].set_yscale("log")
        panels[0].margins(y=0.1)
        figure.supxlabel("step", fontsize=9)
        figure.supylabel("training loss", fontsize=9)
        handles, labels = panels[0].get_legend_handles_labels()
        where = "outside upper left" if columns > 1 else "outside upper center"
        ncols = len(labels) if columns > 2 else 4
        figure.legend(handles, labels, loc=where, ncols=ncols, columnspacing=1.4)
    return figure


def _controls(record: Record) -> list[str]:
    """All arms but the dense one, the ticket first."""
    names = [name for name in record.test_metric if name != "dense"]
    return sorted(names, key=lambda name: name != "ticket")


def _look(name: str) -> dict[str, Any]:
    """The ticket wide and in front, the others narrow."""
    width, order = (2.4, _TOP) if name == "ticket" else (1.3, 4)
    return {"color": color(name), "linewidth": width, "zorder": order}


def _dense_band(ax: Axes, record: Record) -> float:
    dense = stats.t_interval(record.test_metric["dense"][0])
    ax.axhline(dense.mean, color=color("dense"), linewidth=1.2, zorder=3)
    if math.isfinite(dense.low):
        ax.axhspan(dense.low, dense.high, color="#000000", alpha=0.1, linewidth=0)
    return dense.mean


def _arm(ax: Axes, record: Record, name: str, factor: float) -> list[float]:
    """Draw one arm; returns its means."""
    intervals = [stats.t_interval(x) for x in record.test_metric[name]]
    mean, low, high = np.asarray(intervals).T
    x = 100 * factor * np.asarray(record.densities)
    look, top = _look(name), name == "ticket"
    ax.vlines(x, low, high, **{**look, "linewidth": 2.0 if top else 1.2, "alpha": 0.75})
    ax.plot(
        x, mean, label=name, marker=MARKERS.get(name, "o"), markersize=7 if top else 5,
        markeredgecolor="white", markeredgewidth=0.6, **look,
    )  # fmt: skip
    return mean.tolist()


def _dodge(densities: tuple[float, ...], arms: int) -> np.ndarray:
    """A factor on the density for each arm, so that their bars stand side by side.

    The first one stands at the density itself, the others right and left of it.
    """
    steps = np.abs(np.diff(np.log(densities)))
    room = steps[steps > 0].min(initial=math.inf)
    gap = min(0.014 * max(steps.sum(), 0.4), 0.5 / max(arms, 1) * room)
    order = np.arange(arms)
    return np.exp(gap * np.where(order % 2, -1, 1) * ((order + 1) // 2))


def _density_axis(ax: Axes, record: Record) -> None:
    from matplotlib.ticker import NullLocator

    percents = [100 * density for density in record.densities]
    ax.set_xscale("log")
    ax.set_xticks(percents, [f"{p:.3g}" for p in percents])
    ax.xaxis.set_minor_locator(NullLocator())
    margin = max(0.1, 0.07 * math.log(max(percents) / min(percents)))
    ax.set_xlim(max(percents) * math.exp(margin), min(percents) / math.exp(margin))
    ax.set_xlabel(f"{record.settings.get('prune', 'weights')} remaining (%)")


def _label_ends(ax: Axes, ends: dict[str, list[float]]) -> None:
    """Name the lines beside their right ends, apart from each other."""
    low, high = ax.get_ylim()
    last = [next(filter(math.isfinite, y[::-1]), low) for y in ends.values()]
    heights = (np.clip(last, low, high) - low) / (high - low)
    for (name, means), y in zip(ends.items(), spread(heights, 0.062), strict=True):
        text = name if math.isfinite(means[-1]) else f"{name} (diverged)"
        weight = "bold" if name == "ticket" else "normal"
        ax.annotate(
            text, (1, y), (6, 0), "axes fraction", "offset points",
            color=color(name), weight=weight, va="center", annotation_clip=False,
        )  # fmt: skip


def _panel(ax: Axes, record: Record, i: int) -> None:
    losses = {"dense": record.loss["dense"][0]}
    losses |= {name: record.loss[name][i] for name in _controls(record)}
    diverged = {}
    for name, loss in losses.items():
        smoothed, diverged[name] = _finite(stats.smooth(loss))
        _curve(ax, record.evals, smoothed, name)
    _passage(ax, record, losses)
    prune = record.settings.get("prune", "weights")
    ax.set_title(f"{100 * record.densities[i]:.3g}% of {prune}", loc="left")
    lost = [f"{name} {n}" for name, n in diverged.items() if n]
    if lost:
        text = "diverged: " + ", ".join(lost)
        ax.text(
            0.98, 0.97, text, ha="right", va="top", fontsize=7, color=MUTED,
            transform=ax.transAxes,
        )  # fmt: skip


def _finite(losses: np.ndarray) -> tuple[np.ndarray, int]:
    """The runs without a loss that is not finite, and how many others there are."""
    good = np.isfinite(losses).all(-1)
    return losses[good], int((~good).sum())


def _curve(ax: Axes, steps: np.ndarray, losses: np.ndarray, name: str) -> None:
    look = _look(name)
    look["linewidth"] = 1.9 if name == "ticket" else 1.2
    mean = losses.mean(0) if len(losses) else np.full(len(steps), np.nan)
    ax.plot(steps, mean, label=name, **look)
    if len(losses) > 1:
        band = {"color": look["color"], "alpha": 0.13, "linewidth": 0}
        ax.fill_between(steps, losses.min(0), losses.max(0), **band)


def _passage(ax: Axes, record: Record, losses: dict[str, np.ndarray]) -> None:
    """The dense network's final loss, and where the mean ticket first reaches it."""
    dense, ticket = (_finite(stats.smooth(losses[n]))[0] for n in ("dense", "ticket"))
    target = dense[:, -1].mean() if len(dense) else math.nan
    line = {"color": color("dense"), "linestyle": ":", "linewidth": 1.2}
    ax.axhline(target, label="dense, final loss", zorder=5, **line)
    mean = ticket.mean(0) if len(ticket) else np.full(len(record.evals), np.nan)
    step = float(stats.time_to(mean, record.evals, target))
    if not math.isfinite(step):
        return
    y = mean[list(record.evals).index(step)]
    ax.plot(
        [step], [y], "o", color=color("ticket"), markeredgecolor="white", markersize=7,
        zorder=_TOP + 1,
    )  # fmt: skip
    ax.annotate(
        f"{step:,.0f}", (step, y), (step, 0.03), "data", ax.get_xaxis_transform(),
        ha="right", fontsize=8, color=color("ticket"),
        arrowprops={"arrowstyle": "-", "color": FAINT, "relpos": (1, 0)},
    )  # fmt: skip


def _all_positive(record: Record) -> bool:
    finite = [x[np.isfinite(x)] for x in record.loss.values()]
    return all((x > 0).all() for x in finite)
