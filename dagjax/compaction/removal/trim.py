"""A mask without the entries that do nothing."""

from __future__ import annotations

import jax
import numpy as np

from dagjax.compaction.channels.traced_network import TracedNetwork, traced_network_of
from dagjax.compaction.removal.compact import settled
from dagjax.graph.core.network import Network
from dagjax.types import Mask, Params


def trim(net: Network, mask: Mask) -> Params:
    """Switch off what a mask has made dead: what nothing reads, or nothing feeds.

    A unit is dead if all its writers are zero (and it emits nothing), or all that read
    it are; that may kill others, to a fixpoint. A constant unit, which nothing feeds
    but which emits a constant, keeps what makes it. The function of the network
    stays the same, whatever the dead entries hold.

    Args:
        net: A DAG, or a compacted network.
        mask: Bools like `net.params`, of any kind; None for a leaf that is kept.

    Returns:
        A mask like `net.params`, a part of the one given.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(4), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 2)))
        >>> mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), dag.params)
        >>> mask["Dense_1"]["kernel"] = mask["Dense_1"]["kernel"].at[0].set(False)
        >>> dj.trim(dag, mask)["Dense"]["kernel"][0]     # nothing reads unit 0
        Array([False,  True,  True,  True], dtype=bool)
    """
    source, before = traced_network_of(net), None
    while before is None or _count(mask) < before:
        before, mask = _count(mask), _without_dead(net, mask, source)
    return mask


def _count(mask: Mask) -> int | float:
    """The kept entries; a mask with holes holds more than any other."""
    leaves = jax.tree.leaves(mask, is_leaf=lambda x: x is None)
    holes = any(m is None for m in leaves)
    return np.inf if holes else sum(int(np.sum(m)) for m in leaves)


def _without_dead(net: Network, mask: Mask, source: TracedNetwork) -> Mask:
    """One pass: the mask without the entries that it has made dead."""
    _, _, live = settled(net, mask, source)
    count = len(jax.tree.leaves(net.params))
    dead = live.removed & ~live.folded
    new = []
    for leaf, var in enumerate(source.body.invars[:count]):
        stays = source.channels.stays(var, dead) & (leaf not in live.unread)
        alive = live.live[leaf]
        new.append(jax.device_put(stays if alive is None else stays & alive))
    return jax.tree.structure(net.params).unflatten(new)
