"""Law 3: the factors in reverse order are one parallel sweep.

`L_1 o ... o L_n = I + N`.
"""

import pytest
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("optimized")


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


@pytest.mark.parametrize(("name", "dtype"), nets.FEW)
def test_zoo(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        assert check(case) <= nets.TOLERANCE[dtype]
        assert nets.violates(check(case, swap), dtype)
        assert nets.violates(check(case, forward), dtype)


@given(plan=nets.plans())
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        assert check(case) <= 1e-12
        if plan.graph.depth == 1:
            return
        assert nets.violates(check(case, swap), "float64")
        assert nets.violates(check(case, forward), "float64")


@settings(max_examples=4)
@given(plan=nets.plans())
def test_random_in_float32(plan):
    assert check(plan.case("float32")) <= nets.TOLERANCE["float32"]


def test_reverse_order_is_bitwise_one_sweep():
    case = nets.zoo("resnet8")
    z = case.injection()
    reverse = dj.compose(dj.factors(case.dag)[::-1])
    assert nets.same(reverse(z), dj.parallel_sweep(case.dag)(z))
