"""The command line: `dagjax lottery`, `compact`, `show`, `list`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

_EXTRAS = "the command line needs more packages: pip install 'dagjax[all]'"
MIN_ACCURACY = {"digits": 0.96}  # a dense net below this was not trained properly


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


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; None: those of the process.
    """
    try:
        import tyro
    except ImportError:
        sys.exit(f"dagjax: {_EXTRAS}")
    commands = (
        Annotated[Lottery, tyro.conf.subcommand("lottery", prefix_name=False)]
        | Annotated[
            Compact,
            tyro.conf.subcommand("compact", prefix_name=False),
            tyro.conf.PositionalRequiredArgs,
        ]
        | Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)]
        | Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
    )
    parse = functools.partial(
        tyro.cli,
        commands,  # pyright: ignore[reportArgumentType]
        args=args,
        prog="dagjax",
        description="Networks as DAGs of functions; pruning; lottery tickets.",
    )
    options = _one_line(parse)
    run = {
        Lottery: run_lottery, Compact: run_compact, Show: run_show, List: run_list,
    }[type(options)]  # fmt: skip
    try:
        run(options)
    except KeyboardInterrupt:
        sys.exit("dagjax: stopped; the same command with --resume goes on")
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("DAGJAX_TRACEBACK"):
            raise
        print(f"dagjax: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _one_line(parse: Callable[[], Any]) -> Any:
    """Parse options; of a complaint keep the first paragraph, without its box."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        rows = [row.strip("│ ") for row in said.getvalue().splitlines()]
        rows = [row for row in rows if not row.startswith(("╭", "╰"))]
        text = itertools.takewhile(lambda row: row.strip("─"), rows)
        if stop.code:
            print("dagjax:", *text, "(dagjax --help)", file=sys.stderr)
        raise


def run_lottery(options: Lottery) -> None:
    """`dagjax lottery`."""
    set_up_jax(options.device)
    from rich.console import Console

    from dagjax import api
    from dagjax.report.terminal import Follower, print_result

    console = Console()
    data = load_data(options.data)
    net = load_net(options.net, data)
    out = options.out or Path("runs") / run_name(options)
    with warnings.catch_warnings(), Follower(console) as follower:
        warnings.showwarning = lambda message, *_: console.print(f"note: {message}")
        result = api.lottery(
            net, data,
            seeds=options.seeds, densities=geometric(options.density, options.rounds),
            prune=options.prune, score=options.score,
            controls=_listed(options.controls), rewind=options.rewind,
            steps=options.steps, batch=options.batch, optimizer=options.optimizer,
            learning_rate=options.lr, schedule=options.schedule, margin=options.margin,
            first_seed=options.seed0, compact=options.compact,
            compact_seeds=options.compact_seeds, keep=options.keep,
            out=out, resume=options.resume,
            on_round=follower.on_round, on_chunk=follower.on_chunk,
        )  # fmt: skip
    remember(out, options.net, data)
    print_result(console, result, out)
    if result.compacted is not None:
        console.print(result.compacted.sentence(), highlight=False)
    dense = float(result.record.test_metric["dense"].mean())
    if dense < MIN_ACCURACY.get(options.data, -np.inf):
        console.print(
            f"warning: the dense net reaches {dense:.1%} on {options.data}, below "
            f"{MIN_ACCURACY[options.data]:.0%}: train longer, or with another --lr"
        )


def run_compact(options: Compact) -> None:
    """`dagjax compact`."""
    set_up_jax(options.device)
    from dagjax import api
    from dagjax.experiments import tickets
    from dagjax.experiments.model import as_model

    if not options.batch_sizes or min(options.batch_sizes) < 1:
        raise ValueError(f"batch sizes {options.batch_sizes}: expected 1 or more")
    run = tickets.open_run(options.run, options.seed, options.round)
    net = remembered(run.record, options.net)
    model = as_model(net)
    now, before = api.describe_net(net, model), run.settings["net"]
    if now != before:
        raise ValueError(f"the network is {now}, but {before} was trained; see --net")
    ticket = run.ticket(model)
    made = tickets.cut_ticket(ticket, run.settings["prune"])
    name = f"compact-seed{ticket.seed}-round{ticket.round}"
    out = options.out or options.run / name
    print(tickets.write(ticket, made, out, options.batch_sizes))
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def run_show(options: Show) -> None:
    """`dagjax show`."""
    set_up_jax("cpu")
    from dagjax.graph.core.combine import as_graph
    from dagjax.graph.core.show import show
    from dagjax.report import drawing

    graph = as_graph(load_net(options.net, None))
    show(graph)
    out = options.out or Path(f"{_slug(options.net)}.png")
    drawing.draw(graph).savefig(out, dpi=150)
    print(f"drawn to {out}")


def run_list(options: List) -> None:
    """`dagjax list`."""
    del options
    from dagjax.experiments import data
    from dagjax.experiments.granularity import GRANULARITIES
    from dagjax.experiments.optimizers import OPTIMIZERS, SCHEDULES
    from dagjax.experiments.run import BRANCHES
    from dagjax.graph.zoo import NETS

    own = "module:factory"
    for what, names in {
        "nets": [*NETS, own],
        "data": [*data.NAMES, "folder of IDX files", "file.npz", own],
        **{f"scores of {k}": v.scores for k, v in GRANULARITIES.items()},
        "controls": BRANCHES,
        "optimizers": OPTIMIZERS,
        "schedules": SCHEDULES,
    }.items():
        print(f"{what:18}{', '.join(names)}")


def set_up_jax(device: str) -> None:
    """Choose the platform, one host device a core, and the compilation cache.

    Args:
        device: `auto`, `cpu`, `gpu` or `tpu`.

    Raises:
        ValueError: If there is no such kind of device.
    """
    if device not in ("auto", "cpu", "gpu", "tpu"):
        raise ValueError(f"device {device!r}: expected auto, cpu, gpu or tpu")
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dagjax"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"no device of kind {device!r} here; try --device cpu"
        ) from error


def geometric(density: float, rounds: int) -> list[float]:
    """Densities `d^(1/n), d^(2/n), ..., d`: every round keeps the same share.

    Args:
        density: After the last round.
        rounds: How many.

    Raises:
        ValueError: If there is no round, or the density is not in (0, 1].

    Example:
        >>> geometric(0.25, 2)
        [0.5, 0.25]
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: expected at least 1")
    if not 0 < density <= 1:
        raise ValueError(f"density {density}: expected a kept share in (0, 1]")
    return [density ** (i / rounds) for i in range(1, rounds + 1)]


def load_data(name: str) -> Any:
    """Data by name, path or `module:factory`."""
    from dagjax.experiments import data

    return data.check(_factory(name)()) if _is_factory(name) else data.load(name)


def load_net(name: str, data: Any) -> Any:
    """A net of the zoo with the shapes of the data, or `module:factory`."""
    from dagjax.graph.zoo import by_name

    if _is_factory(name):
        made = _factory(name)
        plain = callable(made) and not hasattr(made, "init")
        return made() if plain else made
    return by_name(name) if data is None else _of_zoo(name, **_fitting(name, data))


def _fitting(name: str, data: Any) -> dict[str, Any]:
    """The options of a net of the zoo that fit the data, JSON values."""
    from dagjax.graph.zoo import takes_conv

    return {
        "input_shape": list(data.x_train.shape[1:]),
        "classes": _outputs(data.x_train, data.y_train),
        # It trains at full speed in the compiled loops of the CPU.
        "scan_conv": jax.default_backend() == "cpu" and takes_conv(name),
    }


def _of_zoo(name: str, input_shape: Any, classes: int, scan_conv: bool) -> Any:
    from dagjax.graph.zoo import by_name
    from dagjax.graph.zoo.convolution import scan_conv as fast

    conv: dict[str, Any] = {"conv": fast} if scan_conv else {}
    return by_name(name, classes=classes, input_shape=tuple(input_shape), **conv)


def remember(out: Path, name: str, data: Any) -> None:
    """Write into `run.json` how its network was made, for `dagjax compact`."""
    from dagjax.experiments.store import Store

    store, options = Store(out), {} if _is_factory(name) else _fitting(name, data)
    command = {"net": name, "options": options}
    store.write_json("run", {**store.read_json("run"), "command": command})


def remembered(record: dict[str, Any], name: str | None) -> Any:
    """The network of a run, as `run.json` says or by another name.

    Raises:
        ValueError: If the run does not say it.
    """
    command = record.get("command")
    if name is not None and _is_factory(name):
        return load_net(name, None)
    if not command or name is not None:
        raise ValueError(
            "this run was started from Python: --net package.module:factory makes its "
            "network; in Python, dj.compact takes result.tickets and result.masks"
            if not command
            else f"--net {name!r}: expected package.module:factory"
        )
    made, options = command["net"], command["options"]
    return _of_zoo(made, **options) if options else load_net(made, None)


def _outputs(x: np.ndarray, y: np.ndarray) -> int:
    """Numbers to regress, classes, or the vocabulary of inputs and next tokens."""
    if y.dtype.kind not in "iu":
        return int(y[0].size)
    tokens = x.dtype.kind in "iu" and x.shape == y.shape
    return 1 + int(max(y.max(), x.max() if tokens else 0))


def _is_factory(name: str) -> bool:
    return ":" in name and not os.path.exists(name)


def _factory(name: str) -> Any:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name!r}: expected package.module:factory; {error}"
        ) from error
    finally:
        sys.path.pop(0)


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
    return "-".join([_slug(options.net, options.data, options.prune), *changed])


def _listed(names: str) -> list[str]:
    return [] if names == "none" else names.split(",")


def _slug(*names: str) -> str:
    parts = (Path(name.replace(":", "-")).stem for name in names)
    return "-".join(parts)
