"""`dj.trace` on all networks of `keras.applications` and on Flax networks.

    python benchmarks/trace_coverage.py [MODEL ...] [--again]

Each model is measured in a process of its own and recorded when it is done; models that
are recorded are skipped. At the usual input size nothing is evaluated: the branches are
counted and compared with those of the Keras layers, and tracing is timed, the first one
in a fresh process and a second one, with the growth of the memory. At a small input
size, with random parameters, the DAG is compared with the function that was traced
(values, compiled program, FLOPs; time only where the programs differ), laws 1, 2 and 7
are tested, and a residual branch is switched off and left out of the Keras model.

Keras is not asked for initial values, which it would compile programs for: the kernels
are drawn here with variance 1 / fan-in, scales and variances around 1, others around 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
import record

import dagjax as dj

KERAS = tuple(
    """
    ConvNeXtBase ConvNeXtLarge ConvNeXtSmall ConvNeXtTiny ConvNeXtXLarge DenseNet121
    DenseNet169 DenseNet201 EfficientNetB0 EfficientNetB1 EfficientNetB2 EfficientNetB3
    EfficientNetB4 EfficientNetB5 EfficientNetB6 EfficientNetB7 EfficientNetV2B0
    EfficientNetV2B1 EfficientNetV2B2 EfficientNetV2B3 EfficientNetV2L EfficientNetV2M
    EfficientNetV2S InceptionResNetV2 InceptionV3 MobileNet MobileNetV2 MobileNetV3Large
    MobileNetV3Small NASNetLarge NASNetMobile ResNet101 ResNet101V2 ResNet152
    ResNet152V2 ResNet50 ResNet50V2 VGG16 VGG19 Xception
    """.split()
)
SMALLEST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}  # others: 32
KINDS = {
    "Add": "sum",
    "CustomScaleLayer": "sum",  # of InceptionResNetV2: x + scale * y
    "Concatenate": "concat",
    "Multiply": "product",
}
BARS = {
    "values, relative error": 1e-6,
    "time against the function": 1.02,
    "seconds of tracing": 3.0,
    "memory while tracing, MB": 300.0,
    "laws, relative error": 1e-5,
}
PLACE = record.RESULTS / "trace_coverage.json"
ARCS = 20  # that are deleted


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function `fn(params, state, *inputs)`, `state` perhaps None, with arguments."""

    fn: Callable[..., Any]
    params: Any
    state: Any
    inputs: tuple[Any, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        """All that it is called with."""
        held = () if self.state is None else (self.state,)
        return (self.params, *held, *self.inputs)

    def trace(self) -> dj.DAG:
        """Its DAG, the levels found."""
        dag = dj.trace(self.fn, self.params, *self.inputs, state=self.state)
        assert dag.graph.levels
        return dag

    def value(self, *args: Any) -> Any:
        """The result without the new state."""
        y = self.fn(*args)
        return y if self.state is None else y[0]

    def ours(self, dag: dj.DAG) -> Callable[..., Any]:
        """The DAG as a function of the same arguments."""
        if self.state is None:
            return lambda params, *xs: dag.replace(params=params)(*xs)
        held = lambda state: {**dag.state, "user": state}
        return lambda params, state, *xs: dag.replace(params=params, state=held(state))(
            *xs
        )


# Random arguments.


def fill(name: str, shape: Any, rng: np.random.Generator) -> jax.Array:
    """A random array for a parameter of this name, or for an input."""
    size, dtype = tuple(shape.shape), jnp.dtype(shape.dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 21, size), dtype)
    x = rng.standard_normal(size, dtype=np.float32)
    if "kernel" in name or name == "embedding":
        fan = size[:2] if "depthwise" in name else size[:-1]
        x *= np.float32(1 / np.sqrt(np.prod(fan)))
    elif name != "input":
        x *= np.float32(0.1)
    if name in ("gamma", "scale", "moving_variance", "variance", "var"):
        x = abs(1 + x)
    return jnp.asarray(x, dtype)


def filled(tree: Any, rng: np.random.Generator) -> Any:
    """A tree of shapes with random arrays, by the last word of their path."""
    last = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
    return jax.tree_util.tree_map_with_path(lambda p, s: fill(last(p), s, rng), tree)


def drawn(shape: Any, rng: np.random.Generator) -> jax.Array:
    """An input: a random key, whole numbers or normal ones."""
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(5)
    return fill("input", shape, rng)


