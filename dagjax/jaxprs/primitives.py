"""What a primitive is to the graph: light work, a sum, a merge, or opaque."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from dagjax.jaxprs.flatten import Equation

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp complex conj convert_element_type copy copy_p
    cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
    imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg
    nextafter not optimization_barrier or population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sharding_constraint sign sin sinh sqrt
    square stop_gradient sub tan tanh xor zeta device_put polygamma
    """.split()
)
_REDUCTIONS = frozenset(
    """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor cumlogsumexp cummax cummin cumprod cumsum
    """.split()
)
MOVES = frozenset(
    """
    broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims gather
    iota pad reshape rev slice split squeeze stack tile transpose unstack
    """.split()
)
_HEAVY = frozenset(
    """
    approx_top_k cholesky conv_general_dilated dot_general eig eigh fft
    householder_product lu lu_pivots_to_permutation qr ragged_dot_general random_bits
    random_fold_in random_gamma random_seed random_split random_unwrap random_wrap
    reduce_window
    reduce_window_max reduce_window_min reduce_window_sum rng_bit_generator scatter
    scatter-add scatter-max scatter-min scatter-mul scatter-sub scatter_add scatter_mul
    select_and_gather_add select_and_scatter_add sort svd threefry2x32 top_k
    triangular_solve
    """.split()
)
_LIGHT = ELEMENTWISE | _REDUCTIONS | MOVES
_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


def is_key(x: Any) -> bool:
    """Whether an array, or what stands for one, is a typed random key."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_light(equation: Equation, reads_parameter: bool) -> bool:
    """Whether it only shapes a value: elementwise, a reduction, or moving entries.

    Args:
        equation: One equation.
        reads_parameter: A look-up in a table of parameters is a layer of its own.
    """
    if equation.name == "gather" and reads_parameter:
        return False
    if all(is_key(v.aval) for v in equation.eqn.outvars):
        return True  # a key is no value of a node
    return _all(equation.eqn, _LIGHT)


def is_known(equation: Equation) -> bool:
    """Whether what it does is known; what is not (a loop too) makes an opaque arc."""
    return _all(equation.eqn, _LIGHT | _HEAVY)


def is_sum(equation: Equation) -> bool:
    """Whether it adds its two operands, the second perhaps negated."""
    return equation.name in ("add", "add_any", "sub")


def _all(eqn: Any, names: frozenset[str]) -> bool:
    """Whether an equation, or all in a call with a rule of its own, is one of these."""
    if eqn.primitive.name in names:
        return True
    if eqn.primitive.name not in _CUSTOM and eqn.primitive.name not in ("jit", "pjit"):
        return False
    inner = core.jaxprs_in_params(eqn.params)
    return all(_all(e, names) for jaxpr in inner for e in jaxpr.eqns)
