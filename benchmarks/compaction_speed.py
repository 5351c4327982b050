"""Seconds to trace, find units, score and cut, beside Torch-Pruning in the same run.

    python benchmarks/compaction_speed.py --torch-python VENV/bin/python

Both sides prune 30 percent of the channels of every group by their l2 norms, weights
random, and hold the smaller arrays at the end. "cold" is the first time in a process
of its own, "warm" the median of later ones, each on a network traced anew: what dagjax
remembers of a program is forgotten in between. Verification and compilation, which
Torch-Pruning does not have, are reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import imagenet_models
import jax
import jax.numpy as jnp
import record
from torch_pruning_process import TorchPruning

import dagjax as dj
from dagjax.compaction.channels import traced_network as source
from dagjax.graph.core.dag import count_params

NETS = ("resnet18", "resnet50", "vit_b_16")
RATIO = 0.3


def prune(model: Any, only: Any = None) -> tuple[dict[str, float], Any, Any]:
    """Seconds of each part, the network and what was cut out of it."""
    source._traced.cache_clear()
    times, begun = {}, time.perf_counter()

    def mark(name: str) -> None:
        nonlocal begun
        now = time.perf_counter()
        times[name], begun = now - begun, now

    net = dj.from_nnx(model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    mark("trace")
    dj.units(net)
    mark("units")
    mask = dj.prune_units(net, "l2", density=1 - RATIO, scope="group", only=only)
    mark("score and select")
    compacted = dj.compact(net, mask, verify=False)
    jax.block_until_ready(compacted.net.params)
    mark("compact")
    return times, (net, mask), compacted


def apart(net: Any, mask: Any) -> dict[str, float]:
    """Seconds of verification, and of compiling what is left."""
    begun = time.perf_counter()
    small = dj.compact(net, mask, verify=True).net
    checked = time.perf_counter() - begun
    x = jnp.ones((1, 224, 224, 3))
    begun = time.perf_counter()
    jax.jit(lambda net, x: net(x)).lower(small, x).compile()
    return {
        "compact with verification": checked,
        "compile": time.perf_counter() - begun,
    }


def once(name: str) -> dict[str, float]:
    """The first time in this process."""
    times, _, _ = prune(imagenet_models.make(name))
    return times


def cold(name: str) -> dict[str, float]:
    """The first time in a process of its own."""
    command = [sys.executable, __file__, "--once", name]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def measure(name: str, torch: TorchPruning, python: str, turns: int) -> dict[str, Any]:
    """Both sides in turn."""
    model, ours, theirs = imagenet_models.make(name), [], []
    for _ in range(turns + 1):
        times, (net, mask), compacted = prune(model)
        ours.append(times)
        theirs.append(torch.ask(do="prune", net=name, ratio=RATIO))
    fresh = TorchPruning(python)
    first = fresh.ask(do="prune", net=name, ratio=RATIO)["seconds"]
    fresh.close()
    warm = [sum(t.values()) for t in ours[1:]]
    beside = [t["seconds"] for t in theirs[1:]]
    parts = {k: statistics.median(t[k] for t in ours[1:]) for k in ours[0]}
    alone = cold(name)
    return {
        "parameters": count_params(net.params),
        "parameters left": count_params(compacted.net.params),
        "parameters left, Torch-Pruning": theirs[-1]["after"]["params"],
        "warm": statistics.median(warm),
        "warm, Torch-Pruning": statistics.median(beside),
        "ratio": statistics.median(a / b for a, b in zip(warm, beside, strict=True)),
        "parts": parts,
        "samples": warm,
        "samples, Torch-Pruning": beside,
        "cold": sum(alone.values()),
        "cold parts": alone,
        "cold, Torch-Pruning": first,
        "apart": apart(net, mask),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--once", help="print the parts of the first time, as JSON")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once)))
        return
    torch = TorchPruning(args.torch_python)
    nets = {n: measure(n, torch, args.torch_python, args.turns) for n in args.nets}
    record.write("compaction_speed", {"torch": torch.versions, "nets": nets})
    torch.close()


if __name__ == "__main__":
    main()
