"""Law 5: any order of arcs that respects the line digraph gives the network.

An arc must come after those that end where it starts. So do orders node by node, and
levels counted from the outputs instead of the inputs.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets


def follows(graph):
    """`{arc: arcs that end where it starts}`: the line digraph."""
    return {
        a.name: {b.name for b in graph.arcs if b.target == a.source} for a in graph.arcs
    }


def linear_extension(before, rng):
    """A random order in which everything comes after its predecessors."""
    order, waiting = [], sorted(before)
    while waiting:
        ready = [a for a in waiting if before[a] <= {*order}]
        order.append(ready[rng.integers(len(ready))])
        waiting.remove(order[-1])
    return order


def factors_of(dag, groups):
    """One factor for each group of arcs."""
    whole = dj.parallel_sweep(dag)
    return [dataclasses.replace(whole, arcs=tuple(group)) for group in groups]


def by_arcs(dag, rng):
    return [(name,) for name in linear_extension(follows(dag.graph), rng)]


def by_nodes(dag, rng):
    """Node after node in a random topological order, all arcs into it at once."""
    into = {node: dag.graph.arcs_into(node) for node in dag.graph.nodes}
    before = {node: {arc.source for arc in into[node]} for node in into}
    order = linear_extension(before, rng)
    return [tuple(a.name for a in into[node]) for node in order if into[node]]


def by_late_levels(dag, rng):
    """As late as possible: the level of a node is counted from the last ones."""
    late = dict.fromkeys(dag.graph.nodes, dag.graph.depth)
    for arc in reversed(dag.graph.arcs):
        late[arc.source] = min(late[arc.source], late[arc.target] - 1)
    rows = range(dag.graph.depth + 1)
    return [[a.name for a in dag.graph.arcs if late[a.target] == row] for row in rows]


def too_early(dag, rng):
    """Mutant: one arc before an arc that ends where it starts."""
    order = linear_extension(follows(dag.graph), rng)
    late = next(a for a in order if follows(dag.graph)[a])
    order.remove(late)
    return [(name,) for name in [late, *order]]


def check(case, groups, draws=1):
    """The largest error over random orders."""
    b, rng = case.injection(), np.random.default_rng(0)
    h = dj.compose(dj.factors(case.dag))(b)
    orders = [factors_of(case.dag, groups(case.dag, rng)) for _ in range(draws)]
    return max(nets.distance(dj.compose(order)(b), h) for order in orders)


@pytest.mark.parametrize("name", ["dense_block", "inception", "two_streams"])
def test_twenty_orders(name):
    assert check(nets.zoo(name), by_arcs, draws=20) <= nets.TOLERANCE["float32"]


@pytest.mark.parametrize(("name", "dtype"), nets.FEW)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        for groups in (by_arcs, by_nodes, by_late_levels):
            assert check(case, groups) <= nets.TOLERANCE[dtype]
        assert nets.violates(check(case, too_early), dtype)


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        assert check(case, by_arcs, draws=3) <= 1e-12
        assert check(case, by_nodes) <= 1e-12
        assert check(case, by_late_levels) <= 1e-12
        if plan.graph.depth > 1:
            assert nets.violates(check(case, too_early), "float64")


def test_elementary_is_such_an_order():
    graph = nets.zoo("resnet20").dag.graph
    seen = set()
    for factor in dj.elementary(nets.zoo("resnet20").dag):
        (name,) = factor.arcs
        assert follows(graph)[name] <= seen
        seen.add(name)
    assert seen == {arc.name for arc in graph.arcs}
