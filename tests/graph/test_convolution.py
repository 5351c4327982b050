import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dagjax.graph.zoo.convolution import LAYOUT, matmul_conv, scan_conv

CONVS = pytest.mark.parametrize("conv", [matmul_conv, scan_conv])

CASES = [  # size, channels, features, kernel, strides, padding
    ((8, 8), 3, 5, (3, 3), (1, 1), "SAME"),
    ((8, 8), 16, 8, (3, 3), (1, 1), "SAME"),
    ((7, 9), 8, 4, (3, 3), (1, 1), "VALID"),
    ((14, 14), 6, 16, (5, 5), (1, 1), "VALID"),
    ((10, 8), 8, 3, (5, 5), (1, 1), "SAME"),
    ((8, 8), 8, 4, (3, 3), (2, 2), "SAME"),
    ((9, 8), 8, 4, (3, 3), (2, 1), "VALID"),
    ((8, 8), 8, 4, (1, 1), (1, 1), "SAME"),
    ((9, 9), 8, 4, (1, 1), (2, 2), "SAME"),
    ((8, 7), 8, 4, (3, 2), (1, 1), ((0, 2), (1, 0))),
    ((8, 8), 8, 4, (2, 2), (1, 1), "SAME_LOWER"),
    ((8, 8), 8, 4, (3, 3), (1, 1), ((3, 4), (2, 3))),
    ((8, 8), 8, 4, (3, 3), (1, 1), ((-1, 1), (0, -2))),
    ((8, 8), 3, 4, (3, 3), (3, 2), ((-1, 1), (4, 0))),
]

FALLBACKS = [  # shape of images, shape of kernel, options
    ((2, 8, 8, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    ((2, 8, 8, 8), (3, 3, 8, 6), {"rhs_dilation": (2, 1)}),
    ((2, 8, 8, 8), (3, 3, 8, 6), {"lhs_dilation": (1, 2)}),
    ((4, 8, 8, 8), (3, 3, 8, 6), {"batch_group_count": 2}),
    ((2, 8, 8, 8), (3, 3, 8, 6), {"dimension_numbers": ("NHWC", "HWIO", "NCHW")}),
    ((2, 8, 8, 8), (6, 8, 3, 3), {"dimension_numbers": None}),
    ((2, 8, 3), (3, 3, 6), {"dimension_numbers": ("NHC", "HIO", "NHC")}),
    ((2, 2, 2, 8), (5, 5, 8, 6), {"padding": "VALID"}),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """Images and a kernel in double precision, then strides and padding."""
    size, channels, features, kernel, strides, padding = request.param
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, *size, channels)))
        k = jnp.asarray(rng.standard_normal((*kernel, channels, features)))
        yield x, k, strides, padding


