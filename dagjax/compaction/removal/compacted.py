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
from dagjax.compaction.channels.traced_network import TracedNetwork, traced_network_of
from dagjax.compaction.removal.evaluate import CutEvaluation
from dagjax.compaction.removal.folding import Recipe
from dagjax.compaction.removal.liveness import Round, replayed
from dagjax.graph.core.dag import count_params
from dagjax.jaxprs.versions import current_mesh, shape_of, tracing_for
from dagjax.types import Params, PyTree, State


class Cutting:
    """What was cut out of a network; compared by value.

    Args:
        tree: The structure of the network's leaves.
        shapes: Their shapes before the cut.
        inputs: The shapes of its inputs.
        rounds: How it was found what is dead; the last one says what was kept.
        recipe: How the constants that were folded are computed, a digest.
        prunable: How many leaves are parameters.
        coupled: Whether kernels were cut only with the channels of their values.
        folded_entries: `{parameter: entries kept by the mask that became constants}`.
    """

    def __init__(
        self,
        tree: Any,
        shapes: PyTree,
        inputs: PyTree,
        rounds: tuple[Round, ...],
        recipe: str,
        prunable: int,
        coupled: bool,
        folded_entries: dict[str, int],
    ):
        self.folded_entries = folded_entries
        self.prunable, self.coupled = prunable, coupled
        self.tree, self.shapes, self.inputs = tree, tuple(shapes), inputs
        self.rounds, self.recipe = rounds, recipe
        self._plans: dict[Any, tuple[TracedNetwork, CutEvaluation]] = {}
        self._mesh = current_mesh()
        self.key = (
            tree, tuple(map(str, self.shapes)), str(inputs), recipe, prunable, coupled,
            *((_digest(r.given), _digest(r.keeps), r.unread) for r in rounds),
        )  # fmt: skip
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Cutting) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, object]) -> Cutting:
        return self  # frozen, and jaxprs do not copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Cutting, (
            self.tree, self.shapes, self.inputs, self.rounds, self.recipe,
            self.prunable, self.coupled, self.folded_entries,
        )  # fmt: skip

    def plan(self, inputs: tuple[Any, ...]) -> tuple[TracedNetwork, CutEvaluation]:
        """The program at these shapes of the inputs, and how it is evaluated."""
        key = _form(inputs)
        if key not in self._plans:
            with tracing_for(self._mesh):  # not for the one of this call
                source = traced_network_of(self.tree.unflatten(self.shapes), inputs)
                self._again(source)
        return self._plans[key]

    def _again(self, source: TracedNetwork) -> None:
        """The same cut in the program of other shapes."""
        channels = source.channels_of(self.coupled)
        replay = replayed(channels, self.rounds, self.prunable)
        if replay is None:
            raise CompactionError(
                "the program has other channels at these shapes than where it was cut; "
                "compact the network again with inputs of these shapes"
            )
        facts, removed = replay
        kept = channels.kept(removed)
        recipe = Recipe(channels, facts, kept, len(self.shapes))
        if recipe.digest != self.recipe:
            raise CompactionError(
                "constants of removed units were folded that depend on the shapes of "
                "the inputs; compact the network again with inputs of these shapes"
            )
        self.remember(source, CutEvaluation(channels, kept, facts, recipe.folds))

    def remember(self, source: TracedNetwork, evaluator: CutEvaluation) -> None:
        """Keep the plan for the shapes of a program."""
        self._plans[_form(source.inputs)] = source, evaluator


def _form(inputs: PyTree) -> PyTree:
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
    params: Params
    state: State

    def __call__(self, *xs: PyTree) -> PyTree:
        """The outputs at `xs`, any batch size."""
        shapes = jax.tree.map(shape_of, xs)
        source, evaluator = self.cutting.plan(shapes)
        leaves = self._leaves(source, evaluator)
        args = [*leaves, *map(jnp.asarray, jax.tree.leaves(xs))]
        made = evaluator(*args, added=self.state["folded"])
        return jax.tree.unflatten(source.result, made)

    def _leaves(self, source: TracedNetwork, evaluator: CutEvaluation) -> list[Any]:
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

    @property
    def updated_state(self) -> tuple[str, ...]:
        """Nothing: a network that updates its state is not compacted."""
        return ()

    @property
    def user_state(self) -> Any:
        """That of the network that was cut."""
        leaves = jax.tree.leaves((self.params, self.state["user"]))
        return self.cutting.tree.unflatten(leaves).user_state

    @property
    def folded_entries(self) -> dict[str, int]:
        """`{parameter: entries that the mask kept, but that only move a constant}`."""
        return dict(self.cutting.folded_entries)

    def replace(self, **changes: Any) -> Small:
        """A copy with other fields: `small.replace(params=params)`."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        before = sum(
            int(np.prod(s.shape))
            for s in self.cutting.shapes[: len(jax.tree.leaves(self.params))]
        )
        folded = sum(self.folded_entries.values())
        more = f", {folded:,} kept entries folded into constants" if folded else ""
        return f"Small({count_params(self.params):,} of {before:,} parameters{more})"


def _digest(arrays: PyTree) -> str:
    found = hashlib.blake2b(digest_size=16)
    for leaf in arrays:
        for axis in leaf:
            data = b"-" if axis is None else np.ascontiguousarray(axis).tobytes()
            found.update(b"|" + data)
        found.update(b"/")
    return found.hexdigest()
