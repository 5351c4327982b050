"""Every selection x shared laws, against a numpy oracle that sorts.

A law is a function of a row of the table and a selection, and asserts. A mutant is a
selection with one flaw, which the law must catch; mutants sort, selections may not.
To enter a new selection, add one row: its function and the groups it chooses in.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dagjax.sparsity import masks, selection
from dagjax.sparsity.scores import magnitude

# The tree of all cases; units have 1, 4 or 8 entries, so that means are exact.
SHAPES = {
    ("conv", "kernel"): (2, 1, 2, 4),
    ("fc", "bias"): (4,),
    ("fc", "kernel"): (7, 4),
}
ENDS = np.cumsum([np.prod(shape) for shape in SHAPES.values()])
N = int(ENDS[-1])


def cut(flat):
    """`{path: leaf}` of the leaves that lie one after the other in `flat`."""
    parts = zip(SHAPES.items(), np.split(flat, ENDS[:-1]), strict=True)
    return {path: part.reshape(shape) for (path, shape), part in parts}


def tree(flat, leaf=None, subtree=None):
    """The tree of these leaves, with a leaf and a subtree that are not prunable."""
    nested = {"conv": {"bias": leaf}, "fc": {}, "norm": subtree}
    for (parent, name), leaf in cut(flat).items():
        nested[parent][name] = leaf
    return nested


def join(nested):
    """The inverse of `tree`: all leaves in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nested)])


# ----------------------------------------------------------------- rows and the oracle


class Row(NamedTuple):
    """A selection, and the groups of units it chooses among; a unit is positions."""

    name: str
    select: Any
    groups: list[list[np.ndarray]]
    axis: int | None = None  # of whole slices


class Case(NamedTuple):
    scores: np.ndarray  # [N]
    alive: np.ndarray  # [N]
    density: Any  # i / 1024, so that density * N is exact


def by_entry(label):
    """Groups of single entries."""
    groups = {}
    for path, positions in cut(np.arange(N)).items():
        groups.setdefault(label(path), []).extend(positions.reshape(-1, 1))
    return list(groups.values())


def by_slice(axis, label, layer=lambda path, size: (path[0], size)):
    """Groups of slices along an axis, joined with those of the same layer."""
    layers = {}
    for path, positions in cut(np.arange(N)).items():
        slices = np.moveaxis(positions, axis, 0).reshape(positions.shape[axis], -1)
        layers.setdefault(layer(path, len(slices)), []).append(slices)
    groups = {}
    for name, slices in layers.items():
        groups.setdefault(label(name), []).extend(np.concatenate(slices, 1))
    return list(groups.values())


one, own = lambda name: 0, lambda name: name
ENTRYWISE = [
    Row("global_topk", selection.global_topk, by_entry(one)),
    Row("per_leaf_topk", selection.per_leaf_topk, by_entry(own)),
    Row(
        "grouped_topk",
        selection.grouped_topk(lambda path: path[0].key == "fc"),
        by_entry(lambda path: path[0] == "fc"),
    ),
]
ROWS = [
    *ENTRYWISE,
    Row("structured", selection.structured(), by_slice(-1, one), -1),
    Row("structured_0", selection.structured(axis=0), by_slice(0, one), 0),
    Row(
        "structured_per_leaf",
        selection.structured(select=selection.per_leaf_topk),
        by_slice(-1, own),
        -1,
    ),
]
ENTRIES, UNITS = ROWS[0], ROWS[3]


def kept(density, group, alive):
    """How many units of a group the contract keeps."""
    count = sum(alive[unit].any() for unit in group)
    return min(count, round(float(density) * len(group)))


def oracle(groups, case):
    """Sort the units of every group, NaN last and ties by index; keep the first."""
    new = np.zeros(N, bool)
    scores = np.where(case.alive, case.scores, 0).astype(np.float64)
    for group in groups:
        with np.errstate(invalid="ignore"):  # the mean of inf and -inf is NaN
            means = np.array([scores[unit].mean() for unit in group])
        alive = np.array([case.alive[unit].any() for unit in group])
        nan = np.isnan(means)
        order = np.lexsort((np.where(nan, 0, -means), nan, ~alive))  # stable
        for i in order[: kept(case.density, group, case.alive)]:
            new[group[i]] = case.alive[group[i]]
    return new


# ------------------------------------------------------------------------------- cases

