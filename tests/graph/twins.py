"""The networks of the zoo the ordinary way, in Flax, with parameters carried over.

A twin is written as its usual implementation has it: concatenations where the graph
sums, all heads at once where it has an arc for each, a recurrent cell where it unrolls.
A mapping brings the variables of a DAG into the form of its twin.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import dagjax as dj
from dagjax.graph.core.topology import Space
from tests.graph import nets

Tree = dict[str, Any]
Layer = tuple[str, Any, Any]  # its kind, parameters, statistics


class Twin(NamedTuple):
    """A graph, a module, and `dag -> variables of the module`."""

    graph: dj.Graph
    module: nn.Module
    variables: Callable[[dj.DAG], Tree]


# --- convolutional chains ---------------------------------------------------------

conv = functools.partial(nn.Conv, use_bias=False)
frozen = functools.partial(nn.BatchNorm, use_running_average=True)


class VGG(nn.Module):
    config: tuple[Any, ...]
    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x):
        for item in self.config:
            if item == "M":
                x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
            else:
                x = nn.relu(frozen()(nn.Conv(item, (3, 3))(x)))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(3)(x)


class Bottlenecks(nn.Module):
    stages: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(frozen()(conv(self.width, (7, 7), (2, 2))(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                width = self.width * 2**stage
                strides = (2, 2) if stage and i == 0 else (1, 1)
                y = nn.relu(frozen()(conv(width, (1, 1))(x)))
                y = nn.relu(frozen()(conv(width, (3, 3), strides)(y)))
                y = frozen()(conv(4 * width, (1, 1))(y))
                if x.shape != y.shape:
                    x = frozen()(conv(4 * width, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(3)(x.mean((1, 2)))


class WideResNet(nn.Module):
    blocks: int
    widen: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = conv(self.width, (3, 3))(x)
        for stage in range(3):
            for i in range(self.blocks):
                width = self.widen * self.width * 2**stage
                strides = (2, 2) if stage and i == 0 else (1, 1)
                y = nn.relu(frozen()(x))
                z = nn.relu(frozen()(conv(width, (3, 3), strides)(y)))
                z = conv(width, (3, 3))(z)
                x = z + (conv(width, (1, 1), strides)(y) if i == 0 else x)
        return nn.Dense(3)(nn.relu(frozen()(x)).mean((1, 2)))


class GoogLeNet(nn.Module):
    stages: tuple[Any, ...]
    width: int

    @nn.compact
    def __call__(self, x):
        unit = lambda x, w, k, s=1: nn.relu(frozen()(conv(w, (k, k), (s, s))(x)))
        pool = lambda x, s: nn.max_pool(x, (3, 3), (s, s), padding="SAME")
        x = pool(unit(x, self.width, 7, 2), 2)
        x = pool(unit(unit(x, self.width, 1), 3 * self.width, 3), 2)
        for i, modules in enumerate(self.stages):
            x = pool(x, 2) if i else x
            for one, three, five, pooled in modules:
                branches = [
                    unit(x, one, 1),
                    unit(unit(x, three[0], 1), three[1], 3),
                    unit(unit(x, five[0], 1), five[1], 5),
                    unit(pool(x, 1), pooled, 1),
                ]
                x = jnp.concatenate(branches, -1)
        return nn.Dense(3)(x.mean((1, 2)))


class MobileNetV2(nn.Module):
    stages: tuple[Any, ...]
    stem: int
    last: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(frozen()(conv(self.stem, (3, 3), (2, 2))(x)))
        for expansion, width, blocks, stride in self.stages:
            for i in range(blocks):
                y, inner = x, expansion * x.shape[-1]
                s = (1, 1) if i else (stride, stride)
                if expansion != 1:
                    y = nn.relu6(frozen()(conv(inner, (1, 1))(y)))
                y = conv(inner, (3, 3), s, feature_group_count=inner)(y)
                y = nn.relu6(frozen()(y))
                y = frozen()(conv(width, (1, 1))(y))
                x = x + y if x.shape == y.shape else y
        x = nn.relu6(frozen()(conv(self.last, (1, 1))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


class UNet(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        x, skips = self.twice(x, 0), []
        for i in range(1, self.depth + 1):
            skips.append(x)
            x = self.twice(nn.max_pool(x, (2, 2), (2, 2)), i)
        for i in reversed(range(self.depth)):
            x = nn.ConvTranspose(self.width * 2**i, (2, 2), (2, 2))(x)
            x = self.twice(jnp.concatenate([skips[i], x], -1), i)
        return nn.Conv(3, (1, 1))(x)

    def twice(self, x, level):
        for _ in range(2):
            x = nn.relu(frozen()(conv(self.width * 2**level, (3, 3))(x)))
        return x


def numbered(layers: Iterable[Layer]) -> Tree:
    """Layers under the names that Flax gives: `Conv_0, BatchNorm_0, Conv_1, ...`."""
    variables: Tree = {"params": {}, "batch_stats": {}}
    counts: dict[str, int] = {}
    for kind, params, stats in layers:
        name = f"{kind}_{counts.setdefault(kind, 0)}"
        counts[kind] += 1
        variables["params"][name] = params
        variables["batch_stats"] |= {name: stats} if stats else {}
    return variables


def layers_of(dag: dj.DAG, arc: str) -> list[Layer]:
    """The layers with parameters within an arc, in the order in which they act."""
    params, state = dag.params.get(arc, {}), dag.state.get(arc, {})
    inside = dag.graph.by_name[arc].fn.fn.arcs if params else ()
    return [
        (
            type(a.fn.fn).__name__,
            params[a.name],
            state.get(a.name, {}).get("batch_stats"),
        )
        for a in inside
        if a.name in params
    ]


def in_order(dag: dj.DAG, arcs: Iterable[str] = ()) -> Tree:
    """Layer after layer, arc after arc: level by level, a branch before its skip."""
    arcs = arcs or dag.graph.by_name
    return numbered(layer for arc in arcs for layer in layers_of(dag, arc))


def googlenet(dag: dj.DAG) -> Tree:
    """Branch after branch of every module."""
    branches = ("conv1", "norm1", "reduce3", "conv3", "reduce5", "conv5", "project")
    arcs: dict[str, None] = {}
    for arc in dag.graph.by_name:
        module, _, branch = arc.rpartition("/")
        names = [f"{module}/{b}" for b in branches] if branch in branches else [arc]
        arcs |= dict.fromkeys(names)
    return in_order(dag, arcs)


# --- a dense net that concatenates ------------------------------------------------


class DenseNet(nn.Module):
    blocks: int
    k: int
    growth: int
    width: int
    compression: float

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = conv(self.width, (3, 3))(x)
        for i in range(self.blocks):
            if i:
                width = int(x.shape[-1] * self.compression)
                x = conv(width, (1, 1))(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(self.k):
                y = conv(self.growth, (3, 3))(nn.relu(norm()(x)))
                x = jnp.concatenate([x, y], -1)
        return nn.Dense(3)(nn.relu(norm()(x)).mean((1, 2)))


def densenet(dag: dj.DAG) -> Tree:
    """Arcs into one node are one layer: their channels are put side by side."""
    into: dict[str, list[str]] = {}
    for arc in dag.graph.arcs:
        into.setdefault(arc.target, []).append(arc.name)
    return numbered(
        joined(layers)
        for arcs in into.values()
        for layers in zip(*(layers_of(dag, arc) for arc in arcs), strict=True)
    )


def joined(layers: tuple[Layer, ...]) -> Layer:
    """One layer that reads the concatenation of what these read."""
    (kind, *_), params, stats = layers[0], *[[la[i] for la in layers] for i in (1, 2)]
    if kind == "BatchNorm":
        side_by_side = lambda *leaves: jnp.concatenate(leaves)
        return (
            kind,
            jax.tree.map(side_by_side, *params),
            jax.tree.map(side_by_side, *stats),
        )
    kernel = jnp.concatenate([own["kernel"] for own in params], -2)
    return kind, params[0] | {"kernel": kernel}, None


# --- transformers with all heads at once ------------------------------------------


class Block(nn.Module):
    heads: int
    hidden: int
    mlp: str = "gelu"
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        y = nn.LayerNorm(name="norm1")(x)
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(y, mask=mask)
        y = nn.LayerNorm(name="norm2")(x)
        if self.mlp == "experts":
            return x + TwoOfExperts(4, self.hidden, name="experts")(y)
        z = nn.Dense(self.hidden, name="fc1")(y)
        if self.mlp == "swiglu":
            z = nn.silu(nn.Dense(self.hidden, name="gate")(y)) * z
        else:
            z = nn.gelu(z)
        return x + nn.Dense(x.shape[-1], name="fc2")(z)


class TwoOfExperts(nn.Module):
    count: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        expert = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=None, out_axes=-2, axis_size=self.count,
        )  # fmt: skip
        outputs = expert(self.hidden, name="mlps")(x)  # [B, T, experts, D]
        logits, chosen = jax.lax.top_k(nn.Dense(self.count, name="router")(x), 2)
        outputs = jnp.take_along_axis(outputs, chosen[..., None], -2)
        return jnp.einsum("btk,btkd->btd", nn.softmax(logits), outputs)


class MLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    depth: int
    features: int
    heads: int
    hidden: int
    patch: int

    @nn.compact
    def __call__(self, x):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.features, patch, patch, name="embed")(x)
        x = x.reshape(x.shape[0], -1, self.features)
        zeros, shape = nn.initializers.zeros, (1, *x.shape[1:])
        x = x + self.param("positions", zeros, shape)
        for i in range(1, self.depth + 1):
            x = Block(self.heads, self.hidden, name=f"block{i}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(3, name="head")(x)


class GPT(nn.Module):
    depth: int
    vocabulary: int
    features: int
    heads: int
    hidden: int
    context: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.features, name="embed")
        places = nn.Embed(self.context, self.features, name="positions")
        x = embed(tokens) + places(jnp.arange(tokens.shape[1])[None])
        for i in range(1, self.depth + 1):
            x = Block(self.heads, self.hidden, causal=True, name=f"block{i}")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def block(dag: dj.DAG, name: str = "", seed: int = 7) -> Tree:
    """A block with norms that have scales and biases, which the next layers undo."""
    prefix = f"{name}/" if name else ""
    of = lambda arc: dag.params[prefix + arc]
    heads = [a for a in dag.graph.by_name if a.startswith(f"{prefix}attention/head")]
    heads = [dag.params[head] for head in heads]
    size = heads[0]["q"]["kernel"].shape[0]
    norm1, norm2 = affine(size, seed), affine(size, seed + 1)
    stack = lambda trees, axis: jax.tree.map(lambda *w: jnp.stack(w, axis), *trees)
    out = stack([head["Dense"]["kernel"] for head in heads], 0)
    attention: Tree = {"out": {"kernel": out}}
    for part, which in {"query": "q", "key": "k", "value": "v"}.items():
        trees = [undo(norm1, halved(h[which], which)) for h in heads]
        kernel = stack([tree["kernel"] for tree in trees], 1)
        bias = stack([tree["bias"] for tree in trees], 0)
        attention[part] = {"kernel": kernel, "bias": bias}
    # The weights of the attention sum to 1: a bias of the values is one of the output.
    rest = stack([head["v"]["bias"] / 2 for head in heads], 0)
    attention["out"]["bias"] = jnp.einsum("hd,hdf->f", rest, out)
    mlp = perceptron(of("mlp/branch"), norm2)
    return {"norm1": norm1, "attention": attention, "norm2": norm2, **mlp}


def perceptron(params: Tree, norm: Tree) -> Tree:
    """The layers after the second norm."""
    if "router" in params:
        experts = [params[f"expert{i}"] for i in range(1, 5)]
        mlps = [
            {"Dense_0": undo(norm, e["Dense"]), "Dense_1": e["Dense_1"]}
            for e in experts
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mlps)
        return {"experts": {"router": undo(norm, params["router"]), "mlps": stacked}}
    made = {"fc1": undo(norm, params["Dense"]), "fc2": params["Dense_1"]}
    if "gate" in params:
        made["gate"] = undo(norm, params["gate"]["Dense"])
    return made


def affine(size: int, seed: int) -> Tree:
    """A random scale and bias of a norm."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, size), "float32")
    return {"scale": draw(0.5, 1.5), "bias": draw(-0.5, 0.5)}


