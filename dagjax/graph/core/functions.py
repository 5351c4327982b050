"""What an arc carries: a Flax Linen module, a plain function, or an init/apply pair."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dagjax.jaxprs.canonical import canonical
from dagjax.jaxprs.interpret import run_closed
from dagjax.jaxprs.versions import shape_of
from dagjax.types import Key, Layer, Params, PyTree

State = dict[str, PyTree]

_MODES = {
    "train": lambda train: train,
    "training": lambda train: train,
    "is_training": lambda train: train,
    "deterministic": lambda train: not train,
    "use_running_average": lambda train: not train,
}


@runtime_checkable
class InitApply(Protocol):
    """Anything with the two methods of a Flax Linen module."""

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        """Variables `{"params": ..., other collections}` for an example `x`."""
        ...

    def apply(self, variables: PyTree, x: jax.Array) -> jax.Array:
        """The value at `x`."""
        ...


class Function(abc.ABC):
    """An arc function in normal form, frozen and compared by value.

    `reads_all_params`: it reads the trees of the whole network, not only its own part.
    """

    reads_all_params = False

    def __init__(self, fn: Layer, identity: Hashable, name: str):
        self.fn, self.identity, self.name = fn, identity, name
        self._hash = hash((type(self), identity))

    @abc.abstractmethod
    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """Parameters and state for inputs like `x` (shapes and dtypes only)."""

    @abc.abstractmethod
    def apply(
        self, params: Params, state: State, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, State]:
        """The value at `x` and the new state."""

    @property
    def pattern(self) -> Hashable:
        """Equal for functions that differ in nothing but the parameters they read."""
        return self

    def own(self, params: Params, name: str) -> PyTree:
        """What it reads of the parameters of a network.

        Args:
            params: Those of the network.
            name: Under which an arc has its own.
        """
        return params.get(name, {})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.identity == other.identity  # pyright: ignore[reportAttributeAccessIssue]

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, object]) -> Function:
        return self  # frozen, and closures do not copy

    def __repr__(self) -> str:
        return describe(self.fn)


class Plain(Function):
    """A function without parameters."""

    def __init__(self, fn: Callable[[Any], Any]):
        super().__init__(fn, canonical(fn), _function_name(fn))

    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """No parameters, no state."""
        del key, x
        return {}, {}

    def apply(
        self, params: Params, state: State, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, State]:
        """`fn(x)`."""
        del params, train, key
        return self.fn(x), state


class Linen(Function):
    """A Flax Linen module; its name becomes the name of the arc."""

    def __init__(self, module: nn.Module):
        name = module.name or type(module).__name__
        module = module.clone(parent=None, name=None)
        super().__init__(module, canonical(module), name)
        accepted = inspect.signature(type(module).__call__).parameters
        self.modes = [m for m in _MODES if m in accepted and _unset(module, m)]

    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """Flax's initial variables, split; equal modules are traced once."""
        traced = _drawn.trace(self, jax.tree.map(shape_of, x), key)
        leaves = run_closed(traced.jaxpr, [key])  # not compiled: the bits of Flax's own
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), leaves)

    def apply(
        self, params: Params, state: State, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, State]:
        """Flax's apply; batch statistics are updated in train mode only."""
        return self.call(params, state, [x], train, key)

    def call(
        self,
        params: Params,
        state: State,
        xs: Sequence[PyTree],
        train: bool,
        key: Key | None,
    ) -> tuple[PyTree, State]:
        """Flax's apply with any number of arguments."""
        # Flax falls back to the "params" stream for every stream not named.
        rngs = {"params": key} if train and key is not None else None
        call = functools.partial(
            self.fn.apply, {"params": params, **state}, *xs, rngs=rngs
        )
        if not (train and state):
            return call(**self._mode(train)), state
        y, updated = call(mutable=list(state), **self._mode(train))
        return y, {**state, **updated}

    def draw(self, x: PyTree, key: jax.Array) -> tuple[Params, State]:
        """Flax's initial variables, split, of the shapes of `x` alone."""
        variables = dict(self.fn.lazy_init(key, x, **self._mode(False)))
        return variables.pop("params", {}), variables

    def _mode(self, train: bool) -> dict[str, bool]:
        return {mode: _MODES[mode](train) for mode in self.modes}


