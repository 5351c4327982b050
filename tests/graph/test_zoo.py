"""The zoo: what the networks compute, their counts, their names, their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.graph.core.dag import count_params
from tests.graph import nets, twins
from tests.sweeps import seldom

TOLERANCE = nets.TOLERANCE["float32"]


def abstract(graph):
    """The network without values: shapes only."""
    space = graph.space_of["in"]
    x = jax.ShapeDtypeStruct((2, *space.shape), space.dtype)
    return jax.eval_shape(lambda: dj.init(jax.random.key(0), graph, x))


def outputs(dag):
    """The shape of the output, without the batch axis."""
    return dag.graph.space_of["out"].shape


# --- the same function as the ordinary network ------------------------------------

# Flax's average pooling divides by an integer.
promotion = lambda name: "standard" if name == "densenet7" else "strict"


@pytest.mark.parametrize("name", twins.TWINS)
def test_twin(name):
    graph, module, variables = twins.TWINS[name]
    with jax.numpy_dtype_promotion(promotion(name)):
        dag, x = twins.filled(graph)
        run = jax.jit(lambda dag, gates: dag(x, gates=gates))
        ordinary = jax.jit(lambda variables: module.apply(variables, x))
        want, gates = ordinary(variables(dag)), dj.gates(dag)
        assert nets.distance(run(dag, gates), want) <= TOLERANCE
        other = twins.generic(dag, seed=1)
        got = run(other, gates)
        assert nets.distance(got, ordinary(variables(other))) <= TOLERANCE
        assert nets.violates(nets.distance(got, want), "float32")
        for arc in gates:
            mutant = run(dag, gates | {arc: jnp.zeros(())})
            assert nets.violates(nets.distance(mutant, want), "float32"), arc


def test_dense_net_in_train_mode():
    """Statistics of a concatenation are those of its pieces."""
    graph, module, variables = twins.TWINS["densenet7"]
    dag, x = twins.filled(graph)
    run = jax.jit(lambda dag: dag.apply(x, train=True))
    ordinary = jax.jit(
        lambda held: module.apply(held, x, train=True, mutable=["batch_stats"])
    )
    got, state = run(dag)
    want, updated = ordinary(variables(dag))
    assert nets.distance(got, want) <= 10 * TOLERANCE  # of batches of two
    new = variables(dag.replace(state=state))["batch_stats"]
    old = variables(dag)["batch_stats"]
    assert nets.distance(new, updated["batch_stats"]) <= TOLERANCE
    assert nets.violates(nets.distance(old, updated["batch_stats"]), "float32")


# --- counts; the rest of them in law 12 ------------------------------------------


@pytest.mark.parametrize(
    ("graph", "counts"),
    [
        (dj.zoo.mlp((9, 9, 9, 9)), (5, 4, 4, 1)),
        (dj.zoo.dense_block(7), (8, 28, 7, 2**6)),
        (dj.zoo.unet_core(1), (3, 3, 2, 2)),
        (dj.zoo.transformer_block(1), (3, 4, 2, 4)),
        (dj.zoo.transformer_block(8), (3, 11, 2, 18)),
        (dj.zoo.resnet50(), (19, 34, 18, 2**16)),
        (dj.zoo.wide_resnet(), (18, 29, 17, 2**12)),
        (dj.zoo.densenet(13), (14, 31, 13, 8**3)),
        (dj.zoo.inception(), (52, 78, 24, 4**9)),
        (dj.zoo.mobilenet(), (21, 30, 20, 2**10)),
        (dj.zoo.unet(3), (9, 11, 8, 4)),
        (dj.zoo.vit(2), (7, 32, 6, 26**2)),
        (dj.zoo.gpt(2), (9, 34, 8, 26**2)),
        (dj.zoo.mixer(2), (7, 10, 6, 4**2)),
    ],
)
def test_counts(graph, counts):
    paths = dj.count_paths(graph)
    assert (len(graph.nodes), len(graph.arcs), graph.depth, paths) == counts


def test_counts_of_a_recurrent_net():
    """4 nodes and 6 arcs for the first step, 5 and 10 for each that follows."""
    for t in (1, 2, 5):
        graph = dj.zoo.lstm_unrolled(t, 4, 3, 2)
        assert len(graph.nodes) == 2 + 4 + 5 * (t - 1)
        assert len(graph.arcs) == 1 + 6 + 10 * (t - 1)
        assert graph.depth == 4 * t + 1


PUBLISHED = {
    "vgg16": 138_357_544,
    "vgg16-bn": 138_365_992,
    "resnet50": 25_557_032,
    "wide-resnet28-10": 36_479_194,
    # 6,624,904 of an implementation with 3x3 in place of the 5x5 convolutions
    "inception": 6_624_904 + 16 * 23_808,
    "mobilenet": 3_504_872,
    "mixer": 59_880_472,
}


LARGE = ("vgg16", "vgg16-bn", "inception", "wide-resnet28-10", "mixer", "mobilenet")


@pytest.mark.parametrize(
    "name",
    seldom(PUBLISHED, LARGE),
)
def test_parameters_of_the_literature(name):
    assert count_params(abstract(dj.zoo.by_name(name)).params) == PUBLISHED[name]


def extrapolated(counts, n):
    """The polynomial through its values at 1, 2, ..., at n (Newton)."""
    total, binomial = 0, 1
    for i in range(len(counts)):
        total += binomial * counts[0]
        binomial = binomial * (n - 1 - i) // (i + 1)
        counts = np.diff(counts)
    return total


def test_parameters_of_a_dense_net():
    """Quadratic in the layers a block, of which DenseNet-40 has twelve."""
    nets = [dj.zoo.densenet(3 * (k + 1) + 1) for k in (1, 2, 3)]
    counts = [count_params(abstract(graph).params) for graph in nets]
    assert extrapolated(counts, 12) == 1_019_722
    assert dj.zoo.by_name("densenet40") == dj.zoo.densenet(3 * (12 + 1) + 1)


# Norms without scale and bias and attention without an output bias save (4 + 1)
# features a block. A ViT also saves the class token, its position, and the scale and
# bias before the readout, which GPT-2 keeps.
BLOCK, VIT = 4 + 1, 1 + 1 + 2


@pytest.mark.parametrize(
    ("name", "published", "saved"),
    [
        ("vit", 86_567_656, (12 * BLOCK + VIT) * 768),
        ("vit-tiny", 5_717_416, (12 * BLOCK + VIT) * 192),
        ("gpt", 124_439_808, 12 * BLOCK * 768),
    ],
)
def test_parameters_of_transformers(name, published, saved):
    """Linear in the blocks, of which all have twelve."""
    nets = [dj.zoo.by_name(name, depth=depth) for depth in (1, 2)]
    counts = [count_params(abstract(graph).params) for graph in nets]
    assert extrapolated(counts, 12) == published - saved


def test_parameters_of_a_unet():
    """31,037,698 for images of three channels and two classes."""
    graph = dj.zoo.unet(input_shape=(64, 64, 3))
    assert count_params(abstract(graph).params) == 31_037_698


def test_tied_arcs_have_one_entry():
    lstm = abstract(dj.zoo.lstm_unrolled(4, 5, 3, 2))
    assert {*lstm.params} == {"x", "h", "readout"}
    assert count_params(lstm.params) == 4 * 5 * (2 + 5 + 1) + (5 + 1) * 3
    gpt = abstract(dj.zoo.gpt(1, 11, heads=2, features=4, input_shape=(6,)))
    assert "readout" in gpt.graph.by_name
    assert "readout" not in gpt.params


def test_parts_of_a_layer_start_with_its_variance():
    last = lambda arc: arc.fn.fn.arcs[-1].fn.fn
    heads = dj.zoo.transformer_block(4, 64).arcs_into("n1")[:4]
    layers = dj.zoo.dense_block(3, 16).arcs_into("x3")
    for arcs, shape, whole in (
        (heads, (16, 64), 64),
        (layers, (3, 3, 16, 16), 9 * 48),
    ):
        for arc in arcs:
            kernel = last(arc).kernel_init(jax.random.key(0), shape)
            assert np.std(kernel) == pytest.approx(whole**-0.5, rel=0.05)


# --- names and options ------------------------------------------------------------

SHALLOW = ("vit", "vit-tiny", "gpt", "mixer")
SHAPES = {"gpt": (6,), "lstm": (5, 4)}


@pytest.mark.parametrize("name", dj.zoo.NETS)
def test_by_name(name):
    options = {"classes": 3, "input_shape": SHAPES.get(name, (16, 16, 1))}
    options |= {"depth": 1} if name in SHALLOW else {}
    graph = dj.zoo.by_name(name, **options)
    assert graph == dj.zoo.by_name(name, **options)
    if name not in (*PUBLISHED, "densenet40"):
        assert outputs(abstract(graph))[-1] == 3
    assert graph.space_of["in"].shape == options["input_shape"]
    if dj.zoo.takes_conv(name):
        assert graph != dj.zoo.by_name(name, **options, conv=dj.scan_conv)
    else:
        with pytest.raises(TypeError, match="conv"):
            dj.zoo.by_name(name, **options, conv=dj.scan_conv)


@pytest.mark.parametrize("side", seldom([4, 28, 64], [28]))
def test_sizes_of_images(side):
    """Stems and heads follow the size, and nothing is pooled away."""
    shape = {"input_shape": (side, side, 1)}
    for graph in (
        dj.zoo.vgg(11, 3, width=4, **shape),
        dj.zoo.bottleneck_resnet((1, 1, 1, 1), 3, width=4, **shape),
        dj.zoo.mobilenet(3, ((1, 8, 1, 1), (6, 8, 1, 2)), **shape),
        dj.zoo.inception(3, twins.STAGES, width=4, **shape),
        dj.zoo.vit(1, 3, heads=1, features=4, **shape),
    ):
        assert outputs(abstract(graph)) == (3,)
    small, large = (
        dj.zoo.bottleneck_resnet((1,), 3, width=4, small=small, **shape)
        for small in (True, False)
    )
    assert dj.zoo.bottleneck_resnet((1,), 3, width=4, **shape) == (
        large if side == 64 else small
    )


def test_contexts_may_be_shorter():
    dag = abstract(dj.zoo.gpt(1, 11, heads=2, features=4, input_shape=(6,)))
    assert jax.eval_shape(lambda dag: dag(jnp.zeros((2, 3), int)), dag).shape == (
        2,
        3,
        11,
    )


def test_images_are_sequences_of_rows():
    graph = dj.zoo.by_name("lstm", hidden=4, input_shape=(3, 8, 1))
    assert outputs(abstract(graph)) == (10,)
    assert graph == dj.zoo.lstm_unrolled(3, 4, 10, (8, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dj.zoo.resnet(9), "resnet depth 9: expected 8, 14"),
        (lambda: dj.zoo.wide_resnet(27), "wide_resnet depth 27: expected 10, 16"),
        (lambda: dj.zoo.wide_resnet(4), "wide_resnet depth 4"),
        (lambda: dj.zoo.bottleneck_resnet(()), r"stages \(\): expected at least one"),
        (lambda: dj.zoo.bottleneck_resnet((1, 0)), r"stages \(1, 0\): expected"),
        (lambda: dj.zoo.vgg(12), "vgg depth 12: expected 11, 13, 16, 19"),
        (lambda: dj.zoo.dense_block(0), "dense_block k 0: expected at least one"),
        (lambda: dj.zoo.densenet(41), "densenet depth 41 of 3 blocks: expected"),
        (lambda: dj.zoo.densenet(4), "densenet depth 4 of 3 blocks"),
        (lambda: dj.zoo.densenet(40, blocks=0), "densenet depth 40 of 0 blocks"),
        (lambda: dj.zoo.unet_core(0), "unet depth 0: expected at least 1"),
        (lambda: dj.zoo.unet(input_shape=(28, 28, 1)), "divisible by 16, for depth 4"),
        (lambda: dj.zoo.transformer_block(3, 64), "3 heads: expected a divisor of 64"),
        (lambda: dj.zoo.transformer_block(0), "0 heads"),
        (
            lambda: dj.zoo.transformer_block(mlp="relu"),
            "mlp 'relu': expected gelu, swiglu, experts",
        ),
        (lambda: dj.zoo.vit(input_shape=(30, 30, 3)), "divisible by the patch size 4"),
        (lambda: dj.zoo.mixer(patch=9), "divisible by the patch size 9"),
        (lambda: dj.zoo.gpt(input_shape=(8, 8, 1)), r"gpt input_shape \(8, 8, 1\)"),
        (lambda: dj.zoo.lstm_unrolled(0), "lstm steps 0: expected at least one"),
        (lambda: dj.zoo.by_name("lstm", input_shape=(4,)), r"lstm input_shape \(4,\)"),
        (lambda: dj.zoo.by_name("lenet"), "no net named 'lenet'; nets are mlp, "),
        *[
            (
                lambda name=name: dj.zoo.by_name(name, input_shape=(16,)),
                r"input_shape \(16,\): expected \(height, width, channels\)",
            )
            for name in ("lenet5", "conv2", "vgg16", "resnet8", "resnet50", "mixer")
        ],
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
