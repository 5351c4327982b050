"""Latency of what compaction leaves, beside its share of the operations.

    python benchmarks/compaction_gain.py --torch-python VENV/bin/python

ResNet-18 and ResNet-50 at 224 pixels, cut to 1/2 and 1/4 of their operations, the same
share of every group, at batch sizes 1 and 16; the same cuts by Torch-Pruning in
PyTorch, all four programs in turn in one run. The gain is the time of the dense network
over that of the smaller one.

Some widths are much slower than others (a first convolution to 32 channels can take
longer than one to 64), so both sides try a few roundings beforehand and take the one
that is fastest: dagjax multiples for all groups, then one for the group of the first
convolution; Torch-Pruning, whose rounding is global, multiples for all that keep within
2 percent of the share, and the faster of two memory formats.
"""

from __future__ import annotations

import argparse
import functools
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
MULTIPLES, FIRST = (8, 16, 32), (24, 32, 40, 48)


@functools.cache
def dense(name: str) -> Any:
    """The whole network."""
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return dj.from_nnx(imagenet_models.make(name), x)


def cut(net: Any, share: float, round_to: Any) -> Any:
    """What is left of it."""
    mask = dj.prune_units(net, "l2", flops=share, scope="group", round_to=round_to)
    return dj.compact(net, mask, verify=False).net


def fastest(net: Any, share: float, batch: int) -> tuple[Any, Any]:
    """The rounding whose network is fastest, and that network."""
    groups = dj.units(net).channels
    first = min(groups, key=lambda name: groups[name].level)
    tried: dict[str, tuple[float, Any, Any]] = {}

    def attempt(words: str, round_to: Any) -> None:
        small = cut(net, share, round_to)
        run = compiled(small, batch)
        times = record.in_turn({"": run}, 3)[""]
        tried[words] = min(times), round_to, small

    best = lambda: min(tried, key=lambda words: tried[words][0])
    for multiple in MULTIPLES:
        attempt(f"{multiple}", dict.fromkeys(groups, multiple))
    words, (_, whole, _) = best(), tried[best()]
    for multiple in FIRST:
        attempt(f"{words}, {first} {multiple}", {**whole, first: multiple})
    return best(), tried[best()][2]


def compiled(net: Any, batch: int) -> Any:
    """A call of the compiled network on images."""
    x = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3))
    run = jax.jit(lambda net, x: net(x)).lower(net, x).compile()
    return lambda: run(net, x)


def measure(
    name: str, share: float, batch: int, torch: TorchPruning | None, args: Any
) -> dict[str, Any]:
    """All programs in turn."""
    net = dense(name)
    rounding, small = fastest(net, share, batch)
    left = dj.units(small).total[0] / dj.units(net).total[0]
    runs = {"dense": compiled(net, batch), "small": compiled(small, batch)}
    found: dict[str, list[float]] = {n: [] for n in runs}
    asks = {
        "torch dense": {"net": name, "variant": "dense", "batch": batch},
        "torch small": {"net": name, "variant": str(share), "batch": batch},
    }
    ready = {n: prepared(torch, ask) for n, ask in asks.items() if torch}
    found |= {n: [] for n in ready}
    for turn in range(args.turns + 1):
        times = {n: record.seconds(run) for n, run in runs.items()}
        times |= {
            n: torch.ask(do="time", **r["ask"])["seconds"] for n, r in ready.items()
        }
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
        "rounding": rounding,
        "rounding of torch": ready["torch small"]["ask"]["round_to"] if torch else None,
        "format of torch": {n: r["format"] for n, r in ready.items()},
    }


def prepared(torch: TorchPruning, ask: dict[str, Any]) -> dict[str, Any]:
    """A model of the other side, in the rounding and the format that are fastest."""
    found, share = [], ask["variant"]
    for multiple in (None, *MULTIPLES) if share != "dense" else (None,):
        one = {**ask, "round_to": multiple}
        made = {**torch.ask(do="prepare", **one), "ask": one}
        if multiple is None or abs(made["macs ratio"] / float(share) - 1) < 0.02:
            found.append(made)
    return min(found, key=lambda r: min(r["formats"].values()))


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"))
    parser.add_argument("--turns", type=int, default=9)
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
    record.write("compaction_gain", {"torch": versions, "nets": found})


if __name__ == "__main__":
    main()
