"""Wires of products: contracted axes, free axes, and the groups of convolutions.

A transposed convolution is one with a dilated input: its kernel's output features
couple with the result's, its input features are contracted, as in any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dagjax.compaction.channels.wires import (
    PINNED,
    Product,
    Ref,
    Same,
    Wire,
    Wiring,
    out_shape,
    pinned,
    rule,
    shape_of,
)
from dagjax.jaxprs.versions import Eqn


@rule("dot_general", "dimension_numbers out_sharding precision preferred_element_type")
def _dot(eqn: Eqn) -> Wiring:
    return _product(eqn, *eqn.params["dimension_numbers"])


def _product(
    eqn: Eqn, contracted: Sequence[Sequence[int]], batches: Sequence[Sequence[int]]
) -> Wiring:
    (lhs, rhs), (lhs_batch, rhs_batch) = contracted, batches
    batch = [Same(((0, i), (1, j))) for i, j in zip(lhs_batch, rhs_batch, strict=True)]
    free = [
        Same(((operand, axis),))
        for operand, taken in ((0, (*lhs, *lhs_batch)), (1, (*rhs, *rhs_batch)))
        for axis in range(len(shape_of(eqn, operand)))
        if axis not in taken
    ]
    pairs = tuple(((0, i), (1, j)) for i, j in zip(lhs, rhs, strict=True))
    return Wiring(((*batch, *free),), contracted=pairs)


@rule(
    "ragged_dot_general",
    """group_offset out_sharding precision preferred_element_type
    ragged_dot_dimension_numbers""",
)
def _ragged(eqn: Eqn) -> Wiring:
    """Rows of the left side meet the matrix of their group; groups cannot be cut."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain, ragged = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
    (contracted, _), (batch, _) = plain
    groups = [(1, a) for a in numbers.rhs_group_dimensions]
    offset = eqn.params["group_offset"] is not None or len(eqn.invars) != 3
    if offset or {*ragged} & {*contracted, *batch} or not groups:
        return pinned(eqn)
    free = _product(eqn, *plain)
    keep = [w for w in free.outputs[0] if w not in [Same((g,)) for g in groups]]
    rows = [Same(((0, a),)) for a in ragged]
    wires = tuple(PINNED if wire in rows else wire for wire in keep)
    held = [
        *groups,
        *((0, a) for a in ragged),
        *((2, a) for a in range(len(shape_of(eqn, 2)))),
    ]
    return Wiring((wires,), contracted=free.contracted, pinned=tuple(held))


@rule(
    "conv_general_dilated",
    """batch_group_count dimension_numbers feature_group_count lhs_dilation out_sharding
    padding precision preferred_element_type rhs_dilation window_strides""",
)
def _conv(eqn: Eqn) -> Wiring:
    if eqn.params["batch_group_count"] > 1:
        return pinned(eqn)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    batch, feature, *space = numbers.lhs_spec
    out, into, *window = numbers.rhs_spec
    wires: list[Wire] = [PINNED] * len(out_shape(eqn))
    wires[numbers.out_spec[0]] = Same(((0, batch),))
    wires[numbers.out_spec[1]] = Same(((1, out),))
    positions = (*((0, a) for a in space), *((1, a) for a in window))
    if groups == 1:
        pairs = (((0, feature), (1, into)),)
        return Wiring((tuple(wires),), contracted=pairs, pinned=positions)
    equal, products = _groups(eqn, groups, feature, out, into)
    return Wiring((tuple(wires),), pinned=positions, equal=equal, products=products)


def _groups(eqn: Eqn, groups: int, feature: int, out: int, into: int) -> Any:
    """Features in are `groups x I`, features out `groups x J`."""
    wide, many = shape_of(eqn, 1)[into], shape_of(eqn, 1)[out] // groups
    lhs, rhs, inner = Ref("in", 0, feature), Ref("in", 1, out), Ref("in", 1, into)
    group = lhs if wide == 1 else rhs if many == 1 else Ref("new", 0, groups)
    products = [Product(lhs, (group, inner))] if wide > 1 else []
    products += [Product(rhs, (group, Ref("new", 1, many)))] if many > 1 else []
    equal = ((lhs, rhs),) if wide == many == 1 else ()
    return equal, tuple(products)