# Keras.


def build(name: str, **options: Any) -> Any:
    """A Keras model whose variables have no values."""
    import keras

    with keras.StatelessScope(initialize_variables=False):
        return getattr(keras.applications, name)(weights=None, **options)


def shape_of(v: Any) -> jax.ShapeDtypeStruct:
    """The shape of a Keras variable."""
    return jax.ShapeDtypeStruct(tuple(v.shape), v.dtype)


def keras_full(model: Any) -> Subject:
    """A Keras model at its usual input size, shapes only."""
    fn = lambda p, s, x: model.stateless_call(p, s, x, training=False)
    side = model.input_shape[1] or 224
    parts = (model.trainable_variables, model.non_trainable_variables)
    p, s = ([shape_of(v) for v in part] for part in parts)
    return Subject(fn, p, s, (jax.ShapeDtypeStruct((1, side, side, 3), "float32"),))


def keras_values(model: Any, rng: np.random.Generator) -> dict[str, jax.Array]:
    """Random values of all variables, by their paths."""
    name = lambda v: v.path.rpartition("/")[2]
    return {v.path: fill(name(v), shape_of(v), rng) for v in model.variables}


def settled(model: Any, values: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    """The values, batch normalizations scaled to what reaches them.

    Else signals vanish on the way, or explode, and little that is deleted matters.
    """
    norms = [layer for layer in model.layers if hasattr(layer, "moving_variance")]
    seen: dict[str, jax.Array] = {}
    for layer in norms:
        layer.call = functools.partial(_normalize, layer, seen)
    subject = keras_subject(model, values, x)
    with quick_compilation():
        squares = jax.jit(lambda *args: (subject.fn(*args), dict(seen))[1])(
            *subject.args
        )
    for layer in norms:
        del layer.call
        square, mean = squares[layer.name], layer.moving_mean.path
        values = values | {mean: values[mean] * square**0.5}
        values[layer.moving_variance.path] *= square
    return values


def _normalize(layer: Any, seen: dict[str, Any], x: Any, **options: Any) -> Any:
    """What a batch normalization does, its statistic the mean square of `x` itself."""
    seen[layer.name] = square = jnp.mean(x**2) + 1e-6
    gamma = 1 if layer.gamma is None else layer.gamma.value
    return x * jax.lax.rsqrt(square) * gamma + layer.beta.value


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """For programs whose time is of no interest."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def keras_subject(model: Any, values: dict[str, jax.Array], x: jax.Array) -> Subject:
    """A Keras model with these values of its variables."""
    fn = lambda p, s, x: model.stateless_call(p, s, x, training=False)
    parts = (model.trainable_variables, model.non_trainable_variables)
    p, s = ([values[v.path] for v in part] for part in parts)
    return Subject(fn, p, s, (x,))


def image(model: Any, rng: np.random.Generator) -> jax.Array:
    """Two small images, of colors up to 255 where the model scales them down."""
    size = (2, *model.input_shape[1:])
    scaled = {"Rescaling", "Normalization"} & {
        kind for kind, _ in layers(model).values()
    }
    x = rng.uniform(0, 255, size) if scaled else rng.standard_normal(size)
    return jnp.asarray(x, jnp.float32)


def layers(model: Any) -> dict[str, tuple[str, list[str]]]:
    """The graph of layers: `{layer: (class, layers that it reads)}`."""
    return {
        layer["name"]: (layer["class_name"], list(_sources(layer["inbound_nodes"])))
        for layer in model.get_config()["layers"]
    }


def _sources(x: Any) -> Iterator[str]:
    """The layers of the tensors in a configuration."""
    if isinstance(x, dict) and x.get("class_name") == "__keras_tensor__":
        yield x["config"]["keras_history"][0]
    elif isinstance(x, dict | list | tuple):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _sources(part)


def keras_branches(model: Any) -> dict[str, Any]:
    """Sums, merges and paths of the graph of layers."""
    paths: dict[str, int] = {}
    kinds: Counter[str] = Counter()
    for name, (kind, sources) in layers(model).items():
        paths[name] = sum(paths[s] for s in sources) if sources else 1
        if len(sources) > 1:
            kinds[KINDS.get(kind, kind)] += 1
    sums = kinds.pop("sum", 0)
    return {"sums": sums, "merges": dict(kinds), "paths": str(paths[name])}


# What is counted and timed at the usual size.


def sums_of(graph: dj.Graph) -> list[str]:
    """The nodes where several arcs are added."""
    several = lambda node: len(graph.arcs_into(node)) > 1
    return [n for n in graph.nodes if several(n) and n not in graph.merge_of]


def branches(graph: dj.Graph) -> dict[str, Any]:
    """Sums, merges and paths of a DAG."""
    word = lambda merge: re.split(r"\W*\(", repr(merge))[0].lower()
    return {
        "sums": len(sums_of(graph)),
        "merges": dict(Counter(word(merge) for merge in graph.merge_of.values())),
        "paths": str(dj.count_paths(graph)),
    }


def opaque(dag: dj.DAG, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Arcs and merges of work that is not known, and their FLOPs (a loop: one step)."""
    merges = [n for n, m in dag.graph.merge_of.items() if getattr(m, "opaque", False)]
    arcs = [arc.name for arc in dag.graph.arcs if arc.fn.opaque]
    if not merges and not arcs:
        return {"arcs": [], "merges": [], "flops": 0}
    z = jax.eval_shape(lambda dag, *xs: whole(dag, dj.inject(dag, *xs)), dag, *inputs)
    flops = lambda f, *args: jax.jit(f).lower(*args).cost_analysis()["flops"]
    steps = [f for f in dj.elementary(dag) if f.arcs[0] in arcs]
    found = sum(flops(lambda f, z: f(z), f, z) for f in steps)
    for node in merges:
        read = functools.partial(lambda node, dag, v: dag.read(node, v), node)
        found += flops(read, dag, z[node])
    return {"arcs": arcs, "merges": merges, "flops": int(found)}


def memory(word: str) -> int:
    """Bytes that the process holds (VmRSS), or held at most (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.search(rf"{word}:\s*(\d+)", status.read_text())[1])


def tracing(subject: Subject) -> tuple[dj.DAG, dict[str, Any]]:
    """The DAG; seconds of a first and of a second tracing, memory in the first."""
    before, begun = memory("VmRSS"), time.perf_counter()
    dag = subject.trace()
    first, grown = time.perf_counter() - begun, memory("VmHWM") - before
    begun = time.perf_counter()
    subject.trace()
    second = time.perf_counter() - begun
    return dag, {
        "seconds": {"first": round(first, 3), "second": round(second, 3)},
        "memory, MB": round(max(grown, 0) / 2**20, 1),
    }


def at_full_size(subject: Subject, want: dict[str, Any]) -> dict[str, Any]:
    """Size, branches and tracing."""
    dag, figures = tracing(subject)
    graph, found = dag.graph, branches(dag.graph)
    return {
        "input": [str(jax.typeof(x).str_short()) for x in subject.inputs],
        "parameters": sum(int(np.prod(p.shape)) for p in jax.tree.leaves(dag.params)),
        "nodes": len(graph.nodes),
        "arcs": len(graph.arcs),
        "levels": graph.depth,
        **found,
        "as written": found == want or {"found": found, "written": want},
        "opaque": opaque(dag, subject.inputs),
        **figures,
    }


# Values, programs and laws at a small size.


def distance(got: Any, want: Any, scale: Any = None) -> float:
    """The largest deviation relative to the largest magnitude; inf if not finite."""
    leaves = lambda tree: [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    got, want, scale = map(leaves, (got, want, want if scale is None else scale))
    size = max(float(np.max(abs(s), initial=0)) for s in scale)
    worst = max(
        float(np.max(abs(g - w), initial=0)) for g, w in zip(got, want, strict=True)
    )
    return worst / size if np.isfinite(worst) and 0 < size < np.inf else np.inf


def instructions(program: Any) -> Counter[str]:
    """The instructions of an optimized program, without names and places in files."""
    lines = (line for line in program.as_text().splitlines() if line[:2] == "  ")
    named = r", metadata=\{[^{}]*\}|(?<=parameter\()\d+|(?<=%)[\w.\-]+"
    return Counter(re.sub(named, "", line).strip() for line in lines)


def against(subject: Subject, dag: dj.DAG) -> tuple[Any, dict[str, Any]]:
    """The value of the function; the DAG's program and values against its own."""
    theirs = jax.jit(subject.value).lower(*subject.args).compile()
    ours = jax.jit(subject.ours(dag)).lower(*subject.args).compile()
    want, got = theirs(*subject.args), ours(*subject.args)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    same = instructions(ours) == instructions(theirs)
    flops = [int(program.cost_analysis()["flops"]) for program in (ours, theirs)]
    return want, {
        "bitwise": all(np.array_equal(a, b) for a, b in pairs),
        "relative error": distance(got, want),
        "same program": same,
        "flops": {"dagjax": flops[0], "function": flops[1]},
        "time": 1.0 if same else timed(subject, ours, theirs),
    }


def timed(subject: Subject, ours: Any, theirs: Any) -> float:
    """The median ratio of interleaved calls."""
    runs = {
        "ours": lambda: ours(*subject.args),
        "theirs": lambda: theirs(*subject.args),
    }
    return record.ratio(record.in_turn(runs, 20), "ours", "theirs")


def whole(dag: dj.DAG, z: Any) -> Any:
    """All level factors, one after the other."""
    return dj.compose(dj.factors(dag))(z)


def undone(dag: dj.DAG, z: Any) -> Any:
    """Their inverses."""
    return dj.inverse(dj.factors(dag))(z)


def stirred(z: Any, rng: np.random.Generator) -> Any:
    """An injection with random numbers at every node, in every port."""
    presence = lambda path: jax.tree_util.keystr(path[-1:], simple=True) == "presence"

    def add(path: Any, x: jax.Array) -> jax.Array:
        if presence(path) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(add, z)


def laws(dag: dj.DAG, inputs: tuple[Any, ...], want: Any) -> dict[str, float]:
    """Law 1: the composition is the function. Law 2: the inverse gives `b` back."""
    b = dj.inject(dag, *inputs)
    forth, back = jax.jit(whole), jax.jit(undone)
    h = forth(dag, b)
    got = [dag.read(node, h[node]) for node in dag.graph.outputs]
    other = stirred(b, np.random.default_rng(2))
    z = forth(dag, other)
    return {
        "law 1": distance(got, want),
        "law 2": max(distance(back(dag, h), b, h), distance(back(dag, z), other, z)),
    }


def gated(dag: dj.DAG, inputs: tuple[Any, ...]) -> Callable[[str], Any]:
    """`arc -> value with this arc's gate at 0`, one program for all arcs."""
    program = jax.jit(lambda dag, gates, *xs: dag(*xs, gates=gates))
    ones = {arc.name: np.float32(1) for arc in dag.graph.arcs}
    return lambda off: program(dag, ones | {off: np.float32(0)}, *inputs)


def deletion(
    dag: dj.DAG, inputs: tuple[Any, ...], want: Any, close: Callable[[str], Any]
) -> dict[str, Any]:
    """Law 7: deleted arcs, the DAG evaluated step by step, against closed gates."""
    names = [arc.name for arc in dag.graph.arcs]
    rng = np.random.default_rng(3)
    chosen = rng.choice(names, min(ARCS, len(names)), replace=False).tolist()
    alone = {name: dj.delete(dag, name)(*inputs) for name in chosen}
    close, bar = {n: close(n) for n in chosen}, BARS["laws, relative error"]
    return {
        "law 7": max(distance(close[n], y, (y, want)) for n, y in alone.items()),
        "arcs": len(chosen),
        "that matter": sum(distance(y, want) > bar for y in alone.values()),
    }


# One residual branch.


def without(model: Any, layer: str, port: int) -> Any:
    """The Keras model in which a sum of two reads zero in place of one of them."""
    import keras

    def call(one: Any, *args: Any, **kwargs: Any) -> Any:
        if one.name != layer:
            return one(*args, **kwargs)
        listed = isinstance(args[0], list | tuple)
        both = [*(args[0] if listed else args)]
        both[port] = keras.ops.zeros_like(both[port])
        return one(both) if listed else one(*both)

    with keras.StatelessScope(initialize_variables=False):
        return keras.models.clone_model(
            model, clone_function=lambda layer: layer, call_function=call
        )


def middle_sum(graph: dj.Graph, model: Any) -> tuple[str, str] | None:
    """A layer in the middle that adds two values, and its node."""
    adds = [
        name for name, (kind, sources) in layers(model).items()
        if KINDS.get(kind) == "sum" and len(sources) == 2
    ]  # fmt: skip
    if not adds:
        return None
    place, nodes = len(adds) // 2, sums_of(graph)
    return adds[place], adds[place] if adds[place] in nodes else nodes[place]


def residual(
    dag: dj.DAG, model: Any, values: dict, x: Any, want: Any, close: Any
) -> dict[str, Any] | None:
    """Either arc into a sum switched off, and either operand left out in Keras."""
    if (found := middle_sum(dag.graph, model)) is None:
        return None
    layer, node = found
    arcs = [arc.name for arc in dag.graph.arcs_into(node)]
    ours = [close(arc) for arc in arcs]
    cut = [keras_subject(without(model, layer, i), values, x) for i in (0, 1)]
    theirs = [subject.value(*subject.args) for subject in cut]
    worst = lambda pairs: max(distance(a, b, (b, want)) for a, b in pairs)
    return {
        "layer": layer,
        "arcs": arcs,
        "relative error": min(
            worst(zip(ours, theirs, strict=True)),
            worst(zip(ours, theirs[::-1], strict=True)),
        ),
        "change": min(distance(y, want) for y in theirs),
    }


# Models.


def keras_model(name: str) -> dict[str, Any]:
    """All figures of a Keras model."""
    import keras  # noqa: F401  its import is no part of building

    begun = time.perf_counter()
    model = build(name)
    seconds = {"seconds to build": round(time.perf_counter() - begun, 3)}
    figures = at_full_size(keras_full(model), keras_branches(model))
    return seconds | figures | keras_checks(name)


def keras_checks(name: str) -> dict[str, Any]:
    """What is evaluated, of logits at a small size."""
    side, rng = SMALLEST.get(name, 32), np.random.default_rng(0)
    options = {"input_shape": (side, side, 3), "classes": 10}
    model = build(name, classifier_activation=None, **options)
    x = image(model, rng)
    values = settled(model, keras_values(model, rng), x)
    dag, figures, want, close = checked(keras_subject(model, values, x))
    with quick_compilation():
        branch = residual(dag, model, values, x, want, close)
    return figures | {"residual branch": branch}


def flax_model(name: str) -> dict[str, Any]:
    """All figures of a Flax network."""
    from flax_examples import EXAMPLES

    example = EXAMPLES[name]
    begun = time.perf_counter()
    full = flax_subject(*example.full)
    seconds = {"seconds to build": round(time.perf_counter() - begun, 3)}
    want = {"sums": example.sums, "merges": example.merges, "paths": str(example.paths)}
    figures = at_full_size(full, want)
    small, rng = flax_subject(*example.small), np.random.default_rng(0)
    params, state = filled((small.params, small.state), rng)
    inputs = tuple(drawn(x, rng) for x in small.inputs)
    return seconds | figures | checked(Subject(small.fn, params, state, inputs))[1]


def flax_subject(module: Any, inputs: tuple[Any, ...]) -> Subject:
    """A Flax module with shapes of parameters and of statistics."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    state = {k: v for k, v in variables.items() if k != "params"}
    if not state:
        fn = lambda params, *xs: module.apply({"params": params}, *xs)
        return Subject(fn, variables["params"], None, inputs)
    fn = lambda p, s, *xs: (module.apply({"params": p, **s}, *xs), s)
    return Subject(fn, variables["params"], state, inputs)


def checked(subject: Subject) -> tuple[dj.DAG, dict[str, Any], Any, Any]:
    """Programs and laws; with the DAG, the value and the way to switch arcs off."""
    dag = subject.trace()
    want, figures = against(subject, dag)
    close = gated(dag, subject.inputs)
    with quick_compilation():
        found = laws(dag, subject.inputs, want)
        found |= deletion(dag, subject.inputs, want, close)
    small = [str(jax.typeof(x).str_short()) for x in subject.inputs]
    return dag, {"checked at": small, **figures, "laws": found}, want, close


# The record.


def passes(name: str, figures: dict[str, Any]) -> dict[str, bool]:
    """Which bars a model clears."""
    if "error" in figures:
        return {"evaluated": False}
    bar, branch = BARS["laws, relative error"], _branch(figures)
    errors = [figures["laws"][law] for law in ("law 1", "law 2", "law 7")]
    mattering = figures["laws"]["that matter"] / figures["laws"]["arcs"]
    return {
        "as written": figures["as written"] is True,
        "not opaque": name not in KERAS or not figures["opaque"]["flops"],
        "seconds": figures["seconds"]["first"] < BARS["seconds of tracing"],
        "memory": figures["memory, MB"] < BARS["memory while tracing, MB"],
        "values": figures["relative error"] <= BARS["values, relative error"],
        "cost": figures["time"] <= BARS["time against the function"],
        "laws": max(errors) <= bar,
        "branch": branch["relative error"] <= bar,
        "nothing vanishes": mattering > 0.7 and branch["change"] > bar,
    }


def _branch(figures: dict[str, Any]) -> dict[str, Any]:
    """What the residual branch gave; nothing amiss where there is none."""
    return figures.get("residual branch") or {"relative error": 0.0, "change": 1.0}


def read() -> dict[str, Any]:
    """What is recorded."""
    return json.loads(PLACE.read_text())["models"] if PLACE.exists() else {}


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """How many models clear all bars, and which fail which."""
    failing = {n: _failing(passes(n, figures)) for n, figures in models.items()}
    return {
        "models": len(models),
        "pass all": sum(not fails for fails in failing.values()),
        "fail": {n: fails for n, fails in failing.items() if fails},
    }


def write(models: dict[str, Any]) -> None:
    """Record what is known."""
    keras = {n: figures for n, figures in models.items() if n in KERAS}
    flax = {n: figures for n, figures in models.items() if n not in KERAS}
    figures = {
        "machine": machine(),
        "bars": BARS,
        "keras": summary(keras),
        "flax": summary(flax),
        "models": models,
    }
    PLACE.parent.mkdir(exist_ok=True)
    PLACE.write_text(json.dumps(figures, indent=2) + "\n")


def _failing(passed: dict[str, bool]) -> list[str]:
    return [bar for bar, passes in passed.items() if not passes]


def machine() -> dict[str, Any]:
    """Machine and versions, that of Keras too."""
    from importlib.metadata import version

    found = record.machine()
    return found | {"versions": found["versions"] | {"keras": version("keras")}}


def measure(name: str) -> dict[str, Any]:
    """The figures of one model, from a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    begun = time.perf_counter()
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        return {"error": f"exit status {run.returncode}"}
    figures = json.loads(run.stdout.splitlines()[-1])
    return figures | {"seconds in all": round(time.perf_counter() - begun, 1)}


def one(name: str) -> None:
    """Print the figures of one model, or the error, as the last line."""
    try:
        figures = keras_model(name) if name in KERAS else flax_model(name)
    except Exception as error:
        import traceback

        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(figures))


