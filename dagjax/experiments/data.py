"""Data sets by name: `load("digits")`, a folder, or an `.npz` file."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dagjax.experiments.archives import cifar10 as cifar10
from dagjax.experiments.archives import npz as npz
from dagjax.experiments.examples import Data as Data
from dagjax.experiments.examples import DataError as DataError
from dagjax.experiments.examples import check as check
from dagjax.experiments.examples import split as split
from dagjax.experiments.idx import idx as idx
from dagjax.experiments.idx import read_idx as read_idx
from dagjax.experiments.images import images as images
from dagjax.experiments.synthetic import planted as planted
from dagjax.experiments.synthetic import teacher as teacher
from dagjax.experiments.text import alphabet as alphabet
from dagjax.experiments.text import characters as characters
from dagjax.experiments.text import decode as decode
from dagjax.experiments.text import encode as encode
from dagjax.experiments.text import sums as sums

# Where the Debian package `dataset-fashion-mnist` puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load(name: str | os.PathLike[str]) -> Data:
    """Load a data set by its name or from a path.

    Args:
        name: one of `NAMES`, a folder with IDX or CIFAR-10 files, or an `.npz` file.

    Returns:
        The examples.

    Raises:
        DataError: no such data set, or its files are broken.
        ImportError: "digits" without scikit-learn.

    >>> load("digits").x_train.shape
    (1437, 8, 8, 1)
    """
    path = os.fspath(name)
    if path in _LOADERS:
        return _LOADERS[path]()
    if os.path.isdir(path):
        binary = os.path.isfile(Path(path, "data_batch_1.bin"))
        return cifar10(path) if binary else idx(path)
    if path.endswith(".npz"):
        return npz(path)
    allowed = f"{', '.join(NAMES)}, a folder with IDX or CIFAR-10 files, or an .npz"
    raise DataError(f"no data {path!r}: expected {allowed} file")


def digits() -> Data:
    """The 8x8 handwritten digits of scikit-learn, in a fixed split.

    Returns:
        1,437 and 360 float32 images `[N, 8, 8, 1]`, normalized, and int32 labels `[N]`.

    Raises:
        ImportError: scikit-learn is not installed.

    >>> data = digits()
    >>> len(data.y_train), len(data.y_test), round(float(data.x_train.std()), 3)
    (1437, 360, 1.0)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        text = "digits needs scikit-learn: pip install dagjax[experiments]"
        raise ImportError(text) from error
    x, y = (np.asarray(array) for array in load_digits(return_X_y=True))
    return images(split(x.reshape(-1, 8, 8), y, n_test=360), "digits")


def fashion_mnist(folder: str | os.PathLike[str] | None = None) -> Data:
    """Fashion-MNIST, 60,000 and 10,000 images of clothes in ten classes.

    Args:
        folder: its four IDX files; by default where Debian's package puts them.

    Returns:
        float32 images `[N, 28, 28, 1]`, normalized, and int32 labels `[N]`.

    Raises:
        DataError: the files are missing or broken.

    >>> fashion_mnist("/nowhere")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: Fashion-MNIST is not in /nowhere: apt \
install dataset-fashion-mnist, or pass the folder of its IDX files
    """
    folder = FASHION_MNIST if folder is None else folder
    if not os.path.isdir(folder):
        how = "apt install dataset-fashion-mnist, or pass the folder of its IDX files"
        raise DataError(f"Fashion-MNIST is not in {os.fspath(folder)}: {how}")
    return idx(folder)


_LOADERS: dict[str, Callable[[], Data]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "teacher": teacher,
    "characters": characters,
}
NAMES = tuple(_LOADERS)
