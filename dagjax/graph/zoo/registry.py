"""The networks by their names on the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.densenet import densenet
from dagjax.graph.zoo.inception import inception
from dagjax.graph.zoo.layers import Shape
from dagjax.graph.zoo.mixer import mixer
from dagjax.graph.zoo.mobilenet import mobilenet
from dagjax.graph.zoo.plain import conv2, conv4, conv6, lenet5, lenet_300_100, mlp, vgg
from dagjax.graph.zoo.recurrent import lstm_unrolled
from dagjax.graph.zoo.residual import resnet, resnet50, wide_resnet
from dagjax.graph.zoo.transformer import gpt, vit
from dagjax.graph.zoo.unet import unet


def by_name(name: str, **options: Any) -> Graph:
    """A network of the zoo by its name on the command line.

    Args:
        name: One of `NETS`.
        **options: `classes`, `input_shape`, ...

    Raises:
        ValueError: If there is no such network; the message lists them.

    Example:
        >>> by_name("resnet20").depth
        11
    """
    if name not in NETS:
        raise ValueError(f"no net named {name!r}; nets are {', '.join(NETS)}")
    return NETS[name](**options)


def takes_conv(name: str) -> bool:
    """Whether a network of the zoo has convolutions, to be given as `conv=`."""
    return name in NETS and name not in _WITHOUT_CONV


def _mlp(classes: int = 10, **options: Any) -> Graph:
    return mlp((256, 256, classes), **options)


def _gpt(classes: int = 50257, **options: Any) -> Graph:
    return gpt(vocabulary=classes, **options)


def _lstm(
    classes: int = 10, *, hidden: int = 128, input_shape: Shape = (28, 28)
) -> Graph:
    """The first axis is time: images are read row by row."""
    if len(input_shape) < 2:
        raise ValueError(
            f"lstm input_shape {tuple(input_shape)}: expected (steps, features, ...)"
        )
    steps, *features = input_shape
    return lstm_unrolled(steps, hidden, classes, tuple(features))


NETS: dict[str, Callable[..., Graph]] = {
    "mlp": _mlp,
    "lenet-300-100": lenet_300_100,
    "lenet5": lenet5,
    "conv2": conv2,
    "conv4": conv4,
    "conv6": conv6,
    "vgg16": functools.partial(vgg, 16),
    "vgg16-bn": functools.partial(vgg, 16, batch_norm=True),
    **{f"resnet{d}": functools.partial(resnet, d) for d in (8, 20, 32, 56)},
    "resnet50": resnet50,
    "wide-resnet28-10": functools.partial(wide_resnet, 28),
    "densenet40": functools.partial(densenet, 40),
    "inception": inception,
    "mobilenet": mobilenet,
    "unet": unet,
    "vit": vit,
    "vit-tiny": functools.partial(vit, heads=3, features=192),  # Touvron et al. 2021
    "mixer": mixer,
    "gpt": _gpt,
    "lstm": _lstm,
}

_WITHOUT_CONV = ("mlp", "lenet-300-100", "gpt", "lstm")
