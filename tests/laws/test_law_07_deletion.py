"""Law 7: deleting an arc removes its factor and keeps all others.

With `T = P o E o Q`: `T_-e = P o Q = T o Q^-1 E^-1 Q = (P E^-1 P^-1) o T`. Nodes that
do not come after the arc keep their values bit by bit. What was deleted can be
inserted again, and the network is the same.
"""

import numpy as np
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("optimized")


def chosen(case, seed=0):
    """A random arc."""
    arcs = case.dag.graph.arcs
    return arcs[np.random.default_rng([case.seed, seed]).integers(len(arcs))]


def split(dag, name):
    """`P`, `E_e` and `Q` of the network `P o E_e o Q`."""
    factors = dj.elementary(dag)
    at = [factor.arcs for factor in factors].index((name,))
    return factors[at + 1 :], factors[at], factors[:at]


def removed(dag, name):
    """`P o Q`: the factor is not there."""
    p, _, q = split(dag, name)
    return dj.compose([*q, *p])


def conjugated_below(dag, name):
    """`T o Q^-1 E^-1 Q`."""
    _, e, q = split(dag, name)
    return dj.compose([*q, e.inverse(), *dj.inverse(q), *dj.factors(dag)])


def conjugated_above(dag, name):
    """`P E^-1 P^-1 o T`."""
    p, e, _ = split(dag, name)
    return dj.compose([*dj.factors(dag), *dj.inverse(p), e.inverse(), *p])


def not_conjugated(dag, name):
    """Mutant: `T o E^-1`, right only if nothing comes before the arc."""
    _, e, _ = split(dag, name)
    return dj.compose([e.inverse(), *dj.factors(dag)])


def not_removed(dag, name):
    """Mutant: the network as it was."""
    return dj.compose(dj.factors(dag))


def check(case, name, other):
    """How far the network without the arc is from another way to write it."""
    b = case.injection()
    want = dj.compose(dj.factors(dj.delete(case.dag, name)))(b)
    whole = dj.compose(dj.factors(case.dag))(b)
    return nets.distance(other(case.dag, name)(b), want, scale=(want, whole, b))


def after(graph, node):
    """The node and all that can be reached from it."""
    found = {node}
    for _ in graph.arcs:
        found |= {arc.target for arc in graph.arcs if arc.source in found}
    return found


def unchanged(case, arc, but=()):
    """Whether all nodes that do not come after the arc keep their bits."""
    b = case.injection()
    old = dj.compose(dj.factors(case.dag))(b)
    new = dj.compose(dj.factors(dj.delete(case.dag, arc.name)))(b)
    kept = {*case.dag.graph.nodes} - after(case.dag.graph, arc.target) | {*but}
    return nets.same({n: new[n] for n in kept}, {n: old[n] for n in kept})


def restored(case, arc):
    """The network after the arc was deleted and inserted again."""
    dag = dj.delete(case.dag, arc.name)
    assert arc.name not in dag.params
    assert arc.name not in dag.state
    params, state = case.dag.params.get(arc.name), case.dag.state.get(arc.name)
    return dj.insert(dag, arc, params, state)


def round_trip(case, arc):
    """Graph, parameters, state and values are the old ones, bit by bit."""
    dag, b = restored(case, arc), case.injection()
    assert dag.graph == case.dag.graph
    assert hash(dag.graph) == hash(case.dag.graph)
    assert dag.graph.levels == case.dag.graph.levels
    assert nets.same(dag, case.dag)
    old, new = (dj.compose(dj.factors(d))(b) for d in (case.dag, dag))
    assert nets.same(new, old)


REWRITINGS = [removed, conjugated_below, conjugated_above]


@pytest.mark.parametrize(("name", "dtype"), nets.FEW)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        arc = chosen(case)
        for other in REWRITINGS:
            assert check(case, arc.name, other) <= nets.TOLERANCE[dtype]
        assert nets.violates(check(case, arc.name, not_removed), dtype)
        assert unchanged(case, arc)
        assert not unchanged(case, arc, but=[arc.target])


@pytest.mark.parametrize("name", nets.NAMES)
def test_zoo_round_trip(name):
    round_trip(nets.zoo(name), chosen(nets.zoo(name)))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet8", "inception"])
def test_inverse_must_be_conjugated(name):
    case = nets.zoo(name)
    last = case.dag.graph.arcs[-1].name
    assert check(case, last, conjugated_below) <= nets.TOLERANCE["float32"]
    assert nets.violates(check(case, last, not_conjugated), "float32")


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        arc = chosen(case)
        for other in REWRITINGS:
            assert check(case, arc.name, other) <= 1e-12
        assert nets.violates(check(case, arc.name, not_removed), "float64")
        assert unchanged(case, arc)
        assert not unchanged(case, arc, but=[arc.target])
        round_trip(case, arc)
        if plan.graph.depth > 1:
            last = case.dag.graph.arcs[-1].name
            assert nets.violates(check(case, last, not_conjugated), "float64")


@given(plan=nets.plans(max_nodes=8))
def test_random_without_many_arcs(plan):
    """Half of the arcs deleted: the oracle of what is left."""
    with nets.precision("float64"):
        case = plan.case("float64")
        names = [arc.name for arc in case.dag.graph.arcs]
        gone = names[:: 1 + case.seed % 3]
        dag, b = dj.delete(case.dag, gone), case.injection()
        got = dj.compose(dj.factors(dag))(b)
        want = case._replace(dag=dag).oracle(b)
        assert nets.distance(got, want) <= 1e-12


def test_insertion_elsewhere_is_another_network():
    """Mutant: the arc comes back at another place."""
    case = nets.zoo("dense_block")
    arc = case.dag.graph.by_name["x0_x1"]
    moved = dj.Arc(arc.name, arc.source, "x2", arc.fn)
    dag = dj.insert(dj.delete(case.dag, arc.name), moved, case.dag.params[arc.name])
    assert dag.graph != case.dag.graph
    assert nets.violates(nets.distance(dag(*case.xs), case.dag(*case.xs)), "float32")
