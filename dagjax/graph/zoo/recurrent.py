"""A recurrent network unrolled in time: the arcs of all steps share parameters."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dagjax.graph.core.combine import GraphBuilder, series
from dagjax.graph.core.functions import flatten, identity
from dagjax.graph.core.merges import Product
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import Shape, reading


def lstm_unrolled(
    steps: int = 28,
    hidden: int = 128,
    classes: int = 10,
    features: int | Shape = 28,
) -> Graph:
    """An LSTM (Hochreiter & Schmidhuber 1997), one level of gates for every step.

        g_t = W x_t + U h_(t-1) + b
        c_t = forget(g_t) * c_(t-1) + input(g_t) * candidate(g_t)
        h_t = output(g_t) * tanh(c_t)

    with the forget gate of Gers et al. (2000). All arcs `x1, x2, ...` are tied to "x"
    and all arcs `h2, h3, ...` to "h". The last h is read out. By default it reads the
    rows of a digit of MNIST one by one (Le et al. 2015).

    Args:
        steps: Length of the sequences.
        hidden: Size of the states h and c.
        classes: Number of outputs.
        features: Shape of one step; the input is `[B, steps, *features]`.

    Raises:
        ValueError: If there is no step.

    Example:
        >>> graph = lstm_unrolled(3, 8, classes=2, features=4)
        >>> graph, sorted({arc.params_name for arc in graph.arcs if arc.tied})
        (Graph(16 nodes, 27 arcs, 13 levels: in -> out), ['h', 'x'])
    """
    if steps < 1:
        raise ValueError(f"lstm steps {steps}: expected at least one")
    b = GraphBuilder()
    b.input("in")
    for t in range(1, steps + 1):
        _gates(b, t, hidden)
        _cell(b, t)
    b.arc("readout", f"h{steps}", "out", nn.Dense(classes))
    shape = (features,) if isinstance(features, int) else tuple(features)
    return reading(b.build("out"), (steps, *shape))


def at(x: jax.Array, step: int) -> jax.Array:
    """`[B, T, ...] -> [B, ...]`, one step of a sequence."""
    return x[:, step]


def input_gate(gates: jax.Array) -> jax.Array:
    """`[B, 4 H] -> [B, H]`: how much of the candidate enters the cell."""
    return nn.sigmoid(_quarter(gates, 0))


def forget_gate(gates: jax.Array) -> jax.Array:
    """`[B, 4 H] -> [B, H]`: how much stays in the cell."""
    return nn.sigmoid(_quarter(gates, 1))


def candidate(gates: jax.Array) -> jax.Array:
    """`[B, 4 H] -> [B, H]`: what may enter the cell."""
    return jnp.tanh(_quarter(gates, 2))


def output_gate(gates: jax.Array) -> jax.Array:
    """`[B, 4 H] -> [B, H]`: how much of the cell is shown."""
    return nn.sigmoid(_quarter(gates, 3))


def _gates(b: GraphBuilder, t: int, hidden: int) -> None:
    """Pre-activations of the four gates, a sum of two tied arcs."""
    here = functools.partial(at, step=t - 1)
    b.arc(f"x{t}", "in", f"g{t}", series(here, flatten, nn.Dense(4 * hidden)), tied="x")
    if t > 1:
        start = nn.initializers.orthogonal()
        again = nn.Dense(4 * hidden, use_bias=False, kernel_init=start)
        b.arc(f"h{t}", f"h{t - 1}", f"g{t}", again, tied="h")


def _cell(b: GraphBuilder, t: int) -> None:
    """The cell, a sum of two products, and what it shows, a product."""
    gates, new, kept = f"g{t}", f"new{t}", f"kept{t}"
    b.merge(new, Product())
    b.arc(f"input{t}", gates, new, input_gate, port=0)
    b.arc(f"candidate{t}", gates, new, candidate, port=1)
    b.arc(f"{new}_c{t}", new, f"c{t}", identity)
    if t > 1:
        b.merge(kept, Product())
        b.arc(f"forget{t}", gates, kept, forget_gate, port=0)
        b.arc(f"c{t - 1}_{kept}", f"c{t - 1}", kept, identity, port=1)
        b.arc(f"{kept}_c{t}", kept, f"c{t}", identity)
    b.merge(f"h{t}", Product())
    b.arc(f"output{t}", gates, f"h{t}", output_gate, port=0)
    b.arc(f"tanh{t}", f"c{t}", f"h{t}", jnp.tanh, port=1)


def _quarter(x: jax.Array, number: int) -> jax.Array:
    size = x.shape[-1] // 4
    return x[..., number * size : (number + 1) * size]
