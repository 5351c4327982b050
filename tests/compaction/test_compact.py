"""Compacted networks equal masked ones, whatever the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from tests.compaction import masking, nets
from tests.compaction.masking import applied, built, check, drawn, error, ones
from tests.graph.nets import distance

SLOW = ("linen", "nnx", "group_norm_fast", "layer_norm_fast", "dense_concat", "several")
MOST = [name for name in nets.NETS if name not in SLOW]
HARD = ("largest", "maxout", "counted", "log_sum", "outer", "standardized", "gru")

# --- exactness ------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.NETS)
def test_units(name):
    """Whole units: all that goes with them is masked, and goes."""
    mask = drawn(name, "groups")
    cut = check(name, mask)
    left = sum(x.size for x in jax.tree.leaves(cut.net.params))
    assert left <= sum(int(m.sum()) for m in jax.tree.leaves(mask))


@pytest.mark.parametrize("name", [*MOST, *nets.ODD])
def test_writers_alone(name):
    """Columns of kernels: biases and shifts stay, and make constants."""
    check(name, drawn(name, "writers", 0.5, seed=1))


@pytest.mark.parametrize("name", ["residual", "transposed", *nets.ODD])
def test_silent_channels(name):
    check(name, drawn(name, "silent", 0.5, seed=6))


@pytest.mark.parametrize("name", ["same", "dense_concat", "rms_norm", "rotary"])
def test_readers_alone(name):
    check(name, drawn(name, "readers", 0.6, seed=2))


@pytest.mark.parametrize("name", ["residual", "layer_norm", "fused", *HARD])
def test_slices_of_all_arrays(name):
    """Rows, columns, biases, each drawn for itself."""
    check(name, drawn(name, "all sides", 0.7, seed=3))


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.05])
def test_unstructured(density):
    for name in ("mlp", "layer_norm"):
        check(name, drawn(name, "unstructured", density, seed=4))


@pytest.mark.parametrize("name", ["same", "mobile", "shuffled", "fused", "lstm"])
def test_one_unit_left(name):
    check(name, drawn(name, "one left"))


@pytest.mark.parametrize("name", ["valid", "option_a", "rotary", "lstm", "several"])
def test_nothing_left(name):
    """A constant network: of its parameters none is needed, but for scalars."""
    cut = check(name, drawn(name, "nothing"))
    assert sum(x.size for x in jax.tree.leaves(cut.net.params)) <= 1


@pytest.mark.parametrize("name", ["residual", "softmaxed", "linen"])
def test_branches(name):
    """Whole arcs off, and some units."""
    units, rng = masking.units_of(name), np.random.default_rng(5)
    kept = {group: rng.random(of.size) < 0.7 for group, of in units.items()}
    kept["arcs"] = np.arange(units["arcs"].size) > 0
    check(name, units.mask(kept))


def test_a_dead_branch_goes():
    """A branch whose last layer is off has nothing left."""
    mask = ones(built("residual").params)
    mask["down"] &= False
    mask["bn2"] = {k: m & (k in ("mean", "var")) for k, m in mask["bn2"].items()}
    cut = check("residual", mask)
    assert all(cut.net.params[name].size == 0 for name in ("up", "down"))


# --- folded constants -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["same", "valid"])
def test_zombies_become_constants(name):
    """A map where the border is padded, one vector where it is not."""
    mask = ones(built(name).params)
    mask["one"][..., 2:] = False
    cut = check(name, mask)
    (constant,) = cut.net.state["folded"]
    assert constant.shape == ((1, 6, 6, 5) if name == "same" else (1, 1, 1, 5))
    assert cut.net.params["one"].shape == (3, 3, 2, 2)


# --- batch sizes, transforms, derivatives ---------------------------------------------


@pytest.mark.parametrize("name", ["same", "group_norm", "rotary", "lstm"])
@pytest.mark.parametrize("batch", [1, 5])
def test_batch_sizes(name, batch):
    net, mask = built(name), drawn(name, "writers", 0.5, seed=1)
    small = dj.compact(net.dag, mask, verify=False).net
    xs = jax.tree.map(lambda x: jnp.resize(x, (batch, *x.shape[1:])), net.xs)
    want = masking.run_apart(net.fn, applied(mask, net.params), xs)
    assert error(masking.run(small, xs), want) <= 1


@pytest.mark.parametrize("name", ["valid", "layer_norm"])
def test_vmap(name):
    net, mask = built(name), drawn(name, "groups")
    small = dj.compact(net.dag, mask, verify=False).net
    (x,) = net.xs
    xs, theta = jnp.stack([x, x[::-1] * 2]), applied(mask, net.params)
    want = jax.vmap(lambda x: net.fn(theta, x))(xs)
    assert error(jax.jit(jax.vmap(lambda x: small(x)))(xs), want) <= 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "groups") for name in ("residual", "layer_norm", "softmaxed", "lstm")]
    + [(name, "writers") for name in ("layer_norm", "rules", "scaled")],
)
def test_gradients(name, kind):
    """Those of what is left are those of the masked network, gathered."""
    net, mask = built(name), drawn(name, kind)
    theta = applied(mask, net.params)
    cut = dj.compact(net.dag, mask, verify=False)
    ours = lambda params: masking.loss(cut.net.replace(params=params)(*net.xs))
    theirs = lambda params: masking.loss(net.fn(params, *net.xs))
    got, want = (
        jax.jit(jax.grad(ours))(cut.net.params),
        jax.jit(jax.grad(theirs))(theta),
    )
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)) > 1e-2
    assert distance(got, cut.index.gather(want), scale=want) <= 1e-5


def test_derivatives_by_the_input():
    """Of a derivative rule of one's own too."""
    net, mask = built("rules"), drawn("rules", "groups")
    small, theta = (
        dj.compact(net.dag, mask, verify=False).net,
        applied(mask, net.params),
    )
    slope = jax.jit(jax.grad(lambda x, net: masking.loss(net(x))))
    want = jax.jit(jax.grad(lambda x: masking.loss(net.fn(theta, x))))(*net.xs)
    assert distance(slope(*net.xs, small), want) <= 1e-5


