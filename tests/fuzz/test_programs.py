"""Random programs, cut by random masks, against the function itself.

`make fuzz SEEDS=a:b` runs any number of seeds; `make test` fourteen.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.removal.facts import Table
from tests.fuzz import programs

FIRST, LAST = map(int, os.environ.get("DAGJAX_FUZZ_SEEDS", "0:14").split(":"))


def applied(mask, params):
    return {k: jnp.where(mask[k], v, 0) for k, v in params.items()}


def loss(y):
    return jnp.sum(jnp.sin(y * jnp.arange(1, y.size + 1).reshape(y.shape)))


def near(one, two, scale):
    return float(np.abs(np.asarray(one) - np.asarray(two)).max(initial=0)) <= 1e-3 * (
        float(np.abs(np.asarray(scale)).max(initial=0)) + 1e-2
    )


def lost(cut, params):
    """`{parameter: which entries are gone}`."""
    held = cut.index.scatter(
        jax.tree.map(lambda x: np.ones(x.shape, np.float32), cut.net.params)
    )
    return {k: np.asarray(held[k]) == 0 for k in params}


def value_and_slope(fn):
    """Compiled: op by op it would be ten times as slow."""
    of_params = lambda p, x: ((y := fn(p, x)), loss(y))[::-1]
    return jax.jit(jax.value_and_grad(of_params, has_aux=True))


class Case:
    """A program with its network, traced once."""

    def __init__(self, seed):
        self.program, self.seed = programs.drawn(seed), seed
        self.params, self.x = self.program.params, self.program.inputs(3)
        self.net = dj.trace(self.program.fn, self.params, self.x)
        self.dense = value_and_slope(self.program.fn)
        self.ones = {k: np.ones(v.shape, bool) for k, v in self.params.items()}


def check_cut(case, mask, batches=(3,)):
    """Values, and the gradients of what is left; what is gone has none."""
    try:
        cut = dj.compact(case.net, mask, verify=False)
    except dj.CompactionError:
        return None  # refused by name
    masked = applied(mask, case.params)
    small = value_and_slope(lambda p, x: cut.net.replace(params=p)(x))
    for size in batches:
        x = case.program.inputs(size)
        try:
            (_, y), ours = small(cut.net.params, x)
        except dj.CompactionError:  # another cut at this batch size
            continue
        (_, want), slopes = case.dense(masked, x)
        assert near(y, want, want)
        check_slopes(cut, mask, ours, slopes)
        check_nothing_is_frozen(cut, mask, slopes)
    return cut


def check_slopes(cut, mask, ours, slopes):
    want, kept = cut.index.gather(slopes), cut.index.gather(mask)
    for name, g in ours.items():
        if g.size:
            assert near(g * kept[name], want[name] * kept[name], slopes[name]), name


def check_nothing_is_frozen(cut, mask, slopes):
    """A kept entry that is gone has no gradient, or is reported as a constant."""
    for name, entries in lost(cut, mask).items():
        moving = mask[name] & entries & (np.abs(np.asarray(slopes[name])) > 1e-4)
        assert not moving.any() or cut.net.folded_entries[name]


def check_trim(case, mask):
    once = {k: np.asarray(m) for k, m in dj.trim(case.net, mask).items()}
    again = dj.trim(case.net, once)
    assert all(np.array_equal(once[k], again[k]) for k in once)
    assert all((once[k] <= mask[k]).all() for k in once)
    (_, want), _ = case.dense(applied(mask, case.params), case.x)
    (_, y), _ = case.dense(applied(once, case.params), case.x)
    assert near(y, want, want)


def check_unit(case):
    """Masking the members of one unit shrinks every member by exactly the unit."""
    units, rng = dj.units(case.net), np.random.default_rng(case.seed)
    if not units.channels:
        return
    group = units[rng.choice([*units.channels])]
    unit = int(rng.integers(group.size))
    kept = np.arange(group.size) != unit
    mask = {k: np.asarray(m) for k, m in units.mask({group.name: kept}).items()}
    dense = dj.compact(case.net, case.ones, verify=False).net
    small = dj.compact(case.net, mask, verify=False).net
    for path, axis, indices in group.members:
        assert not mask[path].take(indices[unit], axis).any()
        before, after = dense.params[path].shape[axis], small.params[path].shape[axis]
        assert before - after == len(indices[unit]), (path, axis)


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_a_program(seed):
    case = Case(seed)
    kinds = programs.masks(case.params, seed)
    kind = sorted(kinds)[seed % len(kinds)]
    if seed % 3 == 0:
        whole = check_cut(case, case.ones)
        assert whole is None or not whole.net.folded_entries
    check_cut(case, kinds[kind], (3, 5) if seed % 4 == 0 else (3,))
    check_trim(case, kinds[kind])
    check_unit(case)


def test_every_operation_is_drawn():
    names = {n for seed in range(50) for n in programs.names(seed)}
    assert names == {*programs.OPERATIONS}


def test_a_mutant_is_found(monkeypatch):
    """Facts that take what is trained for a constant freeze parameters."""
    monkeypatch.setattr(Table, "may_freeze", lambda self, *facts: facts[0] == facts[0])
    seed = next(i for i in range(50) if {"low_rank", "tokens"} & {*programs.names(i)})
    case = Case(seed)
    assert dj.compact(case.net, case.ones, verify=False).net.folded_entries
