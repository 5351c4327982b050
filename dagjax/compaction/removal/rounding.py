"""How far rounding alone moves the results of a program, measured by rounding anew.

    fl(x) -> x (1 + s eps),    s = +1 or -1 by the bits of x and a salt

after every operation, eps that of the type it computes in (Monte Carlo arithmetic,
Parker 1997). What differs by more than such runs differ is no rounding; a sum that is
zero up to rounding, or float32 logits of a bfloat16 network, need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dagjax.jaxprs.interpret import Env, Evaluation
from dagjax.jaxprs.primitives import primitive_of
from dagjax.jaxprs.program import Atom, Equation, Program
from dagjax.types import Array

_RUNS = 8
_ROUNDINGS = 8  # of the largest value: so little needs no run
_SPREADS = 3  # times what the runs differ; other orders of summation move less
_HASH = np.uint32(2654435761)  # multiplicative, Knuth

_SUMS = ("contraction", "reduction", "cumulative", "window")

Results = Sequence[Any]


class Rounded(Evaluation):
    """Evaluates a program, every result moved by one rounding up or down.

    Args:
        salt: Another one, another run.
    """

    def __init__(self, salt: Array):
        self.salt, self._count = salt, 0

    def equation(self, equation: Equation, values: list[Any]) -> Results:
        """The primitive; entries that are only moved are not computed.

        A sum rounds on the way too: as if its terms were rounded, each sum anew.
        """
        if primitive_of(equation.eqn).kind in _SUMS:
            values = [self._nudged(x) for x in values]
        results = super().equation(equation, values)
        if primitive_of(equation.eqn).moves:
            return results
        return [self._nudged(y) for y in results]

    def _nudged(self, x: Array) -> jax.Array:
        self._count += 1
        return nudged(x, self.salt + np.uint32(self._count * _RUNS))


def nudged(x: Any, salt: Any) -> Any:
    """An array with every entry moved by one rounding; what is exact stays."""
    dtype = x.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return lax.complex(nudged(x.real, salt), nudged(x.imag, salt))
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 8:
        return x
    bits = lax.bitcast_convert_type(x, f"uint{jnp.finfo(dtype).bits}")
    up = ((bits.astype(jnp.uint32) ^ salt) * _HASH) >> np.uint32(31)
    eps = jnp.finfo(dtype).eps
    return x * jnp.where(up == 1, 1 + eps, 1 - eps).astype(dtype)


def runs_of(
    program: Program, args: Results, wanted: Sequence[Atom] = ()
) -> list[list[Any]]:
    """Results of some runs that round differently.

    Args:
        program: The program.
        args: Its arguments.
        wanted: The values to look at; by default the outputs.
    """

    @jax.jit
    def run(salt: Array, args: Results) -> list[Any]:
        env: Env = {}
        made = Rounded(salt).run(program, [nudged(x, salt) for x in args], env)
        return [env[v] for v in wanted] if wanted else made

    return [run(np.uint32(salt), [*args]) for salt in range(1, _RUNS + 1)]


def differing(
    ones: Results, twos: Results, runs: Callable[[], Iterable[Results]]
) -> list[int]:
    """Which of some results differ by more than rounding.

    Args:
        ones: The results.
        twos: Computed in another way.
        runs: The results of other runs; asked for only where it matters.
    """
    pairs = [*zip(ones, twos, strict=True)]
    far = [i for i, pair in enumerate(pairs) if not close(*pair)]
    again = [*runs()] if far else []
    return [i for i in far if not close(*pairs[i], [run[i] for run in again])]


def close(one: Array, two: Array, runs: Results = ()) -> bool:
    """Whether two results are equal up to rounding.

    Args:
        one: An array.
        two: An array.
        runs: `one` as other runs rounded it.
    """
    exact = not jnp.issubdtype(one.dtype, jnp.inexact)
    eps = 0.0 if exact else float(jnp.finfo(one.dtype).eps)
    one, two, *runs = [_wide(x) for x in (one, two, *runs)]
    if one.shape != two.shape:
        return False
    unsure = np.zeros(one.shape, bool)
    for run in runs:  # a choice that rounding decides, or whether a value is finite
        unsure |= one != run if exact else np.isfinite(one) != np.isfinite(run)
    with np.errstate(invalid="ignore"):  # inf - inf
        spread = max([size(run - one) for run in runs], default=0.0)
    limit = max(_ROUNDINGS * eps * size(one), 0 if exact else _SPREADS * spread)
    near = np.isclose(one, two, rtol=0, atol=limit, equal_nan=True)
    return bool((near | unsure).all())


def size(x: Array) -> float:
    """The largest finite magnitude."""
    magnitude = np.abs(_wide(x))
    finite = magnitude[np.isfinite(magnitude)]
    return float(finite.max()) if finite.size else 0.0


def _wide(x: Array) -> np.ndarray:
    """In double precision, so that differences are exact."""
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
