"""How a node that is not a sum reads its ports.

A port holds two sums, value and presence: an arc delivers `(gate * f, gate)`. With
an arc switched off its port reads `(0, 0)`; the merge makes its neutral element of it,
so that the node reads what it would read without that arc. With all ports off a merge
is a finite constant: 1 for a product, 0 for all others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dagjax.types import PyTree


class Port(NamedTuple):
    """What arrived at one port of a merge node."""

    value: PyTree  # gate * f, [B, ...]; None before an arc delivers
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
    additive: ClassVar[bool] = True  # the value of a sum is the sum of values

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
        _same_shape(ports)
        return functools.reduce(
            jnp.multiply, [v + (1 - p).astype(v.dtype) for v, p in ports]
        )


@dataclasses.dataclass(frozen=True)
class Max:
    """Elementwise maximum of the ports that are on; neutral element -inf.

    Example:
        >>> import jax.numpy as jnp
        >>> on, off = Port(jnp.full(1, -3.0), jnp.ones(())), Port(*jnp.zeros((2, 1)))
        >>> print(Max()((on, off)))
        [-3.]
    """

    def __call__(self, ports: tuple[Port, ...]) -> jax.Array:
        """The maximum; 0 with all ports off."""
        _same_shape(ports)
        low = lowest(ports[0].value.dtype)  # not -inf, whose gradients are nan
        largest = functools.reduce(
            jnp.maximum, [jnp.where(is_on(port), port.value, low) for port in ports]
        )
        return jnp.where(any_on(ports), largest, jnp.zeros_like(largest))


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean of the ports that are on, `sum v_i / sum p_i`.

    Example:
        >>> import jax.numpy as jnp
        >>> on, off = Port(jnp.full(1, 3.0), jnp.ones(())), Port(*jnp.zeros((2, 1)))
        >>> print(Mean()((on, on, off)))
        [3.]
    """

    def __call__(self, ports: tuple[Port, ...]) -> jax.Array:
        """The mean; 0 with all ports off."""
        _same_shape(ports)
        total = functools.reduce(jnp.add, [value for value, _ in ports])
        count = functools.reduce(jnp.add, [presence for _, presence in ports])
        safe = jnp.where(count == 0, jnp.ones_like(count), count)
        return total / safe.astype(total.dtype)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention of a query to the keys that are on.

        softmax(q k^T / sqrt(d) + log p_k) v        (Vaswani et al. 2017)

    Port 0 is the query `[B, ..., T, d]`; then come pairs of keys `[B, ..., S, d]` and
    values `[B, ..., S, e]`: ports 1 and 2, 3 and 4, ... Several pairs (memories) are
    attended to side by side. A key that is switched off is dropped with its value; a
    value that is off counts as 0, and without a query all keys weigh the same.

    Args:
        causal: Let position t see positions 0 to t of every memory only.

    Example:
        >>> import jax.numpy as jnp
        >>> one = Port(jnp.ones((1, 5, 8)), jnp.ones(()))
        >>> Attention()((one, one, one)).shape
        (1, 5, 8)
    """

    causal: bool = False

    def __call__(self, ports: tuple[Port, ...]) -> jax.Array:
        """`[B, ..., T, e]`; 0 with all keys off."""
        if len(ports) < 3 or len(ports) % 2 == 0:
            raise ValueError(
                f"attention reads a query and pairs of key and value, "
                f"3, 5, ... ports; got {len(ports)}"
            )
        (query, _), keys, values = ports[0], ports[1::2], ports[2::2]
        logits = jnp.concatenate([self._logits(query, key) for key in keys], -1)
        weights = jax.nn.softmax(logits, -1)
        memory = jnp.concatenate([value for value, _ in values], -2)
        attended = jnp.einsum("...ts,...se->...te", weights, memory)
        return jnp.where(any_on(keys), attended, jnp.zeros_like(attended))

    def _logits(self, query: jax.Array, key: Port) -> jax.Array:
        scale = jnp.asarray(query.shape[-1], query.dtype) ** -0.5
        logits = jnp.einsum("...td,...sd->...ts", query * scale, key.value)
        logits = logits + _log_presence(key, logits.dtype)
        place = lambda axis: jax.lax.broadcasted_iota(int, logits.shape, axis)
        last = logits.ndim - 1
        seen = place(last) <= place(last - 1) if self.causal else True
        low = lowest(logits.dtype)
        return jnp.where(jnp.logical_and(seen, is_on(key)), logits, low)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Mixture of experts: values weighted by a softmax over the experts that are on.

        sum_i softmax(r + log p)_i v_i          (Jacobs et al. 1991)

    Port 0 is the router `r`, `[B, ..., k]`; ports 1 to k are the experts
    `[B, ..., d]`. An expert that is switched off is not routed to; without a router all
    experts weigh the same.

    Args:
        top: Route to this many experts only (Shazeer et al. 2017); None: to all.

    Example:
        >>> import jax.numpy as jnp
        >>> router = Port(jnp.zeros((1, 2)), jnp.ones(()))
        >>> on, off = Port(jnp.full((1, 3), 5.0), jnp.ones(())), Port(
        ...     jnp.zeros((1, 3)), jnp.zeros(()))
        >>> print(Experts()((router, on, off)))
        [[5. 5. 5.]]
    """

    top: int | None = None

    def __call__(self, ports: tuple[Port, ...]) -> jax.Array:
        """`[B, ..., d]`; 0 with all experts off."""
        (router, _), experts = ports[0], ports[1:]
        if not experts or router.shape[-1] != len(experts):
            raise ValueError(
                f"the router (port 0) weighs {router.shape[-1]} experts, "
                f"{len(experts)} ports follow it"
            )
        _same_shape(experts)
        logits = [
            jnp.where(
                is_on(expert),
                router[..., i] + _log_presence(expert, router.dtype),
                lowest(router.dtype),
            )
            for i, expert in enumerate(experts)
        ]
        weights = jax.nn.softmax(self._kept(jnp.stack(logits, -1)), -1)
        values = jnp.stack([value for value, _ in experts], -1)
        mixed = jnp.sum(weights[..., None, :] * values, -1)
        return jnp.where(any_on(experts), mixed, jnp.zeros_like(mixed))

    def _kept(self, logits: jax.Array) -> jax.Array:
        if self.top is None:
            return logits
        rank = jnp.argsort(jnp.argsort(-logits, -1), -1)  # of equal ones the first
        return jnp.where(rank < self.top, logits, lowest(logits.dtype))


