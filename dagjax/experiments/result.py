"""What an experiment found: curves, masks, verdicts, and the table of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from dagjax.experiments import stats
from dagjax.experiments.verdict import Curves, Verdict, sentence, verdicts
from dagjax.text import aligned
from dagjax.types import Mask

Settings = dict[str, Any]  # JSON values


class Row(NamedTuple):
    """One line of the table; intervals are 95 percent, over seeds."""

    arm: str
    density: float
    weights: int  # kept parameters, of the first seed
    metric: stats.Interval
    loss: stats.Interval
    steps: stats.Interval  # restricted mean steps to the dense run's final loss
    wins: stats.Rate


@dataclasses.dataclass(frozen=True)
class Record:
    """The figures of an experiment; every array has the leading axes of its arm.

    Args:
        settings: What was run, JSON values.
        evals: Steps at which the loss was taken, `[eval]`.
        densities: Kept shares of the rounds after the dense one.
        loss: `{arm: [round, seed, eval]}`; `dense` has one round.
        test_loss: `{arm: [round, seed]}`.
        test_metric: `{arm: [round, seed]}`.
        weights: `{arm: [round]}`, kept parameters of the first seed.
        masks: The tickets' masks, a tree of `[round, seed, ...]`, the first one full.
    """

    settings: Settings
    evals: np.ndarray
    densities: tuple[float, ...]
    loss: dict[str, np.ndarray]
    test_loss: dict[str, np.ndarray]
    test_metric: dict[str, np.ndarray]
    weights: dict[str, list[int]]
    masks: Mask

    def verdicts(self) -> dict[float, Verdict]:
        """The verdict at each density, Holm's correction over them."""
        dense = self.loss["dense"][0]
        control = self.loss.get("random", [None] * len(self.densities))
        curves = {
            density: Curves(dense, self.loss["ticket"][i], control[i])
            for i, density in enumerate(self.densities)
        }
        return verdicts(curves, self.evals, margin=self.settings["margin"])

    def sentence(self) -> str:
        """The verdict in one sentence."""
        seeds, verdicts = self.loss["dense"].shape[1], self.verdicts()
        alpha = next(iter(verdicts.values())).alpha
        least = math.ceil(math.log2(1 / alpha))  # the sign test of one density alone
        said = sentence(verdicts)
        if seeds >= least:
            return said
        return f"{said[:-1]}; {seeds} seeds cannot show one, it takes at least {least}."

    def rows(self) -> list[Row]:
        """The table: dense first, then each arm at each density."""
        targets = stats.smooth(self.loss["dense"][0])[:, -1]
        times = lambda loss: stats.time_to(stats.smooth(loss), self.evals, targets)
        dense_times = times(self.loss["dense"][0])
        rows = []
        for arm, losses in self.loss.items():
            densities = (1.0,) if arm == "dense" else self.densities
            for i, density in enumerate(densities):
                reached = times(losses[i])
                rows.append(Row(
                    arm, density, self.weights[arm][i],
                    stats.t_interval(self.test_metric[arm][i]),
                    stats.t_interval(losses[i][:, -1]),
                    _mean_time(reached, self.evals[-1]),
                    stats.win_rate(reached, dense_times),
                ))  # fmt: skip
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays but the masks, under flat names, for one npz file."""
        flat = {"evals": self.evals, "densities": np.asarray(self.densities)}
        for what in ("loss", "test_loss", "test_metric"):
            flat |= {f"{what}/{arm}": x for arm, x in getattr(self, what).items()}
        return flat


HEADERS = (
    "arm",
    "density",
    "weights",
    "test {metric}",
    "train loss",
    "steps to dense",
    "reached",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: means, and half the width of their intervals."""
    metric, loss, steps = row.metric, row.loss, row.steps
    return (
        row.arm,
        f"{row.density:.3g}",
        f"{row.weights:,}",
        f"{metric.mean:.4f}" + _half(metric, ".4f"),
        f"{loss.mean:.1e}" + _half(loss, ".0e"),
        "never"
        if math.isnan(steps.mean)
        else f"{steps.mean:.0f}" + _half(steps, ".0f"),
        f"{row.wins.wins} of {row.wins.n}",
    )


def _half(interval: stats.Interval, spec: str) -> str:
    half = (interval.high - interval.low) / 2
    return "" if math.isnan(half) else f" ± {half:{spec}}"


def _mean_time(times: np.ndarray, horizon: int) -> stats.Interval:
    """Restricted mean time; nan where no seed reached the target."""
    if np.isnan(times).all():
        return stats.Interval(np.nan, np.nan, np.nan)
    return stats.t_interval(np.where(np.isnan(times), horizon, times))


def table(record: Record) -> str:
    """The table as plain text, with the verdict below."""
    metric = record.settings.get("metric", "metric")
    lines = [tuple(h.format(metric=metric) for h in HEADERS)]
    lines += [cells(row) for row in record.rows()]
    legend = "mean ± half of the 95 percent t interval over seeds"
    return "\n".join([*aligned(lines, left=None), legend, "", record.sentence()])
