"""Units are what compact removes: no more is listed, no less is said to be saved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.pruning.scores import unit_scores
from dagjax.jaxprs.messages import TraceWarning


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params_of(**shapes):
    return {name: draw(*s, seed=i) for i, (name, s) in enumerate(shapes.items())}


def normed(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def sinusoids():
    """A constant writes the channels of `e` as well."""
    signal = np.sin(np.arange(5)[:, None] * np.arange(8.0) / 3).astype(np.float32)
    fn = lambda p, x: nn.relu(normed(x @ p["e"] + signal) @ p["w"]) @ p["o"]
    return dj.trace(fn, params_of(e=(3, 8), w=(8, 6), o=(6, 2)), draw(2, 5, 3))


def lora():
    """A frozen base writes the channels of `b`; the rank between a and b is free."""
    base = draw(3, 6, seed=7)
    fn = lambda p, x: normed(x @ (base + p["a"] @ p["b"])) @ p["o"]
    return dj.trace(fn, params_of(a=(3, 4), b=(4, 6), o=(6, 2)), draw(2, 3))


def registers():
    """Tokens that are not trained have the channels of `e` as well."""
    tokens = draw(2, 8, seed=5)

    def fn(p, x):
        first = jnp.broadcast_to(tokens, (x.shape[0], 2, 8))
        h = jnp.concatenate([first, x @ p["e"]], 1)
        return nn.relu(normed(h) @ p["w"]) @ p["o"]

    return dj.trace(fn, params_of(e=(3, 8), w=(8, 6), o=(6, 2)), draw(2, 5, 3))


def grouped_queries():
    """Four heads of queries, two of keys and values."""
    shapes = {"wq": (16, 4, 3), "wk": (16, 2, 3), "wv": (16, 2, 3), "wo": (4, 3, 16)}

    def fn(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in ("wq", "wk", "wv"))
        q = q.reshape(*q.shape[:2], 2, 2, 3)
        scores = jax.nn.softmax(jnp.einsum("bqgrk,bsgk->bgrqs", q, k))
        out = jnp.einsum("bgrqs,bsgk->bqgrk", scores, v).reshape(*x.shape[:2], 4, 3)
        return jnp.einsum("bthk,hkd->btd", out, p["wo"])

    return dj.trace(fn, params_of(**shapes), draw(2, 5, 16))


def residual():
    """The stem's units lie in both axes of a kernel."""
    block = dj.block(nn.Dense(6, name="a"), nn.softplus, nn.Dense(6, name="b"))
    graph = dj.series(nn.Dense(6), dj.parallel(dj.identity, block), nn.Dense(2))
    return dj.init(jax.random.key(0), graph, draw(2, 5))


def one_reader():
    """Only the arc of `o` reads the two layers before it: they go with it."""

    def fn(p, x):
        h = x @ p["e"]
        return (nn.relu(h @ p["w"]) + h @ p["w"]) @ p["o"] + x @ p["s"]

    shapes = params_of(e=(3, 8), w=(8, 8), o=(8, 2), s=(3, 2))
    return dj.trace(fn, shapes, draw(2, 3))


def unread():
    """Nothing reads `z`, nor the last three rows of `w`."""
    fn = lambda p, x: nn.relu(x @ p["a"]) @ p["w"][:8]
    with pytest.warns(TraceWarning, match="does not use the parameters z"):
        return dj.trace(fn, params_of(a=(3, 8), w=(11, 2), z=(5, 7)), draw(2, 3))


def zeros_by_shape():
    """Rows of `o` that meet nothing but padding go without any mask."""

    def fn(p, x):
        h = jnp.pad(jnp.einsum("btc,cd->btd", x, p["w"]), ((0, 0), (1, 2), (0, 0)))
        return h.reshape(x.shape[0], -1) @ p["o"]

    return dj.trace(fn, params_of(w=(3, 4), o=(20, 2)), draw(3, 2, 3))


NETS = {
    f.__name__: f
    for f in (
        sinusoids, lora, registers, grouped_queries, residual, one_reader, unread,
        zeros_by_shape,
    )
}  # fmt: skip


@pytest.fixture(scope="module", params=NETS)
def net(request):
    return NETS[request.param]()


def sizes(net):
    return sum(map(np.size, jax.tree.leaves(net.params)))


def flops(net):
    return dj.cost(net, latency=False)[""].flops


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def test_members_mask_and_saving_are_what_compact_removes(net):
    found = dj.units(net)
    nothing = jax.tree.map(lambda p: np.ones(p.shape, bool), net.params)
    whole = dj.compact(net, nothing, verify=False).net  # without what is unread
    for name, group in found.channels.items():
        for unit in (0, group.size - 1):
            kept = {name: np.arange(group.size) != unit}
            mask = found.mask(kept)
            small = dj.compact(net, mask).net
            want = {path: np.ones(m.shape, bool) for path, m in named(mask).items()}
            for path, axis, indices in group.members:
                want[path][(slice(None),) * axis + (indices[unit],)] = False
            for path, leaf in named(mask).items():
                assert np.array_equal(leaf, want[path]), path
            for path, axis, indices in group.members:
                before, after = (named(n.params)[path].shape for n in (whole, small))
                assert before[axis] - after[axis] == len(indices[unit]), path
            assert sizes(whole) - sizes(small) == group.params[unit]
            assert flops(whole) - flops(small) == group.flops[unit]
            assert found.cost(kept) == (flops(small), sizes(small))