def is_on(port: Port) -> jax.Array:
    """Whether anything arrives at a port."""
    return jnp.asarray(port.presence) > 0


def any_on(ports: tuple[Port, ...]) -> jax.Array:
    """Whether anything arrives at one of them."""
    return functools.reduce(jnp.logical_or, map(is_on, ports))


def _log_presence(port: Port, dtype: DTypeLike) -> jax.Array:
    """`log p`, and 0 where p = 0: both sides of a `where` must be finite."""
    presence = jnp.asarray(port.presence, dtype)
    return jnp.log(jnp.where(is_on(port), presence, jnp.ones_like(presence)))


def lowest(dtype: DTypeLike) -> jax.Array:
    """In place of -inf: its exponential is 0 and it has a gradient."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.finfo(dtype).min / 2, dtype)
    whole = jnp.issubdtype(dtype, jnp.integer)
    return jnp.asarray(jnp.iinfo(dtype).min if whole else False, dtype)


def highest(dtype: DTypeLike) -> jax.Array:
    """In place of inf."""
    least = lowest(dtype)
    return -least if jnp.issubdtype(dtype, jnp.inexact) else ~least


def _same_shape(ports: tuple[Port, ...]) -> None:
    shapes = [port.value.shape for port in ports]
    if len({*shapes}) > 1:
        raise ValueError(f"these ports must have one shape, got {shapes}")
