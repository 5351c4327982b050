"""What several arcs, merges or the new state need is evaluated once in a call."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dagjax as dj
from dagjax.jaxprs.program import program_of
from tests.graph import nets
from tests.sweeps import mostly

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = {"q": (3, 4, 4), "k": (3, 4, 4), "u": (3, 4, 8), "d": (3, 8, 4)}


def layer(h, w):
    """Keys are returned beside the next layer's input, as for a cache."""
    k = h @ w["k"]
    h = h + jax.nn.softmax(h @ w["q"] @ k.swapaxes(-1, -2)) @ h
    return h + jax.nn.relu(h @ w["u"]) @ w["d"], (k, k.sum(-1))


def from_one_node(p, x):
    h, (k, total) = lax.scan(layer, x, p)
    return {"h": h, "k": k, "total": total}


def from_two_nodes(p, x, cache):
    step = lambda h, w: layer(h + w[1], w[0])
    h, (k, total) = lax.scan(step, x, (p, cache))
    return {"h": h, "k": k, "total": total}


def from_a_merge_read_twice(p, x, cache):
    h = from_two_nodes(p, x, cache)["h"]
    return jnp.tanh(h @ p["q"][0]) * 2, jnp.sin(h @ p["k"][0])


def from_work_on_the_way(p, x, cache):
    return from_two_nodes(p, jax.nn.relu(x @ p["q"][0]), cache)


def loops(net, *xs):
    """How many loops a call of a network holds."""
    program = program_of(jax.make_jaxpr(lambda net, *xs: net(*xs))(net, *xs))
    return sum(equation.name == "scan" for equation in program.walk())


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [0.5 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.fixture(scope="module")
def params():
    return dict(zip(SHAPES, arrays(*SHAPES.values()), strict=True))


CASES = [
    from_one_node, from_two_nodes, from_a_merge_read_twice, from_work_on_the_way,
]  # fmt: skip


LEVELS = ("layers", "blocks", "primitives")
OFTEN = [*zip(CASES[1:], LEVELS, strict=True), (from_one_node, "layers")]


@pytest.mark.parametrize(
    ("fn", "granularity"), mostly(itertools.product(CASES, LEVELS), OFTEN)
)
def test_a_scan_of_several_outputs_runs_once(fn, granularity, params):
    xs = arrays((2, 5, 4), (3, 2, 5, 4))[: fn.__code__.co_argcount - 1]
    dag = dj.trace(fn, params, *xs, granularity=granularity)
    assert loops(dag, *xs) == 1
    loss = lambda fn: lambda p: sum((y**2).sum() for y in jax.tree.leaves(fn(p)))
    ours = loss(lambda p: dag.replace(params=p)(*xs))
    got, want = jax.grad(ours)(params), jax.grad(loss(lambda p: fn(p, *xs)))(params)
    assert nets.distance(got, want) <= 1e-5
    rows = jax.jit(jax.vmap(dag))(*(x[None] for x in xs))
    assert nets.distance(jax.tree.map(lambda y: y[0], rows), fn(params, *xs)) <= 1e-5


def test_a_gate_at_one_use_leaves_the_others(params):
    xs = arrays((2, 5, 4), (3, 2, 5, 4))
    dag = dj.trace(from_two_nodes, params, *xs)
    off = [a.name for a in dag.graph.arcs if (a.source, a.target) == ("cache", "out/k")]
    got = dag(*xs, gates=dict.fromkeys(off, 0.0))
    without = from_two_nodes(params, xs[0], jnp.zeros_like(xs[1]))
    want = {**from_two_nodes(params, *xs), "k": without["k"]}
    assert nets.distance(got, want) <= 1e-5


def test_the_new_state_shares_the_scan(params):
    def fn(p, state, x):
        y = from_one_node(p, x)
        return y["h"], {"k": state["k"] + y["k"].sum((0, 1))}

    (x,) = arrays((2, 5, 4))
    dag = dj.trace(fn, params, x, state={"k": jnp.zeros((5, 4))})
    call = lambda x: dag.apply(x)
    program = program_of(jax.make_jaxpr(call)(x))
    assert sum(e.name == "scan" for e in program.walk()) == 1
    y, state = call(x)
    assert nets.distance((y, state["user"]), fn(params, dag.state["user"], x)) <= 1e-5


def test_what_a_transformation_traced_does_not_leave_it(params):
    """An arc may be evaluated inside a vmap: nothing is shared out of it."""
    (x,) = arrays((2, 5, 4))
    dag = dj.trace(from_one_node, params, x)
    signature, values = dag.graph.signature, {"x": x}
    context = signature.context(dag.params, dag.state, values, (x,))
    one, two = dag.graph.arcs[:2]
    call = lambda arc: arc.fn.apply(
        dag.params, dag.state, x, train=False, key=None, context=context
    )[0]  # fmt: skip
    jax.jit(lambda: call(one))()
    assert not isinstance(call(two), jax.core.Tracer)


def test_a_compacted_scan_of_several_outputs_runs_once(params):
    (x,) = arrays((2, 5, 4))
    dag = dj.trace(from_one_node, params, x)
    keep = np.arange(8) % 2 == 0
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    mask["u"][..., ~keep] = mask["d"][:, ~keep] = False
    small = dj.compact(dag, mask).net
    assert small.params["u"].shape == (3, 4, 4)
    assert loops(small, x) == 1
    masked = jax.tree.map(jnp.multiply, params, mask)
    assert nets.distance(small(x), from_one_node(masked, x)) <= 1e-5
