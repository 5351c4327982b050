"""The folder of a run: written whole or not at all, read without pickle, resumed."""

import pickle
import re
import shutil
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.experiments.store import Store, StoreError, check_same
from tests.experiments import tiny
from tests.experiments.tiny import TEACHER

pytestmark = pytest.mark.usefixtures("quick_compile")


class Pair(NamedTuple):
    a: object
    b: object


TREE = Pair(
    {"mask": {"k": np.array([True, False]), "none": None}, "0": np.arange(3)},
    [jnp.float32(1.5), np.int32(7), (np.zeros((0, 2)),)],
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run")


def test_round_trip(store):
    store.save("round-0", TREE)
    loaded = store.load("round-0", TREE)
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    for one, two in zip(jax.tree.leaves(loaded), jax.tree.leaves(TREE), strict=True):
        assert np.array_equal(one, two)
        assert one.dtype == np.asarray(two).dtype


def test_the_leaves_of_like_do_not_matter(store):
    store.save("a", TREE)
    like = jax.tree.map(lambda _: 0, TREE)
    assert tiny.equal(store.load("a", like), TREE)


def test_names(store):
    assert not store.has("a")
    store.save("a", TREE)
    assert store.has("a")
    assert not store.has("b")
    store.save("a", {"x": np.ones(2)})
    assert np.array_equal(store.load("a", {"x": 0})["x"], np.ones(2))


def test_no_folder_keeps_nothing():
    store = Store(None)
    store.save("a", TREE)
    store.write_json("run", {})
    store.clear()
    assert not store.has("a")
    assert store.read_json("run") is None


def test_clear_forgets_trees_and_keeps_other_files(store):
    store.save("a", TREE)
    store.write_json("run", {"x": 1})
    store.clear()
    assert not store.has("a")
    assert store.read_json("run") == {"x": 1}


def test_json(store):
    assert store.read_json("run") is None
    store.write_json("run", {"x": [1, 2.5], "path": store.folder})
    assert store.read_json("run") == {"x": [1, 2.5], "path": str(store.folder)}
    (store.folder / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.json is not JSON"):
        store.read_json("run")


# --- whole or not at all ----------------------------------------------------------


def test_what_is_left_of_a_killed_write_is_ignored(store):
    (store.folder / "a.part").write_bytes(b"half a file")
    assert not store.has("a")
    store.save("a", TREE)
    assert tiny.equal(store.load("a", TREE), TREE)
    assert [path.name for path in store.folder.iterdir()] == ["a.npz"]


def test_a_write_that_fails_leaves_the_old_file(store, monkeypatch):
    store.save("a", {"x": np.ones(2)})

    def fails(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk full"):
        store.save("a", {"x": np.zeros(2)})
    assert np.array_equal(store.load("a", {"x": 0})["x"], np.ones(2))


# --- broken files -----------------------------------------------------------------


def half(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = data.index(b".npy") + 80
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


BREAK = {
    "half": half,
    "empty": lambda data: b"",
    "header only": lambda data: data[:4],
    "a byte": flipped,
    "text": lambda data: b"not an archive",
    "one array": lambda data: b"\x93NUMPY",
}


@pytest.mark.parametrize("how", BREAK)
def test_broken_files_are_named(store, how):
    store.save("round-1", {"x": np.arange(100.0)})
    path = store.folder / "round-1.npz"
    path.write_bytes(BREAK[how](path.read_bytes()))
    with pytest.raises(
        StoreError, match=r"round-1\.npz is not a saved round"
    ) as caught:
        store.load("round-1", {"x": 0})
    assert "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_leaf_is_named(store):
    store.save("a", {"x": np.ones(2)})
    with pytest.raises(StoreError, match=r"a\.npz.*'y'"):
        store.load("a", {"x": 0, "y": 0})


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(store):
    path = store.folder / "a.npz"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    header += b" " * (118 - len(header)) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("['x'].npy", array + pickle.dumps([Bomb()]))
    with pytest.raises(StoreError, match="allow_pickle"):
        store.load("a", {"x": 0})


# --- resuming ---------------------------------------------------------------------


def test_other_settings_are_named():
    before = {"seeds": 2, "net": "mlp", "old": 1}
    check_same(before, dict(before), "runs/a")
    with pytest.raises(StoreError) as caught:
        check_same(before, {"seeds": 3, "net": "mlp", "new": (1,)}, "runs/a")
    text = str(caught.value)
    assert text.startswith("runs/a holds a run with other settings")
    for part in ("seeds: 2 -> 3", "old: 1 -> None", "new: None -> [1]"):
        assert part in text
    assert "net" not in text


SETTINGS = {
    "seeds": 4,
    "densities": [0.5, 0.25],
    "controls": ["random"],
    "steps": 4,
    "batch": 16,
    "eval_every": 2,
}
ROUNDS = 3 + 2


def lottery(out, **changes):
    return dj.lottery(tiny.mlp(), TEACHER, out=out, **(SETTINGS | changes))


class Killed(Exception):
    pass


def killed_after(count):
    def on_round(report):
        if report.done == count:
            raise Killed

    return on_round


def killed_within(where):
    def on_chunk(done, total):
        if done == where:
            raise KeyboardInterrupt

    return on_chunk


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are not what is tested here."""
    monkeypatch.setattr(dj.Result, "save", lambda self, out: None)


def finished(folder):
    """`{round: when it was written}`."""
    return {p.stem: p.stat().st_mtime_ns for p in (folder / "rounds").glob("*.npz")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the first round of a run that was killed within the second."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(KeyboardInterrupt):
        lottery(folder, on_chunk=killed_within(1.5))
    return folder


@pytest.fixture
def folder(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def test_a_killed_run_keeps_its_finished_rounds(folder):
    assert list(finished(folder)) == ["ticket-0"]
    assert len(list((folder / "rounds").iterdir())) == 1
    record = Store(folder).read_json("run")
    assert record["finished"] is False
    assert record["settings"]["net"].startswith("Graph")


def test_a_resumed_run_is_the_run_that_was_never_killed(folder, unsaved):
    """Killed within a round, after a control's round, then finished: bitwise."""
    with pytest.raises(Killed):
        lottery(folder, resume=True, on_round=killed_after(4))
    before = finished(folder)
    assert sorted(before) == ["random-1", "ticket-0", "ticket-1", "ticket-2"]
    told, reports = tiny.Calls(), tiny.Calls()
    got = lottery(folder, resume=True, on_chunk=told, on_round=reports)
    # One call for every round, two for the chunks of the only one that is trained.
    assert [done for done, _ in told] == [1, 2, 3, 4, 4.5, 5, 5]
    assert [report.done for (report,) in reports] == list(range(1, ROUNDS + 1))
    assert finished(folder).items() >= before.items()
    want = lottery(None)
    assert jax.tree.structure(got.masks) == jax.tree.structure(want.masks)
    assert tiny.equal(got.masks, want.masks)
    assert tiny.equal(got.record.arrays(), want.record.arrays())
    assert got.record.weights == want.record.weights
    assert got.table() == want.table()


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 6), ("seeds", 5), ("learning_rate", 0.5), ("densities", [0.5])],
)
def test_resuming_another_run_is_refused(folder, field, value):
    told, before = tiny.Calls(), Store(folder).read_json("run")
    text = re.escape(str(value))
    with pytest.raises(StoreError, match=f"other settings.*{field}: .* -> {text}"):
        lottery(folder, resume=True, on_chunk=told, **{field: value})
    assert not told
    assert Store(folder).read_json("run") == before
    assert list(finished(folder)) == ["ticket-0"]


def test_without_resume_a_run_starts_anew(folder):
    before = finished(folder)
    with pytest.raises(Killed):
        lottery(folder, on_round=killed_after(2))
    assert sorted(finished(folder)) == ["ticket-0", "ticket-1"]
    assert finished(folder)["ticket-0"] > before["ticket-0"]


def test_a_run_of_other_settings_is_not_overwritten(folder):
    before = finished(folder)
    with pytest.raises(StoreError, match=r"other settings \(steps: 4 -> 2\).*delete"):
        lottery(folder, steps=2)
    assert finished(folder) == before


def test_a_round_that_cannot_be_read_is_named(folder):
    path = folder / "rounds" / "ticket-0.npz"
    path.write_bytes(half(path.read_bytes()))
    with pytest.raises(StoreError, match=r"ticket-0\.npz is not a saved round"):
        lottery(folder, resume=True)
