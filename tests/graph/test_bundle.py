import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dagjax as dj
from dagjax.graph.rewrite.bundle import Bundle
from tests.graph import nets


def weight(key, x):
    del x
    return {"w": 0.3 * jax.random.normal(key)}


def scaled(params, x):
    return params["w"] * jnp.tanh(x)


def scalar_arc(u, v):
    return dj.Arc(f"{u}_{v}", f"n{u}", f"n{v}", (weight, scaled))


def neat(arcs, nodes, inputs, seed=0):
    """A random DAG of scalar arcs; every node above the inputs is fed."""
    rng = np.random.default_rng(seed)
    pairs = {(int(rng.integers(v)), v) for v in range(inputs, nodes)}
    while len(pairs) < arcs:
        v = int(rng.integers(inputs, nodes))
        pairs.add((int(rng.integers(v)), v))
    names = [f"n{i}" for i in range(nodes)]
    return dj.Graph(
        [scalar_arc(u, v) for u, v in sorted(pairs)], names[:inputs], names[-1]
    )


def made(graph, shapes, seed=0):
    rng = np.random.default_rng(seed)
    xs = [jnp.asarray(rng.normal(size=(4, *s)), jnp.float32) for s in shapes]
    return dj.init(jax.random.key(seed), graph, *xs), xs


# Compiled once for all networks of one structure.
run = jax.jit(lambda net, *xs: net(*xs))
trained = jax.jit(lambda net, *xs, key: net.apply(*xs, train=True, key=key))


@jax.jit
def forth_and_back(net, *xs):
    """The injection, the values at all nodes, and the injection again."""
    b = dj.inject(net, *xs)
    h = dj.compose(dj.factors(net))(b)
    return b, h, dj.inverse(dj.factors(net))(h)


@st.composite
def plain_plans(draw):
    """Random DAGs of sums: mixed shapes, several inputs and outputs, multi-arcs."""
    plan = draw(nets.plans())
    graph = plan.graph
    arcs = [a for a in graph.arcs if a.target not in graph.merge_of]
    fed = {*graph.inputs} | {a.target for a in arcs}
    while lost := [a for a in arcs if a.source not in fed]:
        arcs = [a for a in arcs if a not in lost]
        fed = {*graph.inputs} | {a.target for a in arcs}
    return (
        plan._replace(graph=dj.Graph(arcs, graph.inputs, arcs[-1].target))
        if (arcs)
        else None
    )


@settings(max_examples=5)
@given(plan=plain_plans())
def test_random(plan):
    if plan is None:
        return
    with nets.precision("float64"):
        case = plan.case("float64")
        small = dj.bundle(case.dag)
        got, whole = run(small, *case.xs), run(case.dag, *case.xs)
        assert nets.distance(got, whole) <= 1e-12
        back = dj.unbundle(small, case.dag.graph)
        assert back.graph == case.dag.graph
        assert nets.same(back.params, case.dag.params)
        scaled_up = lambda net: jax.tree.map(lambda leaf: leaf * 1.1, net)
        want = run(scaled_up(case.dag), *case.xs)
        mutant = run(scaled_up(small), *case.xs)
        assert nets.distance(mutant, want) <= 1e-12
        if nets.distance(want, whole) > 1e-3:
            assert nets.violates(nets.distance(mutant, got), "float64")


@pytest.mark.parametrize("name", ["dense_block", "noisy"])
def test_zoo(name):
    case = nets.zoo(name)
    small = dj.bundle(case.dag)
    assert nets.distance(run(small, *case.xs), run(case.dag, *case.xs)) <= 1e-5
    assert nets.same(dj.unbundle(small, case.dag.graph), case.dag)
    b, h, back = forth_and_back(small, *case.xs)
    assert nets.distance(back, b, scale=h) <= 1e-5


def test_equal_arcs_of_a_level_are_one():
    dag, xs = made(neat(24, 10, 4), [()] * 4)
    small = dj.bundle(dag)
    bundles = [arc for arc in small.graph.arcs if isinstance(arc.fn, Bundle)]
    assert len(bundles) == dag.graph.depth
    assert sum(len(arc.fn.names) for arc in bundles) == 24
    assert nets.distance(run(small, *xs), run(dag, *xs)) <= 1e-6


def test_gradients_and_masks():
    """The gradient is that of the single arcs; a mask of weights cuts arcs."""
    dag, xs = made(neat(16, 8, 3), [()] * 3)
    small = dj.bundle(dag)
    loss = lambda net: jnp.sum(net(*xs) ** 2)
    grads, stacked = jax.jit(lambda *two: tuple(map(jax.grad(loss), two)))(dag, small)
    got = dj.unbundle(stacked, dag.graph).params
    assert nets.distance(got, grads.params) <= 1e-5
    gone = [arc.name for arc in dag.graph.arcs[::3]]
    kept = {
        arc.params_name: {"w": jnp.array([float(n not in gone) for n in arc.fn.names])}
        for arc in small.graph.arcs
        if isinstance(arc.fn, Bundle)
    }
    masked = small.replace(params=jax.tree.map(jnp.multiply, small.params, kept))
    got = run(masked, *xs)
    assert nets.distance(got, run(dj.delete(dag, gone), *xs)) <= 1e-6
    assert nets.violates(nets.distance(run(small, *xs), got), "float32")