QUARTERS = [0.0, *(sign * i / 4 for i in range(1, 9) for sign in (1, -1))]
ODD = [*QUARTERS, -0.0, np.nan, np.inf, -np.inf]
NEAR = [1.0, 1.0, -1.0, np.nan]  # many equal, many NaN
HUGE = [0.0, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan]
TINY = [0.0, -0.0, 1.4e-45, -1.4e-45, 1e-40, -1e-40, 1.1754944e-38]


def cases(pool=ODD, dtype=np.float32):
    """Few different scores, so that most tie; masks with everything, some, nothing."""
    picks = arrays(np.int8, N, elements=st.integers(0, len(pool) - 1))
    scores = picks.map(lambda i: np.array(pool)[i].astype(dtype))
    alive = st.one_of(st.just(np.ones(N, bool)), arrays(bool, N))
    density = st.integers(1, 1024).map(lambda i: np.float32(i / 1024))
    return st.builds(Case, scores, alive, density)


@functools.cache
def compiled(select):
    return jax.jit(select)


@functools.cache
def mapped(select):
    return jax.jit(jax.vmap(select))


def inputs(scores, alive, density):
    """Trees; that of the scores is deeper where the mask is None, as it may be."""
    ones = np.ones(3, np.float32)
    return (
        tree(scores, ones, {"scale": ones, "rest": (ones, None)}),
        tree(alive),
        density,
    )


def run(select, case, how=compiled):
    """The new mask as a vector."""
    return join(how(select)(*inputs(*case)))


# -------------------------------------------------------------------------------- laws

LAWS = []  # (law, rows)


def law(strategy=None, examples=20, rows=ROWS):
    """Enter `check(row, select, case)`, to be tried on cases, in the table of laws."""

    def enter(check):
        run_all = check if strategy is None else on_cases(check, strategy, examples)
        LAWS.append((run_all, rows))
        return run_all

    return enter


def on_cases(check, strategy, examples):
    options = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # a case is small, do not shrink it
        report_multiple_bugs=False,
    )

    @functools.wraps(check)
    def run_all(row, select):
        options(given(strategy)(lambda case: check(row, select, case)))()

    return run_all


@law(cases(), examples=5)
def none_stays_none(row, select, case):
    new = compiled(select)(*inputs(*case))
    assert jax.tree.structure(new) == jax.tree.structure(tree(case.alive))
    assert all(x.dtype == bool for x in jax.tree.leaves(new))
    assert [x.shape for x in jax.tree.leaves(new)] == list(SHAPES.values())


@law(cases())
def new_is_a_subset_of_old(row, select, case):
    assert not (run(select, case) & ~case.alive).any()


@law(cases())
def the_count_is_exact(row, select, case):
    new = run(select, case)
    for group in row.groups:
        count = sum(new[unit].any() for unit in group)
        assert count == kept(case.density, group, case.alive)


@law(cases(), examples=30)
def the_highest_stay_and_ties_fall_by_index(row, select, case):
    np.testing.assert_array_equal(run(select, case), oracle(row.groups, case))


@law(cases(NEAR))
def density_one_is_the_identity(row, select, case):
    same = run(select, case._replace(density=np.float32(1)))
    np.testing.assert_array_equal(same, case.alive)


@law(rows=[ENTRIES, UNITS])
def jit_is_eager_and_density_may_be_a_number(row, select):
    rng = np.random.default_rng(0)
    scores = {"fc": {"kernel": rng.normal(size=(5, 8)).astype(np.float32)}}
    mask = jax.tree.map(lambda s: s < 1, scores)
    number, traced = 0.44, np.float32(0.44)  # 17.6 entries, or 3.52 units
    eager = join(select(scores, mask, number))
    np.testing.assert_array_equal(join(select(scores, mask, traced)), eager)
    np.testing.assert_array_equal(join(compiled(select)(scores, mask, traced)), eager)


@law(cases(), examples=10)
def vmap_is_a_loop(row, select, case):
    some = [np.roll(case.scores, i) for i in range(3)]
    alive = [np.roll(case.alive, 2 * i) for i in range(3)]
    density = np.float32([case.density, 0.25, 1])
    each = list(map(Case, some, alive, density))
    batch = jax.tree.map(lambda *x: np.stack(x), *(inputs(*case) for case in each))
    new = mapped(select)(*batch)
    for i, case in enumerate(each):
        got = join(jax.tree.map(lambda x, i=i: x[i], new))
        np.testing.assert_array_equal(got, run(select, case))


