"""Every kind of network x every public function of a network."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj

X = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)


def equations(params, x):
    """A stem, a branch beside a skip, a head; also what numpy is to compute."""
    xp = np if isinstance(x, np.ndarray) else jnp
    h = xp.tanh(x @ params["stem"])
    h = h + xp.tanh(h @ params["up"]) @ params["down"]
    return h @ params["head"]


SHAPES = {"stem": (6, 8), "up": (8, 8), "down": (8, 8), "head": (8, 3)}


def parameters():
    rng = np.random.default_rng(1)
    return {k: rng.normal(size=s).astype(np.float32) / 2 for k, s in SHAPES.items()}


def traced():
    params = jax.tree.map(jnp.asarray, parameters())
    return dj.trace(equations, params, jnp.asarray(X))


def built():
    """The same network of Linen modules."""
    dense = lambda n: nn.Dense(n, use_bias=False)
    block = dj.block(dense(8), jnp.tanh, dense(8))
    graph = dj.series(dense(8), jnp.tanh, dj.residual(block), dense(3))
    dag, p = dj.init(jax.random.key(0), graph, jnp.asarray(X)), parameters()
    order = iter(p[name] for name in ("stem", "head", "up", "down"))
    return dag.replace(
        params=jax.tree.map(lambda _: jnp.asarray(next(order)), dag.params)
    )


def half(net):
    return dj.prune_units(net, density=0.5)


def compacted():
    return dj.compact(traced(), half(traced())).net


def twice():
    return dj.compact(compacted(), dj.prune_units(compacted(), density=0.7)).net


def sparse():
    return dj.sparsify(traced(), half(traced()), force=True)


def sparse_of_compacted():
    net = compacted()
    return dj.sparsify(net, jax.tree.map(lambda w: w > 0, net.params), force=True)


def compacted_of_sparse():
    return dj.compact(sparse(), None).net


KINDS = {
    f.__name__: f
    for f in (
        built, traced, compacted, twice, sparse, sparse_of_compacted,
        compacted_of_sparse,
    )
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def net(kind):
    return KINDS[kind]()


def masked(net, mask):
    return net.replace(params=dj.masks.apply(mask, net.params))


def all_of(net):
    return jax.tree.map(lambda w: np.ones(w.shape, bool), net.params)


# --- values ---------------------------------------------------------------------------


def test_calls_are_those_of_numpy(kind, net):
    p = parameters()
    if kind == "built":
        np.testing.assert_allclose(net(X), equations(p, X), atol=1e-5)
        return
    kept = {k: np.asarray(m) for k, m in half(traced()).items()}
    p = {k: np.where(kept[k], w, 0) for k, w in p.items()}
    want = {
        "traced": lambda: equations(parameters(), X),
        "compacted": lambda: equations(p, X),
        "sparse": lambda: equations(p, X),
        "compacted_of_sparse": lambda: equations(p, X),
        "twice": lambda: _again(p, dj.prune_units(compacted(), density=0.7)),
        "sparse_of_compacted": lambda: _again(
            p, jax.tree.map(lambda w: w > 0, compacted().params)
        ),
    }[kind]()
    np.testing.assert_allclose(net(X), want, atol=1e-5)


def _again(p, mask):
    """Two masks, one after the other, on the whole arrays."""
    index = dj.compact(traced(), half(traced())).index
    second = index.scatter(jax.tree.map(lambda m: jnp.asarray(m, float), mask))
    return equations({k: w * np.asarray(second[k]) for k, w in p.items()}, X)


@pytest.mark.parametrize("batch", [1, 5])
def test_as_dag_has_the_values_and_the_parameters(net, batch):
    dag, x = dj.as_dag(net), jnp.asarray(np.resize(X, (batch, 6)))
    assert jax.tree.structure(dag.params) == jax.tree.structure(net.params)
    np.testing.assert_allclose(dag(x), net(x), atol=1e-6)
    other = jax.tree.map(lambda w: w / 2, net.params)
    dag, changed = dag.replace(params=other), net.replace(params=other)
    np.testing.assert_allclose(dag(x), changed(x), atol=1e-6)


def test_arcs_of_every_kind_can_be_deleted(kind, net):
    """The branch without its skip, and the other way round."""
    dag = dj.as_dag(net)
    beside = lambda arc: len(dag.graph.arcs_into(arc.target)) > 1
    skip = [a.name for a in dag.graph.arcs if beside(a) and not dag_params(dag, a)]
    assert len(skip) == 1
    without = dj.delete(dag, skip)(X)
    assert np.abs(np.asarray(net(X)) - without).max() > 1e-3
    gated = dag(X, gates={skip[0]: 0.0})
    np.testing.assert_allclose(without, gated, atol=1e-6)
    if kind == "traced":
        p = parameters()
        branch = np.tanh(np.tanh(X @ p["stem"]) @ p["up"]) @ p["down"]
        np.testing.assert_allclose(without, branch @ p["head"], atol=1e-5)


def dag_params(dag, arc):
    return jax.tree.leaves(arc.fn.own(dag.params, arc.name))


# --- functions ------------------------------------------------------------------------


def shown(net, capsys):
    dj.show(net)
    count = sum(w.size for w in jax.tree.leaves(net.params))
    assert f"{count:,} parameters" in capsys.readouterr().out


def drawn(net, capsys):
    figure = dj.draw(net)
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {arc.name for arc in dj.as_dag(net).graph.arcs} & words


def explained(net, capsys):
    rows = dj.explain(net).axes
    assert len(rows) == sum(w.ndim for w in jax.tree.leaves(net.params))


def costed(net, capsys):
    (cost,) = dj.cost(net, latency=False).values()
    assert cost.params == sum(w.size for w in jax.tree.leaves(net.params))
    assert cost.flops > 0


def unit_by_unit(net, capsys):
    """Each mask of units is cut, arcs among them."""
    units = dj.units(net)
    assert "arcs" in units
    for name, group in units.items():
        kept = np.arange(group.size) > 0
        small = dj.compact(net, mask := units.mask({name: kept})).net
        np.testing.assert_allclose(small(X), masked(net, mask)(X), atol=1e-5)


def scores(net):
    """Of a sparse network only arcs are units."""
    return "l2" if dj.units(net).channels else {"arcs": [1.0]}


def pruned(net, capsys):
    density = 0.6 if dj.units(net).channels else 1.0
    mask = dj.prune_units(net, scores(net), density=density)
    small = dj.compact(net, mask).net
    np.testing.assert_allclose(small(X), masked(net, mask)(X), atol=1e-5)


def measured(net, capsys):
    data = jnp.asarray(X), jnp.zeros((2, 3))
    found = dj.sensitivity(net, data, densities=[1.0], scores=scores(net))
    right = np.mean(np.square(np.asarray(net(X))))
    np.testing.assert_allclose(found.loss, np.full_like(found.loss, right), rtol=1e-5)


def saved(net, capsys, path="net.zip"):
    file = dj.save(net, path, batch_sizes=2)
    np.testing.assert_allclose(dj.load(file)(X), net(X), atol=1e-5)


def trimmed(net, capsys):
    mask = dj.trim(net, all_of(net))
    assert all(m.all() for m in jax.tree.leaves(mask))


def sparsified(net, capsys):
    again = dj.sparsify(net, None, force=True)
    np.testing.assert_allclose(again(X), net(X), atol=1e-5)


def as_function(net, capsys):
    apply, params = dj.as_function(net)
    np.testing.assert_allclose(jax.jit(apply)(params, X), net(X), atol=1e-6)


def to_nnx(net, capsys):
    np.testing.assert_allclose(dj.to_nnx(net)(X), net(X), atol=1e-6)


def transformed(net, capsys):
    once = jax.jit(lambda net, x: net(x))(net, X)
    each = jax.vmap(lambda x: net(x[None])[0])(jnp.asarray(X))
    np.testing.assert_allclose(once, net(X), atol=1e-6)
    np.testing.assert_allclose(each, net(X), atol=1e-6)


def copied(net, capsys):
    other = copy.deepcopy(net)
    assert jax.tree.structure(other) == jax.tree.structure(net)
    np.testing.assert_array_equal(other(X), net(X))


FUNCTIONS = (
    shown, drawn, explained, costed, unit_by_unit, pruned, measured, saved, trimmed,
    sparsified, as_function, to_nnx, transformed, copied,
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_takes_every_kind(function, net, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function(net, capsys)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"built"}))
def test_pickled_networks_are_the_same(kind):
    """Of a function that Python finds by its name; Flax's initializers are not."""
    net = KINDS[kind]()
    other = pickle.loads(pickle.dumps(net))
    assert jax.tree.structure(other) == jax.tree.structure(net)
    np.testing.assert_array_equal(other(X), net(X))
    x = np.resize(X, (5, 6))
    np.testing.assert_allclose(other(x), net(x), atol=1e-6)


