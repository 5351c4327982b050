"""How the arguments of a network become input values, and output values its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from dagjax.types import Params, PyTree, State


@dataclasses.dataclass(frozen=True)
class Signature:
    """One array for each input node; one value, or a tuple where there are several."""

    @property
    def example_inputs(self) -> tuple[PyTree, ...] | None:
        """Shapes of inputs that it takes."""
        return None

    @property
    def updated_state(self) -> tuple[str, ...]:
        """Paths of the state that each call updates."""
        return ()

    def inputs(self, xs: Iterable[Any]) -> tuple[Any, ...]:
        """The arrays of the input nodes."""
        return tuple(xs)

    def context(
        self,
        params: Params,
        state: State,
        values: dict[str, PyTree],
        xs: Iterable[Any] = (),
    ) -> Any:
        """What the arcs of one call know beside their input; None: nothing.

        `values` hold those of the input nodes, `xs` the arguments of the call, which
        may be more.
        """
        del params, state, values, xs

    def shape(
        self, node: str, port: int | None, space: Any, batch: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape of a node's value, or of one of its ports, at a batch size."""
        del node, port
        return space.sized(batch)

    def result(
        self,
        read: Callable[[str], Any],
        outputs: tuple[str, ...],
        state: State,
        context: Hashable,
    ) -> tuple[Any, Any]:
        """The result, of the output nodes that are read, and the new state."""
        del context
        values = tuple(map(read, outputs))
        return values[0] if len(values) == 1 else values, state
