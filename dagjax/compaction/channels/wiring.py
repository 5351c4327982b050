"""How the indices of an equation's axes belong together, primitive by primitive.

For every axis of an output a wire says where its indices come from. That is all that
labels, liveness and the cut itself need to know of a primitive.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dagjax.jaxprs.primitives import ELEMENTWISE

End = tuple[int, int]  # (operand, axis)


class Same(NamedTuple):
    """Index by index the same as in these axes of operands."""

    sources: tuple[End, ...]


class Joined(NamedTuple):
    """Pieces one after the other: `(operand, axis, index)`, or a number of new ones."""

    parts: tuple[tuple[int, int, Any] | int, ...]


class New(NamedTuple):
    """Indices of its own; every slice is the same array (a broadcast)."""


class Pinned(NamedTuple):
    """Indices that mix, or of which nothing is known: never cut."""


Wire = Same | Joined | New | Pinned
NEW, PINNED = New(), Pinned()


class Ref(NamedTuple):
    """An axis: of an operand ("in"), of an output ("out"), or none's ("new")."""

    kind: str
    place: int
    axis: int  # of "new" its size


class Product(NamedTuple):
    """Row-major product: a flat index is gone if one of its factors is."""

    flat: Ref
    factors: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What becomes of the axes of an equation's operands.

    Args:
        outputs: For each output a wire for each axis.
        contracted: Pairs of axes whose products are summed.
        reduced: Axes over which entries are summed, or the largest is taken.
        pinned: Axes that cannot be cut.
        equal: Axes whose indices belong together.
        products: Axes that are products of others.
        known: False for a primitive without a rule.
    """

    outputs: tuple[tuple[Wire, ...], ...]
    contracted: tuple[tuple[End, End], ...] = ()
    reduced: tuple[End, ...] = ()
    pinned: tuple[End, ...] = ()
    equal: tuple[tuple[Ref, Ref], ...] = ()
    products: tuple[Product, ...] = ()
    known: bool = True


def wiring(eqn: Any) -> Wiring:
    """The wiring of an equation; one without a rule has all its axes pinned."""
    name = eqn.primitive.name
    if name in _RULES:
        return _RULES[name](eqn)
    return _elementwise(eqn) if name in ELEMENTWISE - _ODD else _unknown(eqn)


_ODD = frozenset(("bitcast_convert_type", "optimization_barrier"))


def _bitcast(eqn: Any) -> Wiring:
    return _elementwise(eqn) if _shape(eqn) == _out(eqn) else _unknown(eqn)


def _shape(eqn: Any, operand: int = 0) -> tuple[int, ...]:
    return eqn.invars[operand].aval.shape


def _out(eqn: Any) -> tuple[int, ...]:
    return eqn.outvars[0].aval.shape


def _unknown(eqn: Any) -> Wiring:
    ends = [(i, a) for i, v in enumerate(eqn.invars) for a in range(len(v.aval.shape))]
    outputs = tuple((PINNED,) * len(v.aval.shape) for v in eqn.outvars)
    return Wiring(outputs, pinned=tuple(ends), known=False)


def _elementwise(eqn: Any) -> Wiring:
    shape = _out(eqn)
    shapes = [(i, v.aval.shape) for i, v in enumerate(eqn.invars)]
    wires = tuple(
        Same(tuple((i, d) for i, s in shapes if len(s) == len(shape) and s[d] == n))
        for d, n in enumerate(shape)
    )
    return Wiring((wires,) * len(eqn.outvars))


def _barrier(eqn: Any) -> Wiring:
    return Wiring(
        tuple(
            tuple(Same(((i, d),)) for d in range(len(v.aval.shape)))
            for i, v in enumerate(eqn.invars)
        )
    )


def _dot(eqn: Any) -> Wiring:
    (lhs, rhs), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    batch = [Same(((0, i), (1, j))) for i, j in zip(lhs_batch, rhs_batch, strict=True)]
    free = [
        Same(((operand, axis),))
        for operand, taken in ((0, (*lhs, *lhs_batch)), (1, (*rhs, *rhs_batch)))
        for axis in range(len(_shape(eqn, operand)))
        if axis not in taken
    ]
    pairs = tuple(((0, i), (1, j)) for i, j in zip(lhs, rhs, strict=True))
    return Wiring(((*batch, *free),), contracted=pairs)


def _conv(eqn: Any) -> Wiring:
    if eqn.params["batch_group_count"] > 1:
        return dataclasses.replace(_unknown(eqn), known=True)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    batch, feature, *space = numbers.lhs_spec
    out, into, *window = numbers.rhs_spec
    wires: list[Wire] = [PINNED] * len(_out(eqn))
    wires[numbers.out_spec[0]] = Same(((0, batch),))
    wires[numbers.out_spec[1]] = Same(((1, out),))
    pinned = (*((0, a) for a in space), *((1, a) for a in window))
    if groups == 1:
        pairs = (((0, feature), (1, into)),)
        return Wiring((tuple(wires),), contracted=pairs, pinned=pinned)
    equal, products = _groups(eqn, groups, feature, out, into)
    return Wiring((tuple(wires),), pinned=pinned, equal=equal, products=products)


def _groups(eqn: Any, groups: int, feature: int, out: int, into: int) -> Any:
    """Features in are `groups x I`, features out `groups x J`."""
    wide, many = _shape(eqn, 1)[into], _shape(eqn, 1)[out] // groups
    lhs, rhs, inner = Ref("in", 0, feature), Ref("in", 1, out), Ref("in", 1, into)
    group = lhs if wide == 1 else rhs if many == 1 else Ref("new", 0, groups)
    products = [Product(lhs, (group, inner))] if wide > 1 else []
    products += [Product(rhs, (group, Ref("new", 1, many)))] if many > 1 else []
    equal = ((lhs, rhs),) if wide == many == 1 else ()
    return equal, tuple(products)


def _reshape(eqn: Any) -> Wiring:
    """Both shapes in the shortest runs of axes with equal products; ones are free."""
    old, new = _shape(eqn), _out(eqn)
    wires: list[Wire] = [PINNED if n == 1 else NEW for n in new]
    products = []
    for number, (ins, outs) in enumerate(_runs(old, new)):
        ends = [Ref("in", 0, a) for a in ins]
        made = [Ref("out", 0, a) for a in outs]
        if len(ins) == len(outs) == 1:
            wires[outs[0]] = Same(((0, ins[0]),))
        elif len(ins) == 1:
            products.append(Product(ends[0], tuple(made)))
        elif len(outs) == 1:
            products.append(Product(made[0], tuple(ends)))
        else:
            flat = Ref("new", number, int(np.prod([old[a] for a in ins])))
            products += [Product(flat, tuple(ends)), Product(flat, tuple(made))]
    return Wiring((tuple(wires),), products=tuple(products))


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list, list]]:
    if 0 in old:
        return []
    left = [a for a, n in enumerate(old) if n != 1]
    right = [a for a, n in enumerate(new) if n != 1]
    runs = []
    while left:
        ins, outs = [left.pop(0)], [right.pop(0)]
        one, two = old[ins[0]], new[outs[0]]
        while one != two:
            if one < two:
                ins.append(left.pop(0))
                one *= old[ins[-1]]
            else:
                outs.append(right.pop(0))
                two *= new[outs[-1]]
        runs.append((ins, outs))
    return runs


def _transpose(eqn: Any) -> Wiring:
    return Wiring((tuple(Same(((0, a),)) for a in eqn.params["permutation"]),))


def _squeeze(eqn: Any) -> Wiring:
    gone = eqn.params["dimensions"]
    kept = [a for a in range(len(_shape(eqn))) if a not in gone]
    return Wiring((tuple(Same(((0, a),)) for a in kept),))


def _rev(eqn: Any) -> Wiring:
    back, turned = slice(None, None, -1), eqn.params["dimensions"]
    wires = [
        Joined(((0, a, back),)) if a in turned else Same(((0, a),))
        for a in range(len(_out(eqn)))
    ]
    return Wiring((tuple(wires),))


def _broadcast(eqn: Any) -> Wiring:
    wires: list[Wire] = [NEW] * len(_out(eqn))
    for a, d in enumerate(eqn.params["broadcast_dimensions"]):
        if _shape(eqn)[a] == _out(eqn)[d]:
            wires[d] = Same(((0, a),))
    return Wiring((tuple(wires),))


def _iota(eqn: Any) -> Wiring:
    return Wiring(((NEW,) * len(_out(eqn)),))


def _concatenate(eqn: Any) -> Wiring:
    count, along = len(eqn.invars), eqn.params["dimension"]
    joined = Joined(tuple((i, along, slice(None)) for i in range(count)))
    wires = [
        joined if d == along else Same(tuple((i, d) for i in range(count)))
        for d in range(len(_out(eqn)))
    ]
    return Wiring((tuple(wires),))


def _stack(eqn: Any) -> Wiring:
    along, count = eqn.params["axis"] % len(_out(eqn)), len(eqn.invars)
    rest = [Same(tuple((i, d) for i in range(count))) for d in range(len(_shape(eqn)))]
    return Wiring(((*rest[:along], NEW, *rest[along:]),))


def _unstack(eqn: Any) -> Wiring:
    along = eqn.params["axis"] % len(_shape(eqn))
    rest = [Same(((0, d),)) for d in range(len(_shape(eqn))) if d != along]
    return Wiring((tuple(rest),) * len(eqn.outvars), pinned=((0, along),))


def _tile(eqn: Any) -> Wiring:
    wires = [
        Same(((0, d),)) if reps == 1 else Joined(((0, d, slice(None)),) * reps)
        for d, reps in enumerate(eqn.params["reps"])
    ]
    return Wiring((tuple(wires),))


def _slice(eqn: Any) -> Wiring:
    p = eqn.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    cuts = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    wires = [Joined(((0, a, slice(*cut)),)) for a, cut in enumerate(cuts)]
    return Wiring((tuple(wires),))


def _split(eqn: Any) -> Wiring:
    along, ends = eqn.params["axis"], np.cumsum([0, *map(int, eqn.params["sizes"])])
    rest = [Same(((0, a),)) for a in range(len(_shape(eqn)))]
    outputs = []
    for start, stop in itertools.pairwise(ends):
        wires: list[Wire] = [*rest]
        wires[along] = Joined(((0, along, slice(int(start), int(stop))),))
        outputs.append(tuple(wires))
    return Wiring(tuple(outputs))


def _pad(eqn: Any) -> Wiring:
    wires: list[Wire] = []
    pinned = []
    for a, (low, high, between) in enumerate(eqn.params["padding_config"]):
        if between or low < 0 or high < 0:
            wires.append(PINNED)
            pinned.append((0, a))
        elif low or high:
            wires.append(Joined((int(low), (0, a, slice(None)), int(high))))
        else:
            wires.append(Same(((0, a),)))
    return Wiring((tuple(wires),), pinned=tuple(pinned))


def _windowed(*full: bool) -> tuple[tuple[Wire, ...], tuple[End, ...]]:
    """Axes that are taken whole pass, all others are pinned."""
    wires = tuple(Same(((0, a),)) if f else PINNED for a, f in enumerate(full))
    return wires, tuple((0, a) for a, f in enumerate(full) if not f)


def _dynamic_slice(eqn: Any) -> Wiring:
    sizes = zip(eqn.params["slice_sizes"], _shape(eqn), strict=True)
    wires, pinned = _windowed(*(k == n for k, n in sizes))
    return Wiring((wires,), pinned=pinned)


def _dynamic_update(eqn: Any) -> Wiring:
    pairs = zip(_shape(eqn), _shape(eqn, 1), strict=True)
    full = [n == k for n, k in pairs]
    wires = [Same(((0, a), (1, a))) if f else PINNED for a, f in enumerate(full)]
    pinned = [(i, a) for a, f in enumerate(full) if not f for i in (0, 1)]
    return Wiring((tuple(wires),), pinned=tuple(pinned))


def _gather(eqn: Any) -> Wiring:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = _shape(eqn)
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    offset = [a for a in range(len(shape)) if a not in dropped]
    whole = {a for a in offset if sizes[a] == shape[a]} - {*numbers.start_index_map}
    wires: list[Wire] = [PINNED] * len(_out(eqn))
    for d, a in zip(sorted(numbers.offset_dims), offset, strict=True):
        wires[d] = Same(((0, a),)) if a in whole else PINNED
    pinned = [(0, a) for a in range(len(shape)) if a not in whole]
    pinned += [(1, a) for a in range(len(_shape(eqn, 1)))]
    return Wiring((tuple(wires),), pinned=tuple(pinned))


def _reduce(eqn: Any) -> Wiring:
    axes = eqn.params["axes"]
    wires = [Same(((0, a),)) for a in range(len(_shape(eqn))) if a not in axes]
    return Wiring((tuple(wires),), reduced=tuple((0, a) for a in axes))


def _mixed(eqn: Any) -> Wiring:
    plain = _reduce(eqn)
    return Wiring(plain.outputs, pinned=plain.reduced)


def _along(eqn: Any) -> Wiring:
    """Operations along one axis of all operands: cumulative ones, sort, top_k."""
    p, ndim = eqn.params, len(_shape(eqn))
    axis = p.get("axis", p.get("dimension", ndim - 1)) % ndim
    operands = range(len(eqn.invars))
    wires = [
        PINNED if a == axis else Same(tuple((i, a) for i in operands))
        for a in range(ndim)
    ]
    pinned = tuple((i, axis) for i in operands)
    return Wiring((tuple(wires),) * len(eqn.outvars), pinned=pinned)


def _pool(eqn: Any) -> Wiring:
    p = eqn.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    settings = zip(*(p[name] for name in names), p["padding"], strict=True)
    plain = ((1, 1, 1, 1, (0, 0)),)
    full = [(*s[:4], tuple(s[4])) in plain for s in settings]
    wires, pinned = _windowed(*full)
    return Wiring((wires,), pinned=pinned)


_RULES: dict[str, Callable[[Any], Wiring]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _rev,
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "optimization_barrier": _barrier,
    "bitcast_convert_type": _bitcast,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(
        ("reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"),
        _mixed,
    ),
    **dict.fromkeys(
        ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp", "sort", "top_k"),
        _along,
    ),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _pool
    ),
}
