"""A run folder, and the tickets in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.experiments.granularity import GRANULARITIES
from dagjax.experiments.model import Model
from dagjax.experiments.result import Settings
from dagjax.experiments.store import Store, StoreError
from dagjax.experiments.train import Trained, network
from dagjax.graph.core.dag import DAG
from dagjax.sparsity import masks
from dagjax.types import Mask

TICKETS = "tickets"  # the folder of trained tickets in a run folder


class Ticket(NamedTuple):
    """A trained network, what its mask keeps, and where it is from."""

    dag: DAG
    mask: Mask
    seed: int
    round: int
    density: float

    @property
    def masked(self) -> DAG:
        """The network with zeros where the mask is False."""
        return self.dag.replace(params=masks.apply(self.mask, self.dag.params))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of units or weights, and which seed and round are asked for."""

    folder: Path
    record: Settings
    seed: int
    round: int

    @property
    def settings(self) -> Settings:
        """What was run."""
        return self.record["settings"]

    @property
    def index(self) -> int:
        """Of the seed among all."""
        return self.seed - self.settings["first_seed"]

    def example(self) -> jax.Array:
        """A batch of one example, zeros."""
        inputs = self.record["inputs"]
        return jnp.zeros((1, *inputs["shape"]), inputs["dtype"])

    def ticket(self, model: Model) -> Ticket:
        """The trained ticket.

        Raises:
            StoreError: If the files are not those of this network.
        """
        theta, state, outputs = model.shapes(self.example())
        full = GRANULARITIES[self.settings["prune"]].full
        like = jax.eval_shape(lambda t: full(t, outputs.shape[-1]), theta)
        saved = Store(self.folder).load("masks", like)
        mask = jax.tree.map(lambda m: m[self.round, self.index], saved)["params"]
        store, name = Store(self.folder / TICKETS), f"round-{self.round}"
        saved = store.load(name, Trained(theta, state))
        at = jax.tree.map(lambda x: jnp.asarray(x[self.index]), saved)
        dag = network(model, at, self.example())
        density = self.settings["densities"][self.round - 1]
        return Ticket(dag, mask, self.seed, self.round, density)


def open_run(folder: Path, seed: int | None = None, number: int | None = None) -> Run:
    """A run folder, checked, as `dagjax lottery` or `dj.lottery(out=...)` writes them.

    Without a seed the first one, without a number the last round.

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
    return _chosen(folder, record, seed, number)


def _chosen(
    folder: Path, record: Settings, seed: int | None, number: int | None
) -> Run:
    settings = record["settings"]
    first, count = settings["first_seed"], settings["seeds"]
    rounds = len(settings["densities"])
    seed = int(first if seed is None else seed)
    number = rounds if number is None else number
    if not first <= seed < first + count:
        raise StoreError(f"seed {seed}: {folder} has {first} to {first + count - 1}")
    if not 1 <= number <= rounds:
        raise StoreError(f"round {number}: {folder} has 1 to {rounds} (0 is dense)")
    if not (folder / TICKETS / f"round-{number}.npz").exists():
        raise StoreError(
            f"{folder} holds no trained tickets of round {number}: dagjax lottery "
            "keeps those of the last round, and with --keep all those of every round"
        )
    return Run(folder, record, seed, number)


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
