"""Bundled against unbundled: a network of 2,304 scalar arcs, and one of 10,000.

    python benchmarks/bundles.py

Arcs `w tanh(x)`, 2,304 of them: a hidden layer (47 inputs, 48 nodes, one output), and
48 inputs with 48 outputs, each of which is an arc that picks a row of the stack. Times
to compile a training step (value, gradient, Adam) and to run it, as a training loop
does. The random DAG is trained bundled only: compiling it arc by arc takes minutes.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record

import dagjax as dj


def weight(key: jax.Array, x: jax.Array) -> Any:
    """One scalar."""
    del x
    return {"w": 0.3 * jax.random.normal(key)}


def scaled(params: Any, x: jax.Array) -> jax.Array:
    """`w tanh(x)`."""
    return params["w"] * jnp.tanh(x)


def arc(source: int, target: int) -> dj.Arc:
    """A scalar arc."""
    return dj.Arc(f"{source}_{target}", f"n{source}", f"n{target}", (weight, scaled))


def bipartite(n: int) -> dj.Graph:
    """`n` inputs, `n` outputs, all arcs."""
    arcs = [arc(i, n + j) for i in range(n) for j in range(n)]
    names = [f"n{i}" for i in range(2 * n)]
    return dj.Graph(arcs, names[:n], names[n:])


def one_hidden(n: int) -> dj.Graph:
    """`n - 1` inputs, `n` hidden nodes, one output: `n^2` arcs."""
    arcs = [arc(i, n + j) for i in range(n - 1) for j in range(n)]
    arcs += [arc(n + j, 2 * n) for j in range(n)]
    return dj.Graph(arcs, [f"n{i}" for i in range(n - 1)], f"n{2 * n}")


def random_dag(arcs: int, nodes: int, inputs: int) -> dj.Graph:
    """Arcs between random nodes, each node above the inputs fed at least once."""
    rng = np.random.default_rng(0)
    pairs = {(int(rng.integers(v)), v) for v in range(inputs, nodes)}
    while len(pairs) < arcs:
        v = int(rng.integers(inputs, nodes))
        pairs.add((int(rng.integers(v)), v))
    names = [f"n{i}" for i in range(nodes)]
    return dj.Graph([arc(u, v) for u, v in sorted(pairs)], names[:inputs], names[-1])


TX = optax.adam(3e-3)


@jax.jit
def step(dag: dj.DAG, opt_state: Any, xs: Any, ys: Any) -> Any:
    """One step of Adam."""

    def loss(params: Any) -> jax.Array:
        outputs = dag.replace(params=params)(*xs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return jnp.mean((jnp.stack(outputs) - jnp.stack(ys)) ** 2)

    value, grads = jax.value_and_grad(loss)(dag.params)
    updates, opt_state = TX.update(grads, opt_state)
    params = optax.apply_updates(dag.params, updates)
    return dag.replace(params=params), opt_state, value


def timed(f: Any) -> tuple[Any, float]:
    """What it returns and how long it took."""
    begun = time.perf_counter()
    result = jax.block_until_ready(f())
    return result, round(time.perf_counter() - begun, 3)


def data(graph: dj.Graph, batch: int = 64) -> tuple[list[jax.Array], list[jax.Array]]:
    """Inputs and targets."""
    draw = lambda i: jax.random.normal(jax.random.key(i), (batch,))
    xs = [draw(i) for i, _ in enumerate(graph.inputs)]
    return xs, [jnp.sin(sum(xs)) for _ in graph.outputs]


def both(graph: dj.Graph) -> dict:
    """Compile and run, bundled and not."""
    xs, ys = data(graph)
    dag = dj.init(jax.random.key(0), graph, *xs)
    nets = {"arcs": dag, "bundle": dj.bundle(dag)}
    states = {name: TX.init(net.params) for name, net in nets.items()}
    runs = {n: (lambda n=n: step(nets[n], states[n], xs, ys)) for n in nets}
    first = {name: timed(run)[1] for name, run in runs.items()}
    losses = [float(run()[2]) for run in runs.values()]
    found = record.in_turn(runs, 20)
    return {
        "arcs": len(graph.arcs),
        "losses": losses,
        "first step, with trace and compilation": first,
        "seconds a step": record.medians(found),
        "times as fast": round(1 / record.ratio(found, "bundle", "arcs"), 1),
    }


def trained(graph: dj.Graph, steps: int = 300) -> dict:
    """A bundled training run."""
    xs, ys = data(graph)
    dag, init = timed(lambda: dj.init(jax.random.key(0), graph, *xs))
    net, bundle = timed(lambda: dj.bundle(dag))
    opt_state, losses = TX.init(net.params), []
    _, first = timed(lambda: step(net, opt_state, xs, ys))
    begun = time.perf_counter()
    for _ in range(steps):
        net, opt_state, loss = step(net, opt_state, xs, ys)
        losses.append(loss)
    jax.block_until_ready(losses)
    taken = (time.perf_counter() - begun) / steps
    return {
        "arcs": len(graph.arcs),
        "nodes": len(graph.nodes),
        "levels": graph.depth,
        "seconds": {
            "init": init, "bundle": bundle,
            "first step, with trace and compilation": first,
            "step": round(taken, 5),
        },
        "loss": [round(float(losses[0]), 4), round(float(losses[-1]), 4)],
        "steps": steps,
    }  # fmt: skip


def main() -> None:
    """Measure and record."""
    record.write(
        "bundles",
        {
            "one hidden layer": both(one_hidden(48)),
            "bipartite": both(bipartite(48)),
            "random": trained(random_dag(10_000, 1_000, 16)),
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    main()
