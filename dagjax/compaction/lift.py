"""Pruning level by level: what is kept is refitted to what the dense network did.

The program of the network is walked once, dense and pruned values side by side; where
products with parameters meet in a sum (a layer before its activation, the end of a
residual branch with its stream) their kept weights are solved for by least squares on
the pruned features that are there already. The product that reads is refitted, not the
one that writes: its output is linear in its weights whatever activation came before, so
no layers need be known, and nothing before the sum is evaluated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from dagjax.compaction import cost_model
from dagjax.compaction.channels import CompactionError
from dagjax.compaction.compact import mask_leaves
from dagjax.compaction.evaluate import bind, bind_whole
from dagjax.compaction.labels import Array
from dagjax.compaction.program import CALLS, Body, is_literal
from dagjax.compaction.prune import prune_units
from dagjax.compaction.source import Source, shape_of, source_of
from dagjax.compaction.units import units
from dagjax.graph.tracing.naming import path_of

_CONTRACTIONS = ("dot_general", "conv_general_dilated")
_SUMS = {"add": 1, "add_any": 1, "sub": -1}  # the sign of the second operand
_SCALES = {"mul": (1, 0), "div": (1,)}  # which operand may be the factor
_MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "convert_element_type")
_HELD = ("scan", "while", "cond")  # evaluated as they are
_ROWS = 2**17  # of more rows of features only some are taken
_CHUNK = 2**24  # entries of the features that are made at a time


class Fit(NamedTuple):
    """One sum of the network.

    Args:
        name: The parameters that were refitted.
        level: The number of products on the way to it.
        before: `|dense - pruned| / |dense|` on the data, the kept channels alone.
        after: The same after the refit.
    """

    name: str
    level: int
    before: float
    after: float


class Report(NamedTuple):
    """What became of every sum, in the order of evaluation.

    Args:
        fits: One for each sum.
        evaluations: How many steps of the program were evaluated.
    """

    fits: tuple[Fit, ...]
    evaluations: int

    def __str__(self) -> str:
        wide = max([len(fit.name) for fit in self.fits] + [4])
        lines = [f"{'node':{wide}}  level  error before  after"]
        lines += [
            f"{f.name:{wide}}  {f.level:5}  {f.before:12.4f}  {f.after:.4f}"
            for f in self.fits
        ]
        return "\n".join(lines)


class LiftPruned(NamedTuple):
    """A pruned network of the old shapes.

    Args:
        net: The network with refitted parameters, zero where the mask is False.
        mask: Bools like `net.params`; `dj.compact(net, mask)` cuts it out.
        report: The error of every node before and after.
    """

    net: Any
    mask: Any
    report: Report


def lift_prune(
    net: Any,
    data: Any,
    budget: float | Mapping[str, float],
    score: Any = "l2",
    refit: bool = True,
    *,
    ridge: float = 3e-3,
    scope: str = "global",
    round_to: int = 1,
    keep_at_least: int = 1,
    only: Iterable[str] | Callable[[str], bool] | None = None,
) -> LiftPruned:
    """Prune units and refit, level by level, what is kept.

        min_W |h_v^dense(x) - sum_kept f_e^W(h_u^pruned(x))|^2 + ridge |W - W_0|^2

    for every node v, in the order of levels. (Ours: LIFT-PRUNE; the least squares of
    He et al. 2017 and ThiNet, Luo et al. 2017, node by node on any graph.)

    Args:
        net: A DAG, built or traced, or a compacted network.
        data: `[B, ...]` or a tuple of inputs, a calibration batch of some hundred to
            some thousand examples.
        budget: The share of operations to keep, or `{"flops" | "params" | "density":
            share}`.
        score: As for `dj.prune_units`, or "energy" (of a unit on the data).
        refit: Whether to refit; without, errors are reported only.
        ridge: Relative to the mean square of the features.
        scope: As for `dj.prune_units`.
        round_to: Likewise.
        keep_at_least: Likewise.
        only: Likewise.

    Returns:
        LiftPruned: the network, its mask and a report.

    Raises:
        CompactionError: If the budget cannot be met.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> found = lift_prune(dag, x, {"density": 0.5})
        >>> fit = found.report.fits[-1]  # four units do what eight did
        >>> fit.name, fit.before > 0.1, fit.after < fit.before / 10
        ('Dense_1', True, True)
    """
    share = dict(budget) if isinstance(budget, Mapping) else {"flops": budget}
    if unknown := {*share} - {"flops", "params", "density"}:
        raise CompactionError(f"no budget {min(unknown)!r}: flops, params or density")
    scores = (
        energy(net, data) if isinstance(score, str) and score == "energy" else score
    )
    mask = prune_units(
        net, scores, density=share.get("density"), flops=share.get("flops"),
        params=share.get("params"), scope=scope, round_to=round_to,
        keep_at_least=keep_at_least, only=only,
    )  # fmt: skip
    return refit_kept(net, mask, data, ridge=ridge if refit else None)


def refit_kept(
    net: Any, mask: Any, data: Any, *, ridge: float | None = 3e-3
) -> LiftPruned:
    """Refit what any mask of the parameters keeps to the dense network, on data.

    A parameter is refitted if a product or a convolution, and nothing else, reads it; a
    vector that is added to the result (a bias, the running mean of a batch norm) takes
    up the intercept. The error of no node grows. Where there are more than 131,072 rows
    (pixels of all images) the fit is to every n-th of them.

    Args:
        net: A DAG, or a compacted network.
        mask: Bools like `net.params`, of units or of single weights; None keeps.
        data: `[B, ...]` or a tuple of inputs.
        ridge: Relative to the mean square of the features; None: refit nothing.

    Raises:
        CompactionError: If the mask does not fit, or the ridge is not positive.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> mask = jax.tree.map(lambda w: abs(w) >= 0.3 * abs(w).max(), dag.params)
        >>> found = refit_kept(dag, mask, x)  # single weights
        >>> all(fit.after <= fit.before for fit in found.report.fits)
        True
        >>> kernel = found.net.params["Dense_1"]["kernel"]
        >>> bool(jnp.all(kernel[~mask["Dense_1"]["kernel"]] == 0))
        True
    """
    if ridge is not None and not ridge > 0:
        raise CompactionError(f"ridge is a positive number, got {ridge}")
    source, xs = _opened(net, data)
    flat = mask_leaves(net, mask)
    leaves, tree = jax.tree.flatten((net.params, net.state))
    walk = _Walk(source, leaves, flat, xs)
    fits = [walk.at(place, ridge) for place in range(len(walk.steps))]
    params, state = tree.unflatten(walk.leaves)
    named = jax.tree_util.tree_leaves_with_path(net.params)
    names = [path_of(path).removesuffix("/kernel") for path, _ in named]
    report = tuple(
        Fit("+".join(names[i] for i in fit[0]), *fit[1:]) for fit in fits if fit
    )
    full = [
        jnp.ones(np.shape(x), bool) if m is None else jnp.asarray(m)
        for m, x in zip(flat, leaves, strict=False)
    ]
    return LiftPruned(
        net.replace(params=params, state=state),
        jax.tree.structure(net.params).unflatten(full),
        Report(report, walk.evaluations),
    )


def energy(net: Any, data: Any) -> dict[str, Array]:
    """`{group: [units]}`: what a unit adds to those that read it.

        s_k = sqrt(sum over readers of E[x_k^2] |W_k|^2)

    over its mean in the group; for `dj.prune_units`.

    Args:
        net: A DAG, or a compacted network.
        data: `[B, ...]` or a tuple of inputs.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> energy(dag, x)["Dense"].shape
        (8,)
    """
    found = units(net)
    source, xs = _opened(net, data)
    total = np.zeros(found.source.channels.classes.count)
    ours = [*_inlined(found.source.body, {}, {})]  # the same program at another batch
    leaves = jax.tree.leaves((net.params, net.state))
    walk = _Walk(source, leaves, [None] * len(leaves), xs)
    for place, eqn in enumerate(walk.steps):
        if eqn.primitive.name in _CONTRACTIONS:
            for side in walk.sides(eqn):
                _add_energy(total, found, ours[place], side, walk.operands(place))
        walk.at(place, None)
    raw = np.sqrt(cost_model.spread(found.source.channels, total))
    scores = {name: raw[group.classes] for name, group in found.channels.items()}
    return {name: s / (s.mean() or 1) for name, s in scores.items()}


def _add_energy(total: Array, found: Any, eqn: Any, side: int, values: Any) -> None:
    """Add the energies of what one product reads to those of their classes."""
    square = lambda x: np.square(np.asarray(x, np.float64))
    across = lambda x, axis: tuple(d for d in range(x.ndim) if d != axis)
    x, kernel = square(values[1 - side]), square(values[side])
    for axis, own in _summed(eqn, side):
        if x.shape[axis] == kernel.shape[own]:
            of = found.source.channels.classes_at(eqn.invars[1 - side])[axis]
            weight = kernel.sum(across(kernel, own))
            np.add.at(total, of, x.mean(across(x, axis)) * weight)
    total[found.source.channels.classes.pinned] = 0


def _summed(eqn: Any, side: int) -> list[tuple[int, int]]:
    """Pairs of contracted axes: of the features and of the kernel."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        contracted = numbers[0]
        return [*zip(contracted[1 - side], contracted[side], strict=True)]
    return [(numbers.lhs_spec[1], numbers.rhs_spec[1])]


