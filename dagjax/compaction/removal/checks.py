"""Networks that cannot be cut exactly, refused with what is in the way."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.traced_network import TracedNetwork
from dagjax.graph.core.dag import DAG
from dagjax.jaxprs.primitives import primitives_with

_RANDOM = primitives_with(kind="random")


def refuse_training(net: Any) -> None:
    """A network that updates its state, as batch norm in training mode does.

    Raises:
        CompactionError: It names the state and the arcs.
    """
    program = (
        getattr(net.graph.signature, "program", None) if isinstance(net, DAG) else None
    )
    if program is None or program.base.new_state is None:
        return
    plan, slots = program.base, program.base.slots
    old = {slot.place: slot.path for slot in slots.values() if slot.tree == "user"}
    updated = [
        old[place]
        for place, atom in enumerate(plan.state_outvars)
        if not (atom in plan.state_values and atom in slots)
        and jnp.issubdtype(atom.aval.dtype, jnp.inexact)  # counts of keys may go on
    ]
    if updated:
        arcs = _arcs(net, updated)
        raise CompactionError(
            f"{arcs} updates the state {', '.join(updated[:4])} in each call: batch "
            "norm or dropout in training mode, which a cut would change. Trace the "
            "network in inference mode (model.eval(), train=False) and compact that"
        )


def _arcs(net: DAG, updated: list[str]) -> str:
    """The arcs in whose names the state lies."""
    named = [a.name for a in net.graph.arcs if any(_inside(p, a.name) for p in updated)]
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
