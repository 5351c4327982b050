"""What `dj.trace` promises: values, gradients, trees, batch sizes, equality."""

import copy
import functools
import os
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dagjax as dj
from tests.graph import nets
from tests.graph.tracing import functions as fns

pytestmark = pytest.mark.usefixtures("optimized")

GRANULARITIES = ["primitives", "layers", "blocks"]


@functools.cache
def resnet():
    """The module, variables with generic statistics, and inputs."""
    net, x = fns.ResNet(), jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    return net, nets.fill(variables, "float32"), x


@pytest.fixture(scope="module")
def transformer():
    return fns.kernels(fns.TRANSFORMER), jax.random.normal(jax.random.key(1), (2, 3, 4))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_and_gradients_are_the_functions(transformer, granularity):
    params, x = transformer
    dag = dj.trace(fns.transformer, params, x, granularity=granularity)
    ours = lambda params, x: (dag.replace(params=params)(x) ** 2).sum()
    theirs = lambda params, x: (fns.transformer(params, x) ** 2).sum()
    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(params, x)
    want = jax.jit(jax.value_and_grad(theirs, (0, 1)))(params, x)
    y = jax.jit(lambda dag, x: dag(x))(dag, x)
    assert np.array_equal(y, jax.jit(fns.transformer)(params, x))
    assert nets.distance(got, want) <= 1e-5
    wrong = jax.tree.map(lambda g: 1.01 * g, got)
    assert nets.distance(wrong, want) > 1e-5


def test_params_are_the_users_tree(transformer):
    params, x = transformer
    dag = dj.trace(fns.transformer, params, x)
    assert dag.params is params
    assert dag.graph.by_name["attention/q"].fn.reads == ("attention/q",)
    assert dag.graph.by_name["norm"].fn.reads == ("norm",)


def test_nothing_is_computed():
    shape = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)  # 4 TB
    x = jax.ShapeDtypeStruct((1, 10**6), jnp.float32)
    dag = dj.trace(lambda p, x: x @ p["w"], {"w": shape}, x)
    assert dag.params["w"] is shape
    with pytest.raises(dj.TraceError, match="only a shape"):
        dag(jnp.ones((1, 10**6)))


def test_linen_names_and_blocks():
    net, variables, x = resnet()
    dag = dj.from_linen(net, variables, x)
    names = [arc.name for arc in dag.graph.arcs]
    assert names == [
        "Conv_0", "Block_0/Conv_0", "Block_0/Conv_1", "Block_0/skip",
        "Block_1/Conv_0", "Block_1/Conv_1", "Block_1/skip", "Dense_0",
    ]  # fmt: skip
    assert np.array_equal(dag(x), net.apply(variables, x))
    blocks = dj.from_linen(net, variables, x, granularity="blocks").graph
    assert [a.name for a in blocks.arcs] == [
        "Conv_0", "Block_0", "Block_0/skip", "Block_1", "Block_1/skip", "Dense_0",
    ]  # fmt: skip
    assert dj.count_paths(blocks) == 4
    skip = blocks.by_name["Block_1/skip"]
    assert repr(skip) == "Arc('Block_1/skip': Block_0/sum -> Block_1/sum, relu)"


def test_groups_of_names():
    net, variables, x = resnet()
    whole = lambda name: name.split("/")[0]
    dag = dj.from_linen(net, variables, x, granularity=whole)
    assert [*dag.graph.by_name] == ["Conv_0", "Block_0", "Block_1", "Dense_0"]
    assert np.allclose(dag(x), net.apply(variables, x), atol=1e-6)


def test_resnet20_in_blocks():
    dag = jax.eval_shape(
        lambda: dj.init(jax.random.key(0), dj.zoo.resnet(20), jnp.ones((1, 8, 8, 3)))
    )
    run = lambda p, x: dag.replace(params=p["params"], state=p["state"])(x)
    variables = {"params": dag.params, "state": dag.state}
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    graph = dj.trace(run, variables, x, granularity="blocks").graph
    assert (len(graph.nodes), len(graph.arcs), graph.depth) == (12, 20, 11)
    assert dj.count_paths(graph) == 512


def test_training_mode_keeps_state_and_draws():
    net, variables, x = resnet()
    dag = dj.from_linen(net, variables, x, train=True, key=jax.random.key(0))
    larger = jnp.concatenate([x, 1 - x])
    for data in (x, larger):
        got, state = dag.apply(data, jax.random.key(5))
        want, statistics = net.apply(
            variables, data, train=True, mutable=["batch_stats"],
            rngs={"params": jax.random.key(5)},
        )  # fmt: skip
        assert np.allclose(got, want, atol=1e-6)
        assert nets.distance(state["user"], statistics) <= 1e-6
        chex.assert_trees_all_equal_structs(state, dag.state)
    assert not np.allclose(dag(x, jax.random.key(6)), dag(x, jax.random.key(7)))
    assert np.array_equal(dag(x), dag(x, jax.random.key(0)))  # the key it was given


