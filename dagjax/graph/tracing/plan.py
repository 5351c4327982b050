"""A function traced at given shapes, cut into parts that can be evaluated."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dagjax.graph.tracing import nodes
from dagjax.graph.tracing.cut import Cut, Piece, cut
from dagjax.graph.tracing.flow import Flow, Value
from dagjax.graph.tracing.naming import Names, Unique, path_of
from dagjax.jaxprs.canonical import canonical
from dagjax.jaxprs.fingerprint import fingerprint
from dagjax.jaxprs.messages import TraceError, line_of, name_of, traced
from dagjax.jaxprs.primitives import MOVES, is_key
from dagjax.jaxprs.program import Equation, Program, jaxpr_of, program_of
from dagjax.jaxprs.unroll import unrolled

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

    @functools.cached_property
    def trees(self) -> dict[str, Any]:
        """The structures of the parameters and of the state."""
        whole = {"params": self.params, "user": self.state}
        return {name: jax.tree.structure(tree) for name, tree in whole.items()}


Leaves = dict[str, list[Any]]


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
        found = leaves[self.place] if self.place < len(leaves) else None
        if isinstance(found, np.ndarray):  # float64 is float32 here, unless x64 is on
            found = jnp.asarray(found)
        if found is not None:
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
        closed: The closed jaxpr, a function of values, of leaves, and of `held`.
        slots: Where the leaves that it reads are found.
        held: Arrays that the function made for these shapes only.
    """

    closed: Any
    slots: tuple[Slot, ...]
    held: tuple[Any, ...] = ()

    def __call__(self, leaves: Leaves, *values: Any) -> list[Any]:
        """Its outputs."""
        avals = [v.aval for v in self.closed.jaxpr.invars[len(values) :]]
        read = [
            slot.read(leaves.get(slot.tree, []), aval)
            for slot, aval in zip(self.slots, avals, strict=False)
        ]
        return core.jaxpr_as_fun(self.closed)(*values, *read, *self.held)


def leaves_of(request: Request, params: Any, state: Any) -> Leaves:
    """The leaves of the parameters and of each part of the state, in traced order."""
    trees = {"params": params, **state}
    traced = {"params": request.params, "user": request.state}
    return {
        name: _aligned(traced.get(name), request.trees.get(name), tree)
        for name, tree in trees.items()
    }


def _aligned(traced: Any, form: Any, tree: Any) -> list[Any]:
    """Leaves in the order of the traced tree; a tree with more of them is no harm."""
    leaves, here = jax.tree.flatten(tree)
    if traced is None or form == here:
        return leaves
    found = dict(jax.tree_util.tree_leaves_with_path(tree))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(traced)]
    return [found.get(path) for path in paths]


