"""Narrow networks: one factor for all hidden layers, the readout as it is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import dagjax as dj
from dagjax.graph.core.dag import count_params
from dagjax.graph.rewrite.width import narrow_to
from tests.sweeps import seldom


def count(graph, *xs):
    dag = jax.eval_shape(lambda: dj.init(jax.random.key(0), graph, *xs))
    return count_params(dag.params)


def widths(graph, *xs):
    """`{path of kernel: width}`."""
    dag = jax.eval_shape(lambda: dj.init(jax.random.key(0), graph, *xs))
    leaves = jax.tree_util.tree_leaves_with_path(dag.params)
    return {jax.tree_util.keystr(p): x.shape[-1] for p, x in leaves if x.ndim > 1}


IMAGE = jnp.ones((1, 8, 8, 1))
NETS = {
    "mlp": lambda: dj.zoo.mlp((20, 12, 10), input_shape=(8, 8, 1)),
    "lenet5": lambda: dj.zoo.lenet5(input_shape=(8, 8, 1)),
    "conv2": lambda: dj.zoo.conv2(input_shape=(8, 8, 1)),
    "resnet8": lambda: dj.zoo.resnet(8, input_shape=(8, 8, 1)),
}


@functools.cache
def full_widths(name):
    return widths(NETS[name](), IMAGE)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("factor", seldom([1e-9, 0.3, 0.5, 1.0, 1.5], [0.5, 1.0]))
def test_every_hidden_layer_by_one_factor(name, factor):
    before = full_widths(name)
    after = widths(dj.narrow(NETS[name](), factor), IMAGE)
    assert list(after) == list(before)
    (readout,) = [layer for layer in before if "fc3" in layer or "head" in layer]
    assert after[readout] == before[readout] == 10
    for layer in set(before) - {readout}:
        assert after[layer] == max(1, round(factor * before[layer]))


@pytest.mark.parametrize("name", NETS)
def test_the_graph_stays(name):
    graph = NETS[name]()
    narrow = dj.narrow(graph, 0.5)
    names = lambda g: [(a.name, a.source, a.target, a.port) for a in g.arcs]
    assert names(narrow) == names(graph)
    assert narrow.space_of == graph.space_of
    assert (narrow.inputs, narrow.outputs) == (graph.inputs, graph.outputs)
    assert dj.narrow(graph, 1.0) == graph
    assert narrow != graph


def test_a_narrow_net_computes(key):
    graph = dj.narrow(NETS["mlp"](), 0.2)
    y = dj.init(key, graph, IMAGE)(jnp.ones((3, 8, 8, 1)))
    assert y.shape == (3, 10)
    assert jnp.isfinite(y).all()


def test_what_is_known_only_for_the_old_widths_is_forgotten():
    graph = dj.init(jax.random.key(0), NETS["mlp"](), IMAGE).graph
    assert set(dict(graph.spaces)) == set(graph.nodes)
    assert set(dict(dj.narrow(graph, 0.5).spaces)) == set(graph.inputs)


def test_all_arcs_into_the_output_keep_their_width():
    b = dj.GraphBuilder()
    x = b.input("x")
    h = b.arc("stem", x, "h", nn.Dense(8))
    b.arc("long", h, "y", dj.block(nn.relu, nn.Dense(6), nn.relu, nn.Dense(3)))
    b.arc("short", x, "y", nn.Dense(3))
    graph = dj.narrow(b.build("y"), 0.5)
    found = widths(graph, jnp.ones((1, 4)))
    assert found == {
        "['long']['Dense']['kernel']": 3,
        "['long']['Dense_1']['kernel']": 3,
        "['short']['kernel']": 3,
        "['stem']['kernel']": 4,
    }


def test_other_fields_of_a_layer_stay():
    layer = nn.Conv(8, (3, 3), (2, 2), use_bias=False)
    graph = dj.narrow(dj.series(layer, nn.Dense(3)), 0.5)
    assert graph.arcs[0].fn == dj.Arc("a", "x", "y", layer.clone(features=4)).fn


def test_what_has_no_features_stays():
    graph = dj.series(nn.Dense(8), nn.LayerNorm(), nn.relu, jnp.tanh, nn.Dense(3))
    narrow = dj.narrow(graph, 0.5)
    fns = lambda g: [arc.fn for arc in g.arcs][1:]
    assert fns(narrow) == fns(graph)


# --- to a number of parameters ----------------------------------------------------


@pytest.mark.parametrize("wanted", [1, 100, 333, 700, 1000, 1450, 1682, 9999])
def test_nearest_number_of_parameters(wanted):
    """By brute force: `64 a + a`, `a b + b`, `10 b + 10` parameters."""
    graph, x = dj.zoo.mlp((20, 12, 10), input_shape=(64,)), jnp.ones((1, 64))
    width = lambda full, i: max(1, round(full * i / 240))
    pairs = {(width(20, i), width(12, i)) for i in range(1, 241)}
    counts = [65 * a + (a + 1) * b + 10 * (b + 1) for a, b in pairs]
    assert count(graph, x) == max(counts) == 1682
    got = count(narrow_to(graph, wanted, x), x)
    assert abs(got - wanted) == min(abs(c - wanted) for c in counts)


@pytest.mark.parametrize(("name", "share"), [("lenet5", 0.5), ("resnet8", 0.1)])
def test_nearest_of_the_zoo(name, share):
    graph = NETS[name]()
    full = count(graph, IMAGE)
    got = count(narrow_to(graph, round(share * full), IMAGE), IMAGE)
    assert got == pytest.approx(share * full, rel=0.1)


@pytest.mark.parametrize(
    "graph",
    [
        dj.series(nn.Dense(3)),
        dj.series(jnp.tanh, nn.Dense(3), nn.relu),
        dj.series(nn.LayerNorm(), nn.Dense(1)),
        dj.series(jnp.tanh),
    ],
)
def test_nothing_to_narrow(graph):
    if len(graph.arcs) == 3:
        graph = dj.series(dj.block(*[arc.fn for arc in graph.arcs]))
    with pytest.raises(dj.GraphError, match="cannot be narrowed: no hidden layer"):
        narrow_to(graph, 2, jnp.ones((1, 4)))
