"""Law 13: the output is the sum of the interactions of its sub-architectures.

They vanish unless every arc of the set lies on a path within it and one of them ends
at the output (for arcs with f(0) = 0); tanh nets show all of these, linear nets the
paths. Shapley values sum to what all arcs together add.
"""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets


def webs(arcs, fn):
    """A graph between nodes 0, 1, ... with a function without constants on each arc."""
    named = [dj.Arc(f"e{i}", str(u), str(v), fn(i)) for i, (u, v) in enumerate(arcs)]
    return dj.Graph(named, "0", str(max(v for _, v in arcs)))


class Map(nn.Module):
    """`activation(x W)`."""

    activation: object = None

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3, use_bias=False, param_dtype=x.dtype)(x)
        return y if self.activation is None else self.activation(y)


ARCS = {
    "eight": [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 3), (2, 4), (3, 4)],
    "diamond": [(0, 1), (0, 2), (1, 3), (2, 3), (0, 3)],
    "twice": [(0, 1), (0, 1), (1, 2), (0, 2)],
}


def case_of(name, activation=jnp.tanh):
    graph = webs(ARCS[name], lambda _: Map(activation))
    return nets.build(graph, ((3,),), "float64")


def possible(graph):
    """Sub-architectures with one arc into the output."""
    ends = {arc.name for arc in graph.arcs if arc.target in graph.outputs}
    return {arcs for arcs in dj.subgraphs(graph) if len(arcs & ends) == 1}


def paths(graph):
    """The arcs of each path, by recursion."""
    into = lambda node: [{a.name} | rest for a in graph.arcs if a.target == node
                         for rest in into(a.source)] or [set()]  # fmt: skip
    return {frozenset(path) for path in into(graph.outputs[0])}


@pytest.mark.parametrize("name", ARCS)
def test_support(name):
    with nets.precision("float64"):
        case = case_of(name)
        found = dj.interactions(case.dag, *case.xs)
        want = possible(case.dag.graph)
        assert {*found.support(1e-11)} == want
        linear = case_of(name, None)
        support = {*dj.interactions(linear.dag, *linear.xs).support(1e-11)}
        assert support == paths(linear.dag.graph)
        assert support <= want
        if name == "eight":  # mutant: in the tanh net more than paths interact
            assert support < want


def test_few_sets_interact():
    """Fewer than there are sub-architectures, and far fewer than sets of arcs."""
    arcs = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 3), (2, 4), (3, 4), (1, 4)]
    graph = webs(arcs, lambda _: Map(jnp.tanh))
    assert dj.count_subgraphs(graph) == len({*dj.subgraphs(graph)})
    assert len(possible(graph)) < dj.count_subgraphs(graph) < 2**9


def test_biases_interact_beyond_paths():
    """Mutant: with constants an arc alone adds to the output without a path."""
    with nets.precision("float64"):
        graph = webs(ARCS["diamond"], lambda _: dj.block(nn.Dense(3), jnp.tanh))
        case = nets.build(graph, ((3,),), "float64")
        support = {*dj.interactions(case.dag, *case.xs).support(1e-11)}
        assert not support <= possible(graph)


def definition(dag, xs, arcs):
    """`sum (-1)^|A - B| h(B)`, term by term."""
    total = 0.0
    for size in range(len(arcs) + 1):
        for kept in itertools.combinations(arcs, size):
            gates = {a.name: float(a.name in kept) for a in dag.graph.arcs}
            total = total + (-1.0) ** (len(arcs) - size) * dag(*xs, gates=gates)
    return total


def test_definition():
    with nets.precision("float64"):
        case = case_of("diamond")
        found = dj.interactions(case.dag, *case.xs)
        for arcs in [(), ("e0",), ("e1", "e3"), ("e0", "e2", "e4")]:
            want = definition(case.dag, case.xs, arcs)
            assert nets.distance(found.of(*arcs), want) <= 1e-12
        with pytest.raises(ValueError, match="no arc 'e9'"):
            found.of("e9")


SMALL = [n for n in nets.ZOO if n not in ("resnet20", "dense_block", "inception")]


@pytest.mark.parametrize("name", SMALL)
def test_sums(name):
    """Interactions sum to the network, and to its part without the last arc."""
    with nets.precision("float64"):
        case = nets.zoo(name, "float64")
        output = case.dag.graph.outputs[-1]
        graph = case.dag.graph.replace(outputs=output)
        dag, xs = case.dag.replace(graph=graph), case.xs
        found = dj.interactions(dag, *xs)
        assert nets.distance(found.deltas.sum(0), dag(*xs)) <= 1e-11
        within = ~found.sets[:, -1]
        closed = {found.arcs[-1]: 0.0}
        want = dag(*xs, gates=closed)
        assert nets.distance(found.deltas[within].sum(0), want) <= 1e-11
        mutant = found.deltas[found.sets[:, 0]].sum(0)
        assert nets.violates(nets.distance(mutant, dag(*xs)), "float64")


