"""Every score x shared laws; beside each law stands a mutant that it must catch."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dagjax.sparsity import masks, scores

KEY = jax.random.key(0)


def weights(seed, dtype=np.float32):
    """A layer with a bias, a layer without, and something that is no kernel."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    fc = {"kernel": draw(3, 4), "bias": draw(4)}
    return {"fc": fc, "norm": {"scale": draw(4)}, "out": {"kernel": draw(4, 2)}}


def sparse(seed):
    """A mask with dead entries, None at a leaf and at a subtree."""
    rng = np.random.default_rng(seed)
    fc = {"kernel": rng.random((3, 4)) < 0.7, "bias": None}
    return {"fc": fc, "norm": None, "out": {"kernel": rng.random((4, 2)) < 0.7}}


def loss(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["fc"]["kernel"] + params["fc"]["bias"][None])
    h = h * params["norm"]["scale"][None]
    return jnp.mean((h @ params["out"]["kernel"] - y) ** 2)


def batch_of(seed, dtype=np.float32):
    rng = np.random.default_rng(100 + seed)
    return rng.normal(size=(5, 3)).astype(dtype), rng.normal(size=(5, 2)).astype(dtype)


PARAMS, MASK, BATCH = weights(0), sparse(0), batch_of(0)

ROWS = {
    "magnitude": scores.magnitude,
    "random": scores.random,
    "taylor": scores.taylor(loss),
    "gate": scores.gate(loss),
}


