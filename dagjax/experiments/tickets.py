"""A ticket of a run folder: read, cut out, written as files for other programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.traced_network import example_of
from dagjax.compaction.export.cost import cost
from dagjax.compaction.export.saving import load, save
from dagjax.compaction.removal.compact import Compacted, compact
from dagjax.compaction.removal.index import Index
from dagjax.experiments.cutout import network
from dagjax.experiments.granularity import GRANULARITIES
from dagjax.experiments.model import Model
from dagjax.experiments.store import Store, StoreError
from dagjax.experiments.train import Trained
from dagjax.graph.core.dag import DAG, count_params
from dagjax.graph.tracing.naming import path_of
from dagjax.sparsity import masks

TICKETS = "tickets"  # the folder of trained tickets in a run folder
_TOLERANCE = 1e-4  # of the largest output


class Ticket(NamedTuple):
    """A trained network, what its mask keeps, and where it is from."""

    dag: DAG
    mask: Any
    seed: int
    round: int
    density: float

    @property
    def masked(self) -> DAG:
        """The network with zeros where the mask is False."""
        return self.dag.replace(params=masks.apply(self.mask, self.dag.params))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of units or weights.

    Args:
        folder: Where it lies.
        record: What its `run.json` holds.
        seed: The number of the seed that is asked for.
        round: The number of the round.
    """

    folder: Path
    record: dict[str, Any]
    seed: int
    round: int

    @property
    def settings(self) -> dict[str, Any]:
        """What was run."""
        return self.record["settings"]

    @property
    def place(self) -> int:
        """Of the seed among all."""
        return self.seed - self.settings["first_seed"]

    def example(self) -> jax.Array:
        """A batch of one example, zeros."""
        inputs = self.record["inputs"]
        return jnp.zeros((1, *inputs["shape"]), inputs["dtype"])

    def ticket(self, model: Model) -> Ticket:
        """The trained ticket.

        Args:
            model: The network that was trained.

        Raises:
            StoreError: If the files are not those of this network.
        """
        theta, state, outputs = model.shapes(self.example())
        full = GRANULARITIES[self.settings["prune"]].full
        like = jax.eval_shape(lambda t: full(t, outputs.shape[-1]), theta)
        held = Store(self.folder).load("masks", like)
        mask = jax.tree.map(lambda m: m[self.round, self.place], held)["params"]
        store, name = Store(self.folder / TICKETS), f"round-{self.round}"
        held = store.load(name, Trained(theta, state))
        at = jax.tree.map(lambda x: jnp.asarray(x[self.place]), held)
        dag = network(model, at, self.example())
        density = self.settings["densities"][self.round - 1]
        return Ticket(dag, mask, self.seed, self.round, density)


