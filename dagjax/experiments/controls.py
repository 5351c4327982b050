"""The controls: ablations of finished tickets, trained by the experiment's programs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dagjax.experiments.examples import Data
from dagjax.experiments.experiment import (
    INFO,
    Experiment,
    Rounds,
    Setup,
    make_pieces,
    stack,
)
from dagjax.experiments.granularity import GRANULARITIES
from dagjax.experiments.lottery import start_fn
from dagjax.experiments.model import Model
from dagjax.experiments.seeds import over_seeds
from dagjax.experiments.train import Trained, TrainInfo
from dagjax.graph.core.dag import count_params
from dagjax.graph.rewrite.width import narrow_to
from dagjax.types import Key, Mask

CONTROLS = ("random", "fresh", "transfer", "narrow")
_FRESH = 0x5EED  # folded into the init keys of the fresh start


class Controls:
    """Controls of an experiment, one at a time.

    `random`: masks with the same counts on every level. `fresh`: the same masks,
    another start. `transfer`: the mask of another seed. `narrow`: a dense network with
    as many parameters.

    Args:
        experiment: Whose rounds are finished.
        tickets: Those rounds.
    """

    def __init__(self, experiment: Experiment, tickets: Rounds):
        self.experiment, self.tickets = experiment, tickets

    def run(self, name: str) -> Rounds:
        """A control at every density, trained like the tickets.

        Args:
            name: One of `CONTROLS`.
        """
        experiment, infos, weights = self.experiment, [], self.tickets.weights[1:]
        for i, density in enumerate(experiment.densities, 1):
            if name == "narrow":
                setup = narrowed(experiment.setup, weights[i - 1], experiment.data)
                shapes = setup.model.shapes(experiment.data.x_train[:1])[0]
                weights[i - 1] = count_params(shapes["params"])
                train = functools.partial(self._dense, setup)
            else:
                train = functools.partial(self._ablated, name, i)
            infos.append(experiment.finished(name, i, density, INFO, train))
        return Rounds(stack(infos), weights)

    @functools.cached_property
    def _shuffle(self) -> Callable[..., Mask]:
        setup = self.experiment.setup
        shuffle = GRANULARITIES[setup.prune].shuffle(setup.model.graph)

        def one(key: Key, mask: Mask, i: jax.Array) -> Mask:
            # Rounds count up from 0; the streams of this control count down from 2^32.
            return shuffle(jax.random.fold_in(key, jnp.uint32(0) - i), mask)

        return jax.jit(over_seeds(one, shared=1))

    @functools.cached_property
    def _fresh_start(self) -> Trained:
        keys = self.experiment.keys
        fold = jax.vmap(lambda key: jax.random.fold_in(key, _FRESH))
        return self.experiment.start_of(keys._replace(init=fold(keys.init)))[0]

    def _ablated(self, name: str, i: int) -> TrainInfo:
        experiment = self.experiment
        mask = jax.tree.map(lambda m: jnp.asarray(m[i]), self.tickets.masks)
        if name == "random":
            mask = self._shuffle(experiment.keys.prune, mask, jnp.uint32(i))
        elif name == "transfer":
            mask = jax.tree.map(lambda m: jnp.roll(m, 1, 0), mask)
        start = self._fresh_start if name == "fresh" else experiment.start
        return experiment.train(start, mask)

    def _dense(self, setup: Setup) -> TrainInfo:
        keys, data = self.experiment.keys, self.experiment.data
        pieces = make_pieces(setup, data, self.experiment.on_chunk)
        start, point = start_fn(pieces, keys, data, setup.learning_rate)
        args = (keys.order, start, point.mask, data, setup.learning_rate)
        return pieces.train(*args)[1]


def narrowed(setup: Setup, weights: int, data: Data) -> Setup:
    """The same experiment on a narrow network with about that many parameters.

    Raises:
        GraphError: If the network has no layers that could be narrowed.
    """
    graph = narrow_to(setup.model.graph, weights, data.x_train[:1])
    prune = "weights" if setup.prune == "units" else setup.prune  # nothing is pruned
    return setup._replace(model=Model(graph, setup.model.gated), prune=prune)
