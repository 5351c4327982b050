"""For the tests of experiments: compile quickly where only the values matter."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """Tiny programs compile far longer than they run; not for bitwise claims."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
