"""Law 4: `n` sweeps `z <- b + N(z)` are exact, from any junk; `n - 1` are not.

Level `k` is exact after `k` sweeps if the inputs are right, and bit by bit if the sum
of a node is taken in the order of its factor.
"""

import jax
import pytest
from hypothesis import given, settings

import dagjax as dj
from dagjax.graph.core.merges import Port
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("optimized")


def junk(case, b):
    """Random values at all nodes but the inputs."""
    z = case.injection(scale=2.0, seed=5)
    return z | {node: b[node] for node in case.dag.graph.inputs}


def sweep(case, b, z):
    """`b + N(z)`, by the library's `(I + N)(z) - z`."""
    step = dj.parallel_sweep(case.dag)(z)
    return jax.tree.map(lambda b, s, z: b + (s - z), b, step, z)


def ordered_sweep(case, b, z):
    """`b + N(z)`, arc by arc in canonical order: the operations of the factors."""
    dag, new = case.dag, dict(b)
    for arc in dag.graph.arcs:
        merge, x = dag.graph.merge_of.get(arc.source), z[arc.source]
        params, state = dag.params.get(arc.name, {}), dag.state.get(arc.name, {})
        x = x if merge is None else merge(x)
        y, _ = arc.fn.apply(params, state, x, train=False, key=None)
        if arc.port is None:
            new[arc.target] = new[arc.target] + y
        else:
            ports = list(new[arc.target])
            value, presence = ports[arc.port]
            ports[arc.port] = Port(value + y, presence + 1)
            new[arc.target] = tuple(ports)
    return new


def errors(case, sweep=sweep):
    """How far the network is from `n` sweeps and from `n - 1`."""
    b = case.injection()
    h = dj.compose(dj.factors(case.dag))(b)
    z, before = junk(case, b), None
    for _ in range(case.dag.graph.depth):
        before, z = z, sweep(case, b, z)
    return nets.distance(z, h), nets.distance(before, h)


def check(case, dtype):
    """The law and its mutant, a sweep too few."""
    exact, early = errors(case)
    assert exact <= nets.TOLERANCE[dtype]
    assert 3 * nets.TOLERANCE[dtype] < early < float("inf")


@pytest.mark.parametrize(("name", "dtype"), nets.FEW)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        check(nets.zoo(name, dtype), dtype)


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        check(plan.case("float64"), "float64")


@settings(max_examples=4)
@given(plan=nets.plans())
def test_random_in_float32(plan):
    exact, _ = errors(plan.case("float32"))
    assert exact <= nets.TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet8", "inception"])
def test_level_by_level_and_bitwise(name):
    case = nets.zoo(name)
    b = case.injection()
    h = dj.compose(dj.factors(case.dag))(b)
    z, levels = junk(case, b), case.dag.graph.levels
    for k in range(1, case.dag.graph.depth + 1):
        z = ordered_sweep(case, b, z)
        low = [node for node in levels if levels[node] <= k]
        assert nets.same({n: z[n] for n in low}, {n: h[n] for n in low})
        assert nets.same(z, h) == (k == case.dag.graph.depth)


def test_wrong_injection_is_not_exact():
    """Mutant: sweeps that forget `b`."""
    forget = lambda case, b, z: dj.parallel_sweep(case.dag)(z)
    assert nets.violates(errors(nets.zoo("mlp"), forget)[0], "float32")
