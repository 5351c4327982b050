import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets


def error(one, other, case):
    return nets.distance(one(*case.xs), other(*case.xs))


def mutant(dag):
    return jax.tree.map(lambda leaf: leaf * 1.1, dag)


@pytest.mark.parametrize("name", ["lenet5", "noisy", "inception"])
def test_whole_network_and_back(name):
    """All arcs as one, split again, contracted again: always the same function."""
    case = nets.zoo(name)
    names = [arc.name for arc in case.dag.graph.arcs]
    one = dj.contract(case.dag, names, "all")
    assert [arc.name for arc in one.graph.arcs] == ["all"]
    assert one.graph.depth == 1
    assert error(one, case.dag, case) <= 1e-5
    assert nets.violates(error(mutant(one), case.dag, case), "float32")
    parts = dj.split(one, "all")
    assert [a.name for a in parts.graph.arcs] == [f"all/{n}" for n in names]
    assert dj.count_subgraphs(parts) == dj.count_subgraphs(case.dag)
    assert error(parts, case.dag, case) <= 1e-5
    b = dj.inject(parts, *case.xs)
    h = dj.compose(dj.factors(parts))(b)
    assert nets.distance(h["out"], case.dag(*case.xs)) <= 1e-5


def test_blocks_of_a_resnet():
    """Split all arcs into layers, contract the chains: the blocks are back."""
    case = nets.zoo("resnet8")
    fine = case.dag
    for arc in case.dag.graph.arcs:
        fine = dj.split(fine, arc.name) if isinstance(arc.fn.fn, dj.Graph) else fine
    assert len(fine.graph.arcs) == 30
    h = dj.compose(dj.factors(fine))(dj.inject(fine, *case.xs))
    assert nets.distance(h["out"], case.dag(*case.xs)) <= 1e-5
    assert error(fine, case.dag, case) <= 1e-5
    coarse = dj.contract(fine)
    assert len(coarse.graph.arcs) == len(case.dag.graph.arcs)
    assert {a.name for a in coarse.graph.arcs} >= {"stem", "block1/branch", "head"}
    assert dj.count_paths(coarse) == dj.count_paths(case.dag) == 8
    assert coarse.graph.depth == case.dag.graph.depth
    assert error(coarse, case.dag, case) <= 1e-5


def test_gates_of_a_part_act_as_one(key):
    branch = dj.series(nn.relu, nn.Dense(3), nn.Dense(3), name="branch")
    x = jnp.ones((2, 3))
    dag = dj.init(key, dj.residual(branch), x)
    one = dj.contract(dag)
    half = one(x, gates={"branch": 0.5})
    assert nets.distance(half, dag(x, gates={"branch/Dense_1": 0.5})) <= 1e-6


def test_state_moves_along(key):
    """Batch statistics are updated in the part as before."""
    graph = dj.series(nn.Dense(3), nn.BatchNorm(), nn.relu, nn.Dense(2))
    x = jax.random.normal(key, (8, 4))
    dag = dj.init(key, graph, x)
    one = dj.contract(dag)
    assert len(one.graph.arcs) == 1
    (name,) = one.state
    want, state = dag.apply(x, train=True)
    got, held = one.apply(x, train=True)
    assert nets.distance(got, want) <= 1e-6
    assert nets.same(held[name]["BatchNorm"], state["BatchNorm"])
    back, opened = dj.split(one, name).apply(x, train=True)
    assert nets.distance(back, want) <= 1e-6
    assert nets.same(opened[f"{name}/BatchNorm"], state["BatchNorm"])


def ported(key):
    b = dj.GraphBuilder()
    x = b.input("x")
    b.merge("y", dj.Concat())
    b.arc("a1", x, "h", nn.Dense(3))
    b.arc("a2", "h", "y", jnp.tanh, port=0)
    b.arc("b", x, "y", nn.Dense(2), port=1)
    return dj.init(key, b.build("y"), jnp.ones((2, 4)))


