"""A traced function at given shapes, cut into parts that can be evaluated."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from dagjax.graph.tracing import nodes
from dagjax.graph.tracing.cut import Cut, Piece, cut
from dagjax.graph.tracing.errors import TraceError, line_of, name_of, traced
from dagjax.graph.tracing.fingerprint import fingerprint
from dagjax.graph.tracing.flatten import Equation, Flat, flatten, program
from dagjax.graph.tracing.flow import Flow, Value
from dagjax.graph.tracing.naming import Names, path_of
from dagjax.graph.tracing.unroll import unrolled

Granularity = str | Callable[[str], Hashable]
_CHOICES = {
    "primitives": nodes.primitives,
    "layers": nodes.layers,
    "blocks": nodes.blocks,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What is to be traced.

    Args:
        fn: `fn(params, *inputs)`, or with `state` in second place.
        params: Shapes.
        state: Shapes, or None.
        inputs: Shapes; a tuple.
        granularity: Which values become nodes.
        unroll: Whether loops of known length are written out.
    """

    fn: Callable[..., Any]
    params: Any
    state: Any
    inputs: tuple[Any, ...]
    granularity: Granularity
    unroll: bool

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the function."""
        held = () if self.state is None else (self.state,)
        return (self.params, *held, *self.inputs)


class Slot(NamedTuple):
    """Where a leaf is found.

    Args:
        tree: "params", or a part of the state.
        place: Among the leaves of that tree.
        path: In that tree.
    """

    tree: str
    place: int
    path: str

    def read(self, leaves: Sequence[Any], aval: Any) -> Any:
        """The leaf.

        Raises:
            TraceError: If it is not there, or of another kind than in the trace.
        """
        if self.place < len(leaves):
            found = leaves[self.place]
            got = f"{found.dtype}{list(found.shape)}"
            if isinstance(found, jax.ShapeDtypeStruct):
                got = f"only a shape, {got}"
            elif (found.shape, found.dtype) == (aval.shape, aval.dtype):
                return found
        else:
            got = "nothing"
        raise TraceError(
            f"{self.tree}: {self.path!r} was {aval.str_short()} when the function was "
            f"traced, and now there is {got}; give the network a tree like the one "
            "that was traced (dag.replace), or trace it again"
        )


class Code(NamedTuple):
    """A part of a program that can be evaluated.

    Args:
        closed: The closed jaxpr, a function of values and then of leaves.
        slots: Where the leaves that it reads are found.
    """

    closed: Any
    slots: tuple[Slot, ...]

    def __call__(self, params: Any, state: Any, *values: Any) -> list[Any]:
        """Its outputs."""
        trees = {"params": params, **state}
        needed = {slot.tree for slot in self.slots}
        leaves = {tree: jax.tree.leaves(trees.get(tree)) for tree in needed}
        avals = [v.aval for v in self.closed.jaxpr.invars]
        read = [
            slot.read(leaves[slot.tree], aval)
            for slot, aval in zip(self.slots, avals[len(values) :], strict=True)
        ]
        return core.jaxpr_as_fun(self.closed)(*values, *read)


class Plan:
    """A program traced at given shapes, its nodes chosen and its pieces named."""

    def __init__(self, request: Request):
        closed, shapes = traced(request.fn, request.args)
        self.request = request
        self.flat = flatten(unrolled(closed) if request.unroll else closed)
        self._codes: dict[str, Code] = {}
        self._merges: dict[str, Code] = {}
        self._consts = [*self.flat.consts.values()]
        self.flat.consts.update(dict.fromkeys(self.flat.consts))
        self.result, self.new_state = _results(shapes, request.state)
        ends = len(jax.tree.leaves(self.result))
        self.outvars = self.flat.outvars[:ends]
        self.state_outvars = self.flat.outvars[ends:]
        self.slots = _slots(self.flat, request)
        self.inputs = [v for v in self.flat.invars if v not in self.slots]
        held = [v for v, slot in self.slots.items() if slot.tree != "keys"]
        self.flow = Flow(self.flat, self.inputs, held, self.outvars)
        self._check()
        self.cut, self.names = _named(self, request.granularity)
        self.piece_of = {name: piece for piece, name in self.names.pieces.items()}
        self.value_of = {name: value for value, name in self.names.nodes.items()}

    def release(self) -> list[Any]:
        """The arrays that the function closed over, which the plan lets go."""
        held, self._consts = self._consts, []
        return held

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the program."""
        return fingerprint(self.flat)

    @property
    def structure(self) -> dict[str, tuple[str, str, int | None]]:
        """`{arc: (source, target, port)}`."""
        called = self.names.nodes
        return {
            name: (called[p.source], called[p.target], p.port)
            for p, name in self.names.pieces.items()
        }

    def arc(self, name: str) -> tuple[Code, Piece]:
        """What an arc evaluates."""
        piece = self.piece_of[name]
        if name not in self._codes:
            work = self.cut.work(piece)
            self._codes[name] = self._code(work, [piece.source], [piece.end])
        return self._codes[name], piece

    def merge(self, node: str) -> Code:
        """What a merge evaluates, of its ports."""
        if node not in self._merges:
            value = self.value_of[node]
            ports, equations = self.cut.merges[value]
            self._merges[node] = self._code(equations, ports, [value])
        return self._merges[node]

    @functools.cached_property
    def update(self) -> tuple[Code, list[str]]:
        """What makes the new state, and the nodes that it is made of."""
        work = self.flow.cone(self.state_values, {*self.cut.nodes})
        read = dict.fromkeys([v for e in work for v in e.reads] + self.state_values)
        values = [v for v in read if v in self.names.nodes]
        code = self._code(work, values, self.state_outvars)
        return code, [self.names.nodes[v] for v in values]

    @property
    def state_values(self) -> list[Value]:
        """The variables of the new state."""
        return [v for v in self.state_outvars if not isinstance(v, core.Literal)]

    def _code(
        self, work: Sequence[Equation], values: Sequence[Value], ends: Sequence[Any]
    ) -> Code:
        known = [v for v in ends if not isinstance(v, core.Literal)]
        read = dict.fromkeys([v for e in work for v in e.reads] + known)
        leaves = [v for v in read if v in self.slots]
        closed = program(self.flat.jaxpr, work, [*values, *leaves], [*ends])
        return Code(closed, tuple(self.slots[v] for v in leaves))

    def _check(self) -> None:
        """Whether every output depends on the inputs."""
        paths = jax.tree_util.tree_leaves_with_path(self.result)
        for (path, shape), atom in zip(paths, self.outvars, strict=True):
            variable = None if isinstance(atom, core.Literal) else atom
            if variable in self.flow.data:
                continue
            maker = self.flow.maker.get(variable)
            where = line_of(maker.eqn) if maker else ""
            raise TraceError(
                f"the output {path_of(path)} of {name_of(self.request.fn)} "
                f"({shape.dtype}{list(shape.shape)}) does not depend on the inputs"
                f"{where}; return it apart, or make what it depends on an input"
            )


