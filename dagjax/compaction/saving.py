"""A network as a file that is served without dagjax: StableHLO and arrays."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from dagjax.compaction.channels import CompactionError
from dagjax.compaction.source import batch_of, example_of, resized
from dagjax.graph.tracing.naming import path_of

_FORMAT = "dagjax network 1"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A network that was read from a file.

    Args:
        params: `{path: array}`.
        batch_sizes: Those that it takes.
        call: `call(params, *leaves of the inputs) -> leaves of the outputs`.
    """

    params: dict[str, jax.Array]
    batch_sizes: tuple[int, ...]
    call: Callable[..., Any]

    def __call__(self, *xs: Any) -> Any:
        """The outputs at `xs`; one array, or a list of them."""
        made = self.call(self.params, *map(jnp.asarray, jax.tree.leaves(xs)))
        return made[0] if len(made) == 1 else made

    def __repr__(self) -> str:
        count = sum(x.size for x in self.params.values())
        return f"Saved({count:,} parameters, batch sizes {list(self.batch_sizes)})"


def save(
    net: Any,
    path: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    platforms: Sequence[str] | None = None,
) -> Path:
    """Write a network as StableHLO with its arrays; no dagjax is needed to run it.

    The file is a zip of `params.npz`, one `batch_N.stablehlo` for each batch size
    (`jax.export.deserialize` reads it) and `network.json`; nothing in it is a pickle.

    Args:
        net: A DAG, or a compacted network.
        path: The file, `net.zip`.
        batch_sizes: Sizes of the first axis of the inputs that it is compiled for.
        platforms: "cpu", "cuda", "tpu"; by default that of this machine.

    Returns:
        The path.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp, tempfile
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3)), jnp.ones((1, 4)))
        >>> file = dj.save(dag, tempfile.mkdtemp() + "/net.zip")
        >>> dj.load(file)
        Saved(15 parameters, batch sizes [1, 8])
        >>> dj.load(file)(jnp.ones((8, 4))).shape
        (8, 3)
    """
    leaves = jax.tree_util.tree_leaves_with_path(net.params)
    named = {path_of(p): np.asarray(x) for p, x in leaves}
    kinds = {name: str(x.dtype) for name, x in named.items()}
    meta = {"format": _FORMAT, "batch_sizes": [*batch_sizes], "dtypes": kinds}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("network.json", json.dumps(meta, indent=1))
        file.writestr("params.npz", _npz(named))
        for batch in batch_sizes:
            exported = _exported(net, batch, platforms)
            file.writestr(f"batch_{batch}.stablehlo", bytes(exported.serialize()))
    return Path(path)


def _exported(net: Any, batch: int, platforms: Any) -> Any:
    """The network at a batch size, a function of `{path: array}` and inputs."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(net.params)
    inputs = resized(example_of(net), batch)
    form = jax.tree.structure(inputs)

    def run(params: dict[str, Any], *xs: Any) -> list[Any]:
        held = tree.unflatten([params[path_of(p)] for p, _ in leaves])
        made = net.replace(params=held)(*form.unflatten(xs))
        return jax.tree.leaves(made)

    shapes = {path_of(p): jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in leaves}
    return export.export(jax.jit(run), platforms=platforms)(
        shapes, *jax.tree.leaves(inputs)
    )


def load(path: str | Path) -> Saved:
    """Read what `save` wrote.

    Args:
        path: The file.

    Returns:
        A function of the inputs, with its parameters.

    Raises:
        CompactionError: If it is no such file.
    """
    if not zipfile.is_zipfile(path):
        raise CompactionError(f"{path} is no file that dj.save wrote")
    with zipfile.ZipFile(path) as file:
        if "network.json" not in file.namelist():
            raise CompactionError(f"{path} holds no network.json; dj.save writes one")
        meta = json.loads(file.read("network.json"))
        if meta.get("format") != _FORMAT:
            raise CompactionError(f"{path} has the format {meta.get('format')!r}")
        with np.load(io.BytesIO(file.read("params.npz")), allow_pickle=False) as held:
            params = {
                name: jnp.asarray(held[str(i)].view(jnp.dtype(kind)))
                for i, (name, kind) in enumerate(meta["dtypes"].items())
            }
        sizes = tuple(meta["batch_sizes"])
        programs = {
            n: export.deserialize(bytearray(file.read(f"batch_{n}.stablehlo")))
            for n in sizes
        }
    return Saved(params, sizes, _Programs(programs))


class _Programs:
    """The program for the batch size of the inputs."""

    def __init__(self, programs: dict[int, Any]):
        self.programs = programs

    def __call__(self, params: Any, *xs: Any) -> Any:
        batch = batch_of(xs)
        if batch not in self.programs and len(self.programs) > 1:
            raise CompactionError(
                f"the network was saved for batch sizes {[*self.programs]}, got "
                f"{batch}; save it with batch_sizes=({batch},)"
            )
        only = next(iter(self.programs.values()))
        program = only if batch is None else self.programs.get(batch, only)
        return program.call(params, *xs)


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays by number; of types that numpy does not know the bytes."""
    buffer = io.BytesIO()
    raw = lambda x: x if x.dtype.kind in "biufc" else x.view(f"u{x.dtype.itemsize}")
    np.savez(buffer, **{str(i): raw(x) for i, x in enumerate(arrays.values())})
    return buffer.getvalue()
