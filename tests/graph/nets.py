"""Networks to test on: a small zoo, random DAGs, oracles, twins written in Flax.

The oracle is the definition and nothing else: memoized recursion over
`h_v = b_v + sum of gate * f(h_u)` in numpy, with merges and the functions of random
DAGs in numpy too. Twins are the ordinary Flax way to write a network of the zoo.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import dagjax as dj
from dagjax.graph.core.merges import Port
from tests.sweeps import mostly, seldom

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
DTYPES = tuple(TOLERANCE)
BATCH = 2


def precision(dtype: str):
    """Within it arrays may have this dtype."""
    stack = contextlib.ExitStack()
    if dtype == "float64":
        stack.enter_context(jax.enable_x64(True))
        # Flax initializes in float32 and promotes; the strict mode forbids that.
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
    return stack


def distance(got: Any, want: Any, scale: Any = None) -> float:
    """The largest deviation, relative to the largest value; inf if not finite."""
    got, want, scale = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        for tree in (got, want, want if scale is None else scale)
    )
    assert len(got) == len(want)
    assert all(g.shape == w.shape for g, w in zip(got, want, strict=True))
    size = 1 + max(float(np.max(np.abs(s), initial=0)) for s in scale)
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        if not (np.isfinite(g).all() and np.isfinite(w).all()):
            return np.inf
        worst = max(worst, float(np.max(np.abs(g - w), initial=0)) / size)
    return worst


def same(got: Any, want: Any) -> bool:
    """Equal trees, bit by bit."""
    if jax.tree.structure(got) != jax.tree.structure(want):
        return False
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(
        np.isfinite(g).all() and np.asarray(g).tobytes() == np.asarray(w).tobytes()
        for g, w in pairs
    )


def violates(error: float, dtype: str) -> bool:
    """A mutant is off by far more than rounding, and still finite."""
    return 30 * TOLERANCE[dtype] < error < np.inf


class Case(NamedTuple):
    """A network with inputs; `functions` are its arcs in numpy, where there are any."""

    dag: dj.DAG
    xs: tuple[Any, ...]
    dtype: str
    functions: dict[str, Callable[[Any, np.ndarray], np.ndarray]]
    seed: int

    def injection(self, scale: float = 1.0, seed: int = 1) -> Any:
        """Random values at every node, in every port."""
        rng = np.random.default_rng([self.seed, seed])
        draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, self.dtype)
        return jax.tree.map(draw, dj.inject(self.dag, *self.xs))

    def gates(self, seed: int = 2) -> dict[str, Any]:
        """Random gates for all arcs."""
        rng = np.random.default_rng([self.seed, seed])
        draw = lambda: jnp.asarray(rng.uniform(0.3, 1.6), self.dtype)
        return {arc.name: draw() for arc in self.dag.graph.arcs}

    def arc(self, arc: dj.Arc, x: np.ndarray, train: bool = False, key: Any = None):
        """What the arc makes of `x`, in numpy if possible."""
        own = lambda tree: tree if arc.reads_all_params else tree.get(arc.name, {})
        params, state = own(self.dag.params), own(self.dag.state)
        if arc.name in self.functions:
            return self.functions[arc.name](jax.tree.map(np.asarray, params), x)
        stream = None
        if key is not None:
            stream = jax.random.fold_in(key, zlib.crc32(arc.name.encode()))
        y, _ = arc.fn.apply(params, state, jnp.asarray(x), train=train, key=stream)
        return np.asarray(y)

    def oracle(
        self, b: Any, gates: Any = None, train: bool = False, key: Any = None
    ) -> dict[str, Any]:
        """`{node: value}` straight from the definition."""
        graph, h = self.dag.graph, {}
        merges = dict(graph.merges)
        one = np.ones((), self.dtype)
        on = lambda arc: np.asarray((gates or {}).get(arc.name, one))

        def value(node: str) -> Any:
            if node not in h:
                ports = b[node] if node in merges else [Port(b[node], one * 0)]
                sums = [[np.asarray(v), np.asarray(p)] for v, p in ports]
                for arc in sorted(graph.arcs, key=lambda a: a.name):
                    if arc.target == node:
                        y = self.arc(arc, seen(arc.source), train, key)
                        total = sums[arc.port or 0]
                        total[0] = total[0] + on(arc) * y
                        total[1] = total[1] + on(arc)
                whole = tuple(Port(v, p) for v, p in sums)
                h[node] = whole if node in merges else whole[0].value
            return h[node]

        def seen(node: str) -> np.ndarray:
            return merged(merges.get(node), value(node))

        return {node: value(node) for node in graph.nodes}

    def outputs(self, h: dict[str, Any]) -> list[np.ndarray]:
        """What the output nodes show."""
        merges = dict(self.dag.graph.merges)
        return [merged(merges.get(n), h[n]) for n in self.dag.graph.outputs]


def merged(merge: Any, value: Any) -> np.ndarray:
    """The merges of the library, in numpy."""
    if merge is None:
        return value
    if isinstance(merge, dj.Concat):
        return np.concatenate([np.asarray(v) for v, _ in value], merge.axis)
    assert isinstance(merge, dj.Product)
    one = np.ones((), np.asarray(value[0].value).dtype)
    terms = [np.asarray(v) + (one - np.asarray(p)) for v, p in value]
    return functools.reduce(np.multiply, terms)


def fill(shapes: dj.DAG, dtype: str, seed: int = 0) -> dj.DAG:
    """Generic parameters and statistics: no zero biases, no unit variances."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:])
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100.0
        value = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        if "var" in name or "scale" in name:
            value = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def build(
    graph: dj.Graph,
    shapes: tuple[tuple[int, ...], ...],
    dtype: str = "float32",
    seed: int = 0,
    functions: dict[str, Any] | None = None,
) -> Case:
    """A network of this graph; nothing is compiled to initialize it."""
    rng = np.random.default_rng([seed, 3])
    xs = tuple(jnp.asarray(rng.normal(size=(BATCH, *s)), dtype) for s in shapes)
    dag = jax.eval_shape(lambda: dj.init(jax.random.key(0), graph, *xs))
    return Case(fill(dag, dtype, seed), xs, dtype, functions or {}, seed)


