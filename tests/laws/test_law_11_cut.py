"""Law 11: contributions of arcs and constants sum to the output across every level."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings

import dagjax as dj
from tests.graph import nets


def cut_errors(case, kind="value", change=None):
    """At every level cut, for every output, how far the sum is from the value."""
    lin = dj.linearize(case.dag, *case.xs, kind=kind, tolerance=0)
    errors = []
    for output in case.dag.graph.outputs:
        parts = dj.contributions(lin, output)
        if change:
            parts = change(parts)
        value = lin.shown(output)
        for level in range(-1, case.dag.graph.levels[output]):
            errors.append(nets.distance(parts.cut(level), value))
    return max(errors)


def no_arc(parts):
    """Mutant: the arc that contributes most is left out."""
    most = max(parts.arcs, key=lambda name: float(jnp.max(abs(parts.arcs[name]))))
    arcs = parts.arcs | {most: jnp.zeros_like(parts.arcs[most])}
    return dj.Contributions(arcs, parts.nodes, parts.graph, parts.output)


@pytest.mark.parametrize("name", ["mlp", "noisy", "inception", "two_streams"])
def test_nets(name):
    with nets.precision("float64"):
        case = nets.zoo(name, "float64")
        assert cut_errors(case) <= 1e-10
        assert nets.violates(cut_errors(case, change=no_arc), "float64")


@settings(max_examples=3)
@given(plan=nets.plans(max_nodes=8))
def test_random(plan):
    with nets.precision("float64"):
        case = plan.case("float64")
        assert cut_errors(case) <= 1e-10
        assert cut_errors(case, "jacobian") <= 1e-10


def test_single_precision():
    assert cut_errors(nets.zoo("dense_block")) <= 1e-5


def test_constants_carry_what_arcs_do_not():
    """Without the nodes' parts (biases) the arcs alone do not sum to the value."""
    with nets.precision("float64"):
        case = nets.zoo("mlp", "float64")
        lin = dj.linearize(case.dag, *case.xs)
        parts = dj.contributions(lin)
        last = case.dag.graph.depth - 1
        arcs = parts.arcs["fc3"]
        assert nets.distance(parts.cut(last), lin.shown("out")) <= 1e-12
        assert nets.violates(nets.distance(arcs, lin.shown("out")), "float64")


def test_levels_of_cuts():
    lin = dj.linearize(nets.zoo("mlp").dag, *nets.zoo("mlp").xs)
    with pytest.raises(ValueError, match="from -1 to 2"):
        dj.contributions(lin).cut(3)
