"""The lottery-ticket experiment: train, prune, rewind, and again.

    start -> train to the rewind point -> theta_k
    round r:  train(theta_k, mask_r) -> score -> mask_{r+1} at density_{r+1}

One `round_fn`, two drivers: `make_lottery` scans it (one program, mapped over seeds),
`run.rounds` loops over it (progress, a saved state after each round, resume).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dagjax.experiments.examples import Data
from dagjax.experiments.model import Model
from dagjax.experiments.seeds import Keys
from dagjax.experiments.tasks import Task
from dagjax.experiments.train import (
    TrainConfig,
    Trained,
    Trainer,
    TrainInfo,
    fixed_sample,
    make_trainer,
    scanned,
)
from dagjax.sparsity.pruners import Pruner
from dagjax.types import Mask, PyTree, Scalar


class Point(NamedTuple):
    """What one round hands to the next."""

    mask: Mask
    memory: PyTree  # of the pruner
    number: jax.Array


class Round(NamedTuple):
    """What one round reports."""

    mask: Mask
    info: TrainInfo


class Pieces(NamedTuple):
    """The experiment's functions, of one seed or mapped over seeds: same arguments."""

    init: Callable[..., tuple[Trained, Point]]  # (keys, data)
    pretrain: Callable[..., Any] | None  # (key, start, mask, data, lr)
    train: Callable[..., Any]  # (key, start, mask, data, lr)
    prune: Callable[..., tuple[Mask, Any]]  # (keys, point, trained, data, density)


def make_trainers(
    config: TrainConfig,
    model: Model,
    task: Task,
    tx: optax.GradientTransformation,
    rewind: int = 0,
) -> tuple[Trainer, Trainer | None]:
    """The trainer of the rounds, and one of `rewind` steps where there is rewinding."""
    train = make_trainer(config, model, task, tx)
    if not rewind:
        return train, None
    before = TrainConfig(rewind, config.batch, rewind, 1)
    return train, make_trainer(before, model, task, tx, stream=1)


def make_init(
    model: Model, full: Callable[..., Mask], pruner: Pruner
) -> Callable[[Keys, Data], tuple[Trained, Point]]:
    """Initial parameters, and the point before the first round."""

    def init(keys: Keys, data: Data) -> tuple[Trained, Point]:
        start = Trained(*model.init(keys.init, data.x_train[:1]))
        mask = full(start.theta, model.shapes(data.x_train[:1])[2].shape[-1])
        memory = pruner.init(start.theta)
        return start, Point(mask, memory, jnp.zeros((), jnp.int32))

    return init


def make_prune(pruner: Pruner, config: TrainConfig) -> Callable[..., tuple[Mask, Any]]:
    """One update of the pruner on the fixed training examples."""

    def prune(
        keys: Keys, point: Point, trained: Trained, data: Data, density: Scalar
    ) -> tuple[Mask, Any]:
        key = jax.random.fold_in(keys.prune, point.number)
        batch = (trained.state, *fixed_sample(config, data))
        args = (trained.theta, point.mask, batch, density)
        return pruner.update(key, point.memory, *args)

    return prune


def start_fn(
    pieces: Pieces, keys: Keys, data: Data, lr: Scalar | None
) -> tuple[Trained, Point]:
    """The rewind point and the full mask."""
    start, point = pieces.init(keys, data)
    if pieces.pretrain is not None:
        start, _ = pieces.pretrain(keys.order, start, point.mask, data, lr)
    return start, point


def round_fn(
    pieces: Pieces,
    keys: Keys,
    start: Trained,
    data: Data,
    lr: Scalar | None,
    point: Point,
    density: Scalar,
) -> tuple[Point, Round]:
    """Train from the rewind point under the mask, then prune to the next density."""
    trained, info = pieces.train(keys.order, start, point.mask, data, lr)
    mask, memory = pieces.prune(keys, point, trained, data, density)
    return Point(mask, memory, point.number + 1), Round(point.mask, info)


def next_densities(densities: Sequence[float] | jax.Array) -> jax.Array:
    """The density that each round prunes to: the rounds train at 1, d_1, ..., d_R."""
    densities = jnp.asarray(densities, jnp.float32)
    return jnp.concatenate([densities, densities[-1:]])


def make_lottery(
    config: TrainConfig,
    model: Model,
    task: Task,
    tx: optax.GradientTransformation,
    pruner: Pruner,
    full: Callable[..., Mask],
    *,
    rewind: int = 0,
) -> Callable[..., tuple[Trained, Round]]:
    """The whole experiment of one seed as one pure function: a scan of rounds.

    Args:
        config: Training of a round.
        model: The network.
        task: Loss and metric.
        tx: An optax optimizer, made once.
        pruner: From `dagjax.pruners`; it sees batches `(state, x, y)`.
        full: `(theta, outputs) -> mask` that keeps everything.
        rewind: Steps of dense training before the rewind point.

    Returns:
        `run(keys, data, densities, learning_rate=None) -> (start, rounds)`, rounds
        stacked over `[1 + densities]`, the first one dense. Jit it, map it over seeds
        with `dagjax.over_seeds`; new densities are values and do not compile again.

    Example:
        >>> import dagjax as dj, jax, optax
        >>> data = dj.data.teacher(n_train=64, n_test=16)
        >>> model, task = dj.as_model(dj.zoo.mlp((8, 1))), dj.task_of(data)
        >>> config = TrainConfig(steps=20, batch=16, eval_every=10)
        >>> pruner = dj.pruners.one_shot(dj.scores.magnitude, dj.selection.global_topk)
        >>> full = lambda theta, outputs: {
        ...     "params": dj.masks.full(theta["params"]), "gates": None}
        >>> run = make_lottery(config, model, task, optax.adam(1e-2), pruner, full)
        >>> seeds = jax.jit(dj.over_seeds(run, shared=2))
        >>> start, rounds = seeds(dj.make_keys(2), data, [0.5, 0.25])
        >>> rounds.info.loss.shape
        (2, 3, 3)
    """
    trainer, pretrainer = make_trainers(config, model, task, tx, rewind)
    pieces = Pieces(
        make_init(model, full, pruner),
        pretrainer and scanned(pretrainer),
        scanned(trainer),
        make_prune(pruner, config),
    )

    def run(
        keys: Keys,
        data: Data,
        densities: Sequence[float] | jax.Array,
        learning_rate: Scalar | None = None,
    ) -> tuple[Trained, Round]:
        start, point = start_fn(pieces, keys, data, learning_rate)
        body = lambda point, density: round_fn(
            pieces, keys, start, data, learning_rate, point, density
        )
        _, rounds = jax.lax.scan(body, point, next_densities(densities))
        return start, rounds

    return run