# --- the index ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["several", "nnx"])
def test_gather_after_scatter_is_the_identity(name):
    net = built(name)
    cut = dj.compact(net.dag, drawn(name, "groups"), verify=False)
    for fill in (0, 1):
        full = cut.index.scatter(cut.net.params, fill)
        assert jax.tree.map(np.shape, full) == jax.tree.map(np.shape, net.params)
        again = cut.index.gather(full)
        assert distance(again, cut.net.params) == 0
    traced = jax.jit(cut.index.gather)(net.params)
    assert distance(traced, cut.index.gather(net.params)) == 0


TRANSFORMS = {
    "adamw": lambda: optax.adamw(1e-3),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "plain": lambda: optax.sgd(0.1),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1.0, 0.0, 9))
    ),
    "masked": lambda: optax.masked(optax.adam(1e-3), _matrices),
    "partition": lambda: optax.partition(
        {True: optax.adam(1e-3), False: optax.sgd(0.1, momentum=0.9)}, _matrices
    ),
    "several steps": lambda: optax.MultiSteps(optax.adam(1e-3), 2),
}


def _matrices(params):
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


@pytest.mark.parametrize("name", ["several", "nnx"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_optimizer_states(name, transform):
    """Moments are gathered, counts pass."""
    net, tx = built(name), TRANSFORMS[transform]()
    grow = lambda s: jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 1), s)
    cut = dj.compact(
        net.dag, drawn(name, "groups"), grow(tx.init(net.params)), verify=False
    )
    want = grow(tx.init(cut.net.params))
    assert jax.tree.structure(cut.opt_state) == jax.tree.structure(want)
    pairs = zip(jax.tree.leaves(cut.opt_state), jax.tree.leaves(want), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_one_label_may_stand_for_a_layer():
    """What `optax.multi_transform` leaves out is a hole in place of its leaves."""
    draw = lambda *shape: jnp.ones(shape)
    params = {"a": {"w": draw(3, 6), "b": draw(6)}, "c": {"w": draw(6, 2)}}
    fn = lambda p, x: jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["c"]["w"]
    net = dj.trace(fn, params, jnp.ones((2, 3)))
    small, index, _ = dj.compact(net, dj.prune_units(net, density=0.5))
    tx = optax.multi_transform(
        {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()},
        {"a": "train", "c": "freeze"},
    )
    got, want = index.gather(tx.init(params)), tx.init(small.params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
    back = index.scatter(want)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, tx.init(params))


def test_moments_of_other_shapes_are_refused():
    """Factored moments have no entry for each weight."""
    net = built("mlp")
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    with pytest.raises(dj.CompactionError, match="factored moments"):
        dj.compact(net.dag, drawn("mlp", "groups"), tx.init(net.params), verify=False)


# --- again ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["same", "layer_norm", "fused", "lstm"])
def test_twice_is_once(name):
    """Nothing is left to cut."""
    net, mask = built(name), drawn(name, "groups")
    first = dj.compact(net.dag, mask, verify=False).net
    second = dj.compact(first, ones(first.params), verify=False).net
    assert jax.tree.map(np.shape, second.params) == jax.tree.map(np.shape, first.params)
    assert error(masking.run(second, net.xs), masking.run(first, net.xs)) <= 1


@pytest.mark.parametrize("name", ["same", "residual", "rms_norm"])
def test_cut_and_cut_again(name):
    """A network that was cut, with constants folded, is one like any other."""
    net, mask = built(name), drawn(name, "writers", 0.7, seed=1)
    first = dj.compact(net.dag, mask, verify=False).net
    units, rng = dj.units(first), np.random.default_rng(6)
    again = units.mask({k: rng.random(g.size) < 0.6 for k, g in units.channels.items()})
    want = masking.run(first.replace(params=applied(again, first.params)), net.xs)
    second = dj.compact(first, again, verify=False).net
    assert error(masking.run(second, net.xs), want) <= 1


def test_no_new_program_for_new_values():
    """Two cuts of the same structure are one program."""
    net, mask, count = built("mlp"), drawn("mlp", "groups"), []

    @jax.jit
    def call(small, x):
        count.append(0)
        return small(x)

    doubled = net.dag.replace(params=jax.tree.map(lambda x: 2 * x, net.params))
    for dag in (net.dag, doubled):
        call(dj.compact(dag, mask, verify=False).net, *net.xs)
    assert len(count) == 1


# --- odd requests ---------------------------------------------------------------------


def test_masks_with_holes():
    """None keeps a leaf, or a whole tree."""
    net = built("residual")
    mask = {name: None for name in net.params}
    mask["up"] = np.ones((3, 3, 5, 6), bool)
    mask["up"][..., :3] = False
    cut = dj.compact(net.dag, mask, verify=False)
    theta = {**net.params, "up": applied(mask["up"], net.params["up"])}
    want = masking.run_apart(net.fn, theta, net.xs)
    assert error(masking.run(cut.net, net.xs), want) <= 1
    assert cut.net.params["up"].shape == (3, 3, 5, 3)


def test_parameters_with_holes():
    """As `equinox.partition` makes them: None where a function stood."""
    params = {"a": nets.normal(4, 8), "act": None, "b": nets.normal(8, 3), "c": None}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    net, x = dj.trace(fn, params, jnp.ones((2, 4))), nets.normal(5, 4)
    mask = dj.prune_units(net, jax.tree.map(jnp.abs, params), density=0.5)
    small, index, _ = dj.compact(net, mask, verify="gradients")
    assert small.params["a"].shape == (4, 4)
    assert small.params["act"] is None
    want = fn(applied(mask, params), x)
    assert jnp.allclose(small(x), want, atol=1e-5)
    assert jnp.allclose(fn(index.scatter(small.params), x), want, atol=1e-5)
    assert jax.tree.structure(dj.trim(net, mask)) == jax.tree.structure(params)


def test_a_scalar_is_masked():
    mask = ones(built("scaled").params)
    mask["s"] = np.zeros((), bool)
    check("scaled", mask)


def test_random_keys_are_inputs():
    """What is drawn by position pins the channel; the others can go."""

    def run(p, x, key):
        h = jnp.tanh(x @ p["one"])
        h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0) @ p["two"]
        return jnp.tanh(h) @ p["head"]

    params = nets.filled({"one": (4, 6), "two": (6, 5), "head": (5, 3)})
    x, key = nets.normal(2, 4), jax.random.key(1)
    dag = dj.trace(run, params, x, key)
    units = dj.units(dag)
    assert [g.size for g in units.channels.values()] == [5]
    mask = units.mask({k: np.arange(g.size) < 2 for k, g in units.items()})
    small = dj.compact(dag, mask, verify=False).net
    want = masking.run_apart(run, applied(mask, params), (x, key))
    assert error(masking.run(small, (x, key)), want) <= 1


