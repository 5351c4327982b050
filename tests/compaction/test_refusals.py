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


@pytest.mark.parametrize(("mode", "said"), [("norm", "norm/mean"), ("dropout", "rngs")])
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
    net = dj.init(jax.random.key(0), graph, jnp.ones((1, 4)))
    for call, said in (
        (lambda: dj.prune_units(net), "exactly one"),
        (lambda: dj.prune_units(net, density=0.5, flops=0.5), "exactly one"),
        (lambda: dj.prune_units(net, density=0), "kept share"),
        (lambda: dj.prune_units(net, "best", density=0.5), "no score 'best'"),
        (lambda: dj.prune_units(net, density=0.5, scope="all"), "scope"),
        (lambda: dj.prune_units(net, flops=0.01, keep_at_least=8), "cannot be met"),
        (lambda: dj.compact(net, {"Dense": None, "Dense_1": jnp.ones(3)}), "mask"),
        (lambda: dj.compact(net.params, None), "a network was expected"),
        (lambda: dj.load(__file__), "dj.save"),
    ):
        with pytest.raises(dj.CompactionError, match=said):
            call()
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
