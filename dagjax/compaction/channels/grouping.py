"""Units in groups of the same kind: classes that lie in the same axes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from dagjax.compaction.channels.closures import closures
from dagjax.compaction.channels.cost_model import CONTRACTIONS, Terms
from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array, Classes
from dagjax.compaction.channels.traced_network import TracedNetwork
from dagjax.compaction.removal.liveness import Liveness, dead_of_masks
from dagjax.jaxprs.versions import Var

_USUAL = ("kernel", "bias", "scale", "embedding", "weight", "w", "b")  # of a layer


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


class Axis(NamedTuple):
    """An axis of a parameter, and the classes of its indices."""

    leaf: int
    axis: int
    of: Array


class Extent:
    """Where classes and all that goes with them lie in the parameters.

    Args:
        channels: The program.
        axes: The axes of parameters that can be cut.
        chosen: The classes.
        dead: `[classes]`, what is cut without any mask: it goes with none of them.
    """

    def __init__(
        self, channels: Channels, axes: Sequence[Axis], chosen: Array, dead: Array
    ):
        self.axes, self.chosen = axes, chosen
        self.closure = closures(channels.classes, chosen).multiply(~dead).tocsr()
        self.closure.eliminate_zeros()
        whole = [a.of for a in axes]
        self.ends = np.cumsum([0, *map(len, whole)])
        of = np.concatenate(whole) if whole else np.zeros(0, int)
        self.entries = self.closure[:, of].tocsr()  # [chosen, indices of all axes]
        self.entries.sort_indices()

    def axes_of(self, unit: int) -> list[int]:
        """The numbers of the axes in which a unit lies."""
        places = self.entries[unit].indices
        return np.unique(np.searchsorted(self.ends, places, "right") - 1).tolist()

    def members(self, units: Array, paths: Sequence[str]) -> tuple[Member, ...]:
        """In which axes of which parameters some units lie."""
        rows, members = self.entries[units], []
        for number, (leaf, axis, _) in enumerate(self.axes):
            part = rows[:, self.ends[number] : self.ends[number + 1]]
            if part.nnz:
                indices = np.split(part.indices, part.indptr[1:-1])
                members.append(Member(paths[leaf], axis, tuple(indices)))
        return tuple(members)


def groups_of(
    source: TracedNetwork, paths: Sequence[str], terms: tuple[Terms, Terms]
) -> tuple[dict[str, Group], Extent, Liveness]:
    """All units of a program that can be removed exactly, by name of their group.

    Args:
        source: The program.
        paths: The parameters.
        terms: Its operations and parameters, as functions of what is cut.

    Returns:
        The groups, where their units lie, and what is dead without any mask.
    """
    channels, count = source.channels, len(paths)
    inputs = source.body.invars[:count]
    dense = dead_of_masks(channels, [None] * count)
    axes = [
        Axis(leaf, axis, of)
        for leaf, var in enumerate(inputs)
        for axis, of in enumerate(channels.classes_at(var))
        if leaf not in dense.unread and (of != channels.classes.pinned).any()
    ]
    chosen, kind = _alike(channels, axes)
    units = _removed_alone(channels, inputs, chosen, kind, dense)
    stays = units & ~dense.removed[chosen]
    extent = Extent(channels, axes, chosen[stays], dense.removed)
    kind, levels = kind[stays], _levels(source)
    flops, params = (of.saved_by(extent.closure, dense.removed) for of in terms)
    level = lambda units: int(levels[extent.chosen[units]].min())
    kinds = sorted((np.flatnonzero(kind == k) for k in np.unique(kind)), key=level)
    groups: dict[str, Group] = {}
    for of_kind in kinds:
        lies = [axes[i] for i in extent.axes_of(of_kind[0])]
        name = _unique(_name([(paths[a.leaf], a.axis) for a in lies]), groups)
        groups[name] = Group(
            name, len(of_kind), level(of_kind), flops[of_kind], params[of_kind],
            extent.chosen[of_kind], functools.partial(extent.members, of_kind, paths),
        )  # fmt: skip
    return groups, extent, dense


def _removed_alone(
    channels: Channels,
    inputs: Sequence[Var],
    chosen: Array,
    kind: Array,
    dense: Liveness,
) -> Array:
    """`[chosen]`: whether a class is removed when its parameters are masked.

    A constant, or a state, may write the channel too. Every second class of a kind is
    masked at once, then the others: what else is masked can only remove more.
    """
    removed = np.zeros(len(chosen), bool)
    second = _number_in_kind(kind) % 2
    for part in (0, 1):
        mine = second == part
        gone = np.zeros(channels.classes.count, bool)
        gone[chosen[mine]] = True
        masks = masks_without(channels, inputs, gone, dense)
        removed[mine] = dead_of_masks(channels, masks).removed[chosen[mine]]
    return removed


def _number_in_kind(kind: Array) -> Array:
    """For each class its number among those of its kind."""
    order = np.argsort(kind, kind="stable")
    starts = np.searchsorted(kind[order], kind[order])
    number = np.empty(len(kind), int)
    number[order] = np.arange(len(kind)) - starts
    return number


def masks_without(
    channels: Channels, inputs: Sequence[Var], gone: Array, dense: Liveness
) -> list[Array]:
    """For each parameter the mask that switches some classes off.

    Args:
        channels: The program.
        inputs: The variables of the parameters.
        gone: `[classes]`, what goes; what goes with it is added.
        dense: What is dead without a mask: it keeps its entries.
    """
    gone = channels.classes.close(gone) & ~dense.removed
    nothing = np.zeros_like(gone)
    return [
        channels.stays(var, nothing if leaf in dense.unread else gone)
        for leaf, var in enumerate(inputs)
    ]


def _alike(channels: Channels, axes: Sequence[Axis]) -> tuple[Array, Array]:
    """Classes that may be units, and for each a number of the axes that it lies in.

    Axes get random numbers; a class has the sum of those that it lies in, directly and
    as a factor of products, with a weight for which factor it is.
    """
    classes, draw = channels.classes, np.random.default_rng(0)
    number = lambda: draw.integers(1, 2**63, dtype=np.uint64)
    sign = np.zeros(classes.count, np.uint64)
    for axis in axes:
        np.add.at(sign, axis.of, number())
    flat, factors = classes.of[classes.flat], classes.of[classes.factors]
    through = sign.copy()
    for column in factors.T:
        np.add.at(through, column, sign[flat] * (number() | np.uint64(1)))
    chosen = np.flatnonzero(classes.atoms() & ~_whole(classes, axes))
    reach = closures(classes, chosen)
    deep = reach.astype(np.uint64) @ sign
    met = deep != 0
    keys = np.stack([through[chosen], deep], 1)[met]
    _, kind = np.unique(keys, axis=0, return_inverse=True)
    return chosen[met], kind.reshape(-1)


def _whole(classes: Classes, axes: Sequence[Axis]) -> Array:
    """Classes that are all of an axis: without them nothing would be left of it."""
    whole = np.zeros(classes.count, bool)
    for axis in axes:
        if (axis.of == axis.of[0]).all():
            whole[axis.of[0]] = True
    return whole


def _name(ends: list[tuple[str, int]]) -> tuple[str, int]:
    """The parameter that writes the units, by its last axis, and the axis."""
    path, axis = max(ends, key=lambda end: end[1])
    layer, _, last = path.rpartition("/")
    return (layer if layer and last in _USUAL else path), axis


def _unique(named: tuple[str, int], taken: Collection[str]) -> str:
    """A name that no group has: with its axis, then with a number."""
    name, axis = named
    tries = itertools.chain(
        [name, f"{name}[{axis}]"], (f"{name}[{axis}]#{i}" for i in itertools.count(2))
    )
    return next(t for t in tries if t not in taken)


def _levels(source: TracedNetwork) -> Array:
    """`[classes]`: the number of contractions before a class is first met."""
    channels, depth = source.channels, {}
    found = np.full(channels.classes.count, np.iinfo(np.int32).max)
    for equation in source.body.walk():
        is_product = equation.name in CONTRACTIONS or equation.name == "gather"
        level = max((depth.get(v, 0) for v in equation.reads), default=0) + is_product
        for var in equation.eqn.outvars:
            depth[var] = level
            if is_product and not equation.bodies:
                for of in channels.classes_at(var):
                    np.minimum.at(found, of, level)
    flat = channels.classes.of[channels.classes.flat]
    for column in channels.classes.of[channels.classes.factors].T:
        np.minimum.at(found, column, found[flat])
    return np.where(found == np.iinfo(np.int32).max, 0, found)  # met by none
