"""What is remembered between calls depends on no mesh and no setting of the first."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import dagjax as dj
from dagjax.jaxprs import versions

X = jnp.linspace(-1, 1, 12).reshape(3, 4)  # no batch size that a test traces at
GRAPH = dj.series(nn.Dense(6), nn.relu, nn.Dense(2))


def under(name, fn, *args):
    """A call on one device, inside a `shard_map` over an axis of this name."""
    mesh = Mesh(np.array(jax.devices()[:1]), (name,), axis_types=(AxisType.Auto,))
    spec = PartitionSpec()
    return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
        *args
    )


def initialized():
    return lambda x: dj.init(jax.random.key(0), GRAPH, x)(x)


def traced():
    dag = dj.init(jax.random.key(0), GRAPH, X)
    fn = lambda params, x: dag.replace(params=params)(x)
    return dj.trace(fn, dag.params, X[:2])


def compacted():
    dag = dj.init(jax.random.key(0), GRAPH, X[:2])
    return dj.compact(dag, dj.prune_units(dag, "l2", density=0.5)).net


def sparse():
    dag = dj.init(jax.random.key(0), GRAPH, X[:2])
    mask = jax.tree.map(lambda x: np.abs(x) > 0.1, dag.params)
    return dj.sparsify(dag, mask, force=True)


@pytest.mark.parametrize("make", [initialized, traced, compacted, sparse])
def test_a_network_met_in_one_mesh_works_in_another_and_in_none(make):
    net = make()
    found = [under(name, net, X) for name in ("one", "two")] + [jax.jit(net)(X), net(X)]
    wanted = make()(X)
    for y in found:
        np.testing.assert_allclose(y, wanted, atol=1e-6)


@pytest.mark.parametrize("make", [traced, compacted])
def test_its_gradients_too(make):
    loss = lambda params, net, x: net.replace(params=params)(x).sum()
    net, wanted = make(), make()
    inside = under("one", jax.grad(loss), net.params, net, X)
    after = jax.grad(loss)(net.params, net, X)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose([a, b], [c, c], atol=1e-6),
        inside, after, jax.grad(loss)(wanted.params, wanted, X),
    )  # fmt: skip


def test_units_of_a_network_asked_for_in_a_mesh():
    dag = dj.init(jax.random.key(0), GRAPH, X)
    seen = []

    def ask(x):
        seen.append(repr(dj.units(dag)))
        return x

    under("one", ask, X)
    assert seen == [repr(dj.units(dag))]


def test_a_shape_is_shape_type_and_weakness_alone():
    seen = []
    under("one", lambda x: seen.append(versions.shape_of(x)) or x, X)
    assert seen == [jax.ShapeDtypeStruct(X.shape, X.dtype)]
    assert versions.shape_of(jnp.asarray(2.0)).weak_type
    assert not versions.shape_of(np.float32(2.0)).weak_type


def test_a_program_is_traced_again_under_another_precision():
    net = lambda dag: str(dj.units(dag).source.body.walk().__next__().eqn)
    dag = dj.init(jax.random.key(0), GRAPH, X)
    before = net(dag)
    with jax.default_matmul_precision("float32"):
        assert net(dag) != before
    assert net(dag) == before


def test_a_closed_jaxpr_and_its_parts():
    held = np.arange(3.0, dtype=np.float32)
    closed = jax.make_jaxpr(lambda x: x + jnp.asarray(held))(held)
    jaxpr, consts = versions.open_jaxpr(closed)
    again = versions.closed_jaxpr(jaxpr, consts)
    (y,) = versions.jaxpr_as_fun(again)(held)
    np.testing.assert_array_equal(y, 2 * held)
    inner = jax.make_jaxpr(jax.checkpoint(jnp.sin))(held).eqns[0].params["jaxpr"]
    assert versions.open_jaxpr(inner)[1] == ()
