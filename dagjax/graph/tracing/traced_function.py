"""A traced function with its plans, one for each batch size that was met."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from dagjax.graph.tracing.code import Leaves
from dagjax.graph.tracing.plan import Granularity, Plan
from dagjax.jaxprs.canonical import canonical
from dagjax.jaxprs.fingerprint import rules
from dagjax.jaxprs.messages import TraceError, name_of
from dagjax.jaxprs.primitives import is_key
from dagjax.jaxprs.versions import current_mesh, tracing_for
from dagjax.types import Params, PyTree, State

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class TracedFunction:
    """A function with its plans, one for each batch size that was met.

    Two are equal if the same function (its code and what it closes over) was traced at
    the same shapes to the same equations. Of params, state and inputs it has shapes.
    """

    fn: Callable[..., Any]  # of params and inputs, with state between unless it is None
    params: Params
    state: State
    inputs: tuple[PyTree, ...]
    granularity: Granularity  # which values become nodes
    unroll: bool  # whether loops of known length are written out
    _mesh: Any = dataclasses.field(default_factory=current_mesh, init=False)

    @property
    def args(self) -> tuple[PyTree, ...]:
        """The arguments of the function."""
        state = () if self.state is None else (self.state,)
        return (self.params, *state, *self.inputs)

    @functools.cached_property
    def base(self) -> Plan:
        """The plan at the shapes that were given."""
        return Plan(self)

    @functools.cached_property
    def batch(self) -> int | None:
        """The size of the first axis of the first input that has one, or None."""
        arrays = [x for x in jax.tree.leaves(self.inputs) if not is_key(x)]
        return next((x.shape[0] for x in arrays if x.shape), None)

    @functools.cached_property
    def _plans(self) -> dict[int | None, Plan]:
        return {self.batch: self.base}

    @functools.cached_property
    def _shapes(self) -> tuple[str, ...]:
        return tuple(str(v.aval) for v in self.base.program.invars)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self._shapes, self.base.fingerprint))

    @functools.cached_property
    def _trees(self) -> dict[str, tuple[Any, Any]]:
        parts = {"params": self.params, "user": self.state}
        return {name: (tree, jax.tree.structure(tree)) for name, tree in parts.items()}

    def leaves(self, params: Params, state: State) -> Leaves:
        """Those of the parameters and of each part of the state, in traced order."""
        trees = {"params": params, **state}
        blank = (None, None)
        return {
            name: _aligned(*self._trees.get(name, blank), tree)
            for name, tree in trees.items()
        }

    @functools.cached_property
    def key(self) -> Hashable:
        """What is compared; of a large function it takes a while, its hash does not."""
        return (
            self._shapes, canonical(self.fn), self.base.fingerprint,
            rules(self.base.program), jax.tree.structure(self.args),
            canonical(self.granularity),
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, TracedFunction):
            return self is other
        return self._hash == other._hash and self.key == other.key

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, object]) -> TracedFunction:
        return self  # frozen, and jaxprs do not copy

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.fn, self.params, self.state, self.inputs
        again = (*fields, self.granularity, self.unroll)
        return TracedFunction, again  # jaxprs do not pickle: traced again

    def plan(self, shape_in: Callable[[Plan], Shape], new: Shape, what: str) -> Plan:
        """The plan in which values (`what`, in words) have the shape `new`.

        `shape_in` gives their shape in a plan; of several values one after the other.

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
            f"{what} has the shape {list(new)}; {name_of(self.fn)} was traced "
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
            function = self._resized(batch, raw)
            with tracing_for(self._mesh):  # not for the one of this call
                plan = Plan(function, self.base.digests)
            plan.release()
            self._check(plan, batch)
            self._plans[batch] = plan
        return self._plans[batch]

    def _check(self, plan: Plan, batch: int) -> None:
        ours, theirs = self.base.outline, plan.outline
        if differing := sorted({*ours.items()} ^ {*theirs.items()}):
            name = differing[0][0]
            raise TraceError(
                f"the graph of {name_of(self.fn)} depends on the batch size: "
                f"arc {name!r} is {ours.get(name)} at batch size {self.batch} and "
                f"{theirs.get(name)} at {batch} (source, target, port, work); trace it "
                "again for this size"
            )

    def _batches(self, old: Shape, new: Shape) -> list[int]:
        """Batch sizes that may explain why a value has another shape now."""
        if len(old) != len(new) or not self.batch:  # an axis of size 1 may be dropped
            return [*new[:1]] if self.batch is not None else []
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        sizes = {b * self.batch / a if a else -1 for a, b in pairs}
        return [int(n) for n in sizes if len(sizes) == 1 and n >= 0 and n == int(n)]

    def _resized(self, batch: int, keys: set[int]) -> TracedFunction:
        """The function at another batch size."""

        def resized(place: int, x: PyTree) -> PyTree:
            same = x.shape[:1] != (self.batch,) or (place in keys and not is_key(x))
            return x if same else x.update(shape=(batch, *x.shape[1:]))

        leaves, tree = jax.tree.flatten(self.inputs)
        inputs = tree.unflatten([resized(i, x) for i, x in enumerate(leaves)])
        return dataclasses.replace(self, inputs=inputs)


def _aligned(traced: Any, form: Any, tree: Any) -> list[PyTree]:
    """Leaves in the order of the traced tree; a tree with more of them is no harm."""
    leaves, here = jax.tree.flatten(tree)
    if traced is None or form == here:
        return leaves
    leaf_at = dict(jax.tree_util.tree_leaves_with_path(tree))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(traced)]
    return [leaf_at.get(path) for path in paths]