# --- the zoo, small ---------------------------------------------------------------


def noisy() -> dj.Graph:
    """Dropout and batch norm: all that differs between the modes."""
    branch = dj.block(nn.Dense(6), nn.BatchNorm(), nn.relu, nn.Dropout(0.4))
    return dj.series(
        nn.Dense(6), nn.BatchNorm(), dj.residual(branch), nn.Dropout(0.3), nn.Dense(3)
    )


def dense_block(k: int = 4) -> dj.Graph:
    """A dense block: every node reads all nodes before it."""
    b = dj.GraphBuilder()
    b.input("x0")
    for i in range(1, k + 1):
        for j in range(i):
            b.arc(f"x{j}_x{i}", f"x{j}", f"x{i}", dj.block(nn.relu, nn.Dense(5)))
    return b.build(f"x{k}")


def inception() -> dj.Graph:
    """Two modules: four branches side by side, and a product of a gate and a value."""
    branches = [dj.block(nn.Dense(w), jnp.tanh, name=f"b{w}") for w in (2, 3, 1)]
    mixed = dj.concat(*branches, dj.series(nn.Dense(4), jnp.tanh, nn.Dense(2)))
    gated = dj.product(dj.block(nn.Dense(4), nn.sigmoid, name="gate"), nn.Dense(4))
    return dj.series(mixed, nn.LayerNorm(), gated, nn.Dense(3))


def two_streams() -> dj.Graph:
    """Two inputs, two outputs, a merge of ports that are not all written."""
    b = dj.GraphBuilder()
    left, right = b.input("left"), b.input("right")
    b.merge("both", dj.Concat())
    b.arc("fc_left", left, "h", nn.Dense(4))
    b.arc("fc_right", right, "h", nn.Dense(4))
    b.arc("l", left, "both", nn.Dense(2), port=0)
    b.arc("h", "h", "both", jnp.tanh, port=1)
    b.arc("out_both", "both", "y", nn.Dense(3))
    b.arc("out_h", "h", "y", dj.block(nn.relu, nn.Dense(3)))
    return b.build(["h", "y"])


IMAGE = ((8, 8, 1),)
ZOO: dict[str, tuple[Callable[[], dj.Graph], tuple[tuple[int, ...], ...]]] = {
    "mlp": (lambda: dj.zoo.mlp((8, 6, 3), input_shape=(8, 8, 1)), IMAGE),
    "lenet_300_100": (lambda: dj.zoo.lenet_300_100(input_shape=(8, 8, 1)), IMAGE),
    "lenet5": (lambda: dj.zoo.lenet5(input_shape=(8, 8, 1)), IMAGE),
    "conv2": (lambda: dj.zoo.conv2(input_shape=(8, 8, 1)), IMAGE),
    "resnet8": (lambda: dj.zoo.resnet(8, width=4, input_shape=(8, 8, 1)), IMAGE),
    "resnet20": (lambda: dj.zoo.resnet(20, width=2, input_shape=(8, 8, 1)), IMAGE),
    "noisy": (noisy, ((5,),)),
    "dense_block": (dense_block, ((5,),)),
    "inception": (inception, ((5,),)),
    "two_streams": (two_streams, ((3,), (4,))),
}