def _opened(net: Any, data: Any) -> tuple[Source, list[Any]]:
    """The program at the shapes of the data, and the data."""
    inputs = data if isinstance(data, tuple) else (data,)
    inputs = jax.tree.map(jnp.asarray, inputs)
    return source_of(net, jax.tree.map(shape_of, inputs)), jax.tree.leaves(inputs)


# --- the program ----------------------------------------------------------------------


def _inlined(body: Body, names: dict[Any, Any], consts: dict[Any, Any]) -> Any:
    """Equations in order, those of calls with derivative rules among them."""
    here = lambda atom: atom if is_literal(atom) else names.get(atom, atom)
    consts |= body.consts
    for step in body.steps:
        operands = [here(atom) for atom in step.eqn.invars]
        if step.name in CALLS:
            inner = step.bodies[0]
            names |= dict(zip(inner.invars, operands, strict=True))
            yield from _inlined(inner, names, consts)
            results = [here(atom) for atom in inner.outvars]
            names |= dict(zip(step.eqn.outvars, results, strict=True))
        else:
            yield step.eqn.replace(invars=operands)


class _Term(NamedTuple):
    """A product in a sum: `sign * scale * (features @ leaf[where])`.

    Args:
        place: Of its equation.
        side: Which operand is the kernel.
        leaf: The parameter.
        where: `[G, K, M]`, flat places in it.
        sign: 1 or -1.
        factors: Pairs of a value, one number for each column, and its power.
    """

    place: int
    side: int
    leaf: int
    where: Array
    sign: int
    factors: tuple[tuple[Any, int], ...]