def oracle(x, k, strides, padding):
    """The convolution in numpy, one output pixel at a time."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], k.shape[:2], strides, padding)
    grown = [(max(low, 0), max(high, 0)) for low, high in padding]
    x = np.pad(x, ((0, 0), *grown, (0, 0)))
    (a, b), (c, d) = (tuple(max(-n, 0) for n in pad) for pad in padding)
    x = x[:, a : x.shape[1] - b, c : x.shape[2] - d]
    tops = range(0, x.shape[1] - k.shape[0] + 1, strides[0])
    lefts = range(0, x.shape[2] - k.shape[1] + 1, strides[1])
    window = lambda h, w: x[:, h : h + k.shape[0], w : w + k.shape[1]]
    rows = [[np.tensordot(window(h, w), k, 3) for w in lefts] for h in tops]
    return np.stack([np.stack(row, 1) for row in rows], 1)


def close(found, wanted, tolerance=1e-12):
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    np.testing.assert_allclose(found, wanted, atol=tolerance * scale, rtol=tolerance)


def pull(conv, x, k, strides, padding):
    """Value, and gradients for a cotangent that is not constant."""
    f = lambda x, k: conv(x, k, strides, padding, dimension_numbers=LAYOUT)
    y, back = jax.vjp(f, x, k)
    return y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@CONVS
def test_value_is_the_definition(case, conv):
    x, k, strides, padding = case
    y = conv(x, k, strides, padding, dimension_numbers=LAYOUT)
    close(y, oracle(np.asarray(x), np.asarray(k), strides, padding))


@CONVS
def test_value_and_gradients_are_those_of_lax(case, conv):
    found = jax.jit(functools.partial(pull, conv), static_argnums=(2, 3))(*case)
    for one, other in zip(found, pull(lax.conv_general_dilated, *case), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        close(one, other)


@CONVS
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("channels", [3, 8])
def test_maps_over_images_and_kernels(key, conv, axes, channels):
    x = jax.random.normal(key, (3, 2, 6, 6, channels))
    k = jax.random.normal(key, (3, 3, 3, channels, 4))
    x, k = (a if axis == 0 else a[0] for a, axis in zip((x, k), axes, strict=True))
    f = lambda conv: lambda x, k: pull(conv, x, k, (1, 1), "SAME")
    found = jax.vmap(f(conv), axes)(x, k)
    for one, other in zip(
        found, jax.vmap(f(lax.conv_general_dilated), axes)(x, k), strict=True
    ):
        close(one, other, 1e-5)


@CONVS
def test_second_derivatives(key, conv):
    x, k = jax.random.normal(key, (2, 5, 5, 8)), jax.random.normal(key, (3, 3, 8, 4))

    def bent(conv):
        y = lambda k: conv(x, k, (1, 1), "SAME", dimension_numbers=LAYOUT)
        slope = jax.grad(lambda k: jnp.sum(jnp.tanh(y(k))))
        return jax.grad(lambda k: jnp.sum(slope(k) ** 2))(k)

    close(bent(conv), bent(lax.conv_general_dilated), 1e-4)


@CONVS
@pytest.mark.parametrize(("images", "kernel", "options"), FALLBACKS, ids=str)
def test_passes_on_what_it_does_not_cover(key, conv, images, kernel, options):
    x, k = jax.random.normal(key, images), jax.random.normal(key, kernel)
    options = {"padding": "SAME", "dimension_numbers": LAYOUT, **options}
    if "lhs_dilation" in options:  # lax takes no names with a dilated input
        options["padding"] = ((1, 1), (1, 1))
    run = lambda f: f(x, k, window_strides=(1,) * (x.ndim - 2), **options)
    assert jnp.array_equal(run(conv), run(lax.conv_general_dilated))


@CONVS
def test_complaints_are_those_of_lax(conv):
    x, k = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 7, 2))
    with pytest.raises(ValueError, match="feature"):
        conv(x, k, (1, 1), "SAME", dimension_numbers=LAYOUT)
    with pytest.raises(TypeError, match="dtype"):
        conv(x, jnp.ones((3, 3, 8, 2), int), (1, 1), "SAME", dimension_numbers=LAYOUT)


@CONVS
def test_preferred_element_type(conv):
    x, k = (jnp.ones(shape, jnp.bfloat16) for shape in ((1, 4, 4, 8), (3, 3, 8, 2)))
    y = conv(
        x,
        k,
        (1, 1),
        "SAME",
        dimension_numbers=LAYOUT,
        preferred_element_type=jnp.float32,
    )
    assert y.dtype == jnp.float32


@CONVS
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", 2])
def test_stands_in_flax(key, conv, padding):
    x = jax.random.normal(key, (2, 6, 6, 8))
    plain = nn.Conv(4, (3, 3), padding=padding)
    params = plain.init(key, x)
    found = plain.clone(conv_general_dilated=conv).apply(params, x)
    close(found, plain.apply(params, x), 1e-5)


def layouts_in_scan(conv):
    """Layouts of the convolutions of a compiled loop of gradient steps."""
    x, k = jnp.ones((4, 8, 8, 8)), jnp.ones((3, 3, 8, 8))
    loss = lambda k: jnp.sum(conv(x, k, (1, 1), "SAME", dimension_numbers=LAYOUT) ** 2)
    step = lambda k, _: (k - jax.grad(loss)(k), None)
    run = jax.jit(lambda k: lax.scan(step, k, length=3)[0])
    text = run.lower(k).compile().as_text()
    return {s.partition("dim_labels=")[2][:15] for s in text.splitlines()} - {""}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="layouts are those of a CPU")
def test_loops_keep_the_layout_of_the_fast_kernels():
    assert layouts_in_scan(scan_conv) == {"b01f_01io->b01f"}
    assert layouts_in_scan(matmul_conv) == set()
