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

    return jax.jacobian(t)(flat)


def check(case):
    xs = tuple(x[:1] for x in case.xs)
    want, product, inverse, factors = jax.device_get(matrices(case.dag, xs))
    one = np.eye(len(want))
    n = sum(factor - one for factor in factors)
    return (
        nets.distance(product, want),
        nets.distance(product, np.linalg.inv(one - n)),
        nets.distance(inverse, one - n, want),
    )


@jax.jit
def matrices(dag, xs):
    """The Jacobian, the product, its inverse by forward substitution, the factors."""
    lin = dj.linearize(dag, *xs, kind="jacobian", tolerance=0)
    whole = lin.product()
    return (
        whole_jacobian(dag, xs),
        whole.dense(),
        whole.inverse().dense(),
        [matrix.dense() for matrix in lin.matrices()],
    )


@jax.jit
def slopes(dag, xs):
    """The Jacobian from the factors, and that of the network."""
    lin = dj.linearize(dag, *xs, kind="jacobian", tolerance=0)
    return lin.jacobian(), jax.jacobian(lambda *xs: dag(*xs))(*xs)


@pytest.mark.parametrize("name", NETS)
def test_nets(name):
    with nets.precision("float64"):
        graph, shapes = NETS[name]
        case = nets.build(graph, shapes, "float64")
        assert max(check(case)) <= 1e-12
        got, want = slopes(case.dag, case.xs)
        assert nets.distance(got, want) <= 1e-12
        rng = np.random.default_rng(5)
        other = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), case.xs)
        mutant, _ = slopes(case.dag, other)
        if name != "Concat":
            assert nets.violates(nets.distance(mutant, want), "float64")


@settings(max_examples=3)
@given(plan=nets.plans(max_nodes=5))
def test_random(plan):
    with nets.precision("float64"):
        assert max(check(plan.case("float64"))) <= 1e-11


def test_single_precision():
    graph, shapes = NETS["gelu"]
    case = nets.build(graph, shapes)
    assert nets.distance(*slopes(case.dag, case.xs)) <= 1e-5
