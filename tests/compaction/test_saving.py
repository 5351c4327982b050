"""Files: types that numpy does not know, batch sizes of any kind of integer."""

import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj


def net_of(dtype):
    w = jnp.asarray(np.arange(12).reshape(4, 3), dtype)
    return dj.trace(lambda p, x: x @ p["w"].astype(x.dtype), {"w": w}, jnp.ones((2, 4)))


@pytest.mark.parametrize(
    "dtype", ["float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "int8", "int4"]
)
def test_narrow_types_come_back_as_they_were(dtype, tmp_path):
    net = net_of(dtype)
    file = dj.load(dj.save(net, tmp_path / "net.zip", batch_sizes=2))
    assert file.params["w"].dtype == dtype
    x = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(file(x), net(x))


def test_float64_parameters_of_numpy(tmp_path):
    """They are used as float32, as everywhere in JAX."""
    fn, params = lambda p, x: x @ p["w"], {"w": np.full((4, 3), 0.5)}
    net = dj.trace(fn, params, jnp.ones((2, 4)))
    x = jnp.ones((2, 4))
    assert net(x).dtype == jnp.float32
    assert (net(x) == 2).all()
    file = dj.load(dj.save(net, tmp_path / "net.zip", batch_sizes=2))
    assert (file(x) == 2).all()


@pytest.mark.parametrize("sizes", [np.int64(2), 2, (np.int32(2),), np.array([2])])
def test_batch_sizes_are_integers_of_any_kind(sizes, tmp_path):
    file = dj.load(dj.save(net_of("float32"), tmp_path / "n.zip", batch_sizes=sizes))
    assert file.batch_sizes == (2,)


@pytest.mark.parametrize("sizes", [True, 2.0, "2", None, (0,), (2, -1)])
def test_other_batch_sizes_are_refused(sizes, tmp_path):
    with pytest.raises(dj.CompactionError, match="whole numbers from 1 on"):
        dj.save(net_of("float32"), tmp_path / "n.zip", batch_sizes=sizes)
    assert not [*tmp_path.iterdir()]


def test_an_input_that_is_as_long_as_the_batch_by_chance_is_refused():
    fn = lambda p, x, support: jnp.tanh(x @ p["e"]) @ jnp.tanh(support @ p["s"]).T
    params = {"e": jnp.ones((3, 8)), "s": jnp.ones((3, 8))}
    alike = dj.trace(fn, params, jnp.ones((4, 3)), jnp.ones((4, 3)))
    with pytest.raises(dj.CompactionError, match="input 1 is 4 long"):
        dj.save(alike, "/nowhere/net.zip")


def test_inputs_of_one_batch_are_resized_together(tmp_path):
    fn = lambda p, x, z: jnp.tanh(x @ p["w"]) * z
    net = dj.trace(fn, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), jnp.ones((4, 2)))
    loaded = dj.load(dj.save(net, tmp_path / "net.zip", batch_sizes=[7]))
    assert loaded(jnp.ones((7, 3)), jnp.ones((7, 2))).shape == (7, 2)
