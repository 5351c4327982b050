"""Parts of a traced function that can be evaluated, each once in a call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.jaxprs.interpret import run_closed
from dagjax.jaxprs.messages import TraceError
from dagjax.jaxprs.versions import trace_state
from dagjax.types import PyTree

Leaves = dict[str, list[PyTree]]


class LeafIndex(NamedTuple):
    """Where a leaf is found."""

    tree: str  # "params", or a part of the state
    position: int  # among the leaves of that tree
    path: str  # in that tree

    def read(self, leaves: Sequence[PyTree], aval: Any) -> jax.Array:
        """The leaf.

        Raises:
            TraceError: If it is not there, or of another kind than in the trace.
        """
        leaf = leaves[self.position] if self.position < len(leaves) else None
        if isinstance(leaf, np.ndarray):  # float64 is float32 here, unless x64 is on
            leaf = jnp.asarray(leaf)
        if leaf is not None:
            got = f"{leaf.dtype}{list(leaf.shape)}"
            if isinstance(leaf, jax.ShapeDtypeStruct):
                got = f"only a shape, {got}"
            elif (leaf.shape, leaf.dtype) == (aval.shape, aval.dtype):
                return leaf
        else:
            got = "nothing"
        raise TraceError(
            f"{self.tree}: {self.path!r} was {aval.str_short()} when the function was "
            f"traced, and now there is {got}; give the network a tree like the one "
            "that was traced (dag.replace), or trace it again"
        )


class CallContext:
    """What the arcs and merges of one call share.

    The plan is None where not all inputs are there; among the leaves are the keys of
    the call, in place of those of the trace.
    """

    def __init__(self, plan: Any, leaves: Leaves):
        self.plan, self.leaves = plan, leaves
        self._results: dict[Hashable, tuple[Sequence[PyTree], Any, Any]] = {}

    def once(
        self, key: Hashable, values: Sequence[PyTree], compute: Callable[[], Any]
    ) -> jax.Array:
        """What was computed of the very same arrays before, else computed now.

        Only where the same transformation traces it: what `vmap` or `jit` makes inside
        an arc is of no use outside.
        """
        given, state, result = self._results.get(key, ((), None, None))
        alike = len(given) == len(values) and all(map(operator.is_, given, values))
        if state is None or not alike or state != trace_state():
            result = compute()
            self._results[key] = ([*values], trace_state(), result)
        return result


class Shared(NamedTuple):
    """An equation that several arcs or merges need, evaluated once for all of them."""

    key: Hashable  # which equation, of which values
    code: Code
    reads: tuple[int, ...]  # which of the values of the part that needs it
    results: tuple[int, ...]  # which of its results that part needs

    def __call__(self, context: CallContext, values: Sequence[PyTree]) -> list[PyTree]:
        """The results that are needed."""
        xs = [values[i] for i in self.reads]
        ys = context.once(self.key, xs, lambda: self.code(context, *xs))
        return [ys[i] for i in self.results]


class Code(NamedTuple):
    """A part of a program that can be evaluated."""

    closed: Any  # jaxpr of values, then of what the next three fields give
    leaves: tuple[LeafIndex, ...]
    held: tuple[PyTree, ...] = ()  # arrays that the function made for these shapes
    shared: tuple[Shared, ...] = ()  # what other parts of the program need too

    def __call__(self, context: CallContext, *values: PyTree) -> list[PyTree]:
        """Its outputs."""
        given = [y for part in self.shared for y in part(context, values)]
        avals = [v.aval for v in self.closed.jaxpr.invars[len(values) + len(given) :]]
        read = [
            leaf.read(context.leaves.get(leaf.tree, []), aval)
            for leaf, aval in zip(self.leaves, avals, strict=False)
        ]
        return run_closed(self.closed, [*values, *given, *read, *self.held])
