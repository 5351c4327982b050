"""What becomes an arc, a sum, a merge; what keeps its meaning inside an arc."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import dagjax as dj
from tests.graph import nets
from tests.graph.tracing import functions as fns

X = jax.random.normal(jax.random.key(3), (2, 3, 4))
W = fns.kernels({name: (4, 4) for name in "abcd"})


def branches(params, x):
    return tuple(jnp.tanh(x @ params[name]) for name in "abcd")


def outline(fn, params=W, x=X, **options):
    """`(nodes, arcs, merges)` of the part of a graph behind four branches."""
    graph = dj.trace(fn, params, x, **options).graph
    assert all(not arc.fn.opaque for arc in graph.arcs)
    merges = [repr(merge) for _, merge in graph.merges]
    return len(graph.nodes), len(graph.arcs), merges


def of_branches(f):
    return lambda params, x: f(*branches(params, x))


@pytest.mark.parametrize(
    ("join", "want"),
    [
        (lambda a, b, c, d: a + b + c + d, (2, 4, [])),  # one sum, no intermediate node
        (lambda a, b, c, d: a - (b - c) + 2 * d, (2, 4, [])),
        (lambda a, b, c, d: (a + b + c + d) / 4, (3, 5, [])),
        (
            lambda a, b, c, d: jnp.concatenate([a, b, c, d], -1),
            (2, 4, ["Concat(axis=-1)"]),
        ),
        (lambda a, b, c, d: a * b * c * d, (2, 4, ["Product"])),
        (lambda a, b, c, d: a * b + c * d, (4, 6, ["Product()", "Product()"])),
        (lambda a, b, c, d: jnp.maximum(a, b) + c + d, (3, 5, ["Max()"])),
        (lambda a, b, c, d: fns.attend(a, b, c) + d, (3, 5, ["Attention"])),
        (lambda a, b, c, d: jnp.where(a > 0, b, c) + d, (3, 5, ["Select"])),
        (lambda a, b, c, d: jnp.stack([a, b, c, d], 1), (2, 4, ["Stack"])),
    ],
)
def test_where_branches_meet(join, want):
    assert outline(of_branches(join)) == want


@pytest.mark.parametrize(
    ("f", "text"),
    [
        (jax.nn.gelu, "gelu"),
        (jax.nn.softmax, "softmax"),
        (jax.nn.silu, "logistic"),
        (jax.nn.relu, "relu"),
        (lambda x: x + jnp.tanh(x), "tanh"),
        (lambda x: x * 2 - 1, "sub"),
        (lambda x: x @ jnp.swapaxes(x, -1, -2), "dense"),
    ],
)
def test_diamonds_of_one_value_are_one_arc(f, text):
    (arc,) = dj.trace(lambda p, x: f(x), {}, X).graph.arcs
    assert repr(arc.fn) == text


def test_layer_norm_is_one_arc():
    params = {"ln": {"scale": jnp.ones(4)}, **W}

    def block(params, x):
        h = fns.norm(params["ln"], x)
        return x + jnp.tanh(h @ params["a"]) * (h @ params["b"]) + h @ params["c"]

    with pytest.warns(dj.TraceWarning, match="does not use the parameters d"):
        graph = dj.trace(block, params, X[0]).graph
    assert repr(graph.by_name["ln"]) == "Arc('ln': x -> ln, norm)"
    assert [a.name for a in graph.arcs if a.source == "ln"] == ["a", "b", "c"]


def test_a_mask_of_constants_is_no_branch():
    causal = lambda a, b, c, d: (
        jax.nn.softmax(
            jnp.where(jnp.tril(jnp.ones((3, 3), bool))[None], a @ b.mT, -1e9)
        ) @ c + d
    )  # fmt: skip
    assert outline(of_branches(causal)) == (3, 5, ["Attention"])


def test_a_learned_bias_of_the_scores_stays_in_the_merge():
    params = {**W, "bias": 0.3 * jnp.arange(9.0).reshape(3, 3)}

    def net(params, x):
        a, b, c, d = branches(params, x)
        scores = a @ b.mT + params["bias"][None]
        return jax.nn.softmax(scores) @ c + d

    dag = dj.trace(net, params, X)
    assert [repr(merge) for _, merge in dag.graph.merges] == ["Attention"]
    assert np.allclose(dag(X), net(params, X), atol=1e-6)
    without = params | {"bias": 0 * params["bias"]}
    assert not np.allclose(dag.replace(params=without)(X), net(params, X), atol=1e-3)


@pytest.mark.parametrize(
    ("join", "off", "want"),
    [
        (lambda a, b, c, d: a * b * c * d, "b", lambda a, b, c, d: a * c * d),
        (lambda a, b, c, d: a / b + c + d, "a", lambda a, b, c, d: 1 / b + c + d),
        (lambda a, b, *c: jnp.maximum(a, b) + sum(c), "a", lambda a, b, *c: b + sum(c)),
        (lambda a, b, *c: jnp.minimum(a, b) + sum(c), "b", lambda a, b, *c: a + sum(c)),
        (lambda a, b, c, d: fns.attend(a, b, c) + d, "b", lambda a, b, c, d: d),
        (lambda a, b, c, d: fns.attend(a, b, c) + d, "c", lambda a, b, c, d: d),
        (
            lambda a, b, c, d: fns.attend(a, b, c) + d, "a",
            lambda a, b, c, d: c.mean(1, keepdims=True) + d,
        ),
        (lambda a, b, c, d: jnp.where(a > 0, b, c) + d, "b", lambda a, b, c, d: c + d),
        (lambda a, b, c, d: a - b + c + d, "b", lambda a, b, c, d: a + c + d),
    ],
)  # fmt: skip
def test_an_arc_that_is_off_reads_neutral(join, off, want):
    """With gate 0 and after deletion; gradients of the other gates are finite."""
    dag = dj.trace(of_branches(join), W, X)
    target = want(*branches(W, X))
    gates = dj.gates(dag) | {off: jnp.zeros(())}
    assert np.allclose(dag(X, gates=gates), target, atol=1e-6)
    assert np.allclose(dj.delete(dag, off)(X), target, atol=1e-6)
    assert not np.allclose(dag(X), target, atol=1e-3)
    grads = jax.grad(lambda gates: dag(X, gates=gates).sum())(gates)
    assert all(np.isfinite(g) for g in grads.values())


@pytest.mark.parametrize("granularity", ["primitives", "layers", "blocks"])
def test_rules_of_derivatives_survive(granularity):
    @jax.custom_vjp
    def reversal(x):
        return x

    reversal.defvjp(lambda x: (x, None), lambda _, g: (-g,))

    @jax.custom_jvp
    def straight(x):
        return jnp.sign(x)

    straight.defjvps(lambda t, y, x: t)

    def net(params, x):
        h = reversal(x @ params["a"]) + jnp.tanh(x @ params["b"])
        return x + jax.jit(lambda h: straight(h) @ params["c"])(h) * (x @ params["d"])

    dag = dj.trace(net, W, X, granularity=granularity)
    ours = jax.jit(jax.grad(lambda p, x: (dag.replace(params=p)(x) ** 2).sum(), (0, 1)))
    theirs = jax.jit(jax.grad(lambda p, x: (net(p, x) ** 2).sum(), (0, 1)))
    assert nets.distance(ours(W, X), theirs(W, X)) <= 1e-6
    reversal.defvjp(lambda x: (x, None), lambda _, g: (g,))  # the mutant: no reversal
    plain = lambda p, x: (net(p, x) ** 2).sum()
    assert nets.distance(ours(W, X), jax.grad(plain, (0, 1))(W, X)) > 1e-2


def test_rematerialization_survives_being_cut():
    calls = []

    def block(params, x):
        return x + jnp.sin(x @ params["a"]) @ params["b"]

    def net(params, x):
        return jax.checkpoint(block)(params, jax.checkpoint(block)(params, x))

    params = {name: W[name] for name in "ab"}
    dag = dj.trace(net, params, X)
    assert len(dag.graph.arcs) == 6
    saved = lambda f: str(jax.make_jaxpr(jax.grad(f))(params)).count("remat")
    ours = lambda params: dag.replace(params=params)(X).sum()
    assert saved(ours) >= saved(lambda params: net(params, X).sum()) > 0
    want = jax.grad(lambda params: net(params, X).sum())(params)
    assert nets.distance(jax.grad(ours)(params), want) <= 1e-6
    assert not calls


def test_sharding_constraints_survive():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))

    def net(params, x):
        h = jax.lax.with_sharding_constraint(x @ params["a"], rows)
        return x + jnp.tanh(h)

    dag = dj.trace(net, {"a": W["a"]}, X)
    text = jax.jit(lambda dag, x: dag(x)).lower(dag, X).as_text()
    assert "sharding" in text
    assert np.allclose(dag(X), net(W, X), atol=1e-6)


def recurrent(params, x):
    step = lambda h, xt: (jnp.tanh(h @ params["a"] + xt), None)
    return jax.lax.scan(step, x[:, 0], jnp.swapaxes(x, 0, 1))[0]


def test_loops_are_opaque_and_unroll():
    params = {"a": W["a"]}
    dag = dj.trace(recurrent, params, X)
    assert [arc.fn.opaque for arc in dag.graph.arcs] == [True]
    steps = dj.trace(recurrent, params, X, unroll=True)
    assert not any(arc.fn.opaque for arc in steps.graph.arcs)
    assert len(steps.graph.arcs) == 7  # of three steps, each a state and an input; tanh
    for net in (dag, steps):
        assert np.allclose(net(X), recurrent(params, X), atol=1e-6)
        assert np.allclose(net(X[:1]), recurrent(params, X[:1]), atol=1e-6)


def test_a_branch_of_cond_stays_one_arc():
    net = lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p["a"], jnp.tanh, x)
    dag = dj.trace(net, {"a": W["a"]}, X)
    assert [arc.fn.opaque for arc in dag.graph.arcs] == [True]
    for x in (X - X.mean() + 1, X - X.mean() - 1):
        assert np.allclose(dag(x), net(W, x), atol=1e-6)


def test_an_unknown_primitive_is_opaque():
    strange = core.Primitive("strange")
    strange.def_impl(lambda x: 2 * x)
    strange.def_abstract_eval(lambda x: x)
    net = lambda p, x: strange.bind(x @ p["a"]) + x
    dag = dj.trace(net, {"a": W["a"]}, X)
    opaque = [repr(arc.fn) for arc in dag.graph.arcs if arc.fn.opaque]
    assert opaque == ["strange"]
    assert np.allclose(dag(X), 2 * X @ W["a"] + X, atol=1e-6)


def test_names_of_scopes():
    def net(params, x):
        with jax.named_scope("encoder"):
            with jax.named_scope("up"):
                h = jnp.tanh(x @ params[0])
            return x + h @ params[1]

    dag = dj.trace(net, [W["a"], W["b"]], X)
    assert [*dag.graph.by_name] == ["up", "dense_1", "skip"]


def test_tied_parameters_are_one_leaf():
    net = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    dag = dj.trace(net, {"w": W["a"]}, X)
    assert [arc.fn.reads for arc in dag.graph.arcs] == [("w",), ("w",)]
    got = jax.grad(lambda p: dag.replace(params=p)(X).sum())(dag.params)
    want = jax.grad(lambda p: net(p, X).sum())(dag.params)
    assert nets.distance(got, want) <= 1e-6


def test_a_traced_network_is_rewritten():
    """Contracted, split off, extended: parameters stay the user's tree."""
    net = lambda p, x: x + jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])
    params = {"a": W["a"], "b": W["b"]}
    dag = dj.trace(net, params, X)
    coarse = dj.contract(dag, ["a", "b"], name="branch")
    assert coarse.params is params
    assert [*coarse.graph.by_name] == ["branch", "skip"]
    assert np.allclose(coarse(X), dag(X), atol=1e-6)
    twice = dj.insert(dag, dj.Arc("again", "x", "out", dj.identity))
    assert np.allclose(twice(X), dag(X) + X, atol=1e-6)
    assert np.allclose(dj.delete(dag, "skip")(X[:1]), dag(X[:1]) - X[:1], atol=1e-6)
    with pytest.raises(ValueError, match="traced"):
        dj.bundle(dag)
