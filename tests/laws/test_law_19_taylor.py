"""Law 19: the gradient at the gates is what arcs deliver, weighed by what nodes matter.

`dl/dm_e = <dl/dh_v, f_e(h_u)>` at gates 1, for all arcs from one forward and one
backward pass; `dl/dh_v` is the gradient at the injections.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets


def loss(outputs):
    """Some smooth function of the outputs."""
    return sum(jnp.sum(jnp.sin(y + 0.3)) for y in jax.tree.leaves(outputs))


def open_gates(case):
    return {arc.name: jnp.ones((), case.dtype) for arc in case.dag.graph.arcs}


def gradients(case, gates=None, compiled=True):
    """`dl/dm` for all arcs and `dl/dh` for all nodes, by one gradient."""
    graph = case.dag.graph

    def value(gates, b):
        h = dj.compose(dj.factors(case.dag, gates=gates))(b)
        merges = [(node, graph.merge_of.get(node)) for node in graph.outputs]
        return loss([h[n] if merge is None else merge(h[n]) for n, merge in merges])

    gradient = jax.grad(value, argnums=(0, 1))
    gradient = jax.jit(gradient) if compiled else gradient
    return gradient(gates or open_gates(case), dj.inject(case.dag, *case.xs))


def products(case, adjoint, where=lambda arc: arc.target, presence=True):
    """The scores one by one, from the values and gradients of the nodes.

    Args:
        case: The network.
        adjoint: `{node: dl/dh}`.
        where: The node whose gradient counts (the mutant: where the arc starts).
        presence: Whether a port's presence counts (the mutant: no).
    """
    graph, scores = case.dag.graph, {}
    h = case.oracle(dj.inject(case.dag, *case.xs))
    for arc in graph.arcs:
        source = nets.merged(graph.merge_of.get(arc.source), h[arc.source])
        y, at = case.arc(arc, source), adjoint[where(arc)]
        if arc.port is None:
            scores[arc.name] = float(np.vdot(at, y))
        else:
            value, on = at[arc.port]
            scores[arc.name] = float(np.vdot(value, y)) + float(on) * presence
    return scores


def check(case, **mutant):
    """How far the two are from each other, over all arcs."""
    scores, adjoint = gradients(case)
    assert set(scores) == {arc.name for arc in case.dag.graph.arcs}
    return nets.distance(scores, products(case, adjoint, **mutant))


@pytest.mark.parametrize(("name", "dtype"), nets.FEW)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        assert check(nets.zoo(name, dtype)) <= nets.TOLERANCE[dtype]


def test_gradient_at_the_source_is_not_the_score():
    case = nets.zoo("dense_block")
    assert nets.violates(check(case, where=lambda arc: arc.source), "float32")


def test_presence_of_a_port_counts():
    assert nets.violates(check(nets.zoo("inception"), presence=False), "float32")


def test_other_gates_have_other_scores():
    """Mutant: the gradient where the gates are half open."""
    case = nets.zoo("mlp")
    half = {name: gate / 2 for name, gate in open_gates(case).items()}
    (scores, _), (_, adjoint) = gradients(case, half), gradients(case)
    assert nets.violates(nets.distance(scores, products(case, adjoint)), "float32")


@settings(max_examples=8)
@given(plan=nets.plans(max_nodes=7))
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        got, adjoint = gradients(case, compiled=False)
        want = products(case, adjoint)
        assert nets.distance(got, want) <= 1e-12
        low, high = min(want, key=want.get), max(want, key=want.get)
        if low != high:  # mutant: the scores of two arcs exchanged
            mutant = want | {low: want[high], high: want[low]}
            assert nets.violates(nets.distance(got, mutant), "float64")


def test_one_forward_and_one_backward_pass():
    calls = collections.Counter()

    def counted(name):
        @jax.custom_vjp
        def f(x):
            return jnp.tanh(x)

        def forward(x):
            calls[name, "forward"] += 1
            return jnp.tanh(x), x

        def backward(x, cotangent):
            calls[name, "backward"] += 1
            return (cotangent * (1 - jnp.tanh(x) ** 2),)

        f.defvjp(forward, backward)
        return lambda x: f(x)

    ends = {"a": "xh", "b": "xh", "c": "hk", "d": "xk", "e": "ky", "f": "hy"}
    arcs = [dj.Arc(name, *pair, counted(name)) for name, pair in ends.items()]
    case = nets.build(dj.Graph(arcs, "x", "y"), ((3,),))
    calls.clear()
    at = lambda gates: loss(case.dag(*case.xs, gates=gates))
    scores = jax.grad(at)(open_gates(case))
    assert set(scores) == set(ends)
    # What the first arcs read depends on no gate: there is nothing to go back to.
    inner = [name for name, (source, _) in ends.items() if source != "x"]
    assert all(calls[name, "forward"] == 1 for name in inner)
    assert all(calls[name, "backward"] == 1 for name in inner)
    assert sum(calls.values()) == 2 * len(inner)
    want = products(case, gradients(case)[1])
    assert nets.distance(scores, want) <= nets.TOLERANCE["float32"]
