"""Graphs by composition: what they compute, how nodes and arcs are named."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def double(x):
    return 2.0 * x


def square(x):
    return x * x


def inc(x):
    return x + 1.0


def head(x):
    return x[:, :1]


X = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
one = lambda x: x[:, :1]
join = lambda *parts: np.concatenate(parts, -1)

# graph, the same in numpy
NETS = {
    "series": (dj.series(double, inc), 2 * X + 1),
    "one": (dj.series(inc), X + 1),
    "block": (dj.block(double, inc), 2 * X + 1),
    "parallel": (dj.parallel(double, square), 2 * X + X**2),
    "parallel of one": (dj.parallel(square), X**2),
    "concat": (dj.concat(double, square), join(2 * X, X**2)),
    "concat of one": (dj.concat(square), X**2),
    "concat of widths": (dj.concat(head, inc, head), join(X[:, :1], X + 1, X[:, :1])),
    "concat on axis 0": (
        dj.concat(double, inc, axis=0),
        np.concatenate([2 * X, X + 1]),
    ),
    "product": (dj.product(double, inc), 2 * X * (X + 1)),
    "product of one": (dj.product(inc), X + 1),
    "product of three": (dj.product(inc, inc, double), (X + 1) ** 2 * 2 * X),
    "residual": (dj.residual(square), X + X**2),
    "residual of a series": (dj.residual(dj.series(square, inc)), X + X**2 + 1),
    "residual with a shortcut": (dj.residual(square, double), 2 * X + X**2),
    "series of series": (dj.series(dj.series(inc, double), inc), 2 * (X + 1) + 1),
    "series of residuals": (
        dj.series(dj.residual(square), dj.residual(double)),
        3 * (X + X**2),
    ),
    "concat of a series of residuals": (
        dj.concat(dj.series(inc, dj.residual(square)), double),
        join((X + 1) + (X + 1) ** 2, 2 * X),
    ),
    "concat of residuals": (
        dj.concat(dj.residual(square), dj.residual(double)),
        join(X + X**2, 3 * X),
    ),
    "product of residuals": (
        dj.product(dj.residual(square), inc),
        (X + X**2) * (X + 1),
    ),
    "product in parallel": (
        dj.parallel(dj.product(inc, double), dj.product(square, inc)),
        (X + 1) * 2 * X + X**2 * (X + 1),
    ),
    "concat in parallel": (
        dj.parallel(dj.concat(inc, double), dj.concat(square, inc)),
        join(X + 1 + X**2, 2 * X + X + 1),
    ),
    "concat of concats": (
        dj.concat(dj.concat(inc, double), dj.product(inc, square)),
        join(X + 1, 2 * X, (X + 1) * X**2),
    ),
    "series of concats": (
        dj.series(dj.concat(inc, double), dj.concat(square, head)),
        join((X + 1) ** 2, (2 * X) ** 2, X[:, :1] + 1),
    ),
    "residual of a product": (
        dj.residual(dj.product(inc, square)),
        X + (X + 1) * X**2,
    ),
    "parallel of parallels": (
        dj.parallel(dj.parallel(inc, double), square),
        X + 1 + 2 * X + X**2,
    ),
    "block in a residual": (dj.residual(dj.block(inc, square)), X + (X + 1) ** 2),
    "graph as a function": (
        dj.Graph([dj.Arc("g", "x", "y", dj.concat(inc, double))], "x", "y"),
        join(X + 1, 2 * X),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_value(name, transform, key):
    graph, want = NETS[name]
    if name == "concat on axis 0" and "vmap" in transform.__name__:
        want = np.concatenate([2 * X, X + 1])
    dag = dj.init(key, graph, X)
    got = transform(lambda dag, x: dag(x))(dag, jnp.asarray(X))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    b = dj.inject(dag, X)
    back = dj.inverse(dj.factors(dag))(dj.compose(dj.factors(dag))(b))
    assert nets.distance(back, b) <= 1e-5


def names(graph):
    return [arc.name for arc in graph.arcs]


def test_names_of_arcs():
    dense = nn.Dense(3)
    assert names(dj.series(dense, nn.relu, dense)) == ["Dense", "relu", "Dense_1"]
    assert names(dj.series(dense, dense, dense)) == ["Dense", "Dense_1", "Dense_2"]
    assert names(dj.series(dj.series(dense, dense), dense)) == [
        "Dense",
        "Dense_1",
        "Dense_2",
    ]
    assert names(dj.series(nn.Dense(3, name="fc"), inc)) == ["fc", "inc"]
    assert names(dj.series(lambda x: x, inc)) == ["function", "inc"]


def test_prefixes():
    inner = dj.residual(nn.Dense(3), name="block1")
    assert names(inner) == ["block1/Dense", "block1/skip"]
    assert names(dj.series(inner, inc, name="net")) == [
        "net/block1/Dense",
        "net/block1/skip",
        "net/inc",
    ]
    twice = dj.series(inner, inner)
    assert len(set(names(twice))) == 4
    assert names(dj.concat(inc, inc, name="c")) == ["c/inc", "c/inc_1"]
    assert names(dj.product(inc, double, name="p")) == ["p/double", "p/inc"]
    assert names(dj.parallel(inc, double, name="s")) == ["s/double", "s/inc"]
    assert names(dj.block(inc, double, name="fc")) == ["fc"]


def test_names_that_are_taken_stay_unique():
    parts = [dj.block(inc, name=n) for n in ("a", "a", "a_1", "a", "b_10", "b_10")]
    graph = dj.series(*parts)
    assert len(set(names(graph))) == len(parts)
    assert names(graph)[0] == "a"


def test_names_of_nodes_are_positions():
    graph = dj.series(inc, dj.residual(dj.series(inc, inc)), inc)
    assert set(graph.nodes) == {"in", "n1", "n2", "n3", "out"}
    assert graph.inputs == ("in",)
    assert graph.outputs == ("out",)
    builder = dj.GraphBuilder()
    y = builder.arc("f", builder.input("left"), "right", inc)
    assert dj.series(builder.build(y), inc).nodes == ("in", "n1", "out")


def test_pieces_keep_their_arcs_apart():
    """One arc for every leaf, but a block is one arc as a whole."""
    leaf = nn.Dense(2)
    assert len(dj.series(leaf, dj.series(leaf, leaf)).arcs) == 3
    assert len(dj.series(leaf, dj.block(leaf, leaf)).arcs) == 2
    assert len(dj.residual(leaf).arcs) == 2
    # A part that ends in a sum or a merge gets an identity arc to a port of its own.
    assert len(dj.concat(dj.residual(leaf), leaf).arcs) == 4
    assert len(dj.parallel(dj.product(leaf, leaf), leaf).arcs) == 4
    assert len(dj.parallel(dj.residual(leaf), leaf).arcs) == 3


def test_builder():
    b = dj.GraphBuilder()
    x, z = b.input("x"), b.input("z")
    assert b.merge("m", dj.Product()) == "m"
    assert b.arc("a", x, "m", inc, port=0) == "m"
    b.arc("b", z, "m", double, port=1)
    y = b.arc("c", "m", "y", square)
    graph = b.build([y, "m"])
    assert graph.inputs == ("x", "z")
    case = nets.build(graph, ((2,), (2,)))
    got = case.dag(X, X)
    m = (X + 1) * 2 * X
    np.testing.assert_allclose(got[0], m**2, rtol=1e-6)
    np.testing.assert_allclose(got[1], m, rtol=1e-6)


@pytest.mark.parametrize(
    "combine", [dj.series, dj.parallel, dj.concat, dj.product, dj.block]
)
def test_nothing_to_combine(combine):
    with pytest.raises(dj.GraphError, match="nothing to combine"):
        combine()


def test_parts_have_one_input_and_one_output():
    two = nets.two_streams()
    for combine in (dj.series, dj.parallel, dj.concat, dj.product):
        with pytest.raises(dj.GraphError, match="cannot be combined"):
            combine(inc, two)
    with pytest.raises(dj.GraphError, match="one input and one output"):
        dj.Arc("a", "x", "y", two)
    with pytest.raises(dj.GraphError, match="at least one arc"):
        dj.series(dj.Graph([], "x", "x"))


def test_known_shapes_of_the_input_are_kept():
    graph = dj.zoo.mlp((3, 2), input_shape=(4,))
    assert dj.series(graph, inc).space_of["in"] == graph.space_of["in"]
    assert "in" not in dj.series(inc, graph).space_of
