"""Functions whose derivative is a linear map that gives their value.

At a point y a function is written `f(u) = G u + c` with the nonlinear parts of G held
at y: a rectifier is the diagonal of 0 and 1 that it is there (un-rectified, Heinecke &
Hwang 2019), attention weights, normalizing factors and the gates of gelu or silu are
numbers, another activation with f(0) = 0 is its secant f(y) / y. `freeze(f)` has the
values of f, and its derivative at y is G: all of JAX's jvp, vjp and jacobian apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from dagjax.jaxprs.interpret import Interpreter, bind
from dagjax.jaxprs.primitives import primitives_with
from dagjax.jaxprs.program import Atom, Equation, Program, called, program_of
from dagjax.jaxprs.versions import Eqn, closed_jaxpr
from dagjax.types import Array, PyTree

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
# Smooth functions with f(0) = 0, and their slope there.
_SECANTS = {
    **dict.fromkeys(("tanh", "sin", "tan", "asin", "atan", "sinh", "asinh"), 1.0),
    **dict.fromkeys(("atanh", "expm1", "log1p"), 1.0),
    **dict.fromkeys(("sqrt", "cbrt", "square"), 0.0),
    "erf": 2 / np.sqrt(np.pi),
}
_CALLS = primitives_with(kind="call")


class _Tracked(NamedTuple):
    value: PyTree
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

    A `Breakpoint` for each rectifier, maximum, absolute value or comparison on the way;
    its derivative is the frozen one.

    >>> import jax, jax.numpy as jnp
    >>> print(kinks(jax.nn.relu)(jnp.array([-1.0, 0.0]))[0].difference)
    [-1.  0.]
    """
    return lambda *args: _run(f, args)[1]


