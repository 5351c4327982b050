"""Law 9: with its gates frozen at a point, a network is a product of real matrices.

`L_n ... L_1 b' = h` in any bracketing, determinants 1, `N^(n+1) = 0`, the product is
`(I - N)^-1`, its inverse by forward substitution. For piecewise linear arcs the product
is the Jacobian, and without biases `h = J x`.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets

ONE = 1  # example: of a batch every example is a part of the point
PIECEWISE = ("mlp", "lenet5", "dense_block")  # others: test_laws_on_the_zoo
SUMS = ("noisy", "dense_block", "inception", "two_streams")


def point(case, kind="value"):
    """The network at its first example; a kink would be a warning, an error here."""
    xs = tuple(x[:ONE] for x in case.xs)
    return xs, dj.linearize(case.dag, *xs, kind=kind)


def on_host(lin):
    """The matrices in numpy, where nothing is compiled to multiply them."""
    return jax.device_get(lin.matrices())


def bracketings(matrices):
    """From the right, from the left, in pairs."""
    left = functools.reduce(lambda done, one: one @ done, matrices)
    right = functools.reduce(lambda done, one: done @ one, reversed(matrices))
    pairs = list(matrices)
    while len(pairs) > 1:
        rest = pairs[len(pairs) // 2 * 2 :]
        pairs = [b @ a for a, b in zip(pairs[::2], pairs[1::2], strict=False)] + rest
    return left, right, pairs[0]


def strict_part(matrices):
    """`N`, all blocks of all factors in one array."""
    sizes = matrices[0].sizes
    blocks = {p: b for matrix in matrices for p, b in matrix.blocks.items()}
    whole = np.asarray(dj.BlockMatrix(blocks, matrices[0].nodes).dense())
    return whole - np.eye(sum(sizes.values()))


def value_error(lin, matrices):
    """How far the product times the constants is from the values."""
    b, h = lin.vector(lin.b), lin.vector(lin.floats())
    one_by_one = functools.reduce(lambda z, matrix: matrix(z), matrices, b)
    errors = [nets.distance(one_by_one, h)]
    for whole in bracketings(matrices):
        scale = (h, jnp.max(abs(whole.dense())))
        errors.append(nets.distance(whole(b), h, scale=scale))
    return max(errors)


def swapped(matrices):
    """Mutant: the order of the factors reversed."""
    return matrices[::-1]


def without_a_block(matrices):
    """Mutant: an arc's matrix is missing."""
    *rest, last = matrices
    blocks = dict(list(last.blocks.items())[1:])
    return (*rest, dj.BlockMatrix(blocks, last.nodes))


def check(case, dtype):
    _, lin = point(case)
    matrices = on_host(lin)
    tolerance = nets.TOLERANCE[dtype]
    assert value_error(lin, matrices) <= tolerance
    whole = functools.reduce(lambda done, one: one @ done, matrices)
    n = strict_part(matrices)
    power = functools.reduce(lambda p, _: p @ n, range(len(matrices)), np.eye(len(n)))
    assert np.isfinite(n).all()
    assert not np.any(power @ n)
    scale = np.max(np.abs(np.asarray(whole.dense())))
    inverse = whole.inverse().dense()
    assert nets.distance(inverse, np.eye(len(n)) - n, scale=scale) <= tolerance
    for matrix in matrices:
        entries = np.asarray(matrix.dense(), np.float64)
        assert abs(np.linalg.det(entries) - 1) < 1e-12
        assert nets.distance((matrix @ matrix.inverse()).dense(), np.eye(len(n))) < 1e-6


SMALL = [("mlp", "float64"), ("dense_block", "float64"), ("two_streams", "float64")]
SMALL += [("mlp", "float32"), ("noisy", "float32")]


@pytest.mark.parametrize(("name", "dtype"), SMALL)
def test_matrices(name, dtype):
    with nets.precision(dtype):
        case = nets.zoo(name, dtype)
        check(case, dtype)
        _, lin = point(case)
        matrices = on_host(lin)
        if len(matrices) > 1:
            assert nets.violates(value_error(lin, swapped(matrices)), dtype)
        assert nets.violates(value_error(lin, without_a_block(matrices)), dtype)


@settings(max_examples=4)
@given(plan=nets.plans(max_nodes=6))
def test_random(plan):
    with nets.precision("float64"):
        check(plan.case("float64"), "float64")


@pytest.mark.parametrize("name", SUMS)
def test_without_matrices(name):
    """`push`, `pull` and the inverse multiply by the same matrices."""
    with nets.precision("float64"):
        case = nets.zoo(name, "float64")
        lin = dj.linearize(case.dag, *case.xs, tolerance=0)
        h = lin.floats()
        assert nets.distance(lin.push(lin.b), h) <= 1e-12
        assert nets.distance(lin.inverse(h), lin.b, scale=h) <= 1e-12
        z, c = case.injection(), case.injection(seed=9)
        dot = lambda a, b: sum(
            jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        )
        want, got = dot(lin.push(z), c), dot(z, lin.pull(c))
        assert abs(want - got) <= 1e-12 * (1 + abs(want)) * 100
        last = case.dag.graph.arcs[-1].name
        mutant = dj.linearize(dj.delete(case.dag, last), *case.xs, tolerance=0)
        assert nets.violates(nets.distance(mutant.push(lin.b), h), "float64")


