"""Law 10: the product of the factors' Jacobians is the Jacobian of the network.

`DL_n ... DL_1 = jax.jacobian(T) = (I - DN)^-1`, for gelu, softmax attention, layer
norm and all merges; the whole matrix, not only its corner.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets


def transformer(heads=2):
    norm = nn.LayerNorm(use_bias=False, use_scale=False)
    head = lambda i: dj.block(
        norm,
        dj.merge(dj.Attention(), *(nn.Dense(2, name=n) for n in "qkv")),
        nn.Dense(4),
        name=f"head{i}",
    )
    mlp = dj.block(norm, nn.Dense(6), nn.gelu, nn.Dense(4), name="mlp")
    mix = dj.parallel(dj.identity, *map(head, range(heads)))
    return dj.series(mix, dj.residual(mlp))


def merged(how):
    arms = [dj.block(nn.Dense(3), jnp.tanh, name=f"arm{i}") for i in range(3)]
    router = [nn.Dense(3, name="router")] if isinstance(how, dj.Experts) else []
    return dj.series(dj.merge(how, *router, *arms), nn.Dense(2))


NETS = {
    "transformer": (transformer(), ((3, 4),)),
    "gelu": (dj.zoo.mlp((6, 4), activation=nn.gelu, input_shape=(5,)), ((5,),)),
    "gated": (dj.series(dj.gated(nn.Dense(4), nn.Dense(4)), nn.Dense(2)), ((3,),)),
    **{
        type(how).__name__: (merged(how), ((4,),))
        for how in (dj.Max(), dj.Mean(), dj.Product(), dj.Concat(), dj.Experts())
    },
}


def whole_jacobian(dag, xs):
    """Of the map from all injections to all values; rows and columns by node."""
    z = dj.inject(dag, *xs)
    nodes = dag.graph.nodes
    flat, back = jax.flatten_util.ravel_pytree([z[node] for node in nodes])

    def t(vector):
        b = dict(zip(nodes, back(vector), strict=True))
        h = dj.compose(dj.factors(dag))(b)
        return jax.flatten_util.ravel_pytree([h[node] for node in nodes])[0]

    return jax.jit(jax.jacobian(t))(flat)


def check(case):
    xs = tuple(x[:1] for x in case.xs)
    lin = dj.linearize(case.dag, *xs, kind="jacobian", tolerance=0)
    want = whole_jacobian(case.dag, xs)
    product, inverse, factors = jax.jit(dense)(lin)
    one = np.eye(len(want))
    n = sum(np.asarray(factor) - one for factor in factors)
    return (
        nets.distance(product, want),
        nets.distance(product, np.linalg.inv(one - n)),
        nets.distance(inverse, one - n, want),
    )


def dense(lin):
    """The product, its inverse by forward substitution, the factors."""
    whole = lin.product()
    return (
        whole.dense(),
        whole.inverse().dense(),
        [matrix.dense() for matrix in lin.matrices()],
    )


@pytest.mark.parametrize("name", NETS)
def test_nets(name):
    with nets.precision("float64"):
        graph, shapes = NETS[name]
        case = nets.build(graph, shapes, "float64")
        assert max(check(case)) <= 1e-12
        lin = dj.linearize(case.dag, *case.xs, kind="jacobian", tolerance=0)
        want = jax.jit(jax.jacobian(lambda *xs: case.dag(*xs)))(*case.xs)
        assert nets.distance(lin.jacobian(), want) <= 1e-12
        other = nets.build(graph, shapes, "float64", seed=5)
        mutant = dj.linearize(case.dag, *other.xs, kind="jacobian", tolerance=0)
        if name != "Concat":
            assert nets.violates(nets.distance(mutant.jacobian(), want), "float64")


@settings(max_examples=3)
@given(plan=nets.plans(max_nodes=5))
def test_random(plan):
    with nets.precision("float64"):
        assert max(check(plan.case("float64"))) <= 1e-11


def test_single_precision():
    graph, shapes = NETS["gelu"]
    case = nets.build(graph, shapes)
    lin = dj.linearize(case.dag, *case.xs, kind="jacobian", tolerance=0)
    want = jax.jacobian(lambda *xs: case.dag(*xs))(*case.xs)
    assert nets.distance(lin.jacobian(), want) <= 1e-5
