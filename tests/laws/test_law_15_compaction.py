"""Law 15: what is left of a network is the masked network, and smaller.

Outputs and gradients are the same, every parameter that is left is one that the mask
and the program leave alive, the operations are fewer, and to cut again cuts nothing.
"""

import jax
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.channels import traced_network as source
from dagjax.compaction.channels.wires import RULES, Rule
from tests.compaction import masking
from tests.compaction.test_wiring import swapped
from tests.graph import nets
from tests.laws.test_law_14_dead_parameters import NETS, run, slope

EXTREMES = {
    "half": lambda g, rng: rng.random(g.size) < 0.5,
    "one": lambda g, rng: np.arange(g.size) == 0,
}


def unit_mask(dag, kind, seed=0):
    units, rng = dj.units(dag), np.random.default_rng(seed)
    kept = {k: EXTREMES[kind](g, rng) for k, g in units.channels.items()}
    for group in kept.values():
        group[0] = True
    return units, kept, units.mask(kept)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def flops(net, xs):
    """Of the program as it is written, before a compiler sees it."""
    return jax.jit(lambda net, xs: net(*xs)).lower(net, xs).cost_analysis()["flops"]


EACH = [(name, "half") for name in NETS]
EACH += [(name, "one") for name in ("lenet5", "gpt", "group_norm")]


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_compaction(name, kind):
    dag, xs = NETS[name](name)
    units, kept, mask = unit_mask(dag, kind)
    cut = dj.compact(dag, mask, verify=False)
    small, masked = cut.net, dag.replace(params=masking.applied(mask, dag.params))
    assert masking.error(run(small, xs), run(masked, xs)) <= 1
    alive = sum(int(np.sum(m)) for m in jax.tree.leaves(dj.trim(dag, mask)))
    assert count(small.params) == alive <= units.cost(kept)[1]
    shapes = zip(
        jax.tree.leaves(small.params), jax.tree.leaves(dag.params), strict=True
    )
    assert all(np.all(np.array(a.shape) <= b.shape) for a, b in shapes)
    assert flops(small, xs) < flops(masked, xs)
    again = dj.compact(small, masking.ones(small.params), verify=False).net
    assert jax.tree.map(np.shape, again.params) == jax.tree.map(np.shape, small.params)


@pytest.mark.parametrize("name", ["resnet8", "inception", "rotary"])
def test_gradients(name):
    dag, xs = NETS[name](name)
    _, _, mask = unit_mask(dag, "half")
    cut = dj.compact(dag, mask, verify=False)
    masked = dag.replace(params=masking.applied(mask, dag.params))
    want = slope(masked.params, masked, xs)
    got = slope(cut.net.params, cut.net, xs)
    assert nets.distance(got, cut.index.gather(want), scale=want) <= 1e-5
    mutant = jax.tree.map(lambda g: 1.01 * g, got)
    assert nets.distance(mutant, cut.index.gather(want), scale=want) > 1e-5


def test_mutant_labels_of_a_concatenation_swapped(monkeypatch):
    net = masking.built("dense_concat")
    mask = masking.drawn("dense_concat", "groups")
    want = masking.run_apart(net.fn, masking.applied(mask, net.params), net.xs)
    wrong = Rule(lambda eqn, _: swapped(eqn), RULES["concatenate"].parameters)
    monkeypatch.setitem(RULES, "concatenate", wrong)
    source._traced.cache_clear()
    try:
        small = dj.compact(net.dag, mask, verify=False).net
        error = nets.distance(masking.run(small, net.xs), want)
    except (dj.CompactionError, TypeError, ValueError, IndexError):
        error = 1.0
    finally:
        source._traced.cache_clear()
    assert nets.violates(error, "float32")
