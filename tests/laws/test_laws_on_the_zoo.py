"""The laws on every network of the zoo, small, in double precision.

One compiled program a network: factors and their inverse (laws 1 and 2), deletion (7),
the transfer function from the input (8), matrices at a point (9), derivatives (10),
cuts (11), sub-networks (13), neutral elements (17).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from tests.graph import nets, twins
from tests.sweeps import mostly, seldom

IMAGE = {"input_shape": (8, 8, 1)}
MODULES = tuple(stage[:1] for stage in twins.STAGES)
GRAPHS = {
    "lenet_300_100": dj.zoo.lenet_300_100(**IMAGE),
    "lenet5": dj.zoo.lenet5(**IMAGE),
    "conv2": dj.zoo.conv2(**IMAGE),
    "resnet8": dj.zoo.resnet(8, width=2, **IMAGE),
    **{name: twin.graph for name, twin in twins.TWINS.items()},
    # Less deep than the twins: to these laws many of the arcs and levels are alike.
    "bottlenecks": dj.zoo.bottleneck_resnet((1, 1), 3, width=3, small=False, **IMAGE),
    "wide_resnet16": dj.zoo.wide_resnet(10, 3, widen=2, width=2, **IMAGE),
    "inception": dj.zoo.inception(
        3, MODULES, width=4, small=False, input_shape=(32, 32, 2)
    ),
    "vit": dj.zoo.vit(1, 3, heads=2, features=8, hidden=10, **IMAGE),
    "mixer": dj.zoo.mixer(1, 3, features=8, token_hidden=6, hidden=10, **IMAGE),
    "gpt": dj.zoo.gpt(1, 11, heads=2, features=8, input_shape=(6,)),
    "lstm": dj.zoo.lstm_unrolled(3, 4, 3, features=3),
}


# Of each kind of merge and layer the smallest in make test, the others in make soak.
SOAK = {*GRAPHS} - {
    "lenet5", "resnet8", "gpt", "lstm", "experts",
}  # fmt: skip
NAMES = seldom(GRAPHS, SOAK)
SOME = ("inception", "gpt", "lstm", "experts", "unet")


def all_laws(dag, x, t, off):
    """`{law: (got, want, mutant)}`."""
    (start,), factors, b = dag.graph.inputs, dj.factors(dag), dj.inject(dag, x)
    h, y = dj.compose(factors)(b), dag(x)
    value = dj.linearize(dag, x, tolerance=0)
    slope = dj.linearize(dag, x, kind="jacobian", tolerance=0)
    parts = dj.contributions(value)
    levels = range(-1, dag.graph.levels["out"])
    cuts = jnp.stack([parts.cut(level) for level in levels])
    arcs_only = jnp.stack([sum(parts.arcs.values())] * len(cuts))
    alone = dj.delete(dag, off)
    gated = dag(x, gates={off: 0.0})
    floats = value.floats()
    dead = jax.tree.map(jnp.zeros_like, floats)
    laws = {
        "factors": (h["out"], y, dj.compose(factors[1:])(b)["out"]),
        "inverse": (dj.inverse(factors)(h), b, dj.inverse(factors[:-1])(h)),
        "deletion": (alone(x), gated, y),
        "transfer": (dj.transfer(dag, start, "out")(x), y, gated),
        "push": (value.push(value.b), floats, value.push(dead)),
        "cut": (cuts, jnp.stack([y] * len(cuts)), arcs_only),
    }
    if t is not None:
        dy = jax.jvp(lambda x: dag(x), (x,), (t,))[1]
        pushed = slope.read("out", slope.push(dead | {start: t}))
        without = jax.jvp(lambda x: alone(x), (x,), (t,))[1]
        laws["derivative"] = (pushed, dy, without)
    return laws


def check(dag, x):
    """All laws at a point, by one compiled program."""
    t = None if x.dtype == "int32" else jnp.cos(x)
    off = dag.graph.arcs[len(dag.graph.arcs) // 2].name
    found = jax.jit(all_laws, static_argnums=3)(dag, x, t, off)
    for law, (got, want, mutant) in found.items():
        tolerance = 1e-10 if law == "cut" else 1e-12
        scale = (want, got, found["push"][1])
        assert nets.distance(got, want, scale) <= tolerance, law
        assert nets.violates(nets.distance(mutant, want, scale), "float64"), law


@pytest.mark.parametrize("name", NAMES)
def test_laws(name):
    with nets.precision("float64"):
        check(*twins.filled(GRAPHS[name], "float64"))


@pytest.mark.parametrize("name", mostly(SOME, ["inception", "gpt"]))
def test_subnetworks(name):
    """Some arcs' gate vectors at once, against one by one; interactions add up."""
    with nets.precision("float64"):
        dag, x = twins.filled(GRAPHS[name], "float64")
        arcs = [arc.name for arc in dag.graph.arcs[1::3]][:4]
        found = dj.interactions(dag, x, arcs=arcs)
        one = jax.jit(lambda dag, x, gates: dag(x, gates=gates))
        for row in (0, 1, len(found.sets) - 1):
            gates = dict(zip(arcs, found.sets[row].astype(float), strict=True))
            within = ~(found.sets & ~found.sets[row]).any(1)
            want = one(dag, x, gates)
            assert nets.distance(found.deltas[within].sum(0), want) <= 1e-11
        signs = (-1.0) ** found.sets.sum(1)
        mutant = np.tensordot(signs, found.deltas, 1)
        assert nets.violates(nets.distance(mutant, want), "float64")
