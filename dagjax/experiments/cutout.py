"""The ticket cut out: the same training on arrays that are really smaller.

The last ticket is compacted at its rewound weights and trained with the same optimizer,
on the same examples in the same order; beside it, chunk by chunk, the masked one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import NamedTuple

import jax
import numpy as np

from dagjax.compaction.channels.traced_network import example_of
from dagjax.compaction.channels.units import units
from dagjax.compaction.removal.compact import compact
from dagjax.experiments.compacted_model import compacted_model
from dagjax.experiments.examples import Data
from dagjax.experiments.experiment import Experiment, Rounds, Setup, parameters_kept
from dagjax.experiments.race import Finish, Runner, race
from dagjax.experiments.seeds import make_keys
from dagjax.experiments.train import Trained, network
from dagjax.graph.core.dag import count_params
from dagjax.graph.core.network import Network
from dagjax.sparsity import masks
from dagjax.types import Key, Mask, PyTree

_SAME = 1e-3  # curves are the same up to that share of the largest loss


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two networks; NaN where it was not trained."""

    params: int  # scalars in its arrays
    flops: float  # of one example forward, a multiply-add as two
    step: float = math.nan  # seconds of a training step, the median over chunks
    loss: float = math.nan  # in training, at the end
    metric: float = math.nan  # on the test examples, at the end


@dataclasses.dataclass(frozen=True)
class CutTicket:
    """The ticket of one seed, masked and cut out."""

    seed: int
    kept: int  # parameters that the mask keeps
    dense: Side  # the network with masked arrays
    small: Side  # the network with small ones
    gap: float = math.nan  # the largest difference of the two loss curves
    reason: str = ""  # why it was not cut out or not trained; empty if it was

    @property
    def speedup(self) -> float:
        """How many times faster a training step is."""
        return self.dense.step / self.small.step


@dataclasses.dataclass(frozen=True)
class CutOut:
    """The last tickets, cut out.

    Args:
        density: Of the last round.
        cuts: One for each seed that was asked for.
    """

    density: float
    cuts: tuple[CutTicket, ...]

    def sentence(self) -> str:
        """What cutting out saves, in a sentence; figures are medians over seeds."""
        reasons = [cut.reason for cut in self.cuts if cut.reason]
        parts = [self._size(), self._speed(), *dict.fromkeys(reasons)]
        text = ", ".join(part for part in parts if part)
        return f"The ticket at density {self.density:.3g}, cut out: {text}."

    def _size(self) -> str:
        if all(math.isnan(cut.small.params) for cut in self.cuts):
            return ""
        sizes = [(cut.dense.params, cut.small.params, cut.kept) for cut in self.cuts]
        before, after, kept = np.nanmedian(sizes, axis=0)
        return f"{before:,.0f} -> {after:,.0f} parameters ({kept:,.0f} under the mask)"

    def _speed(self) -> str:
        trained = [cut for cut in self.cuts if not math.isnan(cut.gap)]
        if not trained:
            return ""
        times = statistics.median(cut.speedup for cut in trained)
        seeds = f" (median of {len(trained)} seeds)" if len(trained) > 1 else ""
        gap = max(cut.gap for cut in trained)
        size = max(cut.dense.loss for cut in trained)
        same = "same curve up to" if gap <= _SAME * max(1, size) else "curves part by"
        return f"{times:.3g} times faster a step{seeds}, {same} {gap:.0e}"


def cut_out(
    experiment: Experiment, tickets: Rounds, first_seed: int = 0, seeds: int = 1
) -> CutOut:
    """Compact and train the last tickets of the first seeds.

    Args:
        experiment: One of units, whose rounds are finished.
        tickets: Those rounds.
        first_seed: The number of the first seed.
        seeds: Of how many seeds.
    """
    count = min(seeds, experiment.keys.init.shape[0])
    cuts = [_stored(experiment, tickets, i, first_seed + i) for i in range(count)]
    return CutOut(experiment.densities[-1], tuple(cuts))


def _stored(experiment: Experiment, tickets: Rounds, i: int, number: int) -> CutTicket:
    """A cut from the store, or a new one into it."""
    store, name = experiment.store, f"cut-{i}"
    if store.has(name):
        return _from_arrays(store.load(name, dataclasses.asdict(_BLANK)))
    cut = _cut_seed(experiment.setup, _ticket(experiment, tickets, i, number))
    store.save(name, dataclasses.asdict(cut))
    return cut


_BLANK = CutTicket(0, 0, Side(0, 0.0), Side(0, 0.0))


def _from_arrays(tree: PyTree) -> CutTicket:
    plain: PyTree = jax.tree.map(lambda x: np.asarray(x).item(), tree)
    sides = {name: Side(**plain[name]) for name in ("dense", "small")}
    return CutTicket(**{**plain, **sides})


class _Ticket(NamedTuple):
    """What one seed trains, all of it on one device."""

    seed: int
    key: Key
    start: Trained
    mask: Mask
    data: Data


def _ticket(experiment: Experiment, tickets: Rounds, i: int, number: int) -> _Ticket:
    device = jax.local_devices()[0]
    put = lambda x: jax.device_put(jax.device_get(x), device)
    start = jax.tree.map(lambda x: put(x[i]), experiment.start)
    mask = jax.tree.map(lambda m: put(m[-1, i]), tickets.masks)
    data = jax.tree.map(put, experiment.data)
    return _Ticket(number, make_keys(1, number).order[0], start, mask, data)


def _cut_seed(setup: Setup, ticket: _Ticket) -> CutTicket:
    number, key, start, mask, data = ticket
    kept = parameters_kept(mask, start.theta, setup.model.graph)
    dag = network(setup.model, start, data.x_train[:1])
    try:
        small = compact(dag, mask["params"])
        cut = CutTicket(number, kept, _side(dag), _side(small.net))
    except Exception as error:  # the experiment is done; this must not end it
        sides = Side(count_params(dag.params), math.nan), Side(math.nan, math.nan)  # pyright: ignore
        return CutTicket(number, kept, *sides, reason=f"not cut out ({_line(error)})")
    try:
        model, small_start = compacted_model(setup.model, small, data.x_train)
    except ValueError as error:
        return dataclasses.replace(cut, reason=f"not trained: {_line(error)}")
    some = lambda m: None if bool(np.all(m)) else m  # None keeps all of a leaf
    left = masks.tree_map(some, small.index.gather(mask["params"]))
    runners = (
        Runner(setup.model, start, mask),
        Runner(model, small_start, {"params": left, "gates": None}),
    )
    return _measured(cut, *race(setup, runners, key, data))


def _measured(cut: CutTicket, dense: Finish, small: Finish) -> CutTicket:
    """The cut with what training both has shown."""

    def trained(side: Side, end: Finish) -> Side:
        return Side(side.params, side.flops, end.step, end.losses[-1], end.metric)

    sides = {"dense": trained(cut.dense, dense), "small": trained(cut.small, small)}
    gap = float(np.max(np.abs(np.subtract(dense.losses, small.losses))))
    return dataclasses.replace(cut, **sides, gap=gap)


def _side(net: Network) -> Side:
    batch = jax.tree.leaves(example_of(net))[0].shape[0]
    return Side(count_params(net.params), units(net).total[0] / batch)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") or type(error).__name__
