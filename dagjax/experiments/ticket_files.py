"""A ticket cut out and written as files for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.traced_network import example_of
from dagjax.compaction.export.cost import cost
from dagjax.compaction.export.saving import load, save
from dagjax.compaction.removal.compact import Compacted, compact
from dagjax.compaction.removal.index import Index
from dagjax.experiments.run_folder import Ticket
from dagjax.experiments.store import StoreError
from dagjax.graph.core.dag import count_params
from dagjax.graph.tracing.naming import path_of
from dagjax.types import Params

_TOLERANCE = 1e-4  # of the largest output


def cut_ticket(ticket: Ticket, prune: str) -> Compacted:
    """Compact a ticket, held against the masked network.

    Raises:
        StoreError: If single weights are pruned; the message says what could go.
    """
    small = compact(ticket.dag, ticket.mask)
    if prune == "units":
        return small
    before, after = count_params(ticket.dag.params), count_params(small.net.params)
    zeros = sum(int((~np.asarray(m)).sum()) for m in jax.tree.leaves(ticket.mask))
    raise StoreError(
        f"this run pruned single weights: {zeros:,} of {before:,} parameters are zero, "
        f"but only {before - after:,} of them lie in whole units that could be cut "
        "out; dj.trim and dj.sparsify are for the rest, and --prune units makes "
        "tickets that are cut out"
    )


def write(
    ticket: Ticket, small: Compacted, out: Path, batch_sizes: Sequence[int] = (1, 8)
) -> str:
    """Write the network, its parameters, the index and the table of costs.

    Returns the table; the network is compiled and timed for the batch sizes.

    Raises:
        StoreError: If the file of the network gives other outputs than the network.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = save(small.net, out / "network.zip", batch_sizes=batch_sizes)
    gap = max(_difference(file, ticket, n) for n in batch_sizes)
    _write_params(small.net.params, out)
    np.savez_compressed(out / "index.npz", **kept_indices(small.index))  # pyright: ignore
    text = _table(ticket, small, batch_sizes, gap)
    (out / "cost.txt").write_text(text + "\n")
    return text


def kept_indices(index: Index) -> dict[str, np.ndarray]:
    """`{path:axis: indices}`: which entries of every parameter were kept."""
    numbered = index.tree.unflatten(range(index.tree.num_leaves))
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(numbered)]
    return {
        f"{name}:{axis}": np.arange(size) if kept is None else np.asarray(kept)
        for name, shape, keep in zip(names, index.shapes, index.keeps, strict=True)
        for axis, (size, kept) in enumerate(zip(shape, keep, strict=True))
    }


def _write_params(params: Params, out: Path) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {path_of(path): np.ascontiguousarray(x) for path, x in leaves}
    try:
        from safetensors.numpy import save_file
    except ImportError:
        np.savez(out / "params.npz", **named)  # pyright: ignore[reportArgumentType]
    else:
        save_file(named, out / "params.safetensors")


def _difference(file: Path, ticket: Ticket, batch: int) -> float:
    """The largest difference of the file's outputs and the masked network's."""
    (example,) = example_of(ticket.dag)
    shape = (batch, *example.shape[1:])
    x = jax.random.normal(jax.random.key(batch), shape)
    x = x.astype(example.dtype) if example.dtype.kind == "f" else jnp.zeros(shape, int)
    ours, theirs = np.asarray(load(file)(x)), np.asarray(ticket.masked(x))
    gap = float(np.abs(ours - theirs).max())
    if not gap <= _TOLERANCE * max(float(np.abs(theirs).max()), 1e-30):
        raise StoreError(f"{file} differs from the masked ticket by {gap:.1e}")
    return gap


def _table(
    ticket: Ticket, small: Compacted, batch_sizes: Sequence[int], gap: float
) -> str:
    """Costs of the masked network and of what is left, at every batch size."""
    lines = [
        f"seed {ticket.seed}, round {ticket.round}, density {ticket.density:.3g}; "
        f"outputs as those of the masked network up to {gap:.0e}"
    ]
    for batch in batch_sizes:
        costs = cost(ticket.masked, small.net, batch=batch)
        lines += ["", f"batch {batch}, on {jax.devices()[0].device_kind}", repr(costs)]
    if folded := len(jax.tree.leaves(small.net.state["folded"])):
        lines += ["", f"constants of dead units: {folded}, in network.zip only"]
    return "\n".join(lines)
