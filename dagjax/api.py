"""The front door: from a network and data to a verdict, in one call."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import operator
import os
import platform
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dagjax.experiments.controls import CONTROLS, Controls, narrowed
from dagjax.experiments.cutout import CutOut, cut_out
from dagjax.experiments.examples import Data, check
from dagjax.experiments.experiment import Experiment, Report, Setup
from dagjax.experiments.granularity import GRANULARITIES, check_densities, make_pruner
from dagjax.experiments.model import Model, as_model
from dagjax.experiments.optimizers import make_tx
from dagjax.experiments.result import Record, Settings, table
from dagjax.experiments.run_folder import TICKETS
from dagjax.experiments.seeds import make_keys
from dagjax.experiments.store import Store, check_same
from dagjax.experiments.tasks import (
    Objective,
    check_fit,
    default_margin,
    output_shape,
    task_of,
)
from dagjax.experiments.train import TrainConfig, Trained
from dagjax.graph.core.network import Network
from dagjax.graph.core.topology import Graph
from dagjax.jaxprs.fingerprint import pattern_of
from dagjax.report import drawing, figures
from dagjax.types import Mask, Params

DENSITIES = (0.67, 0.45, 0.3, 0.2)


@dataclasses.dataclass(frozen=True)
class Result:
    """What `lottery` found.

    Args:
        record: All figures and masks.
        model: The network.
        seconds: Wall time of this call.
        inputs: The shape of one example.
        tickets: The tickets of the rounds that were kept, trained: `{round: Trained}`,
            `[seed, ...]`.
        compacted: What cutting out the last ticket saves, if units were pruned.
    """

    record: Record
    model: Model
    seconds: float
    inputs: jax.ShapeDtypeStruct
    tickets: dict[int, Trained]
    compacted: CutOut | None = None

    @property
    def masks(self) -> Mask:
        """The tickets' masks `{"params": ..., "gates": ...}`, `[round, seed, ...]`."""
        return self.record.masks

    def table(self) -> str:
        """Each arm at each density, and the verdict, as text."""
        text = table(self.record)
        return f"{text}\n{self.compacted.sentence()}" if self.compacted else text

    def verdict(self) -> str:
        """The verdict in one sentence."""
        return self.record.sentence()

    def plot(self) -> Any:
        """Test metric against density, with intervals over seeds (matplotlib)."""
        return figures.accuracy(self.record)

    def figures(self) -> dict[str, Any]:
        """All figures: `accuracy`, `curves`, `masks`, `graph`."""
        last = jax.tree.map(lambda m: m[-1, 0], self.masks)
        shares = drawing.arc_shares(self.model.graph, last)
        return {
            "accuracy": figures.accuracy(self.record),
            "curves": figures.curves(self.record),
            "masks": figures.mask_pictures(self.record),
            "graph": drawing.draw(self.model.graph, shares),
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `run.json`, arrays, masks, tickets, `table.txt` and the figures.

        Args:
            folder: Made where it is missing.

        Returns:
            The folder.
        """
        store = Store(folder)
        store.save("arrays", self.record.arrays())
        store.save("masks", self.masks)
        for i, trained in self.tickets.items():
            Store(Path(folder) / TICKETS).save(f"round-{i}", trained)
        store.write_json("run", describe_run(self))
        folder = Path(folder)
        (folder / "table.txt").write_text(self.table() + "\n")
        for name, figure in self.figures().items():
            figure.savefig(folder / f"{name}.png", dpi=150)
        return folder

    def __repr__(self) -> str:
        return f"Result({self.verdict()})"


def lottery(
    net: Network,
    data: Data | Sequence[Any],
    *,
    loss: Objective | None = None,
    metric: Objective | None = None,
    seeds: int = 10,
    densities: Sequence[float] = DENSITIES,
    prune: str = "weights",
    score: str | None = None,
    controls: Sequence[str] = CONTROLS,
    rewind: int = 0,
    steps: int = 1000,
    batch: int = 60,
    eval_every: int | None = None,
    eval_size: int = 2000,
    optimizer: str = "adam",
    learning_rate: float | optax.Schedule = 1.2e-3,
    schedule: str = "constant",
    margin: float | None = None,
    first_seed: int = 0,
    compact: bool = True,
    compact_seeds: int = 1,
    keep: str = "last",
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_round: Callable[[Report], None] | None = None,
    on_chunk: Callable[[float, int], None] | None = None,
) -> Result:
    """Run a lottery-ticket experiment on your own network and data.

    Train, prune, rewind, train again, over many seeds; compare every ticket with the
    dense network and with controls, and give the verdict on the weak lottery-ticket
    hypothesis: training performance on par within as many steps or fewer.

    Args:
        net: A graph, a Flax Linen module or a pair `(init, apply)`.
        data: `(x_train, y_train, x_test, y_test)`, first axis examples. Integer targets
            are classes `[N]` or tokens `[N, T]`, float targets are regressed.
        loss: `(outputs, targets) -> values`, averaged; None: from the targets.
        metric: Likewise, higher is better; None: accuracy, or the negative error. One
            number (F1, AUC) is taken of all test examples at once.
        seeds: How many seeds.
        densities: Falling kept shares, one round each.
        prune: `weights`, `units` (neurons, channels) or `arcs` (branches and skips).
        score: `magnitude`, `taylor`, `gate` or `random`; None: what fits `prune`.
        controls: Of `random`, `fresh`, `transfer` and `narrow`.
        rewind: Steps of dense training before the point that tickets go back to.
        steps: Optimizer steps of one training.
        batch: Examples a step.
        eval_every: Steps between evaluations of the training loss; None: about 50.
        eval_size: Training examples that losses and scores are taken on, a fixed sample
            of all.
        optimizer: `adam`, `adamw`, `sgd`, `momentum` or `nesterov`.
        learning_rate: At the start, or an optax schedule `step -> rate`.
        schedule: Of the learning rate: `constant`, `linear`, `cosine`, `warmup-cosine`.
        margin: Training loss that "on par" tolerates, fixed in advance; None: 1 percent
            of the loss of the best constant output.
        first_seed: Number of the first seed.
        compact: Whether the last ticket of units is cut out and trained once more, for
            the time that it saves: `result.compacted`.
        compact_seeds: For how many seeds; each has a mask of its own.
        keep: The trained tickets of which rounds are kept, `last` or `all`.
        out: Folder for a saved state after every round, and for the results.
        resume: Go on with what lies in `out`.
        on_round: Told a `Report` after every round.
        on_chunk: Told `(rounds done, rounds in all)` after every chunk of training.

    Returns:
        A result with `.table()`, `.plot()`, `.masks`, `.save(folder)`.

    Raises:
        ValueError: An option that does not fit; the message says what is allowed.

    Example:
        >>> import dagjax as dj
        >>> data = dj.data.teacher(n_train=64, n_test=16)
        >>> result = dj.lottery(dj.zoo.mlp((8, 1)), data, seeds=2, densities=[0.5],
        ...                     steps=20, batch=16, controls=["random"])
        >>> result.masks["params"]["fc1"]["Dense"]["kernel"].shape
        (2, 2, 16, 8)
    """
    begun = time.perf_counter()
    seeds, steps, batch = map(
        _count, ("seeds", "steps", "batch"), (seeds, steps, batch)
    )
    compact_seeds = _count("compact_seeds", compact_seeds)
    rewind = _count("rewind", rewind, 0)
    first_seed = _count("first_seed", first_seed, 0)
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin {margin}: expected at least 0")
    if keep not in ("last", "all"):
        raise ValueError(f"keep {keep!r}: expected last or all")
    densities = np.atleast_1d(densities).tolist()
    data = check(data if isinstance(data, tuple) else tuple(data))  # pyright: ignore
    config = TrainConfig(steps, batch, eval_every or _divisor(steps), eval_size)
    model = as_model(net, gated=prune == "arcs")
    task = task_of(data, loss, metric, output_shape(model, data))
    check_fit(task, model, data)
    pruner = make_pruner(prune, score, model, task)
    check_densities(densities, prune, model, data.x_train[:1])
    tx = make_tx(optimizer, learning_rate, schedule, steps)
    value = None if callable(learning_rate) else learning_rate
    setup = Setup(config, model, task, tx, pruner, prune, rewind, value)
    controls = _feasible(controls, setup, data, seeds)
    settings = {
        "net": describe_net(net, model),
        "data": _fingerprint(data),
        "prune": prune,
        "score": score or GRANULARITIES[prune].scores[0],
        "seeds": seeds,
        "first_seed": first_seed,
        "densities": [float(d) for d in densities],
        "rewind": rewind,
        **dataclasses.asdict(config),
        "optimizer": optimizer,
        "learning_rate": _name(learning_rate) if value is None else value,
        "schedule": schedule,
        "loss": _name(task.loss),
        "metric": _name(task.metric),
        "program": program_of_run(setup, data),
        "margin": default_margin(task.loss, data) if margin is None else margin,
    }
    rounds = 1 + len(densities) * (1 + len(controls))
    progress = _Progress(rounds, on_chunk)

    def finished_round(report: Report) -> None:
        progress.finished(report.done)
        if on_round is not None:
            on_round(report)

    experiment = Experiment(
        setup, make_keys(seeds, first_seed), data, densities,
        _open(out, settings, resume), finished_round, progress, len(controls),
        tickets=_tickets(out, resume), keep=keep,
    )  # fmt: skip
    tickets = experiment.rounds()
    ablations = Controls(experiment, tickets)
    finished = {name: ablations.run(name) for name in controls}
    record = experiment.record(tickets, finished, settings)
    cut = None
    if compact and prune == "units":
        cut = cut_out(experiment, tickets, first_seed, compact_seeds)
    seconds, x = time.perf_counter() - begun, data.x_train
    inputs = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    result = Result(record, model, seconds, inputs, experiment.trained, cut)
    if out is not None:
        result.save(out)
    return result


def describe_run(result: Result) -> dict[str, Any]:
    """Settings, machine, versions, time and the table, as JSON values."""
    verdicts, cut = result.record.verdicts(), result.compacted
    return {
        "finished": True,
        "settings": result.record.settings,
        "verdict": result.verdict(),
        "verdicts": {str(d): dataclasses.asdict(v) for d, v in verdicts.items()},
        "table": [row._asdict() for row in result.record.rows()],
        "compacted": cut and {"said": cut.sentence(), **dataclasses.asdict(cut)},
        "inputs": {
            "shape": list(result.inputs.shape),
            "dtype": str(result.inputs.dtype),
        },
        "seconds": round(result.seconds, 2),
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    packages = ("dagjax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def describe_net(net: Network, model: Model) -> str:
    """The network in a line, with a number that changes when the network does."""
    text = "; ".join(map(repr, model.graph.arcs))
    name = net if isinstance(net, Graph) else type(net).__name__
    return f"{name!r} #{zlib.crc32(text.encode()):08x}"[-200:]


def program_of_run(setup: Setup, data: Data) -> str:
    """A hash of what is computed: network, loss, metric, optimizer, as they are traced.

    Names do not tell an edited function from the one that a run was started with.

    Args:
        setup: The experiment.
        data: The data.
    """
    model, task, tx = setup.model, setup.task, setup.tx
    x, y = jnp.asarray(data.x_train[:2]), jnp.asarray(data.y_train[:2])

    def run(key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        theta, state = model.init(key, x)

        def loss(params: Params) -> jax.Array:
            at = {**theta, "params": params}
            outputs = model.apply(at, state, x, train=True, key=key)[0]
            return jnp.mean(task.loss(outputs, y))

        grads = jax.grad(loss)(theta["params"])
        updates = tx.update(grads, tx.init(theta["params"]), theta["params"])
        outputs = model.apply(theta, state, x)[0]
        return updates, task.loss(outputs, y), task.metric(outputs, y)

    return pattern_of(jax.make_jaxpr(run)(jax.random.key(0), x, y))


def _fingerprint(data: Data) -> str:
    crc = 0
    for x in data:
        crc = zlib.crc32(np.ascontiguousarray(x).tobytes(), crc)
    return f"{list(data.x_train.shape)} + {list(data.x_test.shape)} #{crc:08x}"


def _open(
    out: str | os.PathLike[str] | None, settings: Settings, resume: bool
) -> Store:
    """The store of finished rounds; emptied unless the run is to go on."""
    if out is None:
        return Store(None)
    folder, rounds = Store(out), Store(Path(out) / "rounds")
    before = folder.read_json("run")
    if before:  # results of other settings are neither mixed in nor overwritten
        check_same(before.get("settings", {}), settings, out)
    if not (resume and before):
        rounds.clear()
        folder.write_json("run", {"finished": False, "settings": settings})
    return rounds


def _tickets(out: str | os.PathLike[str] | None, resume: bool) -> Store:
    """The store of trained tickets; emptied unless the run is to go on."""
    store = Store(None if out is None else Path(out) / TICKETS)
    if not resume:
        store.clear()
    return store


def _feasible(
    controls: Sequence[str], setup: Setup, data: Data, seeds: int
) -> tuple[str, ...]:
    """The controls that this network and this number of seeds allow."""
    if unknown := [name for name in controls if name not in CONTROLS]:
        raise ValueError(
            f"no control named {unknown[0]!r}; controls are {', '.join(CONTROLS)}"
        )
    left_out = {}
    if seeds < 2:
        left_out["transfer"] = "it needs two seeds"
    try:
        narrowed(setup, 1, data)
    except Exception as error:  # whatever a module says to an odd width
        left_out["narrow"] = str(error).strip().splitlines()[0]
    for name, why in left_out.items():
        if name in controls:
            warnings.warn(f"the control {name!r} is left out: {why}", stacklevel=3)
    return tuple(name for name in dict.fromkeys(controls) if name not in left_out)


class _Progress:
    """Counts rounds over the whole experiment, with the share of the one that runs."""

    def __init__(self, total: int, callback: Callable[[float, int], None] | None):
        self.total, self.callback = total, callback
        self.done = self.share = 0.0

    def __call__(self, share: float) -> None:
        self.share = min(self.share + share, 1.0)
        self._report()

    def finished(self, rounds: int) -> None:
        self.done, self.share = rounds, 0.0
        self._report()

    def _report(self) -> None:
        if self.callback is not None:
            self.callback(self.done + self.share, self.total)


def _count(name: str, value: int, least: int = 1) -> int:
    """An integer of Python, numpy or jax as one of Python."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**31:
        raise ValueError(f"{name} {value}: expected at least {least}, an integer")
    return number


def _divisor(steps: int) -> int:
    """The step between evaluations: the largest divisor that gives at least 50."""
    return next(n for n in range(max(1, steps // 50), 0, -1) if steps % n == 0)


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
