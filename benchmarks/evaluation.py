"""`dag(x)` jitted against the same network written by hand in Flax Linen.

    python benchmarks/evaluation.py

Both programs get the same parameters. Equal FLOPs of the compiled programs, and the
ratio of the times of interleaved calls.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import record

import dagjax as dj


class Mlp(nn.Module):
    """LeNet-300-100 as one writes it."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(300, name="fc1")(x))
        x = nn.relu(nn.Dense(100, name="fc2")(x))
        return nn.Dense(10, name="fc3")(x)


class Lenet5(nn.Module):
    """LeNet-5 as one writes it."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = nn.relu(nn.Conv(6, (5, 5), name="conv1")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), padding="VALID", name="conv2")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, name="fc1")(x))
        x = nn.relu(nn.Dense(84, name="fc2")(x))
        return nn.Dense(10, name="fc3")(x)


class Block(nn.Module):
    """A basic block of a residual network."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """`shortcut(x) + branch(x)`, before the activation."""
        conv = lambda size, stride: nn.Conv(
            self.features, (size, size), (stride, stride), use_bias=False
        )
        norm = lambda: nn.BatchNorm(use_running_average=True)
        x = nn.relu(x)
        y = norm()(conv(3, self.stride)(x))
        y = norm()(conv(3, 1)(nn.relu(y)))
        return y + (norm()(conv(1, self.stride)(x)) if self.stride > 1 else x)


class Resnet(nn.Module):
    """ResNet-8 or ResNet-20 as one writes it."""

    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        n = (self.depth - 2) // 6
        for i in range(3 * n):
            stride = 2 if i >= n and i % n == 0 else 1
            x = Block(16 * 2 ** (i // n), stride)(x)
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


def kernels(tree: Any) -> list[Any]:
    """The arrays of a tree ordered by shape: both nets hold the same ones."""
    return sorted(leaf.shape for leaf in jax.tree.leaves(tree))


def compare(graph: dj.Graph, module: nn.Module, shape: tuple[int, ...]) -> dict:
    """FLOPs and times of both, jitted, with the parameters as arguments."""
    x = jax.random.normal(jax.random.key(0), shape)
    dag = dj.init(jax.random.key(1), graph, x)
    variables = module.init(jax.random.key(1), x)
    assert kernels(variables["params"]) == kernels(dag.params)
    ours = jax.jit(lambda dag, x: dag(x)).lower(dag, x).compile()
    hand = jax.jit(module.apply).lower(variables, x).compile()
    flops = [int(program.cost_analysis()["flops"]) for program in (ours, hand)]
    runs = {"dagjax": lambda: ours(dag, x), "flax": lambda: hand(variables, x)}
    found = record.in_turn(runs, 60)
    return {
        "batch": shape[0],
        "flops": {"dagjax": flops[0], "flax": flops[1], "equal": flops[0] == flops[1]},
        "seconds": record.medians(found),
        "ratio": record.ratio(found, "dagjax", "flax"),
    }


def main() -> None:
    """Measure and record."""
    gray, color = (256, 28, 28, 1), (64, 32, 32, 3)
    record.write(
        "evaluation",
        {
            "lenet-300-100": compare(dj.zoo.lenet_300_100(), Mlp(), gray),
            "lenet5": compare(dj.zoo.lenet5(), Lenet5(), gray),
            "resnet8": compare(dj.zoo.resnet(8), Resnet(8), color),
            "resnet20": compare(dj.zoo.resnet(20), Resnet(20), color),
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    jnp.zeros(())
    main()
