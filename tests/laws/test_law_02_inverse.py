"""Law 2: the network is a bijection of injections, whatever its arcs are.

`T^-1(T(b)) = b`, `T(T^-1(z)) = z` and `(I - N)(T(b)) = b`.
"""

import dataclasses

import pytest
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("optimized")


def check(case, inverse=dj.inverse):
    """The largest error of the three equations, relative to the values on the way."""
    factors = dj.factors(case.dag)
    forth, back = dj.compose(factors), inverse(factors)
    b, z = case.injection(seed=1), case.injection(seed=4)
    h, c = forth(b), back(z)
    sweep = dj.parallel_sweep(case.dag).inverse()
    return max(
        nets.distance(back(h), b, scale=h),
        nets.distance(forth(c), z, scale=(c, z)),
        nets.distance(sweep(h), b, scale=h) if inverse is dj.inverse else 0.0,
    )


def wrong_order(factors):
    """Mutant: each factor undone, the first one first."""
    return dj.compose(factor.inverse() for factor in factors)


def wrong_sign(factors):
    """Mutant: the factors once more, in reverse order."""
    return dj.compose(reversed(factors))


def drop_arc(factors):
    """Mutant: the last factor forgets an arc when it is undone."""
    *before, last = factors
    return dj.inverse([*before, dataclasses.replace(last, arcs=last.arcs[1:])])


@pytest.mark.parametrize(("name", "dtype"), nets.FEW)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        assert check(case) <= nets.TOLERANCE[dtype]
        for mutant in (wrong_order, wrong_sign, drop_arc):
            assert nets.violates(check(case, mutant), dtype)


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        assert check(case) <= 1e-12
        if plan.graph.depth == 1:
            return
        for mutant in (wrong_order, wrong_sign, drop_arc):
            assert nets.violates(check(case, mutant), "float64")


@settings(max_examples=4)
@given(plan=nets.plans())
def test_random_in_float32(plan):
    assert check(plan.case("float32")) <= nets.TOLERANCE["float32"]


def test_inverse_twice_is_the_network():
    factors = dj.factors(nets.zoo("mlp").dag)
    again = dj.inverse(dj.inverse(factors))
    assert [repr(f) for f in again] == [repr(f) for f in factors]
    b = nets.zoo("mlp").injection()
    assert nets.same(again(b), dj.compose(factors)(b))
