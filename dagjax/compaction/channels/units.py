"""What can be removed of a network: units, in groups of the same kind."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from dagjax.compaction.channels import cost_model
from dagjax.compaction.channels.arc_units import ARCS, ArcUnits, arc_units
from dagjax.compaction.channels.closures import over_closures
from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.grouping import (
    Extent,
    Group,
    groups_of,
    masks_without,
)
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.mask_checks import named
from dagjax.compaction.channels.traced_network import TracedNetwork, traced_network_of
from dagjax.compaction.removal.consumption import needed
from dagjax.compaction.removal.liveness import Liveness, dead_of_masks
from dagjax.graph.core.network import Network
from dagjax.graph.core.topology import Graph
from dagjax.graph.tracing.as_dag import graph_of
from dagjax.jaxprs.gc_paused import gc_paused
from dagjax.jaxprs.messages import TraceError
from dagjax.text import aligned
from dagjax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Units(Mapping[str, Group]):
    """`{name: group}`, all that can be removed of a network.

    Args:
        groups: In the order of evaluation; the last may be that of whole arcs.
        source: The program of the network.
        paths: The parameters.
        tree: Their structure.
        terms: Operations and parameters as functions of what is cut.
        arcs: The arcs that can go.
        extent: Where the units lie in the parameters.
        dense: What is dead without any mask.
    """

    groups: dict[str, Group]
    source: TracedNetwork
    paths: tuple[str, ...]
    tree: PyTree
    terms: tuple[cost_model.Terms, cost_model.Terms]
    arcs: ArcUnits
    extent: Extent
    dense: Liveness

    def __getitem__(self, name: str) -> Group:
        if name not in self.groups:
            raise KeyError(f"no group {name!r}; there are {', '.join(self.groups)}")
        return self.groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def channels(self) -> dict[str, Group]:
        """The groups of channels, without that of arcs."""
        return {name: g for name, g in self.groups.items() if name != ARCS}

    def mask(self, kept: Mapping[str, Array]) -> PyTree:
        """The mask of the parameters that keeps these units.

        Args:
            kept: `{group: [size] bools}`; groups that are not named are kept.
        """
        masks = self._masks(kept)
        return self.tree.unflatten(map(jax.device_put, masks))  # compiles nothing

    def _masks(self, kept: Mapping[str, Array]) -> list[Array]:
        gone, arcs = self._gone(kept)
        inputs = self.source.body.invars[: len(self.paths)]
        masks = masks_without(self.source.channels, inputs, gone, self.dense)
        for leaf in self.arcs.parameters(arcs):
            masks[leaf] = np.zeros_like(masks[leaf])
        return masks

    def of_units(self, values: Array, join: np.ufunc = np.add) -> dict[str, Array]:
        """`{group: [units]}`: what belongs to a unit, summed or the largest.

        Args:
            values: `[classes]`.
            join: `np.add` or `np.maximum`.
        """
        each = np.zeros(self.source.channels.classes.count)
        each[self.extent.chosen] = over_closures(self.extent.closure, values, join)
        return {name: each[group.classes] for name, group in self.channels.items()}

    def cost(self, kept: Mapping[str, Array]) -> tuple[float, float]:
        """Operations and parameters of the compacted network that keeps these units.

        What only served the units that go is found dead, and not counted either.
        """
        channels = self.source.channels
        dead = dead_of_masks(channels, self._masks(kept))
        runs = {*needed(channels, dead.facts)}
        flops, params = self.terms
        evaluated = np.array([equation in runs for equation in flops.steps], bool)
        return (
            float(flops.values(dead.removed)[evaluated].sum()),
            _without(params.values(dead.removed), dead.unread),
        )

    def estimate(self, kept: Mapping[str, Array]) -> tuple[float, float]:
        """The same, quickly, without what only served the units that go."""
        gone, arcs = self._gone(kept)
        gone = gone | self.dense.removed
        flops, params = self.terms
        alive = np.array([arc not in arcs for arc in self.arcs.of_terms], bool)
        return (
            float(flops.values(gone)[alive].sum()),
            _without(
                params.values(gone), self.arcs.parameters(arcs) | self.dense.unread
            ),
        )

    @functools.cached_property
    def total(self) -> tuple[float, float]:
        """Operations and parameters of the whole network."""
        flops, params = (float(of.whole().sum()) for of in self.terms)
        return flops, params

    def _gone(self, kept: Mapping[str, Array]) -> tuple[Array, set[str]]:
        classes = self.source.channels.classes
        gone, arcs = np.zeros(classes.count, bool), set()
        for name, stays in kept.items():
            group, leaves = self[name], ~np.asarray(stays, bool)
            if leaves.shape != (group.size,):
                raise CompactionError(
                    f"group {name!r} has {group.size} units, got {leaves.shape} bools"
                )
            if name == ARCS:
                arcs = {
                    arc for arc, goes in zip(group.classes, leaves, strict=True) if goes
                }
            else:
                gone[group.classes[leaves]] = True
        return classes.close(gone), arcs

    def __repr__(self) -> str:
        flops, params = self.total
        rows = [("group", "level", "units", "params/unit", "flops/unit", "parameters")]
        for group in self.groups.values():
            where = ", ".join(dict.fromkeys(m.path for m in group.members))
            where = where if len(where) < 48 else where[:45] + "..."
            rows.append((
                group.name, str(group.level), str(group.size),
                _mean(group.params), _mean(group.flops), where,
            ))  # fmt: skip
        lines = aligned(rows, left=(0, 5))
        count = sum(g.size for g in self.groups.values())
        lines.append(
            f"{count:,} units in {len(self)} groups; {params:,.0f} parameters, "
            f"{flops / 1e6:,.2f} MFLOPs"
        )
        return "\n".join(lines)


@gc_paused()
def units(net: Network) -> Units:
    """All that can be removed of a network, found by following every axis.

    Units are the connected components of the channel DAG: indices that one-to-one arcs
    (sums, activations, normalizations, depthwise convolutions) join go together. What
    leaves through an output, or meets a primitive without a rule, is not among them
    (`dj.explain` says why). (Ours; coupled channels are the groups of DepGraph, Fang et
    al. 2023.)

    Args:
        net: A DAG, or a compacted network.

    Returns:
        Units: `{name: group}`; a whole arc of a sum is a unit of the group "arcs".

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dj.units(dj.init(jax.random.key(0), graph, jnp.ones((1, 4))))
        group  level  units  params/unit  flops/unit  parameters
        Dense      1      8            8          28  Dense/bias, Dense/kernel, ...
        8 units in 1 groups; 67 parameters, 0.00 MFLOPs
    """
    graph = _graph(net)
    return _units(traced_network_of(net), jax.tree.structure(net.params), graph)


@functools.lru_cache(maxsize=16)
def _units(source: TracedNetwork, tree: PyTree, graph: Graph | None) -> Units:
    """Values do not enter, so the units of a program are found once."""
    numbered = tree.unflatten(range(tree.num_leaves))
    paths, channels = tuple(named(numbered)), source.channels
    terms = cost_model.operations(channels), cost_model.parameters(channels, len(paths))
    groups, extent, dense = groups_of(source, paths, terms)
    arcs = arc_units(graph, numbered, source, terms[0])
    if arcs.leaves:
        groups[ARCS] = arcs.group(paths, terms)
    return Units(groups, source, paths, tree, terms, arcs, extent, dense)


def _without(values: Array, leaves: Iterable[int]) -> float:
    """A sum over parameters; leaves behind them are state."""
    gone = [leaf for leaf in leaves if leaf < len(values)]
    return float(values.sum() - values[gone].sum())


def _graph(net: Network) -> Graph | None:
    """The arcs of a network; a cut one may have an output that no input changes."""
    try:
        return graph_of(net)
    except TraceError:
        return None


# --- text -----------------------------------------------------------------------------


def _mean(values: Array) -> str:
    return f"{values.mean():,.0f}" if len(values) else "-"
