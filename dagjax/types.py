"""Names for the types that all rooms share.

A tree is anything that `jax.tree` takes apart, so the type checker knows nothing of it;
its name says what the leaves are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array
Scalar: TypeAlias = float | np.ndarray | jax.Array  # a number, perhaps traced
Key: TypeAlias = jax.Array  # a typed PRNG key

PyTree: TypeAlias = Any  # of arrays, shapes or values
Params: TypeAlias = PyTree  # arrays that are trained, in the user's own tree
State: TypeAlias = PyTree  # arrays that are not trained
Mask: TypeAlias = PyTree  # bools shaped like what they mask; None is not prunable

Layer: TypeAlias = Any  # a Flax module, a pair (init, apply), a function, or a graph
Conv: TypeAlias = Callable[..., jax.Array]  # `lax.conv_general_dilated`, or as it