def test_any_batch_size(transformer):
    params, x = transformer
    dag = dj.trace(fns.transformer, params, x[:1])
    for rows in (1, 2, 5):
        data = jnp.resize(x, (rows, 3, 4))
        assert np.allclose(dag(data), fns.transformer(params, data), atol=1e-5)


def test_a_merge_and_a_reduction_at_other_batch_sizes():
    loss = lambda p, x, y: ((x @ p["w"]) * y).mean()
    params, x = {"w": jnp.ones((3, 3))}, jnp.arange(6.0).reshape(2, 3)
    dag = dj.trace(loss, params, x, x)
    more = jnp.arange(12.0).reshape(4, 3)
    assert np.allclose(dag(more, 1 - more), loss(params, more, 1 - more))


def test_a_structure_that_depends_on_the_batch_size():
    def net(params, x):
        h = x @ params["w"]
        return jnp.tanh(h + x if x.shape[0] > 2 else h)

    dag = dj.trace(net, {"w": jnp.ones((3, 3))}, jnp.ones((2, 3)))
    with pytest.raises(dj.TraceError, match="depends on the batch size"):
        dag(jnp.ones((5, 3)))


def test_two_traces_are_equal_and_compile_once(transformer):
    params, x = transformer
    one, two = (dj.trace(fns.transformer, params, x) for _ in range(2))
    assert one.graph == two.graph
    assert hash(one.graph) == hash(two.graph)
    other = dj.trace(lambda p, x: 2 * fns.transformer(p, x), params, x)
    assert other.graph != one.graph
    assert dj.trace(fns.transformer, params, x[:1]).graph != one.graph
    run = jax.jit(chex.assert_max_traces(lambda dag, x: dag(x), n=1))
    run(one, x)
    run(two, x)
    run(one.replace(params=jax.tree.map(jnp.negative, params)), x + 1)


def test_equality_with_custom_derivatives_and_constants():
    table = np.arange(9.0, dtype=np.float32).reshape(3, 3)

    def make(factor):
        return lambda p, x: jax.nn.relu(x @ p["w"]) @ (factor * table)

    params, x = {"w": jnp.ones((3, 3))}, jnp.ones((1, 3))
    one, two, other = (dj.trace(make(f), params, x).graph for f in (1.0, 1.0, 2.0))
    assert one == two
    assert one != other


def test_arrays_closed_over_are_state():
    table = jnp.arange(9.0).reshape(3, 3)
    dag = dj.trace(lambda p, x: x @ p["w"] @ table, {"w": jnp.eye(3)}, jnp.ones((1, 3)))
    assert np.array_equal(dag.state["consts"][0], table)
    twice = dag.replace(state={"consts": [2 * table]})
    assert np.allclose(twice(jnp.ones((1, 3))), 2 * dag(jnp.ones((1, 3))))


