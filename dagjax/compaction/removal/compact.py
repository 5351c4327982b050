"""Pruned structure is cut out, and the result held against the masked network."""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.mask_checks import leaves_like, named, with_values
from dagjax.compaction.channels.traced_network import TracedNetwork, traced_network_of
from dagjax.compaction.removal.checks import refuse_random, refuse_training
from dagjax.compaction.removal.compacted import Cutting, Small
from dagjax.compaction.removal.evaluate import CutEvaluation
from dagjax.compaction.removal.folding import Recipe
from dagjax.compaction.removal.index import Index, gather, gather_host
from dagjax.compaction.removal.liveness import Liveness, liveness
from dagjax.compaction.removal.verify import verify as check
from dagjax.graph.core.network import Network
from dagjax.jaxprs.gc_paused import gc_paused
from dagjax.jaxprs.versions import shape_of
from dagjax.types import Array, Mask, Params, PyTree


class Compacted(NamedTuple):
    """A smaller network, and how its arrays lie in those of the old one.

    Args:
        net: The network; `net(x)` evaluates, `net.params` are the smaller arrays.
        index: Gathers any params-shaped tree into the small network, scatters back.
        opt_state: The optimizer state of the small network, if one was given.
    """

    net: Small
    index: Index  # pyright: ignore[reportIncompatibleMethodOverride]
    opt_state: PyTree = None


@gc_paused()
def compact(
    net: Network,
    mask: Mask,
    opt_state: PyTree = None,
    *,
    verify: bool | Literal["gradients"] = True,
    coupled: bool = True,
) -> Compacted:
    """Cut out of a network what its mask makes dead, exactly.

        small(gather(theta), x) = net(where(mask, theta, 0), x)

    What training could still change stays: an entry is cut if it is masked, if its
    gradient is zero as long as the masked ones are, or if all that it moves is the
    constant of a unit whose inputs are all masked (a kept bias). `net.folded_entries`
    counts these last ones: keep an input of their unit to train them.

    Args:
        net: A DAG, or a network that was compacted before.
        mask: Bools like `net.params`; None for a leaf that is kept.
        opt_state: A state of an optimizer of `net.params`, gathered with them.
        verify: Compare the outputs with those of the masked network on random inputs,
            two forward passes; "gradients" compares those of what is left too.

        coupled: Cut a feature of a kernel only with the channel that it makes or reads.
            False: cut it wherever the kernel is zero there, and bring channels together
            by index maps (gather before, scatter after); worth it where the branches of
            a sum keep different channels.

    Raises:
        CompactionError: If the outputs differ, the mask does not fit, or the network
            was traced in training mode.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
        >>> mask = dj.prune_units(dag, "l2", density=0.5)
        >>> small = dj.compact(dag, mask).net
        >>> jax.tree.map(jnp.shape, small.params["Dense"])
        {'bias': (4,), 'kernel': (4, 4)}
    """
    if verify not in (True, False, "gradients"):
        raise CompactionError(f'verify is True, False or "gradients", got {verify!r}')
    source = traced_network_of(with_values(net))
    refuse_training(net)
    leaves, flat, live = settled(net, mask, source, coupled)
    refuse_random(source, flat)
    cutting, folded, keeps = _cut(net, source, live, leaves, flat, coupled)
    rows = itertools.zip_longest(leaves, flat, keeps)  # the state has no masks
    params, state = _parts(net, [_left(x, m, k) for x, m, k in rows])
    small = Small(cutting, params, {"user": state, "folded": folded})
    count = len(jax.tree.leaves(net.params))
    shapes = tuple(np.shape(x) for x in leaves[:count])
    index = Index(jax.tree.structure(net.params), shapes, keeps[:count])
    if verify:
        check(net, small, index, masked(leaves, flat), gradients=verify == "gradients")
    moved = None if opt_state is None else index.gather(opt_state)
    return Compacted(small, index, moved)


def _left(x: Array, m: Array, keep: PyTree) -> jax.Array:
    """The kept entries of a leaf; zero where a mask says so within them."""
    part = gather(x, keep)
    if m is None or (held := gather_host(m, keep)).all():
        return part
    return jax.device_put(np.where(held, np.asarray(part), np.zeros((), part.dtype)))


def settled(
    net: Network, mask: Mask, source: TracedNetwork, coupled: bool = True
) -> tuple[Any, Any, Liveness]:
    """The leaves, the masks of the parameters among them, and what can go."""
    flat = mask_leaves(net, mask)
    leaves = jax.tree.leaves((net.params, net.state))
    return leaves, flat, liveness(source.channels_of(coupled), leaves, flat)


def masked(leaves: list[Any], flat: list[Any]) -> list[Any]:
    """The leaves with zeros where their masks are False."""
    return [
        x if m is None else jnp.where(m, x, jnp.zeros_like(x))
        for m, x in itertools.zip_longest(flat, leaves)
    ]


def mask_leaves(net: Network, mask: Mask) -> list[Any]:
    """The mask leaf by leaf of the parameters.

    Raises:
        CompactionError: If it does not fit.
    """
    leaves = leaves_like(mask, net.params, "a mask")
    rows = zip(leaves, named(net.params).items(), strict=True)
    return [None if m is None else _checked(m, *row) for m, row in rows]


def _checked(m: Array, name: str, x: Array) -> Array:
    m = np.asarray(m)
    if m.shape != np.shape(x) or m.dtype != bool:
        raise CompactionError(
            f"a mask holds bools like the parameters: got {m.dtype}{list(m.shape)} for "
            f"{name} of shape {list(np.shape(x))}"
        )
    return m


def _parts(net: Network, leaves: list[Any]) -> tuple[Any, Any]:
    tree = jax.tree.structure((net.params, net.state))
    return tree.unflatten(leaves)


def _cut(
    net: Network,
    source: TracedNetwork,
    live: Liveness,
    leaves: PyTree,
    flat: PyTree,
    coupled: bool,
) -> PyTree:
    channels = source.channels_of(coupled)
    kept = channels.kept(live.removed)
    keeps = tuple(kept(v) for v in source.body.invars[: len(leaves)])
    recipe = Recipe(channels, live.facts, kept, len(leaves))
    folded = recipe(masked(leaves, flat) if recipe.folds else leaves)
    cutting = Cutting(
        jax.tree.structure(net), map(shape_of, jax.tree.leaves(net)), source.inputs,
        live.rounds, recipe.digest, len(flat), coupled,
        _folded_entries(net.params, live, keeps),
    )  # fmt: skip
    evaluation = CutEvaluation(channels, kept, live.facts, recipe.folds)
    cutting.remember(source, evaluation)
    whole = len(jax.tree.leaves(net.params))
    gone = tuple(
        _none_of(k) if i in live.unread and i < whole else k
        for i, k in enumerate(keeps)
    )
    return cutting, folded, gone


def _folded_entries(params: Params, live: Liveness, keeps: PyTree) -> dict[str, int]:
    """`{parameter: removed entries that are alive}`: they only move a constant."""
    counts: dict[str, int] = {}
    for leaf, (name, x) in enumerate(named(params).items()):
        alive = live.live[leaf]
        alive = np.ones(np.shape(x), bool) if alive is None else alive
        count = int(alive.sum()) - int(gather_host(alive, keeps[leaf]).sum())
        if count and leaf not in live.unread:
            counts[name] = count
    return counts


def _none_of(keep: Any) -> Any:
    """Of a leaf that nothing reads: its first axis is emptied."""
    return (np.zeros(0, int), *keep[1:]) if keep else keep
