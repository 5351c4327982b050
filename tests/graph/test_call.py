"""One call of a network: what its arcs share, and what it leaves behind."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj

P = jax.sharding.PartitionSpec


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("bundled", [False, True])
def test_tied_batch_norms_of_one_level_update_one_after_the_other(bundled):
    norm, b, x = nn.BatchNorm(momentum=0.5), dj.GraphBuilder(), random(4, 3)
    source = b.input("x")
    b.arc("five", source, "h", lambda t: t + 5)
    b.arc("same", source, "k", lambda t: t)
    b.arc("first", "h", "y", norm)
    b.arc("second", "k", "y", norm, tied="first")
    dag = dj.init(jax.random.key(0), b.build("y"), x)
    dag = dj.bundle(dag) if bundled else dag
    (mean,) = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            dag.apply(x, train=True)[1]
        )
        if "mean" in jax.tree_util.keystr(path)
    ]
    right = 0.5 * (0.5 * (x + 5).mean(0)) + 0.5 * x.mean(0)
    np.testing.assert_allclose(mean.reshape(-1)[-3:], right, rtol=1e-5)


def test_a_scalar_input_is_not_the_batch():
    arcs = [
        dj.Arc("a", "x", "h", nn.Dense(3)),
        dj.Arc("t", "t", "s", dj.identity),
        dj.Arc("c", "h", "y", dj.identity, 0),
        dj.Arc("e", "x", "y", dj.identity, 1),
    ]
    graph = dj.Graph(arcs, ["t", "x"], ["y", "s"], {"y": dj.Concat()})
    t = jnp.float32(1)
    dag = dj.init(jax.random.key(0), graph, t, random(2, 3))
    assert dj.delete(dag, "c")(t, random(5, 3))[0].shape == (5, 6)


def test_integers_take_whole_gates_only():
    arcs = [dj.Arc("a", "x", "h", dj.identity), dj.Arc("b", "h", "y", jnp.sqrt)]
    x = jnp.array([[4, 6]])
    dag = dj.init(jax.random.key(0), dj.Graph(arcs, "x", "y"), x)
    np.testing.assert_allclose(dag(x, gates={"a": 2.0}), [[8**0.5, 12**0.5]], rtol=1e-6)
    with pytest.raises(dj.GraphError, match=r"gate of .* is 0.5, but it delivers"):
        dag(x, gates={"a": 0.5})
    run = jax.jit(lambda gate: dag(x, gates={"a": gate}))
    np.testing.assert_allclose(run(2), [[8**0.5, 12**0.5]], rtol=1e-6)
    np.testing.assert_allclose(run(jnp.array(False)), [[0, 0]])
    with pytest.raises(dj.GraphError, match="not known before the call"):
        run(0.5)


def test_parameters_of_numpy_are_taken_as_they_were_traced():
    dag = dj.trace(lambda p, x: x @ p["w"], {"w": np.ones((4, 3))}, random(2, 4))
    np.testing.assert_allclose(dag(jnp.ones((2, 4))), 4 * np.ones((2, 3)))


@pytest.fixture
def two():
    return random(2, 4), {"a": random(4, 4, seed=1), "b": random(4, 4, seed=2)}


def test_subnetworks_of_a_traced_merge(two):
    x, p = two
    dag = dj.trace(lambda p, x: (x @ p["a"]) / (x @ p["b"]), p, x)
    table = dj.all_subnetworks(dag, x)
    whole = (x @ p["a"]) / (x @ p["b"])
    assert any(np.allclose(y, whole, rtol=1e-4) for y in table.outputs)
    assert len(dj.shapley(dag, x).values) == 2


def test_a_port_of_booleans_is_linear(two):
    x, p = two

    def net(p, x):
        a, b = x @ p["a"], x @ p["b"]
        return jnp.where(a > 0, a, b)

    lin = dj.linearize(dj.trace(net, p, x), x, tolerance=0)
    right = jax.jacobian(lambda x: net(p, x))(x)
    np.testing.assert_allclose(lin.jacobian(), right, atol=1e-5)


def _in_shard_map(net, check):
    """Closed over, on one device; jax checks over which axes values vary, or not."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], "i")
    option = {"mesh": mesh, "in_specs": P("i"), "out_specs": P("i")}
    return jax.shard_map(net.__call__, **option, check_vma=check)


CALLS = {
    "shard_map": lambda net: _in_shard_map(net, True),
    "shard_map under jit": lambda net: jax.jit(_in_shard_map(net, True)),
    "shard_map unchecked": lambda net: jax.jit(_in_shard_map(net, False)),
    "pmap": lambda net: lambda x: jax.pmap(net)(x[None])[0],
    "vmap": lambda net: lambda x: jax.vmap(net)(x[:, None])[:, 0],
    "jit": lambda net: jax.jit(net.__call__),
}


def _numpy(p, x):
    h = np.asarray(x) @ np.asarray(p["a"])
    for _ in range(2):
        h = np.tanh(np.maximum(h, 0) + 1)
    return h @ np.asarray(p["b"])


@pytest.mark.parametrize("kind", ["traced", "compacted", "sparse"])
@pytest.mark.parametrize("how", CALLS)
def test_a_call_leaves_nothing_behind(kind, how, two):
    """Literals, a rule of its own (relu), a loop."""
    x, p = two

    def fn(p, x):
        step = lambda h, _: (jnp.tanh(jax.nn.relu(h) + 1), None)
        return jax.lax.scan(step, x @ p["a"], None, length=2)[0] @ p["b"]

    net = dj.trace(fn, p, x)
    if kind == "compacted":
        mask = dj.prune_units(net, density=0.5)
        p = jax.tree.map(lambda m, w: m * w, mask, p)
        # What is removed of a channel is constant, and folded.
        net = dj.compact(net, mask).net
    if kind == "sparse":
        net = dj.sparsify(net, None, force=True)
    call, x = CALLS[how](net), random(3, 4)  # a batch size that only the call has met
    for run in (call, net, call):
        np.testing.assert_allclose(run(x), _numpy(p, x), rtol=1e-5, atol=1e-5)
    mean = lambda run: lambda net: (run(net)(x) ** 2).mean()
    # Where jax checks axes, rules that were traced outside are refused by it.
    checked = how.startswith("shard_map") and how != "shard_map unchecked"
    if how != "pmap" and (kind == "compacted" or not checked):
        inside = jax.grad(lambda p: mean(CALLS[how])(net.replace(params=p)))(net.params)
        outside = jax.grad(lambda p: mean(lambda n: n)(net.replace(params=p)))(
            net.params
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            inside, outside,
        )  # fmt: skip


def test_a_compacted_network_is_copied(two):
    x, p = two
    net = dj.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], p, x)
    small = dj.compact(net, dj.prune_units(net, density=0.5)).net
    np.testing.assert_array_equal(copy.deepcopy(small)(x), small(x))


def test_every_kind_is_one_network_and_has_costs(two):
    x, p = two
    net = dj.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], p, x)
    mask = dj.prune_units(net, density=0.5)
    kinds = (net, dj.compact(net, mask).net, dj.sparsify(net, mask))
    assert all(kind.example_inputs[0].shape == (2, 4) for kind in kinds)
    costs = dj.cost(*kinds, latency=False)
    assert [costs[name].params for name in "012"] == [32, 16, 32]
