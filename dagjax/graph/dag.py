"""The network: a static graph with its parameters and state, a pytree."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dagjax.graph.functions import Function, Params, State, as_function
from dagjax.graph.merges import Port
from dagjax.graph.topology import Arc, Graph, GraphError, Space

Values = dict[str, Any]  # {node: array, or a tuple of ports}
_MANY = 64  # equal arcs that are initialized in one call


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "state"],
    meta_fields=["graph"],
)
@dataclasses.dataclass(frozen=True)
class DAG:
    """A network as a directed acyclic graph of functions.

        h_v = b_v + sum over arcs u -> v of  gate * f(params, h_u)

    A pytree: `graph` is static, `params` are trained, `state` (statistics) is not.
    `jit`, `vmap` and checkpoints take the whole DAG; differentiate `dag.params`.

    Args:
        graph: Nodes and arcs.
        params: `{arc: parameters}`; tied arcs have one entry under their common name.
        state: `{arc: {collection: variables}}`.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
        >>> dag(jnp.ones((5, 4))).shape
        (5, 3)
        >>> loss = lambda params, x: dag.replace(params=params)(x).sum()
        >>> grads = jax.grad(loss)(dag.params, jnp.ones((5, 4)))
        >>> jax.tree.map(jnp.shape, grads["Dense"])
        {'bias': (8,), 'kernel': (4, 8)}
    """

    graph: Graph
    params: dict[str, Params]
    state: dict[str, State]

    def __call__(self, *xs: Any, gates: Mapping[str, Any] | None = None) -> Any:
        """The outputs at `xs`, in inference mode.

        Args:
            *xs: One array `[B, ...]` for each input node.
            gates: `{arc: gate}` that scale what each arc delivers; 1 where not named.

        Returns:
            The value of the output node; a tuple where there are several.
        """
        return self.apply(*xs, gates=gates)[0]

    def apply(
        self,
        *xs: Any,
        gates: Mapping[str, Any] | None = None,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[Any, dict[str, State]]:
        """Outputs and new state; `train=True` updates batch statistics, drops out.

        Args:
            *xs: One array `[B, ...]` for each input node.
            gates: `{arc: gate}`; 1 where not named.
            train: Static mode flag, handed to modules that take one.
            key: For random arcs in train mode; each arc draws from its own stream.
        """
        values, state = start(self.graph, xs), self.state
        self.graph.select(gates or ())  # names that do not exist
        for arcs in self.graph.at_level:
            values, state = sweep(
                self.graph, arcs, self.params, state, values,
                gates=gates, train=train, key=key,
            )  # fmt: skip
        outputs = tuple(read(self.graph, n, values[n]) for n in self.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs, state

    def replace(self, **changes: Any) -> DAG:
        """A copy with other fields: `dag.replace(params=params)`."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        return f"DAG({self.graph!r}, {count_params(self.params):,} parameters)"


def init(key: jax.Array, graph: Graph, *xs: Any) -> DAG:
    """Initialize every arc from the shapes of an example batch.

    Arc `a` draws from `fold_in(key, hash of the name a)`, so an arc that is deleted or
    inserted leaves the others' initial values alone. Tied arcs are initialized once.

    Args:
        key: A typed key.
        graph: The graph.
        *xs: One example `[B, ...]` for each input node; shapes and dtypes are enough.

    Returns:
        A DAG whose graph knows the space of every node.

    Raises:
        GraphError: If two arcs of a sum deliver different shapes.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> dj.init(jax.random.key(0), dj.zoo.lenet_300_100(), jnp.ones((1, 28, 28, 1)))
        DAG(Graph(4 nodes, 3 arcs, 3 levels: in -> out), 266,610 parameters)
    """
    specs = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in xs]
    values = jax.eval_shape(functools.partial(start, graph), specs)
    shapes = functools.cache(_output_shape)
    alike: dict[Any, dict[str, Any]] = {}  # what one draw can initialize
    for arc in graph.arcs:
        x = _shape_at(graph, arc.source, values)
        with _noted(arc, x):
            y = shapes(arc.fn, x)
        old = values.get(arc.target)
        _check_sum(graph, arc, old, y)
        values[arc.target] = _delivered(graph, arc, old, y)
        alike.setdefault((arc.fn, x), {}).setdefault(arc.params_name, arc)
    for node in graph.outputs:
        _shape_at(graph, node, values)
    params, state = {}, {}
    for (fn, x), arcs in alike.items():
        with _noted(next(iter(arcs.values())), x):
            for name, own, held in _drawn(key, fn, x, list(arcs)):
                params |= {name: own} if jax.tree.leaves(own) else {}
                state |= {name: held} if jax.tree.leaves(held) else {}
    order = dict.fromkeys(arc.params_name for arc in graph.arcs)
    batch = specs[0].shape[:1]
    spaces = jax.tree.map(lambda v: _space(v, batch), _values_only(values))
    return DAG(
        graph.replace(spaces=spaces),
        {name: params[name] for name in order if name in params},
        {name: state[name] for name in order if name in state},
    )


