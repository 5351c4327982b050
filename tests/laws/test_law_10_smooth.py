"""Law 10: the product of the factors' Jacobians is the Jacobian of the network.

`DL_n ... DL_1 = jax.jacobian(T) = (I - DN)^-1`, for gelu, softmax attention, layer
norm and all merges; the whole matrix, not only its corner.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
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
    "noisy": (nets.noisy(), ((5,),)),
    "inception": (nets.inception(), ((5,),)),
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
    lin = dj.linearize(case.dag, *xs, kind="jacobian", tolerance=0)
    want = whole_jacobian(case.dag, xs)
    matrices = lin.matrices()
    product = lin.product().dense()
    n = sum(matrix.dense() - jnp.eye(len(want)) for matrix in matrices)
    solved = jnp.linalg.inv(jnp.eye(len(want)) - n)
    return (
        nets.distance(product, want),
        nets.distance(product, solved),
        nets.distance(lin.product().inverse().dense(), jnp.eye(len(want)) - n, want),
    )


@pytest.mark.parametrize("name", NETS)
def test_nets(name):
    with nets.precision("float64"):
        graph, shapes = NETS[name]
        case = nets.build(graph, shapes, "float64")
        assert max(check(case)) <= 1e-12
        lin = dj.linearize(case.dag, *case.xs, kind="jacobian", tolerance=0)
        want = jax.jacobian(lambda *xs: case.dag(*xs))(*case.xs)
        assert nets.distance(lin.jacobian(), want) <= 1e-12
        other = nets.build(graph, shapes, "float64", seed=5)
        mutant = dj.linearize(case.dag, *other.xs, kind="jacobian", tolerance=0)
        if name != "Concat":
            assert nets.violates(nets.distance(mutant.jacobian(), want), "float64")


@settings(max_examples=6)
@given(plan=nets.plans(max_nodes=7))
def test_random(plan):
    with nets.precision("float64"):
        assert max(check(plan.case("float64"))) <= 1e-11


def test_single_precision():
    graph, shapes = NETS["transformer"]
    case = nets.build(graph, shapes)
    lin = dj.linearize(case.dag, *case.xs, kind="jacobian", tolerance=0)
    want = jax.jacobian(lambda *xs: case.dag(*xs))(*case.xs)
    assert nets.distance(lin.jacobian(), want) <= 1e-5
