"""Training steps of convolutional nets on the CPU: three convolutions and PyTorch.

    python benchmarks/convolution.py --torch-python PATH/TO/python

Forward, backward and an SGD step of LeNet-5, ResNet-8 and ResNet-20, as a Python loop
over a jitted step and as one `lax.scan`, in turn with the same nets in eager PyTorch,
which runs in an environment of its own (or TORCH_PYTHON; without one its figures are
null). XLA's convolution in a scan is so slow that it has turns of its own.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import record
from jax import lax

from dagjax.graph.zoo.convolution import matmul_conv, scan_conv

CONVS = {"xla": None, "scan_conv": scan_conv, "matmul_conv": matmul_conv}
SHAPES = {"lenet5": (28, 28, 1), "resnet8": (32, 32, 3), "resnet20": (32, 32, 3)}
LAYOUTS = ("nchw", "nhwc")  # of PyTorch
RATE = 0.01

# The same nets and steps; a line "net layout steps" in, the loss out.
TORCH = """
import functools, sys, torch
from torch import nn
from torch.nn import functional as F

batch = int(sys.argv[1])
conv = functools.partial(nn.Conv2d, bias=False)

def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10))

class Block(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.branch = nn.Sequential(
            conv(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU(),
            conv(o, o, 3, 1, 1), nn.BatchNorm2d(o))
        self.skip = nn.Identity() if i == o else nn.Sequential(
            conv(i, o, 1, s), nn.BatchNorm2d(o))
    def forward(self, x):
        return F.relu(self.skip(x) + self.branch(x))

def resnet(blocks):
    parts, width = [conv(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()], 16
    for stage, o in enumerate((16, 32, 64)):
        for b in range(blocks):
            parts.append(Block(width, o, 2 if stage and not b else 1))
            width = o
    return nn.Sequential(*parts, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10))

NETS = {"lenet5": (lenet, (1, 28, 28)),
        "resnet8": (lambda: resnet(1), (3, 32, 32)),
        "resnet20": (lambda: resnet(3), (3, 32, 32))}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

@functools.cache
def setting(name, layout):
    make, shape = NETS[name]
    net = make().to(memory_format=FORMATS[layout])
    x = torch.randn(batch, *shape).to(memory_format=FORMATS[layout])
    return net, torch.optim.SGD(net.parameters(), RATE), x

print(torch.__version__, flush=True)
for line in sys.stdin:
    name, layout, steps = line.split()
    net, tx, x = setting(name, layout)
    for _ in range(int(steps)):
        tx.zero_grad()
        loss = F.cross_entropy(net(x), torch.arange(batch) % 10)
        loss.backward()
        tx.step()
    print(loss.item(), flush=True)
""".replace("RATE", str(RATE))


NOTES = [
    "Ratios are medians over turns. Other load slows PyTorch more than XLA: read the "
    "ratios to it only where the load before was about 1 or less.",
    "In a loop XLA's gradients miss the layout of its fast CPU kernels.",
    "No gain on ResNet-8 from xla_cpu_prefer_vector_width=512, xla_cpu_use_onednn, "
    "xla_cpu_experimental_ynn_fusion_type (empty, or with REDUCE and ELTWISE).",
    "norm / no norm: what BatchNorm costs with scan_conv inside a scan.",
]


class LeNet5(nn.Module):
    """LeNet-5 with relu and average pooling."""

    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images, [B, 28, 28, 1]."""
        pool = functools.partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))
        conv = functools.partial(nn.Conv, conv_general_dilated=self.conv)
        x = pool(nn.relu(conv(6, (5, 5))(x)))
        x = pool(nn.relu(conv(16, (5, 5), padding="VALID")(x)))
        x = nn.relu(nn.Dense(120)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.relu(nn.Dense(84)(x)))


