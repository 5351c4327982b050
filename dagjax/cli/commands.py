"""What the commands do."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from dagjax.cli.by_name import load_data, load_net, remember, remembered
from dagjax.cli.devices import set_up_jax
from dagjax.cli.options import Compact, List, Lottery, Show, run_name, slug

MIN_ACCURACY = {"digits": 0.96}  # a dense net below this was not trained properly


def lottery(options: Lottery) -> None:
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
            steps=options.steps, batch=options.batch,
            eval_size=options.eval_size, optimizer=options.optimizer,
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


def compact(options: Compact) -> None:
    """`dagjax compact`."""
    set_up_jax(options.device)
    from dagjax import api
    from dagjax.experiments import ticket_files
    from dagjax.experiments.model import as_model
    from dagjax.experiments.run_folder import open_run

    if not options.batch_sizes or min(options.batch_sizes) < 1:
        raise ValueError(f"batch sizes {options.batch_sizes}: expected 1 or more")
    run = open_run(options.run, options.seed, options.round)
    net = remembered(run.record, options.net)
    model = as_model(net)
    now, before = api.describe_net(net, model), run.settings["net"]
    if now != before:
        raise ValueError(f"the network is {now}, but {before} was trained; see --net")
    ticket = run.ticket(model)
    small = ticket_files.cut_ticket(ticket, run.settings["prune"])
    name = f"compact-seed{ticket.seed}-round{ticket.round}"
    out = options.out or options.run / name
    print(ticket_files.write(ticket, small, out, options.batch_sizes))
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def show(options: Show) -> None:
    """`dagjax show`."""
    set_up_jax("cpu")
    from dagjax.graph.core import show as text
    from dagjax.graph.core.combine import as_graph
    from dagjax.report import drawing

    graph = as_graph(load_net(options.net, None))
    text.show(graph)
    out = options.out or Path(f"{slug(options.net)}.png")
    drawing.draw(graph).savefig(out, dpi=150)
    print(f"drawn to {out}")


def names(options: List) -> None:
    """`dagjax list`."""
    del options
    from dagjax.experiments import data
    from dagjax.experiments.controls import CONTROLS
    from dagjax.experiments.granularity import GRANULARITIES
    from dagjax.experiments.optimizers import OPTIMIZERS, SCHEDULES
    from dagjax.graph.zoo import NETS

    own = "module:factory"
    for what, listed in {
        "nets": [*NETS, own],
        "data": [*data.NAMES, "folder of IDX files", "file.npz", own],
        **{f"scores of {k}": v.scores for k, v in GRANULARITIES.items()},
        "controls": CONTROLS,
        "optimizers": OPTIMIZERS,
        "schedules": SCHEDULES,
    }.items():
        print(f"{what:18}{', '.join(listed)}")


def geometric(density: float, rounds: int) -> list[float]:
    """Densities `d^(1/n), d^(2/n), ..., d`: every round keeps the same share.

    >>> geometric(0.25, 2)
    [0.5, 0.25]
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: expected at least 1")
    if not 0 < density <= 1:
        raise ValueError(f"density {density}: expected a kept share in (0, 1]")
    return [density ** (i / rounds) for i in range(1, rounds + 1)]


def _listed(names: str) -> list[str]:
    return [] if names == "none" else names.split(",")
