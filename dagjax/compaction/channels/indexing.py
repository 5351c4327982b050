"""Wires of indexing: windows that take an axis whole keep its channels."""

from __future__ import annotations

import numpy as np

from dagjax.compaction.channels.wires import (
    PINNED,
    Joined,
    Same,
    Values,
    Wire,
    Wiring,
    out_shape,
    passing,
    rule,
    rule_with_values,
    shape_of,
)
from dagjax.jaxprs.versions import Eqn

CLIPPED = ("CLIP", "PROMISE_IN_BOUNDS")  # a whole axis then starts at 0


@rule("dynamic_slice", "slice_sizes")
def _dynamic_slice(eqn: Eqn) -> Wiring:
    sizes = zip(eqn.params["slice_sizes"], shape_of(eqn), strict=True)
    wires, pinned = passing([k == n for k, n in sizes])
    return Wiring((wires,), pinned=pinned)


@rule("dynamic_update_slice")
def _dynamic_update(eqn: Eqn) -> Wiring:
    pairs = zip(shape_of(eqn), shape_of(eqn, 1), strict=True)
    full = [n == k for n, k in pairs]
    wires = [Same(((0, a), (1, a))) if f else PINNED for a, f in enumerate(full)]
    pinned = [(i, a) for a, f in enumerate(full) if not f for i in (0, 1)]
    return Wiring((tuple(wires),), pinned=tuple(pinned))


@rule_with_values(
    "gather",
    "dimension_numbers fill_value indices_are_sorted mode slice_sizes unique_indices",
)
def _gather(eqn: Eqn, values: Values) -> Wiring:
    """Axes that are taken whole, axes of the indices, and picks known beforehand."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if (picked := _picks(eqn, values)) is not None:
        return picked
    shape, indices = shape_of(eqn), len(shape_of(eqn, 1)) - 1
    batch = dict(
        zip(
            numbers.start_indices_batching_dims,
            numbers.operand_batching_dims,
            strict=True,
        )
    )
    dropped = (*numbers.collapsed_slice_dims, *batch.values())
    window = [a for a in range(len(shape)) if a not in dropped]
    clipped = eqn.params["mode"].name in CLIPPED
    starts = () if clipped else numbers.start_index_map
    whole = {a for a in window if sizes[a] == shape[a] and a not in starts}
    wires: list[Wire] = []
    windows, lookups = iter(window), iter(range(indices))
    for d in range(len(out_shape(eqn))):
        if d in numbers.offset_dims:
            a = next(windows)
            wires.append(Same(((0, a),)) if a in whole else PINNED)
        else:
            i = next(lookups)
            wires.append(Same(((1, i), *([(0, batch[i])] if i in batch else []))))
    held = [
        (0, a) for a in range(len(shape)) if a not in whole and a not in batch.values()
    ]
    return Wiring((tuple(wires),), pinned=(*held, (1, indices)))


def _picks(eqn: Eqn, values: Values) -> Wiring | None:
    """Of `x[..., constants, ...]`: one axis in another order, or a part of it."""
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn)
    axes, sizes = tuple(numbers.start_index_map), eqn.params["slice_sizes"]
    if len(axes) != 1 or axes != tuple(numbers.collapsed_slice_dims):
        return None
    (axis,), one = axes, len(shape_of(eqn, 1)) == 2
    rest = tuple(d for d in range(len(shape)) if d != axis)
    alone = not numbers.operand_batching_dims and tuple(numbers.offset_dims) == rest
    if not (one and alone and all(sizes[d] == shape[d] for d in rest)):
        return None
    indices = values(eqn.invars[1])
    if (
        indices is None
        or indices.min(initial=0) < 0
        or indices.max(initial=0) >= shape[axis]
    ):
        return None
    picked = Joined(((0, axis, np.asarray(indices)[:, 0]),))
    wires = tuple(picked if d == axis else Same(((0, d),)) for d in range(len(shape)))
    return Wiring((wires,))


@rule(
    """scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max scatter_add
    scatter_mul""",
    """dimension_numbers indices_are_sorted mode unique_indices update_consts
    update_jaxpr""",
)
def _scatter(eqn: Eqn) -> Wiring:
    """Windows that cover an axis of the operand: the same there and in the updates."""
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn)
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [a for a in range(len(shape)) if a not in dropped]
    starts, updates = numbers.scatter_dims_to_operand_dims, shape_of(eqn, 2)
    wires: list[Wire] = [PINNED] * len(shape)
    held = {(0, a) for a in range(len(shape))} | {(2, a) for a in range(len(updates))}
    for a, u in zip(window, numbers.update_window_dims, strict=True):
        if updates[u] == shape[a] and a not in starts:
            wires[a] = Same(((0, a), (2, u)))
            held -= {(0, a), (2, u)}
    held |= {(1, a) for a in range(len(shape_of(eqn, 1)))}
    return Wiring((tuple(wires),), pinned=tuple(sorted(held)))