def test_what_a_constant_writes_is_no_unit():
    """Without its parameters the channel still holds a signal that a norm reads."""

    def members(net):
        return {(m.path, m.axis) for g in dj.units(net).values() for m in g.members}

    assert members(sinusoids()) == {("w", 1), ("o", 0)}
    assert members(registers()) == {("w", 1), ("o", 0)}
    assert members(lora()) == {("a", 1), ("b", 0)}


def test_explain_says_what_else_writes_a_channel():
    said = {(a.path, a.axis): a.reason for a in dj.explain(sinusoids()).axes}
    assert said["e", 1] == said["w", 0] == "a constant or a state, which writes it too"
    assert said["w", 1] == said["o", 0] == ""
    assert "72 pinned by a constant or a state" in repr(dj.explain(sinusoids()))
    said = {(a.path, a.axis): a.reason for a in dj.explain(unread()).axes}
    assert said["z", 0] == said["z", 1] == "nothing reads it, so it goes without a mask"


def test_a_key_and_value_head_takes_its_queries():
    net = grouped_queries()
    (heads,) = (g for g in dj.units(net).values() if len(g.members) == 4)
    assert heads.params.tolist() == [2 * (16 * 2 * 3) + 2 * (16 * 3)] * 2
    q, k, v, o = (np.abs(net.params[n]) for n in ("wq", "wk", "wv", "wo"))
    want = [
        q[:, 2 * g : 2 * g + 2].sum() + k[:, g].sum() + v[:, g].sum()
        + o[2 * g : 2 * g + 2].sum()
        for g in range(2)
    ]  # fmt: skip
    got = unit_scores(net, "l1", normalize="none")[heads.name]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_products_of_products_go_with_a_factor():
    def fn(p, x):
        a, b, c = (x @ p[name] for name in "abc")
        return jnp.einsum("ni,nj,nk->nijk", a, b, c).reshape(len(x), -1) @ p["o"]

    shapes = {"a": (3, 2), "b": (3, 3), "c": (3, 4), "o": (24, 2)}
    found = dj.units(dj.trace(fn, params_of(**shapes), draw(2, 3)))
    for name, size in {"a": 2, "b": 3, "c": 4}.items():
        assert found[name].params.tolist() == [3 + 2 * 24 / size] * size


def test_unread_parameters_are_no_units():
    found = dj.units(unread())
    members = [m for g in found.values() for m in g.members]
    assert {m.path: len(m.indices) for m in members} == {"a": 8, "w": 8}
    assert found.total == (2 * 2 * (3 * 8 + 8 * 2), 24 + 22 + 35)
    assert found.cost({})[1] == 24 + 16


def test_an_arc_takes_what_only_it_reads():
    net = one_reader()
    found = dj.units(net)
    kept = {"arcs": np.array([a != "o" for a in found["arcs"].classes])}
    assert found.cost(kept) == (2 * 2 * 3 * 2, 6)
    small = dj.compact(net, found.mask(kept)).net
    assert (flops(small), sizes(small)) == found.cost(kept)


def test_a_constant_that_only_an_arc_reads_is_no_parameter():
    base = draw(3, 8, seed=7)
    fn = lambda p, x: jnp.tanh(x @ base) @ p["o"] + x @ p["s"]
    net = dj.trace(fn, params_of(o=(8, 2), s=(3, 2)), draw(2, 3))
    found = dj.units(net)
    kept = {"arcs": np.array([a != "o" for a in found["arcs"].classes])}
    assert found.cost(kept) == (2 * 2 * 3 * 2, 6)
    mask = dj.prune_units(net, {"o": 0.0, "s": 1.0}, params=0.3)
    assert not mask["o"].any()


@pytest.mark.parametrize("budget", ["flops", "params"])
def test_budgets_are_those_of_the_compacted_network(net, budget):
    """At most one step of units above, or refused with what can be removed."""
    measure = {"flops": flops, "params": sizes}[budget]
    step = max(getattr(g, budget).max() for g in dj.units(net).values())
    found = dj.units(net)
    one = {name: np.arange(g.size) < 1 for name, g in found.channels.items()}
    least = found.cost(one)[("flops", "params").index(budget)]
    for share in (0.8, 0.5, 0.3):
        if "arcs" not in found and least > share * measure(net) + step:
            with pytest.raises(dj.CompactionError, match="cannot be met: at most"):
                dj.prune_units(net, **{budget: share})
            continue
        mask = dj.prune_units(net, **{budget: share})
        small = dj.compact(net, mask, verify=False).net
        assert measure(small) <= share * measure(net) + step


def test_a_budget_that_cannot_be_met_is_refused():
    """Of the operations those of `e` and of one unit of `w` and `o` stay."""
    net = sinusoids()
    assert flops(net) == 2 * 10 * (3 * 8 + 8 * 6 + 6 * 2)
    most = 1 - (3 * 8 + 8 + 2) / (3 * 8 + 8 * 6 + 6 * 2)
    with pytest.raises(dj.CompactionError, match=f"at most {most:.3f} of it"):
        dj.prune_units(net, flops=0.2)
    with pytest.raises(dj.CompactionError, match=r"at most 0\.500 of it"):
        dj.prune_units(net, density=0.1, keep_at_least=3)


def test_a_network_without_products_has_no_budget_of_operations():
    def fn(p, x):
        i = jnp.arange(2)
        return jnp.tanh(x.sum() * p["a"][:, i]).sum(0)

    net = dj.trace(fn, {"a": draw(3, 8)}, draw(2, 3))
    message = "no operations|nothing of this network"
    with pytest.raises(dj.CompactionError, match=message):
        dj.prune_units(net, flops=0.5)