def test_into_a_port_and_with_the_merge(key):
    dag, x = ported(key), jnp.ones((2, 4))
    for arcs in (["a1", "a2"], ["a1", "a2", "b"]):
        one = dj.contract(dag, arcs, "part")
        assert nets.distance(one(x), dag(x)) <= 1e-6
        assert nets.distance(dj.split(one, "part")(x), dag(x)) <= 1e-6
        b = dj.inject(one, x)
        back = dj.inverse(dj.factors(one))(dj.compose(dj.factors(one))(b))
        assert nets.distance(back, b) <= 1e-6


@given(plan=nets.plans())
def test_random(plan):
    """Contract what can be; every node that stays keeps its value."""
    with nets.precision("float64"):
        case = plan.case("float64")
        coarse = dj.contract(case.dag)
        assert nets.distance(coarse(*case.xs), case.dag(*case.xs)) <= 1e-12
        fine = coarse
        for arc in coarse.graph.arcs:
            if isinstance(arc.fn.fn, dj.Graph) and arc.name in coarse.params:
                fine = dj.split(fine, arc.name)
        assert nets.distance(fine(*case.xs), case.dag(*case.xs)) <= 1e-12


def test_an_arc_that_carries_the_identity(key):
    """Nothing is lost where the inner input is the inner output."""
    whole = dj.Arc("a", "x", "y", dj.Graph([], "x", "x"))
    graph = dj.Graph([whole, dj.Arc("b", "x", "y", nn.Dense(3))], "x", "y")
    x = jnp.ones((1, 3))
    dag = dj.init(key, graph, x)
    assert nets.distance(dj.split(dag, "a")(x), dag(x)) <= 1e-6


def test_names_that_are_taken(key):
    dense = nn.Dense(3)
    inner = dj.series(nn.Dense(3, name="W"), jnp.tanh)
    arcs = [
        dj.Arc("fc", "x", "h", inner),
        dj.Arc("one", "h", "y", dense, tied="fc/W"),
        dj.Arc("two", "h", "y", dense, tied="fc/W"),
    ]
    dag = dj.init(key, dj.Graph(arcs, "x", "y"), jnp.ones((1, 3)))
    with pytest.raises(dj.GraphError, match="'fc/W' is taken"):
        dj.split(dag, "fc")
    nodes = [dj.Arc("fc", "x", "h", inner), dj.Arc("b", "h", "fc/n1", jnp.tanh)]
    dag = dj.init(key, dj.Graph(nodes, "x", "fc/n1"), jnp.ones((1, 3)))
    with pytest.raises(dj.GraphError, match="a node 'fc/n1' already"):
        dj.split(dag, "fc")


def test_errors(key):
    case = nets.zoo("dense_block")
    with pytest.raises(dj.GraphError, match="'x1' inside has Arc"):
        dj.contract(case.dag, ["x0_x1", "x1_x2"])
    with pytest.raises(dj.GraphError, match="end at several nodes"):
        dj.contract(case.dag, ["x0_x1", "x0_x2"])
    with pytest.raises(dj.GraphError, match="is an output"):
        dj.contract(nets.zoo("two_streams").dag, ["fc_left", "out_h"])
    with pytest.raises(dj.GraphError, match="carries no graph"):
        dj.split(ported(key), "b")
    cell = nn.Dense(4)
    arcs = [dj.Arc(f"s{i}", f"h{i}", f"h{i + 1}", cell, tied="c") for i in range(3)]
    dag = dj.init(key, dj.Graph(arcs, "h0", "h3"), jnp.ones((1, 4)))
    with pytest.raises(dj.GraphError, match="shares parameters"):
        dj.contract(dag, ["s0", "s1"])
    beside = dj.insert(dag, dj.Arc("other", "h0", "h3", cell, tied="c"))
    assert len(dj.contract(beside).graph.arcs) == 4  # tied to an arc outside
    assert len(dj.contract(dag).graph.arcs) == 1
    whole = dj.contract(dag, ["s0", "s1", "s2"], "net")
    assert nets.distance(whole(jnp.ones((1, 4))), dag(jnp.ones((1, 4)))) <= 1e-6
    again = dj.split(whole, "net")
    assert [*again.params] == ["net/c"]
    assert nets.distance(again(jnp.ones((1, 4))), dag(jnp.ones((1, 4)))) <= 1e-6
