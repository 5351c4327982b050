"""The check after a cut: it knows rounding from a wrong cut, in any type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dagjax as dj
from dagjax.compaction.removal import compact
from dagjax.compaction.removal.compacted import Small
from dagjax.compaction.removal.rounding import close, differing, runs_of
from dagjax.jaxprs.program import program_of
from tests.compaction.nets import filled, normal
from tests.sweeps import seldom

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = {"w": (3, 64), "b": (64,), "o": (64, 4)}


def hidden(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"])


def centred(p, x):
    """Zero but for rounding, and so are its gradients."""
    y = hidden(p, x) @ p["o"]
    return (y - y.mean(-1, keepdims=True)).sum(-1)


def half_inside(p, x):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
    y = hidden(half, x.astype(jnp.bfloat16)) @ half["o"]
    return jax.nn.log_softmax(y.astype(jnp.float32))


def normalized(p, x):
    """The size of `o` changes nothing: the gradient along it is rounding."""
    y = hidden(p, x) @ p["o"]
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


def complex_valued(p, x):
    h = hidden(p, x)
    return lax.complex(h @ p["o"], h @ jnp.sin(p["o"]))


def chosen(p, x):
    return jnp.argmax(hidden(p, x) @ p["o"], -1), hidden(p, x).sum(-1)


def deep(p, x):
    h = hidden(p, x)
    for _ in range(60):
        h = 0.99 * h + 0.02 * jnp.cos(h)
    return h @ p["o"]


CASES = [centred, half_inside, normalized, complex_valued, chosen, deep]


def cut(fn):
    """A network whose second half of hidden units is masked, and the mask."""
    params, x = filled(SHAPES), normal(5, 3)
    on = np.arange(64) < 32
    mask = {
        "w": np.tile(on, (3, 1)), "b": on.copy(), "o": np.tile(on[:, None], (1, 4)),
    }  # fmt: skip
    return dj.trace(fn, params, x), mask


@pytest.mark.parametrize("fn", CASES)
def test_rounding_is_no_alarm(fn):
    dag, mask = cut(fn)
    small = dj.compact(dag, mask, verify="gradients").net
    assert small.params["w"].shape == (3, 32)


@pytest.mark.parametrize("fn", seldom(CASES[1:], [deep]))
def test_a_wrong_cut_is_caught(fn, monkeypatch):
    """The kept biases are off, by little where the types let one see little."""
    dag, mask = cut(fn)
    factor = 3.0 if fn is half_inside else 1.01
    gathered = compact._left

    def wrong(x, m, keep):
        part = gathered(x, m, keep)
        return factor * part if part.ndim == 1 else part

    monkeypatch.setattr(compact, "_left", wrong)
    with pytest.raises(dj.CompactionError, match="differs from the masked one"):
        dj.compact(dag, mask)


@pytest.mark.parametrize("fn", seldom([half_inside, complex_valued, deep], [deep]))
def test_a_lost_gradient_is_caught(fn, monkeypatch):
    dag, mask = cut(fn)
    call = Small.__call__
    lost = lambda small, *xs: call(
        small.replace(
            params=small.params | {"b": lax.stop_gradient(small.params["b"])}
        ),
        *xs,
    )
    monkeypatch.setattr(Small, "__call__", lost)
    dj.compact(dag, mask)
    with pytest.raises(dj.CompactionError, match=r"gradient of .*b"):
        dj.compact(dag, mask, verify="gradients")


def test_an_imaginary_part_is_compared():
    one = jnp.asarray([1 + 1j, 2 - 1j])
    assert close(one, one)
    assert not close(one, one.real + 1.001j * one.imag)


def test_runs_differ_by_rounding_alone():
    """Their spread is that of sums in other orders: neither nothing nor much more."""
    x = normal(64, 64)
    fn = lambda x: [(x @ x).sum(), x.sum() - x.T.sum()]
    program = program_of(jax.make_jaxpr(fn)(x))
    runs = runs_of(program, [x])
    exact = fn(np.asarray(x, np.float64))
    for i, scale in ((0, np.abs(x @ x).sum()), (1, np.abs(x).sum())):
        spread = max(abs(float(run[i]) - exact[i]) for run in runs)
        assert 1e-9 < spread / float(scale) < 1e-6
    assert not differing(
        fn(x), [v + 1e-6 * np.abs(v).max() for v in exact], lambda: runs
    )
    assert differing(fn(x), [v + 1e-2 for v in exact], lambda: runs) == [0, 1]


@pytest.mark.parametrize("granularity", ["layers", "primitives"])
def test_a_key_for_each_example(granularity):
    def noisy(p, x, keys):
        x += jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return hidden(p, x) @ p["o"]

    _, mask = cut(deep)
    keys = jax.random.split(jax.random.key(0), 5)
    dag = dj.trace(noisy, filled(SHAPES), normal(5, 3), keys, granularity=granularity)
    assert dj.compact(dag, mask).net.params["w"].shape == (3, 32)


def test_a_norm_of_zeros_names_the_parameter():
    def weight_normed(p, x):
        v = p["v"] / jnp.linalg.norm(p["v"], axis=0)
        return jnp.tanh(x @ p["w"]) @ v @ p["o"]

    params = filled({"w": (3, 6), "v": (6, 5), "o": (5, 2)})
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    mask["v"][:, 1] = mask["o"][1] = False
    dag = dj.trace(weight_normed, params, normal(2, 3))
    with pytest.raises(dj.CompactionError, match="a norm of zeros in v"):
        dj.compact(dag, mask)
