"""The table of primitives: what is true of each by itself, whoever asks.

All other tables of the library hold rules keyed by name. What is not listed here is
opaque: nothing is claimed of it, and whoever asks must assume the worst.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dagjax.jaxprs.versions import Eqn
from dagjax.types import PyTree

if TYPE_CHECKING:
    from dagjax.jaxprs.program import Equation

Kind = Literal[
    "elementwise",
    "structural",
    "contraction",
    "reduction",
    "cumulative",
    "window",
    "indexing",
    "control",
    "call",
    "random",
    "linalg",
    "opaque",
]
_SHAPING = ("elementwise", "structural", "reduction", "cumulative", "indexing")
_LAYERS = ("contraction", "window", "random", "linalg")


@dataclasses.dataclass(frozen=True)
class Primitive:
    """What is true of a primitive by itself, whatever its parameters.

    A claim is about its data: indices and predicates apart (of a slice the starts, of
    a scatter the indices, of `select_n` the first operand).

    Args:
        name: Its name.
        kind: What it does.
        data: Which operands hold data; the others are indices and choices. Empty: all.
        linear: The operands in which it is jointly linear, the others fixed; "all".
        bilinear: Linear in each operand alone, not in all of them together.
        zero: What makes the output zero: "all" operands zero, "any" of them zero, the
            "first" zero (the others finite and, of a quotient, not zero).
        keeps_constant: Of data that equal one number everywhere it makes that number.
        monotone: For each operand 1 if the output never falls as it grows, -1 if it
            never rises; the last number goes for all that follow. Empty: no claim.
        lipschitz: No output entry moves more than this times the largest move of an
            entry of any operand.
        rounds_once: The output is the exact value rounded once to the output's type.
        layer: A graph draws it as a layer of its own; None as its kind says.
        call: What a call keeps: "plain" nothing, "custom" its derivative rule, "remat".
    """

    name: str
    kind: Kind = "opaque"
    data: tuple[int, ...] = ()
    linear: tuple[int, ...] | Literal["all"] = ()
    bilinear: bool = False
    zero: Literal["all", "any", "first"] | None = None
    keeps_constant: bool = False
    monotone: tuple[int, ...] = ()
    lipschitz: float | None = None
    rounds_once: bool = False
    layer: bool | None = None
    call: Literal["plain", "custom", "remat"] | None = None

    @classmethod
    def of(cls, name: str) -> Primitive:
        """The entry of a name; one that is not listed is opaque."""
        return PRIMITIVES.get(name) or cls(name)

    @property
    def is_layer(self) -> bool:
        """Whether a graph draws it as a layer of its own."""
        return self.kind in _LAYERS if self.layer is None else self.layer

    @property
    def shapes_values(self) -> bool:
        """Whether it only shapes a value: elementwise, a reduction, moving entries."""
        return self.kind in _SHAPING and not self.is_layer

    @property
    def moves(self) -> bool:
        """Whether its outputs are entries of its operands in other places."""
        return self.kind in ("structural", "indexing") and not self.is_layer


def _entries(kind: Kind, names: str, **claims: Any) -> dict[str, Primitive]:
    return {name: Primitive(name, kind, **claims) for name in names.split()}


_UP = {"monotone": (1,)}
_STILL: dict[str, Any] = {"zero": "all", "linear": "all", **_UP}  # linear and rising
_SAME: dict[str, Any] = {**_STILL, "keeps_constant": True}
_ERF = 2 / np.sqrt(np.pi)

PRIMITIVES: dict[str, Primitive] = {
    # Elementwise: the value itself.
    **_entries(
        "elementwise",
        "copy copy_p name device_put sharding_constraint reshard",
        **_SAME,
    ),
    **_entries("elementwise", "stop_gradient optimization_barrier", **_SAME),
    **_entries("elementwise", "reduce_precision", zero="all", **_UP),
    **_entries("elementwise", "convert_element_type", zero="all", **_UP),
    **_entries("elementwise", "real imag conj complex", zero="all", linear="all"),
    **_entries("elementwise", "bitcast_convert_type", zero="all"),
    # Elementwise: sums and products.
    **_entries("elementwise", "add add_any", **_STILL, rounds_once=True),
    **_entries(
        "elementwise",
        "sub",
        zero="all",
        linear="all",
        monotone=(1, -1),
        rounds_once=True,
    ),
    **_entries(
        "elementwise", "neg", zero="all", linear="all", monotone=(-1,), lipschitz=1.0
    ),
    **_entries("elementwise", "mul", zero="any", bilinear=True, rounds_once=True),
    **_entries("elementwise", "div", zero="first", linear=(0,), rounds_once=True),
    **_entries("elementwise", "and", zero="any"),
    **_entries("elementwise", "or xor", zero="all"),
    **_entries("elementwise", "rem", zero="first"),
    **_entries(
        "elementwise",
        "shift_left shift_right_arithmetic shift_right_logical",
        zero="first",
    ),
    # Elementwise: choices.
    **_entries(
        "elementwise", "max min", zero="all", keeps_constant=True, **_UP, lipschitz=1.0
    ),
    **_entries("elementwise", "clamp", zero="all", keeps_constant=True, **_UP),
    **_entries("elementwise", "select_n", zero="all", keeps_constant=True),
    **_entries("elementwise", "gt lt ne", zero="all"),
    **_entries("elementwise", "eq ge le not is_finite eq_to le_to lt_to"),
    # Elementwise: functions of one variable.
    **_entries("elementwise", "sqrt", zero="all", **_UP, rounds_once=True),
    **_entries("elementwise", "square", zero="all", rounds_once=True),
    **_entries("elementwise", "tanh atan asinh", zero="all", **_UP, lipschitz=1.0),
    **_entries("elementwise", "erf", zero="all", **_UP, lipschitz=float(_ERF)),
    **_entries("elementwise", "erfc", monotone=(-1,), lipschitz=float(_ERF)),
    **_entries("elementwise", "logistic", **_UP, lipschitz=0.25),
    **_entries(
        "elementwise", "asin sinh atanh expm1 log1p cbrt erf_inv", zero="all", **_UP
    ),
    **_entries("elementwise", "floor ceil round sign", zero="all", **_UP),
    **_entries("elementwise", "exp exp2 log acosh", **_UP),
    **_entries("elementwise", "acos rsqrt", monotone=(-1,)),
    **_entries("elementwise", "abs sin", zero="all", lipschitz=1.0),
    **_entries("elementwise", "cos", lipschitz=1.0),
    **_entries("elementwise", "tan bessel_i1e population_count", zero="all"),
    **_entries("elementwise", "nextafter"),
    **_entries(
        "elementwise",
        """atan2 bessel_i0e cosh digamma igamma igammac integer_pow lgamma polygamma pow
        regularized_incomplete_beta zeta clz igamma_grad_a random_gamma_grad""",
    ),
    # Structural: entries in other places.
    **_entries(
        "structural",
        """broadcast_in_dim concatenate expand_dims pad reshape rev slice split squeeze
        stack tile transpose unstack""",
        **_SAME,
    ),
    **_entries("structural", "iota empty empty2"),
    # Contractions.
    **_entries(
        "contraction",
        "dot_general conv_general_dilated ragged_dot_general",
        zero="any",
        bilinear=True,
    ),
    # Reductions of axes.
    **_entries("reduction", "reduce_sum", **_STILL),
    **_entries(
        "reduction",
        "reduce_max reduce_min",
        zero="all",
        keeps_constant=True,
        **_UP,
        lipschitz=1.0,
    ),
    **_entries("reduction", "reduce_and reduce_or", zero="all", keeps_constant=True),
    **_entries("reduction", "reduce_xor reduce_prod", zero="all"),
    **_entries("reduction", "argmax argmin"),
    # Along one axis.
    **_entries("cumulative", "cumsum", **_STILL),
    **_entries(
        "cumulative",
        "cummax cummin",
        zero="all",
        keeps_constant=True,
        **_UP,
        lipschitz=1.0,
    ),
    **_entries("cumulative", "cumprod", zero="all"),
    **_entries("cumulative", "cumlogsumexp", **_UP),
    **_entries("cumulative", "sort approx_top_k top_k", layer=True),
    # Windows.
    **_entries("window", "reduce_window_sum", **_STILL),
    **_entries("window", "reduce_window_max reduce_window_min", **_UP),
    **_entries(
        "window",
        "reduce_window select_and_gather_add select_and_scatter_add select_and_scatter",
    ),
    # Indexing; what is out of bounds is filled where a parameter says so.
    **_entries(
        "indexing",
        "dynamic_slice",
        data=(0,),
        zero="all",
        linear=(0,),
        keeps_constant=True,
    ),
    **_entries(
        "indexing",
        "dynamic_update_slice",
        data=(0, 1),
        zero="all",
        linear=(0, 1),
        keeps_constant=True,
    ),
    **_entries("indexing", "gather", data=(0,)),
    **_entries(
        "indexing",
        "scatter",
        data=(0, 2),
        zero="all",
        linear=(0, 2),
        keeps_constant=True,
        layer=True,
    ),
    **_entries(
        "indexing",
        "scatter-add scatter-sub scatter_add",
        data=(0, 2),
        zero="all",
        linear=(0, 2),
        layer=True,
    ),
    **_entries(
        "indexing",
        "scatter-max scatter-min",
        data=(0, 2),
        zero="all",
        keeps_constant=True,
        layer=True,
    ),
    **_entries(
        "indexing", "scatter-mul scatter_mul", data=(0, 2), zero="first", layer=True
    ),
    # Linear algebra, Fourier transforms.
    **_entries("linalg", "fft", zero="all", linear="all"),
    **_entries(
        "linalg",
        """cholesky eig eigh householder_product lu lu_pivots_to_permutation qr svd
        triangular_solve""",
    ),
    # Random numbers.
    **_entries(
        "random",
        """random_bits random_fold_in random_gamma random_seed random_split
        random_unwrap random_wrap rng_bit_generator rng_uniform threefry2x32""",
    ),
    # Programs inside.
    **_entries("control", "scan while cond"),
    **_entries("call", "jit pjit closed_call core_call", call="plain"),
    **_entries(
        "call", "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr", call="custom"
    ),
    **_entries("call", "remat remat2 checkpoint", call="remat"),
}


def primitive_of(eqn: Eqn) -> Primitive:
    """The entry of an equation's primitive."""
    name = eqn.primitive.name
    if name == "scatter" and eqn.params.get("update_jaxpr") is not None:
        return Primitive(name)  # `x.at[i].apply(fn)`: what fn does is not known
    return Primitive.of(name)