@law(cases(NEAR))
def nan_goes_first(row, select, case):
    new = run(select, case)
    scores = np.where(case.alive, case.scores, 0)
    for group in row.groups:
        group = [unit for unit in group if case.alive[unit].any()]
        nan = np.array([np.isnan(scores[unit].sum()) for unit in group], bool)
        stay = np.array([new[unit].any() for unit in group], bool)
        assert not stay[nan].any() or stay[~nan].all()


@law(cases(QUARTERS))
def minus_zero_ties_with_zero(row, select, case):
    scores = np.trunc(case.scores)
    signs = np.resize(np.float32([0.0, -0.0]), N)
    plus = case._replace(scores=np.where(scores == 0, np.float32(0), scores))
    both = case._replace(scores=np.where(scores == 0, signs, scores))
    np.testing.assert_array_equal(run(select, plus), run(select, both))


@law(cases(HUGE), rows=ENTRYWISE)
def infinity_is_beyond_every_number(row, select, case):
    np.testing.assert_array_equal(run(select, case), oracle(row.groups, case))


@law(cases(TINY), rows=ENTRYWISE)
def denormals_are_not_zero(row, select, case):
    np.testing.assert_array_equal(run(select, case), oracle(row.groups, case))


@law(cases([*NEAR, 1 + 2**-10], jnp.float16), rows=[ENTRIES])
def float16_is_not_rounded(row, select, case):
    np.testing.assert_array_equal(run(select, case), oracle(row.groups, case))


@law(cases([*NEAR, 1 + 2**-7], jnp.bfloat16), rows=[ENTRIES])
def bfloat16_is_not_rounded(row, select, case):
    np.testing.assert_array_equal(run(select, case), oracle(row.groups, case))


@law(cases([*NEAR, 1 + 2**-40], np.float64), rows=[ENTRIES, UNITS])
def float64_is_not_rounded(row, select, case):
    with jax.enable_x64(True):
        new = run(select, case)
    np.testing.assert_array_equal(new, oracle(row.groups, case))


@law(cases())
def equal_scores_leave_the_first(row, select, case):
    alive = case.alive.copy()
    for unit in (unit for group in row.groups for unit in group):
        alive[unit] = alive[unit[0]]  # whole units: equal entries, equal means
    scores = np.full(N, case.scores[0])
    new = run(select, Case(scores, alive, case.density))
    for group in row.groups:
        living = [unit for unit in group if alive[unit].all()]
        count = kept(case.density, group, alive)
        assert [new[unit].all() for unit in living[:count]] == [True] * count
        assert not any(new[unit].any() for unit in living[count:])


@law(cases(), examples=5)
def the_dead_stay_dead(row, select, case):
    assert not run(select, case._replace(alive=np.zeros(N, bool))).any()


@law(cases(QUARTERS))
def dead_scores_do_not_matter(row, select, case):
    for score in np.float32([np.nan, np.inf]):
        scores = np.where(case.alive, case.scores, score)
        other = run(select, case._replace(scores=scores))
        np.testing.assert_array_equal(run(select, case), other)


@law(cases([0.0, 1.0, np.nan]))
def masks_are_nested_in_density(row, select, case):
    new = run(select, case)
    for share in np.float32([0.25, 0.5, 0.75]):
        less = run(select, case._replace(density=share * case.density))
        assert not (less & ~new).any()


@law(rows=[ENTRIES, UNITS, ROWS[4]])
def twenty_of_hundred_are_twenty(row, select):
    shape = (100, 1) if row.axis == 0 else (1, 100)
    mask = {"fc": {"kernel": np.ones(shape, bool)}}
    for scores in np.random.default_rng(0).normal(size=100), np.ones(100):
        scores = {"fc": {"kernel": scores.reshape(shape).astype(np.float32)}}
        new = compiled(select)(scores, mask, np.float32(0.8))
        assert 100 - join(new).sum() == 20


BAD = [0, 0.0, -0.5, 1.5, 20, float("nan"), float("inf")]
BAD += [np.float64(1.5), np.float32(0), np.float32(1.5), np.int32(20)]


@law()
def shares_lie_in_0_1(row, select):
    for density in BAD:
        assert refuses(select, density), f"density {density!r} is taken"


def refuses(select, density):
    args = tree(np.ones(N, np.float32)), tree(np.ones(N, bool))
    try:
        jax.eval_shape(lambda scores, mask: select(scores, mask, density), *args)
    except ValueError as error:
        return "(0, 1]" in str(error)
    return False


