"""What can be removed of a network: units, in groups of the same kind."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dagjax.compaction.channels import cost_model
from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.mask_checks import named
from dagjax.compaction.channels.traced_network import Source, source_of
from dagjax.graph.core.dag import DAG
from dagjax.graph.core.topology import Graph
from dagjax.jaxprs.gc_paused import gc_paused

_USUAL = ("kernel", "bias", "scale", "embedding", "weight", "w", "b")  # of a layer
ARCS = "arcs"  # the group whose units are whole branches


class Member(NamedTuple):
    """Where a group's units lie in one parameter.

    Args:
        path: The parameter.
        axis: One of its axes; None for all of it.
        indices: For each unit its indices there.
    """

    path: str
    axis: int | None
    indices: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that lie in the same axes of the same parameters.

    Args:
        name: After the parameter that writes them.
        size: How many there are.
        level: The number of contractions on the way to them.
        flops: `[size]`, operations that go with a unit, at the source's input shapes.
        params: `[size]`, parameters that go with a unit.
        classes: `[size]`, their classes of labels; of arcs their names.
        where: Finds their members.
    """

    name: str
    size: int
    level: int
    flops: Array
    params: Array
    classes: Any
    where: Callable[[], tuple[Member, ...]]

    @functools.cached_property
    def members(self) -> tuple[Member, ...]:
        """Where they lie in the parameters."""
        return self.where()

    def __repr__(self) -> str:
        return f"Group({self.name!r}: {self.size} units, level {self.level})"


@dataclasses.dataclass(frozen=True, eq=False)
class Units(Mapping[str, Group]):
    """`{name: group}`, all that can be removed of a network.

    Args:
        groups: In the order of evaluation; the last may be that of whole arcs.
        source: The program of the network.
        paths: The parameters.
        tree: Their structure.
        terms: Operations and parameters as functions of what is cut.
        arcs: `{arc: places of its parameters}` of arcs that can go.
    """

    groups: dict[str, Group]
    source: Source
    paths: tuple[str, ...]
    tree: Any
    terms: tuple[cost_model.Terms, cost_model.Terms]
    arcs: dict[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Group:
        if name not in self.groups:
            raise KeyError(f"no group {name!r}; there are {', '.join(self.groups)}")
        return self.groups[name]

    def __iter__(self) -> Any:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def channels(self) -> dict[str, Group]:
        """The groups of channels, without that of arcs."""
        return {name: g for name, g in self.groups.items() if name != ARCS}

    def mask(self, kept: Mapping[str, Any]) -> Any:
        """The mask of the parameters that keeps these units.

        Args:
            kept: `{group: [size] bools}`; groups that are not named are kept.
        """
        gone, arcs = self._gone(kept)
        whole = {place for arc in arcs for place in self.arcs[arc]}
        masks = [
            self._leaf(var, gone, i not in whole)
            for i, var in enumerate(self.source.body.invars[: len(self.paths)])
        ]
        return self.tree.unflatten(masks)

    def cost(self, kept: Mapping[str, Any]) -> tuple[float, float]:
        """Operations and parameters of the network that keeps these units."""
        gone, arcs = self._gone(kept)
        flops, params = self.terms
        alive = np.array([arc not in arcs for arc in self._arcs_of_terms], bool)
        whole = [place for arc in arcs for place in self.arcs[arc]]
        own = params.values(gone)
        return float(flops.values(gone)[alive].sum()), float(
            own.sum() - own[whole].sum()
        )

    @functools.cached_property
    def total(self) -> tuple[float, float]:
        """Operations and parameters of the whole network."""
        return self.cost({})

    def _gone(self, kept: Mapping[str, Any]) -> tuple[Array, set[str]]:
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

    def _leaf(self, var: Any, gone: Array, stays: bool) -> Any:
        mask = np.full(var.aval.shape, stays)
        for axis, of in enumerate(self.source.channels.classes_at(var)):
            if gone[of].any():
                shape = [-1 if d == axis else 1 for d in range(mask.ndim)]
                mask &= ~gone[of].reshape(shape)
        return jax.device_put(mask)  # compiles nothing

    @functools.cached_property
    def _owners(self) -> dict[Any, set[int]]:
        """`{value: places of the leaves that it is made of}`, if of nothing else."""
        body, free = self.source.body, self.source.free
        found: dict[Any, set[int]] = {v: {i} for i, v in enumerate(body.invars[:free])}
        for step in body.equations:
            if all(v in found for v in step.reads) and step.reads:
                leaves = set().union(*(found[v] for v in step.reads))
                found |= dict.fromkeys(step.eqn.outvars, leaves)
        return found

    @functools.cached_property
    def _arc_of(self) -> dict[int, str]:
        return {place: arc for arc, places in self.arcs.items() for place in places}

    @functools.cached_property
    def _arcs_of_terms(self) -> list[str | None]:
        return [self._owner(step) for step in self.terms[0].steps]

    def _owner(self, step: Any) -> str | None:
        """The arc whose parameters a contraction reads."""
        leaves = [i for v in step.reads for i in self._owners.get(v, ())]
        arcs = {self._arc_of.get(i) for i in leaves if i < len(self.paths)}
        return arcs.pop() if len(arcs) == 1 else None

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
        wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(_aligned(row, wide)).rstrip() for row in rows]
        count = sum(g.size for g in self.groups.values())
        lines.append(
            f"{count:,} units in {len(self)} groups; {params:,.0f} parameters, "
            f"{flops / 1e6:,.2f} MFLOPs"
        )
        return "\n".join(lines)