class ResNet(nn.Module):
    """Stem, three stages of basic blocks, mean over the pixels, a dense layer."""

    conv: Any
    blocks: int
    normed: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images, [B, 32, 32, 3]."""
        x = nn.relu(self.unit(x, 16, 3))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                y = nn.relu(self.unit(x, width, 3, stride))
                y = self.unit(y, width, 3)
                x = x if x.shape == y.shape else self.unit(x, width, 1, stride)
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))

    def unit(self, x: jax.Array, width: int, size: int, stride: int = 1) -> jax.Array:
        """A convolution, and its normalization."""
        options = {"use_bias": False, "conv_general_dilated": self.conv}
        # padded as PyTorch pads, so that the strided windows are the same
        pads = [(size // 2, size // 2)] * 2
        x = nn.Conv(width, (size, size), (stride, stride), pads, **options)(x)
        return nn.BatchNorm(use_running_average=False)(x) if self.normed else x


NETS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "resnet8": functools.partial(ResNet, blocks=1),
    "resnet20": functools.partial(ResNet, blocks=3),
}


def make_step(net: nn.Module) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """`(variables, images) -> (variables, loss)`, one SGD step."""
    tx = optax.sgd(RATE)

    def loss(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        logits, rest = net.apply({"params": params, **rest}, x, mutable=["batch_stats"])
        labels = jnp.arange(len(x)) % 10
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), rest

    def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        params, state, rest = carry
        (value, rest), grad = jax.value_and_grad(loss, has_aux=True)(params, rest, x)
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state, rest), value

    return step


def start(net: nn.Module, x: jax.Array) -> Any:
    """The carry of `make_step`, from a net that need not be compiled to run fast."""
    variables = jax.jit(net.init)(jax.random.key(0), x[:1])
    params = variables.pop("params")
    return params, optax.sgd(RATE).init(params), variables


def loops(net: nn.Module, xs: jax.Array) -> dict[str, Callable[[], Any]]:
    """The steps outside (a Python loop over a jitted step) and inside `lax.scan`."""
    step, carry = make_step(net), start(net, xs[0])
    jitted, scanned = jax.jit(step), jax.jit(functools.partial(lax.scan, step))

    def outside() -> Any:
        found = carry
        for x in xs_list:
            found, _ = jitted(found, x)
        return found

    xs_list = list(xs)
    return {"outside": outside, "inside": lambda: scanned(carry, xs)}


class Torch:
    """A PyTorch process that waits for its turn."""

    def __init__(self, python: str, batch: int) -> None:
        pipe = subprocess.PIPE
        command = [python, "-c", TORCH, str(batch)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.version = self.process.stdout.readline().strip()
        if not self.version:
            raise ValueError(f"no torch in {python}: pass a Python that imports it")

    def run(self, net: str, layout: str, steps: int) -> float:
        """The loss after the steps."""
        self.process.stdin.write(f"{net} {layout} {steps}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def programs(name: str, xs: jax.Array, torch: Torch | None) -> dict[str, Any]:
    """All programs of a net but XLA's convolution inside a scan."""
    runs = {
        f"{conv} {place}": run
        for conv, f in CONVS.items()
        for place, run in loops(NETS[name](f), xs).items()
    }
    del runs["xla inside"]
    if name == "resnet8":
        runs["scan_conv inside, no norm"] = loops(
            NETS[name](scan_conv, normed=False), xs
        )["inside"]
    for layout in LAYOUTS if torch else ():
        runs[f"torch {layout}"] = functools.partial(torch.run, name, layout, len(xs))
    return runs


def milliseconds(found: dict[str, list[float]], steps: int) -> dict[str, float]:
    """Median of a step of each program."""
    return {k: round(1e3 * t / steps, 2) for k, t in record.medians(found).items()}


def over(found: dict[str, list[float]], base: str) -> dict[str, float] | None:
    """Each program over one of them; None where that one is missing."""
    return {k: record.ratio(found, k, base) for k in found} if base in found else None


def figures(found: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """Medians and ratios, null where there is no PyTorch."""
    layouts = [f"torch {layout}" for layout in LAYOUTS]
    norm, bare = "scan_conv inside", "scan_conv inside, no norm"
    return {
        "ms a step": dict.fromkeys(layouts) | milliseconds(found, steps),
        **{f"over {base}": over(found, base) for base in ("xla outside", *layouts)},
        "norm / no norm": record.ratio(found, norm, bare) if bare in found else None,
    }


def measure(name: str, args: argparse.Namespace, torch: Torch | None) -> dict[str, Any]:
    """All figures of one net."""
    load = round(os.getloadavg()[0], 1)
    shape = (args.steps, args.batch, *SHAPES[name])
    xs = jax.random.normal(jax.random.key(1), shape)
    found = record.in_turn(programs(name, xs, torch), args.turns)
    places = loops(NETS[name](None), xs[:2])
    slow = record.in_turn({f"xla {k}": run for k, run in places.items()}, 2)
    return {
        "load before": load,
        **figures(found, args.steps),
        "xla in a scan": {
            "ms a step": milliseconds(slow, 2),
            "over xla outside": over(slow, "xla outside"),
        },
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    args = parser.parse_args()
    torch = Torch(args.torch_python, args.batch) if args.torch_python else None
    record.write(
        "convolution",
        {
            "torch": torch and torch.version,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **{k: getattr(args, k) for k in ("batch", "steps", "turns")},
            "nets": {name: measure(name, args, torch) for name in args.nets},
            "notes": NOTES,
        },
    )


if __name__ == "__main__":
    main()