COLUMNS = {
    "nodes": lambda f: f"{f['nodes']}",
    "arcs": lambda f: f"{f['arcs']}",
    "levels": lambda f: f"{f['levels']}",
    "paths": lambda f: f"{float(f['paths']):.2g}",
    "sums": lambda f: f"{f['sums']}",
    "merges": lambda f: f"{sum(f['merges'].values())}",
    "trace, s": lambda f: f"{f['seconds']['first']:.2f}",
    "MB": lambda f: f"{f['memory, MB']:.0f}",
    "error": lambda f: f"{f['relative error']:.1g}",
    "time": lambda f: "same" if f["same program"] else f"{f['time']:.3f}",
    "laws": lambda f: f"{max(f['laws'][f'law {n}'] for n in (1, 2, 7)):.1g}",
    "branch": lambda f: (
        f"{_branch(f)['relative error']:.1g}" if f.get("residual branch") else "-"
    ),
}


def table(models: dict[str, Any]) -> str:
    """One line a model."""
    lines = [" " * 18 + "".join(f"{word:>9}" for word in COLUMNS)]
    for name, f in models.items():
        cells = [] if "error" in f else [show(f) for show in COLUMNS.values()]
        failing = ", ".join(_failing(passes(name, f)))
        lines.append(f"{name:18}{''.join(f'{c:>9}' for c in cells)}  {failing}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not recorded, record it, print the table."""
    from flax_examples import EXAMPLES

    every = [*KERAS, *EXAMPLES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--again", action="store_true", help="recorded models too")
    parser.add_argument("--one", choices=every, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(options.one)
    if unknown := {*options.models} - {*every}:
        parser.error(f"no model named {', '.join(unknown)}; {', '.join(every)}")
    models = read()
    for name in options.models or every:
        if options.again or "error" in models.get(name, {"error": ""}):
            models[name] = measure(name)
            print(name, "fails:", _failing(passes(name, models[name])), flush=True)
            write({n: models[n] for n in every if n in models})
    print(table({n: models[n] for n in every if n in models}))


if __name__ == "__main__":
    main()
