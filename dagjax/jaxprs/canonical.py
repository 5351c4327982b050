"""Compare functions by value, so that equal graphs compile once.

Flax initializers and lambdas are fresh closures on every call. Python compares them
by identity, and a jitted function would compile again for every equal graph.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Hashable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from dagjax.types import Array, PyTree

_FLAX_BOOKKEEPING = ("name", "parent")


class Same:
    """An object compared by identity, kept alive so that its id is not reused."""

    def __init__(self, value: PyTree):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def canonical(value: PyTree, _open: tuple[int, ...] = ()) -> Hashable:
    """A hashable stand-in that is equal for values that compute the same.

    Modules and dataclasses are taken field by field, functions by their code and what
    they close over, arrays by a hash of their bytes. What cannot be looked into is
    compared by identity: the worst that happens then is one more compilation.

    Args:
        value: A hyperparameter: number, string, function, Flax module, array, ...

    Returns:
        A hashable value.

    Example:
        >>> import flax.linen as nn
        >>> init = nn.initializers.variance_scaling
        >>> one, two = (nn.Dense(3, kernel_init=init(2.0, "fan_in", "normal"))
        ...             for _ in range(2))
        >>> one == two, canonical(one) == canonical(two)
        (False, True)
    """
    if id(value) in _open:  # a function that closes over itself
        return ("recursion", _open[::-1].index(id(value)))
    deeper = functools.partial(canonical, _open=(*_open, id(value)))
    if isinstance(value, tuple | list):
        return ("sequence", *map(deeper, value))
    if isinstance(value, dict):
        return ("mapping", *((deeper(k), deeper(v)) for k, v in value.items()))
    if isinstance(value, set | frozenset):
        return ("set", frozenset(map(deeper, value)))
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(
        value, jax.core.Tracer
    ):
        dtype, value = str(value.dtype), _raw(value)
        digest = hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
        return ("array", value.shape, dtype, digest)
    if isinstance(value, float):
        return ("float", value.hex())  # 0.0 == -0.0, and nan != nan
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value), *((n, deeper(v)) for n, v in _fields(value)))
    if isinstance(value, functools.partial):
        return (
            "partial",
            deeper(value.func),
            deeper(value.args),
            deeper(value.keywords),
        )
    if isinstance(value, types.MethodType):
        return ("method", deeper(value.__self__), deeper(value.__func__))
    if isinstance(value, types.FunctionType):
        return _function(value, deeper)
    return _atom(value)


def _raw(array: Array) -> np.ndarray:
    if isinstance(array, jax.Array) and jnp.issubdtype(
        array.dtype, jax.dtypes.prng_key
    ):
        array = jax.random.key_data(array)
    return np.asarray(array)


def _fields(value: PyTree) -> Iterator[tuple[str, Any]]:
    skip = _FLAX_BOOKKEEPING if isinstance(value, nn.Module) else ()
    for field in dataclasses.fields(value):
        if field.name not in skip and field.compare:
            yield field.name, getattr(value, field.name)


def _function(fn: types.FunctionType, deeper: Any) -> Hashable:
    cells = [_contents(cell) for cell in fn.__closure__ or ()]
    # A global is compared by identity: redefining a helper in a notebook must count.
    used = {n: Same(fn.__globals__[n]) for n in _names(fn.__code__) & {*fn.__globals__}}
    return (
        "function",
        fn.__module__,
        fn.__code__,
        deeper(fn.__defaults__),
        deeper(fn.__kwdefaults__),
        deeper(cells),
        tuple(sorted(used.items(), key=lambda item: item[0])),
    )


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _atom(value: PyTree) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return (type(value), value)
