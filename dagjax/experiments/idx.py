"""IDX, the file format of MNIST and its descendants."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dagjax.experiments.examples import Data, DataError, fail
from dagjax.experiments.images import images

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_MAX_NDIM = 32
_CHUNK = 1 << 20
# Deflate cannot expand further than this, so a larger promise is a lie.
_EXPANSION = 1032


def idx(folder: str | os.PathLike[str]) -> Data:
    """Load the four files of an MNIST-format data set.

    Args:
        folder: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same
            two with `t10k-`; `.gz` may follow, and `.idx3-ubyte` is understood too.

    Returns:
        float32 images `[N, H, W, C]` of zero mean and unit deviation over the training
        set, and int32 labels `[N]`.

    Raises:
        DataError: a file is missing or broken, or the files disagree.

    >>> import tempfile
    >>> idx(tempfile.gettempdir() + "/nowhere")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: .../nowhere: got no such file, expected \
train-images-idx3-ubyte or train-images-idx3-ubyte.gz
    """
    x_train, x_test = (_part(folder, f"{s}-images", 3) for s in ("train", "t10k"))
    y_train, y_test = (_part(folder, f"{s}-labels", 1) for s in ("train", "t10k"))
    return images(Data(x_train, y_train, x_test, y_test), str(folder))


def read_idx(file: str | os.PathLike[str]) -> np.ndarray:
    """Read one IDX file, plain or gzipped, and believe nothing it says unchecked.

    Two zero bytes, a dtype code, the number of axes, each length as a big-endian
    uint32, then the elements in C order, big-endian:
    http://yann.lecun.com/exdb/mnist.

    Args:
        file: the file; gzip is recognized by its content.

    Returns:
        The array, in the machine's byte order.

    Raises:
        DataError: no such file, wrong magic number, unsupported dtype, an empty axis,
            more or fewer bytes than declared, or broken gzip. The message names the
            file and the byte offset (after decompression).

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])), file.flush()
    ...     read_idx(file.name)
    array([7, 8, 9], dtype=uint8)
    """
    size = file_size(file)
    with open(file, "rb") as raw:
        packed = raw.read(len(_GZIP)) == _GZIP
        raw.seek(0)
        if not packed:
            return _parse(raw, file, size)
        with gzip.GzipFile(fileobj=raw) as stream:
            return _parse(stream, file, size * _EXPANSION)


def file_size(file: str | os.PathLike[str]) -> int:
    """Bytes of a regular file; a `DataError` where there is none.

    >>> file_size("/dev/null")
    Traceback (most recent call last):
    dagjax.experiments.examples.DataError: /dev/null: got no such file, expected a \
    regular file
    """
    if not os.path.isfile(file):
        fail(os.fspath(file), "no such file", "a regular file")
    return os.path.getsize(file)


def _part(folder: str | os.PathLike[str], stem: str, ndim: int) -> np.ndarray:
    """One of the four files, with its number of axes (and label dtype) checked."""
    file = _find(Path(folder), stem, ndim)
    array = read_idx(file)
    allowed = {3: (3, 4), 1: (1,)}[ndim]
    if array.ndim not in allowed:
        fail(f"{file}: at byte 3", f"{array.ndim} axes", f"{ndim}")
    if ndim == 1 and array.dtype.kind == "f":
        fail(f"{file}: at byte 2", f"{array.dtype}", "an integer dtype for labels")
    return array


def _find(folder: Path, stem: str, ndim: int) -> Path:
    """The first spelling of a file name that exists."""
    names = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    fail(str(folder), "no such file", " or ".join(names[:2]))


def _parse(
    stream: BinaryIO | gzip.GzipFile, file: str | os.PathLike[str], limit: int
) -> np.ndarray:
    """An array from an open stream that can yield at most `limit` bytes."""
    code, ndim = _magic(_take(stream, file, 0, 4), file)
    shape = _shape(_take(stream, file, 4, 4 * ndim), ndim, file)
    dtype, start = np.dtype(_DTYPES[code]), 4 + 4 * ndim
    end = start + math.prod(shape) * dtype.itemsize
    declared = f"{end} bytes in all ({dtype.name}, shape {shape})"
    if end > limit:  # before anything is read or allocated
        fail(f"{file}: at byte {start}", f"at most {limit} bytes in all", declared)
    body = _take(stream, file, start, end - start + 1)
    if start + len(body) > end:
        fail(f"{file}: at byte {end}", "trailing bytes", declared)
    if start + len(body) < end:
        fail(f"{file}: at byte {start + len(body)}", "the end of the file", declared)
    array = np.frombuffer(body, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _magic(head: bytearray, file: str | os.PathLike[str]) -> tuple[int, int]:
    """Dtype code and number of axes, from the first four bytes."""
    if len(head) < 4:
        fail(f"{file}: at byte {len(head)}", "the end of the file", "4 magic bytes")
    if head[:2] != b"\0\0":
        fail(f"{file}: at byte 0", f"0x{head[:2].hex()}", "0x0000 (or gzip's 0x1f8b)")
    if head[2] not in _DTYPES:
        codes = ", ".join(f"0x{code:02x}" for code in _DTYPES)
        fail(f"{file}: at byte 2", f"dtype 0x{head[2]:02x}", f"one of {codes}")
    if not 1 <= head[3] <= _MAX_NDIM:
        fail(f"{file}: at byte 3", f"{head[3]} axes", f"1 to {_MAX_NDIM}")
    return head[2], head[3]


def _shape(head: bytearray, ndim: int, file: str | os.PathLike[str]) -> tuple[int, ...]:
    """Lengths of the axes, none of them zero."""
    if len(head) < 4 * ndim:
        end = f"{file}: at byte {4 + len(head)}"
        fail(end, "the end of the file", f"the lengths of {ndim} axes")
    shape = tuple(int(length) for length in np.frombuffer(head, ">u4"))
    if 0 in shape:
        fail(f"{file}: at byte {4 + 4 * shape.index(0)}", "an empty axis", "1 or more")
    return shape


def _take(
    stream: BinaryIO | gzip.GzipFile,
    file: str | os.PathLike[str],
    start: int,
    count: int,
) -> bytearray:
    """Up to `count` bytes, in chunks, so that memory follows what is really there."""
    taken = bytearray()
    try:
        while chunk := stream.read(min(_CHUNK, count - len(taken))):
            taken += chunk
    except (OSError, EOFError, zlib.error) as error:
        at = f"{file}: at byte {start + len(taken)}"
        raise DataError(f"{at}: got broken gzip ({error}), expected data") from error
    return taken