def gates(dag: DAG | Graph) -> dict[str, jax.Array]:
    """All gates open: `{arc: 1.0}`.

    Example:
        >>> import dagjax as dj
        >>> dj.gates(dj.zoo.lenet_300_100())
        {'fc1': Array(1., dtype=float32), 'fc2': ..., 'fc3': ...}
    """
    graph = dag.graph if isinstance(dag, DAG) else dag
    return {arc.name: jnp.ones(()) for arc in graph.arcs}


def inject(dag: DAG, *xs: Any) -> Values:
    """The injection `b`: inputs at the input nodes, zero at all others.

    Args:
        dag: The network.
        *xs: One array `[B, ...]` for each input node.

    Returns:
        `{node: value}`; a merge node's value is a tuple of ports.
    """
    return start(dag.graph, xs, nodes=dag.graph.nodes)


def start(
    graph: Graph, xs: Iterable[Any], nodes: Iterable[str] | None = None
) -> Values:
    """Values before level 1: the inputs, and zeros where no arc will deliver.

    Args:
        graph: The graph.
        xs: One array for each input node.
        nodes: The nodes that get zeros; by default those without in-arcs.
    """
    xs = tuple(xs)
    if len(xs) != len(graph.inputs):
        raise GraphError(
            f"the network has {len(graph.inputs)} inputs ({', '.join(graph.inputs)}), "
            f"got {len(xs)} arrays"
        )
    values: Values = dict(zip(graph.inputs, map(jnp.asarray, xs), strict=True))
    batch = values[graph.inputs[0]].shape[:1]
    fed = {(arc.target, arc.port) for arc in graph.arcs} if nodes is None else set()
    for node in graph.nodes if nodes is None else nodes:
        if node not in values:
            values[node] = _empty(graph, node, batch, fed)
    return values


def shaped(dag: DAG) -> DAG:
    """The same network, its graph with the space of every node; nothing is computed."""
    graph = dag.graph
    if not all(node in graph.space_of for node in graph.inputs):
        return dag

    def values(dag: DAG) -> Values:
        z = start(graph, [_zeros(graph, node, None, (1,)) for node in graph.inputs])
        for arcs in graph.at_level[1:]:
            z, _ = sweep(graph, arcs, dag.params, dag.state, z)
        return _values_only(z)

    found = jax.tree.map(lambda v: _space(v, (1,)), jax.eval_shape(values, dag))
    return dag.replace(graph=graph.replace(spaces=found))


def zeros(graph: Graph, batch: tuple[int, ...]) -> Values:
    """Zero at every node, the inputs too; a graph that `init` has seen knows shapes.

    Args:
        graph: The graph of a network.
        batch: `(B,)`.
    """
    return {node: _empty(graph, node, batch, set()) for node in graph.nodes}


