"""The options of the commands, and the run folder that is named after them."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Lottery:
    """Run a lottery-ticket experiment and give the verdict.

    Every option has a default: `dagjax lottery` alone runs on the embedded digits.
    """

    net: str = "lenet-300-100"
    """A net of `dagjax list`, or package.module:factory of your own."""
    data: str = "digits"
    """digits, fashion-mnist, a folder of IDX files, file.npz, or module:factory."""
    seeds: int = 10
    """How many seeds."""
    rounds: int = 4
    """Train-prune-rewind rounds, in geometric steps down to the density."""
    density: float = 0.2
    """Kept share after the last round, in (0, 1]."""
    prune: str = "weights"
    """weights, units (neurons, channels) or arcs (branches and skips)."""
    score: str | None = None
    """magnitude, taylor, gate or random; by default what fits --prune."""
    controls: str = "random,fresh,transfer,narrow"
    """Controls, separated by commas; none for no controls."""
    rewind: int = 0
    """Steps of dense training before the point that tickets go back to."""
    steps: int = 1000
    """Optimizer steps of one training."""
    batch: int = 60
    """Examples a step."""
    eval_size: int = 2000
    """Training examples that losses and scores are taken on."""
    lr: float = 1.2e-3
    """Learning rate."""
    optimizer: str = "adam"
    """adam, adamw, sgd, momentum or nesterov."""
    schedule: str = "constant"
    """Of the learning rate: constant, linear, cosine or warmup-cosine."""
    margin: float | None = None
    """Training loss that "on par" tolerates; by default 1 percent of chance."""
    device: str = "auto"
    """auto, cpu, gpu or tpu."""
    seed0: int = 0
    """Number of the first seed."""
    compact: bool = True
    """Cut the last ticket of units out and train it, for the time that it saves."""
    compact_seeds: int = 1
    """For how many seeds."""
    keep: str = "last"
    """The trained tickets of which rounds are kept: last or all."""
    out: Path | None = None
    """Run folder; by default runs/NET-DATA-PRUNE and what is not the default."""
    resume: bool = False
    """Go on with what lies in the run folder."""


@dataclasses.dataclass(frozen=True)
class Compact:
    """Cut a ticket of units out of its network, and write the smaller network.

    network.zip is StableHLO with its arrays (dj.load, or jax.export without dagjax).
    """

    run: Path
    """A run folder, written by `dagjax lottery --prune units`."""
    seed: int | None = None
    """Number of the seed; by default the first."""
    round: int | None = None
    """Number of the round, from 1 on; by default the last."""
    net: str | None = None
    """package.module:factory of the network, for runs that Python started."""
    out: Path | None = None
    """Folder to write; by default compact-seedN-roundR in the run folder."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Batch sizes that the network is compiled for."""
    device: str = "auto"
    """auto, cpu, gpu or tpu."""


@dataclasses.dataclass(frozen=True)
class Show:
    """Print a net as a table and draw it by levels."""

    net: str = "resnet20"
    """A net of `dagjax list`, or package.module:factory of your own."""
    out: Path | None = None
    """PNG or SVG file; by default NET.png in this folder."""


@dataclasses.dataclass(frozen=True)
class List:
    """List nets, data, scores, optimizers."""


def run_name(options: Lottery) -> str:
    """A folder for these options: net, data, prune, and what is not the default.

    Example:
        >>> run_name(Lottery(steps=300))
        'lenet-300-100-digits-weights-steps300'
    """
    apart = ("net", "data", "prune", "device", "controls", "out", "resume",
             "compact", "compact_seeds", "keep")  # fmt: skip
    changed = [
        f"{field.name}{getattr(options, field.name)}"
        for field in dataclasses.fields(options)
        if field.name not in apart and getattr(options, field.name) != field.default
    ]
    return "-".join([slug(options.net, options.data, options.prune), *changed])


def slug(*names: str) -> str:
    """Names as one file name, without endings."""
    parts = (Path(name.replace(":", "-")).stem for name in names)
    return "-".join(parts)
