"""`dj.compact` on all networks of `keras.applications` and on those of the zoo.

    python benchmarks/compaction_coverage.py [--only NAME ...] [--again]

Each network is measured in a process of its own and recorded when it is done; networks
that are recorded are skipped, unless they failed. Of the units 30 percent are removed,
by the l2 norm of their weights, and the compacted network is held against the masked
one at two batch sizes. All arrays are random: kernels of variance 1 / fan-in, scales
and variances around 1, biases and tables around 0; batch normalizations of Keras know
the statistics of what reaches them. No removed channel is silent.

How much the outputs vary over examples and over classes is recorded too, and how much
the mask changes them: agreement of constants would show nothing.

Networks of the zoo are small here. They are measured in double precision as well, there
with random masks too (100, or as many as the variable MASKS says), of which each
removes a share of every group's units and every other one whole arcs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
import trace_coverage as tracing

import dagjax as dj

IMAGE = {"input_shape": (8, 8, 1)}
COLOR = {"input_shape": (32, 32, 3)}
TOKENS = {"depth": 2, "heads": 2, "features": 16}
GPT = {**TOKENS, "classes": 50, "input_shape": (8,)}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", IMAGE),
    "lenet-300-100": ("lenet-300-100", IMAGE),
    "lenet5": ("lenet5", IMAGE),
    "conv2": ("conv2", IMAGE),
    "conv4": ("conv4", IMAGE),
    "conv6": ("conv6", IMAGE),
    "vgg16": ("vgg16", {"classes": 10, "width": 8, "hidden": (16, 16), **COLOR}),
    "vgg16-bn": ("vgg16-bn", {"classes": 10, "width": 8, "hidden": (16, 16), **COLOR}),
    "resnet8": ("resnet8", {"width": 8, **IMAGE}),
    "resnet20": ("resnet20", {"width": 4, **IMAGE}),
    "resnet32": ("resnet32", {"width": 4, **IMAGE}),
    "resnet56": ("resnet56", {"width": 4, **IMAGE}),
    "resnet50": ("resnet50", {"classes": 10, "width": 8, **COLOR}),
    "wide-resnet28-10": ("wide-resnet28-10", {"widen": 2, "width": 4, **IMAGE}),
    "densenet40": ("densenet40", {"growth": 4, "width": 8, **IMAGE}),
    "inception": ("inception", {"classes": 10, "width": 8, **COLOR}),
    "mobilenet": ("mobilenet", {"classes": 10, "width": 0.25, **COLOR}),
    "unet": ("unet", {"depth": 2, "width": 4, "input_shape": (16, 16, 1)}),
    "vit": ("vit", {**TOKENS, "classes": 10, "patch": 4, **IMAGE}),
    "vit swiglu": ("vit", {**TOKENS, "classes": 10, "mlp": "swiglu", **IMAGE}),
    "vit-tiny": (
        "vit-tiny",
        {"depth": 2, "features": 24, "classes": 10, "patch": 4, **IMAGE},
    ),
    "mixer": (
        "mixer",
        {
            "depth": 2, "classes": 10, "features": 16, "token_hidden": 8,
            "hidden": 32, "patch": 2, **IMAGE,
        },
    ),
    "gpt": ("gpt", GPT),
    "gpt swiglu": ("gpt", {**GPT, "mlp": "swiglu"}),
    "gpt experts": ("gpt", {**GPT, "mlp": "experts"}),
    "lstm": ("lstm", {"hidden": 8, "input_shape": (5, 4)}),
}  # fmt: skip

DENSITY = 0.7
BATCHES = (2, 3)
EXAMPLES = 16  # of which normalizations of Keras take their statistics
MASKS = 100
SHARES = (0.1, 0.9)  # of a group's units, that a random mask removes
BARS = {
    "relative difference, float32": 1e-5,
    "relative difference, float64": 1e-12,
    "parameters that go": 0.2,
    "spread of outputs": 1e-3,
    "change by the mask": 1e-3,
}
PLACE = record.RESULTS / "compaction_coverage.json"


class Net(NamedTuple):
    """A network and how its inputs are drawn."""

    dag: dj.DAG
    draw: Callable[[int, np.random.Generator], tuple[Any, ...]]
    seconds: float  # of tracing, or of initializing


# Networks with values as if they had been trained.


def keras_net(name: str) -> Net:
    """A network of `keras.applications`, its logits, traced at a small size."""
    side, rng = tracing.SMALLEST.get(name, 32), np.random.default_rng(0)
    options = {"input_shape": (side, side, 3), "classes": 10}
    model = tracing.build(name, classifier_activation=None, **options)
    values = settled(model, tracing.keras_values(model, rng), rng)
    subject = tracing.keras_subject(model, values, images(model, 2, rng))
    begun = time.perf_counter()
    dag = subject.trace()
    seconds = time.perf_counter() - begun
    return Net(dag, lambda batch, rng: (images(model, batch, rng),), seconds)


def images(model: Any, batch: int, rng: np.random.Generator) -> jax.Array:
    """Images that differ in colors, contrast and coarse patterns, beside noise."""
    pairs = [tracing.image(model, rng) for _ in range(-(-batch // 2))]
    noise = np.concatenate(pairs)[:batch]
    side = noise.shape[1]
    coarse = rng.standard_normal((batch, 3, 3, 3)).repeat(-(-side // 3), 1)
    coarse = coarse.repeat(-(-side // 3), 2)[:, :side, :side]
    color, contrast = rng.uniform(-1, 1, (2, batch, 1, 1, 3))
    x = (noise - noise.mean()) / noise.std() * (1 + contrast / 2) + color + coarse
    return jnp.asarray(noise.mean() + noise.std() * x / 2, jnp.float32)


def settled(model: Any, values: dict[str, Any], rng: Any) -> dict[str, jax.Array]:
    """The values, with those statistics of normalizations that training would find.

    Means and variances are those of what reaches a layer, up to their random tenth, and
    kernels are enlarged: else all images give the same output. What they are shifted by
    is around one: else rounding grows from layer to layer of the deepest ones.
    """
    depthwise = [layer.kernel for layer in model.layers if _is_depthwise(layer)]
    channels = {v.path: v.shape[-2] for v in depthwise}  # no part of the fan-in
    values = {
        path: x * np.sqrt(2 * channels.get(path, 1), dtype=x.dtype)
        if path.endswith("kernel") else x + path.endswith("beta")
        for path, x in values.items()
    }  # fmt: skip
    norms = [layer for layer in model.layers if hasattr(layer, "moving_variance")]
    seen: dict[str, Any] = {}
    for layer in norms:
        layer.call = functools.partial(_normalize, layer, seen)
    subject = tracing.keras_subject(model, values, images(model, EXAMPLES, rng))
    with tracing.quick_compilation():
        found = jax.jit(lambda *args: (subject.fn(*args), dict(seen))[1])(*subject.args)
    for layer in norms:
        del layer.call
        mean, variance = found[layer.name]
        deviation, path = variance**0.5, layer.moving_mean.path
        values = values | {path: mean + deviation * values[path]}
        values[layer.moving_variance.path] *= variance
    return values


def _is_depthwise(layer: Any) -> bool:
    return type(layer).__name__ == "DepthwiseConv2D"


def _normalize(layer: Any, seen: dict[str, Any], x: Any, **options: Any) -> Any:
    """What a batch normalization does in training, quiet channels not made loud."""
    others = tuple(range(x.ndim - 1))
    mean, variance = x.mean(others), x.var(others)
    variance = (variance + variance.mean()) / 2 + 1e-6
    seen[layer.name] = mean, variance
    gamma = 1 if layer.gamma is None else layer.gamma.value
    return (x - mean) * jax.lax.rsqrt(variance) * gamma + layer.beta.value


def zoo_net(name: str) -> Net:
    """A network of the zoo, small."""
    kind, options = ZOO[name]
    graph, rng = dj.zoo.by_name(kind, **options), np.random.default_rng(0)
    draw = lambda batch, rng: _drawn(graph, batch, rng)
    begun = time.perf_counter()
    shapes = jax.eval_shape(
        lambda *xs: dj.init(jax.random.key(0), graph, *xs), *draw(2, rng)
    )
    seconds = time.perf_counter() - begun
    dag = jax.tree_util.tree_map_with_path(_enlarged, tracing.filled(shapes, rng))
    return Net(jax.tree.map(_double, dag), draw, seconds)


def _enlarged(path: Any, x: jax.Array) -> jax.Array:
    """Kernels of variance 2 / fan-in: signals get through many layers."""
    is_kernel = jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
    return x * np.sqrt(2, dtype=x.dtype) if is_kernel else x


def _drawn(graph: dj.Graph, batch: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """Random inputs of a graph."""
    spaces = [dict(graph.spaces)[node] for node in graph.inputs]
    shapes = [jax.ShapeDtypeStruct((batch, *s.shape), s.dtype) for s in spaces]
    return tuple(_double(tracing.drawn(shape, rng)) for shape in shapes)


def _double(x: jax.Array) -> jax.Array:
    """Double precision, if this process has it."""
    real = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(np.float64) if real and jax.config.jax_enable_x64 else x


# What is compared.


@jax.jit
def value(net: Any, xs: tuple[Any, ...]) -> Any:
    """The outputs of any network: one program for all values of its parameters."""
    return net(*xs)


def spread(y: Any) -> dict[str, float]:
    """Standard deviations over examples and classes, relative to the largest value."""
    host = np.asarray(jax.tree.leaves(y)[0], np.float64)
    largest = max(float(abs(host).max()), np.finfo(float).tiny)
    over = lambda axis: round(float(host.std(axis).mean()) / largest, 6)
    return {"examples": over(0), "classes": over(-1)}


def compared(dag: dj.DAG, mask: Any, small: Any, runs: list[Any]) -> dict[str, Any]:
    """The compacted network against the masked one, which reads all inputs at once."""
    masked = dag.replace(params=dj.masks.apply(mask, dag.params))
    together = jax.tree.map(lambda *xs: jnp.concatenate(xs), *runs)
    with tracing.quick_compilation():
        want, whole = value(masked, together), value(dag, together)
        got = jax.tree.map(
            lambda *ys: jnp.concatenate(ys), *(value(small, xs) for xs in runs)
        )
    return {
        "relative difference": tracing.distance(got, want),
        "spread": spread(want),
        "change": tracing.distance(want, whole),
    }


def unknown(found: dj.Units) -> list[str]:
    """Primitives without a rule that pinned something."""
    reasons = [reason for _, reason in found.source.channels.labels.pins]
    return sorted({r.step.name for r in reasons if r.unknown})


def pruned(net: Net) -> dict[str, Any]:
    """All figures of one cut."""
    clock, timed = {"trace": net.seconds}, _timed
    found = timed(clock, "units", lambda: dj.units(net.dag))
    prune = lambda: dj.prune_units(net.dag, "l2", density=DENSITY)
    mask = timed(clock, "prune", prune)
    cut = timed(clock, "compact", lambda: dj.compact(net.dag, mask, verify=False))
    rng = np.random.default_rng(1)
    figures = compared(net.dag, mask, cut.net, [net.draw(n, rng) for n in BATCHES])
    flops, params = zip(found.total, dj.units(cut.net).total, strict=True)
    return {
        "groups": len(found),
        "units": sum(group.size for group in found.values()),
        "parameters": [int(n) for n in params],
        "flops": [int(n) for n in flops],
        **figures,
        "unknown": unknown(found),
        "seconds": {what: round(t, 3) for what, t in clock.items()},
    }


def _timed(clock: dict[str, float], what: str, run: Callable[[], Any]) -> Any:
    begun = time.perf_counter()
    found = jax.block_until_ready(run())
    clock[what] = time.perf_counter() - begun
    return found


# Random masks.


def random_units(
    found: dj.Units, rng: np.random.Generator, arcs: bool
) -> dict[str, Any]:
    """Units that stay: of each group a random share, at least one."""
    share, kept = rng.uniform(*SHARES), {}
    for name, group in found.items():
        if name in found.channels or arcs:
            gone = min(round(share * group.size), group.size - 1)
            kept[name] = rng.permutation(group.size) >= gone
    return kept


def random_masks(net: Net) -> dict[str, Any]:
    """The largest difference over random masks, and how much the masks change."""
    found, rng = dj.units(net.dag), np.random.default_rng(2)
    figures, left = [], []
    masks = int(os.environ.get("MASKS", MASKS))
    for number in range(masks):
        value.clear_cache()  # hundreds of programs are more than one process can map
        mask = found.mask(random_units(found, rng, arcs=bool(number % 2)))
        small = dj.compact(net.dag, mask, verify=False).net
        runs = [net.draw(BATCHES[number % 3 == 0], rng)]
        figures.append(compared(net.dag, mask, small, runs))
        left.append(_share(small, net.dag))
    worst = max(range(masks), key=lambda n: figures[n]["relative difference"])
    return {
        "masks": masks,
        "relative difference": figures[worst]["relative difference"],
        "worst mask": worst,
        "parameters left": [round(min(left), 3), round(max(left), 3)],
        "outputs that vary": sum(_varies(f["spread"]) for f in figures),
    }


def _share(small: Any, dag: dj.DAG) -> float:
    """The share of the parameters that is left."""
    sizes = [sum(map(np.size, jax.tree.leaves(n.params))) for n in (small, dag)]
    return sizes[0] / sizes[1]


def _varies(found: dict[str, float]) -> bool:
    return min(found.values()) > BARS["spread of outputs"]


# One network, in a process of its own.


def one(name: str) -> None:
    """Print the figures of one network, or the error, as the last line."""
    try:
        figures = pruned(keras_net(name) if name in tracing.KERAS else zoo_net(name))
        if jax.config.jax_enable_x64:
            figures |= {"random": random_masks(zoo_net(name))}
    except Exception as error:
        import traceback

        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(figures))


def run(name: str, **env: str) -> dict[str, Any]:
    """The figures of one network, from a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    found = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | env
    )
    if found.returncode:
        return {"error": f"exit status {found.returncode}"}
    return json.loads(found.stdout.splitlines()[-1])


