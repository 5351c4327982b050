"""Pruning level by level: what is kept is refitted to what the dense network did.

The program of the network is walked once, dense and pruned values side by side; where
products with parameters meet in a sum (a layer before its activation, the end of a
residual branch with its stream) their kept weights are solved for by least squares on
the pruned features that are there already. The product that reads is refitted, not the
one that writes: its output is linear in its weights whatever activation came before, so
no layers need be known, and nothing before the sum is evaluated again.
"""

from __future__ import annotations

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
_MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "convert_element_type")
_HELD = ("scan", "while", "cond")  # evaluated as they are
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
    ridge: float = 1e-4,
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
        >>> fit.name, fit.before > 0.1, fit.after < 1e-3
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
    net: Any, mask: Any, data: Any, *, ridge: float | None = 1e-4
) -> LiftPruned:
    """Refit what any mask of the parameters keeps to the dense network, on data.

    A parameter is refitted if a product or a convolution, and nothing else, reads it; a
    vector that is added to the result (a bias, the running mean of a batch norm) takes
    up the intercept. The error of no node grows.

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
        >>> mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), dag.params)
        >>> mask["Dense"]["bias"] = mask["Dense"]["bias"].at[0].set(False)
        >>> print(refit_kept(dag, mask, x).report)
        node     level  error before  after
        Dense        1        0.0000  0.0000
        Dense_1      2        0.0000  0.0000
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
    """A product in a sum: `sign * features @ leaf[where]`.

    Args:
        place: Of its equation.
        side: Which operand is the kernel.
        leaf: The parameter.
        where: `[G, K, M]`, flat places in it.
        sign: 1 or -1.
    """

    place: int
    side: int
    leaf: int
    where: Array
    sign: int


class _Sum(NamedTuple):
    """A sum: its products, and a vector that is added.

    Args:
        places: The equations to evaluate again when its parameters have changed.
        terms: Its products; one, or all of one group each.
        rows: The axes of its value along which rows of features lie.
        columns: The others.
        shift: `(leaf, [columns] places in it, sign)`, or None.
    """

    places: tuple[int, ...]
    terms: tuple[_Term, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shift: tuple[int, Array, int] | None


class _Sums:
    """Finds the sums of a program."""

    def __init__(self, steps: list[Any], invars: Any, outvars: Any, trained: int):
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

    def all(self) -> dict[int, _Sum]:
        """`{place of the last equation: sum}`."""
        ends = [self._end(i) for i, e in enumerate(self.steps) if self.sides(e)]
        found = {end: self._sum(end) for end in dict.fromkeys(ends)}
        return {end: s for end, s in found.items() if s is not None}

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

    def _end(self, place: int) -> int:
        """Where the sum ends that a product is in."""
        var = self.steps[place].outvars[0]
        while self._once(var) and (after := self.readers[var][0]) < len(self.steps):
            eqn = self.steps[after]
            if eqn.primitive.name not in _SUMS or eqn.outvars[0].aval != var.aval:
                break
            place, var = after, eqn.outvars[0]
        return place

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

    def _sum(self, end: int) -> _Sum | None:
        """The sum that ends here: from its end back through additions."""
        var = self.steps[end].outvars[0]
        places, terms, shifts, open_ = [], [], [], [(var, 1)]
        while open_:
            atom, sign = open_.pop()
            place = None if is_literal(atom) else self.maker.get(atom)
            eqn = None if place is None else self.steps[place]
            if eqn is not None and (atom is var or self._once(atom)):
                if eqn.primitive.name in _SUMS and atom.aval == var.aval:
                    places.append(place)
                    second = _SUMS[eqn.primitive.name]
                    open_ += [(eqn.invars[0], sign), (eqn.invars[1], sign * second)]
                    continue
                if (sides := self.sides(eqn)) and atom.aval == var.aval:
                    terms.append((place, sides[0], sign))
                    continue
            chain = self._chain(atom, len(self.leaf), ("broadcast_in_dim",))
            if chain is not None:
                shifts.append((*chain, sign))
        return self._assembled(var, places, sorted(terms), shifts)

    def _assembled(self, var: Any, places: Any, terms: Any, shifts: Any) -> _Sum | None:
        found, layout = [], None
        for place, side, sign in terms:
            eqn = self.steps[place]
            leaf, moved = self._chain(eqn.invars[side], self.trained)
            where = self._where(self._aval(leaf), moved)
            kernel, here = _as_kernel(eqn, side, where)
            alone = kernel.shape[0] > 1
            if layout is None or (here == layout and not alone):
                found.append(_Term(place, side, leaf, kernel, sign))
                places += [place, *moved]
                layout = here
            if alone:
                break
        if layout is None:
            return None
        rows, columns = layout
        for leaf, moved, sign in shifts:
            where = np.broadcast_to(
                self._where(self._aval(leaf), moved), var.aval.shape
            ).transpose(rows + columns)
            if all(
                where.strides[i] == 0 or where.shape[i] == 1 for i in range(len(rows))
            ):
                vector = where[(0,) * len(rows)].ravel()
                places = sorted({*places, *moved})
                return _Sum((*places,), (*found,), rows, columns, (leaf, vector, sign))
        return _Sum((*sorted({*places}),), (*found,), rows, columns, None)

    def _aval(self, leaf: int) -> Any:
        return [*self.leaf][leaf].aval


def _as_kernel(eqn: Any, side: int, kernel: Array) -> tuple[Array, Any]:
    """A kernel as `[G, K, M]`, and which axes of the product are rows, columns."""
    numbers, rank = eqn.params["dimension_numbers"], len(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        batch, summed, free = _axes(eqn, side, kernel.ndim)
        moved = kernel.transpose(batch + summed + free)
        sizes = [kernel.shape[d] for d in batch], [kernel.shape[d] for d in free]
        groups, outs = (int(np.prod(s)) for s in sizes)
        first = len(batch) + (len(free) if side == 0 else 0)
        last = first + rank - len(batch) - len(free)
        rows = tuple(range(first, last))
        columns = (*range(first), *range(last, rank))
        return moved.reshape(groups, -1, outs), (rows, columns)
    out, inner, *window = numbers.rhs_spec
    moved = kernel.transpose(*window, inner, out)
    groups = eqn.params["feature_group_count"]
    moved = moved.reshape(-1, groups, kernel.shape[out] // groups)
    batch, features, *space = numbers.out_spec
    return moved.transpose(1, 0, 2), ((batch, *space), (features,))


def _axes(eqn: Any, side: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of an operand of a product: batch axes, contracted axes, free axes."""
    contracted, batch = (tuple(axes[side]) for axes in eqn.params["dimension_numbers"])
    taken = {*contracted, *batch}
    return batch, contracted, tuple(d for d in range(rank) if d not in taken)


