"""Pixels of any scale, made into images a network can be trained on."""

import jax.numpy as jnp
import numpy as np

from dagjax.experiments.examples import Array, Data, check, fail, require


def images(raw: Data, source: str) -> Data:
    """Turn pixels of any scale into normalized images, by training statistics.

    Args:
        raw: pixels `[N, H, W]`, `[N, H, W, C]` or flat, of any real dtype;
            labels or targets.
        source: the name of the data, for messages.

    Returns:
        float32 inputs of zero mean and unit deviation (for each channel of
        `[N, H, W, C]`); `[N, H, W]` gets a channel axis; int32 labels or
        float32 targets.

    Raises:
        DataError: `check` fails, or the statistics overflow.

    >>> x, y = np.array([[0], [2]], np.uint8), np.array([0, 1])
    >>> images(Data(x, y, x + 2, y), "pixels").x_test.tolist()
    [[1.0], [3.0]]
    """
    raw = check(raw, source)
    if raw.x_train.ndim == 3:
        raw = raw._replace(x_train=raw.x_train[..., None], x_test=raw.x_test[..., None])
    x_train, x_test = _standardize(raw.x_train, raw.x_test, source)
    y_train = narrow(raw.y_train, f"{source}: y_train")
    y_test = narrow(raw.y_test, f"{source}: y_test")
    return check(Data(x_train, y_train, x_test, y_test), source)


def narrow(value: Array, where: str) -> np.ndarray:
    """Numbers in 32 bits, on the host; a `DataError` names the first that does not fit.

    >>> narrow(np.array([3, 9], np.uint8), "y").dtype
    dtype('int32')
    """
    old = np.asarray(value)
    if not jnp.issubdtype(old.dtype, jnp.integer):
        with np.errstate(over="ignore"):
            new = old.astype(np.float32)
        require(np.isfinite(new), old, where, "finite values that fit float32")
        return new
    info = np.iinfo(np.int32)
    fits = (old >= info.min) & (old <= info.max)
    require(fits, old, where, "integers that fit int32")
    return old.astype(np.int32)


def _standardize(
    x_train: Array, x_test: Array, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Subtract the training mean and divide by the training deviation."""
    train, test = (_pixels(x, f"{source}: pixels") for x in (x_train, x_test))
    axes = tuple(range(train.ndim - 1)) if train.ndim == 4 else None
    mean = train.mean(axes, np.float64).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        train -= mean  # in place: pixels are a copy, and may be large
        test -= mean
        variance = np.square(train).mean(axes, np.float64)
        std = np.sqrt(np.where(variance > 0, variance, 1)).astype(np.float32)
        if not np.isfinite(std).all():
            fail(f"{source}: x_train", "a deviation that overflows", "smaller pixels")
        train /= std
        test /= std
    return train, test


def _pixels(x: Array, where: str) -> np.ndarray:
    """A copy in float32, on the host."""
    if x.dtype == np.uint8:  # always fits, and may be large
        return np.array(x, np.float32, order="C")
    return np.array(narrow(x, where), np.float32, order="C")