@law()
def values_do_not_retrace(row, select, jit=jax.jit):
    traces = []

    def counted(*args):
        traces.append(1)
        return select(*args)

    fast = jit(counted)
    rng = np.random.default_rng(0)
    for density in (0.25, 0.5, 0.75):
        scores, alive = rng.normal(size=N).astype(np.float32), rng.random(N) < 0.8
        fast.eval_shape(tree(scores), tree(alive), density)
    assert len(traces) == 1


def primitives(jaxpr):
    """The names of all operations of a program, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
            if isinstance(inner, jex.Jaxpr):
                yield from primitives(inner)


@law()
def nothing_is_sorted(row, select):
    args = tree(np.ones(N, np.float32)), tree(np.ones(N, bool)), np.float32(0.5)
    names = set(primitives(jax.make_jaxpr(select)(*args).jaxpr))
    assert "while" in names or "sort" in names, "the walk has not reached the search"
    assert not {"sort", "top_k", "approx_top_k"} & names


# ----------------------------------------------------- mutants: one flaw each, all sort


@functools.cache
def flatwise(choose, hole=None):
    """The selection of `choose(scores, alive, density) -> keep` on one vector."""

    def select(scores, mask, density):
        values = masks.tree_map(lambda _, s: s, mask, scores)
        vector = lambda t: jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)])
        keep = choose(vector(values), vector(mask), density)
        leaves, structure = jax.tree.flatten(mask)
        parts = jnp.split(keep, np.cumsum([m.size for m in leaves])[:-1])
        shaped = [part.reshape(m.shape) for part, m in zip(parts, leaves, strict=True)]
        new = jax.tree.unflatten(structure, shaped)
        return masks.tree_map(lambda m: m, new, hole=hole)

    return select


def places(s, a, tie=None, best=False):
    """Each entry's place in the sorted order: NaN and then the dead come last."""
    tie = jnp.arange(s.size) if tie is None else tie
    nan = jnp.isnan(s)
    order = jnp.lexsort((tie, jnp.where(nan, jnp.zeros_like(s), -s), nan ^ best, ~a))
    return jnp.argsort(order)


def wanted(s, d):
    return jnp.round(d * s.size)


def exact(s, a, d):
    return a & (places(s, a) < wanted(s, d))


def threshold(s, d):
    """The score at the place where the pruned ones end."""
    return jnp.sort(s)[jnp.clip(s.size - wanted(s, d).astype(int), 0, s.size - 1)]


def strict_threshold(s, a, d):
    return a & (s > threshold(s, d))


def loose_threshold(s, a, d):
    return a & (s >= threshold(s, d))


def float_quantile(s, a, d):
    return a & (s >= jnp.quantile(s, 1 - jnp.float32(d)))


def later_stay(s, a, d):
    return a & (places(s, a, -jnp.arange(s.size)) < wanted(s, d))


def ignores_the_mask(s, a, d):
    return exact(s, jnp.ones_like(a), d)


def ranks_the_dead(s, a, d):
    return a & exact(s, jnp.ones_like(a), d)


def share_of_the_alive(s, a, d):
    return a & (places(s, a) < jnp.round(d * jnp.sum(a)))


def rounds_down(s, a, d):
    return a & (places(s, a) < jnp.floor(d * s.size))


def rounds_numbers_down(s, a, d):
    return (rounds_down if isinstance(d, float) else exact)(s, a, d)


def drops_nan(s, a, d):
    return exact(s, a, d) & ~jnp.isnan(s)


def keeps_nan(s, a, d):
    return a & (places(s, a, best=True) < wanted(s, d))


def minus_zero_below_zero(s, a, d):
    tie = jnp.arange(s.size) + s.size * jnp.signbit(s)
    return a & (places(s, a, tie) < wanted(s, d))


def clips(s, a, d):
    return exact(jnp.clip(s, -3.4028235e38, 3.4028235e38), a, d)


def flushes(s, a, d):
    return exact(jnp.where(jnp.abs(s) < 1.1e-38, jnp.zeros_like(s), s), a, d)


def rounds_scores(s, a, d):
    return exact(jnp.round(s * 4) / 4, a, d)


def keeps_one(s, a, d):
    return exact(s, a, d).at[jnp.argmin(places(s, a))].set(True)


def drifting_ties(s, a, d):
    tie = (jnp.arange(s.size) - wanted(s, d).astype(int)) % s.size
    return a & (places(s, a, tie) < wanted(s, d))


def branches_on_density(s, a, d):
    return a if d == 1 else exact(s, a, d)


@jax.custom_batching.custom_vmap
def one_density_for_all(s, a, d):
    return exact(s, a, d)


