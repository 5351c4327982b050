"""Kinds of programs that a network may hold: values, gradients, and the cut."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.ode import odeint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dagjax as dj
from tests.compaction.nets import filled, normal
from tests.graph.nets import distance
from tests.sweeps import mostly, seldom

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = {"w": (3, 6), "v": (6, 3), "o": (3, 2)}


def barrier(p, x):
    one, two = lax.optimization_barrier((x @ p["w"], jnp.sin(x) @ p["w"]))
    return jnp.tanh(one) @ p["v"] @ p["o"] + two @ p["v"] @ p["o"]


def barrier_of_parameters(p, x):
    p, x = lax.optimization_barrier((p, x))
    return jnp.tanh(x @ p["w"]) @ p["v"] @ p["o"]


def ode(p, x):
    field = lambda y, t, w, v: jnp.tanh(y @ w) @ v
    return odeint(field, x, jnp.asarray([0.0, 1.0]), p["w"], p["v"])[-1] @ p["o"]


def root(p, x):
    """A fixed point, its gradient by the implicit function theorem."""
    zero = lambda z: z - 0.3 * jnp.tanh(z @ p["w"]) @ p["v"] - x
    solve = lambda f, z: lax.fori_loop(0, 60, lambda i, z: z - f(z), z)

    def tangent(g, y):
        matrix = jax.jacobian(g)(y).reshape(y.size, y.size)
        return jnp.linalg.solve(matrix, y.ravel()).reshape(y.shape)

    return lax.custom_root(zero, jnp.zeros_like(x), solve, tangent) @ p["o"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fixed_point(f, a, z):
    step = lambda c: (f(a, c[0]), c[0])
    return lax.while_loop(
        lambda c: jnp.abs(c[0] - c[1]).max() > 1e-6, step, (z, z + 1)
    )[0]


def _ahead(f, a, z):
    z = fixed_point(f, a, z)
    return z, (a, z)


def _back(f, kept, cotangent):
    z, pull = kept[1], jax.vjp(f, *kept)[1]
    sum_ = lax.fori_loop(0, 60, lambda i, u: cotangent + pull(u)[1], cotangent)
    return pull(sum_)[0], jnp.zeros_like(z)


fixed_point.defvjp(_ahead, _back)


def equilibrium(p, x):
    layer = lambda a, z: 0.3 * jnp.tanh(z @ a[0] + 1) @ a[1] + a[2]
    return fixed_point(layer, (p["w"], p["v"], x), jnp.zeros_like(x)) @ p["o"]


def on_a_mesh(p, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    layer = lambda x, w, v: lax.psum(jnp.tanh(x @ w) @ v, "d")
    specs = {"in_specs": (P(), P(), P()), "out_specs": P()}
    return jax.shard_map(layer, mesh=mesh, **specs)(x, p["w"], p["v"]) @ p["o"]


def literals(p, x):
    h, ones = lax.scan(lambda h, _: (jnp.tanh(h), 1.0), x @ p["w"], None, length=3)
    h = lax.cond(x.sum() > 0, lambda h, c: h * c, lambda h, c: h - c, h, 2.0)
    return (jnp.maximum(h, 0.0) @ p["v"] + ones.sum()) @ p["o"]


CASES = [
    barrier, barrier_of_parameters, ode, root, equilibrium, on_a_mesh, literals,
]  # fmt: skip


def slope(net, params):
    return jax.grad(lambda p: (net(p) ** 2).sum())(params)


SLOW = (ode, equilibrium, on_a_mesh)  # in make test only the cut below


@pytest.mark.parametrize("fn", seldom(CASES, SLOW))
def test_values_and_gradients(fn):
    params, x = filled(SHAPES), normal(2, 3)
    dag = dj.trace(fn, params, x)
    assert distance(dag(x), fn(params, x)) <= 1e-5
    got = slope(lambda p: dag.replace(params=p)(x), params)
    assert distance(got, slope(lambda p: fn(p, x), params)) <= 1e-5


@pytest.mark.parametrize(
    ("fn", "gone"),
    seldom(itertools.product(CASES, "wv"), [*((fn, "v") for fn in SLOW), (ode, "w")]),
)
def test_the_cut_keeps_values_and_gradients(fn, gone):
    """A hidden unit is masked where it is made, or where it is read."""
    params, x = filled(SHAPES), normal(2, 3)
    dag = dj.trace(fn, params, x)
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    mask["w"][:, 0] = gone != "w"
    mask["v"][0] = gone != "v"
    masked = jax.tree.map(jnp.multiply, params, mask)
    cut = dj.compact(dag, mask, verify=False)
    assert distance(cut.net(x), fn(masked, x)) <= 1e-5
    got = slope(lambda p: cut.net.replace(params=p)(x), cut.net.params)
    want = slope(lambda p: fn(p, x), masked)
    assert distance(got, cut.index.gather(want), scale=want) <= 1e-4


def test_the_rule_of_a_solver_counts_as_the_derivative():
    """Its adjoint mixes all indices, up to its tolerance for nothing."""
    dag = dj.trace(ode, filled(SHAPES), normal(2, 3))
    assert dj.units(dag)["w"].size == 6


INTEGERS = {
    "maximum": jnp.maximum, "minimum": jnp.minimum, "product": jnp.multiply,
    "sum": jnp.add, "quotient": lambda i, j: i // j,
}  # fmt: skip


UNSIGNED = [(join, "uint8") for join in ("maximum", "quotient")]


@pytest.mark.parametrize(
    ("join", "dtype"),
    mostly(
        itertools.product(INTEGERS, ["int32", "uint8"]),
        [*UNSIGNED, *((join, "int32") for join in INTEGERS)],
    ),
)
def test_branches_of_integers_meet(join, dtype):
    """They are indices of a table; a quotient by zero ends no process."""
    params, i, j = {"t": normal(9, 4)}, jnp.asarray([3, 8]), jnp.asarray([1, 2])
    fn = lambda p, i, j: p["t"][INTEGERS[join](i, j).astype("int32")]
    i, j = i.astype(dtype), j.astype(dtype)
    dag = dj.trace(fn, params, i, j)
    assert np.array_equal(dag(i, j), fn(params, i, j))
    dj.units(dag)
    dj.compact(dag, {"t": np.ones((9, 4), bool)}, verify="gradients")


@pytest.mark.parametrize("join", ["maximum", "minimum"])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float32"])
def test_an_extreme_without_one_branch_is_the_other(join, dtype):
    i, j = jnp.asarray([3, 0]).astype(dtype), jnp.asarray([1, 2]).astype(dtype)
    fn = lambda p, i, j: INTEGERS[join](i, j).astype("float32") * p["t"]
    dag = dj.trace(fn, {"t": jnp.ones(())}, i, j)
    (off,) = [arc.name for arc in dag.graph.arcs if arc.source == "j"]
    assert np.array_equal(dag(i, j, gates={off: 0.0}), i.astype("float32"))