def measure(name: str) -> dict[str, Any]:
    """The figures of one network, those of the zoo in double precision too."""
    begun = time.perf_counter()
    figures = run(name)
    if name in ZOO:
        figures["float64"] = run(
            name, JAX_ENABLE_X64="1", JAX_NUMPY_DTYPE_PROMOTION="standard"
        )
    return figures | {"seconds in all": round(time.perf_counter() - begun, 1)}


# The record.


def passes(figures: dict[str, Any]) -> dict[str, bool]:
    """Which bars a network clears."""
    double = figures.get("float64", {})
    if "error" in figures or "error" in double:
        return {"evaluated": False}
    before, after = figures["parameters"]
    worst = {"float32": _worst(figures)} | (
        {"float64": _worst(double)} if double else {}
    )
    bar = lambda dtype: BARS[f"relative difference, {dtype}"]
    return {
        **{dtype: worst[dtype] <= bar(dtype) for dtype in worst},
        "parameters": after <= (1 - BARS["parameters that go"]) * before,
        "spread": _varies(figures["spread"]),
        "change": figures["change"] > BARS["change by the mask"],
    }


def _worst(figures: dict[str, Any]) -> float:
    """The largest difference over all masks."""
    random = figures.get("random", {"relative difference": 0.0})
    return max(figures["relative difference"], random["relative difference"])


