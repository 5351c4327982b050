"""A folder that remembers a run: one npz file a finished round, `run.json` beside them.

Trees are saved under the names of their leaves, read back without pickle.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dagjax.types import PyTree

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
)


class StoreError(ValueError):
    """A run folder that does not fit: the message names the file and what to do."""


class Store:
    """Trees of arrays and JSON records in a folder; written whole or not at all.

    Args:
        folder: Made where it is missing. None: nothing is kept.

    Example:
        >>> import tempfile, numpy as np
        >>> store = Store(tempfile.mkdtemp())
        >>> store.save("round-0", {"mask": np.array([True, False])})
        >>> store.load("round-0", {"mask": 0})
        {'mask': array([ True, False])}
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether a tree of that name was saved."""
        return self.folder is not None and self._path(name).exists()

    def save(self, name: str, tree: PyTree) -> None:
        """Save a tree under a name."""
        if self.folder is None:
            return
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        arrays: dict[str, Any] = {
            jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves
        }
        part = self._path(name).with_suffix(".part")
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(part, self._path(name))

    def load(self, name: str, like: PyTree) -> PyTree:
        """Load a tree of the structure of `like`; the leaves of `like` do not matter.

        Raises:
            StoreError: If the file is not such an archive or lacks a leaf.
        """
        path = self._path(name)
        paths, tree = jax.tree_util.tree_flatten_with_path(like)
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = [file[jax.tree_util.keystr(p)] for p, _ in paths]
        except _UNREADABLE as error:
            raise StoreError(
                f"{path} is not a saved round of this run ({error}); "
                "delete it, or choose another folder"
            ) from error
        return jax.tree.unflatten(tree, arrays)

    def write_json(self, name: str, record: PyTree) -> None:
        """Write a JSON record."""
        if self.folder is None:
            return
        part = self.folder / f"{name}.json.part"
        text = json.dumps(_strict(record), indent=2, default=str, allow_nan=False)
        part.write_text(text + "\n")
        os.replace(part, self.folder / f"{name}.json")

    def read_json(self, name: str) -> Any:
        """Read a JSON record; None where there is none.

        Raises:
            StoreError: If it is not JSON.
        """
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is None or not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}); delete it") from error

    def clear(self) -> None:
        """Forget the saved trees."""
        for path in self.folder.glob("*.npz") if self.folder else ():
            path.unlink()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.npz"


def _strict(record: Any) -> Any:
    """Numbers that JSON does not know become null."""
    if isinstance(record, dict):
        return {key: _strict(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [_strict(value) for value in record]
    if isinstance(record, float | np.floating) and not np.isfinite(record):
        return None
    return record


def check_same(
    before: dict[str, Any], now: dict[str, Any], folder: str | os.PathLike[str]
) -> None:
    """Refuse to go on with, or to overwrite, a run of another configuration.

    Raises:
        StoreError: The fields that differ, what was saved and what was asked for.
    """
    now = json.loads(json.dumps(now, default=str))
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if keys:
        listed = "; ".join(f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys)
        raise StoreError(
            f"{folder} holds a run with other settings ({listed}); "
            "choose another folder, or delete this one"
        )
