"""A traced function with its plans, one for each batch size that was met."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from dagjax.graph.tracing.plan import Plan, Request
from dagjax.jaxprs.canonical import canonical
from dagjax.jaxprs.fingerprint import rules
from dagjax.jaxprs.messages import TraceError, name_of
from dagjax.jaxprs.primitives import is_key
from dagjax.jaxprs.versions import current_mesh, tracing_for
from dagjax.types import PyTree

Shape = tuple[int, ...]


class Program:
    """A function with its plans, one for each batch size that was met.

    Two programs are equal if the same function (its code and what it closes over) was
    traced at the same shapes to the same equations.

    Args:
        request: What is traced.
    """

    def __init__(self, request: Request):
        self.request, self.base = request, Plan(request)
        self.batch, self._mesh = _batch(request), current_mesh()
        self._plans = {self.batch: self.base}
        self._shapes = tuple(str(v.aval) for v in self.base.program.invars)
        self._hash = hash((self._shapes, self.base.fingerprint))

    @functools.cached_property
    def key(self) -> Hashable:
        """What is compared; of a large function it takes a while, its hash does not."""
        return (
            self._shapes, canonical(self.request.fn), self.base.fingerprint,
            rules(self.base.program), jax.tree.structure(self.request.args),
            canonical(self.request.granularity),
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Program):
            return self is other
        return self._hash == other._hash and self.key == other.key

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, object]) -> Program:
        return self  # frozen, and jaxprs do not copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (self.request,)  # jaxprs do not pickle: traced again

    def plan(self, shape_in: Callable[[Plan], Shape], new: Shape, what: str) -> Plan:
        """The plan in which values have the shape `new`.

        Args:
            shape_in: The shape in a plan; of several values one after the other.
            new: The shape now.
            what: The values in words.

        Raises:
            TraceError: If no batch size explains the shape.
        """
        for plan in [*self._plans.values()]:
            if shape_in(plan) == new:
                return plan
        old = shape_in(self.base)
        for batch in self._batches(old, new):
            if shape_in(self.at(batch)) == new:
                return self.at(batch)
        raise TraceError(
            f"{what} has the shape {list(new)}; {name_of(self.request.fn)} was traced "
            f"where it has {list(old)}, and only the batch size may be another; trace "
            "it again with inputs of the new shapes"
        )

    def at(self, batch: int) -> Plan:
        """The plan at another batch size; the function runs again, abstractly.

        Raises:
            TraceError: If the graph is another one there.
        """
        if batch not in self._plans:
            raw = {*self.base.key_places}  # of the older kind, numbers
            request = _resized(self.request, self.batch, batch, raw)
            with tracing_for(self._mesh):  # not for the one of this call
                plan = Plan(request, self.base.digests)
            plan.release()
            self._check(plan, batch)
            self._plans[batch] = plan
        return self._plans[batch]

    def _check(self, plan: Plan, batch: int) -> None:
        ours, theirs = self.base.outline, plan.outline
        if differing := sorted({*ours.items()} ^ {*theirs.items()}):
            name = differing[0][0]
            raise TraceError(
                f"the graph of {name_of(self.request.fn)} depends on the batch size: "
                f"arc {name!r} is {ours.get(name)} at batch size {self.batch} and "
                f"{theirs.get(name)} at {batch} (source, target, port, work); trace it "
                "again for this size"
            )

    def _batches(self, old: Shape, new: Shape) -> list[int]:
        """Batch sizes that may explain why a value has another shape now."""
        if len(old) != len(new) or not self.batch:  # an axis of size 1 may be dropped
            return [*new[:1]] if self.batch is not None else []
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        found = {b * self.batch / a if a else -1 for a, b in pairs}
        return [int(n) for n in found if len(found) == 1 and n >= 0 and n == int(n)]


def _batch(request: Request) -> int | None:
    """The size of the first axis of the first input that has one; None if none has."""
    arrays = [x for x in jax.tree.leaves(request.inputs) if not is_key(x)]
    return next((x.shape[0] for x in arrays if x.shape), None)


def _resized(request: Request, old: int | None, new: int, keys: set[int]) -> Request:
    """The request with another batch size."""

    def resized(place: int, x: PyTree) -> PyTree:
        same = x.shape[:1] != (old,) or (place in keys and not is_key(x))
        return x if same else x.update(shape=(new, *x.shape[1:]))

    leaves, tree = jax.tree.flatten(request.inputs)
    inputs = tree.unflatten([resized(i, x) for i, x in enumerate(leaves)])
    return dataclasses.replace(request, inputs=inputs)