def _features(eqn: Any, side: int, x: Any) -> Any:
    """`[R, G, K]`: what the rows of a product are linear in."""
    if eqn.primitive.name == "dot_general":
        batch, summed, free = _axes(eqn, 1 - side, x.ndim)
        size = lambda axes: int(np.prod([x.shape[d] for d in axes]))
        moved = x.transpose(free + batch + summed)
        return moved.reshape(size(free), size(batch), size(summed))
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    x = x.transpose(batch, *space, features)
    edges = [
        (low, high, d - 1)
        for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)
    ]
    zero = jnp.zeros((), x.dtype)
    x = jax.lax.pad(x, zero, [(0, 0, 0), *edges, (0, 0, 0)])
    sizes = [eqn.invars[1].aval.shape[d] for d in numbers.rhs_spec[2:]]
    ends = [eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:]]
    steps, groups = (1, *p["window_strides"], 1), p["feature_group_count"]
    parts = []
    for place in np.ndindex(*sizes):
        low = [i * d for i, d in zip(place, p["rhs_dilation"], strict=True)]
        high = [
            a + (n - 1) * s + 1 for a, n, s in zip(low, ends, steps[1:], strict=False)
        ]
        shape = (0, *low, 0), (x.shape[0], *high, x.shape[-1])
        parts.append(jax.lax.slice(x, *shape, steps))
    many = jnp.stack(parts, -2).reshape(-1, len(parts), groups, x.shape[-1] // groups)
    return many.transpose(0, 2, 1, 3).reshape(many.shape[0], groups, -1)


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
        sums = _Sums(self.steps, self.invars, ends, len(masks))
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
        allowed = [self._allowed(term.leaf)[term.where] for term in found.terms]
        alive = np.any([a.any(1).ravel() for a in allowed], axis=0)
        before = self._error(var, found, alive)
        if ridge is None or before == 0:
            return before, before
        delta = self._solution(var, found, allowed, alive, ridge)
        old = self._change(found, delta)
        after = self._error(var, found, alive)
        if not after <= before:
            self._put(found, old)
            after = before
        return before, after

    def _allowed(self, leaf: int) -> Array:
        mask = self.masks[leaf]
        shape = np.shape(self.leaves[leaf])
        return (np.ones(shape, bool) if mask is None else np.asarray(mask)).ravel()

    def _error(self, var: Any, found: _Sum, alive: Array) -> float:
        """`|dense - pruned| / |dense|` in the columns that are alive."""
        dense, pruned = self.dense[var], self.pruned[var]
        if dense is pruned or not alive.any():
            return 0.0
        norm = lambda x: float(jnp.linalg.norm(_rows(x, found)[:, alive].ravel()))
        return norm(dense - pruned) / (norm(dense) or 1.0)

    def _solution(
        self, var: Any, found: _Sum, allowed: list[Array], alive: Array, ridge: float
    ) -> Array:
        """`[G, K, M]`: what to add to the kernels, the shift in the last row."""
        groups = allowed[0].shape[0]
        error = _rows(self.dense[var] - self.pruned[var], found)
        error = error.reshape(error.shape[0], groups, -1)
        gram, cross = self._moments(found, error)
        penalty = np.ones(gram.shape[-1])
        if found.shift is not None:
            free = alive & self._allowed(found.shift[0])[found.shift[1]]
            allowed = [*allowed, free.reshape(groups, 1, -1)]
            penalty[-1] = 0
        ridge += len(penalty) * float(jnp.finfo(error.dtype).eps)
        return _solved(gram, cross, np.concatenate(allowed, 1), penalty * ridge)

    def _moments(self, found: _Sum, error: Any) -> tuple[Array, Array]:
        """`X^T X` `[G, K, K]` and `X^T error` `[G, K, M]`, summed part by part."""
        many = self.steps[found.places[-1]].outvars[0].aval.shape
        count = many[found.rows[0]] if found.rows else 1
        width = sum(t.where.shape[0] * t.where.shape[1] for t in found.terms)
        step = max(1, _CHUNK * count // (len(error) * width))
        gram, cross = 0.0, 0.0
        for low in range(0, count, step):
            x = self._part(found, slice(low, low + step))
            part = slice(low * len(error) // count, (low + step) * len(error) // count)
            gram = gram + _product(x, x)
            cross = cross + _product(x, error[part])
        return np.asarray(gram), np.asarray(cross)

    def _part(self, found: _Sum, part: slice) -> Any:
        """`[R, G, K]`: features of all terms for some rows, and ones for the shift."""
        parts = []
        for term in found.terms:
            eqn = self.steps[term.place]
            x = self.operands(term.place)[1 - term.side]
            x = _sliced(eqn, term.side, x, part)
            parts.append(term.sign * _features(eqn, term.side, x))
        if found.shift is not None:
            parts.append(jnp.full_like(parts[0][..., :1], found.shift[2]))
        return jnp.concatenate(parts, -1)

    def _change(self, found: _Sum, delta: Array) -> dict[int, Any]:
        """Add to the parameters of a sum; what they were before."""
        ends = np.cumsum([term.where.shape[1] for term in found.terms])
        parts = np.split(delta, ends, axis=1)
        places = [(term.leaf, term.where) for term in found.terms]
        if found.shift is not None:
            places.append((found.shift[0], found.shift[1].reshape(parts[-1].shape)))
        old = {leaf: self.leaves[leaf] for leaf, _ in places}
        new = {leaf: np.array(x) for leaf, x in old.items()}
        for (leaf, where), more in zip(places, parts, strict=False):
            new[leaf].reshape(-1)[where] += more.astype(new[leaf].dtype)
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


def _masked(mask: Any, x: Any) -> Any:
    """Zero where the mask is False; the same array where it is nowhere."""
    if mask is None or np.all(mask):
        return x
    return jnp.where(mask, x, jnp.zeros_like(x))


def _rows(x: Any, found: _Sum) -> Any:
    """`[R, columns]`: the value of a sum."""
    count = int(np.prod([x.shape[d] for d in found.rows]))
    return x.transpose(found.rows + found.columns).reshape(count, -1)


def _sliced(eqn: Any, side: int, x: Any, part: slice) -> Any:
    """Some of the features along their first free axis."""
    if eqn.primitive.name == "dot_general":
        free = _axes(eqn, 1 - side, x.ndim)[2]
    else:
        free = eqn.params["dimension_numbers"].lhs_spec[:1]
    return x[(slice(None),) * free[0] + (part,)] if free else x


def _product(x: Any, y: Any) -> Array:
    """`[G, K, L]`: sums over rows, group by group, in double precision on the host."""
    made = jnp.einsum("rgk,rgl->gkl", x, y, precision="highest")
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
