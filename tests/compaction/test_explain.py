"""What `dj.explain` says first: what can be cut, what pins most, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dagjax as dj
from tests.compaction.nets import filled, normal
from tests.graph.nets import distance

SHAPES = {"w": (3, 8), "b": (8,), "o": (8, 4), "t": ()}


def two_outputs(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"]) * p["t"]
    return {"cache": h, "y": h @ p["o"]}


def one_output(p, x):
    return two_outputs(p, x)["y"]


def stacked(p, x):
    step = lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None)
    return lax.scan(step, x, (p["up"], p["down"]))[0]


def test_the_share_of_parameters_in_units():
    found = dj.explain(dj.trace(one_output, filled(SHAPES), normal(2, 3)))
    assert (found.entries, found.free) == (24 + 8 + 32 + 1, 24 + 8 + 32)
    assert repr(found).startswith("98% of 65 parameters lie in units")


def test_a_returned_cache_pins_by_its_name():
    found = dj.explain(dj.trace(two_outputs, filled(SHAPES), normal(2, 3)))
    assert found.free == 0
    cache = next(pin for pin in found.pins if "cache" in pin.reason)
    assert cache.reason == "the output 'cache'"
    assert (cache.entries, set(cache.parameters)) == (24 + 8 + 32, {"w", "b", "o"})
    assert "leave it out" in cache.advice
    assert [pin.entries for pin in found.pins] == sorted(
        [pin.entries for pin in found.pins], reverse=True
    )


def test_layers_in_a_scan_are_offered_unroll():
    params = filled({"up": (5, 3, 8), "down": (5, 8, 3)})
    found = dj.explain(dj.trace(stacked, params, normal(2, 3)))
    scan = next(pin for pin in found.pins if "scan" in pin.reason)
    assert scan.entries == 5 * 24 * 2
    assert "unroll=True" in scan.advice
    assert "unroll=True" in repr(found)
    assert f" at {__file__}" not in repr(found)
    assert " at tests/compaction/test_explain.py:" in repr(found)


def test_unrolled_layers_of_a_list_have_widths_of_their_own():
    layers = [filled({"up": (3, 8), "down": (8, 3)}, seed) for seed in range(5)]

    def fn(layers, x):
        return stacked(jax.tree.map(lambda *rows: jnp.stack(rows), *layers), x)

    x = normal(2, 3)
    dag = dj.trace(fn, layers, x, unroll=True)
    assert not any("scan" in pin.reason for pin in dj.explain(dag).pins)
    units = dj.units(dag)
    assert [group.size for group in units.channels.values()] == [8] * 5
    keep = {
        name: np.arange(8) < n for n, name in enumerate(units.channels)
    }  # 0 to 4 units of the layers
    mask = units.mask(keep)
    small = dj.compact(dag, mask).net
    assert [layer["up"].shape[-1] for layer in small.params] == [0, 1, 2, 3, 4]
    masked = jax.tree.map(jnp.multiply, layers, mask)
    assert distance(small(x), fn(masked, x)) <= 1e-5