@one_density_for_all.def_vmap
def _(size, batched, s, a, d):
    return jax.vmap(exact, in_axes=(0, 0, None))(s, a, d[0]), True


def slicewise(groups, reduce=jnp.mean, revive=False):
    """Whole units of one group, sorted by their scores."""
    member = np.zeros((len(groups[0]), N), bool)
    for i, unit in enumerate(groups[0]):
        member[i, unit] = True

    def choose(s, a, d):
        s = jnp.where(member & a[None], s[None], jnp.zeros_like(s)[None])
        keep = exact(reduce(s, axis=1, where=member), (member & a[None]).any(1), d)
        new = (member & keep[:, None]).any(0)
        return new if revive else new & a

    return choose


def named(name, choose):
    choose.__name__ = name
    return choose


whole_units = named("whole_units", slicewise(UNITS.groups))
sums_units = named("sums_units", slicewise(UNITS.groups, reduce=jnp.sum))
revives_entries = named("revives_entries", slicewise(UNITS.groups, revive=True))
each_leaf = by_slice(-1, one, layer=lambda path, size: path)
cuts_leaves_apart = named("cuts_leaves_apart", slicewise(each_leaf))

MUTANTS = [  # (law, row, choices that break it)
    (new_is_a_subset_of_old, ENTRIES, [ignores_the_mask]),
    (new_is_a_subset_of_old, UNITS, [revives_entries]),
    (
        the_count_is_exact,
        ENTRIES,
        [
            strict_threshold,
            loose_threshold,
            float_quantile,
            share_of_the_alive,
            rounds_down,
        ],
    ),
    (the_highest_stay_and_ties_fall_by_index, ENTRIES, [later_stay, strict_threshold]),
    (the_highest_stay_and_ties_fall_by_index, UNITS, [sums_units, cuts_leaves_apart]),
    (density_one_is_the_identity, ENTRIES, [drops_nan, strict_threshold]),
    (density_one_is_the_identity, UNITS, [revives_entries]),
    (
        jit_is_eager_and_density_may_be_a_number,
        ENTRIES,
        [rounds_numbers_down, branches_on_density],
    ),
    (vmap_is_a_loop, ENTRIES, [one_density_for_all]),
    (nan_goes_first, ENTRIES, [keeps_nan]),
    (minus_zero_ties_with_zero, ENTRIES, [minus_zero_below_zero]),
    (infinity_is_beyond_every_number, ENTRIES, [clips]),
    (denormals_are_not_zero, ENTRIES, [flushes]),
    (float16_is_not_rounded, ENTRIES, [rounds_scores]),
    (bfloat16_is_not_rounded, ENTRIES, [rounds_scores]),
    (float64_is_not_rounded, ENTRIES, [rounds_scores]),
    (equal_scores_leave_the_first, ENTRIES, [loose_threshold, later_stay]),
    (the_dead_stay_dead, ENTRIES, [keeps_one]),
    (dead_scores_do_not_matter, ENTRIES, [ranks_the_dead]),
    (masks_are_nested_in_density, ENTRIES, [drifting_ties]),
    (twenty_of_hundred_are_twenty, ENTRIES, [strict_threshold]),
    (shares_lie_in_0_1, ENTRIES, [exact]),
    (nothing_is_sorted, ENTRIES, [exact]),
]


def label(x):
    return getattr(x, "name", None) or getattr(x, "__name__", None)


# ------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("check", "row"), [(c, row) for c, rows in LAWS for row in rows], ids=label
)
def test_law(check, row):
    check(row, row.select)


@pytest.mark.parametrize(
    ("check", "row", "choose"),
    [(check, row, choose) for check, row, flaws in MUTANTS for choose in flaws],
    ids=label,
)
def test_law_catches(check, row, choose):
    with pytest.raises((AssertionError, jax.errors.TracerBoolConversionError)):
        check(row, flatwise(choose))


def test_law_catches_none_that_is_filled():
    with pytest.raises(AssertionError):
        none_stays_none(ENTRIES, flatwise(exact, hole=lambda: np.zeros(3, bool)))


def test_law_catches_static_density():
    static = functools.partial(jax.jit, static_argnums=2)
    with pytest.raises(AssertionError):
        values_do_not_retrace(ENTRIES, selection.global_topk, jit=static)


def test_every_law_has_a_mutant():
    alone = {none_stays_none, values_do_not_retrace}
    assert {check for check, _ in LAWS} == {check for check, *_ in MUTANTS} | alone