@pytest.mark.parametrize("name", PIECEWISE)
def test_product_is_the_jacobian(name):
    """Piecewise linear arcs: the frozen matrices are the derivative."""
    with nets.precision("float64"):
        case = nets.zoo(name, "float64")
        xs, lin = point(case)
        want = jax.jit(jax.jacobian(lambda x: case.dag(x)))(*xs)
        assert nets.distance(lin.jacobian(), want) <= 1e-12
        block = lin.matrices() if name == "mlp" else ()
        if block:
            corner = lin.product().block("out", "in")
            flat = want.reshape(corner.shape)
            assert nets.distance(corner, flat) <= 1e-12
        last = case.dag.graph.arcs[0].name
        mutant = dj.linearize(case.dag, *xs, gates={last: 0.9})
        assert nets.violates(nets.distance(mutant.jacobian(), want), "float64")


def without_biases(dag):
    zero = lambda path, leaf: jnp.zeros_like(leaf) if "bias" in str(path) else leaf
    return dag.replace(params=jax.tree_util.tree_map_with_path(zero, dag.params))


@pytest.mark.parametrize("name", ["mlp", "dense_block"])
def test_euler(name):
    """Without biases `h = J x`; with them it is not."""
    with nets.precision("float64"):
        case = nets.zoo(name, "float64")
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(1, *case.xs[0].shape[1:])))
        value = lambda dag: jnp.tensordot(dj.linearize(dag, x).jacobian(), x, x.ndim)
        bare = without_biases(case.dag)
        assert nets.distance(value(bare), bare(x)) <= 1e-12
        assert nets.violates(nets.distance(value(case.dag), case.dag(x)), "float64")


def test_value_is_not_the_jacobian_of_a_smooth_net():
    """gelu: two different matrices, each right for what it is."""
    with nets.precision("float64"):
        graph = dj.zoo.mlp((6, 4), activation=jax.nn.gelu, input_shape=(5,))
        case = nets.build(graph, ((5,),), "float64")
        value, slope = (point(case, kind)[1] for kind in ("value", "jacobian"))
        assert nets.distance(value.push(value.b), value.values) <= 1e-12
        assert nets.violates(
            nets.distance(value.jacobian(), slope.jacobian()), "float64"
        )
        want = jax.jacobian(lambda x: case.dag(x))(case.xs[0][:1])
        assert nets.distance(slope.jacobian(), want) <= 1e-12


def test_a_kink_is_named():
    graph = dj.zoo.mlp((2, 1), input_shape=(2,))
    x = jnp.array([[1.0, 1.0]])
    dag = dj.init(jax.random.key(0), graph, x)
    kernel = jnp.array([[1.0, 2.0], [-1.0, 1.0]])  # the first unit is exactly 0 there
    dag.params["fc1"]["Dense"]["kernel"] = kernel
    with pytest.warns(dj.KinkWarning, match="'n1' lies within 1e-06 of a kink"):
        dj.linearize(dag, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dj.linearize(dag, x + jnp.array([[0.1, 0.0]]))
        dj.linearize(dag, x, tolerance=0)


def test_a_tie_without_consequences_is_no_kink():
    """Equal zeros behind a rectifier in one pooling window: both sides are the same."""
    pool = functools.partial(jnp.max, axis=-1, keepdims=True)
    graph = dj.series(dj.block(lambda x: -x, jax.nn.relu, pool), dj.identity)
    x = jnp.array([[1.0, 2.0, 3.0]])
    dj.linearize(dj.init(jax.random.key(0), graph, x), x)
    with pytest.warns(dj.KinkWarning):
        dj.linearize(dj.init(jax.random.key(0), dj.series(pool), x), jnp.ones((1, 3)))


def test_too_large_for_matrices():
    x = jnp.ones((512, 28, 28, 1))
    graph = dj.zoo.lenet_300_100()
    dag = nets.build(graph, ((28, 28, 1),)).dag
    lin = dj.linearize(dag, x, tolerance=0)
    with pytest.raises(ValueError, match="use push, pull"):
        lin.matrices()


def token_net():
    graph = dj.series(nn.Embed(7, 4), nn.relu, nn.Dense(3))
    ids = jnp.array([[1, 5]])
    return dj.init(jax.random.key(0), graph, ids), ids


def test_integers_have_no_columns():
    dag, ids = token_net()
    lin = dj.linearize(dag, ids)
    h = functools.reduce(lambda z, one: one(z), lin.matrices(), lin.vector(lin.b))
    assert nets.distance(h["out"], dag(ids).reshape(-1)) <= 1e-6
    assert lin.path_norms().block("out", "n1").shape == (1, 1)
    with pytest.raises(dj.GraphError, match="'in' holds ports or integers"):
        lin.jacobian()
    classes = dj.series(nn.Dense(3), functools.partial(jnp.argmax, axis=-1))
    x = jnp.ones((1, 2))
    lin = dj.linearize(dj.init(jax.random.key(0), classes, x), x)
    with pytest.raises(dj.GraphError, match="'out' shows integers"):
        dj.contributions(lin)


def test_softmax_is_no_kink():
    """Stand-ins for infinity and ties of the largest logit bend nothing."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 4, 3)), jnp.float32)
    for causal in (False, True):
        qkv = [nn.Dense(3, name=n) for n in "qkv"]
        graph = dj.series(dj.merge(dj.Attention(causal), *qkv), nn.Dense(2))
        dj.linearize(dj.init(jax.random.key(0), graph, x), x)
    graph = dj.series(nn.Dense(3), jax.nn.softmax, nn.Dense(2))
    dj.linearize(dj.init(jax.random.key(0), graph, x), x)


def test_levels_without_arcs():
    case = nets.zoo("mlp")
    lin = dj.linearize(dj.relevel(case.dag, {"out": 5}), *point(case)[0])
    assert len(lin.matrices()) == 5
    assert nets.distance(lin.path_norms().dense(), point(case)[1].path_norms().dense(
    )) <= 1e-6  # fmt: skip
