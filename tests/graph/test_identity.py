"""What counts as the same function."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

import dagjax as dj
from dagjax.graph.core.functions import as_function
from dagjax.jaxprs.canonical import canonical

OFFSET = 1.0


def same(a, b):
    """Equal, and then with equal hashes."""
    one, two = canonical(a), canonical(b)
    assert one != two or hash(one) == hash(two)
    return one == two


def scaled(by):
    return lambda x: by * x


def shifted():
    return lambda x: x + OFFSET


def recursive(base):
    def power(x, n):
        return base if n == 0 else x * power(x, n - 1)

    return power


def mutual(base):
    def even(n):
        return base if n == 0 else odd(n - 1)

    def odd(n):
        return not base if n == 0 else even(n - 1)

    return even


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x

    def method(self, x):
        return self.by * x


@dataclasses.dataclass(frozen=True)
class Power:
    exponent: float

    def __call__(self, x):
        return x**self.exponent

    def method(self, x):
        return x**self.exponent


MAKERS = {
    "number": lambda v: v,
    "tuple": lambda v: (v, (v, 1)),
    "dict": lambda v: {"a": v, "b": [v]},
    "set": lambda v: {v, 7.5},
    "numpy": lambda v: np.full((2, 2), v),
    "jax": lambda v: jnp.full((2, 2), v),
    "closure": lambda v: scaled(v),
    "closure over an array": lambda v: scaled(np.full(3, v)),
    "closure over a closure": lambda v: scaled(scaled(v)),
    "closure over a key": lambda v: scaled(jax.random.key(int(v))),
    "default": lambda v: lambda x, by=v: by * x,
    "keyword default": lambda v: lambda x, *, by=v: by * x,
    "partial": lambda v: functools.partial(jnp.power, v),
    "partial of a closure": lambda v: functools.partial(scaled(v), v),
    "recursion": recursive,
    "mutual recursion": mutual,
    "dataclass": Power,
    "method": lambda v: Power(v).method,
    "initializer": lambda v: initializers.variance_scaling(v, "fan_in", "normal"),
    "module": lambda v: nn.Dense(3, kernel_init=initializers.constant(v)),
    "module in a module": lambda v: nn.Sequential([nn.Dense(3), scaled(v)]),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_same_values_are_the_same_function(kind):
    make = MAKERS[kind]
    assert same(make(2.0), make(2.0))


@pytest.mark.parametrize("kind", MAKERS)
def test_other_values_are_another_function(kind):
    make = MAKERS[kind]
    assert not same(make(2.0), make(3.0))


def test_other_bodies_are_other_functions():
    assert not same(lambda x: x + 1, lambda x: x + 2)
    assert not same(lambda x: jnp.sin(x), lambda x: jnp.cos(x))


def test_types_count():
    assert not same(1, 1.0)
    assert not same(1, True)
    assert not same(scaled(1), scaled(1.0))
    assert not same(np.ones(2, np.float32), np.ones(2))
    assert not same(np.ones((2, 1)), np.ones((1, 2)))


def test_signed_zeros_compute_different_things():
    assert not same(scaled(0.0), scaled(-0.0))


def test_lists_are_tuples():
    assert same([1, 2, (3,)], (1, 2, [3]))
    assert same(nn.Conv(3, [3, 3]), nn.Conv(3, (3, 3)))
    assert not same([1, 2], [2, 1])
    assert not same([[1], 2], [1, [2]])


def test_redefined_global_counts(monkeypatch):
    before = as_function(shifted())
    assert before == as_function(shifted())
    monkeypatch.setitem(globals(), "OFFSET", 2.5)
    assert before != as_function(shifted())
    monkeypatch.setitem(globals(), "scaled", lambda by: lambda x: x)
    assert before != as_function(shifted())


def test_helper_redefined_in_a_notebook_counts():
    """As in a notebook: the cell with `helper` is run again, then the graph's cell."""
    cells = {"__name__": "__main__"}
    exec("def helper(x): return x + 1", cells)
    exec("make = lambda: lambda x: helper(x)", cells)
    before = as_function(cells["make"]())
    assert before == as_function(cells["make"]())
    exec("def helper(x): return x + 2", cells)
    assert before != as_function(cells["make"]())


def test_what_cannot_be_looked_into_is_itself():
    one, two = Scale(2.0), Scale(2.0)
    assert same(one, one)
    assert not same(one, two)
    assert same(one.method, one.method)
    assert not same(one.method, two.method)
    assert same(jnp.sin, jnp.sin)
    assert not same(jnp.sin, jnp.cos)
    unhashable = dict
    assert same(unhashable, dict)


def test_tracers_are_compared_by_identity():
    @jax.jit
    def f(x):
        assert same(scaled(x), scaled(x))
        assert not same(scaled(x), scaled(x + 1))
        return x

    f(jnp.ones(()))


def test_names_of_modules_are_names_of_arcs():
    assert as_function(nn.Dense(3, name="a")) == as_function(nn.Dense(3, name="b"))
    assert as_function(nn.Dense(3, name="a")).name == "a"


def test_kinds_are_kept_apart():
    f = lambda x: x
    assert as_function(f) != as_function((f, f))
    assert as_function(nn.Dense(3)) != as_function(dj.series(nn.Dense(3)))


def test_graphs_are_compared_by_what_they_carry():
    make = lambda width, by: dj.residual(
        dj.block(nn.Dense(width), scaled(by)), name="r"
    )
    assert make(3, 2.0) == make(3, 2.0)
    assert hash(make(3, 2.0)) == hash(make(3, 2.0))
    assert make(3, 2.0) != make(4, 2.0)
    assert make(3, 2.0) != make(3, 1.0)
    assert len({make(3, 2.0), make(3, 2.0), make(3, 1.0)}) == 2
