"""What NNX models hold beside weights; masks and states in other containers."""

import collections

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dagjax as dj
from tests.compaction.nets import filled, normal
from tests.graph.nets import distance

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.filterwarnings("ignore:Using 'Module.sow"),
]

SHAPES = {"one": {"w": (3, 8), "b": (8,)}, "two": {"w": (8, 2), "b": (2,)}}


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.one, self.two = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.two(self.see(nnx.relu(self.one(x))))

    def see(self, h):
        return h


class Sowing(Model):
    def see(self, h):
        self.sow(nnx.Intermediate, "h", h)
        return h


class Setting(Model):
    def see(self, h):
        self.h = nnx.Intermediate(h)
        return h


class Lazy(Model):
    def see(self, h):
        self.cache = nnx.Cache(h)
        return h


@pytest.mark.parametrize("kind", [Model, Sowing, Setting])
@pytest.mark.parametrize("calls", [0, 2])
def test_what_a_model_sows_is_left_out(kind, calls):
    model, x = kind(), normal(2, 3)
    for _ in range(calls):
        model(x)
    dag = dj.from_nnx(model, x)
    assert np.array_equal(dag(x), Model()(x))
    assert not jax.tree.leaves(dag.state)
    small = dj.compact(dag, dj.prune_units(dag, "l2", density=0.5)).net
    assert dj.to_nnx(small, model).one.kernel.shape == (3, 4)


def test_variables_made_by_the_call_are_named():
    with pytest.raises(dj.TraceError, match="new variables"):
        dj.from_nnx(Lazy(), normal(2, 3))


@pytest.mark.parametrize("state", ["opt_state", "variables"])
def test_moments_of_an_nnx_optimizer(state):
    model, x = Model(), normal(2, 3)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    loss = lambda model: (model(x) ** 2).sum()
    optimizer.update(model, nnx.grad(loss)(model))
    dag = dj.from_nnx(model, x)
    mask = dj.prune_units(dag, "l2", density=0.5)
    held = nnx.state(optimizer, nnx.optimizer.OptState)
    held = optimizer.opt_state if state == "opt_state" else held
    cut = dj.compact(dag, mask, held)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(cut.opt_state)]
    want = optax.adam(0.1).init(cut.net.params)
    shapes = lambda leaves: sorted(np.shape(x) for x in leaves if np.ndim(x))
    assert shapes(arrays) == shapes(jax.tree.leaves(want))
    kept = np.flatnonzero(np.asarray(mask["one"]["kernel"][...]).any(0))
    moments = [np.asarray(a) for a in jax.tree.leaves(held) if a.shape == (3, 8)]
    small = [a for a in arrays if a.shape == (3, 4)]
    assert all(
        np.array_equal(m[:, kept], s) for m, s in zip(moments, small, strict=True)
    )


def ordered(tree):
    return collections.OrderedDict(
        (k, collections.OrderedDict(v)) for k, v in tree.items()
    )


CONTAINERS = {
    "dict": dict, "FrozenDict": flax.core.freeze, "OrderedDict": ordered,
    "State": nnx.State,
}  # fmt: skip


@pytest.mark.parametrize("of_params", CONTAINERS)
@pytest.mark.parametrize("of_mask", CONTAINERS)
def test_masks_in_other_containers(of_params, of_mask):
    plain, x = filled(SHAPES), normal(2, 3)
    fn = lambda p, x: (
        jax.nn.relu(x @ p["one"]["w"] + p["one"]["b"]) @ p["two"]["w"] + p["two"]["b"]
    )
    params = CONTAINERS[of_params](plain)
    on = np.arange(8) % 3 > 0
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), plain)
    mask["one"] = {"w": np.tile(on, (3, 1)), "b": on}
    dag = dj.trace(fn, params, x)
    small = dj.compact(dag, CONTAINERS[of_mask](mask)).net
    assert type(small.params) is type(params)
    assert small.params["one"]["w"].shape == (3, 5)
    masked = jax.tree.map(jnp.multiply, plain, mask)
    assert distance(small(x), fn(masked, x)) <= 1e-5


def test_another_name_is_no_mask():
    dag = dj.trace(lambda p, x: x @ p["w"], {"w": normal(3, 4)}, normal(2, 3))
    with pytest.raises(dj.CompactionError, match="which holds w; got v"):
        dj.compact(dag, nnx.State({"v": np.ones((3, 4), bool)}))