def primitives_with(**claims: Any) -> frozenset[str]:
    """The primitives of which all of these hold: `primitives_with(kind="random")`."""
    return frozenset(
        name
        for name, entry in PRIMITIVES.items()
        if all(getattr(entry, key) == value for key, value in claims.items())
    )


MOVES = primitives_with(moves=True)
_SHAPERS = primitives_with(shapes_values=True)
_KNOWN = _SHAPERS | primitives_with(is_layer=True)


def is_key(x: PyTree) -> bool:
    """Whether an array, or what stands for one, is a typed random key."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_elementwise(equation: Equation, reads_parameter: bool) -> bool:
    """Whether it is elementwise work: also reductions, and what moves entries.

    Args:
        equation: One equation.
        reads_parameter: A look-up in a table of parameters is a layer of its own.
    """
    if equation.name == "gather" and reads_parameter:
        return False
    if all(is_key(v.aval) for v in equation.eqn.outvars):
        return True  # a key is no value of a node
    return _all(equation.eqn, _SHAPERS)


def is_known(equation: Equation) -> bool:
    """Whether what it does is known; what is not (a loop too) makes an opaque arc."""
    return _all(equation.eqn, _KNOWN)


def is_sum(equation: Equation) -> bool:
    """Whether it adds its two operands, the second perhaps negated."""
    return equation.name in ("add", "add_any", "sub")


def _all(eqn: Any, wanted: frozenset[str]) -> bool:
    """Whether an equation, or all in a call with a rule of its own, is one of these."""
    if eqn.primitive.name in wanted:
        return True
    if primitive_of(eqn).call not in ("plain", "custom"):
        return False
    inner = core.jaxprs_in_params(eqn.params)
    return all(_all(e, wanted) for jaxpr in inner for e in jaxpr.eqns)
