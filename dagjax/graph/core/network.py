"""What every kind of network is: traced, built, compacted or sparse."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

from dagjax.types import Params, PyTree, State


@runtime_checkable
class Network(Protocol):
    """A pytree of parameters and state that is called with its inputs."""

    @property
    def params(self) -> Params:
        """Arrays that are trained."""
        ...

    @property
    def state(self) -> State:
        """Arrays that are not."""
        ...

    @property
    def example_inputs(self) -> tuple[PyTree, ...] | None:
        """Shapes of inputs that it takes; None if it does not know them."""
        ...

    def __call__(self, *xs: PyTree) -> PyTree:
        """The outputs at `xs`."""
        ...

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields."""
        ...
