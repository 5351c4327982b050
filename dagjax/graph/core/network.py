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

    @property
    def updated_state(self) -> tuple[str, ...]:
        """Paths of the state that each call updates, as batch norm in training mode."""
        ...

    @property
    def user_state(self) -> State:
        """What is not trained, as it was given when the network was traced."""
        ...

    def __call__(self, *xs: PyTree) -> PyTree:
        """The outputs at `xs`."""
        ...

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields."""
        ...