def open_run(folder: Path, seed: int | None = None, number: int | None = None) -> Run:
    """A run folder, checked.

    Args:
        folder: Written by `dagjax lottery`, or by `dj.lottery` with `out=`.
        seed: The number of a seed; None: the first one.
        number: The number of a round, from 1 on; None: the last one.

    Raises:
        StoreError: If it is no such folder, or has no such ticket.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; dagjax lottery writes run folders")
    record = Store(folder).read_json("run")
    if not record or "settings" not in record:
        raise StoreError(f"{folder} holds no run.json: it is not a run folder")
    if not record.get("finished"):
        raise StoreError(
            f"{folder} is not finished: the same dagjax lottery with --resume goes on"
        )
    if not (folder / "masks.npz").exists():
        raise StoreError(f"{folder} holds no masks.npz: there is no ticket to cut out")
    if record["settings"]["prune"] == "arcs":
        raise StoreError(_arcs(folder))
    return _found(folder, record, seed, number)


def _found(folder: Path, record: Any, seed: int | None, number: int | None) -> Run:
    settings = record["settings"]
    first, count = settings["first_seed"], settings["seeds"]
    rounds = len(settings["densities"])
    who = first if seed is None else seed
    which = rounds if number is None else number
    if not first <= who < first + count:
        raise StoreError(f"seed {who}: {folder} has {first} to {first + count - 1}")
    if not 1 <= which <= rounds:
        raise StoreError(f"round {which}: {folder} has 1 to {rounds} (0 is dense)")
    if not (folder / TICKETS / f"round-{which}.npz").exists():
        raise StoreError(
            f"{folder} holds no trained tickets of round {which}: dagjax lottery "
            "keeps those of the last round, and with --keep all those of every round"
        )
    return Run(folder, record, who, which)


def _arcs(folder: Path) -> str:
    """A run of gates: there is nothing to cut out of arrays."""
    with np.load(folder / "masks.npz", allow_pickle=False) as file:
        closed = [
            key.split("'")[-2] for key in file.files if not file[key][-1, 0].all()
        ]
    return (
        f"{folder} pruned arcs, and an arc goes as a whole: dj.delete(dag, "
        f"{closed}) takes those of the first seed's last ticket out of the graph; "
        "runs with --prune units are cut out of arrays"
    )


# --- cutting out ----------------------------------------------------------------------


def cut_ticket(ticket: Ticket, prune: str) -> Compacted:
    """Compact a ticket, held against the masked network.

    Args:
        ticket: The ticket.
        prune: What was pruned.

    Raises:
        StoreError: If it has single weights pruned; the message says what could go.
    """
    made = compact(ticket.dag, ticket.mask)
    if prune == "units":
        return made
    whole, left = count_params(ticket.dag.params), count_params(made.net.params)
    zeros = sum(int((~np.asarray(m)).sum()) for m in jax.tree.leaves(ticket.mask))
    raise StoreError(
        f"this run pruned single weights: {zeros:,} of {whole:,} parameters are zero, "
        f"but only {whole - left:,} of them lie in whole units that could be cut out; "
        "dj.trim and dj.sparsify are for the rest, and --prune units makes tickets "
        "that are cut out"
    )


def write(
    ticket: Ticket, made: Compacted, out: Path, batch_sizes: Sequence[int] = (1, 8)
) -> str:
    """Write the network, its parameters, the index and the table of costs.

    Args:
        ticket: The ticket.
        made: The ticket, cut out.
        out: The folder, made where it is missing.
        batch_sizes: Those that the network is compiled and timed for.

    Returns:
        The table.

    Raises:
        StoreError: If the file of the network gives other outputs than the network.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = save(made.net, out / "network.zip", batch_sizes=batch_sizes)
    gap = max(_held_against(file, ticket, n) for n in batch_sizes)
    _write_params(made.net.params, out)
    np.savez_compressed(out / "index.npz", **kept_indices(made.index))
    text = _table(ticket, made, batch_sizes, gap)
    (out / "cost.txt").write_text(text + "\n")
    return text


def kept_indices(index: Index) -> dict[str, Any]:
    """`{path:axis: indices}`: which entries of every parameter were kept."""
    numbered = index.tree.unflatten(range(index.tree.num_leaves))
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(numbered)]
    return {
        f"{name}:{axis}": np.arange(size) if kept is None else np.asarray(kept)
        for name, shape, keep in zip(names, index.shapes, index.keeps, strict=True)
        for axis, (size, kept) in enumerate(zip(shape, keep, strict=True))
    }


def _write_params(params: Any, out: Path) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named: dict[str, Any] = {
        path_of(path): np.ascontiguousarray(x) for path, x in leaves
    }
    try:
        from safetensors.numpy import save_file
    except ImportError:
        np.savez(out / "params.npz", **named)
    else:
        save_file(named, out / "params.safetensors")


def _held_against(file: Path, ticket: Ticket, batch: int) -> float:
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


def _table(ticket: Ticket, made: Compacted, batch_sizes: Any, gap: float) -> str:
    """Costs of the masked network and of what is left, at every batch size."""
    lines = [
        f"seed {ticket.seed}, round {ticket.round}, density {ticket.density:.3g}; "
        f"outputs as those of the masked network up to {gap:.0e}"
    ]
    for batch in batch_sizes:
        costs = cost(ticket.masked, made.net, batch=batch)
        lines += ["", f"batch {batch}, on {jax.devices()[0].device_kind}", repr(costs)]
    if folded := len(jax.tree.leaves(made.net.state["folded"])):
        lines += ["", f"constants of dead units: {folded}, in network.zip only"]
    return "\n".join(lines)
