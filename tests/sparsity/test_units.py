"""Units: slices along an axis, gathered over the leaves of a layer and spread again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dagjax.sparsity import masks, units

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.integers(-8, 9, shape).astype(np.float32)


CONV = {"kernel": draw(3, 3, 2, 4), "bias": draw(4)}
DENSE = {"kernel": draw(5, 3), "bias": draw(3)}
NET = {"conv": CONV, "fc": DENSE, "out": {"kernel": draw(3, 3)}}


def values(gathered):
    """The units of every layer, in the order of the tree."""
    return [np.asarray(x) for x in gathered.values()]


def test_kernel_and_bias_are_one_layer():
    got = values(units.gather(NET, -1, jnp.sum))
    want = [
        CONV["kernel"].sum((0, 1, 2)) + CONV["bias"],
        DENSE["kernel"].sum(0) + DENSE["bias"],
        NET["out"]["kernel"].sum(0),
    ]
    assert len(got) == 3
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_layers_of_other_parents_stay_apart():
    """`fc` and `out` have three units each, and share nothing."""
    got = values(units.gather({"a": DENSE, "b": DENSE}, -1, jnp.max))
    assert len(got) == 2
    want = np.maximum(DENSE["kernel"].max(0), DENSE["bias"])
    np.testing.assert_array_equal(got[0], want)
    np.testing.assert_array_equal(got[1], want)


@pytest.mark.parametrize("axis", range(4))
def test_every_axis_of_a_convolution(axis):
    kernel = CONV["kernel"]
    others = tuple(i for i in range(4) if i != axis)
    for same in (axis, axis - 4):
        (got,) = values(units.gather({"kernel": kernel}, same, jnp.sum))
        np.testing.assert_array_equal(got, kernel.sum(others))


def test_input_units_lie_along_axis_0():
    """Along axis 0 a bias of another size is a layer of its own."""
    got = values(units.gather({"fc": DENSE}, 0, jnp.sum))
    sums = {x.size: x for x in got}
    np.testing.assert_array_equal(sums[5], DENSE["kernel"].sum(1))
    np.testing.assert_array_equal(sums[3], DENSE["bias"])


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("reduce", [jnp.max, jnp.min])
def test_gather_undoes_spread(axis, reduce):
    wanted = units.gather(NET, axis, jnp.sum)
    wide = units.spread(wanted, NET, axis)
    back = units.gather(wide, axis, reduce)
    assert list(back) == list(wanted)
    for x, y in zip(values(back), values(wanted), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axis", [-1, 0])
def test_spread_undoes_gather_where_units_are_even(axis):
    even = units.spread(units.gather(NET, axis, jnp.max), NET, axis)
    again = units.spread(units.gather(even, axis, jnp.max), even, axis)
    assert jax.tree.structure(even) == jax.tree.structure(NET)
    for x, y, w in zip(*map(jax.tree.leaves, (even, again, NET)), strict=True):
        assert x.shape == w.shape
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axis", [-1, 0])
def test_spread_is_even_within_units(axis):
    wide = units.spread(units.gather(NET, axis, jnp.sum), NET, axis)
    for leaf in jax.tree.leaves(wide):
        slices = np.moveaxis(np.asarray(leaf), axis, 0).reshape(leaf.shape[axis], -1)
        np.testing.assert_array_equal(slices, slices[:, :1].repeat(slices.shape[1], 1))


def test_formats_stay():
    mask = jax.tree.map(lambda w: w > 0, NET)
    alive = units.gather(mask, -1, jnp.any)
    assert all(x.dtype == bool for x in alive.values())
    assert all(x.dtype == bool for x in jax.tree.leaves(units.spread(alive, mask, -1)))
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), NET)
    assert all(
        x.dtype == jnp.bfloat16 for x in units.gather(half, -1, jnp.max).values()
    )


def test_none_is_no_leaf():
    mask = masks.full(NET)
    alive = units.gather(mask, -1, jnp.any)
    assert [x.size for x in alive.values()] == [4, 3, 3]
    wide = units.spread(alive, mask, -1)
    assert jax.tree.structure(wide) == jax.tree.structure(mask)
    assert wide["conv"]["bias"] is None


def test_jit_and_vmap():
    @jax.jit
    def center(tree):
        return units.spread(units.gather(tree, -1, jnp.max), tree, -1)

    stacked = jax.tree.map(lambda w: np.stack([w, -w, 2 * w]), NET)
    got = jax.jit(jax.vmap(center))(stacked)
    for i, factor in enumerate((1, -1, 2)):
        want = center(jax.tree.map(lambda w, f=factor: f * w, NET))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(x[i], y)


def test_layers_keep_the_order_of_the_tree():
    """Also under `jax.tree.map`, and with more layers than fingers."""
    layers = [{"kernel": np.full((2, 1), i, np.float32)} for i in range(12)]
    gathered = units.gather(layers, -1, jnp.max)
    doubled = jax.tree.leaves(jax.tree.map(lambda x: 2 * x, gathered))
    assert [x.item() for x in doubled] == [2 * i for i in range(12)]