def _run(
    f: Callable[..., Any], args: tuple[PyTree, ...]
) -> tuple[Any, tuple[Breakpoint, ...]]:
    """The frozen values, and the breakpoints on the way."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    inputs = _tracked([jnp.asarray(x) for x in jax.tree.leaves(args)], LINEAR)
    freezing = _Freezing()
    outputs = freezing.run(program_of(closed), inputs)
    tree, values = jax.tree.structure(shape), [output.value for output in outputs]
    return tree.unflatten(values), tuple(freezing.breakpoints)


class _Freezing(Interpreter[_Tracked]):
    """Evaluates a program, each equation by the rule for its primitive."""

    def __init__(self) -> None:
        self.breakpoints: list[Breakpoint] = []

    def literal(self, atom: Atom) -> _Tracked:
        """A number that no input changes."""
        return _Tracked(atom.val, CONSTANT)

    def constant(self, var: Any, array: Array) -> _Tracked:
        """An array that no input changes."""
        return _Tracked(array, CONSTANT)

    def equation(self, equation: Equation, values: list[_Tracked]) -> list[_Tracked]:
        """By the rule of its primitive; without one it is held constant."""
        eqn, depends = equation.eqn, any(arg.rank for arg in values)
        if equation.name in _CALLS:  # on devices that it names
            return self.run(program_of(closed_jaxpr(*called(eqn))), values)
        if depends:
            arrays = [arg.value for arg in values]
            where = _differences(eqn, arrays)
            self.breakpoints.extend(Breakpoint(equation.name, d) for d in where)
        moves = depends and any(map(_is_inexact, eqn.outvars))
        rule = _RULES.get(equation.name, _held) if moves else _held
        return rule(eqn, *values)

    def cond(self, equation: Equation, values: list[_Tracked]) -> list[_Tracked]:
        """The branch that is taken at the point, frozen too."""
        index, *operands = values
        ranks = [arg.rank for arg in operands]

        def frozen(body: Program) -> Callable[..., list[Any]]:
            inputs = lambda arrays: [*map(_Tracked, arrays, ranks)]
            run = lambda *arrays: _Freezing().run(body, inputs(arrays))
            return lambda *arrays: [output.value for output in run(*arrays)]

        branches = [frozen(body) for body in equation.bodies]
        arrays = [arg.value for arg in operands]
        outputs = lax.switch(lax.stop_gradient(index.value), branches, *arrays)
        return _tracked(outputs, LINEAR if any(v.rank for v in values) else CONSTANT)

    def scan(self, equation: Equation, values: list[_Tracked]) -> list[_Tracked]:
        """A loop is held constant."""
        return _held(equation.eqn, *values)

    loop = scan


def _held(eqn: Eqn, *args: _Tracked) -> list[_Tracked]:
    """The value at the point, a constant."""
    values = [lax.stop_gradient(arg.value) for arg in args]
    return _tracked(bind(eqn, values), CONSTANT)


def _linear(eqn: Eqn, *args: _Tracked) -> list[_Tracked]:
    """Linear in all operands together, or piecewise so."""
    rank = max(arg.rank for arg in args)
    return _tracked(bind(eqn, [arg.value for arg in args]), rank)


def _maximum(eqn: Eqn, *args: _Tracked) -> list[_Tracked]:
    """The larger one at the point; of equal ones the second, NaN stays."""
    values = [arg.value for arg in args]
    larger, smaller = values if eqn.primitive.name == "max" else values[::-1]
    first = (larger > smaller) | (values[0] != values[0])
    return [_Tracked(jnp.where(first, *values), max(arg.rank for arg in args))]


def _quotient(eqn: Eqn, above: _Tracked, below: _Tracked) -> list[_Tracked]:
    """The denominator is a frozen number."""
    if not above.rank:
        return _held(eqn, above, below)
    values = [above.value, lax.stop_gradient(below.value)]
    return _tracked(bind(eqn, values), above.rank)


def _product(eqn: Eqn, left: _Tracked, right: _Tracked) -> list[_Tracked]:
    """Bilinear: the less linear factor is frozen, of equal ones each by half."""
    hold, rank = lax.stop_gradient, max(left.rank, right.rank)
    (first,) = bind(eqn, [left.value, hold(right.value)])
    (second,) = bind(eqn, [hold(left.value), right.value])
    if left.rank == right.rank:
        return [_Tracked(first / 2 + second / 2, rank)]
    return [_Tracked(first if left.rank > right.rank else second, rank)]


def _power(eqn: Eqn, base: _Tracked, *exponent: _Tracked) -> list[_Tracked]:
    """A secant where the exponent is a known number above 0."""
    positive = _is_positive(eqn.invars[1]) if exponent else eqn.params["y"] >= 1
    return (_secant if positive else _held)(eqn, base, *exponent)


def _tracked(outputs: Sequence[Any], rank: int) -> list[_Tracked]:
    """Values of one rank; integers are constant."""
    ranks = [rank if _is_inexact(value) else CONSTANT for value in outputs]
    return list(map(_Tracked, outputs, ranks))


def _is_inexact(value: PyTree) -> bool:
    aval = getattr(value, "aval", value)
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _is_positive(atom: Any) -> bool:
    """Whether an exponent is a known number above 0."""
    known = isinstance(atom, core.Literal) and np.ndim(atom.val) == 0
    return known and bool(atom.val > 0)


def _secant(eqn: Eqn, *args: _Tracked) -> list[_Tracked]:
    """`f(y) + f(y) / y (x - y)` at x = y: the value is f's own, bit by bit.

    Where the secant is not finite, f is held constant.
    """
    slope = _SECANTS.get(eqn.primitive.name, float(eqn.params.get("y") == 1))
    values = [arg.value for arg in args]
    x, (y,) = values[0], bind(eqn, values)
    y, point = lax.stop_gradient((y, x))
    zero = jnp.zeros_like(point)
    safe = jnp.where(point == 0, jnp.ones_like(point), point)
    ratio = jnp.where(point == 0, jnp.full_like(point, slope), y / safe)
    finite = jnp.isfinite(point) & jnp.isfinite(ratio)
    moving = jnp.where(finite, x, zero)
    step = moving - lax.stop_gradient(moving)
    return [_Tracked(y + jnp.where(finite, ratio, zero) * step, SECANT)]


_RULES: dict[str, Callable[..., list[_Tracked]]] = {
    **dict.fromkeys(_LINEAR, _linear),
    **dict.fromkeys(primitives_with(bilinear=True), _product),
    **dict.fromkeys(_SECANTS, _secant),
    **dict.fromkeys(("pow", "integer_pow"), _power),
    **dict.fromkeys(("max", "min"), _maximum),
    "div": _quotient,
}


def _differences(eqn: Eqn, values: list[PyTree]) -> Iterator[Any]:
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
        yield x - jnp.expand_dims(bind(eqn, values)[0], axes)
    elif name == "reduce_window_max":
        yield from _window_differences(eqn, values)


def _window_differences(eqn: Eqn, values: list[PyTree]) -> Iterator[Any]:
    """The maximum of each window minus each of its entries; padding never wins."""
    x, p = values[0], eqn.params
    (top,) = bind(eqn, values)
    low = jnp.asarray(jnp.finfo(x.dtype).min, x.dtype)
    padded = lax.pad(x, low, [(*pad, 0) for pad in p["padding"]])
    strides, dilation = p["window_strides"], p["window_dilation"]
    for place in np.ndindex(*p["window_dimensions"]):
        start = [i * d for i, d in zip(place, dilation, strict=True)]
        sizes = zip(start, top.shape, strides, strict=True)
        stop = [i + (n - 1) * s + 1 for i, n, s in sizes]
        yield top - lax.slice(padded, start, stop, strides)