def sweep(
    graph: Graph,
    arcs: Iterable[Arc],
    params: dict[str, Params],
    state: dict[str, State],
    values: Values,
    *,
    gates: Mapping[str, Any] | None = None,
    train: bool = False,
    key: jax.Array | None = None,
    sign: int = 1,
    onto: Values | None = None,
) -> tuple[Values, dict[str, State]]:
    """`z -> z + sign * N(z)`, N the sum of some arcs, each reading the old values.

    `onto` is what they add to, where it is not `z` itself.
    """
    new, kept = dict(values if onto is None else onto), state
    for arc in arcs:
        own, held = params.get(arc.params_name, {}), state.get(arc.params_name, {})
        random = None if key is None else jax.random.fold_in(key, stream(arc))
        x = read(graph, arc.source, values[arc.source])
        with _noted(arc, x):
            y, updated = arc.fn.apply(own, held, x, train=train, key=random)
        if updated is not held:
            kept = {**kept, arc.params_name: updated}
        gate = None if gates is None else gates.get(arc.name)
        new[arc.target] = deliver(graph, arc, new.get(arc.target), y, gate, sign)
    return new, kept


def read(graph: Graph, node: str, value: Any) -> Any:
    """What an arc sees at a node: the sum, or the merge of its ports."""
    merge = graph.merge_of.get(node)
    return value if merge is None else merge(value)


def deliver(
    graph: Graph, arc: Arc, old: Any, y: Any, gate: Any = None, sign: int = 1
) -> Any:
    """The target's value with `gate * y` added, at a port the gate to its presence."""
    if gate is not None:
        y = jnp.asarray(gate).astype(y.dtype) * y
    if arc.port is None:
        return _add(old, y, sign)
    presence = jnp.ones((), y.dtype) if gate is None else jnp.asarray(gate, y.dtype)
    ports = list(old or [Port(None, None)] * (graph.ports(arc.target) or 0))
    value, before = ports[arc.port]
    ports[arc.port] = Port(_add(value, y, sign), _add(before, presence, sign))
    return tuple(ports)


def parts_of(
    dag: DAG, arcs: Iterable[Arc]
) -> tuple[dict[str, Params], dict[str, State]]:
    """Parameters and state of some arcs."""
    names = dict.fromkeys(arc.params_name for arc in arcs)
    params, state = dag.params, dag.state
    return {n: params[n] for n in names if n in params}, {
        n: state[n] for n in names if n in state
    }


def stream(arc: Arc) -> int:
    """The number under which an arc draws its random numbers: a hash of its name."""
    return zlib.crc32(arc.name.encode())


def count_params(params: Any) -> int:
    """The number of scalars in a tree of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


class Nested(Function):
    """A graph as the function of one arc."""

    def __init__(self, graph: Graph):
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise GraphError(
                f"one arc holds a graph with one input and one output; {graph!r} has "
                f"{len(graph.inputs)} and {len(graph.outputs)}"
            )
        super().__init__(graph, graph, "block")

    def init(self, key: jax.Array, x: Any) -> tuple[Params, State]:
        """Parameters and state of the arcs inside, under their names."""
        dag = init(key, self.fn, x)
        return dag.params, dag.state

    def apply(
        self, params: Params, state: State, x: Any, *, train: bool, key: Any
    ) -> tuple[Any, State]:
        """The output of the graph inside."""
        return DAG(self.fn, params, state).apply(x, train=train, key=key)

    def __repr__(self) -> str:
        steps = []
        for row in self.fn.at_level[1:]:
            step = ", ".join(repr(arc.fn) for arc in row)
            merges = {self.fn.merge_of.get(arc.target) for arc in row} - {None}
            step = f"({step})" if len(row) > 1 else step
            steps.append(" ".join([step, *map(repr, merges)]))
        return " > ".join(steps)


@as_function.register
def _(fn: Graph) -> Function:
    alone = len(fn.arcs) == 1 and not fn.merges and fn.arcs[0].tied is None
    between = alone and (fn.inputs, fn.outputs) == (
        (fn.arcs[0].source,),
        (fn.arcs[0].target,),
    )
    return fn.arcs[0].fn if between else Nested(fn)


@contextlib.contextmanager
def _noted(arc: Arc, x: Any) -> Iterator[None]:
    """Say in which arc an error arose."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {arc!r}, whose input is {_shape(x)}")
        raise


