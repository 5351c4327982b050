"""Pruning level by level: what is kept is refitted to what the dense network did.

The program of the network is walked once, dense and pruned values side by side; where
products with parameters meet in a sum (a layer before its activation, the end of a
residual branch with its stream) their kept weights are solved for by least squares on
the pruned features that are there already. The product that reads is refitted, not the
one that writes: its output is linear in its weights whatever activation came before, so
no layers need be known, and nothing before the sum is evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.traced_network import TracedNetwork, traced_network_of
from dagjax.compaction.channels.units import Units, units
from dagjax.compaction.pruning.budget import prune_units
from dagjax.compaction.pruning.least_squares import Walk
from dagjax.compaction.pruning.sums import CONTRACTIONS, inlined
from dagjax.compaction.removal.compact import mask_leaves
from dagjax.graph.core.network import Network
from dagjax.graph.tracing.naming import path_of
from dagjax.jaxprs.versions import Eqn, shape_of
from dagjax.text import aligned
from dagjax.types import Mask, PyTree


class Fit(NamedTuple):
    """One sum of the network.

    Args:
        name: The parameters that were refitted.
        level: The number of products on the way to it.
        before: `|dense - pruned| / |dense|` on the data, the kept channels alone.
        after: The same after the refit.
    """

    name: str
    level: int
    before: float
    after: float


class Report(NamedTuple):
    """What became of every sum, in the order of evaluation.

    Args:
        fits: One for each sum.
        evaluations: How many steps of the program were evaluated.
    """

    fits: tuple[Fit, ...]
    evaluations: int

    def __str__(self) -> str:
        head = ("node", "level", "error before", "after")
        rows = [
            (f.name, str(f.level), f"{f.before:.4f}", f"{f.after:.4f}")
            for f in self.fits
        ]
        return "\n".join(aligned([head, *rows]))


class LiftPruned(NamedTuple):
    """A pruned network of the old shapes.

    Args:
        net: The network with refitted parameters, zero where the mask is False.
        mask: Bools like `net.params`; `dj.compact(net, mask)` cuts it out.
        report: The error of every node before and after.
    """

    net: Network
    mask: Mask
    report: Report


def lift_prune(
    net: Network,
    data: PyTree,
    budget: float | Mapping[str, float],
    score: Any = "l2",
    refit: bool = True,
    *,
    ridge: float = 3e-3,
    scope: str = "global",
    round_to: int | Mapping[str, int] = 1,
    keep_at_least: int = 1,
    only: Iterable[str] | Callable[[str], bool] | None = None,
) -> LiftPruned:
    """Prune units and refit, level by level, what is kept.

        min_W |h_v^dense(x) - sum_kept f_e^W(h_u^pruned(x))|^2 + ridge |W - W_0|^2

    for every node v, in the order of levels. (Ours: LIFT-PRUNE; the least squares of
    He et al. 2017 and ThiNet, Luo et al. 2017, node by node on any graph.)

    Args:
        net: A DAG, built or traced, or a compacted network.
        data: `[B, ...]` or a tuple of inputs, a calibration batch of some hundred to
            some thousand examples.
        budget: The share of operations to keep, or `{"flops" | "params" | "density":
            share}`.
        score: As for `dj.prune_units`, or "energy" (of a unit on the data).
        refit: Whether to refit; without, errors are reported only.
        ridge: Relative to the mean square of the features.
        scope: As for `dj.prune_units`.
        round_to: Likewise.
        keep_at_least: Likewise.
        only: Likewise.

    Returns:
        LiftPruned: the network, its mask and a report.

    Raises:
        CompactionError: If the budget cannot be met.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> found = lift_prune(dag, x, {"density": 0.5})
        >>> fit = found.report.fits[-1]  # four units do what eight did
        >>> fit.name, fit.before > 0.1, fit.after < fit.before / 10
        ('Dense_1', True, True)
    """
    share = dict(budget) if isinstance(budget, Mapping) else {"flops": budget}
    if unknown := {*share} - {"flops", "params", "density"}:
        raise CompactionError(f"no budget {min(unknown)!r}: flops, params or density")
    scores = (
        energy(net, data) if isinstance(score, str) and score == "energy" else score
    )
    mask = prune_units(
        net, scores, density=share.get("density"), flops=share.get("flops"),
        params=share.get("params"), scope=scope, round_to=round_to,
        keep_at_least=keep_at_least, only=only,
    )  # fmt: skip
    return refit_kept(net, mask, data, ridge=ridge if refit else None)


def refit_kept(
    net: Network, mask: Mask, data: PyTree, *, ridge: float | None = 3e-3
) -> LiftPruned:
    """Refit what any mask of the parameters keeps to the dense network, on data.

    A parameter is refitted if a product or a convolution, and nothing else, reads it; a
    vector that is added to the result (a bias, the running mean of a batch norm) takes
    up the intercept. The error of no node grows. Where there are more than 131,072 rows
    (pixels of all images) the fit is to every n-th of them.

    Args:
        net: A DAG, or a compacted network.
        mask: Bools like `net.params`, of units or of single weights; None keeps.
        data: `[B, ...]` or a tuple of inputs.
        ridge: Relative to the mean square of the features; None: refit nothing.

    Raises:
        CompactionError: If the mask does not fit, or the ridge is not positive.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> mask = jax.tree.map(lambda w: abs(w) >= 0.3 * abs(w).max(), dag.params)
        >>> found = refit_kept(dag, mask, x)  # single weights
        >>> all(fit.after <= fit.before for fit in found.report.fits)
        True
        >>> kernel = found.net.params["Dense_1"]["kernel"]
        >>> bool(jnp.all(kernel[~mask["Dense_1"]["kernel"]] == 0))
        True
    """
    if ridge is not None and not ridge > 0:
        raise CompactionError(f"ridge is a positive number, got {ridge}")
    source, xs = _opened(net, data)
    flat = mask_leaves(net, mask)
    leaves, tree = jax.tree.flatten((net.params, net.state))
    walk = Walk(source, leaves, flat, xs)
    fits = [walk.at(place, ridge) for place in range(len(walk.steps))]
    params, state = tree.unflatten(walk.leaves)
    named = jax.tree_util.tree_leaves_with_path(net.params)
    names = [path_of(path).removesuffix("/kernel") for path, _ in named]
    report = tuple(
        Fit("+".join(names[i] for i in fit[0]), *fit[1:]) for fit in fits if fit
    )
    full = [
        jnp.ones(np.shape(x), bool) if m is None else jnp.asarray(m)
        for m, x in zip(flat, leaves, strict=False)
    ]
    return LiftPruned(
        net.replace(params=params, state=state),
        jax.tree.structure(net.params).unflatten(full),
        Report(report, walk.evaluations),
    )


def energy(net: Network, data: Array) -> dict[str, Array]:
    """`{group: [units]}`: what a unit adds to those that read it.

        s_k = sqrt(sum over readers of E[x_k^2] |W_k|^2)

    over its mean in the group; for `dj.prune_units`.

    Args:
        net: A DAG, or a compacted network.
        data: `[B, ...]` or a tuple of inputs.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> energy(dag, x)["Dense"].shape
        (8,)
    """
    found = units(net)
    source, xs = _opened(net, data)
    total = np.zeros(found.source.channels.classes.count)
    ours = [*inlined(found.source.body, {}, {})]  # the same program at another batch
    leaves = jax.tree.leaves((net.params, net.state))
    walk = Walk(source, leaves, [None] * len(leaves), xs)
    for place, eqn in enumerate(walk.steps):
        if eqn.primitive.name in CONTRACTIONS:
            for side in walk.sides(eqn):
                _add_energy(total, found, ours[place], side, walk.operands(place))
        walk.at(place, None)
    scores = {name: np.sqrt(s) for name, s in found.of_units(total).items()}
    return {name: s / (s.mean() or 1) for name, s in scores.items()}


def _add_energy(
    total: Array, found: Units, eqn: Eqn, side: int, values: Sequence[Array]
) -> None:
    """Add the energies of what one product reads to those of their classes."""
    square = lambda x: np.square(np.asarray(x, np.float64))
    across = lambda x, axis: tuple(d for d in range(x.ndim) if d != axis)
    x, kernel = square(values[1 - side]), square(values[side])
    for axis, own in _summed(eqn, side):
        if x.shape[axis] == kernel.shape[own]:
            of = found.source.channels.classes_at(eqn.invars[1 - side])[axis]
            weight = kernel.sum(across(kernel, own))
            np.add.at(total, of, x.mean(across(x, axis)) * weight)
    total[found.source.channels.classes.pinned] = 0


def _summed(eqn: Eqn, side: int) -> list[tuple[int, int]]:
    """Pairs of contracted axes: of the features and of the kernel."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        contracted = numbers[0]
        return [*zip(contracted[1 - side], contracted[side], strict=True)]
    return [(numbers.lhs_spec[1], numbers.rhs_spec[1])]


def _opened(net: Network, data: PyTree) -> tuple[TracedNetwork, list[PyTree]]:
    """The program at the shapes of the data, and the data."""
    inputs = data if isinstance(data, tuple) else (data,)
    if not all(map(_is_sound, jax.tree.leaves(inputs))) or not jax.tree.leaves(inputs):
        raise CompactionError(
            "data are the inputs of the network, [B, ...] or a tuple of them, finite "
            "and not empty"
        )
    inputs = jax.tree.map(jnp.asarray, inputs)
    return traced_network_of(net, jax.tree.map(shape_of, inputs)), jax.tree.leaves(
        inputs
    )


def _is_sound(x: Array) -> bool:
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key) if hasattr(x, "dtype") else False
    return key or bool(np.size(x) and np.isfinite(np.asarray(x, np.float64)).all())
