"""Convolutions that are fast on a CPU also inside `lax.scan`.

XLA:CPU hands a convolution to its fast kernels only in the layout NHWC, HWIO -> NHWC.
It rewrites others, such as the gradient of a kernel, in the entry computation of a
program but not in the body of a loop, where they become plain loops (jax issue 12868).
Both functions here stand in for `lax.conv_general_dilated`, for instance as
`nn.Conv(..., conv_general_dilated=scan_conv)`, and leave the rest to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from dagjax.types import PyTree

Pads = tuple[tuple[int, int], ...]

# The one layout that XLA:CPU has fast kernels for, and the one Flax uses.
LAYOUT = ("NHWC", "HWIO", "NHWC")

# Below this many input channels patches are small and their product is faster.
FEW_CHANNELS = 8


def matmul_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """A convolution as one product of patches and kernel, as are its gradients.

    `y[n, h, w] = sum_ij x[n, s h + i, s w + j] k[i, j]`. Nothing but slices and a
    product: it batches over kernels (many seeds at once) where a convolution would
    become a slow grouped one. Otherwise `scan_conv` is faster. Arguments are those of
    `lax.conv_general_dilated`, to which all but a `_plain` convolution is left.

    Example:
        >>> x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
        >>> y = matmul_conv(x, k, (1, 1), "SAME", dimension_numbers=LAYOUT)
        >>> print(y[0, :, :, 0])
        [[ 8. 12. 12.  8.]
         [12. 18. 18. 12.]
         [12. 18. 18. 12.]
         [ 8. 12. 12.  8.]]
    """
    pads = _pads(lhs, rhs, window_strides, padding)
    if pads is None or not _plain(lhs, rhs, **options):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    return jnp.matmul(
        _patches(lhs, rhs.shape[:2], window_strides, pads),
        rhs.reshape(-1, rhs.shape[-1]),
        precision=options.get("precision"),
        preferred_element_type=options.get("preferred_element_type"),
    )


def scan_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: PyTree = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """A convolution that a CPU trains at full speed in a loop.

    With stride 1 it is XLA's, whose gradients are written as convolutions in the
    layout of the fast kernels; elsewhere, and with few channels, `matmul_conv`. Its
    gradient is a `custom_vjp`: `jax.grad` of `jax.grad` works, `jax.jvp` does not.

    Args:
        lhs: Images, [N, H, W, C].
        rhs: Kernel, [kh, kw, C, F].
        window_strides: Strides along H and W.
        padding: "SAME", "VALID", "SAME_LOWER", or pairs (low, high).
        lhs_dilation: As in `lax.conv_general_dilated`, like all that follow.
        rhs_dilation: Other than 1 is passed on to it.
        dimension_numbers: Other than NHWC, HWIO, NHWC is passed on to it.
        feature_group_count: Other than 1 is passed on to it.
        batch_group_count: Other than 1 is passed on to it.
        precision: Of the products.
        preferred_element_type: Of the products.

    Returns:
        Images, [N, H', W', F].

    Example:
        >>> x, k = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 8, 5))
        >>> y = scan_conv(x, k, (1, 1), "VALID", dimension_numbers=LAYOUT)
        >>> print(y[0, :, :, 0])
        [[72. 72.]
         [72. 72.]]
    """
    options: dict[str, Any] = {
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    pads = _pads(lhs, rhs, window_strides, padding)
    fast = preferred_element_type is None and _large(rhs, window_strides)
    if pads is not None and fast and _plain(lhs, rhs, **options):
        return _unit_stride(lhs, rhs, pads, precision)
    return matmul_conv(lhs, rhs, window_strides, padding, **options)


def _plain(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: PyTree = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    **others: Any,
) -> bool:
    """Whether there are no dilations, no groups, one dtype, and Flax's layout."""
    del others
    dilations = (*(lhs_dilation or ()), *(rhs_dilation or ()))
    groups = (feature_group_count, batch_group_count)
    if lhs.ndim != 4 or groups != (1, 1) or any(d != 1 for d in dilations):
        return False
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    fast_layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
    return (
        layout == fast_layout
        and lhs.dtype == rhs.dtype
        and lhs.shape[3] == rhs.shape[2]
    )


def _large(rhs: jax.Array, strides: Sequence[int]) -> bool:
    """Whether XLA's kernels were measured to be faster than a product of patches."""
    kernel, few = math.prod(rhs.shape[:2]), rhs.shape[2] < FEW_CHANNELS
    return kernel > 1 and not few and tuple(strides) == (1, 1)


def _pads(
    lhs: jax.Array, rhs: jax.Array, strides: Sequence[int], padding: PyTree
) -> Pads | None:
    """Pairs of ints along H and W; None where the output is empty or not of images."""
    if lhs.ndim != 4 or rhs.ndim != 4:
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    sizes = zip(lhs.shape[1:3], rhs.shape[:2], pads, strict=True)
    return pads if all(n + sum(pad) >= k for n, k, pad in sizes) else None


def _patches(
    x: jax.Array, kernel: Sequence[int], strides: Sequence[int], pads: Pads
) -> jax.Array:
    """The window under every output pixel, [N, H', W', kh * kw * C]."""
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
    (kh, kw), (sh, sw) = kernel, strides
    last_h, last_w = x.shape[1] - kh, x.shape[2] - kw
    taps = [
        x[:, i : i + last_h + 1 : sh, j : j + last_w + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(taps, axis=-1) if len(taps) > 1 else taps[0]


def _xla(x: jax.Array, k: jax.Array, pads: Pads, precision: PrecisionLike) -> jax.Array:
    """XLA's convolution in its fast layout, stride 1."""
    return lax.conv_general_dilated(
        x, k, (1, 1), pads, dimension_numbers=LAYOUT, precision=precision
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _unit_stride(
    x: jax.Array, k: jax.Array, pads: Pads, precision: PrecisionLike
) -> jax.Array:
    """`_xla`, with gradients that keep the layout."""
    return _xla(x, k, pads, precision)


def _forward(
    x: jax.Array, k: jax.Array, pads: Pads, precision: PrecisionLike
) -> tuple[PyTree, PyTree]:
    return _xla(x, k, pads, precision), (x, k)


def _backward(
    pads: Pads, precision: PrecisionLike, saved: PyTree, dy: jax.Array
) -> tuple[PyTree, PyTree]:
    x, k = saved
    # dx: dy with the kernel turned by 180 degrees; padded so that the shape is x's
    sizes = zip(k.shape[:2], pads, strict=True)
    full = tuple((n - 1 - low, n - 1 - high) for n, (low, high) in sizes)
    dx = _xla(dy, k[::-1, ::-1].swapaxes(2, 3), full, precision)
    # dk: dy is the window, the batch takes the place of the channels
    dk = _xla(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), pads, precision)
    return dx, dk.transpose(1, 2, 0, 3)


_unit_stride.defvjp(_forward, _backward)
