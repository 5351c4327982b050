"""Law 19: the gradient at the gates is what arcs deliver, weighed by what nodes matter.

`dl/dm_e = <dl/dh_v, f_e(h_u)>` at gates 1, for all arcs from one forward and one
backward pass; `dl/dh_v` is the gradient at the injections.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets


def loss(outputs):
    """Some smooth function of the outputs."""
    return sum(jnp.sum(jnp.sin(y + 0.3)) for y in jax.tree.leaves(outputs))


def open_gates(case):
    return {arc.name: jnp.ones((), case.dtype) for arc in case.dag.graph.arcs}


def by_gates(case):
    """All scores from one gradient."""
    at = lambda gates: loss(case.dag(*case.xs, gates=gates))
    return jax.grad(at)(open_gates(case))


def by_nodes(case, where=lambda arc: arc.target, presence=True):
    """The scores one by one, from the values and gradients of the nodes.

    Args:
        case: The network.
        where: The node whose gradient counts (the mutant: where the arc starts).
        presence: Whether a port's presence counts (the mutant: no).
    """
    dag = case.dag
    b = dj.inject(dag, *case.xs)
    run = dj.compose(dj.factors(dag))
    seen = lambda h: [dag.graph.merge_of.get(n, _same)(h[n]) for n in dag.graph.outputs]
    adjoint = jax.grad(lambda b: loss(seen(run(b))))(b)
    h = case.oracle(b)
    scores = {}
    for arc in dag.graph.arcs:
        source = nets.merged(dag.graph.merge_of.get(arc.source), h[arc.source])
        y, at = case.arc(arc, source), adjoint[where(arc)]
        if arc.port is None:
            scores[arc.name] = inner(at, y)
        else:
            port = at[arc.port]
            scores[arc.name] = inner(port.value, y)
            scores[arc.name] += float(port.presence) if presence else 0.0
    return scores


def _same(value):
    return value


def inner(a, b):
    return float(np.vdot(a, b))


def check(case, **mutant):
    """How far the two are from each other, over all arcs."""
    return nets.distance(by_gates(case), by_nodes(case, **mutant))


@pytest.mark.parametrize(("name", "dtype"), nets.CASES)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        assert check(nets.zoo(name, dtype)) <= nets.TOLERANCE[dtype]


def test_gradient_at_the_source_is_not_the_score():
    case = nets.zoo("dense_block")
    assert nets.violates(check(case, where=lambda arc: arc.source), "float32")


def test_presence_of_a_port_counts():
    assert nets.violates(check(nets.zoo("inception"), presence=False), "float32")


def test_other_gates_have_other_scores():
    """Mutant: the gradient at gates 0."""
    case = nets.zoo("resnet8")
    at = lambda gates: loss(case.dag(*case.xs, gates=gates))
    closed = jax.grad(at)(jax.tree.map(jnp.zeros_like, open_gates(case)))
    assert nets.violates(nets.distance(closed, by_nodes(case)), "float32")


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        got, want = by_gates(case), by_nodes(case)
        assert set(got) == {arc.name for arc in case.dag.graph.arcs}
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
    scores = by_gates(case)
    assert set(scores) == set(ends)
    # What the first arcs read depends on no gate: there is nothing to go back to.
    inner = [name for name, (source, _) in ends.items() if source != "x"]
    assert all(calls[name, "forward"] == 1 for name in inner)
    assert all(calls[name, "backward"] == 1 for name in inner)
    assert sum(calls.values()) == 2 * len(inner)
    assert nets.distance(scores, by_nodes(case)) <= nets.TOLERANCE["float32"]
