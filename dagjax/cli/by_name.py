"""Networks and data by name, and how a run remembers its network."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dagjax.experiments.examples import Data
from dagjax.experiments.result import Settings
from dagjax.graph.core.topology import Graph
from dagjax.types import Array


def load_data(name: str) -> Data:
    """Data by name, path or `module:factory`."""
    from dagjax.experiments import data

    return data.check(_factory(name)()) if _is_factory(name) else data.load(name)


def load_net(name: str, data: Data | None) -> Any:
    """A net of the zoo with the shapes of the data, or `module:factory`."""
    from dagjax.graph.zoo import by_name

    if _is_factory(name):
        net = _factory(name)
        return net() if callable(net) and not hasattr(net, "init") else net
    return by_name(name) if data is None else _of_zoo(name, **_fitting(name, data))


def _fitting(name: str, data: Data) -> Settings:
    """The options of a net of the zoo that fit the data, JSON values."""
    from dagjax.graph.zoo import takes_conv

    return {
        "input_shape": list(data.x_train.shape[1:]),
        "classes": _outputs(data.x_train, data.y_train),
        # It trains at full speed in the compiled loops of the CPU.
        "scan_conv": jax.default_backend() == "cpu" and takes_conv(name),
    }


def _of_zoo(
    name: str, input_shape: Sequence[int], classes: int, scan_conv: bool
) -> Graph:
    from dagjax.graph.zoo import by_name
    from dagjax.graph.zoo.convolution import scan_conv as fast

    conv = {"conv": fast} if scan_conv else {}
    return by_name(name, classes=classes, input_shape=tuple(input_shape), **conv)


def remember(out: Path, name: str, data: Data) -> None:
    """Write into `run.json` how its network was made, for `dagjax compact`."""
    from dagjax.experiments.store import Store

    store, options = Store(out), {} if _is_factory(name) else _fitting(name, data)
    command = {"net": name, "options": options}
    store.write_json("run", {**store.read_json("run"), "command": command})


def remembered(record: Settings, name: str | None) -> Any:
    """The network of a run, as `run.json` says or by another name.

    Raises:
        ValueError: If the run does not say it.
    """
    command = record.get("command")
    if name is not None and _is_factory(name):
        return load_net(name, None)
    if not command or name is not None:
        raise ValueError(
            "this run was started from Python: --net package.module:factory makes its "
            "network; in Python, dj.compact takes result.tickets and result.masks"
            if not command
            else f"--net {name!r}: expected package.module:factory"
        )
    net, options = command["net"], command["options"]
    return _of_zoo(net, **options) if options else load_net(net, None)


def _outputs(x: Array, y: Array) -> int:
    """Numbers to regress, classes, or the vocabulary of inputs and next tokens."""
    if y.dtype.kind not in "iu":
        return int(y[0].size)
    tokens = x.dtype.kind in "iu" and x.shape == y.shape
    return 1 + int(max(y.max(), x.max() if tokens else 0))


def _is_factory(name: str) -> bool:
    return ":" in name and not os.path.exists(name)


def _factory(name: str) -> Any:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name!r}: expected package.module:factory; {error}"
        ) from error
    finally:
        sys.path.pop(0)
