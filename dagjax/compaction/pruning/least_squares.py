"""One walk over a program, dense and pruned values side by side, sums refitted."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.traced_network import TracedNetwork
from dagjax.compaction.pruning.features import axes_of, features, local, namespace, size
from dagjax.compaction.pruning.sums import CONTRACTIONS, Sum, Sums, inlined, reads
from dagjax.jaxprs.interpret import bind
from dagjax.jaxprs.program import is_literal
from dagjax.jaxprs.versions import Atom, Eqn, Var
from dagjax.types import Mask, PyTree

_HELD = ("scan", "while", "cond")  # evaluated as they are
ROWS = 2**17  # of more rows of features only some are taken
CHUNK = 2**24  # entries of the features that are made at a time


class Walk:
    """Dense and pruned values of a program, step by step; every value is made once.

    A sum that is refitted is made a second time, of features that are there.
    """

    def __init__(
        self,
        source: TracedNetwork,
        leaves: list[jax.Array],
        masks: list[Mask],
        xs: list[jax.Array],
    ):
        names, consts, body = {}, {}, source.body
        self.steps = [*inlined(body, names, consts)]
        ends = [a if is_literal(a) else names.get(a, a) for a in body.outvars]
        self.invars = body.invars[: len(leaves)]
        sums = Sums(self.steps, self.invars, ends, consts, len(masks))
        self.sides, self.sums = sums.sides, sums.all()
        self.masks = [*masks, *[None] * (len(leaves) - len(masks))]
        self.leaves = [*map(_masked, self.masks, leaves)]
        given = dict(zip(body.invars[len(leaves) :], xs, strict=True)) | consts
        self.dense = given | dict(zip(self.invars, leaves, strict=True))
        self.pruned = given | dict(zip(self.invars, self.leaves, strict=True))
        self.levels: dict[Var, int] = {}
        self.evaluations, self.last = 0, self._lifetimes()

    def _lifetimes(self) -> dict[int, list[Array]]:
        """`{place: values that nothing reads afterwards}`."""
        last: dict[Var, int] = {}
        for place, eqn in enumerate(self.steps):
            last |= {v: place for v in [*reads(eqn), *eqn.outvars]}
        for end, found in self.sums.items():
            for v in (v for place in found.places for v in reads(self.steps[place])):
                last[v] = max(last[v], end)
        kept, ends = {*self.invars}, {}
        for v, place in last.items():
            if v not in kept:
                ends.setdefault(place, []).append(v)
        return ends

    def at(self, place: int, ridge: float | None) -> PyTree:
        """Evaluate a step; `(leaves, level, before, after)` where a sum is done."""
        eqn = self.steps[place]
        is_product = eqn.primitive.name in CONTRACTIONS
        level = max([self.levels.get(v, 0) for v in reads(eqn)], default=0) + is_product
        self.levels |= dict.fromkeys(eqn.outvars, level)
        self._make(eqn, self.dense)
        if all(self.dense[v] is self.pruned[v] for v in reads(eqn)):
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

    def operands(self, place: int) -> list[Array]:
        """The pruned values that a step reads."""
        return operands_of(self.steps[place], self.pruned)

    def _make(self, eqn: Eqn, env: dict[Var, PyTree]) -> None:
        self.evaluations += 1
        results = bind(eqn, operands_of(eqn, env))
        env |= dict(zip(eqn.outvars, results, strict=True))

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

    def _with_one_shift(self, var: Atom, found: Sum) -> Sum:
        """The vector that is kept in most columns takes up the intercept."""
        count = lambda shift: np.count_nonzero(
            self._allowed(shift[0])[shift[1]]
            & _usable(self._scale(var, found, shift[3]))
        )
        most = sorted(found.shifts, key=count, reverse=True)[:1]
        return found._replace(shifts=tuple(most))

    def _scale(
        self, var: Atom, found: Sum, factors: tuple[tuple[Atom, int], ...]
    ) -> Array:
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

    def _error(self, var: Atom, found: Sum, alive: Array) -> float:
        """`|dense - pruned| / |dense|` in the columns that are alive."""
        dense, pruned = self.dense[var], self.pruned[var]
        if dense is pruned or not alive.any():
            return 0.0
        chosen = lambda x: _rows(local(x), found)[:, alive].ravel()
        norm = lambda x: float(namespace(x).sqrt((x * x).sum()))
        return norm(chosen(dense) - chosen(pruned)) / (norm(chosen(dense)) or 1.0)

    def _solution(
        self, var: Atom, found: Sum, allowed: list[Array], ridge: float
    ) -> Array:
        """`[G, K, M]`: what to add to the kernels, the shift in the last row."""
        groups = len(allowed[0])
        error = _rows(local(self.dense[var] - self.pruned[var]), found)
        error = error.reshape(error.shape[0], groups, -1)
        gram, cross = self._moments(found, error)
        penalty = np.ones(gram.shape[-1])
        if found.shifts:
            penalty[-1] = 0
        ridge += len(penalty) * float(jnp.finfo(error.dtype).eps)
        return _solved(gram, cross, np.concatenate(allowed, 1), penalty * ridge)

    def _moments(self, found: Sum, error: Array) -> tuple[Array, Array]:
        """`X^T X` `[G, K, K]` and `X^T error` `[G, K, M]`, summed part by part."""
        many = self.steps[found.places[-1]].outvars[0].aval.shape
        count = many[found.rows[0]] if found.rows else 1
        width = sum(t.where.shape[0] * t.where.shape[1] for t in found.terms)
        step = max(1, CHUNK * count // (len(error) * width))
        every = max(1, len(error) // max(ROWS, 32 * width)) | 1  # odd: all pixels
        gram, cross = 0.0, 0.0
        for low in range(0, count, step):
            x = self._part(found, slice(low, low + step), every)
            part = slice(low * len(error) // count, (low + step) * len(error) // count)
            gram = gram + _product(x, x)
            cross = cross + _product(x, error[part][::every])
        return np.asarray(gram), np.asarray(cross)

    def _part(self, found: Sum, part: slice, every: int) -> Array:
        """`[R, G, K]`: features of all terms for some rows, and ones for the shift."""
        parts = []
        for term in found.terms:
            eqn = self.steps[term.place]
            x = local(self.operands(term.place)[1 - term.side])
            x = _sliced(eqn, term.side, x, part)
            parts.append(term.sign * features(eqn, term.side, x, every))
        for shift in found.shifts:
            ones = namespace(parts[0]).ones_like(parts[0][..., :1])
            parts.append(shift[2] * ones)
        return namespace(parts[0]).concatenate(parts, -1)

    def _change(
        self, found: Sum, delta: Array, scales: list[Array]
    ) -> dict[int, PyTree]:
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

    def _put(self, found: Sum, leaves: Mapping[int, PyTree]) -> None:
        """Other parameters of a sum, and its value with them."""
        for leaf, x in leaves.items():
            self.leaves[leaf] = self.pruned[self.invars[leaf]] = x
        for place in found.places:
            self._make(self.steps[place], self.pruned)


def operands_of(eqn: Eqn, env: dict[Var, PyTree]) -> list[Array]:
    """The values that an equation reads."""
    return [a.val if is_literal(a) else env[a] for a in eqn.invars]


def _usable(scale: Array) -> Array:
    """Where one may divide."""
    size = np.abs(scale)
    return np.isfinite(size) & (size > 1e-6 * np.max(size, initial=0))


def _masked(mask: Mask, x: jax.Array) -> jax.Array:
    """Zero where the mask is False; the same array where it is nowhere."""
    if mask is None or np.all(mask):
        return x
    return jnp.where(mask, x, jnp.zeros_like(x))


def _rows(x: Array, found: Sum) -> Array:
    """`[R, columns]`: the value of a sum."""
    moved = x.transpose(found.rows + found.columns)
    return moved.reshape(size(x, found.rows), size(x, found.columns))


def _sliced(eqn: Eqn, side: int, x: Array, part: slice) -> Array:
    """Some of the features along their first free axis."""
    if eqn.primitive.name == "dot_general":
        free = axes_of(eqn, 1 - side, x.ndim)[2]
    else:
        free = eqn.params["dimension_numbers"].lhs_spec[:1]
    return x[(slice(None),) * free[0] + (part,)] if free else x


def _product(x: Array, y: Array) -> Array:
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
    from scipy import linalg  # it loads scipy.sparse

    try:
        return linalg.cho_solve(linalg.cho_factor(a), b)
    except linalg.LinAlgError:
        return np.linalg.lstsq(a, b, rcond=None)[0]