_drawn = jax.jit(Linen.draw, static_argnums=(0, 1))  # jax remembers its traces


class Variables(Function):
    """An object with Flax's two methods, `init(key, x)` and `apply(variables, x)`."""

    def __init__(self, fn: InitApply):
        super().__init__(fn, canonical(fn), type(fn).__name__)

    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """Variables split into `params` and the other collections."""
        variables = dict(self.fn.init(key, _zeros(x)))
        return variables.pop("params", {}), variables

    def apply(
        self, params: Params, state: State, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, State]:
        """`fn.apply({"params": params, **state}, x)`."""
        del train, key
        return self.fn.apply({"params": params, **state}, x), state


class Pair(Function):
    """Two plain functions: `init(key, x) -> params` and `apply(params, x) -> y`."""

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any]):
        super().__init__((init, apply), canonical((init, apply)), _function_name(apply))

    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """All that `init` returns counts as parameters."""
        return self.fn[0](key, _zeros(x)), {}

    def apply(
        self, params: Params, state: State, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, State]:
        """`apply(params, x)`."""
        del train, key
        return self.fn[1](params, x), state


@functools.singledispatch
def as_function(fn: Layer) -> Function:
    """Bring whatever an arc was given into normal form.

    Args:
        fn: A Flax Linen module, a function `x -> y`, a pair `(init, apply)`, an object
            with these two methods, or a graph.

    Returns:
        A function with `init(key, x)` and `apply(params, state, x, train, key)`.

    Raises:
        TypeError: If `fn` is none of these.

    Example:
        >>> import flax.linen as nn
        >>> as_function(nn.Dense(3)) == as_function(nn.Dense(3, name="readout"))
        True
    """
    if isinstance(fn, InitApply) and not isinstance(fn, type):
        return Variables(fn)
    if callable(fn) and not isinstance(fn, type):
        return Plain(fn)
    raise TypeError(
        f"an arc carries a Flax Linen module, a function x -> y, a pair (init, apply) "
        f"or a Graph; got {fn!r} of type {type(fn).__name__}"
        + (": write it with brackets, to make an instance" * isinstance(fn, type))
    )


@as_function.register
def _(fn: Function) -> Function:
    return fn


@as_function.register
def _(fn: nn.Module) -> Function:
    return Linen(fn)


@as_function.register
def _(fn: tuple) -> Function:
    if len(fn) != 2 or not all(map(callable, fn)):
        raise TypeError(f"a pair (init, apply) of two functions was expected, got {fn}")
    return Pair(*fn)


def identity(x: PyTree) -> Any:
    """The function of a skip arc: `x -> x`."""
    return x


def flatten(x: jax.Array) -> jax.Array:
    """`[B, ...] -> [B, features]`.

    Example:
        >>> import jax.numpy as jnp
        >>> flatten(jnp.ones((2, 8, 8, 1))).shape
        (2, 64)
    """
    return x.reshape(x.shape[0], -1)


def describe(fn: Layer) -> str:
    """One readable line: a module with the fields that differ from their defaults.

    Example:
        >>> import flax.linen as nn
        >>> describe(nn.Conv(8, (3, 3), use_bias=False))
        'Conv(8, (3, 3), use_bias=False)'
    """
    if isinstance(fn, nn.Module):
        shown = [_shown(fn, f) for f in fn.__dataclass_fields__.values() if f.init]
        return f"{type(fn).__name__}({', '.join(filter(None, shown))})"
    if isinstance(fn, tuple):
        return _function_name(fn[1])
    named = isinstance(fn, functools.partial) or hasattr(fn, "__name__")
    return _function_name(fn) if named else repr(fn)


def _shown(module: nn.Module, field: Any) -> str:
    value = getattr(module, field.name, None)
    if field.name in ("name", "parent") or canonical(value) == canonical(field.default):
        return ""
    text = describe(value) if callable(value) else repr(value)
    required = field.default is dataclasses.MISSING
    return text if required else f"{field.name}={text}"


def _unset(module: nn.Module, mode: str) -> bool:
    return getattr(module, mode, None) is None


def _zeros(x: PyTree) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)


def _function_name(fn: Layer) -> str:
    fn = fn.func if isinstance(fn, functools.partial) else fn
    name = getattr(fn, "__name__", type(fn).__name__)
    return "function" if name == "<lambda>" else name
