"""One function over many seeds: vmapped on accelerators, over devices on the CPU.

On the CPU vmapping a small network gains nothing, and its results depend on how many
seeds there are. One host device for each core, and inside it one seed after the other,
is faster and bitwise equal to single runs on any number of devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dagjax.types import PyTree


class Keys(NamedTuple):
    """The named streams of randomness of one seed; typed keys, each used once."""

    init: jax.Array
    order: jax.Array
    prune: jax.Array


def make_keys(seeds: int, first: int = 0) -> Keys:
    """Keys of seeds `first, first + 1, ...`, each independent of how many there are.

    Args:
        seeds: How many.
        first: The number of the first one.

    Returns:
        Keys with a leading axis `[seed]`.

    Example:
        >>> make_keys(3).init.shape
        (3,)
    """
    roots = jax.vmap(jax.random.key)(np.arange(first, first + seeds, dtype=np.uint32))
    streams = [
        jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(roots) for i in range(3)
    ]
    return Keys(*streams)


def over_seeds(fn: Callable[..., Any], shared: int = 0) -> Callable[..., Any]:
    """Map a function of one seed over the leading axis of its arguments.

    Args:
        fn: A function of one seed.
        shared: How many of the last arguments (data) are the same for all seeds.

    Returns:
        A function to be jitted, whose first arguments have a leading axis `[seed]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> add = jax.jit(over_seeds(lambda x, y: x + y, shared=1))
        >>> print(add(jnp.arange(3), 10))
        [10 11 12]
    """
    if jax.default_backend() == "cpu":
        return functools.partial(_spread, fn, shared)
    return functools.partial(_batched, fn, shared)


def _batched(fn: Callable[..., Any], shared: int, *args: PyTree) -> PyTree:
    per_seed = len(args) - shared
    return jax.vmap(fn, in_axes=(0,) * per_seed + (None,) * shared)(*args)


def _spread(fn: Callable[..., Any], shared: int, *args: PyTree) -> PyTree:
    per_seed, common = args[: len(args) - shared], args[len(args) - shared :]
    seeds = jax.tree.leaves(per_seed)[0].shape[0]
    devices = min(jax.local_device_count(), seeds)
    padded = -(-seeds // devices) * devices
    pad = lambda x: x[jnp.arange(padded) % seeds] if padded > seeds else x

    def local(mine: PyTree, common: PyTree) -> PyTree:
        one = lambda args: fn(*args, *common)
        if padded == devices:  # one seed a device: no loop, which slows convolutions
            alone = one(jax.tree.map(lambda x: x[0], mine))
            return jax.tree.map(lambda x: x[None], alone)
        return jax.lax.map(one, mine)

    mesh = Mesh(np.array(jax.local_devices()[:devices]), ("seed",))
    split, same = PartitionSpec("seed"), PartitionSpec()
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(split, same), out_specs=split, check_vma=False
    )
    return jax.tree.map(lambda x: x[:seeds], run(jax.tree.map(pad, per_seed), common))


def place(tree: PyTree, seeds: int, shared: bool = False) -> PyTree:
    """Put arrays where `over_seeds` wants them, so that no call copies them again.

    They have a leading axis `[seed]`, or (`shared`) are the same for all seeds.
    """
    devices = jax.local_devices()[:seeds]
    if jax.default_backend() != "cpu" or (not shared and seeds % len(devices)):
        return jax.tree.map(jnp.asarray, tree)
    mesh = Mesh(np.array(devices), ("seed",))
    spec = PartitionSpec() if shared else PartitionSpec("seed")
    return jax.device_put(tree, NamedSharding(mesh, spec))
