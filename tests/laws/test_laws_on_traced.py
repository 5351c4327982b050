"""The laws on traced versions of every network of the zoo, against the built ones."""

import jax
import numpy as np
import pytest

import dagjax as dj
from tests.graph import nets, twins
from tests.laws.test_laws_on_the_zoo import GRAPHS, NAMES, check
from tests.sweeps import mostly

LAYERED = ("gpt", "densenet7", "lenet5", "mixer", "lstm")

# The older code generator, which conftest chooses, rounds a sum as it is fused.
USUAL = (
    {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None
)


def traced(dag, x, granularity="layers"):
    """A built network traced as any function is."""
    run = lambda variables, x: dag.replace(**variables)(x)
    variables = {"params": dag.params, "state": dag.state}
    return dj.trace(run, variables, x, granularity=granularity)


BITWISE = mostly(GRAPHS, ("resnet8", "gpt", "lstm"))


@pytest.mark.parametrize("name", NAMES)
def test_laws(name):
    """Laws 1, 2, 7 to 11 of the traced network; in layers where that is most."""
    with nets.precision("float64"):
        dag, x = twins.filled(GRAPHS[name], "float64")
        check(traced(dag, x, "layers" if name in LAYERED else "blocks"), x)


@pytest.mark.parametrize("name", BITWISE)
def test_traced_equals_built(name):
    """Bitwise, equation by equation; in blocks there are fewer paths."""
    dag, x = twins.filled(GRAPHS[name])
    net, blocks = traced(dag, x, "primitives"), traced(dag, x, "blocks")
    both = jax.jit(lambda nets, x: [net(x) for net in nets], compiler_options=USUAL)
    want, got = both([dag, net], x)
    assert np.array_equal(got, want)
    assert dj.count_paths(blocks.graph) <= dj.count_paths(net.graph)


@pytest.mark.parametrize("name", mostly(["gpt", "lstm", "unet"], ["gpt"]))
def test_subnetworks(name):
    """Laws 12, 13 and 17: interactions add up to what gates give."""
    with nets.precision("float64"):
        dag, x = twins.filled(GRAPHS[name], "float64")
        net = traced(dag, x, "blocks")
        arcs = [arc.name for arc in net.graph.arcs[1::3]][:4]
        found = dj.interactions(net, x, arcs=arcs)
        one = jax.jit(lambda net, x, gates: net(x, gates=gates))
        for row in (0, len(found.sets) - 1):
            gates = dict(zip(arcs, found.sets[row].astype(float), strict=True))
            within = ~(found.sets & ~found.sets[row]).any(1)
            want = one(net, x, gates)
            assert nets.distance(found.deltas[within].sum(0), want) <= 1e-11
        mutant = found.deltas[:-1].sum(0)
        assert nets.violates(nets.distance(mutant, want), "float64")
