"""How the arguments of a network become input values, and output values its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Signature:
    """One array for each input node; one value, or a tuple where there are several."""

    def inputs(self, xs: Iterable[Any]) -> tuple[Any, ...]:
        """The arrays of the input nodes."""
        return tuple(xs)

    def context(self, xs: Iterable[Any], state: Any) -> Any:
        """The state that the arcs read, with what `xs` holds beside the inputs."""
        del xs
        return state

    def located(self, params: Any, state: Any, values: dict[str, Any]) -> Any:
        """The state, with what arcs must know of the values at the other nodes."""
        del params, values
        return state

    def shape(
        self, node: str, port: int | None, space: Any, batch: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape of a node's value, or of one of its ports, at a batch size."""
        del node, port
        return (batch if space.batched else ()) + space.shape

    def result(
        self, read: Callable[[str], Any], outputs: tuple[str, ...], net: Any
    ) -> tuple[Any, Any]:
        """The result and the new state.

        Args:
            read: The value of a node.
            outputs: The output nodes.
            net: The network, with the state that its arcs have left.
        """
        values = tuple(map(read, outputs))
        return values[0] if len(values) == 1 else values, net.state