def test_vmap_over_parameters(transformer):
    params, x = transformer
    dag = dj.trace(fns.transformer, params, x)
    seeds = [fns.kernels(fns.TRANSFORMER, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    got = jax.vmap(lambda params: dag.replace(params=params)(x))(stacked)
    want = jnp.stack([fns.transformer(params, x) for params in seeds])
    assert np.allclose(got, want, atol=1e-5)


def test_sharded_parameters(transformer):
    params, x = transformer
    mesh = jax.make_mesh((2,), ("width",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "width"))
    wide = params | {"up": jax.device_put(params["up"], split)}
    dag = dj.trace(fns.transformer, wide, x)
    text = jax.jit(lambda dag, x: dag(x)).lower(dag, x).compile().as_text()
    assert dag.params["up"].sharding == split
    assert np.allclose(dag(x), fns.transformer(params, x), atol=1e-5)
    assert "num_partitions=2" in text


def test_trees_in_and_out():
    def net(params, x):
        h = x["image"] @ params["w"]
        return {"h": h, "rest": (h + x["bias"], x["bias"])}

    params = {"w": jnp.ones((3, 2))}
    x = {"image": jnp.ones((4, 3)), "bias": jnp.ones((4, 2))}
    dag = dj.trace(net, params, x)
    assert dag.graph.inputs == ("x/bias", "x/image")
    chex.assert_trees_all_close(dag(x), net(params, x))


def test_nnx_model_keeps_its_optimizer():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.relu
    )
    x = jax.random.normal(jax.random.key(0), (5, 3))
    dag = dj.from_nnx(model, x)
    chex.assert_trees_all_equal_structs(dag.params, nnx.state(model, nnx.Param))
    y, state = dag.apply(x)
    assert np.allclose(y, model(x), atol=1e-6)  # in training mode: updates the model
    assert nets.distance(state["user"], nnx.state(model, nnx.BatchStat)) <= 1e-6
    nnx.update(model, jax.tree.map(jnp.zeros_like, dag.params))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, x: x @ p["w"] if x.sum() > 0 else x, "jnp.where"),
        (lambda p, x: np.sin(x) @ p["w"], "jax.numpy"),
        (lambda p, x: (x @ p["w"], p["w"] + 1), "does not depend on"),
        (lambda p, x: (jax.debug.print("{}", x), x @ p["w"])[1], "side effect"),
        (lambda p, x: x @ p["w"].T @ jnp.ones((5, 5)), "cannot be traced"),
    ],
)
def test_errors_name_the_line(call, words):
    with pytest.raises(dj.TraceError, match=words) as caught:
        dj.trace(call, {"w": jnp.ones((3, 3))}, jnp.ones((1, 3)))
    path = os.path.relpath(__file__)  # short, and the same on every machine
    assert f" at {path}:{call.__code__.co_firstlineno}" in str(caught.value)


def test_errors_of_arguments():
    params, x = {"w": jnp.ones((3, 3))}, jnp.ones((2, 3))
    net = lambda p, x: x @ p["w"]
    with pytest.raises(dj.TraceError, match="inputs: the leaf '0' is 'relu'"):
        dj.trace(net, params, "relu")
    with pytest.raises(dj.TraceError, match="params: the leaf 'rate' is"):
        dj.trace(net, params | {"rate": 0.1}, x)
    with pytest.raises(ValueError, match="primitives, layers, blocks"):
        dj.trace(net, params, x, granularity="layer")
    with pytest.warns(dj.TraceWarning, match="does not use the parameters v"):
        dj.trace(net, params | {"v": jnp.ones(1)}, x)
    dag = dj.trace(net, params, x)
    with pytest.raises(dj.TraceError, match="only the batch size"):
        dag(jnp.ones((2, 4)))
    with pytest.raises(dj.TraceError, match="traced with 1 arrays"):
        dag(x, x)
    with pytest.raises(dj.TraceError, match="it was float32"):
        dag(x.astype(jnp.bfloat16))
    with pytest.raises(dj.TraceError, match="'w' was float32"):
        dag.replace(params={"w": jnp.ones((2, 3))})(x)