@gc_paused()
def units(net: Any) -> Units:
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
    graph = net.graph if isinstance(net, DAG) else None
    return _units(source_of(net), jax.tree.structure(net.params), graph)


@functools.lru_cache(maxsize=16)
def _units(source: Source, tree: Any, graph: Graph | None) -> Units:
    """Values do not enter, so the units of a program are found once."""
    numbered = tree.unflatten(range(tree.num_leaves))
    paths, channels = tuple(named(numbered)), source.channels
    terms = cost_model.operations(channels), cost_model.parameters(channels, len(paths))
    found = _groups(source, paths, terms)
    arcs = {} if graph is None else _arcs(graph, numbered)
    whole = Units(found, source, paths, tree, terms, arcs)
    return (
        dataclasses.replace(whole, groups=found | _arc_group(whole)) if arcs else whole
    )


def _groups(source: Source, paths: tuple[str, ...], terms: Any) -> dict[str, Group]:
    channels, classes = source.channels, source.channels.classes
    ends = [
        (place, axis, of)
        for place, var in enumerate(source.body.invars[: len(paths)])
        for axis, of in enumerate(channels.classes_at(var))
        if (of != classes.pinned).any()
    ]
    nothing, levels = np.zeros(classes.count, bool), _levels(source)
    flops, params = (cost_model.spread(channels, t.saved(nothing)) for t in terms)
    owners = np.repeat(np.arange(len(ends)), [len(of) for *_, of in ends])
    held = np.concatenate([of for *_, of in ends]) if ends else owners
    found: dict[str, Group] = {}
    for classes_of in sorted(
        _alike(channels, ends), key=lambda m: int(levels[m].min())
    ):
        where = np.unique(owners[_belonging(channels, classes_of[0])[held]])
        name = _unique(_name([(paths[ends[i][0]], ends[i][1]) for i in where]), found)
        found[name] = Group(
            name, len(classes_of), int(levels[classes_of].min()),
            flops[classes_of], params[classes_of], classes_of,
            functools.partial(_members, channels, ends, classes_of, paths),
        )  # fmt: skip
    return found


def _alike(channels: Any, ends: list[Any]) -> list[Array]:
    """Classes that lie in the same axes, by a random number for each axis."""
    classes, draw = channels.classes, np.random.default_rng(0)
    sign = np.zeros(classes.count, np.uint64)
    for _, _, of in ends:
        np.add.at(sign, of, draw.integers(1, 2**63, dtype=np.uint64))
    flat, factors = classes.of[classes.flat], classes.of[classes.factors]
    through = sign.copy()
    for column in factors.T:
        weight = draw.integers(1, 2**63, dtype=np.uint64) | np.uint64(1)
        np.add.at(through, column, sign[flat] * weight)
    chosen = np.flatnonzero(classes.atoms() & (through != 0) & ~_whole(classes, ends))
    _, kind = np.unique(through[chosen], return_inverse=True)
    return [chosen[kind == k] for k in range(kind.max() + 1)] if chosen.size else []


def _whole(classes: Any, ends: list[Any]) -> Array:
    """Classes that are all of an axis: without them nothing would be left of it."""
    found = np.zeros(classes.count, bool)
    for _, _, of in ends:
        if (of == of[0]).all():
            found[of[0]] = True
    return found


