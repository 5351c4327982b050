"""Kinds of programs that were cut wrongly, or not at all, by the function's own values.

Each case is a function of parameters and data, and what is masked; the right value is
the function itself with zeros where the mask is False.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dagjax as dj
from dagjax.compaction.channels import coupling, traced_network
from dagjax.compaction.removal.facts import Table


class Kind(NamedTuple):
    """A function, its parameters' shapes, its input, and the masked entries."""

    fn: Any
    shapes: dict[str, Any]
    x: tuple[int, ...]
    off: dict[str, Any]

    @property
    def params(self):
        rng = np.random.default_rng(0)
        fill = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)
        return {
            k: fill(s) if isinstance(s, tuple) else s for k, s in self.shapes.items()
        }

    @property
    def mask(self):
        mask = {k: np.ones(v.shape, bool) for k, v in self.params.items()}
        for name, index in self.off.items():
            mask[name][index] = False
        return mask

    def inputs(self, batch=2):
        rng = np.random.default_rng(batch)
        return jnp.asarray(rng.normal(size=(batch, *self.x)), jnp.float32)


def cut(kind, mask=None, **options):
    mask = kind.mask if mask is None else mask
    net = dj.trace(kind.fn, kind.params, kind.inputs())
    return dj.compact(net, mask, verify=False, **options)


def want(kind, x):
    masked = {k: jnp.where(kind.mask[k], v, 0) for k, v in kind.params.items()}
    return kind.fn(masked, x)


def centred(h):
    return h - h.mean(-1, keepdims=True)


def layers(p, h):
    step = lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None)
    return lax.scan(step, h, (p["w"], p["b"]))[0] @ p["o"]


def whole_rows(h):
    """Row 0 and row 9, which is none: the primitive's own filling."""
    numbers = lax.GatherDimensionNumbers((0, 2), (1,), (1,))
    size, at = (h.shape[0], 1, h.shape[2]), jnp.array([[0], [9]])
    return lax.gather(h, at, numbers, size, mode="fill").astype(jnp.float32).sum(1)


@jax.custom_jvp
def averaged(h):
    return h / (1 + jnp.abs(h).sum(-1, keepdims=True))


@averaged.defjvp
def _averaged(h, t):
    return averaged(*h), t[0] / 2 + t[0].mean(-1, keepdims=True)


@jax.custom_vjp
def smeared(h):
    return jnp.tanh(h)


smeared.defvjp(
    lambda h: (smeared(h), None), lambda _, g: (g + g.mean(-1, keepdims=True),)
)


@jax.custom_jvp
def beside(h, unread):
    return 1.0 * h


@beside.defjvp
def _beside(h, t):
    return beside(*h), t[0] + t[1]


@jax.custom_vjp
def gated(h):
    return h * jnp.array([1.0, 0.0, 1.0, 0.0])


gated.defvjp(lambda h: (gated(h), None), lambda _, g: (g,))


@jax.custom_vjp
def switched_off(h):
    return 0.0 * h


switched_off.defvjp(lambda h: (switched_off(h), None), lambda _, g: (g,))

