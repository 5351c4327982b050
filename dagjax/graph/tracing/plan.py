"""A function traced at given shapes, cut into parts that can be evaluated."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
from jax.extend import core

from dagjax.graph.tracing import nodes
from dagjax.graph.tracing.code import Code, LeafIndex, Shared
from dagjax.graph.tracing.cut import Cut, Piece, cut
from dagjax.graph.tracing.flow import Flow, Value
from dagjax.graph.tracing.naming import Names, Unique, path_of
from dagjax.jaxprs.canonical import canonical
from dagjax.jaxprs.fingerprint import fingerprint
from dagjax.jaxprs.messages import TraceError, line_of, name_of, traced
from dagjax.jaxprs.primitives import MOVES, is_elementwise, is_key
from dagjax.jaxprs.program import (
    PLAIN,
    REMAT,
    Equation,
    Program,
    jaxpr_of,
    program_of,
)
from dagjax.jaxprs.unroll import unrolled
from dagjax.types import PyTree, State

if TYPE_CHECKING:
    from dagjax.graph.tracing.traced_function import TracedFunction

Granularity = str | Callable[[str], Hashable]
_CHOICES = {
    "primitives": nodes.primitives,
    "layers": nodes.layers,
    "blocks": nodes.blocks,
}


class Plan:
    """A program traced at given shapes, its nodes chosen and its pieces named.

    Args:
        function: What is traced.
        known: Digests of the arrays that the function closes over at other shapes.
    """

    def __init__(self, function: TracedFunction, known: Sequence[str] | None = None):
        closed, shapes = traced(function.fn, function.args)
        self.function = function
        self.program = program_of(
            unrolled(closed) if function.unroll else closed, entered=PLAIN | REMAT
        )
        self._codes: dict[str, Code] = {}
        self._merges: dict[str, Code] = {}
        self._parts: dict[Hashable, Code] = {}
        self._consts = dict(self.program.consts)
        self.program.consts.update(dict.fromkeys(self.program.consts))
        self.digests = [*map(_digest, self._consts.values())]
        self.result, self.new_state = _results(shapes, function.state)
        ends = len(jax.tree.leaves(self.result))
        self.outvars = self.program.outvars[:ends]
        self.state_outvars = self.program.outvars[ends:]
        places = dict(zip(self._consts, self.digests, strict=True))
        self.leaf_of = _leaf_indices(
            self.program, function, places, known or self.digests
        )
        self.own = {v: x for v, x in self._consts.items() if v not in self.leaf_of}
        self.inputs = [v for v in self.program.invars if v not in self.leaf_of]
        held = [v for v, leaf in self.leaf_of.items() if leaf.tree != "keys"]
        held += self.own
        self.flow = Flow(self.program, self.inputs, held, self.outvars)
        self._check()
        self.cut, self.names = _named(self, function.granularity)
        self.piece_of = {name: piece for piece, name in self.names.pieces.items()}
        self.value_of = {name: value for value, name in self.names.nodes.items()}

    def release(self) -> list[PyTree]:
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
        inputs = self.program.invars[-len(jax.tree.leaves(self.function.inputs)) :]
        return [i for i, v in enumerate(inputs) if v in self.leaf_of]

    @functools.cached_property
    def outline(self) -> dict[str, tuple[PyTree, ...]]:
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

    def whole_arc(self, name: str) -> Code:
        """An arc with all that it evaluates, also what other parts need too."""
        piece = self.piece_of[name]
        return self._code(self.cut.work(piece), [piece.source], [piece.end], ())

    def whole_merge(self, node: str) -> Code:
        """A merge with all that it evaluates, also what other parts need too."""
        ports, equations = self.cut.merges[self.value_of[node]]
        return self._code(equations, ports, [self.value_of[node]], ())

    @functools.cached_property
    def update(self) -> tuple[Code, list[str]]:
        """What makes the new state, and the nodes that it is made of."""
        work = self._updating
        read = dict.fromkeys([v for e in work for v in e.reads] + self.state_values)
        values = [v for v in read if v in self.names.nodes]
        code = self._code(work, values, self.state_outvars)
        return code, [self.names.nodes[v] for v in values]

    @functools.cached_property
    def _updating(self) -> list[Equation]:
        return self.flow.cone(self.state_values, {*self.cut.nodes})

    @functools.cached_property
    def _shared(self) -> frozenset[Equation]:
        """Equations that several arcs, merges or the new state need.

        A scan of two results is one of them: its arcs would run it twice. What only
        shapes a value is not: it is cheap, and compilers merge it.
        """
        parts = [*map(self.cut.work, self.cut.pieces), self._updating]
        parts += [join.equations for join in self.cut.merges.values()]
        times = Counter(
            e for part in parts for e in part if not is_elementwise(e, True)
        )
        return frozenset(e for e, n in times.items() if n > 1)

    @property
    def state_values(self) -> list[Value]:
        """The variables of the new state."""
        return [v for v in self.state_outvars if not isinstance(v, core.Literal)]

    def _code(
        self,
        work: Sequence[Equation],
        values: Sequence[Value],
        ends: Sequence[PyTree],
        shared: Collection[Equation] | None = None,
    ) -> Code:
        """What evaluates `ends` of `values`.

        Args:
            work: The equations between them.
            values: Given.
            ends: Variables or literals.
            shared: The equations whose results others need too; by default all such.
        """
        apart = [e for e in work if e in (self._shared if shared is None else shared)]
        known = [v for v in ends if not isinstance(v, core.Literal)]
        if apart:
            stops = {*values}.union(*(e.eqn.outvars for e in apart))
            work = self.flow.cone(known, stops)
        read = dict.fromkeys([v for e in work for v in e.reads] + known)
        wanted = read.keys() - {*values}
        parts = [self._part(e, values, wanted) for e in apart]
        given = [v for e in apart for v in e.eqn.outvars if v in wanted]
        leaves = [v for v in read if v in self.leaf_of]
        own = [v for v in read if v in self.own]
        invars = [*values, *given, *leaves, *own]
        closed = jaxpr_of(self.program.jaxpr, work, invars, [*ends])
        return Code(
            closed,
            tuple(self.leaf_of[v] for v in leaves),
            tuple(self.own[v] for v in own),
            tuple(part for part in parts if part.results),
        )

    def _part(
        self, equation: Equation, values: Sequence[Value], wanted: Collection[Value]
    ) -> Shared:
        """A shared equation, for a part that has some values and wants others."""
        made = equation.eqn.outvars
        work = self.flow.cone(made, {*values})
        read = {v for e in work for v in e.reads}
        places = tuple(i for i, v in enumerate(values) if v in read)
        key = (equation, *(values[i] for i in places))
        if key not in self._parts:
            others = self._shared - {equation}
            self._parts[key] = self._code(work, key[1:], made, others)
        results = tuple(i for i, v in enumerate(made) if v in wanted)
        return Shared(key, self._parts[key], places, results)

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
                f"the output {path_of(path)} of {name_of(self.function.fn)} "
                f"({shape.dtype}{list(shape.shape)}) does not depend on the inputs"
                f"{where}; return it apart, or make what it depends on an input"
            )


def _results(shapes: PyTree, state: State) -> tuple[Any, Any]:
    """The result without the new state, and the new state, None if there is none."""
    if state is None or type(shapes) is not tuple or len(shapes) != 2:
        return shapes, None
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    same = jax.tree.structure(shapes[1]) == jax.tree.structure(state)
    return shapes if same and kinds(shapes[1]) == kinds(state) else (shapes, None)


def _leaf_indices(
    program: Program,
    function: TracedFunction,
    consts: dict[Value, str],
    known: Sequence[str],
) -> dict[Value, LeafIndex]:
    """Where each leaf is found: in the parameters, or in a part of the state."""
    leaf_of: dict[Value, LeafIndex] = {}
    invars = iter(program.invars)
    for name, tree in (("params", function.params), ("user", function.state)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for index, (path, _) in enumerate(leaves):
            leaf_of[next(invars)] = LeafIndex(name, index, path_of(path))
    keys = [v for v in invars if _is_key(program, v)]
    leaf_of |= {v: LeafIndex("keys", i, str(i)) for i, v in enumerate(keys)}
    for v, digest in consts.items():
        if digest in known:
            index = known.index(digest)
            leaf_of[v] = LeafIndex("consts", index, str(index))
    return leaf_of


def _digest(x: PyTree) -> str:
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
    parameters = {v: s.path for v, s in plan.leaf_of.items() if s.tree == "params"}
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
    inputs = plan.function.inputs
    known = _argument_names(plan.function)
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


def _argument_names(function: TracedFunction) -> list[str]:
    skip = len(function.args) - len(function.inputs)
    try:
        known = [*inspect.signature(function.fn).parameters.values()][skip:]
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in known if p.kind in kinds]
