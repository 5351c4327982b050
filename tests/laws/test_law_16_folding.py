"""Law 16: what removed channels still emit is folded exactly, or not removed at all.

A channel that is fed by nothing and emits a constant adds a constant to its readers: a
vector without padding, a map with it. Channels under a norm count in its statistics
after they are gone: `+ r m^2 / D` in the variance, D the old width.
"""

import functools

import jax
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.removal.evaluate import CutEvaluation
from tests.compaction import masking
from tests.graph import nets


@functools.cache
def cut(name, kind, seed=1):
    """The small network, its inputs, what the masked one makes of them."""
    net, mask = masking.built(name), masking.drawn(name, kind, 0.5, seed)
    want = masking.run_apart(net.fn, masking.applied(mask, net.params), net.xs)
    return dj.compact(net.dag, mask, verify=False).net, net, want


def afresh(small, xs):
    """Compiled again: what a mutant changes is no argument."""
    return jax.jit(lambda small, xs: small(*xs))(small, xs)


def off_by(small, xs, want):
    return nets.distance(afresh(small, xs), want)


def folded(small, change):
    constants = [change(np.asarray(c)) for c in small.state["folded"]]
    return small.replace(state=small.state | {"folded": constants})


@pytest.mark.parametrize("name", ["same", "valid"])
def test_zombies(name):
    small, net, want = cut(name, "writers")
    assert small.state["folded"]
    assert off_by(small, net.xs, want) <= 1e-5
    mutant = folded(small, np.zeros_like)  # biases left out
    assert nets.violates(off_by(mutant, net.xs, want), "float32")


def test_a_bias_is_right_without_padding_alone():
    """The constant inside the image, taken for all of it."""

    def inside(c):
        return (
            c[:, c.shape[1] // 2, c.shape[2] // 2][:, None, None] if c.ndim > 2 else c
        )

    for name in ("valid", "same"):
        small, net, want = cut(name, "writers")
        error = off_by(folded(small, inside), net.xs, want)
        assert error <= 1e-5 if name == "valid" else nets.violates(error, "float32")


NORMS = ("layer_norm", "group_norm", "layer_norm_fast", "group_norm_fast", "rms_norm")


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    """The old width divides; with the new one it is another function."""
    small, net, want = cut(name, "groups")
    assert off_by(small, net.xs, want) <= 1e-5
    if not name.startswith("group"):
        naive = net.fn(small.params, *net.xs)
        assert nets.violates(nets.distance(naive, want), "float32")


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "softmaxed"])
def test_mutant_without_the_compensation(monkeypatch, name):
    small, net, want = cut(name, "groups", 2)
    assert off_by(small, net.xs, want) <= 1e-5
    monkeypatch.setattr(CutEvaluation, "_repeated", lambda *_: None)
    assert nets.violates(off_by(small, net.xs, want), "float32")


@pytest.mark.parametrize("name", ["scaled", "by_row"])
def test_constants_that_move_are_not_folded(name):
    """One of a parameter that stays would be wrong after a step of training."""
    masking.check(name, masking.drawn(name, "writers", 0.5, seed=1))
