"""The ticket cut out: the same training on arrays that are really smaller.

The last ticket is compacted at its rewound weights and trained with the same optimizer,
on the same examples in the same order; beside it, chunk by chunk, the masked one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.traced_network import example_of
from dagjax.compaction.channels.units import units
from dagjax.compaction.removal.compact import Compacted, compact
from dagjax.compaction.removal.compacted import Small
from dagjax.experiments.examples import Data
from dagjax.experiments.model import Model, Theta
from dagjax.experiments.refit import refit
from dagjax.experiments.run import (
    Experiment,
    Rounds,
    Setup,
    equations,
    parameters_kept,
    slow_in_loop,
)
from dagjax.experiments.seeds import make_keys
from dagjax.experiments.train import Trained, make_trainer
from dagjax.graph.core.dag import DAG, count_params
from dagjax.graph.core.initialize import init
from dagjax.jaxprs.versions import shape_of
from dagjax.sparsity import masks

_SAME = 1e-3  # curves are the same up to that share of the largest loss


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two networks; NaN where it was not trained.

    Args:
        params: Scalars in its arrays.
        flops: Operations of one example forward, a multiply-add as two.
        step: Seconds of a training step, the median over chunks.
        loss: The training loss at the end.
        metric: The test metric at the end.
    """

    params: int
    flops: float
    step: float = math.nan
    loss: float = math.nan
    metric: float = math.nan


@dataclasses.dataclass(frozen=True)
class Cut:
    """The ticket of one seed, masked and cut out.

    Args:
        seed: Its number.
        kept: Parameters that the mask keeps.
        dense: The network with masked arrays.
        small: The network with small ones.
        gap: The largest difference of the two loss curves.
        reason: Why it was not cut out or not trained; empty if it was.
    """

    seed: int
    kept: int
    dense: Side
    small: Side
    gap: float = math.nan
    reason: str = ""

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
    cuts: tuple[Cut, ...]

    def sentence(self) -> str:
        """What cutting out saves, in a sentence; figures are medians over seeds."""
        reasons = [cut.reason for cut in self.cuts if cut.reason]
        told = [self._size(), self._speed(), *dict.fromkeys(reasons)]
        text = ", ".join(part for part in told if part)
        return f"The ticket at density {self.density:.3g}, cut out: {text}."

    def _size(self) -> str:
        if all(math.isnan(cut.small.params) for cut in self.cuts):
            return ""
        before, after, kept = (
            np.nanmedian([read(cut) for cut in self.cuts])
            for read in (lambda c: c.dense.params, lambda c: c.small.params,
                         lambda c: c.kept)
        )  # fmt: skip
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
    cuts = [_kept(experiment, tickets, i, first_seed + i) for i in range(count)]
    return CutOut(experiment.densities[-1], tuple(cuts))


def _kept(experiment: Experiment, tickets: Rounds, i: int, number: int) -> Cut:
    """A cut from the store, or a new one into it."""
    store, name = experiment.store, f"cut-{i}"
    if store.has(name):
        return _from_arrays(store.load(name, dataclasses.asdict(_BLANK)))
    cut = _cut_seed(experiment.setup, _ticket(experiment, tickets, i, number))
    store.save(name, dataclasses.asdict(cut))
    return cut


_BLANK = Cut(0, 0, Side(0, 0.0), Side(0, 0.0))


def _from_arrays(tree: Any) -> Cut:
    plain: Any = jax.tree.map(lambda x: np.asarray(x).item(), tree)
    sides = {name: Side(**plain[name]) for name in ("dense", "small")}
    return Cut(**{**plain, **sides})


class _Ticket(NamedTuple):
    """What one seed trains, all of it on one device."""

    seed: int
    key: Any
    start: Trained
    mask: Any
    data: Data


def _ticket(experiment: Experiment, tickets: Rounds, i: int, number: int) -> _Ticket:
    device = jax.local_devices()[0]
    put = lambda x: jax.device_put(jax.device_get(x), device)
    start = jax.tree.map(lambda x: put(x[i]), experiment.start)
    mask = jax.tree.map(lambda m: put(m[-1, i]), tickets.masks)
    data = jax.tree.map(put, experiment.data)
    return _Ticket(number, make_keys(1, number).order[0], start, mask, data)


def _cut_seed(setup: Setup, ticket: _Ticket) -> Cut:
    kept = parameters_kept(ticket.mask, ticket.start.theta)
    dag = network(setup.model, ticket.start, ticket.data.x_train[:1])
    params = count_params(dag.params)
    try:
        small = cut_at(dag, ticket.mask["params"])
        dense, after = _side(dag), _side(small.net)
    except Exception as error:  # the experiment is done; this must not end it
        sides = Side(params, math.nan), Side(math.nan, math.nan)  # pyright: ignore
        return Cut(ticket.seed, kept, *sides, reason=f"not cut out ({_line(error)})")
    try:
        model, start = _small_model(setup.model, small, ticket)
    except ValueError as error:
        return Cut(
            ticket.seed, kept, dense, after, reason=f"not trained: {_line(error)}"
        )
    return _race(
        Cut(ticket.seed, kept, dense, after), setup, ticket, model, start, small
    )


