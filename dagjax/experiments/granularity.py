"""What one decision of pruning removes: a weight, a unit, an arc."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dagjax.experiments.model import Model, Theta
from dagjax.experiments.tasks import Task
from dagjax.graph.core.topology import Graph
from dagjax.sparsity import masks, scores, selection, units
from dagjax.sparsity.pruners import Pruner, one_shot
from dagjax.sparsity.scores import Score
from dagjax.sparsity.selection import Selection
from dagjax.types import Array, Key, Mask, PyTree, Scalar


class Granularity(NamedTuple):
    """How masks of one kind are made, chosen and shuffled."""

    full: Callable[[Theta, int], Mask]  # keeps all; of the parameters and outputs
    select: Callable[[Graph], Selection]
    # (key, mask) -> a random mask with the same counts on every level
    shuffle: Callable[[Graph], Callable[[jax.Array, Mask], Mask]]
    scores: tuple[str, ...]  # names of those that fit


def _weights(theta: Theta, outputs: int) -> Mask:
    del outputs
    return {"params": masks.full(theta["params"]), "gates": None}


def _units(theta: Theta, outputs: int) -> Mask:
    """Kernels with their biases; layers as wide as the output stay whole."""
    leaves = jax.tree_util.tree_leaves_with_path(theta["params"])
    layers = {path[:-1] for path, leaf in leaves if leaf.ndim >= 2}
    cut = lambda path, x: path[:-1] in layers and x.shape[-1] != outputs
    return {"params": masks.full(theta["params"], cut), "gates": None}


def _arcs(theta: Theta, outputs: int) -> Mask:
    del outputs
    return {"params": None, "gates": masks.full(theta["gates"], lambda *_: True)}


def _shuffle_units(key: jax.Array, mask: Mask) -> Mask:
    alive = units.gather(mask, -1, jnp.any)
    return units.spread(masks.shuffle(key, alive), mask, -1)


def _shuffle_arcs(graph: Graph) -> Callable[[jax.Array, Mask], Mask]:
    level = lambda path: graph.levels[graph.by_name[path[-1].key].target]
    return lambda key, mask: masks.shuffle(key, mask, level)


def every_node_fed(graph: Graph) -> Selection:
    """Arcs by score, but each node keeps its best one: the outputs stay reachable."""

    def select(scores: PyTree, mask: Mask, density: Scalar) -> Mask:
        gates, alive = dict(scores["gates"]), mask["gates"]
        for node in graph.nodes:
            names = [arc.name for arc in graph.arcs_into(node)]
            if names:
                row = jnp.stack([gates[n] for n in names])
                live = jnp.stack([alive[n] for n in names])
                best = jnp.argmax(jnp.where(live, row, -jnp.inf))
                row = jnp.where(jnp.arange(len(names)) == best, jnp.inf, row)
                gates |= dict(zip(names, row, strict=True))
        return selection.global_topk({"params": None, "gates": gates}, mask, density)

    return select


GRANULARITIES = {
    "weights": Granularity(
        _weights,
        lambda graph: selection.global_topk,
        lambda graph: masks.shuffle,
        ("magnitude", "taylor", "random"),
    ),
    "units": Granularity(
        _units,
        # One share for every layer: units of other fan-in do not compare.
        lambda graph: selection.structured(axis=-1, select=selection.per_leaf_topk),
        lambda graph: _shuffle_units,
        ("magnitude", "taylor", "random"),
    ),
    "arcs": Granularity(
        _arcs, every_node_fed, _shuffle_arcs, ("gate", "taylor", "random")
    ),
}


def make_score(name: str, model: Model, task: Task) -> Score:
    """A score of parameters with gates by its name, on batches `(state, x, y)`."""

    def loss(theta: Theta, batch: PyTree) -> jax.Array:
        state, x, y = batch
        return jnp.mean(task.loss(model.apply(theta, state, x)[0], y))

    def gate(key: Key, theta: Theta, mask: Mask, batch: PyTree) -> PyTree:
        of_gates = lambda gates, batch: loss({**theta, "gates": gates}, batch)
        score = scores.gate(of_gates)(key, theta["gates"], mask["gates"], batch)
        return {"params": None, "gates": score}

    known = {
        "magnitude": scores.magnitude,
        "random": scores.random,
        "taylor": scores.taylor(loss),
        "gate": gate,
    }
    if name not in known:
        raise ValueError(f"no score named {name!r}; scores are {', '.join(known)}")
    return known[name]


def make_pruner(prune: str, score: str | None, model: Model, task: Task) -> Pruner:
    """Score once a round at the given granularity.

    Args:
        prune: `weights`, `units` or `arcs`.
        score: A name; None: the granularity's first one.
        model: The network.
        task: Its loss.

    Raises:
        ValueError: If there is no such granularity, or the score does not fit it.
    """
    if prune not in GRANULARITIES:
        raise ValueError(f"prune {prune!r}: expected {', '.join(GRANULARITIES)}")
    kind = GRANULARITIES[prune]
    if score is not None and score not in kind.scores:
        raise ValueError(
            f"score {score!r} does not fit pruning of {prune}; choose from "
            f"{', '.join(kind.scores)}"
        )
    return one_shot(
        make_score(score or kind.scores[0], model, task), kind.select(model.graph)
    )


def check_densities(
    densities: Sequence[float], prune: str, model: Model, x: Array
) -> None:
    """Refuse densities that are no kept shares, do not fall, or keep nothing.

    Args:
        densities: Kept shares of the rounds.
        prune: A granularity.
        model: The network.
        x: An example batch.

    Raises:
        ValueError: The message says which and what is allowed.
    """
    listed = ", ".join(f"{d:g}" for d in densities) or "none"
    if not densities or not all(0 < d <= 1 for d in densities):
        raise ValueError(f"densities {listed}: expected kept shares in (0, 1]")
    if any(b >= a for a, b in itertools.pairwise(densities)):
        raise ValueError(
            f"densities {listed}: expected them to fall from round to round, none twice"
        )
    theta, _, outputs = model.shapes(x)
    mask = GRANULARITIES[prune].full(theta, outputs.shape[-1])
    total, least = masks.size(mask), 1
    if prune == "units":  # one share for every layer
        layers = units.gather(mask, -1, jnp.any)
        total = min(layer.size for layer in layers.values())
    if prune == "arcs":
        least = len({arc.target for arc in model.graph.arcs})
    what = "units of a layer" if prune == "units" else prune
    if round(min(densities) * total) < least:
        raise ValueError(
            f"density {min(densities):g} keeps {round(min(densities) * total)} of "
            f"{total} {what}, at least {least} must stay: expected at least "
            f"{math.ceil(1000 * least / total) / 1000:g}"
        )