def test_no_warning_for_a_clean_function(transformer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dj.trace(fns.transformer, *transformer)


def test_older_keys_and_train_flags():
    def net(params, x, key):
        return x @ params["w"] + jax.random.normal(key, x.shape)

    params, x = {"w": jnp.ones((3, 3))}, jnp.ones((2, 3))
    for make in (jax.random.key, jax.random.PRNGKey):
        dag = dj.trace(net, params, x, make(0))
        assert dag.graph.inputs == ("x",)
        assert np.allclose(dag(x, make(3)), net(params, x, make(3)))


def test_flax_module_with_two_inputs():
    class Bilinear(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(3)(x) * nn.Dense(3)(y)

    net, x = Bilinear(), jnp.ones((2, 3))
    variables = net.init(jax.random.key(0), x, x)
    dag = dj.from_linen(net, variables, x, x)
    assert isinstance(dag.graph.merge_of["out"], dj.Product)
    assert np.allclose(dag(x, 2 * x), net.apply(variables, x, 2 * x))


# --- what once went wrong ---------------------------------------------------------

P, X = fns.kernels({"a": (3, 3), "b": (3, 3)}), jnp.arange(6.0).reshape(2, 3) / 6
LARGER = jnp.cos(jnp.arange(15.0)).reshape(5, 3)


@pytest.mark.parametrize(
    "net",
    [
        lambda p, x: (x + jnp.tanh(x @ p["a"])) + (x + x @ p["b"]),
        lambda p, x: jnp.tanh(x @ p["a"]) - (x @ p["b"] - jnp.tanh(x @ p["a"])),
    ],
)
def test_terms_of_a_sum_count_as_often_as_they_are_added(net):
    dag = dj.trace(net, P, X)
    got = jax.jit(lambda dag, x: dag(x))(dag, X)
    assert nets.distance(got, jax.jit(net)(P, X)) <= 1e-5


def test_a_sum_of_very_many_terms():
    many = lambda p, x: sum(jnp.tanh(x @ p["a"] * i) for i in range(1500)) + x @ p["b"]
    assert len(dj.trace(many, P, X).graph.arcs) == 1501


@pytest.mark.parametrize(
    "net",
    [
        lambda p, x: jnp.tanh((x @ p["a"]).sum(0) / x.shape[0]) @ p["b"],
        lambda p, x: x @ p["a"] @ p["b"] / np.full((3,), x.shape[0], np.float32)[None],
        lambda p, x: x @ p["a"] @ p["b"] + np.arange(x.shape[0], dtype="f")[:, None],
        lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p["a"]) @ p["b"])(x),
        lambda p, x: x @ p["b"] * jnp.tanh(x @ p["a"]).mean(0, keepdims=True),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_depends_on_the_batch_size_follows_it(net, rows):
    dag = dj.trace(net, P, X[:rows])
    for x in (X, LARGER, X[:1]):
        assert np.allclose(dag(x), net(P, x), atol=1e-5)
        h = dj.compose(dj.factors(dag))(dj.inject(dag, x))
        assert np.allclose(dag.read("out", h["out"]), net(P, x), atol=1e-5)


@pytest.mark.parametrize("granularity", ["layers", "blocks"])
def test_products_of_data_traced_at_batch_size_one(granularity):
    """`@` drops batch axes of size 1."""
    heads = lambda p, x: fns.attend(x @ p["a"], x @ p["b"], jnp.tanh(x @ p["a"]))
    x = jax.random.normal(jax.random.key(0), (4, 2, 3))
    dag = dj.trace(heads, P, x[:1], granularity=granularity)
    for data in (x, x[:1], x[:2]):
        assert np.allclose(dag(data), heads(P, data), atol=1e-5)


def test_outputs_of_one_equation_keep_their_order():
    net = lambda p, x: [h @ p["b"] for h in jnp.split(jnp.sort(x @ p["a"], 0), 2)]
    graphs = {dj.trace(net, P, X, granularity="primitives").graph for _ in range(8)}
    assert len(graphs) == 1


def test_an_empty_batch_and_keys_of_examples():
    noisy = lambda p, x, keys: x @ p["a"] @ p["b"] + jax.vmap(jax.random.normal)(keys)[:, None]  # fmt: skip  # noqa: E501
    keys = jax.random.split(jax.random.key(0), 5)
    dag = dj.trace(noisy, P, X, keys[:2])
    assert np.allclose(dag(LARGER, keys), noisy(P, LARGER, keys), atol=1e-5)
    plain = dj.trace(lambda p, x: x @ p["a"] @ p["b"], P, X)
    assert plain(X[:0]).shape == (0, 3)


def test_a_second_output_is_no_state():
    net = lambda p, s, x: (x @ p["a"] + s[None], x @ p["b"])
    dag = dj.trace(net, P, X, state=jnp.ones(3))
    chex.assert_trees_all_close(dag(X), net(P, jnp.ones(3), X))


def test_names_never_clash():
    net = lambda p, out: {"params": {"w": out @ p["a"]}, "w": out @ p["b"], "x": out}
    dag = dj.trace(net, P, X)
    chex.assert_trees_all_close(dag(X), net(P, X))
    many = lambda p, x1, *rest: x1 @ p["a"] + rest[0] @ p["b"] + rest[1]
    assert len(dj.trace(many, P, X, X, X).graph.inputs) == 3


def test_a_scalar_input_has_no_batch_axis():
    net = lambda p, t, x: jnp.tanh(x @ p["a"] + t) @ p["b"]
    dag, t = dj.trace(net, P, jnp.ones(()), X[:1]), jnp.ones(())
    assert np.allclose(dag(t, LARGER), net(P, t, LARGER), atol=1e-5)
    assert dj.delete(dag, "b")(t, LARGER).shape == (5, 3)
    h = dj.compose(dj.factors(dag))(dj.inject(dag, t, LARGER))
    assert np.allclose(h["out"], net(P, t, LARGER), atol=1e-5)


def test_an_input_that_is_not_resized():
    net = lambda p, x, place: x @ p["a"] @ p["b"] + place.sum(0)[None]
    dag = dj.trace(net, P, X, X)
    with pytest.raises(dj.TraceError, match="the input x, place has the shape"):
        dag(LARGER, X)
    with pytest.raises(dj.TraceError, match="inputs of the form"):
        dag(LARGER, {"place": X})


class Setting:
    """A module that is edited in a notebook."""

    act = staticmethod(jnp.tanh)


def test_a_redefined_helper_is_seen():
    net = lambda p, x: Setting.act(x @ p["a"]) @ p["b"]
    before = dj.trace(net, P, X)
    Setting.act = staticmethod(jnp.sin)
    after = dj.trace(net, P, X)
    assert np.allclose(after(X), net(P, X), atol=1e-6)
    assert before.graph != after.graph


def test_redefined_backward_rules_are_seen():
    def scaled(factor):
        rule = jax.custom_vjp(lambda x: x)
        rule.defvjp(lambda x: (x, None), lambda _, g: (factor * g,))
        return rule

    graphs = []
    for factor in (2.0, 2.0, 7.0):
        Setting.rule = staticmethod(scaled(factor))
        net = lambda p, x: Setting.rule(x @ p["a"]) @ p["b"]
        graphs.append(dj.trace(net, P, X).graph)
    assert graphs[0] == graphs[1] != graphs[2]


def test_weak_types_stay_weak():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), P)
    net = lambda p, x, t: (x @ p["a"] @ p["b"]) * t
    x, t = X.astype(jnp.bfloat16), jnp.asarray(2.0)
    assert dj.trace(net, half, x, t)(x, t).dtype == net(half, x, t).dtype


