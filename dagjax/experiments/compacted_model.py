"""A compacted network as a model: what training it needs, and where it starts."""

from __future__ import annotations

import dataclasses

import jax

from dagjax.compaction.removal.compact import Compacted
from dagjax.compaction.removal.compacted import Small
from dagjax.experiments.loops import equations
from dagjax.experiments.model import Model, Theta, Trainable
from dagjax.experiments.narrow_model import narrow_model
from dagjax.experiments.train import Trained
from dagjax.jaxprs.versions import shape_of
from dagjax.types import Array, Key, PyTree, State


@dataclasses.dataclass(frozen=True)
class CompactedModel:
    """A compacted network, shapes in place of its arrays, as training asks for it."""

    net: Small

    def shapes(self, x: Array) -> tuple[Theta, State, PyTree]:
        """Shapes of the parameters and the state."""
        del x
        return {"params": self.net.params, "gates": {}}, self.net.state, None

    def apply(
        self,
        theta: Theta,
        state: State,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[PyTree, State]:
        """Outputs, and the state as it is."""
        del train, key
        return self.net.replace(params=theta["params"], state=state)(x), state


def compacted_model(
    model: Model, small: Compacted, x: Array
) -> tuple[Trainable, Trained]:
    """A model of the small network, and where its training starts; `x` are examples.

    Raises:
        ValueError: If it has a training mode, and cannot be built of narrower layers.
    """
    theta = {"params": small.net.params, "gates": {}}
    if not has_training_mode(model, x[:1]):
        shapes = jax.tree.map(shape_of, small.net)
        return CompactedModel(shapes), Trained(theta, small.net.state)
    start = Trained(theta, small.net.state["user"])
    return narrow_model(model, small.net, x[:2]), start


def has_training_mode(model: Model, x: Array) -> bool:
    """Whether a network has a mode of training: batch norm, dropout."""
    theta, state, _ = model.shapes(x)

    def names(train: bool) -> list[str]:
        run = lambda t, s, x, key: model.apply(t, s, x, train=train, key=key)
        jaxpr = jax.make_jaxpr(run)(theta, state, x, jax.random.key(0))
        return [e.primitive.name for e in equations(jaxpr.jaxpr)]

    return names(True) != names(False)
