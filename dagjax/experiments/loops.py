"""Training driven by a Python loop over chunks: it can report, and avoid slow loops.

XLA:CPU is slow at most convolutions inside a compiled loop; a step is called alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from dagjax.experiments.examples import Data
from dagjax.experiments.model import Trainable
from dagjax.experiments.seeds import over_seeds
from dagjax.experiments.train import Trained, Trainer, TrainInfo
from dagjax.jaxprs.versions import Jaxpr, jaxprs_in_params
from dagjax.types import Key, Mask, Scalar

_CONV = "conv_general_dilated"
_FAST = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

OnChunk = Callable[[float], None]
Train = Callable[..., tuple[Trained, TrainInfo]]


def looped(trainer: Trainer, on_chunk: OnChunk, single: bool = False) -> Train:
    """Drive a trainer by a Python loop over chunks, for all seeds at once.

    The same function as `scanned` gives, mapped over seeds. `on_chunk` is called after
    every chunk with its share of the training; `single`: one step at a time, of as many
    seeds as there are devices, so that no compiled loop is left around a step.
    """
    order = jax.jit(over_seeds(trainer.order, shared=1))
    begin = jax.jit(over_seeds(trainer.begin, shared=1))
    steps = jax.jit(over_seeds(trainer.steps, shared=1), donate_argnums=2)
    measure = jax.jit(over_seeds(trainer.measure, shared=1))
    finish = jax.jit(over_seeds(trainer.finish, shared=1))

    def train(
        key: Key,
        start: Trained,
        mask: Mask,
        data: Data,
        lr: Scalar | None,
        share: float = 1.0,
    ) -> tuple[Trained, TrainInfo]:
        carry, plan = begin(start, mask, lr), order(key, data)
        losses = [measure(carry, data)]
        for i in range(plan.shape[1]):
            chunk = plan[:, i]
            for j in range(chunk.shape[1]) if single else (slice(None),):
                part = chunk[:, j, None] if single else chunk
                carry = steps(key, mask, carry, part, data)
            losses.append(jax.block_until_ready(measure(carry, data)))
            on_chunk(share / plan.shape[1])
        trained, *test = finish(carry, data)
        return trained, TrainInfo(jnp.stack(losses, 1), *test)

    return in_waves(train) if single else train


def in_waves(train: Train) -> Train:
    """Train as many seeds at a time as there are devices, wave after wave."""

    def waves(
        key: Key, start: Trained, mask: Mask, data: Data, lr: Scalar | None
    ) -> tuple[Trained, TrainInfo]:
        seeds, parts = key.shape[0], []
        size = min(jax.local_device_count(), seeds)
        for first in range(0, seeds, size):  # the last wave begins again at seed 0
            index = jnp.arange(first, first + size) % seeds
            wave = jax.tree.map(lambda x, i=index: x[i], (key, start, mask))
            share = min(size, seeds - first) / seeds
            parts.append(train(*wave, data, lr, share))
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[:seeds], *parts)

    return waves


def slow_in_loop(model: Trainable, data: Data) -> bool:
    """Whether a training step has a convolution that XLA:CPU is slow at in a loop.

    It is fast at the layout NHWC, HWIO -> NHWC only, in which `scan_conv` writes the
    gradients too; `lax.conv_general_dilated` does not (jax issue 12868).
    """
    if jax.default_backend() != "cpu":
        return False
    x = data.x_train[:1]
    theta, state, _ = model.shapes(x)
    total = lambda t, s: jnp.sum(model.apply(t, s, x)[0])
    jaxpr = jax.make_jaxpr(jax.grad(total, allow_int=True))(theta, state).jaxpr
    convolutions = [e for e in equations(jaxpr) if e.primitive.name == _CONV]
    return any(e.params["dimension_numbers"] != _FAST for e in convolutions)


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)