def test_parts_of_a_traced_network_and_copies():
    net = lambda p, x: x + jnp.tanh(x @ p["a"]) @ p["b"]
    dag = dj.trace(net, P, X)
    parts = dj.node_functions(dag, dag.graph.depth)
    assert np.allclose(parts["a"](LARGER), jnp.tanh(LARGER @ P["a"]), atol=1e-5)
    assert np.allclose(parts["out"](LARGER), net(P, LARGER), atol=1e-5)
    assert copy.deepcopy(dag).graph == dag.graph


def test_older_keys_are_not_taken_for_a_batch_of_two():
    noisy = lambda p, x, key: x @ p["a"] @ p["b"] + jax.random.normal(key, x.shape)
    dag, key = dj.trace(noisy, P, X, jax.random.PRNGKey(0)), jax.random.PRNGKey(1)
    assert np.allclose(dag(LARGER, key), noisy(P, LARGER, key), atol=1e-5)


@pytest.mark.parametrize("name", ["a0", "m", "zz"])
def test_inserted_parameters_do_not_move_the_others(name):
    """Leaves are found by their paths."""
    dag = dj.trace(lambda p, x: jnp.tanh(x @ p["b"]) @ p["c"], {"b": P["a"], "c": P["b"]}, X)  # fmt: skip  # noqa: E501
    zero = {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
    larger = dj.insert(dag, dj.Arc(name, "x", "out", nn.Dense(3)), zero)
    assert np.allclose(larger(LARGER), dag(LARGER), atol=1e-6)
    with pytest.raises(dj.TraceError, match="'b' was float32"):
        dag.replace(params={"b0": P["a"], "c": P["b"]})(X)


def test_insertion_into_models_of_other_libraries():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    dag = dj.from_nnx(model, X)
    skip = dj.insert(dag, dj.Arc("skip", "x", "out", dj.identity))
    assert np.allclose(skip(X), model(X) + X, atol=1e-6)
    with pytest.raises(dj.GraphError, match="a State"):
        dj.insert(dag, dj.Arc("more", "x", "out", nn.Dense(3)), {"kernel": P["a"]})


def test_groups_are_one_arc_each():
    params = {f"block{i}": fns.kernels(fns.TRANSFORMER, i) for i in range(2)}
    net = lambda p, x: fns.transformer(p["block1"], fns.transformer(p["block0"], x))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    dag = dj.trace(net, params, x, granularity=lambda name: name.split("/")[0])
    assert [*dag.graph.by_name] == ["block0", "block1"]
    assert np.allclose(dag(x), net(params, x), atol=1e-5)


def test_messages_of_wrong_calls():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(dj.TraceError, match="no inputs"):
        dj.trace(model, X)
    with pytest.raises(TypeError, match="a Flax Linen module was expected"):
        dj.from_linen(model, {}, X)
    with pytest.raises(TypeError, match="a Flax NNX module was expected"):
        dj.from_nnx(nn.Dense(3), X)
    with pytest.raises(dj.TraceError, match="returns no array"):
        dj.trace(lambda p, x: None, P, X)
    dag = dj.from_nnx(model, X)
    with pytest.raises(dj.TraceError, match="0 keys"):
        dag(X, jax.random.key(0))
    with pytest.raises(dj.TraceError, match="Linear was traced"):
        dag(jnp.ones((2, 4)))