def by_orders(dag, xs):
    """Shapley's definition: the mean over all orders of marginal contributions."""
    names = [arc.name for arc in dag.graph.arcs]
    worth = dict.fromkeys(names, 0.0)
    for order in itertools.permutations(names):
        for i, name in enumerate(order):
            h = [
                dag(*xs, gates={n: float(n in order[:j]) for n in names})
                for j in (i, i + 1)
            ]
            worth[name] = worth[name] + (h[1] - h[0]) / math.factorial(len(names))
    return worth


def test_shapley():
    with nets.precision("float64"):
        case = case_of("twice")
        exact = dj.shapley(case.dag, *case.xs)
        want = by_orders(case.dag, case.xs)
        assert nets.distance(exact.values, want) <= 1e-12
        assert nets.violates(nets.distance(exact.values, {
            name: want["e0"] for name in want}), "float64")  # fmt: skip
        found = dj.interactions(case.dag, *case.xs)
        sizes = np.maximum(found.sets.sum(1), 1)[:, None, None]
        for i, name in enumerate(found.arcs):
            share = (found.deltas / sizes)[found.sets[:, i]].sum(0)
            assert nets.distance(exact.values[name], share) <= 1e-12


@pytest.mark.parametrize("name", ["resnet8", "lenet5", "two_streams", "noisy"])
def test_efficiency(name):
    """The values sum to `h(1) - h(0)`, exact and sampled, with biases and merges."""
    with nets.precision("float64"):
        case = nets.zoo(name, "float64")
        output = case.dag.graph.outputs[-1]
        dag = case.dag.replace(graph=case.dag.graph.replace(outputs=output))
        closed = dict.fromkeys(dj.gates(dag), 0.0)
        want = dag(*case.xs) - dag(*case.xs, gates=closed)
        key = jax.random.key(0)
        exact = dj.shapley(dag, *case.xs)
        sampled = dj.shapley(dag, *case.xs, samples=3, key=key)
        for worth in (exact, sampled):
            assert nets.distance(sum(worth.values.values()), want) <= 1e-11
            assert nets.distance(worth.total, want) <= 1e-11
        assert nets.violates(nets.distance(sampled.values, exact.values), "float64")


def test_sampling_is_unbiased_and_its_errors_are_honest():
    with nets.precision("float64"):
        case = case_of("eight")
        loss = lambda y: jnp.sum(y**2)
        exact = dj.shapley(case.dag, *case.xs, readout=loss)
        sampled = dj.shapley(
            case.dag, *case.xs, readout=loss, samples=400, key=jax.random.key(1)
        )
        arcs = [*exact.values]
        off = np.array([sampled.values[a] - exact.values[a] for a in arcs])
        errors = np.array([sampled.errors[a] for a in arcs])
        assert np.all(np.abs(off) < 4 * errors + 1e-12)
        assert np.any(np.abs(off) > 0.1 * errors)
        few = dj.shapley(
            case.dag, *case.xs, readout=loss, samples=25, key=jax.random.key(1)
        )
        ratio = np.mean([few.errors[a] / sampled.errors[a] for a in arcs])
        assert 2.5 < ratio < 6.5  # 4 for 16 times the samples


@settings(max_examples=4)
@given(plan=nets.plans(max_nodes=5))
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        graph = case.dag.graph
        dag = case.dag.replace(graph=graph.replace(outputs=graph.outputs[0]))
        names = [arc.name for arc in graph.arcs][:8]
        found = dj.interactions(dag, *case.xs, arcs=names)
        assert nets.distance(found.deltas.sum(0), dag(*case.xs)) <= 1e-11
        total = sum(dj.shapley(dag, *case.xs, arcs=names).values.values())
        closed = dict.fromkeys(names, 0.0)
        want = dag(*case.xs) - dag(*case.xs, gates=closed)
        assert nets.distance(total, want) <= 1e-11


def test_sampling_needs_a_key():
    graph = webs([(i, i + 1) for i in range(21)], lambda _: jnp.tanh)
    dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"more than 20 \(here 21\)"):
        dj.shapley(dag, jnp.ones((1, 2)))


def test_readouts():
    """One array, complex perhaps; trees would mix with the sets."""
    with nets.precision("float64"):
        case = case_of("twice")
        turned = dj.shapley(case.dag, *case.xs, readout=lambda y: 1j * y.sum())
        plain = dj.shapley(case.dag, *case.xs, readout=lambda y: y.sum())
        for arc, value in plain.values.items():
            assert abs(turned.values[arc] - 1j * value) <= 1e-12
        with pytest.raises(ValueError, match="give a readout that returns one"):
            dj.interactions(case.dag, *case.xs, readout=lambda y: (y.sum(), y.max()))
        with pytest.raises(ValueError, match="at least one of each"):
            dj.shapley(case.dag, *case.xs, arcs=[])
