"""What each group of units is worth: a metric with only that group pruned."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.units import Units, units
from dagjax.compaction.pruning.scores import best, unit_scores
from dagjax.graph.core.network import Network
from dagjax.objectives import Objective, default_objectives, targets_expected
from dagjax.sparsity import masks
from dagjax.text import aligned
from dagjax.types import Mask, PyTree

_CHUNK = 8  # masks that are evaluated at a time on an accelerator


class Sensitivity(NamedTuple):
    """A metric and a loss, by group and density; one group is pruned at a time.

    Args:
        groups: Names of the groups, in the order of evaluation.
        densities: `[D]`, shares of a group's units that were asked for.
        metric: `[groups, D]`, higher is better.
        loss: `[groups, D]`.
        dense: Metric and loss of the whole network.
        kept: `[groups, D]`, how many units stayed.
        sizes: `[groups]`, of how many.
    """

    groups: tuple[str, ...]
    densities: tuple[float, ...]
    metric: Array
    loss: Array
    dense: tuple[float, float]
    kept: Array
    sizes: Array

    def table(self) -> str:
        """The metric as text, the most sensitive group first."""
        order = np.argsort(self.metric.mean(1), kind="stable")
        rows = [("group", "units", *(f"{d:.4g}" for d in self.densities))]
        for place in order:
            values = (f"{value:.4f}" for value in self.metric[place])
            rows.append((self.groups[place], str(self.sizes[place]), *values))
        return "\n".join([*aligned(rows), f"dense {self.dense[0]:.4f}"])


def sensitivity(
    net: Network,
    data: tuple[PyTree, Array],
    *,
    loss: Objective | None = None,
    metric: Objective | None = None,
    densities: Sequence[float] = (0.9, 0.7, 0.5, 0.3, 0.1),
    scores: PyTree = "l2",
    groups: str | Iterable[str] | None = None,
) -> Sensitivity:
    """The metric when one group is pruned to each density, all others left whole.

    All masks are values of one compiled function. (Layer-wise sensitivity: Li et al.
    2017, figure 2; Han et al. 2015.)

    Args:
        net: A DAG, built or traced, or a compacted network.
        data: `(x, y)`: `[B, ...]` or a tuple of inputs, and targets; integers and
            bools are classes, floats are regressed.
        loss: `(outputs, targets) -> values`, averaged; None: cross entropy of classes,
            squared error of floats.
        metric: Likewise, higher is better; None: accuracy, or minus the squared error.
        densities: Shares of a group's units to keep; one unit stays at least.
        scores: As for `dj.prune_units`.
        groups: A name or names of groups of `dj.units(net)`; None: all of them.

    Returns:
        Sensitivity: `print(found.table())`; `dj.draw_sensitivity(found)` draws it.

    Raises:
        CompactionError: If a density is not in (0, 1], or the network has no units.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> y = dag(x).argmax(-1)  # what the dense network says is right
        >>> found = sensitivity(dag, (x, y), densities=[1.0, 0.5])
        >>> found.groups, found.dense[0], found.metric[0, 0].item(), found.kept.tolist()
        (('Dense',), 1.0, 1.0, [[8, 4]])
    """
    for density in densities:
        if not 0 < density <= 1:
            raise CompactionError(f"densities are shares in (0, 1], got {density}")
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise CompactionError("data are a pair: inputs and targets")
    x, y = data
    inputs = x if isinstance(x, tuple) else (x,)
    if not len(inputs[0]) or len(inputs[0]) != len(y):
        raise CompactionError(f"{len(inputs[0])} inputs and {len(y)} targets")
    default = default_objectives(y)
    objectives = metric or default[1], loss or default[0]
    _check_fit(net, inputs, jnp.shape(y), objectives[1])
    found = units(net)
    chosen = unit_scores(net, scores, found)
    groups = [groups] if isinstance(groups, str) else groups
    names = tuple(chosen) if groups is None else tuple(groups)
    _check(names, chosen, found)
    count = lambda name, density: max(1, round(density * len(chosen[name])))
    pairs = [best(chosen[n], count(n, d)) for n in names for d in densities]
    plan = [name for name in names for _ in densities]
    trees = [found.mask({})]
    trees += [found.mask({n: k}) for n, k in zip(plan, pairs, strict=True)]
    values = _values(net, trees, inputs, jnp.asarray(y), objectives)
    shape = (len(names), len(densities))
    found_metric, found_loss = (column.reshape(shape) for column in values[1:].T)
    dense = float(values[0, 0]), float(values[0, 1])
    kept = np.array([k.sum() for k in pairs]).reshape(shape)
    shares = tuple(map(float, densities))
    sizes = np.array([len(chosen[name]) for name in names])
    return Sensitivity(names, shares, found_metric, found_loss, dense, kept, sizes)


def _check(names: Sequence[str], chosen: Mapping[str, Array], found: Units) -> None:
    for name in names:
        if name not in chosen:
            _ = found[name]  # no such group
            raise CompactionError(f"there are no scores for group {name!r}")
    if not names:
        raise CompactionError(
            "nothing of this network can be removed; dj.explain(net) says why"
        )


def _check_fit(
    net: Network, inputs: PyTree, targets: tuple[int, ...], loss: Objective
) -> None:
    """Only shapes are computed."""
    shape = lambda out: out.shape if hasattr(out, "shape") else None
    outputs = shape(jax.eval_shape(lambda net, xs: net(*xs), net, inputs))
    wanted = () if outputs is None else targets_expected(loss, outputs)
    if wanted and targets not in wanted:
        raise CompactionError(
            f"outputs {outputs} do not fit targets {targets}: {loss.__name__} expected "
            f"targets {' or '.join(map(str, wanted))}"
        )


def _values(
    net: Network,
    trees: Sequence[Mask],
    inputs: PyTree,
    y: jax.Array,
    objectives: tuple[Objective, ...],
) -> Array:
    """`[masks, 2]`: metric and loss under each mask, from one compilation."""
    if jax.default_backend() == "cpu":  # convolutions over many kernels are slow there
        return np.array([_value(net, m, inputs, y, objectives) for m in trees], float)
    rows = []
    for low in range(0, len(trees), _CHUNK):
        part = [*trees[low : low + _CHUNK]]
        part += [trees[0]] * (_CHUNK - len(part))  # of one shape: compiled once
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *part)
        rows.append(np.array(_many(net, stacked, inputs, y, objectives), float).T)
    return np.concatenate(rows)[: len(trees)]


@functools.partial(jax.jit, static_argnames="objectives")
def _value(
    net: Network,
    mask: Mask,
    inputs: PyTree,
    y: jax.Array,
    objectives: tuple[Objective, ...],
) -> Any:
    outputs = net.replace(params=masks.apply(mask, net.params))(*inputs)
    return tuple(jnp.mean(objective(outputs, y)) for objective in objectives)


@functools.partial(jax.jit, static_argnames="objectives")
def _many(
    net: Network,
    stacked: PyTree,
    inputs: PyTree,
    y: jax.Array,
    objectives: tuple[Objective, ...],
) -> jax.Array:
    one = lambda mask: _value(net, mask, inputs, y, objectives)
    return jax.vmap(one)(stacked)