def _output_shape(fn: Function, x: Any) -> Any:
    """The shape of what a function makes of `x`; nothing is computed."""

    def run(x: Any) -> Any:
        own, held = fn.init(jax.random.key(0), x)
        return fn.apply(own, held, x, train=False, key=None)[0]

    return jax.eval_shape(run, x)


def _drawn(
    key: jax.Array, fn: Function, x: Any, names: list[str]
) -> Iterator[tuple[str, Params, State]]:
    """Initial parameters and state of equal arcs; of very many in one call."""
    code = lambda name: zlib.crc32(name.encode())
    if len(names) < _MANY:
        for name in names:
            yield name, *fn.init(jax.random.fold_in(key, code(name)), x)
        return
    codes = np.array([code(name) for name in names], np.uint32)
    draw = lambda code: fn.init(jax.random.fold_in(key, code), x)
    drawn = jax.vmap(draw)(codes)  # not jitted: the bits of one by one
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(drawn)):
        drawn = jax.device_get(drawn)  # rows of host arrays cost nothing
    leaves, tree = jax.tree.flatten(drawn)
    for i, name in enumerate(names):
        yield name, *tree.unflatten([jnp.asarray(leaf[i]) for leaf in leaves])


def _delivered(graph: Graph, arc: Arc, old: Any, y: Any) -> Any:
    """The shape of the target's value with `y` added."""
    if arc.port is None:
        return y if old is None else jax.eval_shape(jnp.add, old, y)
    return jax.eval_shape(functools.partial(deliver, graph, arc), old, y)


def _shape_at(graph: Graph, node: str, values: Values) -> Any:
    if node not in graph.merge_of:
        return values[node]
    try:
        return jax.eval_shape(functools.partial(read, graph, node), values[node])
    except Exception as error:
        arcs = graph.arcs_into(node)
        shapes = [_shape(values[node][arc.port].value) for arc in arcs]
        given = ", ".join(
            f"{arc.name} delivers {shape} to port {arc.port}"
            for arc, shape in zip(arcs, shapes, strict=True)
        )
        raise GraphError(
            f"{graph.merge_of.get(node)!r} cannot merge at node {node!r}: {given}; "
            f"{error}"
        ) from error


def _add(old: Any, y: Any, sign: int) -> Any:
    if old is None:
        return y if sign > 0 else -y
    return old + y if sign > 0 else old - y


def _empty(graph: Graph, node: str, batch: tuple[int, ...], fed: set) -> Any:
    """Zeros where `(node, port)` is not fed, None where an arc will deliver."""
    ports = graph.ports(node)
    if ports is None:
        return None if (node, None) in fed else _zeros(graph, node, None, batch)
    return tuple(
        Port(None, None)
        if (node, port) in fed
        else Port(zeros := _zeros(graph, node, port, batch), jnp.zeros((), zeros.dtype))
        for port in range(ports)
    )


def _zeros(
    graph: Graph, node: str, port: int | None, batch: tuple[int, ...]
) -> jax.Array:
    space = graph.space_of.get(node)
    if space is None:
        raise GraphError(
            f"the shape of node {node!r} is not known; dagjax.init finds it"
        )
    space = space if port is None else space[port]
    return jnp.zeros((batch if space.batched else ()) + space.shape, space.dtype)


def _values_only(values: Values) -> Values:
    return {
        node: tuple(p.value for p in v) if isinstance(v, tuple) else v
        for node, v in values.items()
    }


def _space(value: Any, batch: tuple[int, ...]) -> Space:
    batched = bool(batch) and value.shape[:1] == batch
    return Space(value.shape[1:] if batched else value.shape, str(value.dtype), batched)


def _check_sum(graph: Graph, arc: Arc, old: Any, y: Any) -> None:
    if not hasattr(y, "shape"):
        raise GraphError(f"{arc!r} must return one array, got {type(y).__name__}")
    if arc.port is None and old is not None and old.shape != y.shape:
        others = [a.name for a in graph.arcs_into(arc.target) if a.name != arc.name]
        raise GraphError(
            f"node {arc.target!r} sums different shapes: {', '.join(others)} deliver "
            f"{old.shape}, {arc.name} delivers {y.shape}; give the odd one a projection"
        )


def _shape(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else str(x)