def close(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


# -------------------------------------------------------------------------------- laws


def shaped_like_the_mask(score):
    got = score(KEY, PARAMS, MASK, BATCH)
    assert jax.tree.structure(got) == jax.tree.structure(MASK)
    for s, m in zip(jax.tree.leaves(got), jax.tree.leaves(MASK), strict=True):
        assert s.shape == m.shape
        assert s.dtype == np.float32
        assert np.isfinite(s).all()
        assert (s >= 0).all()


def pure(score):
    params, mask, batch = jax.tree.map(np.copy, (PARAMS, MASK, BATCH))
    first = score(KEY, params, mask, batch)
    second = score(KEY, params, mask, batch)
    close(first, second, rtol=0, atol=0)
    close(params, PARAMS, rtol=0, atol=0)
    close(mask, MASK, rtol=0, atol=0)
    close(batch, BATCH, rtol=0, atol=0)


def jit_is_eager(score):
    args = KEY, PARAMS, MASK, BATCH
    close(jax.jit(score)(*args), score(*args))


def vmap_is_a_loop(score):
    keys = jax.random.split(KEY, 3)
    each = [(keys[i], weights(i), sparse(i), batch_of(i)) for i in range(3)]
    several = jax.tree.map(lambda *x: np.stack(x), *[args[1:] for args in each])
    got = jax.jit(jax.vmap(score))(keys, *several)
    for i, args in enumerate(each):
        close(jax.tree.map(lambda x, i=i: x[i], got), score(*args))


def parameters_have_their_names(score):
    assert list(inspect.signature(score).parameters) == [
        "key",
        "params",
        "mask",
        "batch",
    ]


LAWS = [
    shaped_like_the_mask,
    pure,
    jit_is_eager,
    vmap_is_a_loop,
    parameters_have_their_names,
]

# ----------------------------------------------------------------------------- mutants


def zeros_at_holes(key, params, mask, batch):
    return masks.tree_map(lambda _, w: abs(w), mask, params, hole=jnp.zeros(()))


def signed(key, params, mask, batch):
    return masks.tree_map(lambda _, w: w, mask, params)


def remembers(key, params, mask, batch, *, calls=[]):  # noqa: B006
    calls.append(1)
    return masks.tree_map(lambda _, w: abs(w) + len(calls), mask, params)


def writes(key, params, mask, batch):
    params["out"]["kernel"] *= 2
    return scores.magnitude(key, params, mask, batch)


def leaves_jax(key, params, mask, batch):
    return masks.tree_map(lambda _, w: np.abs(np.asarray(w)), mask, params)


def mixes_the_batch(key, params, mask, batch):
    share = lambda w: np.abs(w) / np.abs(w).sum()
    call = lambda _, w: jax.pure_callback(
        share, jax.typeof(w), jnp.asarray(w), vmap_method="expand_dims"
    )
    return masks.tree_map(call, mask, jax.tree.map(jnp.asarray, params))


def other_order(params, key, mask, batch):
    return scores.magnitude(key, params, mask, batch)


MUTANTS = [
    (shaped_like_the_mask, zeros_at_holes),
    (shaped_like_the_mask, signed),
    (pure, remembers),
    (pure, writes),
    (jit_is_eager, leaves_jax),
    (vmap_is_a_loop, mixes_the_batch),
    (parameters_have_their_names, other_order),
]


def label(x):
    return x if isinstance(x, str) else x.__name__


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("check", LAWS, ids=label)
def test_law(check, name):
    check(ROWS[name])


@pytest.mark.parametrize(("check", "mutant"), MUTANTS, ids=label)
def test_law_catches(check, mutant):
    with pytest.raises((AssertionError, jax.errors.TracerArrayConversionError)):
        check(mutant)


def test_every_law_has_a_mutant():
    assert {check for check, _ in MUTANTS} == set(LAWS)


# --------------------------------------------------------------------- score by score


def test_magnitude_is_the_absolute_value():
    got = scores.magnitude(None, PARAMS, MASK, None)
    np.testing.assert_array_equal(got["fc"]["kernel"], np.abs(PARAMS["fc"]["kernel"]))


def taylor_is_the_finite_difference(taylor, step=1e-5):
    """`|w dloss/dw|` at the masked weights, in float64, by central differences."""
    with jax.enable_x64(True):
        mask, batch = sparse(1), batch_of(1, np.float64)
        params = masks.apply(mask, weights(1, np.float64))
        got = jax.jit(taylor(loss))(KEY, params, mask, batch)
        flat, rebuild = ravel_pytree(params)
        values = jax.jit(jax.vmap(lambda w: loss(rebuild(w), batch)))
        ends = [values(flat[None] + h * np.eye(flat.size)) for h in (step, -step)]
        slopes = rebuild((ends[0] - ends[1]) / (2 * step))
        want = masks.tree_map(lambda _, w, g: jnp.abs(w * g), mask, params, slopes)
        close(got, want, rtol=1e-7, atol=1e-9)


def test_taylor_is_the_finite_difference():
    taylor_is_the_finite_difference(scores.taylor)


def slope_alone(loss):
    def score(key, params, mask, batch):
        return masks.tree_map(lambda _, g: abs(g), mask, jax.grad(loss)(params, batch))

    return score


def one_sided(loss):
    """The change of the loss when a weight is taken away: not only first order."""

    def score(key, params, mask, batch):
        flat, rebuild = ravel_pytree(params)
        without = flat[None] * (1 - np.eye(flat.size))
        change = jax.vmap(lambda w: loss(rebuild(w), batch))(without) - loss(
            params, batch
        )
        return masks.tree_map(lambda _, c: abs(c), mask, rebuild(change))

    return score


@pytest.mark.parametrize("mutant", [slope_alone, one_sided], ids=label)
def test_finite_differences_catch(mutant):
    with pytest.raises(AssertionError):
        taylor_is_the_finite_difference(mutant)


def test_taylor_takes_the_gradient_at_the_masked_weights():
    """The dead are absent from the loss, whatever values they hold."""
    masked = masks.apply(MASK, PARAMS)
    filled = masks.tree_map(
        lambda m, w: np.where(m, w, np.float32(9)), MASK, PARAMS, hole=lambda x: x
    )
    score = jax.jit(ROWS["taylor"])
    alive = lambda s: masks.apply(MASK, s)
    got, want = score(KEY, filled, MASK, BATCH), score(KEY, masked, MASK, BATCH)
    close(alive(got), alive(want), rtol=0, atol=0)


# Gates: two branches and a skip add to one vertex, a further arc reads it.

GATES = {name: np.float32(0.5) for name in ("left", "right", "skip", "head")}


def forward(gates, x):
    arcs = {"left": jnp.tanh(x), "right": x**2, "skip": x}
    h = sum(gates[name] * value for name, value in arcs.items())
    return arcs, h


def gated_loss(gates, x):
    _, h = forward(gates, x)
    return jnp.sum(jnp.sin(gates["head"] * h))


def gates_are_scored_by_one_pass(gate):
    """`|<dloss/dh_v, f(h_u)>|` at open gates, and the loss is traced once."""
    traces = []

    def counted(gates, x):
        traces.append(1)
        return gated_loss(gates, x)

    x = batch_of(2)[0]
    mask = {"left": np.True_, "right": np.True_, "skip": np.False_, "head": np.True_}
    got = gate(counted)(KEY, GATES, mask, x)
    assert len(traces) == 1
    open_ = {name: np.float32(m) for name, m in mask.items()}
    arcs, h = forward(open_, x)
    slope = jax.grad(lambda h: jnp.sum(jnp.sin(h)))(h)  # dloss/dh_v; the head adds h
    want = {name: jnp.abs(jnp.sum(slope * value)) for name, value in arcs.items()}
    want["head"] = jnp.abs(jnp.sum(jnp.cos(h) * h))
    close(got, want)
    close(got, jax.tree.map(jnp.abs, jax.grad(gated_loss)(open_, x)))


def test_gate_is_the_inner_product_from_one_pass():
    gates_are_scored_by_one_pass(scores.gate)


def one_pass_per_gate(loss):
    def score(key, params, mask, batch):
        open_ = {name: jnp.float32(m) for name, m in mask.items()}
        alone = lambda name, g: loss(open_ | {name: g}, batch)
        slope = lambda n: jax.grad(functools.partial(alone, n))(open_[n])
        return {name: abs(slope(name)) for name in params}

    return score


def gates_as_they_are(loss):
    def score(key, params, mask, batch):
        grads = jax.grad(loss)(masks.apply(mask, params), batch)
        return jax.tree.map(jnp.abs, grads)

    return score


def closed_gates_opened(loss):
    def score(key, params, mask, batch):
        grads = jax.grad(loss)(jax.tree.map(jnp.ones_like, params), batch)
        return jax.tree.map(jnp.abs, grads)

    return score


FLAWED_GATES = [one_pass_per_gate, gates_as_they_are, closed_gates_opened]


@pytest.mark.parametrize("mutant", FLAWED_GATES, ids=label)
def test_one_pass_catches(mutant):
    with pytest.raises(AssertionError):
        gates_are_scored_by_one_pass(mutant)


TWO = {"a": np.ones((100, 100), bool), "b": None, "c": np.ones((100, 100), bool)}


def random_is_uniform(score):
    """In [0, 1), tenths equally full, leaves and keys independent, data ignored."""
    got = score(KEY, None, TWO, None)
    for draw in jax.tree.leaves(got):
        tenths, _ = np.histogram(draw, np.linspace(0, 1, 11))
        assert tenths.sum() == draw.size
        assert draw.max() < 1
        assert ((tenths - 1000) ** 2 / 1000).sum() < 33.7  # chi-square, 9 df, 1e-4
    others = [score(jax.random.key(1), None, TWO, None)["a"], got["c"]]
    for other in others:
        assert abs(np.corrcoef(np.ravel(got["a"]), np.ravel(other))[0, 1]) < 0.05
    close(score(KEY, TWO, TWO, BATCH), got, rtol=0, atol=0)


def test_random_is_uniform():
    random_is_uniform(jax.jit(scores.random))


def normal(key, params, mask, batch):
    draw = lambda m: abs(jax.random.normal(key, m.shape))
    return jax.tree.map(draw, mask)


def one_key_for_all(key, params, mask, batch):
    return jax.tree.map(lambda m: jax.random.uniform(key, m.shape), mask)


def no_key(key, params, mask, batch):
    return scores.random(KEY, params, mask, batch)


@pytest.mark.parametrize("mutant", [normal, one_key_for_all, no_key], ids=label)
def test_uniformity_catches(mutant):
    with pytest.raises(AssertionError):
        random_is_uniform(mutant)


def test_random_of_nothing_is_nothing():
    assert scores.random(KEY, {"a": np.ones(2)}, {"a": None}, None) == {"a": None}
