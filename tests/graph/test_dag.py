"""The network as a value: init, gates, injections, transforms."""

import operator
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("strict_dtypes", "optimized")


@pytest.fixture(scope="module")
def case():
    return nets.zoo("inception")


def test_is_a_pytree(case):
    leaves, tree = jax.tree.flatten(case.dag)
    again = jax.tree.unflatten(tree, leaves)
    assert again.graph == case.dag.graph
    assert nets.same(again, case.dag)
    assert len(leaves) == len(jax.tree.leaves((case.dag.params, case.dag.state)))


def test_transforms(case, transform):
    run = lambda dag, x, gates: dag(x, gates=gates)
    args = (case.dag, *case.xs, case.gates())
    want = case.outputs(case.oracle(dj.inject(case.dag, *case.xs), case.gates()))
    assert nets.distance(transform(run)(*args), want) <= 1e-5


def test_jit_of_train_mode(key):
    case = nets.zoo("noisy")
    run = lambda dag, x, key: dag.apply(x, train=True, key=key)
    y, state = run(case.dag, *case.xs, key)
    compiled = jax.jit(run)(case.dag, *case.xs, key)
    assert nets.distance(compiled, (y, state)) <= 1e-5
    assert nets.violates(nets.distance(state, case.dag.state), "float32")


def test_vmap_over_networks(key):
    case = nets.zoo("mlp")
    dags = [nets.fill(case.dag, "float32", seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *dags)
    got = jax.vmap(lambda dag: dag(*case.xs))(stacked)
    want = jnp.stack([dag(*case.xs) for dag in dags])
    assert nets.distance(got, want) <= 1e-5


def test_vmap_over_gates_is_a_sweep(case):
    arc = case.dag.graph.arcs[0].name
    strengths = jnp.asarray([0.0, 0.5, 1.0])
    got = jax.vmap(lambda g: case.dag(*case.xs, gates={arc: g}))(strengths)
    want = jnp.stack([case.dag(*case.xs, gates={arc: g}) for g in strengths])
    assert nets.distance(got, want) <= 1e-5


def test_gradient_by_finite_differences():
    with nets.precision("float64"):
        case = nets.zoo("inception", "float64")
        run = lambda params: case.dag.replace(params=params)(*case.xs)
        loss = jax.jit(lambda params: jnp.sum(jnp.sin(run(params))))
        slopes = jax.jit(jax.grad(loss))(case.dag.params)
        assert jax.tree.structure(slopes) == jax.tree.structure(case.dag.params)
        along = nets.fill(case.dag, "float64", 9).params
        move = lambda h: jax.tree.map(lambda p, d: p + h * d, case.dag.params, along)
        want = (loss(move(1e-5)) - loss(move(-1e-5))) / 2e-5
        products = jax.tree.leaves(jax.tree.map(jnp.vdot, slopes, along))
        assert float(sum(products)) == pytest.approx(float(want), 1e-6)


# --- init -------------------------------------------------------------------------

NET = dj.series(dj.residual(nn.Dense(3)), nn.Dense(3))
X = np.ones((2, 3), np.float32)


def test_init_over_seeds(key):
    keys = jax.random.split(key, 3)
    seeds = jax.vmap(lambda k: dj.init(k, NET, X))(keys)
    assert isinstance(seeds, dj.DAG)
    got = jax.vmap(lambda dag: dag(X))(seeds)
    for i in range(3):
        one = dj.init(keys[i], NET, X)
        assert nets.distance(jax.tree.map(operator.itemgetter(i), seeds), one) <= 1e-6
        assert nets.distance(got[i], one(X)) <= 1e-5
    assert nets.violates(nets.distance(got[0], got[1]), "float32")


def test_init_needs_shapes_only(key):
    spec = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert nets.same(dj.init(key, NET, spec), dj.init(key, NET, X))
    compiled = jax.jit(lambda k: dj.init(k, NET, spec))(key)
    assert nets.distance(compiled, dj.init(key, NET, X)) <= 1e-6


def test_an_arc_draws_by_its_name(key):
    dag = dj.init(key, NET, X)
    without = dj.init(key, dj.delete(dag, "Dense").graph, X)
    assert nets.same(without.params, dj.delete(dag, "Dense").params)
    draw = jax.random.fold_in(key, zlib.crc32(b"Dense_1"))
    own = nn.Dense(3).init(draw, X)["params"]
    assert nets.same(dag.params["Dense_1"], own)
    kernels = [dag.params[name]["kernel"] for name in ("Dense", "Dense_1")]
    assert not np.array_equal(*kernels)


def test_init_finds_the_spaces():
    case = nets.zoo("two_streams")
    spaces = case.dag.graph.space_of
    assert set(spaces) == set(case.dag.graph.nodes)
    assert spaces["left"].shape == (3,)
    assert [port.shape for port in spaces["both"]] == [(2,), (4,)]
    assert all(port.batched for port in spaces["both"])
    assert spaces["y"].dtype == "float32"


def test_batch_size_is_free(case):
    x = jnp.ones((5, 5))
    assert case.dag(x).shape == (5, 3)
    h = dj.compose(dj.factors(case.dag))(dj.inject(case.dag, x))
    assert nets.distance(h["out"], case.dag(x)) <= 1e-6


def test_dtypes_follow_the_input():
    with nets.precision("float64"):
        case = nets.zoo("two_streams", "float64")
        h = dj.compose(dj.factors(case.dag))(dj.inject(case.dag, *case.xs))
        assert {leaf.dtype for leaf in jax.tree.leaves(h)} == {np.dtype("float64")}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nets.zoo("mlp").dag)
    x = nets.zoo("mlp").xs[0].astype(jnp.bfloat16)
    assert half(x).dtype == jnp.bfloat16
    assert half(x, gates=dj.gates(half)).dtype == jnp.bfloat16


