"""Law 8: the two bracketings of the product of arrays of functions.

From the right they are transfer functions, from the left sums over paths; the two
differ where a nonlinearity reads a sum, and only there.
The oracle multiplies arrays of Python functions, entry by entry: an absent entry is the
zero function, the diagonal the identity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets

SUMS = ("mlp", "lenet5", "resnet8", "dense_block", "noisy")


def bare(dag, arc):
    """An arc without its constant, `f(y) - f(0)`."""
    case = nets.Case(dag, (), "float64", {}, 0)
    f = lambda y: case.arc(arc, np.asarray(y))
    return lambda y: f(y) - f(np.zeros_like(y))


def array(dag, level):
    """`L_l`: the arcs into a level, summed where parallel, and the identity."""
    entries = {(node, node): [lambda y: y] for node in dag.graph.nodes}
    for arc in dag.graph.at_level[level]:
        entries.setdefault((arc.target, arc.source), []).append(bare(dag, arc))
    summed = lambda fs: lambda y: sum(f(y) for f in fs)
    return {place: summed(fs) for place, fs in entries.items()}


def times(a, b):
    """`(A B)_vw = sum_u A_vu o B_uw`."""
    terms = {}
    for (v, u), f in a.items():
        for (middle, w), g in b.items():
            if u == middle:
                both = lambda y, f=f, g=g: f(g(y))
                terms.setdefault((v, w), []).append(both)
    return {p: (lambda y, fs=fs: sum(f(y) for f in fs)) for p, fs in terms.items()}


def nested(dag):
    """The two products of all level arrays."""
    factors = [array(dag, level) for level in range(1, dag.graph.depth + 1)]
    right = functools.reduce(lambda done, factor: times(factor, done), factors)
    left = functools.reduce(times, reversed(factors))
    return right, left


class Tanh(nn.Module):
    """`tanh(x W)`: without constants."""

    activation: object = jnp.tanh

    @nn.compact
    def __call__(self, x):
        return self.activation(nn.Dense(3, use_bias=False, param_dtype=x.dtype)(x))


ARCS = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 3), (2, 4), (3, 4), (2, 4)]


def web(activation=jnp.tanh):
    arcs = [
        dj.Arc(f"e{i}", f"n{u}", f"n{v}", Tanh(activation))
        for i, (u, v) in enumerate(ARCS)
    ]
    return nets.build(dj.Graph(arcs, "n0", "n4"), ((3,),), "float64")


def sum_is_read(graph, source, target):
    """Whether a node between is reached on two paths (all arcs are nonlinear)."""
    steps = {(a.source, a.target) for a in graph.arcs}
    paths = lambda s, t: (s == t) + sum(paths(s, u) for u, v in steps if v == t)
    inner = [n for n in graph.nodes if n not in (source, target)]
    return any(paths(source, n) > 1 and paths(n, target) for n in inner)


def test_arrays():
    """Every entry of both products, from every node to every node."""
    with nets.precision("float64"):
        case = web()
        y = np.asarray(case.xs[0])
        right, left = nested(case.dag)
        assert {*right} == {*left}
        for (v, w), f in right.items():
            got = dj.transfer(case.dag, w, v)(y)
            assert nets.distance(got, f(y)) <= 1e-12
            paths = dj.path_sum(case.dag, w, v, apart=False)(y)
            assert nets.distance(paths, left[v, w](y)) <= 1e-12
            gap = nets.distance(got, paths)
            if sum_is_read(case.dag.graph, w, v):
                assert nets.violates(gap, "float64")
            else:
                assert gap <= 1e-12


def test_superposition_fails():
    """The transfer functions do not add up to the network, unless it is linear."""
    with nets.precision("float64"):
        for activation, linear in ((jnp.tanh, False), (dj.identity, True)):
            case = web(activation)
            b = case.injection()
            h = dj.compose(dj.factors(case.dag))(b)["n4"]
            parts = [dj.transfer(case.dag, node, "n4")(y) for node, y in b.items()]
            error = nets.distance(sum(parts), h)
            assert error <= 1e-12 if linear else nets.violates(error, "float64")


@pytest.mark.parametrize("name", ["lenet5", "noisy", "inception", "two_streams"])
def test_from_the_input_it_is_the_network(name):
    """With biases, batch norm, merges: a constant node carries what does not vanish."""
    case = nets.zoo(name)
    graph = case.dag.graph
    b = dj.inject(case.dag, *case.xs)
    source = graph.inputs[0]
    alone = {node: jax.tree.map(jnp.zeros_like, value) for node, value in b.items()}
    h = dj.compose(dj.factors(case.dag))(alone | {source: b[source]})
    for target, want in zip(graph.outputs, case.outputs(h), strict=True):
        got = dj.transfer(case.dag, source, target)(case.xs[0])
        assert nets.distance(got, want) <= 1e-5


def explicit_path_sum(dag, y, source, target):
    """Path by path, from the source and from every constant, by recursion."""
    graph = dag.graph
    constants = dict.fromkeys(graph.nodes, 0.0)
    case = nets.Case(dag, (), "float64", {}, 0)
    zero = jax.tree.map(jnp.zeros_like, dj.inject(dag, jnp.zeros_like(y)))
    for arc in graph.arcs:
        value = case.arc(arc, np.asarray(zero[arc.source]))
        constants[arc.target] = constants[arc.target] + value

    def onward(node, value):
        total = value if node == target else 0.0
        for arc in graph.arcs:
            if arc.source == node:
                total = total + onward(arc.target, bare(dag, arc)(value))
        return total

    total = onward(source, np.asarray(y))
    for node, value in constants.items():
        if np.ndim(value):
            total = total + onward(node, value)
    return total


@pytest.mark.parametrize("name", ["mlp", "dense_block"])
def test_enumerated_paths(name):
    with nets.precision("float64"):
        case = nets.zoo(name, "float64")
        (source,), (target,) = case.dag.graph.inputs, case.dag.graph.outputs
        got = dj.path_sum(case.dag, source, target)(case.xs[0])
        want = explicit_path_sum(case.dag, case.xs[0], source, target)
        assert nets.distance(got, want) <= 1e-11
        few = dj.delete(case.dag, case.dag.graph.arcs[-1].name)
        mutant = dj.path_sum(few, source, target)(case.xs[0])
        assert nets.violates(nets.distance(mutant, want), "float64")


def on(graph, shape=(1,)):
    x = jnp.full((1, *shape), 2.0)
    return dj.init(jax.random.key(0), graph, x), x


@pytest.mark.parametrize("after", [(), (dj.identity,)], ids=["", "identity"])
def test_a_rectifier_behind_a_sum(after):
    """`x - x` rectified is 0, the two paths give 2, whatever the in-degree before."""
    graph = dj.series(dj.parallel(dj.identity, jnp.negative), *after, nn.relu)
    dag, x = on(graph)
    assert dj.transfer(dag, "in", "out")(x) == 0
    assert dj.path_sum(dag, "in", "out")(x) == 2
    assert dj.path_sum(dag, "in", "out", apart=False)(x) == 0  # one entry, whole
    assert dj.path_gap(dag, x + 0) == jnp.inf


def test_they_agree_behind_linear_arcs():
    """Every node with several paths to it has additive out-arcs only."""
    linear = nn.Dense(1, use_bias=False)
    graph = dj.series(dj.parallel(dj.series(nn.relu, linear), linear), linear, linear)
    dag, x = on(graph)
    assert float(dj.path_gap(dag, x)) < 1e-6
    chain, x = on(dj.series(nn.Dense(3), nn.relu, nn.Dense(2), jnp.tanh))
    assert float(dj.path_gap(chain, x)) < 1e-6
    mixed, x = on(dj.series(dj.residual(dj.series(jnp.tanh, linear)), jnp.tanh))
    assert float(dj.path_gap(mixed, x)) > 1e-3


@settings(max_examples=5)
@given(plan=nets.plans(max_nodes=6))
def test_random(plan):
    """Random DAGs: transfer by its definition; path sums where they are defined."""
    with nets.precision("float64"):
        case = plan.case("float64")
        graph = case.dag.graph
        b = jax.tree.map(jnp.zeros_like, dj.inject(case.dag, *case.xs))
        for source in graph.inputs:
            y = case.injection()[source]
            want = case.oracle(b | {source: y})
            for target in graph.nodes:
                got = dj.transfer(case.dag, source, target)(y)
                seen = nets.merged(graph.merge_of.get(target), want[target])
                assert nets.distance(got, seen) <= 1e-12


def test_concatenations_are_passed_through():
    graph = dj.series(dj.concat(nn.Dense(2), nn.Dense(3)), nn.Dense(2))
    dag, x = on(graph, (3,))
    assert float(dj.path_gap(dag, x)) < 1e-5


def test_errors():
    case = nets.zoo("inception")
    with pytest.raises(dj.GraphError, match=r"'n5', a Product\(\) of several values"):
        dj.path_sum(case.dag, "in", "out")
    with pytest.raises(dj.GraphError, match="no node named 'middle'"):
        dj.transfer(case.dag, "in", "middle")
    deep = dj.series(*[dj.residual(jnp.tanh)] * 17)
    dag = dj.init(jax.random.key(0), deep, jnp.ones((1, 1)))
    dj.path_sum(dag, "in", "out", apart=False)
    with pytest.raises(dj.GraphError, match="paths lead to 'out', up to 65,536"):
        dj.path_sum(dag, "in", "out")
