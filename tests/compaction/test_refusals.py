"""What cannot be cut is refused by name; kernels may be cut apart from channels."""

import io
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dagjax as dj
from dagjax.compaction.pruning.scores import unit_scores
from tests.graph import nets


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def made(mode):
    model = Net(nnx.Rngs(0))
    model.eval()
    if mode == "norm":
        model.norm.use_running_average = False
    if mode == "dropout":
        model.drop.deterministic = False
    return dj.from_nnx(model, jnp.ones((2, 4)))


def without_first_unit(net):
    mask = jax.tree.map(lambda p: np.ones(p.shape, bool), net.params)
    mask["first"]["kernel"] = mask["first"]["kernel"].replace(
        np.arange(8) > np.zeros((4, 1))
    )
    return mask


@pytest.mark.parametrize(
    ("mode", "said"), [("norm", "norm/mean"), ("dropout", "first")]
)
def test_training_mode_is_refused(mode, said):
    net = made(mode)
    mask = without_first_unit(net)
    with pytest.raises(dj.CompactionError, match=rf"{said}.*training mode"):
        dj.compact(net, mask)
    assert dj.compact(made("eval"), mask).net.params["last"]["kernel"].shape == (7, 3)


def test_dropout_drawn_by_a_key_is_refused():
    def fn(params, x, key):
        h = jnp.maximum(x @ params["a"], 0)
        return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0) @ params["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    net = dj.trace(fn, params, jnp.ones((2, 3)), jax.random.key(0))
    mask = {"a": jnp.arange(4) > jnp.zeros((3, 1)), "b": None}
    with pytest.raises(dj.CompactionError, match="random numbers are drawn"):
        dj.compact(net, mask)
    assert "random" in repr(dj.explain(net))


def test_messages_say_what_to_do():
    graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
    x = jnp.ones((1, 4))
    net = dj.init(jax.random.key(0), graph, x)
    keep = jax.tree.map(lambda p: np.ones(p.shape, bool), net.params)
    nothing = jax.tree.map(lambda _: None, net.params)
    half = dj.compact(net, dj.prune_units(net, density=0.5)).net
    for call, said in (
        (lambda: dj.prune_units(net), "exactly one"),
        (lambda: dj.prune_units(net, density=0.5, flops=0.5), "exactly one"),
        (lambda: dj.prune_units(net, density=0), "kept share"),
        (lambda: dj.prune_units(net, "best", density=0.5), "no score 'best'"),
        (lambda: dj.prune_units(net, density=0.5, scope="all"), "scope"),
        (lambda: dj.prune_units(net, flops=0.01, keep_at_least=8), "cannot be met"),
        (lambda: dj.prune_units(net, density="half"), "kept share"),
        (lambda: dj.prune_units(net, density=0.5, only=[]), "picks none"),
        (lambda: dj.prune_units(net, {"Other": x}, density=0.5), "tree like"),
        (lambda: dj.prune_units(net, nothing, density=0.5), "no scores"),
        (lambda: dj.prune_units(net, jax.tree.map(jnp.log, net.params), density=0.5),
         "units of group 'Dense' are NaN"),
        (lambda: unit_scores(net, "l2", reduce="sum"), "reduce 'sum'"),
        (lambda: dj.compact(net, {"Dense": None, "Dense_1": jnp.ones(3)}), "mask"),
        (lambda: dj.compact(net, True), "a mask is a tree like .* got bool"),
        (lambda: dj.trim(net, {}), "which holds Dense/bias, Dense/kernel"),
        (lambda: dj.compact(net, net.params), "holds bools"),
        (lambda: dj.compact(net, keep, verify="grad"), "verify is"),
        (lambda: dj.compact(net, keep, optax.adam(0.1)), "a function is no array"),
        (lambda: dj.compact(net, keep, [jnp.ones(8)]), "lies in no tree"),
        (lambda: jax.jit(lambda p: dj.compact(net.replace(params=p), keep))(net.params),
         "not known inside jit"),
        (lambda: dj.compact(net.params, None), "a network was expected"),
        (lambda: dj.as_function(net.params), "a network was expected"),
        (lambda: dj.to_nnx(None), "a network was expected"),
        (lambda: half.replace(params=net.params)(x), "index.gather"),
        (lambda: dj.save(net, "never", batch_sizes=()), "batch_sizes"),
        (lambda: dj.save(net, "never", batch_sizes=(1, 1.5)), "batch_sizes"),
        (lambda: dj.save(net, "never", platforms="xpu"), "no platform 'xpu'"),
        (lambda: dj.cost(net, batch=0), "whole number"),
        (lambda: dj.lift_prune(net, x / 0, 0.5), "finite"),
        (lambda: dj.sensitivity(net, x), "a pair"),
        (lambda: dj.sensitivity(net, (x, x[:0])), "1 inputs and 0 targets"),
        (lambda: dj.load(__file__), "dj.save"),
    ):  # fmt: skip
        with pytest.raises(dj.CompactionError, match=said):
            call()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        dj.load("never")
    with pytest.warns(dj.CompactionWarning, match="nothing is removed"):
        dj.prune_units(net, density=0.99)
    for density in (0.01, 0.3, 1.0):
        mask = dj.prune_units(net, density=density)
        kept = int(mask["Dense"]["bias"].sum())
        assert kept == max(1, round(8 * density))


@pytest.mark.parametrize("budget", ["flops", "params"])
def test_budgets_are_met(budget):
    net = nets.fill(
        dj.init(jax.random.key(0), dj.zoo.lenet5(), jnp.ones((1, 16, 16, 1))), "float32"
    )
    whole = dj.units(net).total[("flops", "params").index(budget)]
    for share in (0.75, 0.5, 0.25):
        for scope in ("global", "group", "level"):
            mask = dj.prune_units(net, **{budget: share}, scope=scope)
            small = dj.compact(net, mask, verify=False).net
            left = dj.units(small).total[("flops", "params").index(budget)] / whole
            group = max(dj.units(net).channels.values(), key=lambda g: max(g.flops))
            unit = max(getattr(group, budget)) / whole
            assert abs(left - share) <= max(0.02, unit)


def test_kernels_are_cut_where_branches_keep_other_channels():
    def fn(params, x):
        s = x @ params["in"]
        s = s + jnp.tanh(s @ params["up"]) @ params["down"]
        return s @ params["out"]

    shapes = {"in": (3, 8), "up": (8, 6), "down": (6, 8), "out": (8, 2)}
    draw = lambda s: jax.random.normal(jax.random.key(len(s) + s[0]), s)
    params = {name: draw(s) for name, s in shapes.items()}
    x = jax.random.normal(jax.random.key(9), (2, 3))
    net = dj.trace(fn, params, x)
    mask = jax.tree.map(lambda p: np.ones(p.shape, bool), params)
    mask["in"][:, :4] = False  # the stem writes channels 4 to 7,
    mask["down"][:, 3:] = False  # the branch 0 to 2
    mask["up"][:5] = False  # and reads 5 to 7
    want = net.replace(params=dj.masks.apply(mask, params))
    loose, index, _ = dj.compact(net, mask, verify="gradients", coupled=False)
    tied = dj.compact(net, mask, verify="gradients").net
    assert {k: v.shape for k, v in loose.params.items()} == {
        "in": (3, 4), "up": (3, 6), "down": (6, 3), "out": (7, 2),
    }  # fmt: skip
    assert tied.params["in"].shape == (3, 7)
    for batch in (x, x[:1], jnp.concatenate([x, x, x])):
        assert jnp.allclose(loose(batch), want(batch), atol=1e-5)
    again = index.gather(index.scatter(loose.params))
    assert nets.distance(again, loose.params) == 0


def test_small_networks_go_where_dags_go(tmp_path):
    graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
    x = jax.random.normal(jax.random.key(2), (4, 5))
    net = nets.fill(dj.init(jax.random.key(0), graph, x), "float32")
    small = dj.compact(net, dj.prune_units(net, density=0.5)).net
    apply, params = dj.as_function(small)
    again = dj.trace(apply, params, x)  # a DAG once more
    assert jnp.allclose(again(x), small(x), atol=1e-6)
    model = dj.to_nnx(small)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    loss = lambda model: (model(x) ** 2).mean()
    before, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    assert loss(model) < before
    file = dj.save(small, tmp_path / "net.zip", batch_sizes=(4,))
    assert jnp.allclose(dj.load(file)(x), small(x), atol=1e-6)
    with zipfile.ZipFile(file) as held:
        arrays = np.load(io.BytesIO(held.read("params.npz")), allow_pickle=False)
        assert sum(a.size for a in arrays.values()) == 5 * 4 + 4 + 4 * 3 + 3
    with pytest.raises((dj.CompactionError, ValueError)):
        dj.load(file)(x[:3])


def test_a_damaged_file_says_so(tmp_path):
    net = dj.init(jax.random.key(0), dj.series(nn.Dense(3)), jnp.ones((1, 4)))
    whole = dj.save(net, tmp_path / "net.zip", batch_sizes=1).read_bytes()
    for place in (40, len(whole) // 2, len(whole) - 30):
        (tmp_path / "net.zip").write_bytes(whole[:place] + b"????" + whole[place + 4 :])
        with pytest.raises(dj.CompactionError, match=r"damaged|format"):
            dj.load(tmp_path / "net.zip")
    with pytest.raises(dj.CompactionError):
        dj.save(net, tmp_path / "net.zip", batch_sizes=(0,))
    assert (tmp_path / "net.zip").stat().st_size == len(whole)  # not overwritten


def test_paths_that_look_alike_are_kept_apart(tmp_path):
    params = {"a/b": jnp.ones((4, 3)), "a": {"b": 2 * jnp.ones((4, 3))}}
    x = jnp.ones((2, 4))
    net = dj.trace(lambda p, x: x @ p["a/b"] - x @ p["a"]["b"], params, x)
    assert jnp.all(dj.load(dj.save(net, tmp_path / "n", batch_sizes=2))(x) == -4)
    assert jnp.all(dj.to_nnx(net)(x) == -4)


def test_a_model_of_ones_own_gets_smaller():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up, self.norm = (
                nnx.Linear(4, 8, rngs=rngs),
                nnx.BatchNorm(8, rngs=rngs),
            )
            self.down = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.norm(self.up(x))))

    model, x = Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (5, 4))
    model(x)  # statistics that are not 0 and 1
    model.eval()
    net = dj.from_nnx(model, x)
    small = dj.compact(net, dj.prune_units(net, density=0.5)).net
    mine = dj.to_nnx(small, model)
    assert mine.norm.mean.shape == (4,)
    assert model.norm.mean.shape == (8,)
    assert jnp.allclose(mine(x), small(x), atol=1e-5)
    mine.train()
    assert not jnp.allclose(mine(x), small(x), atol=1e-3)  # by the statistics of x
    mask = jax.tree.map(lambda p: np.ones(p.shape, bool), net.params)
    mask["up"]["kernel"][:, :3] = False  # zombies: constants are folded
    with pytest.raises(dj.CompactionError, match="does not compute the same"):
        dj.to_nnx(dj.compact(net, mask).net, model)


