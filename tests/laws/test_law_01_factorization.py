"""Law 1: `L_n o ... o L_1` is the network.

For injections at every node it equals the recursive oracle, in both modes; for images
at the input it equals the module that was written the ordinary way.
"""

import dataclasses

import jax
import pytest
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets

TWINS = ["lenet_300_100", "lenet5", "resnet8"]


def distances(case, *factors, **mode):
    """How far compositions are from the oracle, at a random injection."""
    b = case.injection()
    want = case.oracle(b, **mode)
    return [nets.distance(dj.compose(f(case.dag, **mode))(b), want) for f in factors]


def distance(case, factors=dj.factors, **mode):
    """That of one."""
    return distances(case, factors, **mode)[0]


def drop_arc(dag, **mode):
    """Mutant: the last factor forgets an arc."""
    *before, last = dj.factors(dag, **mode)
    return [*before, dataclasses.replace(last, arcs=last.arcs[1:])]


def swap_factors(dag, **mode):
    """Mutant: the first two factors in the wrong order."""
    first, second, *others = dj.factors(dag, **mode)
    return [second, first, *others]


@pytest.mark.parametrize(("name", "dtype"), nets.CASES)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        right, *mutants = distances(case, dj.factors, drop_arc, swap_factors)
        assert right <= nets.TOLERANCE[dtype]
        assert all(nets.violates(mutant, dtype) for mutant in mutants)
        assert distance(case, gates=case.gates()) <= nets.TOLERANCE[dtype]


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        assert distance(case) <= 1e-12
        assert distance(case, gates=case.gates()) <= 1e-12
        want = case.outputs(case.oracle(dj.inject(case.dag, *case.xs)))
        assert nets.distance(case.dag(*case.xs), want) <= 1e-12


@settings(max_examples=4)
@given(plan=nets.plans())
def test_random_in_float32(plan):
    case = plan.case("float32")
    assert distance(case, gates=case.gates()) <= nets.TOLERANCE["float32"]


@settings(max_examples=6)
@given(plan=nets.plans(min_depth=2, max_nodes=8))
def test_mutants_on_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        for mutant in distances(case, drop_arc, swap_factors):
            assert nets.violates(mutant, "float64")
        gates, names = case.gates(), [arc.name for arc in case.dag.graph.arcs]
        other = gates | {names[-1]: gates[names[-1]] + 0.5}
        wrong_gate = lambda dag, gates: dj.factors(dag, gates=other)
        assert nets.violates(distance(case, wrong_gate, gates=gates), "float64")


@pytest.mark.parametrize("dtype", nets.DTYPES)
@pytest.mark.parametrize("name", ["resnet8", "noisy"])
def test_train_mode(name, dtype, key):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        assert distance(case, train=True, key=key) <= nets.TOLERANCE[dtype]
        evaluate = lambda dag, train, key: dj.factors(dag)
        assert nets.violates(distance(case, evaluate, train=True, key=key), dtype)


def test_train_mode_draws_from_the_key(key):
    case = nets.zoo("noisy")
    another = lambda dag, train, key: dj.factors(
        dag, train=train, key=jax.random.fold_in(key, 1)
    )
    assert nets.violates(distance(case, another, train=True, key=key), "float32")


@pytest.mark.parametrize("dtype", nets.DTYPES)
@pytest.mark.parametrize("name", TWINS)
def test_twin(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        dag, (x,) = case.dag, case.xs
        module, variables = nets.twin(name, dag)
        h = dj.compose(dj.factors(dag))(dj.inject(dag, x))
        want = module.apply(variables, x)
        assert nets.distance(h["out"], want) <= nets.TOLERANCE[dtype]
        assert nets.distance(dag(x), want) <= nets.TOLERANCE[dtype]
        layer = next(iter(dag.params))
        doubled = dag.params | {layer: jax.tree.map(lambda w: 2 * w, dag.params[layer])}
        mutant = dag.replace(params=doubled)
        assert nets.violates(nets.distance(mutant(x), want), dtype)


@pytest.mark.parametrize("dtype", nets.DTYPES)
def test_twin_in_train_mode(dtype, key):
    with nets.precision(dtype):
        case = nets.zoo("resnet8", dtype)
        dag, (x,) = case.dag, case.xs
        module, variables = nets.twin("resnet8", dag)
        want, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
        got, state = dag.apply(x, train=True, key=key)
        h = dj.compose(dj.factors(dag, train=True, key=key))(dj.inject(dag, x))
        assert nets.distance(got, want) <= nets.TOLERANCE[dtype]
        assert nets.distance(h["out"], want) <= nets.TOLERANCE[dtype]
        stats = nets.relayed(state)
        assert nets.distance(stats, updated["batch_stats"]) <= nets.TOLERANCE[dtype]
        old = nets.relayed(dag.state)
        assert nets.violates(nets.distance(old, updated["batch_stats"]), dtype)
