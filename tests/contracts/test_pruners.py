"""Every pruner x shared laws; beside each law stands a mutant that it must catch."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dagjax.sparsity import masks, pruners, scores, selection
from dagjax.sparsity.pruners import Pruner

KEY = jax.random.key(0)
DENSITIES = (0.8, 0.6, 0.35, 0.1)  # of successive rounds


def weights(seed):
    """Layers whose units differ much in size and in score."""
    rng = np.random.default_rng(seed)
    draw = lambda scale, *shape: np.float32(scale * rng.normal(size=shape))
    wide = {"kernel": draw(0.1, 24, 10), "bias": draw(1, 10)}
    return {"narrow": {"kernel": draw(1, 2, 10)}, "wide": wide}


def loss(params, batch):
    wide = batch @ params["wide"]["kernel"] + params["wide"]["bias"][None]
    narrow = batch[:, :2] @ params["narrow"]["kernel"]
    return jnp.mean(jnp.tanh(wide) * jnp.tanh(narrow))


PARAMS = weights(0)
MASK = jax.tree.map(np.asarray, masks.full(PARAMS))
BATCH = np.random.default_rng(9).normal(size=(6, 24)).astype(np.float32)


def everything(mask):
    return [np.concatenate([np.ravel(m) for m in jax.tree.leaves(mask)])]


def each_leaf(mask):
    return [np.ravel(m) for m in jax.tree.leaves(mask)]


def columns(mask):
    return [np.concatenate([m.any(0) for m in jax.tree.leaves(mask)])]


ROWS = {  # a pruner, and the groups of what its density counts
    "one_shot": (pruners.one_shot(scores.magnitude, selection.global_topk), everything),
    "one_shot_taylor": (
        pruners.one_shot(scores.taylor(loss), selection.per_leaf_topk),
        each_leaf,
    ),
    "iterative": (
        pruners.iterative(scores.taylor(loss), selection.global_topk, 2),
        everything,
    ),
    "iterative_random": (
        pruners.iterative(scores.random, selection.global_topk, 1),
        everything,
    ),
    "iterative_structured": (
        pruners.iterative(scores.magnitude, selection.structured(), 2),
        columns,
    ),
}


def fast(pruner):
    """The update compiled once for all laws of a pruner."""
    return COMPILED.setdefault(pruner.update, jax.jit(pruner.update))


COMPILED = {}


def rounds(pruner, params=PARAMS, key=KEY):
    """The masks of successive rounds, as in a lottery: values go in, none is static."""
    mask, state = MASK, pruner.init(params)
    for i, density in enumerate(DENSITIES):
        args = jax.random.fold_in(key, i), state, params, mask, BATCH
        mask, state = fast(pruner)(*args, np.float32(density))
        mask = jax.tree.map(np.asarray, mask)
        yield mask


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


# -------------------------------------------------------------------------------- laws


def parameters_have_their_names(pruner, groups):
    names = ["key", "state", "params", "mask", "batch", "density"]
    assert isinstance(pruner, Pruner)
    assert list(inspect.signature(pruner.update).parameters) == names
    assert list(inspect.signature(pruner.init).parameters) == ["params"]


def counts_are_exact(pruner, groups):
    for mask, density in zip(rounds(pruner), DENSITIES, strict=True):
        for group in groups(mask):
            assert group.sum() == round(density * group.size)


def masks_are_nested(pruner, groups):
    old = MASK
    for new in rounds(pruner):
        assert jax.tree.structure(new) == jax.tree.structure(MASK)
        assert not any(
            (n & ~o).any()
            for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        )
        old = new


def a_higher_density_changes_nothing(pruner, groups):
    *_, mask = rounds(pruner)
    for density in (0.5, 1):
        args = KEY, pruner.init(PARAMS), PARAMS, mask, BATCH, np.float32(density)
        same(fast(pruner)(*args)[0], mask)


def dead_weights_are_not_seen(pruner, groups):
    """Only masked parameters are scored: what the dead hold does not pass."""
    first = next(rounds(pruner))
    fill = lambda m, w: np.where(m, w, np.float32(np.nan))
    filled = masks.tree_map(fill, first, PARAMS, hole=lambda w: w)
    zeros = jax.tree.map(np.asarray, masks.apply(first, PARAMS))
    news = [
        fast(pruner)(KEY, (), params, first, BATCH, np.float32(0.3))[0]
        for params in (filled, zeros, PARAMS)
    ]
    same(news[0], news[1])
    same(news[2], news[1])


def density_may_be_a_number_or_traced(pruner, groups):
    mask = next(rounds(pruner))
    args = KEY, pruner.init(PARAMS), PARAMS, mask, BATCH
    number = jax.jit(lambda *args: pruner.update(*args, 0.3))
    same(fast(pruner)(*args, np.float32(0.3)), number(*args))


def scan_over_rounds_and_vmap_over_seeds_are_loops(pruner, groups):
    def run(key, params):
        def step(carry, each):
            number, density = each
            own = jax.random.fold_in(key, number)
            mask, state = pruner.update(own, carry[1], params, carry[0], BATCH, density)
            return (mask, state), mask

        xs = jnp.arange(len(DENSITIES)), jnp.float32(DENSITIES)
        start = jax.tree.map(jnp.asarray, MASK), pruner.init(params)
        return jax.lax.scan(step, start, xs)[1]

    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    keys, several = jax.random.split(KEY, 3), [weights(seed) for seed in range(3)]
    got = jax.jit(jax.vmap(run))(keys, stack(several))
    loop = [stack(rounds(pruner, w, k)) for w, k in zip(several, keys, strict=True)]
    same(got, stack(loop))


LAWS = [
    parameters_have_their_names,
    counts_are_exact,
    masks_are_nested,
    a_higher_density_changes_nothing,
    dead_weights_are_not_seen,
    density_may_be_a_number_or_traced,
    scan_over_rounds_and_vmap_over_seeds_are_loops,
]

# ----------------------------------------------------------------------------- mutants

GOOD = pruners.one_shot(scores.magnitude, selection.global_topk)
UNITS = selection.structured()


def stateless(update):
    return Pruner(lambda params: (), update)


@stateless
def other_order(state, key, params, mask, batch, density):
    return GOOD.update(key, state, params, mask, batch, density)


@stateless
def share_of_the_alive(key, state, params, mask, batch, density):
    density = density * masks.density(mask)
    return GOOD.update(key, state, params, mask, batch, density)


@stateless
def steps_through_entries(key, state, params, mask, batch, density):
    """Geometric steps from the density of entries, where the selection counts units."""
    start, magnitude = masks.density(mask), scores.magnitude(key, params, mask, batch)
    for goal in start * (density / start) ** (1 / 3), density:
        mask = UNITS(masks.apply(mask, magnitude), mask, goal)
    return mask, state


@stateless
def starts_afresh(key, state, params, mask, batch, density):
    draws = scores.random(key, params, mask, batch)
    return selection.global_topk(
        draws, jax.tree.map(jnp.ones_like, mask), density
    ), state


@stateless
def sees_the_dead(key, state, params, mask, batch, density):
    own = scores.taylor(lambda w, batch: sum(jnp.sum(x**3) for x in jax.tree.leaves(w)))
    shifted = jax.tree.map(lambda w: w - w.mean(), params)
    return selection.global_topk(own(key, shifted, mask, batch), mask, density), state


@stateless
def branches_on_density(key, state, params, mask, batch, density):
    if density == 1:
        return mask, state
    return GOOD.update(key, state, params, mask, batch, density)


@stateless
def one_seed_for_all(key, state, params, mask, batch, density):
    first = lambda w: np.broadcast_to(w[(0,) * (w.ndim - 2)], w.shape)
    call = lambda _, w: jax.pure_callback(
        first, jax.typeof(w), jnp.asarray(w), vmap_method="expand_dims"
    )
    seen = masks.tree_map(call, mask, params, hole=lambda w: w)
    return GOOD.update(key, state, seen, mask, batch, density)


def grows(key, state, params, mask, batch, density):
    mask, _ = GOOD.update(key, state, params, mask, batch, density)
    return mask, (*state, density)


MUTANTS = {
    "other_order": (parameters_have_their_names, other_order, everything),
    "share_of_the_alive": (counts_are_exact, share_of_the_alive, everything),
    "steps_through_entries": (counts_are_exact, steps_through_entries, columns),
    "starts_afresh": (masks_are_nested, starts_afresh, everything),
    "prunes_again": (a_higher_density_changes_nothing, share_of_the_alive, everything),
    "sees_the_dead": (dead_weights_are_not_seen, sees_the_dead, everything),
    "branches_on_density": (
        density_may_be_a_number_or_traced,
        branches_on_density,
        everything,
    ),
    "one_seed_for_all": (
        scan_over_rounds_and_vmap_over_seeds_are_loops,
        one_seed_for_all,
        everything,
    ),
    "grows": (
        scan_over_rounds_and_vmap_over_seeds_are_loops,
        Pruner(lambda params: (), grows),
        everything,
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("check", LAWS, ids=lambda check: check.__name__)
def test_law(check, name):
    check(*ROWS[name])


@pytest.mark.parametrize("name", MUTANTS)
def test_law_catches(name):
    check, pruner, groups = MUTANTS[name]
    caught = AssertionError, jax.errors.TracerBoolConversionError
    if name == "grows":
        caught = TypeError  # from scan: the carry changes its type
    with pytest.raises(caught):
        check(pruner, groups)


def test_every_law_has_a_mutant():
    assert {check for check, *_ in MUTANTS.values()} == set(LAWS)


# -------------------------------------------------------------------------- one by one


def steps_are_geometric(iterative):
    """At every step: own key, masked weights, new scores, the next density."""

    @jax.jit
    def watched(first):
        seen, goals = [], []

        def score(key, params, mask, batch):
            seen.append((jax.random.bits(key), params, mask))
            return scores.magnitude(key, params, mask, batch)

        def select(values, mask, density):
            goals.append(density)
            return selection.global_topk(values, mask, density)

        update = iterative(score, select, 3).update
        return update(KEY, (), PARAMS, first, BATCH, 0.1)[0], seen, goals

    first = next(rounds(GOOD))
    mask, seen, goals = watched(first)
    start = masks.kept(first).item() / masks.size(first)
    densities = [start * (0.1 / start) ** (i / 3) for i in range(4)]
    counts = [round(density * masks.size(first)) for density in densities]
    np.testing.assert_allclose(np.float32(goals), densities[1:], rtol=1e-5)
    assert [masks.kept(m) for m in (*(old for *_, old in seen), mask)] == counts
    for _, params, old in seen:
        same(params, masks.apply(old, PARAMS))
    assert len({draw.item() for draw, *_ in seen}) == 3


def test_steps_are_geometric():
    steps_are_geometric(pruners.iterative)


def linear(score, select, steps):
    once = pruners.one_shot(score, select)

    def update(key, state, params, mask, batch, density):
        start = masks.density(mask)
        for i in range(1, steps + 1):
            goal = start + (density - start) * i / steps
            own = jax.random.fold_in(key, i)
            mask, state = once.update(own, state, params, mask, batch, goal)
        return mask, state

    return Pruner(once.init, update)


def scores_once(score, select, steps):
    def update(key, state, params, mask, batch, density):
        start = masks.density(mask)
        values = score(key, masks.apply(mask, params), mask, batch)
        for i in range(1, steps + 1):
            mask = select(values, mask, start * (density / start) ** (i / steps))
        return mask, state

    return Pruner(lambda params: (), update)


@pytest.mark.parametrize("mutant", [linear, scores_once])
def test_geometric_steps_catch(mutant):
    with pytest.raises(AssertionError):
        steps_are_geometric(mutant)


def test_one_step_is_one_shot():
    once, iterated = (
        ROWS["one_shot"][0],
        pruners.iterative(scores.magnitude, selection.global_topk, 1),
    )
    same(list(rounds(iterated)), list(rounds(once)))


def test_scores_computed_anew_differ_from_one_shot():
    once = pruners.one_shot(scores.taylor(loss), selection.global_topk)
    iterated = ROWS["iterative"][0]
    *_, one = rounds(once)
    *_, two = rounds(iterated)
    assert 0 < masks.overlap(one, two) < 1


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_an_error(steps):
    with pytest.raises(ValueError, match=f"steps {steps}: expected at least 1"):
        pruners.iterative(scores.magnitude, selection.global_topk, steps)


def test_units_survive_steps_when_entries_are_sparser_than_units():
    """Half of the units hold few entries; steps may not prune below the density."""
    params = {
        "thick": {"kernel": np.full((50, 10), 0.1, np.float32)},
        "thin": {"kernel": np.ones((2, 10), np.float32)},
    }
    mask = {
        name: {"kernel": np.ones_like(w["kernel"], bool)} for name, w in params.items()
    }
    mask["thick"]["kernel"][:] = False
    pruner = pruners.iterative(scores.magnitude, selection.structured(), 4)
    new, _ = fast(pruner)(KEY, (), params, mask, None, np.float32(0.4))
    assert columns(jax.tree.map(np.asarray, new))[0].sum() == 8


@pytest.mark.parametrize("name", ["one_shot", "iterative"])
def test_an_empty_mask_stays_empty(name):
    mask = jax.tree.map(np.zeros_like, MASK)
    new, _ = fast(ROWS[name][0])(KEY, (), PARAMS, mask, BATCH, np.float32(0.5))
    assert masks.kept(new) == 0
