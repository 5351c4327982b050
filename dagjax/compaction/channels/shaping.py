"""Wires of primitives that move, join, cut and reduce axes."""

from __future__ import annotations

import itertools

import numpy as np

from dagjax.compaction.channels.wires import (
    NEW,
    PINNED,
    Joined,
    Product,
    Ref,
    Same,
    Wire,
    Wiring,
    elementwise,
    out_shape,
    passing,
    pinned,
    rule,
    shape_of,
)
from dagjax.jaxprs.versions import Eqn


@rule("bitcast_convert_type", "new_dtype")
def _bitcast(eqn: Eqn) -> Wiring:
    return elementwise(eqn) if shape_of(eqn) == out_shape(eqn) else pinned(eqn)


@rule("optimization_barrier")
def _barrier(eqn: Eqn) -> Wiring:
    return Wiring(
        tuple(
            tuple(Same(((i, d),)) for d in range(len(v.aval.shape)))
            for i, v in enumerate(eqn.invars)
        )
    )


@rule("reshape", "dimensions new_sizes sharding")
def _reshape(eqn: Eqn) -> Wiring:
    """Both shapes in the shortest runs of axes with equal products; ones are free."""
    if eqn.params["dimensions"] is not None:  # the axes are transposed before
        return pinned(eqn)
    old, new = shape_of(eqn), out_shape(eqn)
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


@rule("transpose", "permutation")
def _transpose(eqn: Eqn) -> Wiring:
    return Wiring((tuple(Same(((0, a),)) for a in eqn.params["permutation"]),))


@rule("squeeze", "dimensions")
def _squeeze(eqn: Eqn) -> Wiring:
    gone = eqn.params["dimensions"]
    kept = [a for a in range(len(shape_of(eqn))) if a not in gone]
    return Wiring((tuple(Same(((0, a),)) for a in kept),))


@rule("rev", "dimensions")
def _rev(eqn: Eqn) -> Wiring:
    back, turned = slice(None, None, -1), eqn.params["dimensions"]
    wires = [
        Joined(((0, a, back),)) if a in turned else Same(((0, a),))
        for a in range(len(out_shape(eqn)))
    ]
    return Wiring((tuple(wires),))


@rule("broadcast_in_dim", "broadcast_dimensions shape sharding")
def _broadcast(eqn: Eqn) -> Wiring:
    wires: list[Wire] = [NEW] * len(out_shape(eqn))
    for a, d in enumerate(eqn.params["broadcast_dimensions"]):
        if shape_of(eqn)[a] == out_shape(eqn)[d]:
            wires[d] = Same(((0, a),))
    return Wiring((tuple(wires),))


@rule("iota", "dimension dtype shape sharding")
def _iota(eqn: Eqn) -> Wiring:
    return Wiring(((NEW,) * len(out_shape(eqn)),))


@rule("concatenate", "dimension")
def _concatenate(eqn: Eqn) -> Wiring:
    count, along = len(eqn.invars), eqn.params["dimension"]
    joined = Joined(tuple((i, along, slice(None)) for i in range(count)))
    wires = [
        joined if d == along else Same(tuple((i, d) for i in range(count)))
        for d in range(len(out_shape(eqn)))
    ]
    return Wiring((tuple(wires),))


@rule("stack", "axis")
def _stack(eqn: Eqn) -> Wiring:
    along, count = eqn.params["axis"] % len(out_shape(eqn)), len(eqn.invars)
    rest = [
        Same(tuple((i, d) for i in range(count))) for d in range(len(shape_of(eqn)))
    ]
    return Wiring(((*rest[:along], NEW, *rest[along:]),))


@rule("unstack", "axis")
def _unstack(eqn: Eqn) -> Wiring:
    along = eqn.params["axis"] % len(shape_of(eqn))
    rest = [Same(((0, d),)) for d in range(len(shape_of(eqn))) if d != along]
    return Wiring((tuple(rest),) * len(eqn.outvars), pinned=((0, along),))


@rule("tile", "reps")
def _tile(eqn: Eqn) -> Wiring:
    wires = [
        Same(((0, d),)) if reps == 1 else Joined(((0, d, slice(None)),) * reps)
        for d, reps in enumerate(eqn.params["reps"])
    ]
    return Wiring((tuple(wires),))


@rule("slice", "limit_indices start_indices strides")
def _slice(eqn: Eqn) -> Wiring:
    p = eqn.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    cuts = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    wires = [Joined(((0, a, slice(*cut)),)) for a, cut in enumerate(cuts)]
    return Wiring((tuple(wires),))


@rule("split", "axis sizes")
def _split(eqn: Eqn) -> Wiring:
    along, ends = eqn.params["axis"], np.cumsum([0, *map(int, eqn.params["sizes"])])
    rest = [Same(((0, a),)) for a in range(len(shape_of(eqn)))]
    outputs = []
    for start, stop in itertools.pairwise(ends):
        wires: list[Wire] = [*rest]
        wires[along] = Joined(((0, along, slice(int(start), int(stop))),))
        outputs.append(tuple(wires))
    return Wiring(tuple(outputs))


@rule("pad", "padding_config")
def _pad(eqn: Eqn) -> Wiring:
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


@rule("reduce_sum reduce_max reduce_min", "axes out_sharding")
def _reduce(eqn: Eqn) -> Wiring:
    axes = eqn.params["axes"]
    wires = [Same(((0, a),)) for a in range(len(shape_of(eqn))) if a not in axes]
    return Wiring((tuple(wires),), reduced=tuple((0, a) for a in axes))


@rule(
    "reduce_prod reduce_and reduce_or reduce_xor argmax argmin",
    "axes index_dtype out_sharding",
)
def _mixed(eqn: Eqn) -> Wiring:
    plain = _reduce(eqn)
    return Wiring(plain.outputs, pinned=plain.reduced)


@rule(
    "cumsum cummax cummin cumprod cumlogsumexp sort top_k",
    "axis dimension is_stable k num_keys operand reverse",
)
def _along(eqn: Eqn) -> Wiring:
    """Operations along one axis of all operands: cumulative ones, sort, top_k."""
    p, ndim = eqn.params, len(shape_of(eqn))
    axis = p.get("axis", p.get("dimension", ndim - 1)) % ndim
    operands = range(len(eqn.invars))
    wires = [
        PINNED if a == axis else Same(tuple((i, a) for i in operands))
        for a in range(ndim)
    ]
    pinned = tuple((i, axis) for i in operands)
    return Wiring((tuple(wires),) * len(eqn.outvars), pinned=pinned)


@rule(
    "reduce_window_sum reduce_window_max reduce_window_min",
    "base_dilation padding window_dilation window_dimensions window_strides",
)
def _pool(eqn: Eqn) -> Wiring:
    p = eqn.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    settings = zip(*(p[name] for name in names), p["padding"], strict=True)
    plain = ((1, 1, 1, 1, (0, 0)),)
    full = [(*s[:4], tuple(s[4])) in plain for s in settings]
    wires, ends = passing(full)
    return Wiring((wires,), pinned=ends)


@rule("fft", "fft_lengths fft_type")
def _fft(eqn: Eqn) -> Wiring:
    """The last axes are transformed, all others pass."""
    last = len(shape_of(eqn)) - len(eqn.params["fft_lengths"])
    wires, ends = passing([a < last for a in range(len(shape_of(eqn)))])
    return Wiring((wires,), pinned=ends)
