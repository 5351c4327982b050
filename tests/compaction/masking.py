"""Masks of all kinds, and what must hold of a compacted network.

Nothing here knows a rule: a mask is applied to the parameters, the function is
evaluated, and so is what was cut out of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dagjax as dj
from tests.compaction.nets import NETS, ODD, Net
from tests.graph.nets import TOLERANCE, distance

run = jax.jit(lambda net, xs: net(*xs))
run_apart = jax.jit(lambda fn, params, xs: fn(params, *xs), static_argnums=0)


@functools.cache
def built(name: str) -> Net:
    return (NETS | ODD)[name]()


@functools.cache
def units_of(name: str) -> dj.Units:
    return dj.units(built(name).dag)


def ones(params: Any) -> Any:
    return jax.tree.map(lambda x: np.ones(np.shape(x), bool), params)


def applied(mask: Any, params: Any) -> Any:
    """The masked parameters; on the host, where nothing is compiled."""
    return jax.tree.map(lambda m, x: chosen(m, x, np.zeros_like(x)), mask, params)


def chosen(mask: Any, x: Any, other: Any) -> Any:
    return jnp.asarray(np.where(np.asarray(mask), np.asarray(x), np.asarray(other)))


def left_of(cut: dj.Compacted) -> Any:
    """Which entries of the parameters are in the small network."""
    found = []
    for shape, keep in zip(cut.index.shapes, cut.index.keeps, strict=True):
        mask = np.zeros(shape, bool)
        places = zip(keep, shape, strict=True)
        mask[np.ix_(*(np.arange(n) if k is None else k for k, n in places))] = True
        found.append(mask)
    return cut.index.tree.unflatten(found)


# --- masks ----------------------------------------------------------------------------


def groups(name: str, rng: Any, density: float) -> Any:
    """Some units of all groups, at least one of each."""
    kept = {}
    for group, of in units_of(name).channels.items():
        kept[group] = rng.random(of.size) < density
        kept[group][rng.integers(of.size)] = True
    return units_of(name).mask(kept)


def one_left(name: str, rng: Any, density: float) -> Any:
    del rng, density
    channels = units_of(name).channels
    return units_of(name).mask({k: np.arange(g.size) == 1 for k, g in channels.items()})


def slices(*axes: int, least: int = 2) -> Any:
    """Whole slices of arrays along some axes, drawn one by one."""

    def draw(name: str, rng: Any, density: float) -> Any:
        def one(x: Any) -> Any:
            mask = np.ones(np.shape(x), bool)
            for axis in axes if mask.ndim >= least else ():
                if mask.ndim < -axis:
                    continue
                kept = rng.random(mask.shape[axis]) < density
                mask &= kept.reshape([-1, *[1] * (-1 - axis)])
            return mask

        return jax.tree.map(one, built(name).params)

    return draw


def silent(name: str, rng: Any, density: float) -> Any:
    """Channels that are zero, biases too; what reads them stays."""
    kept: dict[int, Any] = {}

    def one(x: Any) -> Any:
        size = np.shape(x)[-1] if np.ndim(x) else ()
        draw = kept.setdefault(size, rng.random(size) < density)
        return np.broadcast_to(draw, np.shape(x))

    return jax.tree.map(one, built(name).params)


def unstructured(name: str, rng: Any, density: float) -> Any:
    draw = lambda x: np.asarray(rng.random(np.shape(x)) < density)
    return jax.tree.map(draw, built(name).params)


def nothing(name: str, rng: Any, density: float) -> Any:
    del rng, density
    return jax.tree.map(np.logical_not, ones(built(name).params))


KINDS = {
    "groups": groups,
    "one left": one_left,
    "writers": slices(-1),
    "readers": slices(-2),
    "all sides": slices(-1, -2, least=1),
    "silent": silent,
    "unstructured": unstructured,
    "nothing": nothing,
}


def drawn(name: str, kind: str, density: float = 0.6, seed: int = 0) -> Any:
    return KINDS[kind](name, np.random.default_rng(seed), density)


# --- what must hold -------------------------------------------------------------------


def error(got: Any, want: Any) -> float:
    """Relative deviation; in units of 1e-5, so that 1 is the limit."""
    kinds = {str(y.dtype) for y in jax.tree.leaves(want)}
    limit = max(TOLERANCE.get(kind, 2e-2) for kind in kinds)
    return distance(got, want) / limit


def trained(net: Net, mask: Any, cut: dj.Compacted) -> Any:
    """The masked parameters, what is left of them moved as by training."""
    theta = applied(mask, net.params)
    move = lambda x: (np.asarray(x, np.float32) * 1.1 + 0.05).astype(x.dtype)
    step = lambda on, m, x: chosen(on & np.asarray(m), move(x), x)
    return jax.tree.map(step, left_of(cut), mask, theta)


def check(name: str, mask: Any) -> dj.Compacted:
    """The small network is the masked one, now and after training what is left."""
    net, limit = built(name), 1000 if name == "half" else 1
    theta = applied(mask, net.params)
    cut = dj.compact(net.dag, mask, verify=False)
    want = run_apart(net.fn, theta, net.xs)
    assert error(run(cut.net, net.xs), want) <= limit
    theta = trained(net, mask, cut)
    small = cut.net.replace(params=cut.index.gather(theta))
    assert error(run(small, net.xs), run_apart(net.fn, theta, net.xs)) <= limit
    return cut


def loss(ys: Any) -> Any:
    """Some generic function of all outputs."""
    return sum(jnp.sum(jnp.sin(3 * y)) for y in jax.tree.leaves(ys))
