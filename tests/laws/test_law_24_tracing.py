"""Law 24: a function traced and taken apart into factors is the function.

Under jit, vmap and grad; another batch size gives the same graph; and the laws of
factors hold as they do for the network that was built.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets
from tests.laws import test_law_03_duality as duality
from tests.laws import test_law_04_jacobi as jacobi
from tests.laws import test_law_05_order as order
from tests.laws import test_law_06_commutation as commutation
from tests.laws import test_law_19_taylor as taylor
from tests.sweeps import seldom

NAMES = ["dense_block", "resnet8", "two_streams"]


def traced(case, granularity="primitives"):
    """A case whose network is traced from the built one."""
    run = lambda held, *xs: case.dag.replace(params=held[0], state=held[1])(*xs)
    held = (case.dag.params, case.dag.state)
    dag = dj.trace(run, held, *case.xs, granularity=granularity)
    return case._replace(dag=dag, functions={})


def factored(dag, *xs):
    """The outputs by the level factors."""
    h = dj.compose(dj.factors(dag))(dj.inject(dag, *xs))
    outputs = tuple(dag.read(node, h[node]) for node in dag.graph.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


@pytest.mark.filterwarnings("ignore::dagjax.TraceWarning")  # arcs that lead nowhere
@given(plan=nets.plans(max_nodes=7))
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        net = traced(case, "layers").dag
        want = jax.jit(lambda dag: dag(*case.xs))(case.dag)
        assert nets.distance(jax.jit(factored)(net, *case.xs), want) <= 1e-12
        louder = net.replace(params=jax.tree.map(lambda p: 1.01 * p, net.params))
        if any(arc.fn.reads for arc in net.graph.arcs):
            mutant = nets.distance(jax.jit(factored)(louder, *case.xs), want)
            assert nets.violates(mutant, "float64")


@pytest.mark.parametrize(
    ("name", "granularity"),
    seldom(
        itertools.product(NAMES, ["layers", "primitives"]),
        [("resnet8", "primitives"), ("dense_block", "layers")],
    ),
)
def test_transformations(name, granularity):
    """Under jit, under vmap over parameters, and in the gradient."""
    case = nets.zoo(name)
    net = traced(case, granularity).dag
    ours = lambda held: factored(net.replace(params=held), *case.xs)
    theirs = lambda held: case.dag.replace(params=held[0], state=held[1])(*case.xs)
    energy = lambda f: lambda held: sum((y**2).sum() for y in jax.tree.leaves(f(held)))
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), net.params)
    for way in (lambda f: f, jax.vmap, lambda f: jax.vmap(jax.grad(energy(f)))):
        held = net.params if way(ours) is ours else two
        got, want = jax.jit(way(ours))(held), jax.jit(way(theirs))(held)
        assert nets.distance(got, want) <= 1e-4
        mutant = jax.tree.map(lambda y: 1.1 * y, got)
        assert nets.violates(nets.distance(mutant, want), "float32")


@pytest.mark.parametrize("name", NAMES)
def test_another_batch_size(name):
    case = nets.zoo(name)
    larger = tuple(jnp.concatenate([x, 1 - x, x]) for x in case.xs)
    here, there = traced(case), traced(case._replace(xs=larger))
    shape = lambda graph: [(a.name, a.source, a.target, a.port) for a in graph.arcs]
    assert shape(here.dag.graph) == shape(there.dag.graph)
    got = jax.jit(factored)(here.dag, *larger)
    assert nets.distance(got, jax.jit(lambda dag: dag(*larger))(case.dag)) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_laws_of_factors(name):
    """Laws 3 to 6, and 19, each with its mutant."""
    with nets.precision("float64"):
        case = traced(nets.zoo(name, "float64"), "layers")
        assert duality.check(case) <= 1e-12
        assert nets.violates(duality.check(case, duality.swap), "float64")
        jacobi.check(case, "float64")
        assert order.check(case, order.by_arcs) <= 1e-12
        assert nets.violates(order.check(case, order.too_early), "float64")
        apart, consecutive = commutation.pairs(case)
        z = case.injection()
        for one, two in commutation.some(apart, 3):
            assert commutation.check(z, one, two) <= 1e-12
        found = [
            commutation.check(z, *pair) for pair in commutation.some(consecutive, 3)
        ]
        assert nets.violates(max(found), "float64")
        assert taylor.check(case) <= 1e-12


def test_gates_of_traced_arcs_compile_once():
    """Law 25."""
    net, count = traced(nets.zoo("resnet8"), "blocks"), []
    run = jax.jit(lambda dag, gates, x: (count.append(1), dag(x, gates=gates))[1])
    gates = dj.gates(net.dag)
    for value in (1.0, 0.0, 0.5):
        run(net.dag, jax.tree.map(lambda g: jnp.asarray(value), gates), *net.xs)  # noqa: B023
    assert len(count) == 1
    assert np.isfinite(run(net.dag, gates, *net.xs)).all()
