"""The PyTorch side of the pruning benchmarks: Torch-Pruning behind JSON lines.

    PATH/TO/python benchmarks/torch_pruning_side.py

For a Python with torch and torch-pruning, which needs neither JAX nor dagjax: one
request a line in, one answer a line out, so that a benchmark in JAX can take turns
with it. {"error": text} answers a request that failed.

    {"do": "versions"}
    {"do": "prune", "net": "resnet18", "ratio": 0.3}, optional: "global": true
    {"do": "prepare", "net": "resnet50", "variant": "0.5", "batch": 16}
    {"do": "time", and then as in "prepare"}: seconds of one call
    {"do": "latency", "net": "resnet50", "flops": 0.5, "batch": 16, "turns": 7}
    {"do": "quit"}

A variant is "dense" or the kept share of the MACs. Optional everywhere: "size" of the
images, "round_to" of the channels.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

Ask = dict[str, Any]
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
# The nets are torchvision's, but written out: its wheels load only next to the build
# of torch that they were made for.
RESNETS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}
TOLERANCE = 0.02  # of the kept share of the MACs


def unit(i: int, o: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its normalization."""
    conv = nn.Conv2d(i, o, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(o)]


class Residual(nn.Module):
    """A block of ResNet-18 (two convolutions) or ResNet-50 (a bottleneck of three)."""

    def __init__(self, i: int, width: int, stride: int, deep: bool) -> None:
        super().__init__()
        o = 4 * width if deep else width
        first, last = (1, 1) if deep else (3, 3)
        # a bottleneck has its stride in the middle, as torchvision has it
        units = [unit(i, width, first, 1 if deep else stride)]
        units += [unit(width, width, 3, stride)] if deep else []
        units += [unit(width, o, last)]
        parts = [p for u in units for p in (*u, nn.ReLU(inplace=True))]
        self.branch = nn.Sequential(*parts[:-1])
        same = i == o and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*unit(i, o, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of branch and skip."""
        return self.relu(self.branch(x) + self.skip(x))


def resnet(blocks: tuple[int, ...], deep: bool) -> nn.Module:
    """ResNet for images of any size, 1000 classes."""
    parts = [*unit(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    i = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            parts.append(Residual(i, width, stride, deep))
            i = 4 * width if deep else width
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, *pool, nn.Linear(i, 1000))


class Encoder(nn.Module):
    """A layer of ViT-B, normalized first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        wide = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(wide, nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention, then the dense layers, each added to its input."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """ViT-B/16 for images of one size, 1000 classes."""

    def __init__(self, size: int, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        tokens = (size // 16) ** 2 + 1
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.layers = nn.Sequential(*(Encoder(width, heads) for _ in range(12)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the class token."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


def make(net: str, size: int) -> nn.Module:
    """The net with random weights, the same ones each time."""
    torch.manual_seed(0)
    return (ViT(size) if net == "vit_b_16" else resnet(*RESNETS[net])).eval()


def classifier(model: nn.Module) -> nn.Module:
    """The last layer, whose outputs are the classes."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


class Importance(tp.importance.GroupMagnitudeImportance):
    """Torch-Pruning's l2 group magnitude, which sums its seconds."""

    seconds = 0.0

    def __call__(self, group: Any) -> Any:
        """The importance of the channels of a group."""
        begun = time.perf_counter()
        found = super().__call__(group)
        self.seconds += time.perf_counter() - begun
        return found


def pruner(model: nn.Module, x: torch.Tensor, ask: Ask) -> tp.pruner.BasePruner:
    """Torch-Pruning's pruner, its dependency graph built."""
    heads = {
        m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    return tp.pruner.BasePruner(
        model,
        # a bare tensor would be unpacked into its images first, in vain
        (x,),
        Importance(p=2),
        pruning_ratio=ask["ratio"],
        global_pruning=ask.get("global", False),
        round_to=ask.get("round_to"),
        ignored_layers=[classifier(model)],
        unwrapped_parameters=[(p, 2) for p in model.parameters(recurse=False)],
        # As `num_heads` they would keep the width of the net; with neither the channels
        # that are left change heads. New dicts, as the pruner writes to its defaults.
        out_channel_groups=heads,
        in_channel_groups={},
        num_heads={},
    )


def cut(model: nn.Module, ask: Ask) -> dict[str, float]:
    """Prune the model in place; seconds of the parts."""
    x = torch.randn(1, 3, size_of(ask), size_of(ask))
    begun = time.perf_counter()
    made = pruner(model, x, ask)
    built = time.perf_counter()
    made.step()
    done = time.perf_counter()
    scored = made.importance.seconds
    return {
        "seconds": done - begun,
        "graph": built - begun,
        "importance": scored,
        "pruning": done - built - scored,
    }


def size_of(ask: Ask) -> int:
    """Height and width of the images."""
    return ask.get("size") or 224


def count(model: nn.Module, size: int) -> dict[str, int]:
    """MACs of one image and parameters, as Torch-Pruning counts them."""
    x = torch.randn(1, 3, size, size)
    macs, params = tp.utils.count_ops_and_params(model, (x,))
    return {"macs": int(macs), "params": int(params)}


@functools.cache
def dense_count(net: str, size: int) -> dict[str, int]:
    """The same of the whole net."""
    return count(make(net, size), size)


def channels(model: nn.Module) -> dict[str, int]:
    """Output channels of each layer."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            found[name] = m.out_channels
        elif isinstance(m, nn.MultiheadAttention):
            found[name] = m.embed_dim
        elif isinstance(m, nn.Linear):
            found[name] = m.out_features
    return found


def versions(ask: Ask) -> Ask:
    """Versions, and the threads that torch uses."""
    # Threads that spin as they wait are fastest alone, and many times slower next to
    # other load; there GOMP_SPINCOUNT=1000 or OMP_WAIT_POLICY=PASSIVE helps.
    openmp = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_"))}
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        # as tp.__version__ of 1.6.1 says 1.6.0
        "torch_pruning": metadata.version("torch-pruning"),
        "threads": torch.get_num_threads(),
        "openmp": openmp,
    }


def prune(ask: Ask) -> Ask:
    """Prune a new model by a ratio of its channels, and count."""
    size = size_of(ask)
    model = make(ask["net"], size)
    # counted after: the first pruning of a process has to be a cold one
    parts = cut(model, ask)
    return {
        **parts,
        "before": dense_count(ask["net"], size),
        "after": count(model, size),
        "channels": channels(model),
    }


@functools.cache
def shrunk(net: str, flops: float, size: int, round_to: int | None) -> tuple[Any, Ask]:
    """The net pruned by the one ratio that keeps this share of its MACs."""
    whole, low, high = dense_count(net, size)["macs"], 0.0, 1.0
    best: tuple[float, Any, Ask] = (float("inf"), None, {})
    while best[0] > TOLERANCE and high - low > 1e-3:
        model, ratio = make(net, size), (low + high) / 2
        cut(model, {"ratio": ratio, "size": size, "round_to": round_to})
        kept = count(model, size)["macs"] / whole
        found = (abs(kept / flops - 1), model, {"ratio": ratio, "macs ratio": kept})
        best = min(best, found, key=lambda b: b[0])
        low, high = (ratio, high) if kept > flops else (low, ratio)
    return best[1], best[2]


def variant(ask: Ask) -> tuple[nn.Module, Ask]:
    """The dense or a pruned model, with its ratios."""
    size = size_of(ask)
    if ask["variant"] == "dense":
        return make(ask["net"], size), {"ratio": 0.0, "macs ratio": 1.0}
    return shrunk(ask["net"], float(ask["variant"]), size, ask.get("round_to"))


def call(model: nn.Module, x: torch.Tensor) -> float:
    """Seconds of one call."""
    with torch.inference_mode():
        begun = time.perf_counter()
        model(x)
        return time.perf_counter() - begun


def in_turn(runs: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Times of several programs run in turn, after one warm-up each."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            found[name].append(run())
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each program."""
    return {name: statistics.median(times) for name, times in found.items()}


def runner(model: nn.Module, x: torch.Tensor, layout: str) -> Callable[[], float]:
    """Seconds of a call of a copy in a memory format."""
    model = copy.deepcopy(model).to(memory_format=FORMATS[layout])
    return functools.partial(call, model, x.to(memory_format=FORMATS[layout]))


def key(ask: Ask) -> tuple[Any, ...]:
    """What distinguishes prepared models."""
    size, round_to = size_of(ask), ask.get("round_to")
    return ask["net"], ask["variant"], ask["batch"], size, round_to


READY: dict[tuple[Any, ...], tuple[Callable[[], float], Ask]] = {}


def prepare(ask: Ask) -> Ask:
    """Make a model ready in the faster memory format."""
    if key(ask) not in READY:
        model, about = variant(ask)
        x = torch.randn(ask["batch"], 3, size_of(ask), size_of(ask))
        runs = {layout: runner(model, x, layout) for layout in FORMATS}
        formats = medians(in_turn(runs, ask.get("turns", 3)))
        best = min(formats, key=formats.__getitem__)
        READY[key(ask)] = runs[best], {**about, "format": best, "formats": formats}
    return READY[key(ask)][1]


def clock(ask: Ask) -> Ask:
    """Seconds of one call of a prepared model."""
    return {"seconds": READY[key(ask)][0]()}


def latency(ask: Ask) -> Ask:
    """Dense and pruned in turn."""
    asks = {v: {**ask, "variant": v} for v in ("dense", str(ask["flops"]))}
    about = {v: prepare({**a, "turns": 3}) for v, a in asks.items()}
    runs = {v: READY[key(a)][0] for v, a in asks.items()}
    found = in_turn(runs, ask["turns"])
    median = medians(found)
    return {v: {**about[v], "seconds": median[v], "samples": found[v]} for v in asks}


DO: dict[str, Callable[[Ask], Ask]] = {
    "versions": versions,
    "prune": prune,
    "prepare": prepare,
    "time": clock,
    "latency": latency,
    "quit": lambda ask: {"quit": True},
}


def answer(line: str) -> Ask:
    """The answer to a request, or its error."""
    try:
        ask = json.loads(line)
        return DO[ask["do"]](ask)
    except Exception as error:  # the other side waits for a line, whatever happened
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until told to quit or until the requests end."""
    # what libraries print would be taken for an answer
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        found = answer(line)
        print(json.dumps(found), file=out, flush=True)
        if found.get("quit"):
            break


if __name__ == "__main__":
    main()
