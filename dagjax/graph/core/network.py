"""What every kind of network is: traced, built, compacted or sparse."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Network(Protocol):
    """A pytree of parameters and state that is called with its inputs."""

    params: Any
    state: Any

    @property
    def example_inputs(self) -> tuple[Any, ...] | None:
        """Shapes of inputs that it takes; None if it does not know them."""
        ...

    def __call__(self, *xs: Any) -> Any:
        """The outputs at `xs`."""
        ...

    def replace(self, **changes: Any) -> Any:
        """A copy with other fields."""
        ...