COLUMN, ROW, ALL = (..., 0), (0,), ...
EXACT = {
    "folded over two contracted axes": Kind(
        lambda p, x: jnp.tensordot(jax.nn.sigmoid(x @ p["w"]), p["o"], 2),
        {"w": (3, 4), "o": (5, 4, 2)}, (5, 3), {"w": COLUMN},
    ),
    "padded along two axes": Kind(
        lambda p, x: jnp.pad(
            x @ p["w"], ((0, 0), (2, 0), (1, 0)), constant_values=3.0
        ).sum(1) @ p["o"],
        {"w": (3, 4), "o": (5, 2)}, (4, 3), {"w": COLUMN},
    ),
    "reshaped in another order": Kind(
        lambda p, x: lax.reshape(jnp.tanh(x @ p["w"]), (x.shape[0], 20), (0, 2, 1))
        @ p["o"],
        {"w": (3, 4), "o": (20, 2)}, (5, 3), {"w": COLUMN},
    ),
    "barrier of several values": Kind(
        lambda p, x: lax.optimization_barrier((x @ p["w"], x))[0] @ p["o"],
        {"w": (3, 4), "o": (4, 2)}, (3,), {"w": COLUMN},
    ),
    "a bias off inside a scan": Kind(
        layers, {"w": (3, 4, 4), "b": (3, 4), "o": (4, 2)}, (4,), {"b": ALL},
    ),
    "a kernel off inside a scan": Kind(
        layers, {"w": (3, 4, 4), "b": (3, 4), "o": (4, 2)}, (4,), {"w": ALL},
    ),
    "a bias off inside a loop": Kind(
        lambda p, x: lax.fori_loop(
            0, 3, lambda i, h: jnp.tanh(h @ p["w"] + p["b"]), x
        ) @ p["o"],
        {"w": (4, 4), "b": (4,), "o": (4, 2)}, (4,), {"b": ALL},
    ),
    "a bias off in a rematerialized call": Kind(
        lambda p, x: jax.checkpoint(lambda t: jnp.tanh(t @ p["w"] + p["b"]))(x)
        @ p["o"],
        {"w": (3, 4), "b": (4,), "o": (4, 2)}, (3,), {"b": ALL},
    ),
    "one of two weights off that are added": Kind(
        lambda p, x: jnp.tanh(x @ (p["w"] + p["d"])) @ p["o"],
        {"w": (3, 4), "d": (3, 4), "o": (4, 2)}, (3,), {"d": ALL},
    ),
    "a centred value against a number": Kind(
        lambda p, x: jnp.maximum(centred(x @ p["w"]), 0.5).sum(-1),
        {"w": (3, 6)}, (3,), {"w": COLUMN},
    ),
    "a function applied to a row": Kind(
        lambda p, x: (x @ p["w"]).at[0].apply(jnp.cos) @ p["o"],
        {"w": (3, 4), "o": (4, 2)}, (3,), {"w": COLUMN},
    ),
    "rows out of range, and their NaN replaced": Kind(
        lambda p, x: (
            jnp.nan_to_num(jnp.take(x @ p["w"], jnp.array([0, 9]), axis=1), nan=7.0)
            .sum(1) @ p["o"]
        ),
        {"w": (3, 4), "o": (4, 2)}, (5, 3), {"w": COLUMN},
    ),
    "rows of integers out of range": Kind(
        lambda p, x: whole_rows(jnp.round(4 * x @ p["w"]).astype(jnp.int32)) @ p["o"],
        {"w": (3, 4), "o": (4, 2)}, (5, 3), {"w": COLUMN},
    ),
    "a loop that depends on data beside a constant": Kind(
        lambda p, x: (
            jnp.tanh(x @ p["w"] + p["b"])
            * lax.while_loop(lambda s: s.sum() > 1, lambda s: s / 2, jnp.abs(x[:, :1]))
        ) @ p["o"],
        {"w": (3, 4), "b": (4,), "o": (4, 2)}, (3,), {"w": COLUMN},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_values_are_those_of_the_masked_function(name):
    kind = EXACT[name]
    small = cut(kind).net
    for batch in (2, 3):
        x = kind.inputs(batch)
        y = want(kind, x)
        np.testing.assert_allclose(small(x), y, rtol=1e-4, atol=1e-5)


# What training could still change: products and sums of parameters that no data meets.
TRAINED = {
    "merged LoRA": Kind(
        lambda p, x: jax.nn.relu(x @ (p["w"] + p["a"] @ p["b"])) @ p["o"],
        {"w": (8, 6), "a": (8, 4), "b": (4, 6), "o": (6, 3)}, (8,), {},
    ),
    "low rank": Kind(
        lambda p, x: x @ (p["u"] @ p["v"]), {"u": (4, 2), "v": (2, 3)}, (4,), {}
    ),
    "learned queries": Kind(
        lambda p, x: jax.nn.softmax((p["q"] @ p["w"]) @ (x @ p["k"]).mT) @ x,
        {"q": (2, 5), "w": (5, 4), "k": (3, 4)}, (6, 3), {},
    ),
    "a network of positions": Kind(
        lambda p, x: x + jax.nn.relu(jnp.linspace(-1, 1, 4)[:, None] @ p["w"]) @ p["o"],
        {"w": (1, 5), "o": (5, 3)}, (4, 3), {},
    ),
    "Tucker core": Kind(
        lambda p, x: jnp.einsum("bi,ir,rs,so->bo", x, p["u"], p["g"], p["v"]),
        {"u": (4, 2), "g": (2, 3), "v": (3, 5)}, (4,), {},
    ),
    "gates of zero": Kind(
        lambda p, x: x + p["g"] * (jax.nn.relu(x @ p["w"] + p["b"]) @ p["o"]),
        {"w": (3, 4), "b": (4,), "o": (4, 3), "g": jnp.zeros(3)}, (3,), {"b": ROW},
    ),
    "a bias behind a zero of the program": Kind(
        lambda p, x: jnp.square(0.0 * x[:, :1] + p["b"]) @ p["o"],
        {"b": (5,), "o": (5, 2)}, (3,), {},
    ),
    "a head of zeros": Kind(
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["o"],
        {"w": (3, 4), "o": jnp.zeros((4, 2))}, (3,), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_what_may_be_trained_stays(name):
    kind = TRAINED[name]
    small = cut(kind).net
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, kind.params)
    np.testing.assert_allclose(
        small(kind.inputs()), want(kind, kind.inputs()), rtol=1e-4, atol=1e-6
    )


TWO = {"w": (3, 4), "o": (4, 2)}
# Rules that are no derivative of what they belong to; the gradient is theirs.
RULES = {
    "a tangent averaged over channels": Kind(
        lambda p, x: averaged(x @ p["w"]) @ p["o"], TWO, (3,), {"w": COLUMN}
    ),
    "a gradient averaged over channels": Kind(
        lambda p, x: smeared(x @ p["w"]) @ p["o"], TWO, (3,), {"w": COLUMN}
    ),
    "an operand of the rule alone": Kind(
        lambda p, x: beside(x @ p["w"], x @ p["v"]) @ p["o"],
        {"w": (3, 4), "v": (3, 4), "o": (4, 2)}, (3,), {"w": COLUMN},
    ),
    "channels off in the value alone": Kind(
        lambda p, x: gated(x @ p["w"]) @ p["o"], TWO, (3,), {}
    ),
    "all off in the value alone": Kind(
        lambda p, x: (x + switched_off(x @ p["w"] @ p["o"])) ** 2,
        {"w": (3, 4), "o": (4, 3)}, (3,), {},
    ),
    "swish of softplus": Kind(
        lambda p, x: ((h := x @ p["w"]) * jax.nn.softplus(h)) @ p["o"],
        TWO, (3,), {"w": COLUMN},
    ),
    "rectifier": Kind(
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["o"], TWO, (3,), {"w": COLUMN}
    ),
}  # fmt: skip


def gradient_error(kind):
    """Of what is left; what is gone must have none."""
    x, slope = kind.inputs(), lambda f: jax.grad(lambda p: (f(p) ** 2).sum())
    masked = {k: jnp.where(kind.mask[k], v, 0) for k, v in kind.params.items()}
    result = cut(kind)
    got = slope(lambda p: result.net.replace(params=p)(x))(result.net.params)
    whole = slope(lambda p: kind.fn(p, x))(masked)
    left = result.index.scatter(got)
    off = [np.abs(np.where(kind.mask[k], whole[k] - left[k], 0)).max() for k in left]
    return max(off)


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_those_of_the_rule(name):
    assert gradient_error(RULES[name]) <= 1e-5


@pytest.mark.parametrize("name", ["rectifier", "swish of softplus"])
def test_a_rule_that_is_the_derivative_lets_units_go(name):
    """The rule of softplus sums over channels, for the number 0 that it is against."""
    assert cut(RULES[name]).net.params["w"].shape == (3, 3)


@pytest.mark.parametrize("name", [*[*RULES][:3], "all off in the value alone"])
def test_mutant_that_trusts_every_rule(monkeypatch, name):
    monkeypatch.setattr(coupling, "has_rule", lambda equation: False)
    fresh = traced_network._traced.__wrapped__  # not what the test above has traced
    monkeypatch.setattr(traced_network, "_traced", fresh)
    with pytest.raises((AssertionError, TypeError)):
        assert gradient_error(RULES[name]) <= 1e-5


@pytest.mark.parametrize("name", ["merged LoRA", "learned queries"])
def test_mutant_that_freezes_what_is_trained(monkeypatch, name):
    monkeypatch.setattr(Table, "may_freeze", lambda self, *facts: facts[0] == facts[0])
    small = cut(TRAINED[name]).net
    assert small.folded_entries


def test_a_kept_bias_of_a_unit_without_inputs_is_a_constant_and_reported():
    kind = Kind(
        lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["o"],
        {"w": (3, 4), "b": (4,), "o": (4, 2)}, (3,), {"w": COLUMN},
    )  # fmt: skip
    small = cut(kind).net
    assert small.folded_entries == {"b": 1, "o": 2}
    assert "3 kept entries folded" in repr(small)


def test_an_untied_kernel_loses_rows_where_a_constant_is_folded():
    """Positions of the kernel alone, and channels that a bias makes constant."""
    shapes = {"w": (3, 4), "b": (4,), "o": (5, 4, 2)}
    fn = lambda p, x: jnp.tensordot(jnp.tanh(x @ p["w"] + p["b"]), p["o"], 2)
    kind = Kind(fn, shapes, (5, 3), {"w": (..., 0), "o": (1,)})
    small = cut(kind, coupled=False).net
    assert small.params["o"].shape == (4, 3, 2)
    x = kind.inputs()
    np.testing.assert_allclose(small(x), want(kind, x), rtol=1e-4, atol=1e-5)


SHAPED = {
    "channels by batch size": lambda p, x: (x @ p["w"])[:, : x.shape[0]].sum(1),
    "constants by batch size": lambda p, x: (
        jnp.tanh(x @ p["w"] + p["b"]) / x.shape[0] @ p["o"]
    ),
    "parameters by batch size": lambda p, x: (
        x @ p["w"] if x.shape[0] < 3 else x @ p["w"] * p["b"]
    ),
}


@pytest.mark.parametrize("name", SHAPED)
def test_another_batch_size_is_right_or_refused(name):
    shapes = {"w": (3, 6), "b": (6,), "o": (6, 2)}
    kind = Kind(SHAPED[name], shapes, (3,), {"w": COLUMN})
    with pytest.warns(dj.TraceWarning) if "constants" not in name else nullcontext():
        small = cut(kind).net
    np.testing.assert_allclose(
        small(kind.inputs()), want(kind, kind.inputs()), rtol=1e-4
    )
    with pytest.raises(ValueError, match=r"shapes|batch size"):
        small(kind.inputs(4))
