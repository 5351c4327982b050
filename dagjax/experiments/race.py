"""Two networks trained in turn, so that whatever slows the machine slows both."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import jax

from dagjax.experiments.examples import Data
from dagjax.experiments.experiment import Setup
from dagjax.experiments.loops import slow_in_loop
from dagjax.experiments.model import Trainable
from dagjax.experiments.train import Trained, make_trainer
from dagjax.types import Array, Key, Mask


class Runner(NamedTuple):
    """A network, where its training starts, and what its mask keeps."""

    model: Trainable
    start: Trained
    mask: Mask


class Finish(NamedTuple):
    """How a training ended."""

    step: float  # seconds, the median over chunks
    losses: list[float]  # in training, at every evaluation
    metric: float  # on the test examples, at the end


def race(
    setup: Setup, runners: tuple[Runner, Runner], key: Key, data: Data
) -> tuple[Finish, Finish]:
    """Train both, a chunk of the one after a chunk of the other; data on one device."""
    one, two = (_Lane(setup, runner, key, data) for runner in runners)
    for i in range(one.order.shape[0]):
        for lane in (one, two) if i % 2 else (two, one):
            lane.chunk(i)
    return one.finish(), two.finish()


class _Lane:
    """Training of one of the two, a chunk at a time, with the time of every step."""

    def __init__(self, setup: Setup, runner: Runner, key: Key, data: Data):
        model, start, mask = runner
        self.trainer = make_trainer(setup.config, model, setup.task, setup.tx)
        self.single = slow_in_loop(model, data)
        self.key, self.mask, self.data = key, mask, data
        self.order = jax.jit(self.trainer.order)(key, data)
        self.carry = jax.jit(self.trainer.begin)(start, mask, setup.learning_rate)
        steps = jax.jit(self.trainer.steps, donate_argnums=2)
        args = (self.key, mask, self.carry, self._parts(0)[0], self.data)
        self.steps = steps.lower(*args).compile()  # apart from what is timed
        self._measure = jax.jit(self.trainer.measure)
        self.times, self.losses = [], [self._loss()]

    def _parts(self, i: int) -> list[Array]:
        chunk = self.order[i]
        return [chunk[j, None] for j in range(len(chunk))] if self.single else [chunk]

    def _loss(self) -> float:
        return float(self._measure(self.carry, self.data))

    def chunk(self, i: int) -> None:
        """Train up to the next evaluation."""
        parts = jax.block_until_ready(self._parts(i))
        begun = time.perf_counter()
        for part in parts:
            args = (self.key, self.mask, self.carry, part, self.data)
            self.carry = self.steps(*args)
        jax.block_until_ready(self.carry)
        self.times.append((time.perf_counter() - begun) / self.order.shape[1])
        self.losses.append(self._loss())

    def finish(self) -> Finish:
        """The figures of its end."""
        metric = jax.jit(self.trainer.finish)(self.carry, self.data)[2]
        return Finish(statistics.median(self.times), self.losses, float(metric))
