"""Law 6: the factors of two arcs commute unless one ends where the other starts.

Consecutive arcs commute if the second is constant along what the first adds. The
commutator of two linear arcs is their composition, as a skip arc.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets


def check(z, one, two):
    """How far `one o two` is from `two o one`."""
    return nets.distance(dj.compose([two, one])(z), dj.compose([one, two])(z))


def pairs(case):
    """Pairs of elementary factors: those that share no node in a row, and others."""
    arcs = case.dag.graph.by_name
    apart, consecutive = [], []
    for one, two in itertools.combinations(dj.elementary(case.dag), 2):
        a, b = arcs[one.arcs[0]], arcs[two.arcs[0]]
        chain = a.target == b.source or b.target == a.source
        (consecutive if chain else apart).append((one, two))
    return apart, consecutive


def some(values, count, seed=0):
    """A random few of many."""
    order = np.random.default_rng(seed).permutation(len(values))[:count]
    return [values[i] for i in order]


@pytest.mark.parametrize(("name", "dtype"), nets.FEW)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        z = case.injection()
        apart, consecutive = pairs(case)
        for pair in some(apart, 6):
            assert check(z, *pair) <= nets.TOLERANCE[dtype]
        for pair in some(consecutive, 4):  # the mutant
            assert nets.violates(check(z, *pair), dtype)


@given(plan=nets.plans(min_depth=2))
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        z = case.injection()
        apart, consecutive = pairs(case)
        for pair in some(apart, 6):
            assert check(z, *pair) <= 1e-12
        for pair in some(consecutive, 3):
            assert nets.violates(check(z, *pair), "float64")


@given(plan=nets.plans(max_nodes=8))
def test_levels_commute_unless_an_arc_joins_them(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        z, levels = case.injection(), case.dag.graph.levels
        ends = {(levels[a.source], levels[a.target]) for a in case.dag.graph.arcs}
        rows = list(enumerate(dj.factors(case.dag), 1))
        for (low, one), (high, two) in itertools.combinations(rows, 2):
            error = check(z, one, two)
            if (low, high) in ends:
                assert nets.violates(error, "float64")
            else:
                assert error <= 1e-12


def chain(first, second):
    """The two factors of `x -> h -> y` and a random state."""
    arcs = [dj.Arc("first", "x", "h", first), dj.Arc("second", "h", "y", second)]
    case = nets.build(dj.Graph(arcs, "x", "y"), ((3,),), "float64")
    return dj.elementary(case.dag), case.injection()


def test_periodic_arc_does_not_see_full_periods():
    with nets.precision("float64"):
        turns = lambda x: 2 * jnp.pi * jnp.round(3 * x)
        factors, z = chain(turns, jnp.sin)
        assert float(abs(turns(z["x"])).max()) > 6
        assert check(z, *factors) <= 1e-12
        half_turns = lambda x: jnp.pi * jnp.round(3 * x)
        factors, z = chain(half_turns, jnp.sin)
        assert nets.violates(check(z, *factors), "float64")


def commutator(first, second):
    """`E' E E'^-1 E^-1` of consecutive arcs at a random state, and the state."""
    (one, two), z = chain(first, second)
    return dj.compose([one.inverse(), two.inverse(), one, two])(z), z


def test_commutator_of_linear_arcs_is_a_skip_arc():
    mix = lambda x: x @ jnp.triu(jnp.ones((3, 3), x.dtype))
    with nets.precision("float64"):
        for second in (lambda x: 3.0 * x, lambda x: jnp.tanh(3.0 * x)):
            got, z = commutator(mix, second)
            error = nets.distance(got, z | {"y": z["y"] + second(mix(z["x"]))})
            linear = second(jnp.ones(())) == 3.0
            assert error <= 1e-12 if linear else nets.violates(error, "float64")
