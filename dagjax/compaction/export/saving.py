"""A network as a file that is served without dagjax: StableHLO and arrays."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import numbers
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from dagjax.compaction.channels.coupling import Channels, CompactionError
from dagjax.compaction.channels.mask_checks import named, with_values
from dagjax.compaction.channels.traced_network import (
    batch_of,
    example_of,
    resized,
    traced_network_of,
)
from dagjax.compaction.export.sparsify import DenseEvaluation
from dagjax.graph.core.network import Network
from dagjax.jaxprs.versions import shape_of
from dagjax.types import Params, PyTree

_FORMAT = "dagjax network 1"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["batch_sizes", "call"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """A network that was read from a file: it is called, and costs something.

    The file holds programs for XLA and no equations, so a network cannot be had of it.

    Args:
        params: `{path: array}`.
        batch_sizes: Those that it takes.
        call: `call(params, *leaves of the inputs) -> leaves of the outputs`.
    """

    params: dict[str, jax.Array]
    batch_sizes: tuple[int, ...]
    call: _Programs

    def __call__(self, *xs: PyTree) -> PyTree:
        """The outputs at `xs`; one array, or a list of them."""
        made = self.call(self.params, *map(jnp.asarray, jax.tree.leaves(xs)))
        return made[0] if len(made) == 1 else made

    def inputs_at(self, batch: int | None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the leaves of the inputs, by default for the first batch size."""
        program = self.call.at(self.batch_sizes[0] if batch is None else batch)
        leaves = program.in_avals[len(self.params) :]
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)

    @property
    def example_inputs(self) -> PyTree:
        """Refused."""
        raise _no_equations("its example_inputs")

    @property
    def state(self) -> PyTree:
        """Refused."""
        raise _no_equations("its state")

    updated_state = user_state = state

    def replace(self, **changes: Any) -> PyTree:
        """Refused."""
        raise _no_equations(f"replacing its {', '.join(changes)}")

    def __repr__(self) -> str:
        count = sum(x.size for x in self.params.values())
        return f"Saved({count:,} parameters, batch sizes {list(self.batch_sizes)})"


def _no_equations(what: str) -> CompactionError:
    return CompactionError(
        f"a file of dj.save holds a compiled program and no equations, and {what} "
        "would need them: trace the source again (dj.trace, dj.from_nnx, "
        "dj.from_linen) and take that network"
    )


def save(
    net: Network,
    path: str | Path,
    *,
    batch_sizes: int | Sequence[int] = (1, 8),
    platforms: str | Sequence[str] | None = None,
) -> Path:
    """Write a network as StableHLO with its arrays; no dagjax is needed to run it.

    The file is a zip of `params.npz`, one `batch_N.stablehlo` for each batch size
    (`jax.export.deserialize` reads it) and `network.json`; nothing in it is a pickle.

    Args:
        net: Any network but a file; sparse matrices lie in the file as their entries
            and are made dense when it runs, as XLA's sparse products are no portable
            code.
        path: The file, `net.zip`.
        batch_sizes: Sizes of the first axis of the inputs that it is compiled for.
        platforms: "cpu", "cuda", "tpu"; by default that of this machine.

    Returns:
        The path.

    Raises:
        CompactionError: If the arguments make no sense; nothing is written then.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp, tempfile
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3)), jnp.ones((1, 4)))
        >>> file = dj.save(dag, tempfile.mkdtemp() + "/net.zip")
        >>> dj.load(file)
        Saved(15 parameters, batch sizes [1, 8])
        >>> dj.load(file)(jnp.ones((8, 4))).shape
        (8, 3)
    """
    sizes, where = _sizes(batch_sizes), _platforms(platforms)
    _check_batch(net)
    arrays = _arrays(named(with_values(net).params))
    kinds = {name: str(x.dtype) for name, x in arrays.items()}
    meta = {"format": _FORMAT, "batch_sizes": sizes, "dtypes": kinds}
    programs = {n: bytes(_exported(net, n, where).serialize()) for n in sizes}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("network.json", json.dumps(meta, indent=1))
        file.writestr("params.npz", _npz(arrays))
        for batch, program in programs.items():
            file.writestr(f"batch_{batch}.stablehlo", program)
    return Path(path)


