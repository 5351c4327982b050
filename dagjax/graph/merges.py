"""How a node that is not a sum reads its ports.

A port holds two sums, value and presence: an arc delivers `(gate * f, gate)`. With
an arc switched off its port reads `(0, 0)`; the merge makes its neutral element of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Port(NamedTuple):
    """What arrived at one port of a merge node."""

    value: Any  # gate * f, [B, ...]; None before an arc delivers
    presence: Any  # gate, []


class Merge(Protocol):
    """One unary function of a tuple of ports; a frozen, hashable value."""

    def __call__(self, ports: tuple[Port, ...]) -> jax.Array:
        """The value of the node."""
        ...


@dataclasses.dataclass(frozen=True)
class Concat:
    """Ports side by side; neutral element 0.

    Example:
        >>> import jax.numpy as jnp
        >>> one = Port(jnp.ones((1, 2)), jnp.ones(()))
        >>> Concat()((one, one)).shape
        (1, 4)
    """

    axis: int = -1

    def __call__(self, ports: tuple[Port, ...]) -> jax.Array:
        """`[value_1, ..., value_k]` along the axis."""
        return jnp.concatenate([port.value for port in ports], self.axis)


@dataclasses.dataclass(frozen=True)
class Product:
    """Elementwise product of the ports, `prod_i (v_i + 1 - p_i)`; neutral element 1.

    Example:
        >>> import jax.numpy as jnp
        >>> on, off = Port(jnp.full(1, 3.0), jnp.ones(())), Port(*jnp.zeros((2, 1)))
        >>> print(Product()((on, off)))
        [3.]
    """

    def __call__(self, ports: tuple[Port, ...]) -> jax.Array:
        """The product, with 1 for a port that is switched off."""
        if len(shapes := {port.value.shape for port in ports}) > 1:
            raise ValueError(
                f"a product of shapes {', '.join(map(str, sorted(shapes)))}"
            )
        factors = [v + (1 - p).astype(v.dtype) for v, p in ports]
        product = factors[0]
        for factor in factors[1:]:
            product = product * factor
        return product
