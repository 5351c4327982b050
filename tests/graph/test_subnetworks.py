import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import dagjax as dj
from dagjax.graph.parts import subnetworks
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("optimized")


def one_by_one(dag, xs, found):
    """A call for each gate vector."""
    dtype = jax.tree.leaves(xs)[0].dtype
    return [
        dag(*xs, gates=dict(zip(found.arcs, jnp.asarray(row, dtype), strict=True)))
        for row in found.gates
    ]


def some(dag, n=12, seed=0, kinds=(0.0, 1.0)):
    rng = np.random.default_rng(seed)
    return rng.choice(np.asarray(kinds, np.float32), (n, len(dag.graph.arcs)))


@pytest.mark.parametrize("name", ["lenet5", "resnet8", "inception", "two_streams"])
def test_some_vectors(name):
    case = nets.zoo(name)
    gates = some(case.dag, kinds=(0.0, 0.5, 1.0, 1.7))
    found = dj.all_subnetworks(case.dag, *case.xs, gates=gates)
    want = one_by_one(case.dag, case.xs, found)
    joined = jax.tree.map(lambda *ys: np.stack(ys), *want)
    assert nets.distance(found.outputs, joined) <= 1e-5
    flipped = jax.tree.map(lambda y: y[::-1], found.outputs)  # mutant
    assert nets.violates(nets.distance(flipped, joined), "float32")


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        gates = some(case.dag, 5, case.seed, (0.0, 1.0, -0.5))
        found = dj.all_subnetworks(case.dag, *case.xs, gates=gates)
        want = one_by_one(case.dag, case.xs, found)
        joined = jax.tree.map(lambda *ys: np.stack(ys), *want)
        assert nets.distance(found.outputs, joined) <= 1e-12


def test_all_vectors_in_order():
    case = nets.zoo("mlp")
    found = dj.all_subnetworks(case.dag, *case.xs)
    assert found.gates.tolist() == [
        [bool(i & 4), bool(i & 2), bool(i & 1)] for i in range(8)
    ]
    np.testing.assert_allclose(found.outputs[-1], case.dag(*case.xs), rtol=1e-6)


def test_chunks_give_the_same(monkeypatch):
    case = nets.zoo("resnet8")
    whole = dj.all_subnetworks(case.dag, *case.xs)
    seen = []
    monkeypatch.setattr(subnetworks, "_BYTES", 15_000)
    parts = dj.all_subnetworks(case.dag, *case.xs, progress=lambda *p: seen.append(p))
    assert len(seen) > 3
    assert seen[-1] == (256, 256)
    np.testing.assert_array_equal(whole.outputs, parts.outputs)


def test_compiles_once():
    case = nets.zoo("resnet8")
    traced = chex.assert_max_traces(lambda y: y * 1.0, n=1)
    chex.clear_trace_counter()
    for dag in (case.dag, jax.tree.map(lambda leaf: leaf * 2, case.dag)):
        found = dj.all_subnetworks(dag, *case.xs, readout=traced)
    assert found.outputs.shape == (256, 2, 10)


def test_shares_what_lies_below():
    """Convolutions see the distinct sub-architectures below them, not all vectors."""
    graph = dj.zoo.resnet(20, width=2, input_shape=(8, 8, 1))
    names = [arc.name for arc in graph.arcs]
    plan = subnetworks.make_plan(graph, names[:13], subnetworks.all_vectors(13)).nodes
    rows = [max(map(len, r.gates.values()), default=1) for r in plan.values()]
    assert rows[:4] == [1, 2, 7, 22]
    assert max(rows) < 2**13


def test_only_some_arcs_vary():
    with nets.precision("float64"):  # one output is small beside what it is a sum of
        case = nets.zoo("resnet8", "float64")
        found = dj.all_subnetworks(case.dag, *case.xs, arcs=["block1/branch"])
        assert found.outputs.shape == (2, 2, 10)
        np.testing.assert_allclose(found.outputs[1], case.dag(*case.xs), rtol=1e-9)


def test_readout():
    case = nets.zoo("mlp")
    found = dj.all_subnetworks(case.dag, *case.xs, readout=lambda y: {"s": y.sum()})
    whole = dj.all_subnetworks(case.dag, *case.xs)
    want = whole.outputs.sum((1, 2))
    np.testing.assert_allclose(found.outputs["s"], want, rtol=1e-5, atol=1e-6)


def test_errors():
    case = nets.zoo("mlp")
    with pytest.raises(ValueError, match=r"gates of shape \(2, 5\): expected \[N, 3\]"):
        dj.all_subnetworks(case.dag, *case.xs, gates=np.ones((2, 5)))
    with pytest.raises(dj.GraphError, match="no arc named 'nope'"):
        dj.all_subnetworks(case.dag, *case.xs, arcs=["nope"])
    with pytest.raises(dj.GraphError, match="twice"):
        dj.all_subnetworks(case.dag, *case.xs, arcs=["fc1", "fc1"])
    arcs = [dj.Arc(f"e{i}", f"n{i}", f"n{i + 1}", jnp.tanh) for i in range(21)]
    dag = dj.init(jax.random.key(0), dj.Graph(arcs, "n0", "n21"), jnp.ones((1, 2)))
    with pytest.raises(dj.GraphError, match=r"2\^21 = 2,097,152 .* dagjax.shapley"):
        dj.all_subnetworks(dag, jnp.ones((1, 2)))
