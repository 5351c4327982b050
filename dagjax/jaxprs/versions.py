"""What differs between versions of JAX, and what a trace depends on unseen.

Names of `jax.extend.core` are imported from here: jax 0.10 and 0.11 have two classes of
jaxprs, open ones and closed ones that hold their constants; jax 0.12 has one for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import Primitive as Primitive
from jax.extend.core import jaxpr_as_fun as jaxpr_as_fun
from jax.extend.core import jaxprs_in_params as jaxprs_in_params

Tracer = jax.core.Tracer

if TYPE_CHECKING:  # that an abstract value has a shape is said nowhere in jax

    class Aval:
        """An abstract value: shape and type of an array."""

        shape: tuple[int, ...]
        dtype: np.dtype
        ndim: int
        size: int
        weak_type: bool

        def update(self, **changes: object) -> Aval: ...  # noqa: D102

    class Var:
        """A variable of a program."""

        aval: Any

        def __init__(self, aval: Any): ...

    class Literal:
        """A constant among the operands."""

        aval: Any
        val: Any

        def __init__(self, val: Any, aval: Any): ...

    class Eqn:
        """One equation: a primitive with its operands, results and parameters."""

        primitive: Any
        invars: list[Any]
        outvars: list[Any]
        params: dict[str, Any]
        source_info: Any
        effects: Any
        ctx: Any

        def replace(self, **changes: object) -> Eqn: ...  # noqa: D102

else:
    Aval, Eqn = jax.core.ShapedArray, core.JaxprEqn
    Var, Literal = core.Var, core.Literal

Atom: TypeAlias = Var | Literal

# They change the program that a function is traced to.
_SETTINGS = (
    "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion",
    "jax_default_matmul_precision", "jax_default_prng_impl",
)  # fmt: skip


def closed_jaxpr(jaxpr: Any, consts: Any = ()) -> Any:
    """A jaxpr with the values of its constants.

    Args:
        jaxpr: An open jaxpr.
        consts: In the order of its `constvars`.
    """
    if hasattr(jaxpr, "with_consts"):
        return jaxpr.with_consts(consts)
    return getattr(core, "ClosedJaxpr")(jaxpr, [*consts])  # noqa: B009 (not in 0.12)


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """A jaxpr of either kind as an open one, and the values of its constants."""
    if hasattr(jaxpr, "consts"):
        return jaxpr.jaxpr, tuple(jaxpr.consts)
    return jaxpr, ()


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an array, or of what becomes one, and nothing else.

    Under jax 0.12 an abstract value carries the mesh of the `shard_map` that it was
    met in; a memo keyed by such a shape would bring that mesh into later calls.
    """
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    weak = bool(getattr(x, "weak_type", False))
    extended = jnp.issubdtype(x.dtype, jax.dtypes.extended)  # a key
    # Without x64 an array of float64 becomes one of float32; jax 0.12 asks for that.
    dtype = x.dtype if extended else jax.dtypes.canonicalize_dtype(x.dtype)
    return jax.ShapeDtypeStruct(x.shape, dtype, weak_type=weak)


def trace_context() -> Hashable:
    """What a trace depends on beside the function and `shape_of` its arguments.

    It is part of the key of every memo of a trace.
    """
    return (*[getattr(jax.config, name) for name in _SETTINGS], current_mesh())


def trace_state() -> Any:
    """Which transformation traces what is computed here; equal where it is the same."""
    return core.get_opaque_trace_state(convention="nnx")


def current_mesh() -> Any:
    """The mesh that functions are traced for here, in or out of a `shard_map`."""
    return jax.sharding.get_abstract_mesh()


def tracing_for(mesh: Any) -> Any:
    """A context in which functions are traced for a mesh, wherever the call stands.

    Args:
        mesh: What `current_mesh` gave.
    """
    return jax.sharding.use_abstract_mesh(mesh)


def aligned(values: Sequence[Any]) -> list[Any]:
    """Operands that vary over the same axes of a `shard_map` that checks this.

    A program that was traced outside does not say so itself, as `jax.numpy` does.
    """
    every = varying(values)
    cast = lambda x, more: jax.lax.pcast(x, (*more,), to="varying")
    rows = [(x, every - varying([x])) for x in values] if every else []
    return [cast(x, more) if more else x for x, more in rows] if rows else [*values]


def varying(values: Sequence[Any]) -> frozenset[str]:
    """The axes of a `shard_map` that some of these arrays vary over, if it checks."""
    if not getattr(current_mesh(), "manual_axes", ()):
        return frozenset()
    types = [getattr(jax.typeof(x), "manual_axis_type", None) for x in values]
    return frozenset().union(*(t.varying for t in types if t is not None))


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """A context in which numbers are computed at once, wherever the call stands.

    `jax.ensure_compile_time_eval` does so in a `jit`, but not in a `shard_map` or a
    `pmap` that is no part of a `jit`.
    """
    with jax.core.eval_context(), tracing_for(jax.sharding.AbstractMesh((), ())):
        yield