def failing(figures: dict[str, Any]) -> list[str]:
    """Which bars it does not clear."""
    return [bar for bar, fine in passes(figures).items() if not fine]


def read() -> dict[str, Any]:
    """What is recorded."""
    return json.loads(PLACE.read_text())["models"] if PLACE.exists() else {}


def write(models: dict[str, Any]) -> None:
    """Record what is known."""
    fails = {name: bars for name, f in models.items() if (bars := failing(f))}
    summary = {
        "models": len(models), "pass all": len(models) - len(fails), "fail": fails
    }  # fmt: skip
    figures = {
        "machine": tracing.machine(),
        "bars": BARS,
        "density": DENSITY,
        "summary": summary,
        "models": models,
    }
    PLACE.parent.mkdir(exist_ok=True)
    PLACE.write_text(json.dumps(figures, indent=2) + "\n")


_kept = lambda pair: f"{pair[1] / max(pair[0], 1):.3f}"
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "params": lambda f: f"{f['parameters'][0]:,}",
    "kept": lambda f: _kept(f["parameters"]),
    "flops": lambda f: _kept(f["flops"]),
    "diff": lambda f: f"{f['relative difference']:.1e}",
    "float64": lambda f: f"{_worst(f['float64']):.1e}" if "float64" in f else "-",
    "examples": lambda f: f"{f['spread']['examples']:.3f}",
    "classes": lambda f: f"{f['spread']['classes']:.3f}",
    "change": lambda f: f"{f['change']:.2f}",
    **{
        what: lambda f, what=what: f"{f['seconds'][what]:.1f}"
        for what in ("trace", "units", "prune", "compact")
    },
    "in all": lambda f: f"{f['seconds in all']:.0f}",
}


def table(models: dict[str, Any]) -> str:
    """One line a network."""
    lines = [" " * 18 + "".join(f"{word:>12}" for word in COLUMNS)]
    for name, f in models.items():
        broken = "evaluated" in (fails := failing(f))
        cells = [] if broken else [show(f) for show in COLUMNS.values()]
        lines.append(f"{name:18}{''.join(f'{c:>12}' for c in cells)}  {fails or ''}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not recorded, record it, print the table."""
    every = [*ZOO, *tracing.KERAS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=every, metavar="NAME")
    parser.add_argument("--again", action="store_true", help="recorded ones too")
    parser.add_argument("--one", choices=every, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(options.one)
    models = read()
    for name in options.only or every:
        if options.again or name not in models or failing(models[name]):
            models[name] = measure(name)
            print(name, "fails:", failing(models[name]), flush=True)
            write({n: models[n] for n in every if n in models})
    print(table({n: models[n] for n in every if n in models}))


if __name__ == "__main__":
    main()