def network(model: Model, at: Trained, x: Any) -> DAG:
    """The network of a model at a point of training; its graph knows all spaces."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), model.graph, x))
    return DAG(shapes.graph, at.theta["params"], at.state)


def cut_at(dag: DAG, mask: Any) -> Compacted:
    """Compact a network that is yet to be trained.

    A bias or a shift that is 0 only because it is initial is no constant: what goes is
    found at other values. Where dead units would emit such shifts (batch norms), they
    are taken as they are.

    Args:
        dag: The network at its rewound weights.
        mask: Of its parameters.
    """
    filled = lambda tree: jax.tree.map(_filled, tree)
    for hole in (filled, lambda tree: tree):
        params = masks.tree_map(lambda m, x: _filled(x), mask, dag.params, hole=hole)
        made = compact(dag.replace(params=params), mask)
        if not made.net.state["folded"]:
            break
    own = made.index.gather(dag.params)  # pyright: ignore[reportPossiblyUnbound]
    return made._replace(net=made.net.replace(params=own))  # pyright: ignore


def _filled(x: Any) -> Any:
    """A vector without zeros."""
    return jnp.where(x == 0, jnp.asarray(0.01, x.dtype), x) if x.ndim == 1 else x


def _side(net: Any) -> Side:
    batch = jax.tree.leaves(example_of(net))[0].shape[0]
    return Side(count_params(net.params), units(net).total[0] / batch)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") or type(error).__name__


# --- the small network as a model -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A compacted network with the two methods that training asks for.

    Args:
        net: The network, shapes in place of its arrays.
    """

    net: Small

    def shapes(self, x: Any) -> tuple[Theta, Any, Any]:
        """Shapes of the parameters and the state."""
        del x
        return {"params": self.net.params, "gates": {}}, self.net.state, None

    def apply(
        self, theta: Theta, state: Any, x: Any, *, train: bool = False, key: Any = None
    ) -> tuple[Any, Any]:
        """Outputs, and the state as it is."""
        del train, key
        return self.net.replace(params=theta["params"], state=state)(x), state


def _small_model(model: Model, small: Compacted, ticket: _Ticket) -> Any:
    """A model of the small network, and where its training starts.

    Raises:
        ValueError: If it has a training mode, and cannot be built of narrower layers.
    """
    theta = {"params": small.net.params, "gates": {}}
    if not trains_otherwise(model, ticket.data.x_train[:1]):
        shapes = jax.tree.map(shape_of, small.net)
        return SmallModel(shapes), Trained(theta, small.net.state)
    start = Trained(theta, small.net.state["user"])
    return refit(model, small.net, ticket.data.x_train[:2]), start


def trains_otherwise(model: Model, x: Any) -> bool:
    """Whether a network has a mode of training: batch norm, dropout."""
    theta, state, _ = model.shapes(x)

    def names(train: bool) -> list[str]:
        run = lambda t, s, x, key: model.apply(t, s, x, train=train, key=key)
        jaxpr = jax.make_jaxpr(run)(theta, state, x, jax.random.key(0))
        return [e.primitive.name for e in equations(jaxpr.jaxpr)]

    return names(True) != names(False)


# --- the two side by side -------------------------------------------------------------


class _Runner:
    """Training of one of the two, a chunk at a time, with the time of every step."""

    def __init__(self, setup: Setup, model: Any, start: Trained, mask: Any, own: Any):
        self.trainer = make_trainer(setup.config, model, setup.task, setup.tx)
        cpu = jax.default_backend() == "cpu"
        self.single = cpu and slow_in_loop(model, own.data)
        self.key, self.mask, self.data = own.key, mask, own.data
        self.plan = jax.jit(self.trainer.order)(own.key, own.data)
        self.carry = jax.jit(self.trainer.begin)(start, mask, setup.learning_rate)
        steps = jax.jit(self.trainer.steps, donate_argnums=2)
        args = (self.key, mask, self.carry, self._parts(0)[0], self.data)
        self.steps = steps.lower(*args).compile()  # apart from what is timed
        self._measure = jax.jit(self.trainer.measure)
        self.times, self.losses = [], [self._loss()]

    def _parts(self, i: int) -> list[Any]:
        chunk = self.plan[i]
        return [chunk[j, None] for j in range(len(chunk))] if self.single else [chunk]

    def _loss(self) -> float:
        return float(self._measure(self.carry, self.data))

    def chunk(self, i: int) -> None:
        """Train up to the next evaluation."""
        parts = jax.block_until_ready(self._parts(i))
        begun = time.perf_counter()
        for part in parts:
            args = (self.key, self.mask, self.carry, part, self.data)
            self.carry = self.steps(*args)
        jax.block_until_ready(self.carry)
        self.times.append((time.perf_counter() - begun) / self.plan.shape[1])
        self.losses.append(self._loss())

    def finish(self, side: Side) -> Side:
        """The figures of its end."""
        metric = jax.jit(self.trainer.finish)(self.carry, self.data)[2]
        return dataclasses.replace(
            side, step=statistics.median(self.times), loss=self.losses[-1],
            metric=float(metric),
        )  # fmt: skip


def _race(
    cut: Cut, setup: Setup, ticket: _Ticket, model: Any, start: Trained, small: Any
) -> Cut:
    """Train both in turn, so that whatever slows the machine slows both."""
    mask = {"params": _left(small.index.gather(ticket.mask["params"])), "gates": None}
    dense = _Runner(setup, setup.model, ticket.start, ticket.mask, ticket)
    ours = _Runner(setup, model, start, mask, ticket)
    for i in range(dense.plan.shape[0]):
        for runner in (dense, ours) if i % 2 else (ours, dense):
            runner.chunk(i)
    gap = _gap(dense.losses, ours.losses)
    sides = {"dense": dense.finish(cut.dense), "small": ours.finish(cut.small)}
    return dataclasses.replace(cut, **sides, gap=gap)


def _left(mask: Any) -> Any:
    """The mask of the small network; None where it keeps all of a leaf."""
    some = lambda m: None if bool(jnp.all(m)) else m
    return masks.tree_map(some, mask)


def _gap(one: Sequence[float], two: Sequence[float]) -> float:
    return float(np.max(np.abs(np.asarray(one) - np.asarray(two))))