def test_counts_of_random_keys_are_no_training():
    """A recurrent layer counts the keys of its first state, which is zero."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(3, 6, rngs=rngs))
            self.out = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.rnn(x)[:, -1])

    x = jax.random.normal(jax.random.key(0), (2, 4, 3))
    net = dj.from_nnx(Model(nnx.Rngs(0)), x)
    mask = dj.prune_units(net, density=0.5)
    small = dj.compact(net, mask).net
    want = net.replace(params=dj.masks.apply(mask, net.params))(x)
    assert jnp.allclose(small(x), want, atol=1e-6)
    assert small.params["out"]["kernel"].shape == (3, 2)


def test_a_masked_network_that_is_not_finite_is_named():
    params = {"v": jax.random.normal(jax.random.key(0), (4, 8)), "o": jnp.ones((8, 2))}
    fn = lambda p, x: x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0)) @ p["o"]
    net = dj.trace(fn, params, jnp.ones((2, 4)))
    mask = {"v": np.arange(8) > 3 * np.ones((4, 1)), "o": None}
    with pytest.raises(dj.CompactionError, match=r"masked network.* is not finite"):
        dj.compact(net, mask)


def test_networks_are_functions_for_jit():
    net = dj.init(jax.random.key(0), dj.series(nn.Dense(3)), jnp.ones((1, 4)))
    x = jnp.ones((2, 4))
    for one in (net, dj.compact(net, dj.masks.full(net.params)).net):
        assert jnp.allclose(jax.jit(one)(x), net(x))


def test_shapes_without_values_are_refused_by_name():
    """Units and costs need none."""
    graph = dj.series(nn.Dense(6), nn.relu, nn.Dense(2))
    make = lambda: dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
    net = jax.eval_shape(make)
    mask = jax.tree.map(lambda p: np.ones(p.shape, bool), net.params)
    assert dj.units(net).channels["Dense"].size == 6
    assert dj.cost(net, latency=False)[""].params == 44
    for ask in (
        lambda: dj.prune_units(net, density=0.5),
        lambda: dj.compact(net, mask),
        lambda: dj.sparsify(net, mask),
        lambda: dj.save(net, "/nowhere/net.zip"),
    ):
        with pytest.raises(dj.CompactionError, match="a shape and no values"):
            ask()
