"""Law 17: a merge with an in-arc switched off is the merge without that arc.

The neutral element is 0 for a concatenation, 1 for a product, -inf for a maximum, a
dropped key for attention, an expert not routed to. Values and gradients stay finite,
also with every arc off, under grad and vmap.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.graph.core.merges import Port
from tests.graph import nets

SHAPE = (5, 4)  # tokens, features


def values(n, seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32) for _ in range(n)]


def ports(vs, on=None):
    on = [1.0] * len(vs) if on is None else on
    return tuple(Port(v * p, jnp.float32(p)) for v, p in zip(vs, on, strict=True))


def without(vs, on):
    return [v for v, p in zip(vs, on, strict=True) if p]


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(vs, causal=False):
    """In numpy, of a query and pairs of key and value; 0 with no pair left."""
    query, keys, memories = vs[0], vs[1::2], vs[2::2]
    if not keys:
        return np.zeros_like(query)
    logits = [query @ np.swapaxes(key, -1, -2) for key in keys]
    if causal:
        seen = np.tri(*logits[0].shape[-2:], dtype=bool)
        logits = [np.where(seen, one, -np.inf) for one in logits]
    logits = np.concatenate(logits, -1) / np.sqrt(query.shape[-1])
    return softmax(logits) @ np.concatenate(memories, -2)


ORACLES = {
    dj.Product(): lambda vs: np.prod(vs, 0) if vs else np.ones((2, *SHAPE)),
    dj.Max(): lambda vs: np.max(vs, 0) if vs else np.zeros((2, *SHAPE)),
    dj.Mean(): lambda vs: np.mean(vs, 0) if vs else np.zeros((2, *SHAPE)),
}


@pytest.mark.parametrize("merge", ORACLES, ids=lambda m: type(m).__name__)
def test_elementwise(merge):
    """All sets of four ports, against the merge of those that are on."""
    vs = values(4)
    for on in itertools.product([0.0, 1.0], repeat=4):
        got = merge(ports(vs, on))
        want = ORACLES[merge]([np.asarray(v) for v in without(vs, on)])
        assert nets.distance(got, np.asarray(want, np.float32)) <= 1e-6
        if any(on) and not all(on) and not isinstance(merge, dj.Mean):
            fed_zeros = merge(ports([v * p for v, p in zip(vs, on, strict=True)]))
            assert nets.violates(nets.distance(fed_zeros, got), "float32")  # mutant


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    """A dropped key is dropped with its value; the others share the weight."""
    merge, vs = dj.Attention(causal), values(7)
    for on in itertools.product([0.0, 1.0], repeat=3):
        gates = [1.0, *(p for p in on for _ in range(2))]
        kept = [np.asarray(v) for v in without(vs, gates)]
        got = merge(ports(vs, gates))
        assert nets.distance(got, attention(kept, causal).astype(np.float32)) <= 1e-5
        keys_only = [1.0, *(p for q in on for p in (q, 1.0))]
        assert nets.distance(merge(ports(vs, keys_only)), got) <= 1e-6
        if any(on) and not all(on):
            zeros = [v * p for v, p in zip(vs, gates, strict=True)]
            assert nets.violates(nets.distance(merge(ports(zeros)), got), "float32")


def test_experts():
    merge, (router,) = dj.Experts(), values(1, 3, (5, 4))
    vs = values(4, 4)
    for on in itertools.product([0.0, 1.0], repeat=4):
        got = merge((Port(router, jnp.float32(1)), *ports(vs, on)))
        kept = np.flatnonzero(on)
        weights = softmax(np.asarray(router)[..., kept]) if len(kept) else None
        want = sum(
            (weights[..., i, None] * np.asarray(vs[k]) for i, k in enumerate(kept)),
            np.zeros((2, *SHAPE), np.float32),
        )
        assert nets.distance(got, want) <= 1e-6
    off = Port(router * 0, jnp.float32(0))  # no router: all alike
    assert nets.distance(merge((off, *ports(vs))), sum(vs) / 4) <= 1e-6


def test_top_experts():
    """Only the best of those that are on, and as many as are asked for."""
    merge, (router,) = dj.Experts(top=2), values(1, 3, (5, 4))
    vs, on = values(4, 4), [1.0, 0.0, 1.0, 1.0]
    got = np.asarray(merge((Port(router, jnp.float32(1)), *ports(vs, on))))
    logits = np.where(np.array(on) > 0, np.asarray(router), -np.inf)
    best = np.argsort(-logits, -1)[..., :2]
    weights = softmax(np.take_along_axis(logits, best, -1))
    stack = np.stack([np.asarray(v) for v in vs], -2)
    chosen = np.take_along_axis(stack, best[..., None], -2)
    assert nets.distance(got, (weights[..., None] * chosen).sum(-2)) <= 1e-6


def test_concatenation_feeds_zeros():
    vs = values(3)
    got = dj.Concat()(ports(vs, [1.0, 0.0, 1.0]))
    assert nets.same(got, jnp.concatenate([vs[0], vs[1] * 0, vs[2]], -1))


MERGES = {
    "product": (dj.Product(), 3),
    "max": (dj.Max(), 3),
    "mean": (dj.Mean(), 3),
    "concat": (dj.Concat(), 3),
    "attention": (dj.Attention(), 5),
    "causal": (dj.Attention(True), 3),
    "experts": (dj.Experts(), 5),
    "top": (dj.Experts(top=2), 5),
}


def network(merge, n):
    parts = [nn.Dense(4, name=f"arm{i}") for i in range(n)]
    return nets.build(dj.series(dj.merge(merge, *parts), nn.Dense(3)), (SHAPE,))


@pytest.mark.parametrize("name", MERGES)
def test_networks(name):
    """Gate 0, deletion and the network written without the arc are one."""
    merge, n = MERGES[name]
    case = network(merge, n)
    for arc in case.dag.graph.arcs_into("n1"):
        gated = case.dag(*case.xs, gates={arc.name: 0.0})
        deleted = dj.delete(case.dag, arc.name)
        assert nets.distance(deleted(*case.xs), gated) <= 1e-6
        assert nets.violates(nets.distance(gated, case.dag(*case.xs)), "float32")
        b = dj.inject(deleted, *case.xs)
        h = dj.compose(dj.factors(deleted))(b)
        assert nets.distance(h["out"], gated) <= 1e-6
        back = dj.inverse(dj.factors(deleted))(h)
        assert nets.distance(back, b, scale=h) <= 1e-5


@pytest.mark.parametrize("name", MERGES)
def test_gradients_are_finite_for_all_gates(name):
    """By gates, parameters and input; all on, each off, all off, halves; vmapped."""
    merge, n = MERGES[name]
    case = network(merge, n)
    arms = [arc.name for arc in case.dag.graph.arcs_into("n1")]
    rows = [np.ones(n), np.zeros(n), np.full(n, 0.5), *(1 - np.eye(n))]
    gates = jnp.asarray(np.stack(rows), jnp.float32)

    def loss(row, params, x):
        on = dict(zip(arms, row, strict=True))
        return jnp.sum(case.dag.replace(params=params)(x, gates=on) ** 2)

    at, step = (case.dag.params, case.xs[0]), 1e-2
    over_gates = lambda f: jax.jit(jax.vmap(f, (0, None, None)))
    many = over_gates(jax.grad(loss, argnums=(0, 1, 2)))(gates, *at)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(many))
    at_one = [np.ones(n) + s * row for row in np.eye(n) for s in (step, -step)]
    up_down = np.asarray(over_gates(loss)(np.float32(at_one), *at))
    slopes = (up_down[::2] - up_down[1::2]) / (2 * step)
    assert nets.distance(many[0][0], slopes) <= 2e-2


def test_partial_presence_weighs():
    """Presence p of a key or an expert is a factor p of its weight."""
    vs = values(5)
    half = ports(vs, [1.0, 1.0, 1.0, 1.0, 1.0])
    half = (*half[:3], half[3]._replace(presence=jnp.float32(0.5)), half[4])
    query, k1, v1, k2, v2 = map(np.asarray, vs)
    logits = np.concatenate([query @ k.swapaxes(-1, -2) for k in (k1, k2)], -1) / 2
    e = np.exp(logits) * np.repeat([1.0, 0.5], 5)
    want = e / e.sum(-1, keepdims=True) @ np.concatenate([v1, v2], -2)
    assert nets.distance(dj.Attention()(half), want) <= 1e-5


def test_errors(key):
    x = jnp.ones((1, *SHAPE))
    arms = [nn.Dense(4, name=f"arm{i}") for i in range(4)]
    with pytest.raises(dj.GraphError, match=r"3, 5, \.\.\. ports; got 4"):
        dj.init(key, dj.merge(dj.Attention(), *arms), x)
    with pytest.raises(dj.GraphError, match="weighs 4 experts, 3 ports follow"):
        dj.init(key, dj.merge(dj.Experts(), *arms), x)
    odd = [*arms[:2], nn.Dense(3, name="odd")]
    with pytest.raises(dj.GraphError, match=r"odd delivers float32\[1, 5, 3\]"):
        dj.init(key, dj.merge(dj.Max(), *odd), x)