def undo(norm: Tree, dense: Tree) -> Tree:
    """The layer that reads `s x + b` and gives what this one gives for x."""
    kernel = dense["kernel"] / norm["scale"][:, None]
    return {"kernel": kernel, "bias": dense["bias"] - norm["bias"] @ kernel}


def halved(dense: Tree, which: str) -> Tree:
    """Half the bias of the values."""
    return dense | {"bias": dense["bias"] / 2} if which == "v" else dense


def transformer(dag: dj.DAG) -> Tree:
    return {"params": block(dag)}


def vit(dag: dj.DAG) -> Tree:
    embed, norm = dag.params["embed"], affine(8, 1)
    positions = embed["Positions"]["embedding"][None]
    return {
        "params": {
            "embed": embed["Conv"],
            "positions": positions,
            **{name: block(dag, name) for name in blocks(dag)},
            "norm": norm,
            "head": undo(norm, dag.params["head"]["Dense"]),
        }
    }


def gpt(dag: dj.DAG) -> Tree:
    outside = {name: dag.params[name] for name in ("embed", "positions", "norm")}
    return {"params": outside | {name: block(dag, name) for name in blocks(dag)}}


def blocks(dag: dj.DAG) -> list[str]:
    first = (name.partition("/")[0] for name in dag.graph.by_name)
    return [name for name in dict.fromkeys(first) if name.startswith("block")]