# --- files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "net.zip"
    return dj.load(dj.save(traced(), path, batch_sizes=(2, 4)))


def test_a_file_is_called_and_costs_something(loaded):
    np.testing.assert_allclose(loaded(X), equations(parameters(), X), atol=1e-5)
    costs = dj.cost(traced(), loaded, batch=4, latency=False)
    one, two = costs["before"], costs["after"]
    assert (one.params, one.bytes) == (two.params, two.bytes)
    assert np.isnan(two.flops)
    assert two.batch == 4
    assert two.compiled_flops > 0.5 * one.flops
    with pytest.raises(dj.CompactionError, match=r"batch sizes \[2, 4\], got 3"):
        dj.cost(loaded, batch=3)


@pytest.mark.parametrize(
    "function",
    [
        dj.show, dj.draw, dj.explain, dj.units, dj.as_dag, dj.as_function, dj.to_nnx,
        lambda net: dj.prune_units(net, density=0.5),
        lambda net: dj.sensitivity(net, (X, np.zeros((2, 3)))),
        lambda net: dj.compact(net, None),
        lambda net: dj.sparsify(net, None),
        lambda net: dj.trim(net, None),
        lambda net: dj.save(net, "never"),
        lambda net: net.state,
        lambda net: net.example_inputs,
        lambda net: net.replace(params=None),
    ],
)  # fmt: skip
def test_what_needs_equations_is_refused_of_a_file(loaded, function):
    with pytest.raises(dj.CompactionError, match="trace the source again"):
        function(loaded)
