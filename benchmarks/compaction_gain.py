"""Latency of what compaction leaves, beside its share of the operations.

    python benchmarks/compaction_gain.py --torch-python VENV/bin/python

ResNet-18 and ResNet-50 at 224 pixels, cut to 1/2 and 1/4 of their operations, the same
share of every group, at batch sizes 1 and 16; the same cuts by Torch-Pruning in
PyTorch, all four programs in turn in one run. The gain is the time of the dense network
over that of the smaller one.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import imagenet_models
import jax
import jax.numpy as jnp
import record
from torch_pruning_process import TorchPruning

import dagjax as dj

NETS, SHARES, BATCHES = ("resnet18", "resnet50"), (0.5, 0.25), (1, 16)


def cut(name: str, share: float, round_to: int) -> tuple[Any, Any, float]:
    """The dense network, the smaller one, and the share of operations that is left."""
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    net = dj.from_nnx(imagenet_models.make(name), x)
    mask = dj.prune_units(net, "l2", flops=share, scope="group", round_to=round_to)
    small = dj.compact(net, mask, verify=False).net
    return net, small, dj.units(small).total[0] / dj.units(net).total[0]


def compiled(net: Any, batch: int) -> Any:
    """A call of the compiled network on images."""
    x = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3))
    run = jax.jit(lambda net, x: net(x)).lower(net, x).compile()
    return lambda: run(net, x)


def measure(
    name: str, share: float, batch: int, torch: TorchPruning | None, args: Any
) -> dict[str, Any]:
    """All programs in turn."""
    net, small, left = cut(name, share, args.round_to)
    runs = {"dense": compiled(net, batch), "small": compiled(small, batch)}
    found: dict[str, list[float]] = {n: [] for n in runs}
    asks = {
        "torch dense": {"net": name, "variant": "dense", "batch": batch},
        "torch small": {"net": name, "variant": str(share), "batch": batch},
    }
    ready = {n: torch.ask(do="prepare", **ask) for n, ask in asks.items() if torch}
    found |= {n: [] for n in ready}
    for turn in range(args.turns + 1):
        times = {n: record.seconds(run) for n, run in runs.items()}
        times |= {n: torch.ask(do="time", **asks[n])["seconds"] for n in ready}
        if turn:  # the first warms up
            for n, t in times.items():
                found[n].append(t)
    gain = lambda a, b: round(
        statistics.median(x / y for x, y in zip(found[a], found[b], strict=True)), 3
    )
    return {
        "operations left": round(left, 4),
        "latency left": round(1 / gain("dense", "small"), 4),
        "gain": gain("dense", "small"),
        "gain of what operations promise": round(gain("dense", "small") * left, 3),
        "gain, Torch-Pruning": gain("torch dense", "torch small") if torch else None,
        "operations left, Torch-Pruning": ready["torch small"]["macs ratio"]
        if torch
        else None,
        "seconds": record.medians(found),
        "format of torch": {n: r["format"] for n, r in ready.items()},
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    args = parser.parse_args()
    torch = TorchPruning(args.torch_python) if args.torch_python else None
    found = {
        f"{name}, {share}, batch {batch}": measure(name, share, batch, torch, args)
        for name in args.nets
        for share in SHARES
        for batch in BATCHES
    }
    versions = torch.versions if torch else None
    figures = {"torch": versions, "round_to": args.round_to, "nets": found}
    record.write("compaction_gain", figures)


if __name__ == "__main__":
    main()
