"""The Python-loop driver: progress after every chunk, a saved state after every round.

The pieces are compiled once and mapped over seeds; the loop only calls them. The
branches (controls) are ablations of the finished tickets, run by the same programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
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
from dagjax.experiments.result import Record
from dagjax.experiments.seeds import Keys, over_seeds, place
from dagjax.experiments.store import Store
from dagjax.experiments.tasks import Task
from dagjax.experiments.train import TrainConfig, Trained, Trainer, TrainInfo
from dagjax.graph.core.dag import count_params
from dagjax.graph.rewrite.width import narrow_to
from dagjax.sparsity import masks
from dagjax.sparsity.pruners import Pruner

BRANCHES = ("random", "fresh", "transfer", "narrow")
_CONV = "conv_general_dilated"
_FAST = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
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
    rewind: int = 0
    learning_rate: Any = None  # a value in place of the optimizer's own


class Rounds(NamedTuple):
    """Rounds of all seeds, stacked."""

    info: TrainInfo  # [round, seed, ...]
    weights: list[int]  # [round], kept parameters of the first seed
    masks: Any = None  # [round, seed, ...]; None for branches, which follow from these


Tick = Callable[[float], None]
_INFO = TrainInfo(0, 0, 0)  # pyright: ignore[reportArgumentType]  # structure only


def looped(
    trainer: Trainer, tick: Tick, single: bool = False
) -> Callable[..., tuple[Trained, TrainInfo]]:
    """Drive a trainer by a Python loop over chunks, for all seeds at once.

    Args:
        trainer: The pieces of training of one seed.
        tick: Called after every chunk with its share of the training.
        single: Call one step at a time, of as many seeds as there are devices: no
            compiled loop is left around a step.

    Returns:
        The same function as `scanned` gives, mapped over seeds.
    """
    order = jax.jit(over_seeds(trainer.order, shared=1))
    begin = jax.jit(over_seeds(trainer.begin, shared=1))
    steps = jax.jit(over_seeds(trainer.steps, shared=1), donate_argnums=2)
    measure = jax.jit(over_seeds(trainer.measure, shared=1))
    finish = jax.jit(over_seeds(trainer.finish, shared=1))

    def train(
        key: Any, start: Trained, mask: Any, data: Data, lr: Any, share: float = 1.0
    ) -> tuple[Trained, TrainInfo]:
        carry, plan = begin(start, mask, lr), order(key, data)
        losses = [measure(carry, data)]
        for i in range(plan.shape[1]):
            chunk = plan[:, i]
            for j in range(chunk.shape[1]) if single else (slice(None),):
                part = chunk[:, j, None] if single else chunk
                carry = steps(key, mask, carry, part, data)
            losses.append(jax.block_until_ready(measure(carry, data)))
            tick(share / plan.shape[1])
        trained, *test = finish(carry, data)
        return trained, TrainInfo(jnp.stack(losses, 1), *test)

    return in_waves(train) if single else train


def in_waves(train: Callable[..., Any]) -> Callable[..., Any]:
    """Train as many seeds at a time as there are devices, wave after wave."""

    def waves(key: Any, start: Any, mask: Any, data: Data, lr: Any) -> Any:
        seeds, found = key.shape[0], []
        size = min(jax.local_device_count(), seeds)
        for first in range(0, seeds, size):  # the last wave begins again at seed 0
            index = jnp.arange(first, first + size) % seeds
            own = jax.tree.map(lambda x, i=index: x[i], (key, start, mask))
            share = min(size, seeds - first) / seeds
            found.append(train(*own, data, lr, share))
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[:seeds], *found)

    return waves


def make_pieces(setup: Setup, data: Data, tick: Tick) -> Pieces:
    """The experiment's functions, compiled and mapped over seeds."""
    single = jax.default_backend() == "cpu" and slow_in_loop(setup.model, data)
    trainers = make_trainers(
        setup.config, setup.model, setup.task, setup.tx, setup.rewind
    )
    init = make_init(setup.model, GRANULARITIES[setup.prune].full, setup.pruner)
    return Pieces(
        jax.jit(over_seeds(init, shared=1)),
        trainers.pretrain and looped(trainers.pretrain, lambda share: None, single),
        looped(trainers.train, tick, single),
        jax.jit(over_seeds(make_prune(setup.pruner, setup.config), shared=2)),
    )