class _Sum(NamedTuple):
    """A sum: its products, and vectors that are added.

    Args:
        places: The equations to evaluate again when its parameters have changed.
        terms: Its products; one, or all of one group each.
        rows: The axes of its value along which rows of features lie.
        columns: The others.
        shifts: `(leaf, [columns] places in it, sign, factors)`.
    """

    places: tuple[int, ...]
    terms: tuple[_Term, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shifts: tuple[tuple[int, Array, int, Any], ...]


class _Sums:
    """Finds the sums of a program."""

    def __init__(
        self, steps: list[Any], invars: Any, outvars: Any, consts: Any, trained: int
    ):
        self.steps, self.trained = steps, trained
        self.leaf = {v: i for i, v in enumerate(invars)}
        self.maker = {v: i for i, e in enumerate(steps) for v in e.outvars}
        self.readers: dict[Any, list[int]] = {}
        for place, eqn in enumerate(steps):
            for atom in eqn.invars:
                if not is_literal(atom):
                    self.readers.setdefault(atom, []).append(place)
        for atom in outvars:
            if not is_literal(atom):
                self.readers.setdefault(atom, []).append(len(steps))
        self.fixed = {*invars, *consts}  # what does not depend on the data
        for eqn in steps:
            if all(v in self.fixed for v in _reads(eqn)):
                self.fixed.update(eqn.outvars)

    def all(self) -> dict[int, _Sum]:
        """`{place of the last equation: sum}`."""
        found: dict[int, Any] = {}
        for place, eqn in enumerate(self.steps):
            if sides := self.sides(eqn):
                layout = _layout(eqn, sides[0])
                found.setdefault(self._end(place, layout[0]), layout)
        return {end: self._sum(end, *layout) for end, layout in found.items()}

    def sides(self, eqn: Any) -> list[int]:
        """Which operand of a product is a parameter, if one is."""
        name = eqn.primitive.name
        if name not in _CONTRACTIONS:
            return []
        sides = (0, 1) if name == "dot_general" else (1,)
        found = [i for i in sides if self._chain(eqn.invars[i], self.trained)]
        plain = name == "dot_general" or eqn.params["batch_group_count"] == 1
        return found if len(found) == 1 and plain else []

    def _once(self, atom: Any) -> bool:
        return len(self.readers.get(atom, ())) == 1

    def _end(self, place: int, rows: Any) -> int:
        """Where the sum ends that a product is in."""
        var = self.steps[place].outvars[0]
        while self._once(var) and (after := self.readers[var][0]) < len(self.steps):
            eqn = self.steps[after]
            adds = eqn.primitive.name in _SUMS
            factor = self._factor(eqn, rows)
            if eqn.outvars[0].aval != var.aval or not (adds or factor is not None):
                break
            place, var = after, eqn.outvars[0]
        return place

    def _factor(self, eqn: Any, rows: Any) -> int | None:
        """Which operand is one number for each column, that depends on no data."""
        for side in _SCALES.get(eqn.primitive.name, ()):
            atom = eqn.invars[side]
            shape = atom.aval.shape
            alike = not shape or all(shape[d] == 1 for d in rows)
            if alike and (is_literal(atom) or atom in self.fixed):
                return side
        return None

    def _chain(self, atom: Any, count: int, more: tuple[str, ...] = ()) -> Any:
        """`(leaf, places)` if an operand is a leaf that is moved and read once."""
        places: list[int] = []
        while not is_literal(atom) and self._once(atom):
            if atom in self.leaf:
                return (self.leaf[atom], places) if self.leaf[atom] < count else None
            place = self.maker.get(atom)
            if place is None or self.steps[place].primitive.name not in _MOVES + more:
                return None
            places.insert(0, place)
            atom = self.steps[place].invars[0]
        return None

    def _where(self, leaf: Any, places: list[int]) -> Array:
        """For each entry of the operand its flat place in the leaf."""
        found = np.arange(leaf.size).reshape(leaf.shape)
        for eqn in (self.steps[place] for place in places):
            if eqn.primitive.name == "transpose":
                found = found.transpose(eqn.params["permutation"])
            elif eqn.primitive.name == "broadcast_in_dim":
                axes = eqn.params["broadcast_dimensions"]
                shape = [1] * len(eqn.params["shape"])
                for axis, size in zip(axes, found.shape, strict=True):
                    shape[axis] = size
                found = np.broadcast_to(found.reshape(shape), eqn.params["shape"])
            else:
                found = found.reshape(eqn.outvars[0].aval.shape)
        return found

    def _sum(self, end: int, rows: Any, columns: Any) -> _Sum:
        """The sum that ends here: from its end back through additions."""
        var = self.steps[end].outvars[0]
        places, terms, shifts, open_ = [], [], [], [(var, 1, ())]
        while open_:
            atom, sign, factors = open_.pop()
            place = None if is_literal(atom) else self.maker.get(atom)
            inner = atom is var or (self._once(atom) and atom.aval == var.aval)
            if place is not None and inner:
                eqn = self.steps[place]
                more = self._operands(eqn, sign, factors, rows)
                if more or self.sides(eqn):
                    places.append(place)
                    open_ += more
                    terms += [] if more else [(place, sign, factors)]
                    continue
            chain = self._chain(atom, len(self.leaf), ("broadcast_in_dim",))
            if chain is not None:
                shifts.append((*chain, sign, factors))
        kept, moved = self._terms(sorted(terms, key=lambda t: t[0]), rows, columns)
        added, more = self._shifts(shifts, var.aval.shape, rows, columns)
        whole = tuple(sorted({*places, *moved, *more}))
        return _Sum(whole, kept, rows, columns, added)

    def _operands(self, eqn: Any, sign: int, factors: Any, rows: Any) -> list[Any]:
        """The summands of an addition, or what is scaled."""
        if (second := _SUMS.get(eqn.primitive.name)) is not None:
            one, two = eqn.invars
            return [(one, sign, factors), (two, sign * second, factors)]
        side = self._factor(eqn, rows)
        if side is None:
            return []
        power = 1 if eqn.primitive.name == "mul" else -1
        return [(eqn.invars[1 - side], sign, (*factors, (eqn.invars[side], power)))]

    def _terms(self, terms: Any, rows: Any, columns: Any) -> tuple[Any, set[int]]:
        """The products of one layout; one with several groups stands alone."""
        found, places = [], set()
        for place, sign, factors in terms:
            eqn = self.steps[place]
            (side,) = self.sides(eqn)
            leaf, moved = self._chain(eqn.invars[side], self.trained)
            kernel = _as_kernel(eqn, side, self._where(self._aval(leaf), moved))
            alone = len(kernel) > 1
            if _layout(eqn, side) == (rows, columns) and not (alone and found):
                found.append(_Term(place, side, leaf, kernel, sign, factors))
                places.update(moved)
                if alone:
                    break
        return (*found,), places

    def _shifts(self, shifts: Any, shape: Any, rows: Any, columns: Any) -> Any:
        """The vectors that are added, the last one first, and what makes them."""
        found, places = [], set()
        for leaf, moved, sign, factors in sorted(shifts, key=lambda s: len(s[3])):
            where = np.broadcast_to(self._where(self._aval(leaf), moved), shape)
            where = where.transpose(rows + columns)
            thin = zip(where.strides, where.shape, rows, strict=False)
            if all(stride == 0 or size == 1 for stride, size, _ in thin):
                vector = where[(0,) * len(rows)].ravel()
                found.append((leaf, vector, sign, factors))
                places.update(moved)
        return (*found,), places

    def _aval(self, leaf: int) -> Any:
        return [*self.leaf][leaf].aval


def _layout(eqn: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axes of a product are rows of features, which are columns."""
    numbers, rank = eqn.params["dimension_numbers"], len(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "conv_general_dilated":
        batch, features, *space = numbers.out_spec
        return (batch, *space), (features,)
    own, other = eqn.invars[side].aval.shape, eqn.invars[1 - side].aval.shape
    batch, _, free = _axes(eqn, side, len(own))
    first = len(batch) + (len(free) if side == 0 else 0)
    last = first + len(_axes(eqn, 1 - side, len(other))[2])
    return tuple(range(first, last)), (*range(first), *range(last, rank))


def _as_kernel(eqn: Any, side: int, kernel: Array) -> Array:
    """A kernel as `[G, K, M]`."""
    if eqn.primitive.name == "dot_general":
        batch, summed, free = _axes(eqn, side, kernel.ndim)
        groups, outs = (_size(kernel, axes) for axes in (batch, free))
        return kernel.transpose(batch + summed + free).reshape(groups, -1, outs)
    out, inner, *window = eqn.params["dimension_numbers"].rhs_spec
    groups = eqn.params["feature_group_count"]
    moved = kernel.transpose(*window, inner, out)
    moved = moved.reshape(-1, groups, kernel.shape[out] // groups)
    return moved.transpose(1, 0, 2)


def _size(x: Any, axes: Iterable[int]) -> int:
    return math.prod(x.shape[d] for d in axes)


def _axes(eqn: Any, side: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of an operand of a product: batch axes, contracted axes, free axes."""
    contracted, batch = (tuple(axes[side]) for axes in eqn.params["dimension_numbers"])
    taken = {*contracted, *batch}
    return batch, contracted, tuple(d for d in range(rank) if d not in taken)


def _features(eqn: Any, side: int, x: Any, every: int = 1) -> Any:
    """`[R, G, K]`: what a product is linear in; of its rows every n-th."""
    if eqn.primitive.name == "dot_general":
        batch, summed, free = _axes(eqn, 1 - side, x.ndim)
        moved = x.transpose(free + batch + summed)
        return moved.reshape([_size(x, axes) for axes in (free, batch, summed)])[
            ::every
        ]
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    x = _padded(x.transpose(batch, *space, features), p["padding"], p["lhs_dilation"])
    window = [eqn.invars[1].aval.shape[d] for d in numbers.rhs_spec[2:]]
    sizes = [eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:]]
    parts = []
    for place in np.ndindex(*window):
        axes = zip(place, p["rhs_dilation"], p["window_strides"], sizes, strict=True)
        spots = [slice(i * d, i * d + (n - 1) * s + 1, s) for i, d, s, n in axes]
        parts.append(x[(slice(None), *spots)].reshape(-1, x.shape[-1])[::every])
    groups = p["feature_group_count"]
    many = _home(x).stack(parts, -2)
    many = many.reshape(-1, len(parts), groups, x.shape[-1] // groups)
    return many.transpose(0, 2, 1, 3).reshape(len(many), groups, -1)


def _padded(x: Any, padding: Any, dilation: Any) -> Any:
    """`[B, ..., C]` with its border, and zeros between entries."""
    edges = [(*ends, d - 1) for ends, d in zip(padding, dilation, strict=True)]
    if not any(n for edge in edges for n in edge):
        return x
    wide = jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return _local(wide) if isinstance(x, np.ndarray) else wide


def _local(x: Any) -> Any:
    """On the CPU an array of numpy, without a copy: nothing is compiled then."""
    return np.asarray(x) if jax.default_backend() == "cpu" else x


def _home(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


# --- the walk -------------------------------------------------------------------------


class _Walk:
    """Dense and pruned values of a program, step by step; every value is made once.

    A sum that is refitted is made a second time, of features that are there.
    """

    def __init__(self, source: Source, leaves: Any, masks: Any, xs: Any):
        names, consts, body = {}, {}, source.body
        self.steps = [*_inlined(body, names, consts)]
        ends = [a if is_literal(a) else names.get(a, a) for a in body.outvars]
        self.invars = body.invars[: len(leaves)]
        sums = _Sums(self.steps, self.invars, ends, consts, len(masks))
        self.sides, self.sums = sums.sides, sums.all()
        self.masks = [*masks, *[None] * (len(leaves) - len(masks))]
        self.leaves = [*map(_masked, self.masks, leaves)]
        given = dict(zip(body.invars[len(leaves) :], xs, strict=True)) | consts
        self.dense = given | dict(zip(self.invars, leaves, strict=True))
        self.pruned = given | dict(zip(self.invars, self.leaves, strict=True))
        self.levels: dict[Any, int] = {}
        self.evaluations, self.last = 0, self._lifetimes()

    def _lifetimes(self) -> dict[int, list[Any]]:
        """`{place: values that nothing reads afterwards}`."""
        last: dict[Any, int] = {}
        for place, eqn in enumerate(self.steps):
            last |= {v: place for v in [*_reads(eqn), *eqn.outvars]}
        for end, found in self.sums.items():
            for v in (v for place in found.places for v in _reads(self.steps[place])):
                last[v] = max(last[v], end)
        kept, ends = {*self.invars}, {}
        for v, place in last.items():
            if v not in kept:
                ends.setdefault(place, []).append(v)
        return ends

    def at(self, place: int, ridge: float | None) -> Any:
        """Evaluate a step; `(leaves, level, before, after)` where a sum is done."""
        eqn = self.steps[place]
        heavy = eqn.primitive.name in _CONTRACTIONS
        level = max([self.levels.get(v, 0) for v in _reads(eqn)], default=0) + heavy
        self.levels |= dict.fromkeys(eqn.outvars, level)
        self._make(eqn, self.dense)
        if all(self.dense[v] is self.pruned[v] for v in _reads(eqn)):
            self.pruned |= {v: self.dense[v] for v in eqn.outvars}
        else:
            self._make(eqn, self.pruned)
        found = None
        if place in self.sums:
            leaves = tuple(term.leaf for term in self.sums[place].terms)
            found = (leaves, level, *self._fit(place, ridge))
        for v in self.last.get(place, ()):
            self.dense.pop(v, None)
            self.pruned.pop(v, None)
        return found

    def operands(self, place: int) -> list[Any]:
        """The pruned values that a step reads."""
        return _operands(self.steps[place], self.pruned)

    def _make(self, eqn: Any, env: dict[Any, Any]) -> None:
        self.evaluations += 1
        values = _operands(eqn, env)
        many = eqn.primitive.multiple_results
        whole = eqn.primitive.name in _HELD
        made = bind_whole(eqn, *values) if whole else bind(eqn, values)
        env |= dict(zip(eqn.outvars, made if many else [made], strict=True))

    # --- one sum ---------------------------------------------------------------------

    def _fit(self, end: int, ridge: float | None) -> tuple[float, float]:
        """The error of a sum before and after its refit, which never makes it worse."""
        found, var = self.sums[end], self.steps[end].outvars[0]
        scales = [self._scale(var, found, t.factors) for t in found.terms]
        allowed = [
            self._allowed(t.leaf)[t.where] & _usable(scale).reshape(len(t.where), 1, -1)
            for t, scale in zip(found.terms, scales, strict=True)
        ]
        alive = np.any([a.any(1).ravel() for a in allowed], axis=0)
        before = self._error(var, found, alive)
        if ridge is None or before == 0:
            return before, before
        found = self._with_one_shift(var, found)
        for leaf, where, _, factors in found.shifts:
            scales.append(self._scale(var, found, factors))
            free = alive & self._allowed(leaf)[where] & _usable(scales[-1])
            allowed.append(free.reshape(len(allowed[0]), 1, -1))
        delta = self._solution(var, found, allowed, ridge)
        old = self._change(found, delta, scales)
        after = self._error(var, found, alive)
        if not after <= before:
            self._put(found, old)
            after = before
        return before, after

    def _with_one_shift(self, var: Any, found: _Sum) -> _Sum:
        """The vector that is kept in most columns takes up the intercept."""
        count = lambda shift: np.count_nonzero(
            self._allowed(shift[0])[shift[1]]
            & _usable(self._scale(var, found, shift[3]))
        )
        most = sorted(found.shifts, key=count, reverse=True)[:1]
        return found._replace(shifts=tuple(most))

    def _scale(self, var: Any, found: _Sum, factors: Any) -> Array:
        """`[columns]`: the product of the factors of a term."""
        shape = [var.aval.shape[d] for d in found.columns]
        scale = np.ones(shape)
        for atom, power in factors:
            x = np.asarray(atom.val if is_literal(atom) else self.pruned[atom], float)
            if x.ndim:
                x = x.transpose(found.rows + found.columns)[(0,) * len(found.rows)]
            scale = scale * (x if power > 0 else 1 / x)
        return scale.ravel()

    def _allowed(self, leaf: int) -> Array:
        mask = self.masks[leaf]
        shape = np.shape(self.leaves[leaf])
        return (np.ones(shape, bool) if mask is None else np.asarray(mask)).ravel()

    def _error(self, var: Any, found: _Sum, alive: Array) -> float:
        """`|dense - pruned| / |dense|` in the columns that are alive."""
        dense, pruned = self.dense[var], self.pruned[var]
        if dense is pruned or not alive.any():
            return 0.0
        chosen = lambda x: _rows(_local(x), found)[:, alive].ravel()
        norm = lambda x: float(_home(x).sqrt((x * x).sum()))
        return norm(chosen(dense) - chosen(pruned)) / (norm(chosen(dense)) or 1.0)

    def _solution(
        self, var: Any, found: _Sum, allowed: list[Array], ridge: float
    ) -> Array:
        """`[G, K, M]`: what to add to the kernels, the shift in the last row."""
        groups = len(allowed[0])
        error = _rows(_local(self.dense[var] - self.pruned[var]), found)
        error = error.reshape(error.shape[0], groups, -1)
        gram, cross = self._moments(found, error)
        penalty = np.ones(gram.shape[-1])
        if found.shifts:
            penalty[-1] = 0
        ridge += len(penalty) * float(jnp.finfo(error.dtype).eps)
        return _solved(gram, cross, np.concatenate(allowed, 1), penalty * ridge)

    def _moments(self, found: _Sum, error: Any) -> tuple[Array, Array]:
        """`X^T X` `[G, K, K]` and `X^T error` `[G, K, M]`, summed part by part."""
        many = self.steps[found.places[-1]].outvars[0].aval.shape
        count = many[found.rows[0]] if found.rows else 1
        width = sum(t.where.shape[0] * t.where.shape[1] for t in found.terms)
        step = max(1, _CHUNK * count // (len(error) * width))
        every = max(1, len(error) // max(_ROWS, 32 * width)) | 1  # odd: all pixels
        gram, cross = 0.0, 0.0
        for low in range(0, count, step):
            x = self._part(found, slice(low, low + step), every)
            part = slice(low * len(error) // count, (low + step) * len(error) // count)
            gram = gram + _product(x, x)
            cross = cross + _product(x, error[part][::every])
        return np.asarray(gram), np.asarray(cross)

    def _part(self, found: _Sum, part: slice, every: int) -> Any:
        """`[R, G, K]`: features of all terms for some rows, and ones for the shift."""
        parts = []
        for term in found.terms:
            eqn = self.steps[term.place]
            x = _local(self.operands(term.place)[1 - term.side])
            x = _sliced(eqn, term.side, x, part)
            parts.append(term.sign * _features(eqn, term.side, x, every))
        for shift in found.shifts:
            ones = _home(parts[0]).ones_like(parts[0][..., :1])
            parts.append(shift[2] * ones)
        return _home(parts[0]).concatenate(parts, -1)

    def _change(self, found: _Sum, delta: Array, scales: Any) -> dict[int, Any]:
        """Add to the parameters of a sum; what they were before."""
        ends = np.cumsum([term.where.shape[1] for term in found.terms])
        parts = np.split(delta, ends, axis=1)
        places = [(term.leaf, term.where) for term in found.terms]
        for leaf, where, *_ in found.shifts:
            places.append((leaf, where.reshape(parts[-1].shape)))
        old = {leaf: self.leaves[leaf] for leaf, _ in places}
        new = {leaf: np.array(x) for leaf, x in old.items()}
        for (leaf, where), more, scale in zip(places, parts, scales, strict=False):
            scale = np.where(_usable(scale), scale, 1).reshape(len(where), 1, -1)
            new[leaf].reshape(-1)[where] += (more / scale).astype(new[leaf].dtype)
        self._put(found, {leaf: jnp.asarray(x) for leaf, x in new.items()})
        return old

    def _put(self, found: _Sum, leaves: dict[int, Any]) -> None:
        """Other parameters of a sum, and its value with them."""
        for leaf, x in leaves.items():
            self.leaves[leaf] = self.pruned[self.invars[leaf]] = x
        for place in found.places:
            self._make(self.steps[place], self.pruned)


def _reads(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if not is_literal(v)]


def _operands(eqn: Any, env: dict[Any, Any]) -> list[Any]:
    return [a.val if is_literal(a) else env[a] for a in eqn.invars]


def _usable(scale: Array) -> Array:
    """Where one may divide."""
    size = np.abs(scale)
    return np.isfinite(size) & (size > 1e-6 * np.max(size, initial=0))


def _masked(mask: Any, x: Any) -> Any:
    """Zero where the mask is False; the same array where it is nowhere."""
    if mask is None or np.all(mask):
        return x
    return jnp.where(mask, x, jnp.zeros_like(x))


def _rows(x: Any, found: _Sum) -> Any:
    """`[R, columns]`: the value of a sum."""
    moved = x.transpose(found.rows + found.columns)
    return moved.reshape(_size(x, found.rows), _size(x, found.columns))


def _sliced(eqn: Any, side: int, x: Any, part: slice) -> Any:
    """Some of the features along their first free axis."""
    if eqn.primitive.name == "dot_general":
        free = _axes(eqn, 1 - side, x.ndim)[2]
    else:
        free = eqn.params["dimension_numbers"].lhs_spec[:1]
    return x[(slice(None),) * free[0] + (part,)] if free else x


def _product(x: Any, y: Any) -> Array:
    """`[G, K, L]`: sums over rows, group by group, in double precision on the host."""
    one, two = x.transpose(1, 2, 0), y.transpose(1, 0, 2)
    on_host = isinstance(x, np.ndarray)
    made = one @ two if on_host else jnp.matmul(one, two, precision="highest")
    return np.asarray(made, np.float64)


def _solved(gram: Array, cross: Array, allowed: Array, ridge: Array) -> Array:
    """`(gram + ridge) delta = cross` where allowed, columns of one pattern together.

    Args:
        gram: `[G, K, K]`.
        cross: `[G, K, M]`.
        allowed: `[G, K, M]`.
        ridge: `[K]`, relative to the mean of the diagonal.
    """
    delta = np.zeros(cross.shape)
    for g in range(len(gram)):
        patterns, of = np.unique(allowed[g].T, axis=0, return_inverse=True)
        for kind, pattern in enumerate(patterns):
            rows, columns = np.flatnonzero(pattern), np.flatnonzero(of.ravel() == kind)
            if rows.size:
                a = gram[g][np.ix_(rows, rows)]
                a = a + np.diag(ridge[rows] * (np.diag(a).mean() or 1.0))
                b = cross[g][np.ix_(rows, columns)]
                delta[g][np.ix_(rows, columns)] = _symmetric(a, b)
    return delta


def _symmetric(a: Array, b: Array) -> Array:
    """`a^-1 b`; of least norm where rounding has made `a` indefinite."""
    try:
        return linalg.cho_solve(linalg.cho_factor(a), b)
    except linalg.LinAlgError:
        return np.linalg.lstsq(a, b, rcond=None)[0]
