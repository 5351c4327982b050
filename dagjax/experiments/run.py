"""The Python-loop driver: progress after every chunk, a saved state after every round.

The pieces are compiled once and mapped over seeds; the loop only calls them. The
branches (controls) are ablations of the finished tickets, run by the same programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dagjax.experiments.examples import Data
from dagjax.experiments.granularity import GRANULARITIES
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
from dagjax.experiments.model import Model
from dagjax.experiments.seeds import Keys, over_seeds, place
from dagjax.experiments.store import Store
from dagjax.experiments.tasks import Task
from dagjax.experiments.train import TrainConfig, Trained, Trainer, TrainInfo
from dagjax.graph.topology import GraphError
from dagjax.graph.width import narrow_to
from dagjax.sparsity import masks
from dagjax.sparsity.pruners import Pruner

BRANCHES = ("random", "fresh", "transfer", "narrow")
_FRESH = 0x5EED  # folded into the init keys of the branch with a fresh start


class Report(NamedTuple):
    """What `on_round` is told after every round."""

    arm: str  # "ticket" or a branch
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
    rewind: int
    learning_rate: Any = None


class Rounds(NamedTuple):
    """Rounds of all seeds, stacked."""

    masks: Any  # [round, seed, ...]; None for branches, whose masks follow from these
    info: TrainInfo  # [round, seed, ...]


Tick = Callable[[str], None]


def looped(trainer: Trainer, tick: Tick) -> Callable[..., tuple[Trained, TrainInfo]]:
    """Drive a trainer by a Python loop over chunks, for all seeds at once.

    Args:
        trainer: The pieces of training of one seed.
        tick: Called after every chunk.

    Returns:
        The same function as `scanned` gives, mapped over seeds.
    """
    order = jax.jit(over_seeds(trainer.order, shared=1))
    begin = jax.jit(over_seeds(trainer.begin, shared=2))
    chunk = jax.jit(over_seeds(trainer.chunk, shared=1), donate_argnums=2)
    finish = jax.jit(over_seeds(trainer.finish, shared=1))

    def train(
        key: Any, start: Trained, mask: Any, data: Data, lr: Any
    ) -> tuple[Trained, TrainInfo]:
        carry, first = begin(start, mask, lr, data)
        plan, losses = order(key, data), [first]
        for i in range(plan.shape[1]):
            carry, loss = chunk(key, mask, carry, plan[:, i], data)
            losses.append(jax.block_until_ready(loss))
            tick("train")
        trained, *test = finish(carry, data)
        return trained, TrainInfo(jnp.stack(losses, 1), *test)

    return train


def make_pieces(setup: Setup, tick: Tick) -> Pieces:
    """The experiment's functions, compiled and mapped over seeds."""
    trainers = make_trainers(
        setup.config, setup.model, setup.task, setup.tx, setup.rewind
    )
    init = make_init(setup.model, GRANULARITIES[setup.prune].full, setup.pruner)
    return Pieces(
        jax.jit(over_seeds(init, shared=1)),
        trainers.pretrain and looped(trainers.pretrain, tick),
        looped(trainers.train, tick),
        jax.jit(over_seeds(make_prune(setup.pruner, setup.config), shared=2)),
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
        tick: Called after every chunk of training.
    """

    def __init__(
        self,
        setup: Setup,
        keys: Keys,
        data: Data,
        densities: Sequence[float],
        store: Store,
        on_round: Callable[[Report], None] = lambda report: None,
        tick: Tick = lambda label: None,
        arms: int = 1,
    ):
        self.setup, self.store, self.on_round = setup, store, on_round
        self.tick, self.densities = tick, tuple(densities)
        self.keys, self.data = place(keys), place(data, shared=True)
        self.pieces = make_pieces(setup, tick)
        self.start, self.point = self._start(keys)
        self.done, self.total = 0, 1 + arms * len(self.densities)
        self._infos = TrainInfo(0, 0, 0)  # pyright: ignore[reportArgumentType]

    def rounds(self) -> Rounds:
        """The dense round and one for each density, every ticket found in the last."""
        point, found = self.point, []
        steps = zip((1.0, *self.densities), next_densities(self.densities), strict=True)
        for i, (density, goal) in enumerate(steps):
            make = lambda point=point, goal=goal: round_fn(
                self.pieces, self.keys, self.start, self.data,
                self.setup.learning_rate, point, goal,
            )  # fmt: skip
            like = (self.point, Round(self.point.mask, self._infos))
            point, one = self._kept("ticket", i, density, like, make)
            point = jax.tree.map(jnp.asarray, point)
            found.append(one)
        stack = lambda *xs: np.stack([np.asarray(x) for x in xs])
        stacked = jax.tree.map(stack, *found)
        return Rounds(stacked.mask, stacked.info)

    def branch(self, name: str, tickets: Rounds) -> Rounds:
        """A control at every density, trained like the tickets.

        Args:
            name: `random`: masks with the same counts on every level. `fresh`: the
                same masks, another start. `transfer`: the mask of another seed.
                `narrow`: a dense network with as many parameters.
            tickets: What `rounds` gave.
        """
        infos = []
        for i, density in enumerate(self.densities, 1):
            mask = jax.tree.map(lambda m, i=i: jnp.asarray(m[i]), tickets.masks)
            make = lambda mask=mask, i=i: getattr(self, f"_{name}")(mask, i)
            infos.append(self._kept(name, i, density, self._infos, make))
        return Rounds(
            None,
            jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *infos),
        )

    def _kept(
        self, arm: str, i: int, density: float, like: Any, make: Callable[[], Any]
    ) -> Any:
        name = f"{arm}-{i}"
        if self.store.has(name):
            result = self.store.load(name, like)
        else:
            result = make()
            self.store.save(name, result)
        info = result if isinstance(result, TrainInfo) else result[1].info
        self.done += 1
        report = Report(
            arm, density, np.asarray(info.loss), np.asarray(info.test_metric),
            self.done, self.total,
        )  # fmt: skip
        self.on_round(report)
        return result

    def _start(self, keys: Keys) -> tuple[Trained, Point]:
        return start_fn(self.pieces, keys, self.data, self.setup.learning_rate)

    def _train(self, start: Trained, mask: Any) -> TrainInfo:
        lr = self.setup.learning_rate
        return self.pieces.train(self.keys.order, start, mask, self.data, lr)[1]

    def _random(self, mask: Any, i: int) -> TrainInfo:
        kind = GRANULARITIES[self.setup.prune]
        shuffle = kind.shuffle(self.setup.model.graph)

        def one(key: jax.Array, mask: Any, i: jax.Array) -> Any:
            # Rounds count up from 0; the streams of this branch count down from 2^32.
            return shuffle(jax.random.fold_in(key, jnp.uint32(0) - i), mask)

        shuffled = jax.jit(over_seeds(one, shared=1))
        return self._train(self.start, shuffled(self.keys.prune, mask, jnp.uint32(i)))

    def _fresh(self, mask: Any, i: int) -> TrainInfo:
        del i
        fold = jax.vmap(lambda key: jax.random.fold_in(key, _FRESH))
        start, _ = self._start(self.keys._replace(init=fold(self.keys.init)))
        return self._train(start, mask)

    def _transfer(self, mask: Any, i: int) -> TrainInfo:
        del i
        return self._train(self.start, jax.tree.map(lambda m: jnp.roll(m, 1, 0), mask))

    def _narrow(self, mask: Any, i: int) -> TrainInfo:
        del i
        setup = self.setup
        one = lambda tree: jax.tree.map(lambda x: x[0], tree)
        total = parameters_kept(one(mask), one(self.start.theta))
        graph = narrow_to(setup.model.graph, int(total), self.data.x_train[:1])
        small = setup._replace(model=Model(graph, setup.model.gated))
        pieces = make_pieces(small, self.tick)
        lr = setup.learning_rate
        start, point = start_fn(pieces, self.keys, self.data, lr)
        args = (self.keys.order, start, point.mask, self.data, lr)
        return pieces.train(*args)[1]


def can_narrow(setup: Setup, data: Data) -> bool:
    """Whether the network has layers that the narrow control could shrink."""
    try:
        narrow_to(setup.model.graph, 1, data.x_train[:1])
    except GraphError:
        return False
    return True


def parameters_kept(mask: Any, theta: Any) -> jax.Array:
    """How many weights of the network a mask keeps; a dead arc keeps none of its own."""
    if mask["gates"] is not None:
        size = lambda arc: sum(
            x.size for x in jax.tree.leaves(theta["params"].get(arc))
        )
        counts = [on * size(arc) for arc, on in mask["gates"].items()]
        return jnp.asarray(sum(counts))
    whole = masks.tree_map(lambda m, x: 0, mask["params"], theta["params"], hole=_size)
    return masks.kept(mask["params"]) + sum(jax.tree.leaves(whole))


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
