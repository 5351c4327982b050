"""A lottery-ticket experiment over seeds, round by round; finished rounds are kept.

The pieces are compiled once and mapped over seeds; a Python loop calls them, reports
after every chunk and saves after every round.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dagjax.experiments.examples import Data
from dagjax.experiments.granularity import GRANULARITIES
from dagjax.experiments.loops import OnChunk, looped, slow_in_loop
from dagjax.experiments.lottery import (
    Pieces,
    Point,
    Round,
    make_init,
    make_prune,
    make_trainers,
    next_densities,
    round_fn,
    start_fn,
)
from dagjax.experiments.model import Model, Theta
from dagjax.experiments.result import Record, Settings
from dagjax.experiments.seeds import Keys, over_seeds, place
from dagjax.experiments.store import Store
from dagjax.experiments.tasks import Task
from dagjax.experiments.train import TrainConfig, Trained, TrainInfo
from dagjax.graph.core.topology import Graph
from dagjax.sparsity import masks
from dagjax.sparsity.pruners import Pruner
from dagjax.types import Mask, PyTree, Scalar

T = TypeVar("T")


class Report(NamedTuple):
    """What `on_round` is told after every round."""

    arm: str  # "ticket" or a control
    density: float
    loss: np.ndarray  # [seed, eval]
    test_metric: np.ndarray  # [seed]
    done: int
    total: int


class Setup(NamedTuple):
    """All that defines an experiment but the randomness and the data."""

    config: TrainConfig
    model: Model
    task: Task
    tx: optax.GradientTransformation
    pruner: Pruner
    prune: str
    rewind: int = 0
    learning_rate: Scalar | None = None  # a value in place of the optimizer's own


class Rounds(NamedTuple):
    """Rounds of all seeds, stacked."""

    info: TrainInfo  # [round, seed, ...]
    weights: list[int]  # [round], kept parameters of the first seed
    masks: Mask = None  # [round, seed, ...]; None for controls, which follow from these


INFO = TrainInfo(0, 0, 0)  # pyright: ignore[reportArgumentType]  # structure only


def make_pieces(setup: Setup, data: Data, on_chunk: OnChunk) -> Pieces:
    """The experiment's functions, compiled and mapped over seeds."""
    config, model = setup.config, setup.model
    single = slow_in_loop(model, data)
    both = make_trainers(config, model, setup.task, setup.tx, setup.rewind)
    trainer, pretrainer = both
    init = make_init(model, GRANULARITIES[setup.prune].full, setup.pruner)
    return Pieces(
        jax.jit(over_seeds(init, shared=1)),
        pretrainer and looped(pretrainer, lambda share: None, single),
        looped(trainer, on_chunk, single),
        jax.jit(over_seeds(make_prune(setup.pruner, config), shared=2)),
    )