# --- gates and injections ---------------------------------------------------------


def test_open_gates_change_no_bit(case):
    assert nets.same(case.dag(*case.xs, gates=dj.gates(case.dag)), case.dag(*case.xs))
    assert dj.gates(case.dag).keys() == dj.gates(case.dag.graph).keys()


def test_gates_may_be_numbers(case):
    arc = case.dag.graph.arcs[0].name
    want = case.dag(*case.xs, gates={arc: jnp.zeros(())})
    for zero in (0, 0.0, False, np.float32(0), np.zeros((), bool)):
        assert nets.same(case.dag(*case.xs, gates={arc: zero}), want)


@pytest.mark.parametrize(
    "use",
    [
        lambda dag, x, gates: dag(x, gates=gates),
        lambda dag, x, gates: dag.apply(x, gates=gates),
        lambda dag, x, gates: dj.factors(dag, gates=gates),
        lambda dag, x, gates: dj.elementary(dag, gates=gates),
        lambda dag, x, gates: dj.parallel_sweep(dag, gates=gates),
    ],
    ids=["call", "apply", "factors", "elementary", "parallel_sweep"],
)
def test_gate_of_no_arc_is_an_error(case, use):
    with pytest.raises(dj.GraphError, match="no arc named 'typo'"):
        use(case.dag, *case.xs, {"typo": 0.0})


def test_injection_is_zero_but_at_inputs():
    case = nets.zoo("two_streams")
    b = dj.inject(case.dag, *case.xs)
    assert set(b) == set(case.dag.graph.nodes)
    assert nets.same((b["left"], b["right"]), case.xs)
    others = {node: value for node, value in b.items() if node not in ("left", "right")}
    assert all(not leaf.any() for leaf in jax.tree.leaves(others))


@given(plan=nets.plans(max_nodes=8))
def test_factors_and_calls_agree_bitwise(plan):
    """Both do the same operations, so that they agree but for the sign of zeros."""
    case = plan.case("float32")
    h = dj.compose(dj.factors(case.dag))(dj.inject(case.dag, *case.xs))
    got = case.dag(*case.xs)
    got = got if isinstance(got, tuple) else (got,)
    for value, want in zip(got, case.outputs(h), strict=True):
        np.testing.assert_array_equal(value, want)


def test_output_that_is_an_input():
    case = nets.build(
        dj.Graph([dj.Arc("a", "x", "y", jnp.tanh)], "x", ["x", "y"]), ((3,),)
    )
    x, y = case.dag(*case.xs)
    assert nets.same((x, y), (case.xs[0], jnp.tanh(case.xs[0])))


def test_repr_counts(case):
    total = sum(leaf.size for leaf in jax.tree.leaves(case.dag.params))
    assert f"{total:,} parameters" in repr(case.dag)
    assert "levels: in -> out" in repr(case.dag)


def recurrent(tied="cell"):
    """One function three times in a row."""
    dense = nn.Dense(4)
    arcs = [
        dj.Arc(f"step{i}", f"h{i}", f"h{i + 1}", dense, tied=tied) for i in range(3)
    ]
    return dj.Graph(arcs, "h0", "h3")


def test_tied_arcs_share_one_leaf(key):
    x = jnp.ones((2, 4))
    dag = dj.init(key, recurrent(), x)
    assert list(dag.params) == ["cell"]
    own = dag.params["cell"]
    want = x
    for _ in range(3):
        want = want @ own["kernel"] + own["bias"][None]
    np.testing.assert_allclose(dag(x), want, rtol=1e-6)
    assert [*dj.delete(dag, ["step0", "step1"]).params] == ["cell"]
    assert not dj.delete(dag, ["step0", "step1", "step2"]).params
    untied = dj.init(key, recurrent(tied=None), x)
    assert len(untied.params) == 3
    assert not np.allclose(untied(x), dag(x))  # mutant: weights of their own


def test_ties_stay_within_a_part(key):
    x = jnp.ones((2, 4))
    twice = dj.init(key, dj.series(recurrent(), recurrent(), name="net"), x)
    assert sorted(twice.params) == ["net/cell", "net/cell_1"]
    assert {arc.tied for arc in twice.graph.arcs} == {"net/cell", "net/cell_1"}


def test_shape_mismatch_of_a_merge_names_arcs_and_shapes(key):
    graph = dj.product(nn.Dense(3, name="narrow"), nn.Dense(4, name="wide"))
    with pytest.raises(
        dj.GraphError, match=r"narrow delivers float32\[2, 3\]"
    ) as error:
        dj.init(key, graph, jnp.ones((2, 4)))
    assert "wide delivers float32[2, 4] to port 1" in str(error.value)
