"""Data sets: what loaders return, and that broken files are refused by name."""

import gzip
import io
import math
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dagjax.experiments import data as datasets
from dagjax.experiments.data import (
    NAMES,
    Data,
    DataError,
    alphabet,
    characters,
    check,
    cifar10,
    decode,
    digits,
    encode,
    fashion_mnist,
    idx,
    images,
    load,
    npz,
    planted,
    read_idx,
    split,
    sums,
    teacher,
)
from dagjax.experiments.examples import fixed_order
from dagjax.experiments.images import narrow
from dagjax.experiments.text import words

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
CIFAR = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]

# One folder a test is enough: every example overwrites the same file.
fuzz = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def idx_bytes(array: np.ndarray) -> bytes:
    """An independent writer of the format."""
    big = array.astype(array.dtype.newbyteorder(">"))
    head = struct.pack(">BBBB", 0, 0, CODES[array.dtype.str[1:]], array.ndim)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + big.tobytes()


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def write_mnist(folder: Path, dot: str = "-", gz: bool = False, **changes) -> Data:
    """Small files in MNIST's format; `changes` replaces single arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images": rng.integers(0, 256, (7, 5, 4), np.uint8),
        "train-labels": rng.integers(0, 10, 7, np.uint8),
        "t10k-images": rng.integers(0, 256, (3, 5, 4), np.uint8),
        "t10k-labels": rng.integers(0, 10, 3, np.uint8),
    } | {key.replace("_", "-"): value for key, value in changes.items()}
    for key, array in arrays.items():
        name = f"{key}{dot}idx{3 if 'images' in key else 1}-ubyte"
        content = idx_bytes(array)
        file = folder / (name + ".gz" if gz else name)
        file.write_bytes(packed(content) if gz else content)
    return Data(*arrays.values())


def write_cifar(folder: Path, n: int = 2) -> np.ndarray:
    records = np.random.default_rng(0).integers(0, 256, (6, n, 3073), np.uint8)
    records[:, :, 0] %= 10
    for name, batch in zip(CIFAR, records, strict=True):
        (folder / name).write_bytes(batch.tobytes())
    return records


def small(**changes) -> Data:
    x, y = np.ones((4, 3), np.float32), np.arange(4, dtype=np.int32)
    return Data(x, y, x[:2], y[:2])._replace(**changes)


def assert_same(got: Data, want: Data):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def assert_images(data: Data, shape: tuple[int, ...]):
    assert data.x_train.shape[1:] == data.x_test.shape[1:] == shape
    assert {x.dtype for x in (data.x_train, data.x_test)} == {np.dtype("float32")}
    assert {y.dtype for y in (data.y_train, data.y_test)} == {np.dtype("int32")}
    assert data.y_train.ndim == data.y_test.ndim == 1
    assert all(x.flags.c_contiguous for x in data)
    np.testing.assert_allclose(data.x_train.mean(dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(data.x_train.std(dtype=np.float64), 1, atol=1e-4)


# Data and check


def test_data_is_a_pytree():
    data = jax.tree.map(jnp.asarray, small())
    assert isinstance(data, Data)
    assert check(data) is not None
    assert [leaf.shape for leaf in jax.tree.leaves(data)] == [
        (4, 3),
        (4,),
        (2, 3),
        (2,),
    ]


def test_check_accepts_labels_targets_tokens_and_bfloat16():
    assert_same(check(small()), small())
    check(small(y_train=np.ones((4, 2)), y_test=np.ones((2, 2))))
    check(small(x_train=np.ones((4, 3), int), x_test=-np.ones((2, 3), int)))
    bf = jnp.ones((4, 3), jnp.bfloat16)
    check(small(x_train=bf, x_test=bf[:2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": [1, 2]}, "x_train: got list, expected a numpy or jax array"),
        ({"x_train": np.float32(1)}, "x_train: got float32, expected a numpy"),
        ({"x_train": np.array(1.0)}, r"x_train: got shape \(\), expected \[N"),
        ({"x_test": np.ones((0, 3))}, r"x_test: got shape \(0, 3\), .*at least one"),
        ({"x_train": np.full((4, 3), np.inf)}, r"x_train: got inf at index \(0, 0\)"),
        ({"y_test": np.array([0.0, np.nan])}, r"y_test: got nan at index \(1,\)"),
        ({"y_train": np.arange(3)}, "y_train: got length 3, expected 4"),
        ({"y_test": np.arange(3)}, "y_test: got length 3, expected 2"),
        ({"y_train": np.array(["a"] * 4)}, "y_train: got dtype <U1, expected a float"),
        ({"x_train": np.ones((4, 3), bool)}, "x_train: got dtype bool"),
        ({"x_train": np.ones((4, 3), complex)}, "x_train: got dtype complex128"),
        ({"x_train": np.full((4, 3), None)}, "x_train: got dtype object"),
        ({"x_test": np.ones((2, 4), np.float32)}, r"x_test: got .*\(4,\), .*\(3,\)"),
        ({"y_test": np.arange(2.0)}, "y_test: got float64 examples .* int32"),
    ],
)
def test_check_names_the_field(changes, message):
    with pytest.raises(DataError, match=message):
        check(small(**changes))


def test_check_names_the_source_and_refuses_other_things():
    with pytest.raises(DataError, match=r"mine: x_train: got list"):
        check(small(x_train=[]), source="mine")
    with pytest.raises(DataError, match=r"got tuple, expected Data\('x_train'"):
        check((1, 2, 3))
    with pytest.raises(DataError, match="got ndarray"):
        check(np.ones(4))
    assert isinstance(check(tuple(small())), Data)


def test_fixed_order_never_changes():
    assert fixed_order(10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert sorted(fixed_order(1000)) == list(range(1000))


def test_split_is_a_partition_and_keeps_pairs():
    data = split(np.arange(50), np.arange(50) * 2, n_test=10)
    assert (len(data.x_train), len(data.x_test)) == (40, 10)
    assert sorted([*data.x_train, *data.x_test]) == list(range(50))
    np.testing.assert_array_equal(data.y_test, data.x_test * 2)


# Images


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_images_do_not_depend_on_the_scale_or_dtype_of_pixels(dtype):
    raw = np.random.default_rng(0).integers(0, 100, (6, 4, 5))
    y = np.arange(6)
    want = images(Data(raw, y, raw, y), "int")
    got = images(Data(raw.astype(dtype), y, raw.astype(dtype), y), "other")
    assert_same(got, want)
    assert_images(got, (4, 5, 1))


def test_images_normalize_each_channel_by_training_statistics():
    rng = np.random.default_rng(0)
    scale = np.array([1, 10, 100])
    x = rng.normal(size=(20, 6, 6, 3)) * scale + scale
    x_train, x_test = x[:15], x[15:]
    got = images(Data(x_train, np.arange(15), x_test, np.arange(5)), "mine")
    mean, std = x_train.mean((0, 1, 2)), x_train.std((0, 1, 2))
    np.testing.assert_allclose(got.x_train, (x_train - mean) / std, atol=1e-5)
    np.testing.assert_allclose(got.x_test, (x_test - mean) / std, atol=1e-5)


def test_images_of_one_color_become_zero_and_the_input_is_kept():
    x, y = np.full((3, 2, 2), 7, np.uint8), np.arange(3)
    assert (images(Data(x, y, x, y), "flat").x_train == 0).all()
    floats = np.arange(12, dtype=np.float32).reshape(3, 2, 2, 1)
    before = floats.copy()
    images(Data(floats, y, floats, y), "kept")
    np.testing.assert_array_equal(floats, before)


@pytest.mark.parametrize("size", [1e30, 1e39])
def test_images_refuse_pixels_that_overflow(size):
    x, y = np.array([[-size], [size]]), np.arange(2)
    with pytest.raises(DataError, match="mine"):
        images(Data(x, y, x, y), "mine")


def test_narrow_refuses_integers_beyond_int32():
    with pytest.raises(DataError, match=r"y: got 2147483648 at index \(1,\)"):
        narrow(np.array([0, 2**31]), "y")
    assert narrow(np.array([2**31 - 1], np.uint64), "y").dtype == np.int32


# IDX

idx_arrays = st.sampled_from(sorted(CODES)).flatmap(
    lambda code: hnp.arrays(code, hnp.array_shapes(max_dims=4, max_side=4))
)


@fuzz
@given(array=idx_arrays, gz=st.booleans())
def test_idx_round_trip(tmp_path, array, gz):
    file = tmp_path / "file"
    file.write_bytes(packed(idx_bytes(array)) if gz else idx_bytes(array))
    got = read_idx(file)
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype
    assert got.dtype.isnative


def outcome(read, file) -> str:
    """Runs a reader; any error but DataError escapes."""
    try:
        read(file)
    except DataError as error:
        text = str(error)
    else:
        text = ""
    assert not text or str(file) in text
    return text


headed = st.builds(
    lambda code, ndim, dims, rest: (
        bytes([0, 0, code, ndim]) + struct.pack(f">{len(dims)}I", *dims) + rest
    ),
    st.sampled_from([0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F]),
    st.integers(0, 255),
    st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), max_size=5),
    st.binary(max_size=40),
)


@fuzz
@given(content=st.binary(max_size=60) | headed, wrap=st.booleans())
@example(content=b"\x1f\x8b", wrap=False)
@example(content=b"\x1f\x8b\x08", wrap=False)
def test_idx_of_arbitrary_bytes_raises_only_data_errors(tmp_path, content, wrap):
    file = tmp_path / "file"
    file.write_bytes(packed(content) if wrap else content)
    outcome(read_idx, file)


@fuzz
@given(data=st.data(), gz=st.booleans())
def test_idx_never_accepts_a_shorter_or_longer_file(tmp_path, data, gz):
    good = idx_bytes(np.arange(12, dtype=np.int16).reshape(3, 4))
    whole = packed(good) if gz else good
    cut = data.draw(st.integers(0, len(whole) - 1))
    file = tmp_path / "file"
    file.write_bytes(whole[:cut])
    assert outcome(read_idx, file)
    file.write_bytes(whole + data.draw(st.binary(min_size=1)) + b"!")
    assert outcome(read_idx, file)


@fuzz
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_idx_gzip_with_a_flipped_bit_is_refused_or_equal(tmp_path, place, bit):
    array = np.arange(300, dtype=np.int32).reshape(3, 100)
    whole = bytearray(packed(idx_bytes(array)))
    whole[place % len(whole)] ^= 1 << bit
    file = tmp_path / "file"
    file.write_bytes(whole)
    if not outcome(read_idx, file):  # an unused header bit
        np.testing.assert_array_equal(read_idx(file), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at byte 0: got the end of the file, expected 4 magic bytes"),
        (b"\0\0\x08", "at byte 3: got the end of the file, expected 4 magic"),
        (b"\0\1\x08\1", "at byte 0: got 0x0001, expected 0x0000"),
        (b"\0\0\x0a\1", "at byte 2: got dtype 0x0a, expected one of 0x08"),
        (b"\0\0\x08\0", "at byte 3: got 0 axes, expected 1 to 32"),
        (b"\0\0\x08\xff", "at byte 3: got 255 axes, expected 1 to 32"),
        (b"\0\0\x08\2\0\0\0\1\0", "at byte 9: got the end of the file, .* 2 axes"),
        (b"\0\0\x08\2\0\0\0\1\0\0\0\0", "at byte 8: got an empty axis"),
        (b"\0\0\x08\1\0\0\0\3ab", "at byte 8: got at most 10 .* 11 bytes .*uint8"),
        (b"\0\0\x08\1\0\0\0\1ab", "at byte 9: got trailing bytes, expected 9 bytes"),
        (b"\0\0\x0e\3" + b"\xff" * 12, "at byte 16: got at most 16 bytes in all"),
        (packed(b"\0\0\x08\1\0\0\0\3ab"), "at byte 10: got the end of the file"),
        (packed(b"\0\0\x08\1\0\0\0\1ab"), "at byte 9: got trailing bytes"),
        (packed(idx_bytes(np.ones(9)))[:-9], r"at byte \d+: got broken gzip \(Comp"),
        (packed(idx_bytes(np.ones(9))) + b"x", r"got broken gzip \(Not a gzipped"),
    ],
)
def test_idx_errors_name_the_file_and_the_byte(tmp_path, content, message):
    file = tmp_path / "bad-ubyte"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"bad-ubyte: .*{message}"):
        read_idx(file)


def test_idx_of_no_file_or_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "none", "/dev/zero"):
        with pytest.raises(DataError, match="got no such file, expected a regular"):
            read_idx(path)


def peak_of(read, file) -> int:
    tracemalloc.start()
    try:
        assert outcome(read, file)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_idx_stops_a_gzip_bomb_at_the_declared_size(tmp_path):
    file = tmp_path / "bomb.gz"
    head = bytes([0, 0, 8, 1]) + struct.pack(">I", 1000)
    file.write_bytes(packed(head + bytes(50_000_000)))
    assert peak_of(read_idx, file) < 2_000_000


def test_idx_allocates_nothing_for_an_absurd_declaration(tmp_path):
    head = bytes([0, 0, 0x0E, 2]) + b"\xff" * 8
    file = tmp_path / "absurd"
    for content in (head + bytes(99), packed(head + bytes(99))):
        file.write_bytes(content)
        assert peak_of(read_idx, file) < 2_000_000


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("gz", [False, True])
def test_idx_folder_in_every_spelling(tmp_path, dot, gz):
    raw = write_mnist(tmp_path, dot, gz)
    data = idx(tmp_path)
    assert_images(data, (5, 4, 1))
    mean, std = raw.x_train.mean(), raw.x_train.std()
    np.testing.assert_allclose(
        data.x_test[..., 0], (raw.x_test - mean) / std, atol=1e-5
    )
    np.testing.assert_array_equal(data.y_train, raw.y_train)
    assert_same(load(str(tmp_path)), data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.zeros(6, np.uint8)}, "y_train: got length 6, expected 7"),
        ({"t10k_images": np.zeros((3, 5, 5), np.uint8)}, "x_test: got .*5, 5"),
        ({"t10k_images": np.zeros(3, np.uint8)}, "t10k-images.*byte 3: got 1 axes"),
        ({"t10k_labels": np.zeros((3, 1), np.uint8)}, "t10k-labels.*got 2 axes"),
        ({"train_labels": np.zeros(7)}, "train-labels.*byte 2: got float64"),
        ({"t10k_labels": np.full(3, -1, np.int8)}, "y_test: got .*int8|got -1"),
        ({"train_images": np.full((7, 5, 4), np.nan)}, "x_train: got nan"),
    ],
)
def test_idx_folder_whose_files_disagree(tmp_path, changes, message):
    write_mnist(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        idx(tmp_path)


def test_idx_folder_with_a_missing_file(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="expected t10k-labels-idx1-ubyte or"):
        idx(tmp_path)


# npz


def test_npz_round_trip_of_floats_and_tokens(tmp_path):
    file = tmp_path / "a.npz"
    for save in (np.savez, np.savez_compressed):
        save(file, **small()._asdict(), extra=np.ones(3))
        assert_same(npz(file), small())
    tokens = small(x_train=np.ones((4, 3), int), x_test=np.ones((2, 3), int))
    np.savez(file, **tokens._asdict())
    assert npz(file).x_train.dtype == np.int32


def test_npz_in_fortran_and_big_endian_order(tmp_path):
    x = np.arange(12.0).reshape(4, 3)
    swapped = np.asfortranarray(x.astype(">f8"))
    np.savez(tmp_path / "a.npz", **small(x_train=swapped, x_test=swapped[:2])._asdict())
    np.testing.assert_array_equal(npz(tmp_path / "a.npz").x_train, x)


def test_npz_normalizes_bytes(tmp_path):
    raw = write_mnist(tmp_path)
    np.savez(tmp_path / "a.npz", **raw._asdict())
    assert_same(npz(tmp_path / "a.npz"), idx(tmp_path))
    targets = raw._replace(y_train=np.ones((7, 2)), y_test=np.ones((3, 2)))
    np.savez(tmp_path / "a.npz", **targets._asdict())
    assert npz(tmp_path / "a.npz").y_train.dtype == np.float32


def test_npz_splits_x_and_y(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(20.0)[:, None], y=np.arange(20))
    data = load(tmp_path / "a.npz")
    assert (len(data.x_train), len(data.x_test)) == (16, 4)
    np.testing.assert_array_equal(data.x_train[:, 0], data.y_train)
    assert_same(npz(tmp_path / "a.npz"), data)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones(3)}, "x_train: got only x.npy, expected x_train, y_train"),
        ({}, "x_train: got only nothing"),
        ({"x": np.ones(3), "y": np.ones(2)}, "y: got length 2, expected 3"),
        ({"x": np.ones(1), "y": np.ones(1)}, "x: got 1 example, expected 2 or more"),
        ({"x": np.array([1, np.nan]), "y": np.ones(2)}, "x: got nan at index"),
        ({"x": np.ones(2), "y": np.array(["a", "b"])}, "y: got dtype <U1"),
        ({"x": np.ones(()), "y": np.ones(2)}, r"x: got shape \(\)"),
        ({"x": np.ones((2, 0)), "y": np.ones(2)}, r"x: got shape \(2, 0\)"),
        ({"x": np.full(2, 1e39), "y": np.ones(2)}, "x: got 1e.39 .* fit float32"),
        ({"x": np.ones(2), "y": np.array([1, 2**40])}, "y: got 1099511627776 .* int32"),
        (small(y_test=np.arange(5))._asdict(), "y_test: got .*"),
        (small(x_test=np.full((2, 3), np.inf))._asdict(), "x_test: got inf"),
    ],
)
def test_npz_errors_name_the_file_and_the_key(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=f"bad.npz: {message}"):
        npz(tmp_path / "bad.npz")


class Trap:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (str(Trap.mark),))

    mark = Path("unset")


def test_npz_never_opens_a_pickle(tmp_path):
    Trap.mark = tmp_path / "executed"
    objects = np.array([Trap(), Trap()], dtype=object)
    np.savez(tmp_path / "bad.npz", x=objects, y=np.ones(2))
    with pytest.raises(DataError, match=r"bad.npz: x: got objects \(a pickle\)"):
        npz(tmp_path / "bad.npz")
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"raw.npz: got a broken archive"):
        npz(tmp_path / "raw.npz")
    assert not Trap.mark.exists()


def test_npz_that_is_no_archive(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    for file in (tmp_path / "a.npy", tmp_path, tmp_path / "none.npz"):
        with pytest.raises(DataError, match=r"broken archive|no such file"):
            npz(file)


def write_member(file: Path, head: bytes, body: bytes, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x.npy", head + body)
        buffer = io.BytesIO()
        np.save(buffer, np.arange(2))
        archive.writestr("y.npy", buffer.getvalue())


def npy_head(text: str, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


def describe(shape: str, descr: str = "'<f8'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        (npy_head(describe("(99999999, 99999999)")), bytes(16), "x: got 16 bytes of"),
        (npy_head(describe("(3,)")), bytes(16), "x: got 16 bytes .* expected 24"),
        (npy_head(describe("(1,)")), bytes(16), "x: got 16 bytes .* expected 8"),
        (npy_head(describe("(-2, -1)")), bytes(16), r"x: got shape \(-2, -1\)"),
        (npy_head(describe("(2L,)")), bytes(8), "x: got 8 bytes .* expected 16"),
        (npy_head(describe("(2,)", "'|O'")), bytes(16), "x: got objects"),
        (npy_head(describe("(2,)", "[('a', '|O')]")), bytes(16), "x: got objects"),
        (npy_head(describe("(2,)", "'<M8[s]'")), bytes(16), "x: got dtype datetime"),
        (npy_head("{'descr': __import__('os')}"), b"", "broken archive"),
        (npy_head("(" * 5000), b"", "broken archive"),
        (npy_head(" " * 50_000, 2), b"", "broken archive"),
        (npy_head(describe("(2,)"), 3), bytes(16), r"x: got .npy version \(3, 0\)"),
        (b"", b"", "broken archive"),
    ],
)
def test_npz_members_are_read_only_if_the_header_is_honest(
    tmp_path, head, body, message
):
    write_member(tmp_path / "bad.npz", head, body)
    with pytest.raises(DataError, match=f"bad.npz: .*{message}"):
        npz(tmp_path / "bad.npz")
    assert peak_of(npz, tmp_path / "bad.npz") < 5_000_000


def test_npz_reads_version_two_and_refuses_other_compressions(tmp_path):
    head = npy_head(describe("(2,)"), 2)
    write_member(tmp_path / "a.npz", head, bytes(16))
    assert npz(tmp_path / "a.npz").x_train.dtype == np.float32
    write_member(tmp_path / "b.npz", head, bytes(16), zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match="compression method 12"):
        npz(tmp_path / "b.npz")


def test_npz_with_a_lying_size_in_its_directory(tmp_path):
    file = tmp_path / "bad.npz"
    write_member(file, npy_head(describe(f"({2**33},)")), bytes(64))
    true = struct.pack("<I", len(npy_head(describe(f"({2**33},)"))) + 64)
    file.write_bytes(file.read_bytes().replace(true, b"\xfe\xff\xff\xff"))
    assert peak_of(npz, file) < 5_000_000


@fuzz
@given(content=st.binary(max_size=200))
def test_npz_of_arbitrary_bytes_raises_only_data_errors(tmp_path, content):
    file = tmp_path / "file.npz"
    file.write_bytes(content)
    assert outcome(npz, file)


@settings(fuzz, max_examples=200)
@given(
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    byte=st.integers(0, 255),
    cut=st.integers(0, 5),
    method=st.sampled_from([np.savez, np.savez_compressed]),
)
def test_npz_with_changed_bytes_raises_only_data_errors(
    tmp_path, places, byte, cut, method
):
    buffer = io.BytesIO()
    method(buffer, x=np.arange(6.0), y=np.arange(6))
    content = bytearray(buffer.getvalue())
    for place in places:
        content[place % len(content)] = byte
    file = tmp_path / "file.npz"
    file.write_bytes(content[: len(content) - cut])
    outcome(npz, file)


# CIFAR-10


def test_cifar10_round_trip(tmp_path):
    records = write_cifar(tmp_path, n=3)
    data = cifar10(tmp_path)
    assert_images(data, (32, 32, 3))
    assert (len(data.x_train), len(data.x_test)) == (15, 3)
    np.testing.assert_array_equal(data.y_test, records[5, :, 0])
    raw = records[:5].reshape(15, 3073)[:, 1:].reshape(15, 3, 32, 32).astype(float)
    std, mean = raw.std((0, 2, 3)), raw.mean((0, 2, 3))
    want = (raw[4, 1, 7, 9] - mean[1]) / std[1]  # image 4, green, row 7, column 9
    np.testing.assert_allclose(data.x_train[4, 7, 9, 1], want, atol=1e-5)
    assert_same(load(tmp_path), data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at byte 0: got the end of the file, expected n . 3073 bytes"),
        (bytes(3072), "at byte 3072: got the end of the file"),
        (bytes(3073) + b"\x0a" + bytes(3072), "at byte 3073: got label 10, expected 0"),
    ],
)
def test_cifar10_errors_name_the_file_and_the_byte(tmp_path, content, message):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_3.bin: {message}"):
        cifar10(tmp_path)


def test_cifar10_with_a_missing_file(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin: got no such file"):
        load(tmp_path)


@fuzz
@given(content=st.binary(max_size=100), repeat=st.integers(1, 3073))
def test_cifar10_of_arbitrary_bytes_raises_only_data_errors(tmp_path, content, repeat):
    write_cifar(tmp_path, n=1)
    (tmp_path / "test_batch.bin").write_bytes(content * repeat)
    outcome(cifar10, tmp_path)


# Teacher


def test_teacher_is_computed_by_the_planted_network():
    data = teacher(3, n_train=50, n_test=20, d_in=8, d_hidden=3, d_out=2, kept=2)
    params = planted(3, d_in=8, d_hidden=3, d_out=2, kept=2)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        first, second = params["Dense_0"], params["Dense_1"]
        hidden = jax.nn.relu(x @ first["kernel"] + first["bias"])
        want = hidden @ second["kernel"] + second["bias"]
        np.testing.assert_allclose(y, want, atol=1e-5)
    assert {a.dtype for a in data} == {np.dtype("float32")}
    assert data.y_test.shape == (20, 2)


def test_planted_fits_flax_dense_layers():
    import flax.linen as nn

    class Student(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(4)(x))
            return nn.Dense(1)(x)

    data = teacher()
    got = Student().apply({"params": planted()}, data.x_test)
    np.testing.assert_allclose(got, data.y_test, atol=1e-5)


@given(seed=st.integers(0, 2**32), d_in=st.integers(1, 9), data=st.data())
@settings(max_examples=30, deadline=None)
def test_planted_support(seed, d_in, data):
    kept = data.draw(st.integers(1, d_in))
    kernel = planted(seed, d_in=d_in, kept=kept)["Dense_0"]["kernel"]
    assert (np.count_nonzero(kernel, axis=0) == kept).all()
    assert np.abs(kernel[kernel != 0]).min() >= 0.49 / math.sqrt(kept)
    assert not np.signbit(kernel[kernel == 0]).any()


def test_teacher_seeds():
    assert_same(teacher(1), teacher(1))
    assert not np.array_equal(teacher(1).y_train, teacher(2).y_train)
    few, many = teacher(n_train=10), teacher(n_train=99)
    np.testing.assert_array_equal(few.x_test, many.x_test)
    assert not set(many.x_train.ravel()) & set(many.x_test.ravel())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_train": 0}, "teacher: n_train: got 0, expected 1 or more"),
        ({"n_test": -1}, "teacher: n_test: got -1"),
        ({"d_hidden": 0}, "teacher: d_hidden: got 0"),
        ({"kept": 0}, "teacher: kept: got 0"),
        ({"kept": 17}, "teacher: kept: got 17, expected at most d_in, which is 16"),
        ({"seed": -1}, "teacher: seed: got -1, expected 0 or more"),
    ],
)
def test_teacher_refuses_sizes(kwargs, message):
    with pytest.raises(DataError, match=message):
        teacher(**kwargs)


# Characters


@given(
    text=st.text(min_size=60, max_size=300), length=st.integers(1, 9), data=st.data()
)
@settings(max_examples=50, deadline=None)
def test_characters_are_windows_of_the_text_without_overlap(text, length, data):
    got, cut = characters(text, length), len(text) * 4 // 5
    vocabulary = alphabet(text)
    for x, y, part in (
        (got.x_train, got.y_train, text[:cut]),
        (got.x_test, got.y_test, text[cut:]),
    ):
        assert x.shape == y.shape
        assert x.dtype == y.dtype == np.int32
        assert decode(x.ravel(), vocabulary) == part[: x.size]
        assert decode(y.ravel(), vocabulary) == part[1 : x.size + 1]
        assert len(part) - 1 - x.size < length


@given(st.text(max_size=50))
def test_encode_round_trip(text):
    assert decode(encode(text, alphabet(text)), alphabet(text)) == text


def test_encode_refuses_other_characters():
    with pytest.raises(DataError, match="at character 2: got 'z', expected one of 'a"):
        encode("abz", "ab")


def test_default_text():
    data, vocabulary = characters(), alphabet()
    assert data.x_train.shape[1] == 32
    assert data.x_train.max() < len(vocabulary) == 20
    lines = sums().splitlines()
    assert len(lines) == len(set(lines)) == 32 * 32
    assert "twelve plus nine is twenty one" in lines
    part = len(sums()) * 4 // 5
    train, test = set(sums()[:part].splitlines()), set(sums()[part:].splitlines()[1:])
    assert not train & test


def test_sums_are_right():
    number = {words(n): n for n in range(100)}
    assert len(number) == 100
    for line in sums(50).splitlines():
        left, total = line.split(" is ")
        a, b = left.split(" plus ")
        assert number[a] + number[b] == number[total]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: characters("abc"), "got 3 characters, expected more than 160"),
        (lambda: characters("abc", length=0), "length: got 0"),
        (lambda: characters(""), "got 0 characters"),
        (lambda: sums(51), "got 51, expected 1 to 50"),
        (lambda: words(100), "got 100, expected 0 to 99"),
    ],
)
def test_text_refuses(call, message):
    with pytest.raises(DataError, match=message):
        call()


# By name


def test_digits():
    data = digits()
    assert_images(data, (8, 8, 1))
    assert (len(data.x_train), len(data.x_test)) == (1437, 360)
    assert_same(data, digits())
    counts = np.bincount(data.y_test, minlength=10)
    assert counts.sum() == 360
    assert counts.min() > 20
    train = {x.tobytes() for x in data.x_train}
    assert sum(x.tobytes() in train for x in data.x_test) == 0


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install dagjax\[experiments\]"):
        load("digits")


def test_fashion_mnist_in_a_given_folder(tmp_path, monkeypatch):
    write_mnist(tmp_path, gz=True)
    assert_same(fashion_mnist(tmp_path), idx(tmp_path))
    monkeypatch.setattr(datasets, "FASHION_MNIST", tmp_path)
    assert_same(load("fashion-mnist"), idx(tmp_path))


def test_fashion_mnist_of_debian_or_how_to_get_it():
    if datasets.FASHION_MNIST.is_dir():
        data = fashion_mnist()
        assert_images(data, (28, 28, 1))
        assert (len(data.x_train), len(data.x_test)) == (60_000, 10_000)
        assert (np.bincount(data.y_train) == 6000).all()
    else:
        with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
            fashion_mnist()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"fashion-mnist"}))
def test_load_by_name(name):
    data = load(name)
    assert check(data, name) == data
    assert_same(data, load(name))


@pytest.mark.parametrize("name", ["", "mnist", "a" * 5000, "/nowhere", "a\0b"])
def test_load_lists_what_is_allowed(name):
    with pytest.raises(DataError, match="expected digits, fashion-mnist, teacher, c"):
        load(name)


def test_load_of_an_empty_folder_or_a_missing_archive(tmp_path):
    with pytest.raises(DataError, match="expected train-images-idx3-ubyte"):
        load(tmp_path)
    with pytest.raises(DataError, match="got no such file"):
        load(tmp_path / "none.npz")