SORTING_FAILS = [denormals_are_not_zero, shares_lie_in_0_1, nothing_is_sorted]
NO_UNITS = [jit_is_eager_and_density_may_be_a_number, twenty_of_hundred_are_twenty]
SORTED = [
    (row, choose, check)
    for row, choose in [(ENTRIES, exact), (UNITS, whole_units)]
    for check, rows in LAWS
    if row in rows
    and check not in SORTING_FAILS
    and (row is ENTRIES or check not in [vmap_is_a_loop, *NO_UNITS])
]


@pytest.mark.parametrize(("row", "choose", "check"), SORTED, ids=label)
def test_law_passes_what_has_no_flaw(row, choose, check):
    check(row, flatwise(choose))


# -------------------------------------------------------------------- what is left over


def keep(select, scores, density=0.5):
    """The mask of a fresh tree of scores, all prunable, as a vector."""
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), scores)
    return join(compiled(select)(scores, mask, np.float32(density))).tolist()


def test_numbers_and_arrays_round_alike_next_to_a_half():
    scores = np.arange(100, dtype=np.float32)
    number = jax.jit(lambda s, m: selection.global_topk(s, m, 0.575))
    count = number(scores, np.ones(100, bool)).sum()
    assert count == sum(keep(selection.global_topk, scores, 0.575))


def test_formats_may_be_mixed():
    scores = {"a": np.float32([0, 10]), "b": np.float64([5, 20])}
    with jax.enable_x64(True):
        assert keep(selection.global_topk, scores) == [False, True, False, True]


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(ENTRIES, np.float16), (ENTRIES, np.int32), (UNITS, jnp.bfloat16)],
    ids=label,
)
def test_formats_pass_strict_promotion(row, dtype):
    scores = {"kernel": np.array([[1, 2, 3, 4]]).astype(dtype)}
    with jax.numpy_dtype_promotion("strict"):
        assert keep(row.select, scores) == [False, False, True, True]


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.float16, [100] * 2, [200] * 2), (jnp.bfloat16, [1, 1], [1.5, 1])],
)
def test_means_of_units_neither_overflow_nor_round(dtype, low, high):
    kernel = np.array([low, high]).T.astype(dtype).repeat([1, 1023], axis=0)
    assert keep(UNITS.select, {"kernel": kernel}) == [False, True] * 1024


def test_units_tie_in_the_order_of_the_tree():
    layers = [{"kernel": np.ones((2, 1), np.float32)} for _ in range(12)]
    assert keep(UNITS.select, layers) == [True] * 12 + [False] * 12


def test_gates_are_leaves_without_axes():
    scores = {"branch": np.float32(2), "skip": np.float32(1), "stem": np.float32(3)}
    assert keep(selection.global_topk, scores, 2 / 3) == [True, False, True]


def test_nothing_is_prunable():
    assert selection.global_topk({"a": np.ones(2)}, {"a": None}, 0.5) == {"a": None}


def test_a_leaf_may_be_empty():
    scores = {"a": np.ones((0, 3), np.float32), "b": np.ones(2, np.float32)}
    for select in selection.global_topk, selection.per_leaf_topk:
        assert keep(select, scores) == [True, False]


def test_many_scores_against_the_sort():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20_000).astype(np.float32).round(2)
    alive = rng.random(20_000) < 0.7
    new = compiled(selection.global_topk)(scores, alive, np.float32(0.125))
    order = np.lexsort((-scores, ~alive))[:2500]
    assert sorted(order) == np.flatnonzero(new).tolist()


@pytest.mark.parametrize("density", [0.295, 0.545, 0.575, 0.5, 0.07])
def test_the_count_of_a_density_is_that_of_the_number(density):
    kept = selection.global_topk(np.arange(100.0), np.ones(100, bool), density)
    assert int(kept.sum()) == round(density * 100)


def test_integers_are_compared_exactly():
    pair = np.array([2**24, 2**24 + 1], np.int32)
    assert keep(selection.global_topk, pair) == [False, True]
    wide = np.array([2**60, 2**60 + 1], np.int64)  # as numpy has it, without x64
    kept = selection.global_topk(wide, np.ones(2, bool), 0.5)
    assert kept.tolist() == [False, True]


def test_the_magnitude_of_the_least_integer():
    w = np.array([-128, 127, 1, 2], np.int8)
    found = magnitude(None, w, np.ones(4, bool), None)
    assert keep(selection.global_topk, np.asarray(found)) == [True, True, False, False]
