"""Delete, insert, keep a part, cut off above a level."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("strict_dtypes", "optimized")


@pytest.mark.parametrize("name", ["resnet8", "inception", "two_streams", "dense_block"])
def test_deleted_is_switched_off(name):
    case = nets.zoo(name)
    for arc in case.dag.graph.arcs[::2]:
        off = case.dag(*case.xs, gates={arc.name: 0.0})
        deleted = dj.delete(case.dag, arc.name)(*case.xs)
        assert nets.distance(deleted, off) <= 1e-6


@given(plan=nets.plans(max_nodes=8), data=st.data())
def test_subnetwork_is_the_rest_switched_off(plan, data):
    case = plan.case("float32")
    names = [arc.name for arc in case.dag.graph.arcs]
    keep = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=8))
    part = dj.subnetwork(case.dag, keep)
    assert {arc.name for arc in part.graph.arcs} == {*keep}
    assert set(part.graph.nodes) == set(case.dag.graph.nodes)
    assert set(part.params) == set(case.dag.params) & {*keep}
    off = {name: 0.0 for name in names if name not in keep}
    want = case.oracle(dj.inject(case.dag, *case.xs), off)
    h = dj.compose(dj.factors(part))(dj.inject(part, *case.xs))
    assert nets.distance(h, want) <= 1e-5
    gone = dj.delete(case.dag, list(off))
    assert gone.graph == part.graph
    assert nets.same(gone, part)


X = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)


def test_port_without_arcs_of_a_product_is_one(key):
    dag = dj.init(key, dj.product(lambda x: 2.0 * x, lambda x: x + 1.0), X)
    one, two = (arc.name for arc in dag.graph.arcs)
    np.testing.assert_array_equal(dj.delete(dag, one)(X), X + 1)
    np.testing.assert_array_equal(dj.delete(dag, two)(X), 2 * X)
    np.testing.assert_array_equal(dj.delete(dag, [one, two])(X), np.ones_like(X))
    np.testing.assert_array_equal(dag(X, gates={one: 0.0, two: 0}), np.ones_like(X))


def test_port_without_arcs_of_a_concat_is_zero(key):
    dag = dj.init(key, dj.concat(lambda x: 2.0 * x, lambda x: x[:, :1]), X)
    one, two = (arc.name for arc in dag.graph.arcs)
    zero = np.zeros_like
    for gone, want in (
        ([one], [zero(X), X[:, :1]]),
        ([two], [2 * X, zero(X[:, :1])]),
        ([one, two], [zero(X), zero(X[:, :1])]),
    ):
        got = dj.delete(dag, gone)(X)
        np.testing.assert_array_equal(got, np.concatenate(want, -1))


def test_half_a_gate_of_a_product(key):
    """`v + 1 - p` goes from the neutral element to the factor along a line."""
    dag = dj.init(key, dj.product(lambda x: 2.0 * x, lambda x: x + 1.0), X)
    one = dag.graph.arcs[0].name
    np.testing.assert_allclose(dag(X, gates={one: 0.5}), (X + 0.5) * (X + 1))


def test_sum_without_arcs_is_zero(key):
    dag = dj.init(key, dj.series(dj.residual(jnp.tanh), lambda x: x + 1.0), X)
    empty = dj.delete(dag, ["tanh", "skip"])
    np.testing.assert_array_equal(empty(X), np.ones_like(X))
    np.testing.assert_array_equal(dj.delete(dag, "function")(X), np.zeros_like(X))
    assert dj.delete(dag, [a.name for a in dag.graph.arcs])(X).shape == X.shape


def test_delete_under_jit_and_grad(key):
    case = nets.zoo("inception")
    less = dj.delete(case.dag, case.dag.graph.arcs[:3:2][0].name)
    loss = lambda dag: jnp.sum(dag(*case.xs) ** 2)
    gradient = jax.jit(jax.grad(loss))(less)
    assert jax.tree.structure(gradient) == jax.tree.structure(less)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_unknown_arcs():
    dag = nets.zoo("mlp").dag
    for rewrite in (dj.delete, dj.subnetwork):
        with pytest.raises(dj.GraphError, match="no arc named 'fc9'; the arcs are fc1"):
            rewrite(dag, ["fc1", "fc9"])


# --- insert -----------------------------------------------------------------------


def scale_pair(shape):
    return (lambda key, x: jnp.ones(shape), lambda scale, x: jnp.sum(scale) * x)


@pytest.mark.parametrize("value", [np.full(2, 3.0), np.float32(0.0), np.full(1, 0.0)])
def test_parameters_may_be_one_array(value, key):
    """A pair whose parameters are a bare array, deleted and inserted again."""
    params = jnp.asarray(value, jnp.float32)
    graph = dj.Graph(
        [dj.Arc("skip", "x", "y", jnp.tanh), dj.Arc("s", "x", "y", scale_pair(()))],
        "x",
        "y",
    )
    dag = dj.init(key, graph, X)
    dag = dag.replace(params=dag.params | {"s": params})
    back = dj.insert(dj.delete(dag, "s"), graph.by_name["s"], params)
    assert nets.same(back, dag)
    np.testing.assert_array_equal(back(X), dag(X))


def test_insert_into_a_port_again(key):
    dag = dj.init(key, dj.product(nn.Dense(2), nn.Dense(2)), X)
    for arc in dag.graph.arcs:
        back = dj.insert(dj.delete(dag, arc.name), arc, dag.params[arc.name])
        assert back.graph == dag.graph
        assert nets.same(back, dag)
        np.testing.assert_array_equal(back(X), dag(X))


def test_inserted_arc_finds_new_levels(key):
    dag = dj.init(key, dj.series(jnp.tanh, jnp.sin), X)
    wide = dj.insert(dag, dj.Arc("skip", "in", "out", dj.identity))
    np.testing.assert_array_equal(wide(X), jnp.sin(jnp.tanh(X)) + X)
    graph = dj.Graph(
        [dj.Arc(n, *ends, jnp.tanh) for n, ends in {"a": "xh", "b": "xk"}.items()],
        "x",
        ["h", "k"],
    )
    flat = nets.build(graph, ((2,),)).dag
    deep = dj.insert(flat, dj.Arc("c", "h", "k", jnp.sin))
    assert flat.graph.levels == {"x": 0, "h": 1, "k": 1}
    assert deep.graph.levels == {"x": 0, "h": 1, "k": 2}
    assert nets.same(deep(X)[1], jnp.tanh(X) + jnp.sin(jnp.tanh(X)))


@pytest.mark.parametrize(
    ("arc", "message"),
    [
        (("a", "in", "nowhere"), "no node named 'nowhere'; the nodes are in"),
        (("a", "nowhere", "out"), "no node named 'nowhere'"),
        (("back", "out", "n1"), r"n1 -\[\w+\]-> out -\[back\]-> n1"),
        (("a", "n1", "in"), r"cycle|input node 'in'"),
        (("tanh", "in", "out"), "two arcs are named 'tanh'"),
        (("a", "in", "out", 0), "a sum node"),
    ],
)
def test_arcs_that_cannot_be_inserted(arc, message, key):
    dag = dj.init(key, dj.series(jnp.tanh, jnp.sin), X)
    with pytest.raises(dj.GraphError, match=message):
        dj.insert(dag, dj.Arc(*arc[:3], jnp.cos, *arc[3:]))


# --- node functions ---------------------------------------------------------------


@given(plan=nets.plans(max_nodes=8))
def test_node_functions_are_the_values(plan):
    case = plan.case("float32")
    graph = case.dag.graph
    h = dj.compose(dj.factors(case.dag))(dj.inject(case.dag, *case.xs))
    for level in {0, graph.depth // 2, graph.depth}:
        functions = dj.node_functions(case.dag, level)
        assert set(functions) == {n for n in graph.nodes if graph.levels[n] <= level}
        for node, f in functions.items():
            want = nets.merged(graph.merge_of.get(node), h[node])
            np.testing.assert_array_equal(f(*case.xs), want)
            assert f.graph.depth == graph.levels[node]


def test_node_functions_hold_what_they_need_only():
    functions = dj.node_functions(nets.zoo("resnet8").dag, 5)
    assert set(functions["n1"].params) == {"stem"}
    assert set(functions["in"].params) == set()
    assert functions["out"].graph.arcs == nets.zoo("resnet8").dag.graph.arcs


@pytest.mark.parametrize("level", [-1, 4])
def test_levels_that_are_not_there(level):
    with pytest.raises(ValueError, match=rf"level {level}: .* levels 0 to 3"):
        dj.node_functions(nets.zoo("mlp").dag, level)


def test_node_functions_after_deletion():
    case = nets.zoo("mlp")
    less = dj.delete(case.dag, "fc1")
    functions = dj.node_functions(less, less.graph.depth)
    np.testing.assert_array_equal(functions["n1"](*case.xs), np.zeros((2, 8)))
    np.testing.assert_array_equal(functions["out"](*case.xs), less(*case.xs))


@pytest.mark.parametrize("name", ["resnet8", "inception", "dense_block", "noisy"])
def test_relevel_changes_factors_only(name):
    case = nets.zoo(name)
    b = case.injection()
    want = dj.compose(dj.factors(case.dag))(b)
    for levels in ("latest", {"out": 40} if name != "dense_block" else {"x3": 7}):
        dag = dj.relevel(case.dag, levels)
        got = dj.compose(dj.factors(dag))(b)
        assert nets.distance(got, want) <= 1e-5
        assert nets.distance(dag(*case.xs), case.dag(*case.xs)) <= 1e-5
        back = dj.inverse(dj.factors(dag))(got)
        assert nets.distance(back, b, scale=got) <= 1e-5
        assert dj.relevel(dag).graph == case.dag.graph


@given(plan=nets.plans())
def test_relevel_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        dag = dj.relevel(case.dag, "latest")
        levels = dag.graph.levels
        assert dag.graph.depth == case.dag.graph.depth
        assert all(levels[n] >= low for n, low in case.dag.graph.levels.items())
        assert all(levels[a.target] > levels[a.source] for a in dag.graph.arcs)
        b = case.injection()
        want = dj.compose(dj.factors(case.dag))(b)
        assert nets.distance(dj.compose(dj.factors(dag))(b), want) <= 1e-12


def test_relevel_latest_is_the_largest():
    side = dj.Arc("side", "in", "late", jnp.tanh)
    chain = [
        dj.Arc(f"c{i}", f"n{i}" if i else "in", f"n{i + 1}", jnp.tanh) for i in range(3)
    ]
    graph = dj.Graph([*chain, side, dj.Arc("up", "late", "n3", jnp.tanh)], "in", "n3")
    dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 2)))
    assert dag.graph.levels["late"] == 1
    assert dj.relevel(dag, "latest").graph.levels["late"] == 2


def test_relevel_errors():
    case = nets.zoo("mlp")
    with pytest.raises(dj.GraphError, match=r"level 1 of 'n2': Arc.*from level 1"):
        dj.relevel(case.dag, {"n2": 1})
    with pytest.raises(dj.GraphError, match="no node named 'n9'"):
        dj.relevel(case.dag, {"n9": 1})
    with pytest.raises(dj.GraphError, match="a whole number, 0 for an input"):
        dj.relevel(case.dag, {"in": 1})
