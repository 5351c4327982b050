"""Files of examples that users bring: `.npz` archives and CIFAR-10 binaries."""

import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from dagjax.experiments.examples import (
    Data,
    DataError,
    check,
    check_array,
    check_length,
    fail,
    split,
)
from dagjax.experiments.idx import file_size
from dagjax.experiments.images import images, narrow

_FIELDS = Data._fields
_PIXELS = (3, 32, 32)
_RECORD = 1 + math.prod(_PIXELS)
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEST = "test_batch.bin"


def npz(file: str | os.PathLike[str]) -> Data:
    """Load `x_train, y_train, x_test, y_test` from an archive made by `np.savez`.

    With only `x` and `y`, one example in five is held out, always the same ones.
    Pickles are never opened.

    Args:
        file: the archive, compressed or not.

    Returns:
        uint8 inputs normalized as `images` does; all other integers in int32, as labels
        or tokens, and floats as they are, in float32.

    Raises:
        DataError: no zip archive, an array is missing, broken, of objects, not finite,
            or of the wrong length. The message names the file and the array.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/five.npz", x=np.eye(5), y=np.arange(5))
    ...     npz(f"{folder}/five.npz").x_train.shape
    (4, 5)
    """
    source = str(file)
    arrays = {k: _narrow(k, v, source) for k, v in _arrays(file).items()}
    if "x" in arrays:
        data = _held_out(arrays["x"], arrays["y"], source)
    else:
        data = check(Data(**arrays), source)
    return images(data, source) if data.x_train.dtype == np.uint8 else data


def cifar10(folder: str | os.PathLike[str]) -> Data:
    """Load CIFAR-10 from its binary version.

    A record is one label byte and 3,072 pixel bytes, channels first:
    https://www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        folder: holds `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.

    Returns:
        float32 images `[N, 32, 32, 3]` of zero mean and unit deviation in each channel,
        and int32 labels `[N]`.

    Raises:
        DataError: a file is missing, ends within a record, or holds a label above 9.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in (*_TRAIN, _TEST):
    ...         _ = Path(folder, name).write_bytes(bytes(3073))
    ...     cifar10(folder).x_train.shape
    (5, 32, 32, 3)
    """
    train = np.concatenate([_records(Path(folder, name)) for name in _TRAIN])
    test = _records(Path(folder, _TEST))
    raw = Data(_channels_last(train), train[:, 0], _channels_last(test), test[:, 0])
    return images(raw, str(folder))


def _arrays(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The four arrays of an archive, or else its `x` and `y`."""
    file_size(file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            return {
                key: _array(archive, members[f"{key}.npy"], f"{file}: {key}")
                for key in _keys(set(members), str(file))
            }
    except DataError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on hostile bytes
        got = f"a broken archive ({type(error).__name__}: {error})"
        raise DataError(f"{file}: got {got}, expected an .npz file") from error


def _keys(members: set[str], source: str) -> tuple[str, ...]:
    """Which arrays to read."""
    for keys in (_FIELDS, ("x", "y")):
        if members >= {f"{key}.npy" for key in keys}:
            return keys
    missing = [key for key in _FIELDS if f"{key}.npy" not in members]
    listed = ", ".join(sorted(members)[:9]) or "nothing"
    fail(f"{source}: {missing[0]}", f"only {listed}", f"{', '.join(_FIELDS)}, or x, y")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    """One `.npy` member, read only if its header agrees with its size."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fail(where, f"compression method {info.compress_type}", "stored or deflated")
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream, where)
        size = math.prod(shape) * dtype.itemsize
        if info.file_size != stream.tell() + size:
            got = f"{info.file_size - stream.tell()} bytes of data"
            fail(where, got, f"{size} ({dtype}, shape {shape})")
        flat = np.frombuffer(stream.read(), dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype, numbers only."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        fail(where, f".npy version {version}", "1.0 or 2.0")
    readers = (
        np.lib.format.read_array_header_1_0,
        np.lib.format.read_array_header_2_0,
    )
    with warnings.catch_warnings():  # numpy warns of headers it has to repair
        warnings.simplefilter("ignore")
        shape, fortran, dtype = readers[version[0] - 1](stream)
    if dtype.kind not in "iuf":
        kind = "objects (a pickle)" if dtype.hasobject else f"dtype {dtype}"
        fail(where, kind, "a float or integer dtype")
    if min(shape, default=0) < 1:
        fail(where, f"shape {shape}", "[N, ...] with at least one example")
    return shape, fortran, dtype


def _narrow(key: str, value: np.ndarray, source: str) -> np.ndarray:
    """Numbers in 32 bits, but pixels as they are."""
    pixels = key.startswith("x") and value.dtype == np.uint8
    return value if pixels else narrow(value, f"{source}: {key}")


def _held_out(x: np.ndarray, y: np.ndarray, source: str) -> Data:
    """Examples split 80/20."""
    check_array(y, f"{source}: y")
    check_length(x, y, f"{source}: y", "x")
    if len(x) < 2:
        fail(f"{source}: x", "1 example", "2 or more to split")
    return split(x, y, n_test=max(1, len(x) // 5))


def _records(file: Path) -> np.ndarray:
    """One CIFAR-10 file as `[N, 3073]` bytes, checked."""
    size = file_size(file)
    if size == 0 or size % _RECORD:
        fail(f"{file}: at byte {size}", "the end of the file", f"n * {_RECORD} bytes")
    records = np.fromfile(file, np.uint8).reshape(-1, _RECORD)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if wrong.size:
        at, label = int(wrong[0]) * _RECORD, records[wrong[0], 0]
        fail(f"{file}: at byte {at}", f"label {label}", "0 to 9")
    return records


def _channels_last(records: np.ndarray) -> np.ndarray:
    """Pixels `[N, 32, 32, 3]` of records `[N, 3073]`."""
    return records[:, 1:].reshape(-1, *_PIXELS).transpose(0, 2, 3, 1)