def test_double_precision():
    with jax.enable_x64(True):
        net = built("layer_norm")
        wide = lambda t: jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)), t
        )
        params, xs, mask = wide(net.params), wide(net.xs), drawn("layer_norm", "groups")
        small = dj.compact(dj.trace(net.fn, params, *xs), mask, verify=False).net
        want = masking.run_apart(net.fn, applied(mask, params), xs)
        assert distance(masking.run(small, xs), want) <= 1e-12


def test_another_image_size_is_no_silent_broadcast():
    """A constant map of one size fits no other: an error, or the right result."""
    import flax.linen as nn

    conv = nn.Conv(4, (3, 3))
    graph = dj.series(
        conv, nn.tanh, nn.Conv(5, (3, 3)), nn.tanh, lambda x: x.mean((1, 2))
    )
    x = nets.normal(2, 4, 4, 2)
    dag = jax.eval_shape(lambda: dj.init(jax.random.key(0), graph, x))
    dag = dag.replace(params=nets.filled(dag.params))
    mask = ones(dag.params)
    mask["Conv"]["kernel"][..., 2:] = False
    small = dj.compact(dag, mask, verify=False).net
    with pytest.raises(dj.CompactionError, match="4"):
        masking.run(small, (x[:, :1, :1],))


def test_complex_vectors_are_no_real_constants():
    """Zombies whose biases have an imaginary part, behind a norm."""
    rng = np.random.default_rng(0)
    shift = rng.normal(size=8) + 1j * rng.normal(size=8)
    params = {"up": nets.normal(4, 8), "b": jnp.asarray(shift, jnp.complex64)}
    params["down"] = nets.normal(8, 3, seed=2)

    def fn(p, x):
        return (
            nets.layer_norm(
                {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
                jnp.tanh(x @ p["up"] + jnp.imag(p["b"])),
            )
            @ p["down"]
        )

    net, x = dj.trace(fn, params, jnp.ones((2, 4))), nets.normal(5, 4)
    gone = np.isin(np.arange(8), (1, 3, 5))
    params["b"] = jnp.where(gone, 0.3 + 2j, params["b"])  # alike
    net = net.replace(params=params)
    mask = {"up": np.tile(~gone, (4, 1)), "b": None, "down": np.tile(~gone, (3, 1)).T}
    small = dj.compact(net, mask, verify=False).net
    want = fn(applied(mask | {"b": np.ones(8, bool)}, params), x)
    assert jnp.allclose(small(x), want, atol=1e-5)
