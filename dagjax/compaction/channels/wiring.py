"""How the indices of an equation's axes belong together, primitive by primitive.

For every axis of an output a wire says where its indices come from. That is all that
labels, facts and the cut itself need to know of a primitive. The rules: `contractions`,
`indexing`, `shaping`; of an elementwise primitive all axes pass. Without a rule all
axes are pinned.
"""

from __future__ import annotations

from collections.abc import Callable

from dagjax.compaction.channels import contractions, indexing, shaping
from dagjax.compaction.channels.wires import (
    RULES,
    Rule,
    Values,
    Wiring,
    elementwise,
    pinned,
)
from dagjax.jaxprs.primitives import PRIMITIVES, Primitive, primitive_of
from dagjax.jaxprs.versions import Eqn

RULE_FILES = (contractions, indexing, shaping)  # imported to fill the table


def wiring(eqn: Eqn, values: Values = lambda atom: None) -> Wiring:
    """The wiring of an equation; one without a rule has all its axes pinned.

    Args:
        eqn: The equation.
        values: What an operand holds that is a constant of the program, else None.
    """
    known = RULES.get(eqn.primitive.name)
    if known is None:
        single = primitive_of(eqn).kind == "elementwise" and len(eqn.outvars) == 1
        return elementwise(eqn) if single else pinned(eqn, known=False)
    if not known.parameters.issuperset(eqn.params):
        return pinned(eqn, known=False)
    return known.wiring(eqn, values)


def register_primitive(
    primitive: Primitive,
    wires: Callable[[Eqn], Wiring] | None = None,
    parameters: str = "",
) -> None:
    """Say what is true of a primitive of your own, and how its axes are wired.

    Args:
        primitive: Its entry in the table of primitives.
        wires: `equation -> Wiring`; not needed for an elementwise one.
        parameters: All parameters that `wires` has considered, apart by spaces; an
            equation with another one is pinned.

    Raises:
        ValueError: If the name is taken.

    Example:
        >>> from dagjax.compaction.channels.wiring import register_primitive
        >>> from dagjax.jaxprs.primitives import Primitive
        >>> softcap = Primitive("softcap", "elementwise", zero="all", lipschitz=1.0)
        >>> register_primitive(softcap)
    """
    if primitive.name in PRIMITIVES or primitive.name in RULES:
        raise ValueError(f"the primitive {primitive.name!r} is in the table already")
    PRIMITIVES[primitive.name] = primitive
    if wires is not None:
        rule = Rule(lambda eqn, _: wires(eqn), frozenset(parameters.split()))
        RULES[primitive.name] = rule