class Plan:
    """A program traced at given shapes, its nodes chosen and its pieces named.

    Args:
        request: What is traced.
        known: Digests of the arrays that the function closes over at other shapes.
    """

    def __init__(self, request: Request, known: Sequence[str] | None = None):
        closed, shapes = traced(request.fn, request.args)
        self.request = request
        self.program = program_of(
            unrolled(closed) if request.unroll else closed, through_remat=True
        )
        self._codes: dict[str, Code] = {}
        self._merges: dict[str, Code] = {}
        self._consts = dict(self.program.consts)
        self.program.consts.update(dict.fromkeys(self.program.consts))
        self.digests = [*map(_digest, self._consts.values())]
        self.result, self.new_state = _results(shapes, request.state)
        ends = len(jax.tree.leaves(self.result))
        self.outvars = self.program.outvars[:ends]
        self.state_outvars = self.program.outvars[ends:]
        places = dict(zip(self._consts, self.digests, strict=True))
        self.slots = _slots(self.program, request, places, known or self.digests)
        self.own = {v: x for v, x in self._consts.items() if v not in self.slots}
        self.inputs = [v for v in self.program.invars if v not in self.slots]
        held = [v for v, slot in self.slots.items() if slot.tree != "keys"]
        held += self.own
        self.flow = Flow(self.program, self.inputs, held, self.outvars)
        self._check()
        self.cut, self.names = _named(self, request.granularity)
        self.piece_of = {name: piece for piece, name in self.names.pieces.items()}
        self.value_of = {name: value for value, name in self.names.nodes.items()}

    def release(self) -> list[Any]:
        """The arrays that the function closed over, which the plan lets go."""
        held, self._consts = self._consts, {}
        return [*held.values()]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the program."""
        return fingerprint(self.program)

    @property
    def structure(self) -> dict[str, tuple[str, str, int | None]]:
        """`{arc: (source, target, port)}`."""
        called = self.names.nodes
        return {
            name: (called[p.source], called[p.target], p.port)
            for p, name in self.names.pieces.items()
        }

    @functools.cached_property
    def key_places(self) -> list[int]:
        """Where the keys stand among the leaves of the inputs."""
        inputs = self.program.invars[-len(jax.tree.leaves(self.request.inputs)) :]
        return [i for i, v in enumerate(inputs) if v in self.slots]

    @functools.cached_property
    def outline(self) -> dict[str, tuple[Any, ...]]:
        """`{arc: (source, target, port, work)}`, work without moving entries."""

        def work(name: str) -> str:
            equations = self.cut.work(self.piece_of[name])
            data = [e.name for e in equations if e in self.flow.operands]
            return " > ".join(name for name in data if name not in MOVES)

        return {name: (*ends, work(name)) for name, ends in self.structure.items()}

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
        own = [v for v in read if v in self.own]
        closed = jaxpr_of(self.program.jaxpr, work, [*values, *leaves, *own], [*ends])
        slots = tuple(self.slots[v] for v in leaves)
        return Code(closed, slots, tuple(self.own[v] for v in own))

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
    if state is None or type(shapes) is not tuple or len(shapes) != 2:
        return shapes, None
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    same = jax.tree.structure(shapes[1]) == jax.tree.structure(state)
    return shapes if same and kinds(shapes[1]) == kinds(state) else (shapes, None)


def _slots(
    program: Program, request: Request, consts: dict[Value, str], known: Sequence[str]
) -> dict[Value, Slot]:
    """Where each leaf is found: in the parameters, or in a part of the state."""
    slots: dict[Value, Slot] = {}
    invars = iter(program.invars)
    for name, tree in (("params", request.params), ("user", request.state)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for place, (path, _) in enumerate(leaves):
            slots[next(invars)] = Slot(name, place, path_of(path))
    keys = [v for v in invars if _is_key(program, v)]
    slots |= {v: Slot("keys", i, str(i)) for i, v in enumerate(keys)}
    for v, digest in consts.items():
        if digest in known:
            place = known.index(digest)
            slots[v] = Slot("consts", place, str(place))
    return slots


def _digest(x: Any) -> str:
    """The same for equal arrays."""
    return str(id(x)) if isinstance(x, jax.core.Tracer) else str(canonical(x))


def _is_key(program: Program, value: Value) -> bool:
    """Whether an argument is a random key, typed or of the older kind."""
    if is_key(value.aval):
        return True
    users = {e.name for e in program.equations if value in e.reads}
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
    unique, inputs = Unique(), _input_paths(plan)
    called = {v: unique(inputs[v]) for v in plan.inputs}
    results = jax.tree_util.tree_leaves_with_path(plan.result)
    paths = [path_of(path) for path, _ in results]
    outputs = {
        v: unique(f"out/{path}" if len(paths) > 1 else "out")
        for v, path in dict(zip(plan.outvars, paths, strict=True)).items()
        if v not in called
    }
    return Names(taken, parameters, called, outputs)


def _input_paths(plan: Plan) -> dict[Value, str]:
    """The names of the function's arguments, with the paths inside them."""
    inputs = plan.request.inputs
    known = _argument_names(plan.request)
    alone = ["x"] if len(plan.inputs) == 1 else []
    spare = alone + [f"x{i}" for i in range(len(alone), len(inputs))]
    called = [*known, *spare[len(known) :]][: len(inputs)]
    paths = [
        "/".join([name, *filter(None, [path_of(path)])])
        for name, tree in zip(called, inputs, strict=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    first = len(plan.program.invars) - len(paths)
    return dict(zip(plan.program.invars[first:], paths, strict=True))


def _argument_names(request: Request) -> list[str]:
    skip = len(request.args) - len(request.inputs)
    try:
        known = [*inspect.signature(request.fn).parameters.values()][skip:]
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in known if p.kind in kinds]
