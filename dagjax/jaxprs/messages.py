"""What cannot be traced, said with the line of the user's function."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax
import jax

from dagjax.jaxprs.versions import Eqn

_OURS = str(Path(__file__).parents[1])
_LIBRARIES = (_OURS, *(str(Path(m.__file__ or "").parent) for m in (jax, flax)))
_FLOW = (
    "Python needs the value itself here (if, while, float(), int(), ...): use "
    "jnp.where, jax.lax.cond, or a static argument (functools.partial)"
)


class TraceError(ValueError):
    """A function that cannot be traced; the message names its line."""


class TraceWarning(UserWarning):
    """Something about a traced function that is likely not meant."""


def traced(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The jaxpr of a function and the shapes of its result; nothing is computed.

    Raises:
        TraceError: If tracing fails, or the function has side effects.
    """
    fresh = lambda *args: fn(*args)  # jax would remember what fn was before
    try:
        closed, shapes = jax.make_jaxpr(fresh, return_shape=True)(*args)
    except TraceError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = _user_line((f.filename, f.lineno, f.name) for f in reversed(frames))
        hint = _hint(error)
        raise TraceError(
            f"{name_of(fn)} cannot be traced{at}: {_first(error)}{hint}"
        ) from error
    if not jax.tree.leaves(shapes):
        raise TraceError(f"{name_of(fn)} returns no array; return what it computes")
    equations: list[Any] = [*closed.jaxpr.eqns]  # of other types by version of jax
    for eqn in equations:
        if eqn.effects:
            raise TraceError(
                f"{name_of(fn)} has a side effect{line_of(eqn)}: "
                f"{eqn.primitive.name}; an arc is a pure function, remove it"
            )
    return closed, shapes


def line_of(eqn: Eqn) -> str:
    """` at file:line (function)` of the user's code that made an equation."""
    found = eqn.source_info.traceback
    frames = found.frames if found is not None else ()
    return _user_line((f.file_name, f.line_num, f.function_name) for f in frames)


def name_of(fn: Any) -> str:
    """What a message calls a function."""
    return getattr(fn, "__qualname__", type(fn).__name__).replace("<lambda>", "lambda")


def _user_line(frames: Iterable[tuple[str, Any, str]]) -> str:
    for file, line, function in frames:
        if not file.startswith(_LIBRARIES) and "importlib" not in file:
            return f" at {_relative(file)}:{line} ({function})"
    return ""


def _relative(file: str) -> str:
    """A path as seen from where Python runs, if it lies below."""
    here = f"{Path.cwd()}/"
    return file.removeprefix(here)


def _first(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _hint(error: Exception) -> str:
    if isinstance(error, jax.errors.ConcretizationTypeError):
        return f"\n{_FLOW}"
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return "\nNumPy cannot read a traced value: use jax.numpy in its place"
    return ""
