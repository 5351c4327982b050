"""Law 3: the factors in reverse order are one parallel sweep.

`L_1 o ... o L_n = I + N`.
"""

import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets


def check(case, order=lambda factors: factors[::-1]):
    """How far the factors in this order are from one sweep of all arcs."""
    z = case.injection()
    want = dj.parallel_sweep(case.dag)(z)
    return nets.distance(dj.compose(order(dj.factors(case.dag)))(z), want)


def swap(factors):
    """Mutant: reverse order but for one consecutive pair."""
    first, second, *others = factors
    return [*reversed(others), first, second]


def forward(factors):
    """Mutant: the network itself."""
    return factors


@pytest.mark.parametrize("dtype", nets.DTYPES)
@pytest.mark.parametrize("name", nets.ZOO)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        assert check(case) <= nets.TOLERANCE[dtype]
        assert nets.violates(check(case, swap), dtype)
        assert nets.violates(check(case, forward), dtype)


@pytest.mark.parametrize("dtype", nets.DTYPES)
@given(plan=nets.plans())
def test_random(dtype, plan):
    with nets.precision(dtype):
        assert check(plan.case(dtype)) <= nets.TOLERANCE[dtype]


@given(plan=nets.plans(min_depth=2))
def test_mutants_on_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        assert nets.violates(check(case, swap), "float64")
        assert nets.violates(check(case, forward), "float64")


def test_reverse_order_is_bitwise_one_sweep():
    case = nets.zoo("resnet8")
    z = case.injection()
    reverse = dj.compose(dj.factors(case.dag)[::-1])
    assert nets.same(reverse(z), dj.parallel_sweep(case.dag)(z))