class Experiment:
    """A lottery-ticket experiment over seeds, arm by arm; finished rounds are kept.

    Args:
        setup: What is run.
        keys: Keys with a leading axis `[seed]`.
        data: The data.
        densities: Falling kept shares of the rounds after the dense one.
        store: Where finished rounds are kept and looked for.
        on_round: Told a `Report` after every round.
        on_chunk: Called after every chunk of training with its share of a round.
        controls: How many controls will be run; for the totals in reports.
        tickets: Where trained tickets are kept and looked for.
        keep: The tickets of which rounds are: `last` or `all`.
    """

    def __init__(
        self,
        setup: Setup,
        keys: Keys,
        data: Data,
        densities: Sequence[float],
        store: Store,
        on_round: Callable[[Report], None] = lambda report: None,
        on_chunk: OnChunk = lambda share: None,
        controls: int = 0,
        tickets: Store | None = None,
        keep: str = "last",
    ):
        self.setup, self.store, self.on_round = setup, store, on_round
        self.on_chunk, self.densities = on_chunk, tuple(densities)
        self.tickets, rounds = tickets or Store(None), len(self.densities)
        self.wanted = range(1 if keep == "all" else rounds, rounds + 1)
        self.trained: dict[int, Trained] = {}  # of the tickets, [seed, ...]
        seeds = keys.init.shape[0]
        self.keys, self.data = place(keys, seeds), place(data, seeds, shared=True)
        self.pieces = make_pieces(setup, self.data, on_chunk)
        self.start, self.point = self.start_of(self.keys)
        self.done, self.total = 0, 1 + (1 + controls) * len(self.densities)

    def rounds(self) -> Rounds:
        """The dense round and one for each density, every ticket found in the last."""
        point, finished = self.point, []
        like = (self.point, Round(self.point.mask, INFO))
        goals = next_densities(self.densities)
        for i, density in enumerate((1.0, *self.densities)):
            args = (self.data, self.setup.learning_rate, point, goals[i])
            make = functools.partial(
                round_fn, self._watched(i), self.keys, self.start, *args
            )
            point, one = self.finished("ticket", i, density, like, make)
            self._look_up(i)
            point = jax.tree.map(jnp.asarray, point)
            finished.append(one)
        stacked = stack(finished)
        theta, graph = _first(self.start.theta), self.setup.model.graph
        weights = [parameters_kept(_first(r.mask), theta, graph) for r in finished]
        return Rounds(stacked.info, weights, stacked.mask)

    def record(
        self, tickets: Rounds, controls: dict[str, Rounds], settings: Settings
    ) -> Record:
        """All figures in one place."""
        dense = jax.tree.map(lambda x: x[:1], tickets.info)
        pruned = jax.tree.map(lambda x: x[1:], tickets.info)
        arms = {"dense": Rounds(dense, tickets.weights[:1])}
        arms |= {"ticket": Rounds(pruned, tickets.weights[1:]), **controls}
        read = lambda field: {
            name: np.asarray(getattr(arm.info, field)) for name, arm in arms.items()
        }
        return Record(
            settings,
            np.asarray(self.setup.config.evals),
            self.densities,
            **{field: read(field) for field in TrainInfo._fields},
            weights={name: arm.weights for name, arm in arms.items()},
            masks=tickets.masks,
        )

    def finished(
        self, arm: str, i: int, density: float, like: PyTree, make: Callable[[], PyTree]
    ) -> PyTree:
        """A finished round from the store, or a new one into it."""
        name = f"{arm}-{i}"
        result = self.store.load(name, like) if self.store.has(name) else make()
        if not self.store.has(name):
            self.store.save(name, result)
        info = result if isinstance(result, TrainInfo) else result[1].info
        self.done += 1
        curves = (np.asarray(info.loss), np.asarray(info.test_metric))
        self.on_round(Report(arm, density, *curves, self.done, self.total))
        return result

    def _watched(self, i: int) -> Pieces:
        """The pieces, of which training keeps what it gave in a wanted round."""

        def train(*args: PyTree) -> tuple[Trained, TrainInfo]:
            trained, info = self.pieces.train(*args)
            self.trained[i] = jax.tree.map(np.asarray, trained)
            self.tickets.save(f"round-{i}", trained)
            return trained, info

        return self.pieces._replace(train=train) if i in self.wanted else self.pieces

    def _look_up(self, i: int) -> None:
        """The ticket of a round that was finished before."""
        name = f"round-{i}"
        if i not in self.wanted or i in self.trained:
            return
        if self.tickets.has(name):
            self.trained[i] = self.tickets.load(name, self.start)
        elif self.store.has(f"ticket-{i}"):
            warnings.warn(
                f"the trained ticket of round {i} was not kept when it was found, and "
                "a resumed run does not train it again: run anew with keep='all'",
                stacklevel=3,
            )

    def start_of(self, keys: Keys) -> tuple[Trained, Point]:
        """The rewind point of some keys, and the full mask."""
        return start_fn(self.pieces, keys, self.data, self.setup.learning_rate)

    def train(self, start: Trained, mask: Mask) -> TrainInfo:
        """Train all seeds under a mask."""
        lr = self.setup.learning_rate
        return self.pieces.train(self.keys.order, start, mask, self.data, lr)[1]


def parameters_kept(mask: Mask, theta: Theta, graph: Graph) -> int:
    """How many weights of the network a mask keeps; dead arcs keep none.

    What tied arcs share counts once, while one of them is alive.
    """
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    if mask["gates"] is not None:
        on = {arc.params_name for arc in graph.arcs if mask["gates"].get(arc.name, 1)}
        return sum(size(theta["params"].get(name)) for name in on)
    free = masks.tree_map(lambda m, x: 0, mask["params"], theta["params"], hole=size)
    return int(masks.kept(mask["params"])) + sum(jax.tree.leaves(free))


def stack(trees: Sequence[T]) -> T:
    """Trees of one structure as one, with a new leading axis."""
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *trees)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)
