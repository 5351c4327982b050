"""A network that was cut: a pytree that evaluates like the DAG it came from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.traced_network import Source, source_of
from dagjax.compaction.removal.consumption import needed, removable
from dagjax.compaction.removal.evaluate import CutEvaluation
from dagjax.compaction.removal.folding import folds
from dagjax.compaction.removal.liveness import facts_of
from dagjax.graph.core.dag import count_params
from dagjax.jaxprs.versions import current_mesh, shape_of, tracing_for

Keeps = tuple[tuple[Array | None, ...], ...]  # leaf by leaf, axis by axis


class Cutting:
    """What was cut out of a network; compared by value.

    Args:
        tree: The structure of the network's leaves.
        shapes: Their shapes before the cut.
        inputs: The shapes of its inputs.
        keeps: Kept indices of each leaf's axes.
        given: For each leaf and axis what its slices are (`liveness.Given`).
        count: How many contractions had a constant folded into them.
        prunable: How many leaves are parameters.
        coupled: Whether kernels were cut only with the channels of their values.
    """

    def __init__(
        self,
        tree: Any,
        shapes: Any,
        inputs: Any,
        keeps: Keeps,
        given: Any,
        count: int,
        prunable: int,
        coupled: bool,
    ):
        self.prunable, self.coupled = prunable, coupled
        self.tree, self.shapes, self.inputs = tree, tuple(shapes), inputs
        self.keeps, self.given, self.count = keeps, given, count
        self._plans: dict[Any, tuple[Source, CutEvaluation]] = {}
        self._mesh = current_mesh()
        self.key = (
            tree, tuple(map(str, self.shapes)), str(inputs), count, prunable, coupled,
            _digest(keeps), _digest(given),
        )  # fmt: skip
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Cutting) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: Any) -> Cutting:
        return self  # frozen, and jaxprs do not copy

    def plan(self, inputs: tuple[Any, ...]) -> tuple[Source, CutEvaluation]:
        """The program at these shapes of the inputs, and how it is evaluated."""
        key = _form(inputs)
        if key not in self._plans:
            with tracing_for(self._mesh):  # not for the one of this call
                source = source_of(self.tree.unflatten(self.shapes), inputs)
                self._again(source)
        return self._plans[key]

    def _again(self, source: Source) -> None:
        """The same cut in the program of other shapes."""
        channels, ends = source.channels_of(self.coupled), source.body.invars
        facts = facts_of(channels, self.given)
        equations, _ = needed(channels, facts)
        removed, _ = removable(channels, facts, equations, self.prunable)
        kept = channels.kept(removed)
        if not all(map(_same, map(kept, ends), self.keeps)):
            raise CompactionError(
                "the program has other channels at these shapes than where it was cut; "
                "compact the network again with inputs of these shapes"
            )
        folded = folds(channels, facts, kept)
        if len(folded) != self.count:
            raise CompactionError(
                f"{len(folded)} constants are to be folded at these shapes, "
                f"{self.count} where the network was cut; compact it at these shapes"
            )
        self.remember(source, CutEvaluation(channels, kept, facts, folded))

    def remember(self, source: Source, evaluator: CutEvaluation) -> None:
        """Keep the plan for the shapes of a program."""
        self._plans[_form(source.inputs)] = source, evaluator


def _form(inputs: Any) -> Any:
    """Structure, shapes and types of inputs, to be compared."""
    leaves, tree = jax.tree.flatten(inputs)
    return tree, tuple((x.shape, str(x.dtype)) for x in leaves)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "state"],
    meta_fields=["cutting"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Small:
    """A network whose pruned structure is gone; a pytree like a DAG.

    Args:
        cutting: What was cut, static.
        params: The smaller arrays, in the tree of the network's parameters.
        state: `{"user": what is not trained, "folded": constants added on the way}`.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
        >>> mask = dj.prune_units(dag, "l2", density=0.5)
        >>> dj.compact(dag, mask).net
        Small(35 of 67 parameters)
    """

    cutting: Cutting
    params: Any
    state: Any

    def __call__(self, *xs: Any) -> Any:
        """The outputs at `xs`, any batch size."""
        shapes = jax.tree.map(shape_of, xs)
        source, evaluator = self.cutting.plan(shapes)
        leaves = self._leaves(source, evaluator)
        args = [*leaves, *map(jnp.asarray, jax.tree.leaves(xs))]
        made = evaluator(*args, added=self.state["folded"])
        return jax.tree.unflatten(source.result, made)

    def _leaves(self, source: Source, evaluator: CutEvaluation) -> list[Any]:
        """The leaves; one that nothing reads is empty, and stands for zeros here.

        A loop or a sum still takes it, at its size, beside what it has lost.
        """
        leaves = jax.tree.leaves((self.params, self.state["user"]))
        sizes = [evaluator.size(v) for v in source.body.invars[: len(leaves)]]
        for leaf, (x, size) in enumerate(zip(leaves, sizes, strict=True)):
            if np.shape(x) != size and np.size(x):
                raise CompactionError(
                    f"leaf {leaf} of the parameters and the state has shape "
                    f"{list(np.shape(x))}, in this network {list(size)}; index.gather "
                    "brings a tree of the whole network here"
                )
        rows = zip(leaves, sizes, strict=True)
        fits = lambda x, size: np.shape(x) == size
        return [x if fits(x, n) else jnp.zeros(n, x.dtype) for x, n in rows]

    @property
    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes of inputs that it takes."""
        return self.cutting.inputs

    def replace(self, **changes: Any) -> Small:
        """A copy with other fields: `small.replace(params=params)`."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        before = sum(
            int(np.prod(s.shape))
            for s in self.cutting.shapes[: len(jax.tree.leaves(self.params))]
        )
        return f"Small({count_params(self.params):,} of {before:,} parameters)"


def _same(one: Any, two: Any) -> bool:
    """Whether the same indices are kept of all axes."""
    return all(
        a is b or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(one, two, strict=True)
    )


def _digest(arrays: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    for leaf in arrays:
        for axis in leaf:
            data = b"-" if axis is None else np.ascontiguousarray(axis).tobytes()
            found.update(b"|" + data)
        found.update(b"/")
    return found.hexdigest()