def _arrays(params: dict[str, PyTree]) -> dict[str, np.ndarray]:
    for name, x in params.items():
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            raise CompactionError(
                f"{name} holds keys ({x.dtype}), which no file of arrays can: pass "
                "them as an input, or make them in the function (jax.random.key)"
            )
    return {name: np.asarray(x) for name, x in params.items()}


def _check_batch(net: Network) -> None:
    """Refuse an input that is as long as the batch and has nothing to do with it."""
    source = traced_network_of(net)
    first, *others = source.body.invars[source.free :]
    wiring = Channels(source.body, len(source.body.invars), outputs=None)
    along = lambda v: wiring.classes_at(v)[0]
    for number, v in enumerate(others, 1):
        alike = v.aval.shape[:1] == first.aval.shape[:1] != ()
        if alike and not np.array_equal(along(v), along(first)):
            raise CompactionError(
                f"input {number} is {v.aval.shape[0]} long like the batch of input 0, "
                "and nothing in the network ties the two: trace it at a batch size "
                "that no other axis has"
            )


def _sizes(given: int | Sequence[int]) -> list[int]:
    sizes = [*dict.fromkeys(given)] if isinstance(given, Iterable) else [given]
    integer = lambda n: isinstance(n, numbers.Integral) and not isinstance(n, bool)
    whole = [integer(n) and n > 0 for n in sizes]
    if not sizes or not all(whole):
        raise CompactionError(
            f"batch_sizes are whole numbers from 1 on, one or more, got {given!r}"
        )
    return [int(n) for n in sizes]


def _platforms(given: Any) -> tuple[str, ...] | None:
    names = (given,) if isinstance(given, str) else given
    for name in names or ():
        if name not in _PLATFORMS:
            raise CompactionError(
                f"no platform {name!r}; there are {', '.join(_PLATFORMS)}"
            )
    return None if names is None else tuple(names)


def _exported(
    net: Network, batch: int, platforms: str | Sequence[str] | None
) -> PyTree:
    """The network at a batch size, a function of `{path: array}` and inputs."""
    leaves, tree = named(net.params), jax.tree.structure(net.params)
    inputs = resized(example_of(net), batch)
    program = traced_network_of(net, inputs).body

    def run(params: dict[str, PyTree], *xs: PyTree) -> list[PyTree]:
        weights = tree.unflatten([params[name] for name in leaves])
        args = jax.tree.leaves((net.replace(params=weights), xs))
        return DenseEvaluation().run(program, args)

    shapes = {name: shape_of(x).update(weak_type=False) for name, x in leaves.items()}
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
        FileNotFoundError: If there is none.
        CompactionError: If it is no such file, or damaged.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return _read(path)
    except CompactionError:
        raise
    except Exception as error:  # a zip, JSON, npz or flatbuffer that is broken
        raise CompactionError(
            f"{path} is no file that dj.save wrote, or it is damaged "
            f"({type(error).__name__}: {str(error)[:80]}); save it again"
        ) from error


def _read(path: str | Path) -> Saved:
    with zipfile.ZipFile(path) as file:
        meta = json.loads(file.read("network.json"))
        if meta["format"] != _FORMAT:
            raise CompactionError(f"{path} has the format {meta['format']!r}")
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

    def __init__(self, programs: dict[int | None, export.Exported]):
        self.programs = programs

    def __call__(self, params: Params, *xs: PyTree) -> PyTree:
        if not xs:
            raise CompactionError("the network was called without inputs")
        return self.at(batch_of(xs)).call(params, *xs)

    def at(self, batch: int | None) -> export.Exported:
        """The program for a batch size; one alone says itself what does not fit."""
        if batch not in self.programs and len(self.programs) > 1:
            raise CompactionError(
                f"the network was saved for batch sizes {[*self.programs]}, got "
                f"{batch}; save it with batch_sizes=({batch},)"
            )
        return self.programs.get(batch, next(iter(self.programs.values())))


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays by number; of types that numpy does not know the bytes."""
    buffer = io.BytesIO()
    plain = lambda x: x.dtype.isbuiltin == 1 and x.dtype.kind in "biufc"
    raw = lambda x: x if plain(x) else x.view(f"u{x.dtype.itemsize}")
    np.savez(buffer, **{str(i): raw(x) for i, x in enumerate(arrays.values())})
    return buffer.getvalue()
