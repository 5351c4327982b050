"""Functions whose derivative is a linear map that gives their value.

At a point y a function is written `f(u) = G u + c` with the nonlinear parts of G held
at y: a rectifier is the diagonal of 0 and 1 that it is there (un-rectified, Heinecke &
Hwang 2019), attention weights, normalizing factors and the gates of gelu or silu are
numbers, another activation with f(0) = 0 is its secant f(y) / y. `freeze(f)` has the
values of f, and its derivative at y is G: all of JAX's jvp, vjp and jacobian apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from dagjax.jaxprs.primitives import primitives_with
from dagjax.jaxprs.program import called

# How a value depends on the input: not (or as a frozen number), through a secant,
# linearly or piecewise linearly. In a product of two the lower one is frozen.
CONSTANT, SECANT, LINEAR = 0, 1, 2

_LINEAR = frozenset(
    """
    add sub neg add_any convert_element_type reduce_precision broadcast_in_dim reshape
    squeeze transpose rev slice dynamic_slice dynamic_update_slice concatenate pad
    gather scatter scatter-add reduce_sum cumsum reduce_window_sum copy copy_p real imag
    select_n reduce_max reduce_min reduce_window_max reduce_window_min cummax cummin abs
    sort clamp split tile conj fft complex scatter-sub scatter-max scatter-min top_k
    device_put sharding_constraint optimization_barrier name
    """.split()
)
_BILINEAR = primitives_with(bilinear=True)
# Smooth functions with f(0) = 0, and their slope there.
_SECANTS = {
    **dict.fromkeys(("tanh", "sin", "tan", "asin", "atan", "sinh", "asinh"), 1.0),
    **dict.fromkeys(("atanh", "expm1", "log1p"), 1.0),
    **dict.fromkeys(("sqrt", "cbrt", "square"), 0.0),
    "erf": 2 / np.sqrt(np.pi),
}
_CALLS = primitives_with(kind="call")


class _Tracked(NamedTuple):
    value: Any
    rank: int  # CONSTANT, SECANT or LINEAR


class Breakpoint(NamedTuple):
    """Where pieces of a function meet: at `difference == 0`."""

    primitive: str
    difference: jax.Array


def freeze(f: Callable[..., Any]) -> Callable[..., Any]:
    """The same values; the derivative is the value-frozen linear map.

    With `G = jacobian(freeze(f))(y)` and `c = f(y) - G y`, `G` is the Jacobian of f
    where f is piecewise linear, and `c = 0` if f is built from linear maps, rectifiers,
    normalizations and gates without biases. What cannot be written as a gated linear
    map (a sigmoid alone, a loop) is held constant. Custom derivative rules inside f are
    passed over.

    Args:
        f: A function of arrays (trees of them), pure.

    Returns:
        A function of the same arguments, differentiable in the floating-point ones.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> y = jnp.array([-1.0, 2.0])
        >>> G = jax.jacobian(freeze(jax.nn.gelu))(y)
        >>> bool(jnp.allclose(G @ y, jax.nn.gelu(y), atol=1e-6))
        True
        >>> bool(jnp.allclose(jax.jacobian(jax.nn.gelu)(y) @ y, jax.nn.gelu(y)))
        False
    """
    return lambda *args: _run(f, args)[0]


def kinks(f: Callable[..., Any]) -> Callable[..., tuple[Breakpoint, ...]]:
    """All differences whose sign decides which linear piece of f applies.

    Args:
        f: A function of arrays.

    Returns:
        A function of the same arguments: a `Breakpoint` for each rectifier, maximum,
        absolute value or comparison on the way; its derivative is the frozen one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> print(kinks(jax.nn.relu)(jnp.array([-1.0, 0.0]))[0].difference)
        [-1.  0.]
    """
    return lambda *args: _run(f, args)[1]


def _run(
    f: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, tuple[Breakpoint, ...]]:
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    inputs = _tracked([jnp.asarray(x) for x in jax.tree.leaves(args)], LINEAR)
    found: list[Breakpoint] = []
    outputs = _evaluate(closed.jaxpr, closed.consts, inputs, found)
    return jax.tree.unflatten(
        jax.tree.structure(shape), [output.value for output in outputs]
    ), tuple(found)


def _evaluate(
    jaxpr: Any, consts: Any, args: list[_Tracked], found: list[Breakpoint]
) -> list[_Tracked]:
    """Equation by equation, each by the rule for its primitive."""
    held = [_Tracked(const, CONSTANT) for const in consts]
    env: dict[Any, _Tracked] = dict(zip(jaxpr.constvars, held, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: (
        _Tracked(atom.val, CONSTANT) if isinstance(atom, core.Literal) else env[atom]
    )
    for eqn in jaxpr.eqns:
        outputs = _equation(eqn, [read(atom) for atom in eqn.invars], found)
        env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(
    eqn: Any, args: list[_Tracked], found: list[Breakpoint]
) -> list[_Tracked]:
    name, rank = eqn.primitive.name, max((arg.rank for arg in args), default=CONSTANT)
    if name in _CALLS:
        return _evaluate(*called(eqn), args, found)
    values = [arg.value for arg in args]
    if rank == CONSTANT or not any(map(_is_inexact, eqn.outvars)):
        if rank:
            found.extend(Breakpoint(name, d) for d in _differences(eqn, values))
        return _tracked(_bind(eqn, list(map(lax.stop_gradient, values))), CONSTANT)
    if name == "cond":
        return _branch(eqn, args)
    found.extend(Breakpoint(name, d) for d in _differences(eqn, values))
    if name in ("max", "min"):
        larger, smaller = values if name == "max" else values[::-1]
        first = (larger > smaller) | (values[0] != values[0])  # nan stays
        return [_Tracked(jnp.where(first, *values), rank)]
    if name in _LINEAR:
        return _tracked(_bind(eqn, values), rank)
    if name in _BILINEAR:
        return [_product(eqn, *args)]
    if name == "div" and args[0].rank:
        return _tracked(_bind(eqn, [values[0], lax.stop_gradient(values[1])]), rank)
    if name in _SECANTS or (name == "integer_pow" and eqn.params["y"] >= 1):
        return [_secant(eqn, values)]
    if name == "pow" and _is_positive(eqn.invars[1]):
        return [_secant(eqn, values)]
    return _tracked(_bind(eqn, list(map(lax.stop_gradient, values))), CONSTANT)


def _bind(eqn: Any, values: list[Any]) -> Any:
    return eqn.primitive.bind(*values, **eqn.params)


def _tracked(outputs: Any, rank: int) -> list[_Tracked]:
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    ranks = [rank if _is_inexact(value) else CONSTANT for value in outputs]
    return list(map(_Tracked, outputs, ranks))


def _is_inexact(value: Any) -> bool:
    aval = getattr(value, "aval", value)
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _is_positive(atom: Any) -> bool:
    """Whether an exponent is a known number above 0."""
    known = isinstance(atom, core.Literal) and np.ndim(atom.val) == 0
    return known and bool(atom.val > 0)


def _branch(eqn: Any, args: list[_Tracked]) -> list[_Tracked]:
    """The branch that is taken at the point, frozen too."""
    index, operands = lax.stop_gradient(args[0].value), args[1:]

    def run(branch: Any) -> Callable[..., list[Any]]:
        def call(*values: Any) -> list[Any]:
            inputs = [
                _Tracked(v, arg.rank) for v, arg in zip(values, operands, strict=True)
            ]
            outputs = _evaluate(branch.jaxpr, branch.consts, inputs, [])
            return [output.value for output in outputs]

        return call

    branches = [run(branch) for branch in eqn.params["branches"]]
    outputs = lax.switch(index, branches, *(arg.value for arg in operands))
    return _tracked(outputs, LINEAR)


def _product(eqn: Any, left: _Tracked, right: _Tracked) -> _Tracked:
    """Bilinear: the less linear factor is frozen, of equal ones each by half."""
    rank = max(left.rank, right.rank)
    hold = lax.stop_gradient
    if left.rank > right.rank:
        return _Tracked(_bind(eqn, [left.value, hold(right.value)]), rank)
    if left.rank < right.rank:
        return _Tracked(_bind(eqn, [hold(left.value), right.value]), rank)
    first = _bind(eqn, [left.value, hold(right.value)])
    second = _bind(eqn, [hold(left.value), right.value])
    return _Tracked(first / 2 + second / 2, rank)


def _secant(eqn: Any, values: list[Any]) -> _Tracked:
    """`f(y) + f(y) / y (x - y)` at x = y: the value is f's own, bit by bit.

    Where the secant is not finite, f is held constant.
    """
    slope = _SECANTS.get(eqn.primitive.name, float(eqn.params.get("y") == 1))
    x = values[0]
    y, point = lax.stop_gradient((_bind(eqn, values), x))
    zero = jnp.zeros_like(point)
    safe = jnp.where(point == 0, jnp.ones_like(point), point)
    ratio = jnp.where(point == 0, jnp.full_like(point, slope), y / safe)
    finite = jnp.isfinite(point) & jnp.isfinite(ratio)
    moving = jnp.where(finite, x, zero)
    step = moving - lax.stop_gradient(moving)
    return _Tracked(y + jnp.where(finite, ratio, zero) * step, SECANT)


def _differences(eqn: Any, values: list[Any]) -> Iterator[Any]:
    """What is zero where the pieces of a piecewise linear primitive meet."""
    name = eqn.primitive.name
    x = values[0]
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return
    if name in ("max", "min", "gt", "ge", "lt", "le"):
        yield x - values[1]
    elif name in ("abs", "sign"):
        yield x
    elif name == "clamp":
        yield from (values[1] - values[0], values[1] - values[2])
    elif name in ("reduce_max", "reduce_min"):
        axes = eqn.params["axes"]
        yield x - jnp.expand_dims(_bind(eqn, values), axes)
    elif name == "reduce_window_max":
        yield from _window_differences(eqn, values)


def _window_differences(eqn: Any, values: list[Any]) -> Iterator[Any]:
    """The maximum of each window minus each of its entries; padding never wins."""
    x, p = values[0], eqn.params
    top = _bind(eqn, values)
    low = jnp.asarray(jnp.finfo(x.dtype).min, x.dtype)
    padded = lax.pad(x, low, [(*pad, 0) for pad in p["padding"]])
    strides, dilation = p["window_strides"], p["window_dilation"]
    for place in np.ndindex(*p["window_dimensions"]):
        start = [i * d for i, d in zip(place, dilation, strict=True)]
        sizes = zip(start, top.shape, strides, strict=True)
        stop = [i + (n - 1) * s + 1 for i, n, s in sizes]
        yield top - lax.slice(padded, start, stop, strides)