def _results(shapes: Any, state: Any) -> tuple[Any, Any]:
    """The result without the new state, and the new state, None if there is none."""
    if state is None or not isinstance(shapes, tuple) or len(shapes) != 2:
        return shapes, None
    same = jax.tree.structure(shapes[1]) == jax.tree.structure(state)
    return shapes if same else (shapes, None)


def _slots(flat: Flat, request: Request) -> dict[Value, Slot]:
    """Where each leaf is found: in the parameters, or in a part of the state."""
    slots: dict[Value, Slot] = {}
    invars = iter(flat.invars)
    for name, tree in (("params", request.params), ("user", request.state)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for index, (path, _) in enumerate(leaves):
            slots[next(invars)] = Slot(name, index, path_of(path))
    keys = [v for v in invars if _is_key(flat, v)]
    for name, values in (("keys", keys), ("consts", flat.consts)):
        slots |= {v: Slot(name, i, str(i)) for i, v in enumerate(values)}
    return slots


def _is_key(flat: Flat, value: Value) -> bool:
    """Whether an argument is a random key, typed or of the older kind."""
    if jnp.issubdtype(value.aval.dtype, jax.dtypes.prng_key):
        return True
    users = {e.name for e in flat.equations if value in e.reads}
    return users == {"random_wrap"}


def _named(plan: Plan, granularity: Granularity) -> tuple[Cut, Names]:
    choose = _CHOICES.get(granularity) if isinstance(granularity, str) else nodes.layers
    if choose is None:
        raise ValueError(
            f"granularity {granularity!r}; it is one of {', '.join(_CHOICES)}, or a "
            "function that gives the group of an arc's name"
        )
    taken = cut(plan.flow, choose(plan.flow))
    names = _names(plan, taken)
    if callable(granularity):
        groups = {piece: granularity(name) for piece, name in names.pieces.items()}
        taken = cut(plan.flow, nodes.grouped(taken, groups))
        names = _names(plan, taken)
    return taken, names


def _names(plan: Plan, taken: Cut) -> Names:
    parameters = {v: s.path for v, s in plan.slots.items() if s.tree == "params"}
    results = jax.tree_util.tree_leaves_with_path(plan.result)
    outputs: dict[Value, str] = {}
    for (path, _), value in zip(results, plan.outvars, strict=True):
        name = "out" if len(results) == 1 else f"out/{path_of(path)}"
        outputs.setdefault(value, name)
    return Names(taken, parameters, _input_names(plan), outputs)


def _input_names(plan: Plan) -> dict[Value, str]:
    """The names of the function's arguments."""
    request = plan.request
    skip = len(request.args) - len(request.inputs)
    try:
        known = [*inspect.signature(request.fn).parameters.values()][skip:]
    except (TypeError, ValueError):
        known = []
    plain = [p.name for p in known if p.kind is not p.VAR_POSITIONAL]
    alone = len(plan.inputs) == 1
    spare = ["x" if alone and i == 0 else f"x{i}" for i in range(len(request.inputs))]
    called = [*plain, *spare[len(plain) :]][: len(request.inputs)]
    named = dict(zip(_unique(called), request.inputs, strict=True))
    paths = [
        "/".join([name, *filter(None, [path_of(path)])])
        for name, tree in named.items()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    first = len(plan.flat.invars) - len(paths)
    found = dict(zip(plan.flat.invars[first:], paths, strict=True))
    return {v: found[v] for v in plan.inputs}


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