# --- a mixer and a recurrent net --------------------------------------------------


class Mixer(nn.Module):
    depth: int
    features: int
    token_hidden: int
    hidden: int
    patch: int

    @nn.compact
    def __call__(self, x):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.features, patch, patch)(x)
        x = x.reshape(x.shape[0], -1, self.features)
        dense = lambda x, width: nn.Dense(width)(x)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = dense(nn.gelu(dense(y, self.token_hidden)), y.shape[-1])
            x = x + y.swapaxes(1, 2)
            y = nn.LayerNorm()(x)
            x = x + dense(nn.gelu(dense(y, self.hidden)), y.shape[-1])
        return dense(nn.LayerNorm()(x).mean(1), 3)


class LSTM(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        states = nn.RNN(nn.OptimizedLSTMCell(self.hidden, name="cell"))(x)
        return nn.Dense(3, name="readout")(states[:, -1])


def lstm(dag: dj.DAG) -> Tree:
    """The four gates, side by side in the graph, have a layer each."""
    x, h = dag.params["x"]["Dense"], dag.params["h"]
    cell = {}
    for i, gate in enumerate("ifgo"):
        cut = lambda leaf, i=i: jnp.split(leaf, 4, -1)[i]
        cell[f"i{gate}"] = {"kernel": cut(x["kernel"])}
        cell[f"h{gate}"] = {"kernel": cut(h["kernel"]), "bias": cut(x["bias"])}
    return {"params": {"cell": cell, "readout": dag.params["readout"]}}


# --- all of them, small -----------------------------------------------------------

STAGES = (((5, (4, 6), (4, 5), 7),), ((4, (5, 4), (4, 4), 6), (6, (4, 5), (4, 4), 4)))
INVERTED = ((1, 8, 1, 1), (2, 8, 2, 2), (3, 16, 1, 1))
SMALL = {"input_shape": (8, 8, 2)}

zoo = dj.zoo
TWINS = {
    "vgg11": Twin(
        zoo.vgg(11, 3, width=4, hidden=(6, 5), batch_norm=True, **SMALL),
        VGG((4, "M", 8, "M", 16, 16, "M", 32, 32, "M", 32, 32, "M"), (6, 5)),
        in_order,
    ),
    "bottlenecks": Twin(
        zoo.bottleneck_resnet((2, 1), 3, width=3, small=False, **SMALL),
        Bottlenecks((2, 1), 3),
        in_order,
    ),
    "wide_resnet16": Twin(
        zoo.wide_resnet(16, 3, widen=2, width=2, **SMALL),
        WideResNet(2, 2, 2),
        in_order,
    ),
    "densenet7": Twin(
        zoo.densenet(7, 3, growth=3, blocks=2, width=4, compression=0.5, **SMALL),
        DenseNet(2, 2, 3, 4, 0.5),
        densenet,
    ),
    "inception": Twin(
        zoo.inception(3, STAGES, width=4, small=False, input_shape=(32, 32, 2)),
        GoogLeNet(STAGES, 4),
        googlenet,
    ),
    "mobilenet": Twin(
        zoo.mobilenet(3, INVERTED, width=0.25, small=False, **SMALL),
        MobileNetV2(((1, 8, 1, 1), (2, 8, 2, 2), (3, 8, 1, 1)), 8, 1280),
        in_order,
    ),
    "unet": Twin(zoo.unet(2, 3, width=3, **SMALL), UNet(2, 3), in_order),
    "vit": Twin(
        zoo.vit(2, 3, heads=2, features=8, hidden=10, **SMALL),
        ViT(2, 8, 2, 10, 4),
        vit,
    ),
    "gpt": Twin(
        zoo.gpt(2, 11, heads=2, features=8, input_shape=(6,)),
        GPT(2, 11, 8, 2, 32, 6),
        gpt,
    ),
    "swiglu": Twin(
        zoo.transformer_block(4, 8, hidden=6, mlp="swiglu", causal=True),
        Block(4, 6, "swiglu", causal=True),
        transformer,
    ),
    "experts": Twin(
        zoo.transformer_block(2, 8, hidden=6, mlp="experts"),
        Block(2, 6, "experts"),
        transformer,
    ),
    "mixer": Twin(
        zoo.mixer(2, 3, features=8, token_hidden=6, hidden=10, **SMALL),
        Mixer(2, 8, 6, 10, 4),
        in_order,
    ),
    "lstm": Twin(zoo.lstm_unrolled(5, 4, 3, features=3), LSTM(4), lstm),
}


# --- filled -----------------------------------------------------------------------


def example(graph: dj.Graph, dtype: str = "float32") -> jax.Array:
    """Two inputs: normal, or token ids."""
    space = graph.space_of.get("in", Space((5, 8), "float32"))  # a building block
    rng, shape = np.random.default_rng(0), (2, *space.shape)
    if space.dtype == "int32":
        return jnp.asarray(rng.integers(0, 11, shape), space.dtype)
    return jnp.asarray(rng.normal(size=shape), dtype)


def generic(dag: dj.DAG, dtype: str = "float32", seed: int = 0) -> dj.DAG:
    """Random values; kernels of a size that keeps a signal alive through relus."""
    louder = lambda leaf: 2**0.5 * leaf if leaf.ndim > 1 else leaf
    dag = nets.fill(dag, dtype, seed)
    return dag.replace(params=jax.tree.map(louder, dag.params))


def filled(graph: dj.Graph, dtype: str = "float32") -> tuple[dj.DAG, jax.Array]:
    """The network of a graph and two inputs; call it within `nets.precision(dtype)`."""
    x = example(graph, dtype)
    shapes = jax.eval_shape(lambda: dj.init(jax.random.key(0), graph, x))
    return generic(shapes, dtype), x