def test_tied_arcs_stay_tied():
    arcs = [
        dj.Arc(f"a{i}", f"x{i}", "h", nn.Dense(3), tied="shared") for i in range(3)
    ] + [dj.Arc(f"b{i}", "h", f"y{i}", nn.Dense(3)) for i in range(2)]
    graph = dj.Graph(arcs, ["x0", "x1", "x2"], ["y0", "y1"])
    dag, xs = made(graph, [(3,)] * 3)
    small = dj.bundle(dag)
    assert jax.tree.map(jnp.shape, small.params["shared"]) == {
        "bias": (3,),
        "kernel": (3, 3),
    }
    assert nets.distance(run(small, *xs), run(dag, *xs)) <= 1e-6
    assert nets.same(dj.unbundle(small, dag.graph).params, dag.params)


def test_an_arc_tied_to_another_one_stays_tied():
    arcs = [
        dj.Arc("a", "x", "h", nn.Dense(3)),
        dj.Arc("b", "x", "h", nn.Dense(3), tied="a"),
        dj.Arc("c", "h", "y", nn.Dense(3), tied="a"),
    ]
    dag, xs = made(dj.Graph(arcs, "x", "y"), [(3,)])
    small = dj.bundle(dag)
    assert [*small.params] == ["a"]
    assert nets.distance(run(small, *xs), run(dag, *xs)) <= 1e-6


def test_the_state_keeps_its_structure():
    """So that a bundle can be trained in a scan."""
    dag, xs = made(neat(20, 8, 3), [()] * 3)
    small = dj.bundle(dag)
    assert trained(small, *xs, key=None)[1] == small.state == {}


def test_an_output_that_is_an_input():
    arcs = [dj.Arc("a", "x", "y", nn.Dense(3)), dj.Arc("b", "x", "y", nn.Dense(3))]
    dag, xs = made(dj.Graph(arcs, "x", ["x", "y"]), [(3,)])
    assert nets.distance(run(dj.bundle(dag), *xs), run(dag, *xs)) <= 1e-6


def test_state_and_random_arcs():
    branch = lambda: dj.block(nn.Dense(4), nn.BatchNorm(), nn.Dropout(0.5))
    graph = dj.parallel(*[branch() for _ in range(3)])
    x = jax.random.normal(jax.random.key(0), (64, 3))
    shapes = jax.eval_shape(lambda: dj.init(jax.random.key(1), graph, x))
    dag = nets.fill(shapes, "float32")
    small = dj.bundle(dag)
    _, state = trained(dag, x, key=jax.random.key(2))
    _, held = trained(small, x, key=jax.random.key(2))
    back = dj.unbundle(small.replace(state=held), dag.graph).state
    assert nets.distance(back, state) <= 1e-6  # statistics come before the dropout
    one = trained(small, x, key=jax.random.key(3))[0]
    two = trained(small, x, key=jax.random.key(4))[0]
    assert not np.allclose(one, two)


def test_a_network_of_a_thousand_arcs_trains():
    """From init to a lower loss in one compiled program; ten thousand: benchmarks."""
    graph = neat(1_000, 400, 100)  # of twelve levels, as many as are compiled
    dag, xs = made(graph, [()] * 100)
    net = dj.bundle(dag)
    y, tx = jnp.sin(sum(xs)), optax.adam(1e-2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(net, opt_state):
        loss = lambda params: jnp.mean((net.replace(params=params)(*xs) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(net.params)
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(net.params, updates)
        return net.replace(params=params), opt_state, value

    opt_state, losses = tx.init(net.params), []
    for _ in range(100):
        net, opt_state, value = step(net, opt_state)
        losses.append(float(value))
    assert losses[-1] < 0.2 * losses[0]
    few = dj.node_functions(dj.unbundle(net, dag.graph), 2)
    name = next(node for node, level in graph.levels.items() if level == 2)
    assert few[name](*xs).shape == (4,)


def test_many_equal_arcs_are_initialized_as_one_by_one():
    """In one call, with the numbers that each would draw alone."""
    graph = neat(100, 30, 4)
    dag, _ = made(graph, [()] * 4)
    few = dj.Graph(graph.arcs[:20], graph.inputs, graph.arcs[19].target)
    alone, _ = made(few, [()] * 4)
    for name, own in alone.params.items():
        assert nets.same(own, dag.params[name])
    assert len({float(own["w"]) for own in dag.params.values()}) == 100


def test_errors():
    case = nets.zoo("inception")
    with pytest.raises(dj.GraphError, match="is a Concat"):
        dj.bundle(case.dag)
