"""Networks that cannot be cut exactly, refused with what is in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.traced_network import TracedNetwork
from dagjax.graph.core.network import Network
from dagjax.graph.tracing.as_dag import graph_of
from dagjax.jaxprs.primitives import primitives_with

_RANDOM = primitives_with(kind="random")


def refuse_training(net: Network) -> None:
    """A network that updates its state, as batch norm in training mode does.

    Raises:
        CompactionError: It names the state and the arcs.
    """
    if updated := net.updated_state:
        raise CompactionError(
            f"{_reader(net, updated)} updates the state {', '.join(updated[:4])} in "
            "each call: batch norm or dropout in training mode, which a cut would "
            "change. Trace the network in inference mode (model.eval(), train=False) "
            "and compact that"
        )


def _reader(net: Network, paths: Sequence[str]) -> str:
    """The arc in whose name the state lies."""
    arcs = [arc.name for arc in graph_of(net).arcs]
    named = [arc for arc in arcs if any(_inside(path, arc) for path in paths)]
    return f"the arc {named[0]!r}" if named else "the network"


def _inside(path: str, arc: str) -> bool:
    return path.startswith(f"{arc}/") or f"/{arc}/" in f"/{path}"


def refuse_random(source: TracedNetwork, masks: list[Any]) -> None:
    """A unit that is masked, along an axis that random numbers are drawn for.

    Raises:
        CompactionError: It names where they are drawn.
    """
    channels = source.channels
    if not any(step.name in _RANDOM for step in source.body.walk()):
        return
    for var, mask in zip(source.body.invars, masks, strict=False):
        if mask is None:
            continue
        for axis, labels in enumerate(channels.at[var]):
            others = tuple(d for d in range(mask.ndim) if d != axis)
            gone = labels[~np.asarray(mask).any(others)]
            pinned = gone[channels.classes.of[gone] == channels.classes.pinned]
            for reason in channels.reasons(pinned):
                if reason and reason.step and reason.step.name in _RANDOM:
                    raise CompactionError(
                        f"random numbers are drawn{reason.step.where} along an axis "
                        "that the mask cuts (dropout in training mode): with fewer "
                        "channels others would be drawn. Trace the network in "
                        "inference mode (model.eval(), train=False)"
                    )
