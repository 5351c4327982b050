"""What every data set is: the examples to train on and the examples to test on."""

from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array


class DataError(ValueError):
    """Data, or a file of data, that is not what it has to be."""


class Data(NamedTuple):
    """Examples, first axis first: a pytree of four arrays.

    Attributes:
        x_train: inputs to train on, `[N, ...]`; images are float32 `[N, H, W, C]`.
        y_train: int32 labels or tokens, or float32 targets, `[N, ...]`.
        x_test: inputs to test on, `[M, ...]`.
        y_test: their labels or targets, `[M, ...]`.

    >>> x, y = np.zeros((5, 3), np.float32), np.arange(5)
    >>> jax.tree.map(np.shape, Data(x, y, x[:2], y[:2]))
    Data(x_train=(5, 3), y_train=(5,), x_test=(2, 3), y_test=(2,))
    """

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array


def check(data: Data, source: str = "data") -> Data:
    """Validate examples on the host; loaders end with it, users may start with it.

    Args:
        data: four arrays; concrete, so outside `jit`.
        source: what error messages call the data, a file name for example.

    Returns:
        The same arrays, as `Data`.

    Raises:
        DataError: a field is no array or has no examples, holds anything but finite
            floats or integers, or fields disagree in length,
            shape or dtype. The message names the field.

    >>> x, y = np.zeros((5, 3)), np.arange(5)
    >>> check(Data(x, y, x, y[1:]))
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: data: y_test: got length 4, expected 5, \
as many as x_test
    """
    if not isinstance(data, tuple) or len(data) != len(Data._fields):
        fail(source, f"{type(data).__name__}", f"Data{Data._fields}")
    data = Data(*data)
    for field, value in data._asdict().items():
        check_array(value, f"{source}: {field}")
    for x, y in (("x_train", "y_train"), ("x_test", "y_test")):
        check_length(getattr(data, x), getattr(data, y), f"{source}: {y}", x)
    for train, test in (("x_train", "x_test"), ("y_train", "y_test")):
        check_kind(getattr(data, train), getattr(data, test), f"{source}: {test}")
    return data


def check_array(value: Array, where: str) -> None:
    """Require an array of at least one example, of finite floats or of integers.

    >>> check_array(np.array([1.0, np.nan]), "x")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: x: got nan at index (1,), expected \
    finite values
    """
    if not isinstance(value, np.ndarray | jax.Array):
        fail(where, type(value).__name__, "a numpy or jax array")
    if value.ndim == 0 or value.size == 0:
        fail(where, f"shape {value.shape}", "[N, ...] with at least one example")
    if jnp.issubdtype(value.dtype, jnp.floating):
        require(np.isfinite(value), value, where, "finite values")
    elif not jnp.issubdtype(value.dtype, jnp.integer):
        fail(where, f"dtype {value.dtype}", "a float or integer dtype")


def check_length(x: Array, y: Array, where: str, other: str) -> None:
    """Require one label for each input; `where` and `other` name `y` and `x`.

    >>> check_length(np.zeros(3), np.zeros(2), "y", "x")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: y: got length 2, expected 3, as many as x
    """
    if len(x) != len(y):
        fail(where, f"length {len(y)}", f"{len(x)}, as many as {other}")


def check_kind(train: Array, test: Array, where: str) -> None:
    """Require that test examples have the shape and the dtype of training examples.

    >>> check_kind(np.zeros((3, 4)), np.zeros((2, 5)), "x_test")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: x_test: got float64 examples of shape \
    (5,), expected float64 of shape (4,) as in train
    """
    want, got = (train.dtype, train.shape[1:]), (test.dtype, test.shape[1:])
    if got != want:
        expected = f"{want[0]} of shape {want[1]} as in train"
        fail(where, f"{got[0]} examples of shape {got[1]}", expected)


def fixed_order(n: int) -> np.ndarray:
    """The integers below `n` in an order that is the same on every machine and numpy.

    >>> fixed_order(5).tolist()
    [3, 2, 1, 0, 4]
    """
    # numpy promises the raw stream of PCG64 forever, but not its `permutation`.
    return np.argsort(np.random.PCG64(0).random_raw(n), kind="stable")


def split(x: Array, y: Array, n_test: int) -> Data:
    """Hold out examples, always the same ones.

    Args:
        x: inputs, `[N, ...]`.
        y: labels, `[N, ...]`.
        n_test: how many to hold out, below N.

    Returns:
        N - n_test examples to train on, n_test to test on.

    >>> data = split(np.arange(10), np.arange(10), n_test=2)
    >>> sorted(data.x_test.tolist() + data.x_train.tolist()) == list(range(10))
    True
    """
    test, train = np.split(fixed_order(len(x)), [n_test])
    return Data(x[train], y[train], x[test], y[test])


def fail(where: str, got: str, expected: str) -> NoReturn:
    """Raise a `DataError` that says where, what was got, and what was expected.

    >>> fail("x_train", "list", "an array")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: x_train: got list, expected an array
    """
    raise DataError(f"{where}: got {got}, expected {expected}")


def require(good: np.ndarray, value: Array, where: str, expected: str) -> None:
    """Fail at the first element of `value` that is not good.

    >>> require(np.array([True, False]), np.array([3, -7]), "y", "labels")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: y: got -7 at index (1,), expected labels
    """
    if not good.all():
        index = np.unravel_index(np.argmin(good), good.shape)
        at = tuple(int(i) for i in index)
        fail(where, f"{np.asarray(value)[at]} at index {at}", expected)