def slow_in_loop(model: Any, data: Data) -> bool:
    """Whether a training step has a convolution that XLA:CPU is slow at in a loop.

    It is fast at the layout NHWC, HWIO -> NHWC only, in which `scan_conv` writes the
    gradients too; `lax.conv_general_dilated` does not (jax issue 12868).
    """
    x = data.x_train[:1]
    theta, state, _ = model.shapes(x)
    total = lambda t, s: jnp.sum(model.apply(t, s, x)[0])
    jaxpr = jax.make_jaxpr(jax.grad(total, allow_int=True))(theta, state)
    convolutions = [e for e in equations(jaxpr) if e.primitive.name == _CONV]
    return any(e.params["dimension_numbers"] != _FAST for e in convolutions)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for leaf in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(leaf, "eqns"):
                yield from equations(leaf)


class Experiment:
    """A lottery-ticket experiment over seeds, arm by arm; finished rounds are kept.

    Args:
        setup: What is run.
        keys: Keys with a leading axis `[seed]`.
        data: The data.
        densities: Falling kept shares of the rounds after the dense one.
        store: Where finished rounds are kept and looked for.
        on_round: Told a `Report` after every round.
        tick: Called after every chunk of training with its share of a round.
        branches: How many controls will be run; for the totals in reports.
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
        tick: Tick = lambda share: None,
        branches: int = 0,
        tickets: Store | None = None,
        keep: str = "last",
    ):
        self.setup, self.store, self.on_round = setup, store, on_round
        self.tick, self.densities = tick, tuple(densities)
        self.tickets, rounds = tickets or Store(None), len(self.densities)
        self.wanted = range(1 if keep == "all" else rounds, rounds + 1)
        self.trained: dict[int, Trained] = {}  # of the tickets, [seed, ...]
        seeds = keys.init.shape[0]
        self.keys, self.data = place(keys, seeds), place(data, seeds, shared=True)
        self.pieces = make_pieces(setup, self.data, tick)
        self.start, self.point = self._start(self.keys)
        self.done, self.total = 0, 1 + (1 + branches) * len(self.densities)

    def rounds(self) -> Rounds:
        """The dense round and one for each density, every ticket found in the last."""
        point, found = self.point, []
        like = (self.point, Round(self.point.mask, _INFO))
        goals = next_densities(self.densities)
        for i, density in enumerate((1.0, *self.densities)):
            args = (self.data, self.setup.learning_rate, point, goals[i])
            make = functools.partial(
                round_fn, self._watched(i), self.keys, self.start, *args
            )
            point, one = self._kept("ticket", i, density, like, make)
            self._look_up(i)
            point = jax.tree.map(jnp.asarray, point)
            found.append(one)
        stacked = _stack(found)
        theta = _first(self.start.theta)
        weights = [parameters_kept(_first(one.mask), theta) for one in found]
        return Rounds(stacked.info, weights, stacked.mask)

    def branch(self, name: str, tickets: Rounds) -> Rounds:
        """A control at every density, trained like the tickets.

        Args:
            name: `random`: masks with the same counts on every level. `fresh`: the
                same masks, another start. `transfer`: the mask of another seed.
                `narrow`: a dense network with as many parameters.
            tickets: What `rounds` gave.
        """
        infos, weights = [], tickets.weights[1:]
        for i, density in enumerate(self.densities, 1):
            mask = jax.tree.map(lambda m, i=i: jnp.asarray(m[i]), tickets.masks)
            if name == "narrow":
                setup = narrowed(self.setup, weights[i - 1], self.data)
                weights[i - 1] = _parameters(setup.model, self.data)
                make = functools.partial(self._dense, setup)
            else:
                make = functools.partial(getattr(self, f"_{name}"), mask, i)
            infos.append(self._kept(name, i, density, _INFO, make))
        return Rounds(_stack(infos), weights)

    def record(
        self, tickets: Rounds, branches: dict[str, Rounds], settings: dict[str, Any]
    ) -> Record:
        """All figures in one place."""
        dense = jax.tree.map(lambda x: x[:1], tickets.info)
        found = jax.tree.map(lambda x: x[1:], tickets.info)
        arms = {"dense": Rounds(dense, tickets.weights[:1])}
        arms |= {"ticket": Rounds(found, tickets.weights[1:]), **branches}
        return Record(
            settings,
            np.asarray(self.setup.config.evals),
            self.densities,
            {name: np.asarray(arm.info.loss) for name, arm in arms.items()},
            {name: np.asarray(arm.info.test_loss) for name, arm in arms.items()},
            {name: np.asarray(arm.info.test_metric) for name, arm in arms.items()},
            {name: arm.weights for name, arm in arms.items()},
            tickets.masks,
        )

    def _kept(
        self, arm: str, i: int, density: float, like: Any, make: Callable[[], Any]
    ) -> Any:
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

        def train(*args: Any) -> tuple[Trained, TrainInfo]:
            trained, info = self.pieces.train(*args)
            self.trained[i] = jax.tree.map(np.asarray, trained)
            self.tickets.save(f"round-{i}", trained)
            return trained, info

        return self.pieces._replace(train=train) if i in self.wanted else self.pieces

    def _look_up(self, i: int) -> None:
        """The ticket of a round that was finished before."""
        name = f"round-{i}"
        if i in self.wanted and i not in self.trained and self.tickets.has(name):
            self.trained[i] = self.tickets.load(name, self.start)

    def _start(self, keys: Keys) -> tuple[Trained, Point]:
        return start_fn(self.pieces, keys, self.data, self.setup.learning_rate)

    def _train(self, start: Trained, mask: Any) -> TrainInfo:
        lr = self.setup.learning_rate
        return self.pieces.train(self.keys.order, start, mask, self.data, lr)[1]

    @functools.cached_property
    def _shuffle(self) -> Callable[..., Any]:
        shuffle = GRANULARITIES[self.setup.prune].shuffle(self.setup.model.graph)

        def one(key: jax.Array, mask: Any, i: jax.Array) -> Any:
            # Rounds count up from 0; the streams of this branch count down from 2^32.
            return shuffle(jax.random.fold_in(key, jnp.uint32(0) - i), mask)

        return jax.jit(over_seeds(one, shared=1))

    @functools.cached_property
    def _fresh_start(self) -> Trained:
        fold = jax.vmap(lambda key: jax.random.fold_in(key, _FRESH))
        return self._start(self.keys._replace(init=fold(self.keys.init)))[0]

    def _random(self, mask: Any, i: int) -> TrainInfo:
        shuffled = self._shuffle(self.keys.prune, mask, jnp.uint32(i))
        return self._train(self.start, shuffled)

    def _fresh(self, mask: Any, i: int) -> TrainInfo:
        del i
        return self._train(self._fresh_start, mask)

    def _transfer(self, mask: Any, i: int) -> TrainInfo:
        del i
        return self._train(self.start, jax.tree.map(lambda m: jnp.roll(m, 1, 0), mask))

    def _dense(self, setup: Setup) -> TrainInfo:
        pieces, lr = make_pieces(setup, self.data, self.tick), setup.learning_rate
        start, point = start_fn(pieces, self.keys, self.data, lr)
        return pieces.train(self.keys.order, start, point.mask, self.data, lr)[1]


def narrowed(setup: Setup, weights: int, data: Data) -> Setup:
    """The same experiment on a narrow network with about that many parameters.

    Raises:
        GraphError: If the network has no layers that could be narrowed.
    """
    graph = narrow_to(setup.model.graph, weights, data.x_train[:1])
    return setup._replace(model=Model(graph, setup.model.gated))


def parameters_kept(mask: Any, theta: Any) -> int:
    """How many weights of the network a mask keeps; a dead arc keeps none."""
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    if mask["gates"] is not None:
        on = [arc for arc, gate in mask["gates"].items() if gate]
        return sum(size(theta["params"].get(arc)) for arc in on)
    free = masks.tree_map(lambda m, x: 0, mask["params"], theta["params"], hole=size)
    return int(masks.kept(mask["params"])) + sum(jax.tree.leaves(free))


def _parameters(model: Model, data: Data) -> int:
    return count_params(model.shapes(data.x_train[:1])[0]["params"])


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *trees)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)