def _members(channels: Any, ends: Any, chosen: Array, paths: Any) -> tuple[Member, ...]:
    """In which axes of which parameters the units lie, directly or in a product."""
    classes = channels.classes
    flat, factors = classes.of[classes.flat], classes.of[classes.factors]
    place = np.full(classes.count, -1)
    place[chosen] = np.arange(len(chosen))
    found = []
    for leaf, axis, of in ends:
        direct = place[of]
        if (direct >= 0).any():
            found.append(Member(paths[leaf], axis, _sorted(direct, len(chosen))))
            continue
        for column in factors.T:
            owner = np.full(classes.count, -1)
            owner[flat] = place[column]
            if (owner[of] >= 0).any():
                found.append(Member(paths[leaf], axis, _sorted(owner[of], len(chosen))))
                break
    return tuple(found)


def _sorted(owner: Array, count: int) -> tuple[Array, ...]:
    """For each unit the indices that it owns."""
    order = np.argsort(owner, kind="stable")
    edges = np.searchsorted(owner[order], np.arange(count + 1))
    return tuple(order[a:b] for a, b in itertools.pairwise(edges))


def _belonging(channels: Any, chosen: int) -> Array:
    """`[classes]`: a class itself, and the products that it is a factor of."""
    classes = channels.classes
    flat, factors = classes.of[classes.flat], classes.of[classes.factors]
    mine = np.zeros(classes.count, bool)
    mine[chosen] = True
    mine[flat[(factors == chosen).any(1)]] = True
    return mine


def _name(ends: list[tuple[str, int]]) -> tuple[str, int]:
    """The parameter that writes the units, by its last axis, and the axis."""
    path, axis = max(ends, key=lambda end: end[1])
    layer, _, last = path.rpartition("/")
    return (layer if layer and last in _USUAL else path), axis


def _unique(named: tuple[str, int], taken: Any) -> str:
    """A name that no group has: with its axis, then with a number."""
    name, axis = named
    tries = itertools.chain(
        [name, f"{name}[{axis}]"], (f"{name}[{axis}]#{i}" for i in itertools.count(2))
    )
    return next(t for t in tries if t not in taken)


def _levels(source: Source) -> Array:
    """`[classes]`: the number of contractions before a class is first met."""
    channels, depth = source.channels, {}
    found = np.full(channels.classes.count, np.iinfo(np.int32).max)
    for step in source.body.walk():
        heavy = step.name in ("dot_general", "conv_general_dilated", "gather")
        level = max((depth.get(v, 0) for v in step.reads), default=0) + heavy
        for var in step.eqn.outvars:
            depth[var] = level
            if heavy and not step.bodies:
                for of in channels.classes_at(var):
                    np.minimum.at(found, of, level)
    flat = channels.classes.of[channels.classes.flat]
    for column in channels.classes.of[channels.classes.factors].T:
        np.minimum.at(found, column, found[flat])
    return np.where(found == np.iinfo(np.int32).max, 0, found)  # met by none


# --- whole arcs -----------------------------------------------------------------------


def _arcs(graph: Graph, numbered: Any) -> dict[str, tuple[int, ...]]:
    """`{arc: places of parameters that only it reads}`, of arcs that meet others."""
    beside = Counter(arc.target for arc in graph.arcs)
    read = {
        arc.name: jax.tree.leaves(arc.fn.own(numbered, arc.params_name))
        for arc in graph.arcs
    }
    readers = Counter(itertools.chain.from_iterable(read.values()))
    found = {
        arc.name: tuple(i for i in read[arc.name] if readers[i] == 1)
        for arc in graph.arcs
        if beside[arc.target] > 1 and arc.port is None
    }
    return {name: own for name, own in found.items() if own}


def _arc_group(whole: Units) -> dict[str, Group]:
    nothing = np.zeros(whole.source.channels.classes.count, bool)
    flops, entries = (terms.values(nothing) for terms in whole.terms)
    of_terms = np.array(whole._arcs_of_terms, object)
    costs = [
        (flops[of_terms == arc].sum(), entries[[*places]].sum())
        for arc, places in whole.arcs.items()
    ]
    where = lambda: tuple(
        Member(whole.paths[i], None, ())
        for places in whole.arcs.values()
        for i in places
    )
    names, (saved, own) = (*whole.arcs,), np.array(costs, float).T
    return {ARCS: Group(ARCS, len(names), 0, saved, own, names, where)}


# --- text -----------------------------------------------------------------------------


def _mean(values: Array) -> str:
    return f"{values.mean():,.0f}" if len(values) else "-"


def _aligned(row: tuple[str, ...], wide: list[int]) -> list[str]:
    first, *middle, last = zip(row, wide, strict=True)
    return [first[0].ljust(first[1]), *(c.rjust(w) for c, w in middle), last[0]]