# Every net in single precision, some in double; and few that show all there is: a
# chain, convolutions, batch norm, skips, dropout, merges, several inputs and outputs.
# ResNet-20 is ResNet-8 with more of the same blocks, two others are of the kinds of the
# perceptron and of LeNet-5.
SOAK = {"resnet20", "conv2", "lenet_300_100"}
NAMES = seldom(ZOO, SOAK)
CASES = [(name, "float32") for name in ZOO if name not in SOAK]
CASES += [(name, "float64") for name in ("mlp", "resnet8", "inception", "two_streams")]
FEW = [
    (name, dtype)
    for name, dtype in CASES
    if name in ("lenet5", "resnet8", "noisy", "dense_block", "inception", "two_streams")
    if (name, dtype) != ("resnet8", "float64")
]
CASES += mostly([(name, "float32") for name in sorted(SOAK)], ())


@functools.cache
def zoo(name: str, dtype: str = "float32") -> Case:
    """A network of the small zoo, filled; call it within `precision(dtype)`."""
    make, shapes = ZOO[name]
    return build(make(), shapes, dtype)


# --- random DAGs ------------------------------------------------------------------


class Block(nn.Module):
    """`tanh(W x + b)` between any two shapes."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        # Flax traces the initializer at every call; the cheapest one will do.
        features, zeros = int(np.prod(self.shape)), nn.initializers.zeros
        dense = nn.Dense(features, kernel_init=zeros, param_dtype=x.dtype)
        return jnp.tanh(dense(_flat(x))).reshape(x.shape[0], *self.shape)


def _flat(x: Any) -> Any:
    return x.reshape(x.shape[0], -1)


def _take(x: Any, shape: tuple[int, ...]) -> Any:
    flat = _flat(x)
    index = np.arange(int(np.prod(shape))) % flat.shape[1]
    return flat[:, index].reshape(x.shape[0], *shape)


def _linen(shape: tuple[int, ...]) -> tuple[Any, Any]:
    def twin(params, x, dense="Dense_0"):
        y = np.tanh(_flat(x) @ params[dense]["kernel"] + params[dense]["bias"])
        return y.reshape(x.shape[0], *shape)

    return Block(shape), twin


def _plain(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return lambda x: jnp.sin(_take(x, shape)), lambda _, x: np.sin(_take(x, shape))


def _pair(shape: tuple[int, ...]) -> tuple[Any, Any]:
    size = int(np.prod(shape))
    init = lambda key, x: {"w": jnp.ones((_flat(x).shape[1], size), x.dtype)}
    apply = lambda xp: lambda p, x: xp.cos(_flat(x) @ p["w"]).reshape(len(x), *shape)
    return (init, apply(jnp)), apply(np)


def _nested(shape: tuple[int, ...]) -> tuple[Any, Any]:
    _, inner = _linen(shape)
    twin = lambda params, x: np.sin(inner(params["Block"], x))
    return dj.series(Block(shape), jnp.sin), twin


def _skip(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return dj.identity, lambda _, x: x


KINDS = {"linen": _linen, "plain": _plain, "pair": _pair, "nested": _nested}


class Plan(NamedTuple):
    """A random graph, not yet filled."""

    graph: dj.Graph
    shapes: tuple[tuple[int, ...], ...]
    functions: dict[str, Any]
    seed: int

    def case(self, dtype: str) -> Case:
        """The network; call it within `precision(dtype)`."""
        return build(self.graph, self.shapes, dtype, self.seed, self.functions)


@st.composite
def plans(draw, min_depth: int = 1, max_nodes: int = 12):
    """Random DAGs of 2 to 12 nodes.

    Multi-arcs, skip arcs, several inputs and outputs, mixed shapes, sums, concats and
    products; names in random order. Arcs are bounded but for one skip a node, so that
    values stay of order 1 to 10.
    """
    n = draw(st.integers(min_depth + 1, max_nodes))
    inputs = draw(st.integers(1, min(3, n - min_depth)))
    names = draw(st.permutations("abcdefghijkl"[:n]))
    labels = iter(draw(st.permutations(range(3 * n))))
    shapes, arcs, merges, functions = {}, [], {}, {}

    def arc(source: str, target: str, kind: str, shape: Any, port: int | None) -> None:
        fn, twin = (KINDS | {"skip": _skip})[kind](shape)
        name = f"arc_{next(labels)}"
        functions[name] = twin
        arcs.append(dj.Arc(name, source, target, fn, port))

    for i, node in enumerate(names):
        shapes[node] = draw(st.sampled_from([(3,), (4,), (2, 2)]))
        if i < inputs:
            continue
        before = names[:i]
        sources = draw(st.lists(st.sampled_from(before), min_size=1, max_size=3))
        if i - inputs < min_depth:  # a chain, as long as it must be
            sources = [names[max(i - 1, inputs - 1)], *sources[1:]]
        merge = draw(st.sampled_from([None, None, None, dj.Concat(), dj.Product()]))
        kinds = [draw(st.sampled_from(sorted(KINDS))) for _ in sources]
        if isinstance(merge, dj.Concat):
            shapes[node] = (2 * len(sources),)
        if merge is not None:
            merges[node] = merge
        elif draw(st.booleans()) and shapes[sources[0]] == shapes[node]:
            kinds[0] = "skip"
        for port, (source, kind) in enumerate(zip(sources, kinds, strict=True)):
            into = (2,) if isinstance(merge, dj.Concat) else shapes[node]
            arc(source, node, kind, into, None if merge is None else port)
    others = draw(st.lists(st.sampled_from(names[inputs:]), max_size=1))
    outputs = dict.fromkeys([names[-1], *others])
    graph = dj.Graph(draw(st.permutations(arcs)), names[:inputs], outputs, merges)
    given = tuple(shapes[node] for node in names[:inputs])
    return Plan(graph, given, functions, draw(st.integers(0, 99)))


# --- twins: the same networks, the ordinary way -----------------------------------


class LeNet300(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(300, name="fc1")(x))
        x = nn.relu(nn.Dense(100, name="fc2")(x))
        return nn.Dense(10, name="fc3")(x)


class LeNet5(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (5, 5), name="conv1")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), name="conv2")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, name="fc1")(x))
        x = nn.relu(nn.Dense(84, name="fc2")(x))
        return nn.Dense(10, name="fc3")(x)


class ResNet8(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.relu(norm(name="bn")(conv(self.width, (3, 3), name="conv")(x)))
        for i in range(3):
            width, strides = self.width * 2**i, (1, 1) if i == 0 else (2, 2)
            y = conv(width, (3, 3), strides, name=f"conv{i}a")(x)
            y = nn.relu(norm(name=f"bn{i}a")(y))
            y = norm(name=f"bn{i}b")(conv(width, (3, 3), name=f"conv{i}b")(y))
            if i > 0:
                x = conv(width, (1, 1), strides, name=f"project{i}")(x)
                x = norm(name=f"bn{i}p")(x)
            x = nn.relu(x + y)
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


def twin(name: str, dag: dj.DAG) -> tuple[nn.Module, dict[str, Any]]:
    """The handwritten module with the variables of the DAG."""
    if name == "resnet8":
        stats = relayed(dag.state)
        return ResNet8(4), {"params": _resnet8(dag.params), "batch_stats": stats}
    module = {"lenet_300_100": LeNet300, "lenet5": LeNet5}[name]()
    layers = {arc: next(iter(own.values())) for arc, own in dag.params.items()}
    return module, {"params": layers}


def _resnet8(tree: dict[str, Any]) -> dict[str, Any]:
    """`{arc: {layer: leaf}}` under the names of the twin; what is missing is left."""
    places = {
        "conv": ("stem", "Conv"),
        "bn": ("stem", "BatchNorm"),
        "fc": ("head", "Dense"),
    }
    for i in range(3):
        branch, skip = f"block{i + 1}/branch", f"block{i + 1}/skip"
        places |= {
            f"conv{i}a": (branch, "Conv"),
            f"bn{i}a": (branch, "BatchNorm"),
            f"conv{i}b": (branch, "Conv_1"),
            f"bn{i}b": (branch, "BatchNorm_1"),
            f"project{i}": (skip, "Conv"),
            f"bn{i}p": (skip, "BatchNorm"),
        }
    return {
        name: tree[arc][layer]
        for name, (arc, layer) in places.items()
        if layer in tree.get(arc, {})
    }


def relayed(state: dict[str, Any]) -> dict[str, Any]:
    """The batch statistics of a ResNet-8 under the names of its twin."""
    held = {
        arc: {layer: own["batch_stats"] for layer, own in layers.items()}
        for arc, layers in state.items()
    }
    return _resnet8(held)
