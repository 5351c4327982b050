"""Law 25: values of gates do not compile anew; another structure does, once.

Equal graphs are one graph for `jit`, however often they were built.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from jax.nn import initializers

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("optimized")


class Counted:
    """A jitted network that counts how often it is traced."""

    def __init__(self):
        self.traces = 0
        self.run = jax.jit(self._run)

    def _run(self, dag, gates, *xs):
        self.traces += 1
        return dag(*xs, gates=gates)

    def __call__(self, case, gates=None, dag=None):
        return self.run(dag or case.dag, gates, *case.xs)

    def trace(self, case, gates):
        """The call, as far as tracing; the same cache, but nothing is compiled."""
        self.run.trace(case.dag, gates, *case.xs)


def check(makes, shapes):
    """How many traces networks of these graphs need, and whether each is right."""
    counted = Counted()
    for i, make in enumerate(makes):
        case = nets.build(make(), shapes, seed=i)
        got = counted(case, case.gates(i))
        want = case.outputs(case.oracle(dj.inject(case.dag, *case.xs), case.gates(i)))
        assert nets.distance(got, want) <= nets.TOLERANCE["float32"]
    return counted.traces


@pytest.mark.parametrize("name", nets.NAMES)
def test_zoo_built_three_times_is_traced_once(name):
    (make, shapes), counted = nets.ZOO[name], Counted()
    for seed in range(3):
        case = nets.build(make(), shapes, seed=seed)
        counted.trace(case, case.gates(seed))
    assert counted.traces == 1


def test_small_nets_built_three_times_compute_what_they_should():
    assert check([nets.inception] * 3, ((5,),)) == 1
    assert check([nets.two_streams] * 3, ((3,), (4,))) == 1


def chain(scale=2.0, f=lambda x: x * 2.0):
    """Initializers and functions that are new objects at every call."""
    return dj.series(
        nn.Dense(
            4, kernel_init=initializers.variance_scaling(scale, "fan_in", "normal")
        ),
        lambda x: f(x) + scale,
        (lambda key, x: {"w": jnp.ones((1, 4)) * scale}, lambda p, x: x * p["w"]),
        nn.Dense(3, bias_init=initializers.constant(scale)),
    )


def test_fresh_closures_are_traced_once():
    assert chain() == chain()
    assert hash(chain()) == hash(chain())
    assert check([chain, chain, chain], ((5,),)) == 1


def test_another_initializer_is_traced_again():
    """Mutant: an argument of an initializer, and nothing else, differs."""
    init = initializers.variance_scaling
    layer = lambda scale: dj.series(
        nn.Dense(3, kernel_init=init(scale, "fan_in", "normal"))
    )
    assert layer(2.0) == layer(2.0)
    assert layer(2.0) != layer(1.0)
    assert check([lambda: layer(2.0), lambda: layer(1.0)], ((5,),)) == 2


def test_another_body_is_traced_again():
    """Mutant: a function with another body, or another constant it closes over."""
    double, triple = (lambda x: x * 2.0), (lambda x: x * 3.0)
    assert check([lambda: chain(f=double), lambda: chain(f=triple)], ((5,),)) == 2
    assert check([lambda: chain(2.0), lambda: chain(3.0)], ((5,),)) == 2


@pytest.mark.parametrize("name", ["lenet5", "inception"])
def test_gates_and_deletion(name):
    case, counted = nets.zoo(name), Counted()
    closed = jax.tree.map(jnp.zeros_like, dj.gates(case.dag))
    for gates in (dj.gates(case.dag), case.gates(0), case.gates(1), closed):
        counted(case, gates)
    assert counted.traces == 1
    arc = case.dag.graph.arcs[1].name
    gates = {name: gate for name, gate in case.gates().items() if name != arc}
    for _ in range(2):
        counted(case, gates, dj.delete(case.dag, arc))
    assert counted.traces == 2
    counted(case, case.gates())
    assert counted.traces == 2


@settings(max_examples=4)
@given(plan=nets.plans(max_nodes=6))
def test_random(plan):
    counted, case = Counted(), plan.case("float32")
    graph = plan.graph
    again = dj.Graph(graph.arcs[::-1], graph.inputs, graph.outputs, graph.merges)
    assert again == graph
    assert hash(again) == hash(graph)
    twin = plan._replace(graph=again).case("float32")
    for seed in range(2):
        got, want = counted(case, case.gates(seed)), counted(twin, case.gates(seed))
        assert nets.same(got, want)
    assert counted.traces == 1
    arc = graph.arcs[-1].name
    counted(case, {}, dj.delete(case.dag, arc))
    assert counted.traces == 2


def test_inserted_arc_is_the_old_program():
    case, counted = nets.zoo("mlp"), Counted()
    arc = case.dag.graph.arcs[1]
    back = dj.insert(dj.delete(case.dag, arc.name), arc, case.dag.params[arc.name])
    assert nets.same(counted(case), counted(case, None, back))
    assert counted.traces == 1


def test_factors_are_traced_once():
    traces = 0

    @jax.jit
    def run(factors, z):
        nonlocal traces
        traces += 1
        return dj.compose(factors)(z)

    case = nets.zoo("mlp")
    for seed in range(3):
        run(dj.factors(case.dag, gates=case.gates(seed)), case.injection(seed=seed))
    assert traces == 1
    run(dj.inverse(dj.factors(case.dag, gates=case.gates())), case.injection())
    assert traces == 2
