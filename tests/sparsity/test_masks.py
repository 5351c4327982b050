"""Masks: what is kept, what passes, what is counted, and None where nothing is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dagjax.sparsity import masks, selection

NAN = np.float32("nan")


PARAMS = {
    "conv": {"kernel": np.ones((3, 3, 1, 2), np.float32), "bias": np.zeros(2)},
    "norm": {"scale": np.ones(2), "bias": np.zeros(2)},
    "fc": [np.full((2, 4), 2, np.float32), np.ones(4)],
}


def draw(shape, share, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def vectors(*bits):
    """A tree of two leaves and two holes, from two strings of 0 and 1."""
    a, b = (np.array([bit == "1" for bit in word]) for word in bits)
    return {"a": a, "b": [None, b], "c": None}


# -------------------------------------------------------------------------------- full


def test_full_keeps_kernels_and_leaves_the_rest():
    mask = masks.full(PARAMS)
    assert mask["conv"]["bias"] is None
    assert mask["norm"] == {"scale": None, "bias": None}
    assert mask["fc"][1] is None
    for m, w in [
        (mask["conv"]["kernel"], PARAMS["conv"]["kernel"]),
        (mask["fc"][0], PARAMS["fc"][0]),
    ]:
        assert m.dtype == bool
        assert m.shape == w.shape
        assert m.all()


def test_full_asks_prunable_for_path_and_leaf():
    seen = []

    def prunable(path, leaf):
        seen.append((jax.tree_util.keystr(path), leaf.shape))
        return path[0].key == "norm"

    mask = masks.full(PARAMS, prunable)
    assert masks.size(mask) == 4
    assert mask["fc"] == [None, None]
    assert ("['conv']['kernel']", (3, 3, 1, 2)) in seen
    assert len(seen) == 6


def test_full_under_jit_and_eval_shape():
    made = jax.jit(masks.full)(PARAMS)
    assert jax.tree.structure(made) == jax.tree.structure(masks.full(PARAMS))
    shapes = jax.eval_shape(lambda: PARAMS)
    assert masks.kept(masks.full(shapes)) == 18 + 8


@pytest.mark.parametrize(
    ("params", "named"),
    [({"fc": {"bias": np.ones(3)}}, r"\['fc'\]\['bias'\]"), ({}, "no leaves")],
)
def test_full_of_nothing_is_an_error(params, named):
    with pytest.raises(ValueError, match=f"nothing is prunable among {named}"):
        masks.full(params)


# ------------------------------------------------------------------------------- apply


def product(mask, params):
    """The mask as a factor: what `apply` must not be, NaN passes."""
    return masks.tree_map(
        lambda m, w: w * jnp.asarray(m, w.dtype), mask, params, hole=lambda w: w
    )


def nothing_dead_passes(apply):
    mask = {"w": np.array([True, False, False, True]), "b": None}
    params = {"w": np.float32([1, NAN, np.inf, 2]), "b": np.float32([NAN])}
    got = apply(mask, params)
    np.testing.assert_array_equal(got["w"], [1, 0, 0, 2])
    np.testing.assert_array_equal(got["b"], [NAN])
    assert got["w"].dtype == np.float32


def test_nothing_dead_passes(transform):
    nothing_dead_passes(transform(masks.apply))


def test_a_factor_lets_nan_pass():
    with pytest.raises(AssertionError):
        nothing_dead_passes(product)


def gradients_are_masked(apply):
    """Zero at the dead, also at NaN and where a slope is infinite; else as they are."""
    mask = np.array([True, False, False, True])
    params = jnp.float32([1, NAN, 0, 4])
    loss = lambda w: jnp.sum(jnp.where(mask, jnp.sqrt(apply(mask, w) + ~mask), 0) * 2)
    np.testing.assert_allclose(jax.grad(loss)(params), [1, 0, 0, 0.5])
    cube = jax.grad(lambda w: jnp.sum(apply(mask, w) ** 3))
    np.testing.assert_allclose(cube(params), [3, 0, 0, 48])


def test_gradients_are_masked():
    gradients_are_masked(masks.apply)


def test_a_factor_has_gradients_of_nan():
    with pytest.raises(AssertionError):
        gradients_are_masked(lambda m, w: (m * w) * jnp.sign(w) ** 2)


def test_apply_twice_is_once_and_keeps_formats():
    mask = masks.full(PARAMS)
    mask["fc"][0] = draw((2, 4), 0.5)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    once = masks.apply(mask, params)
    twice = masks.apply(mask, once)
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, y)
    assert jax.tree.structure(once) == jax.tree.structure(params)


def test_no_mask_is_the_identity():
    assert masks.apply(None, PARAMS) is PARAMS


# ------------------------------------------------------- counts: kept, size, density


def test_counts(transform):
    mask = vectors("1101", "000011")
    assert masks.size(mask) == 10
    assert transform(masks.kept)(mask) == 5
    assert transform(masks.density)(mask) == 0.5
    assert masks.kept(mask).dtype == jnp.int32


def test_counts_of_nothing():
    assert masks.kept({"a": None}) == 0
    assert masks.size({"a": None}) == 0


def test_kept_is_exact_where_float32_is_not():
    assert masks.kept(np.ones(2**24 + 1, bool)) == 2**24 + 1


@pytest.mark.parametrize(
    ("one", "two", "share"),
    [
        (("110", "1"), ("110", "1"), 1),
        (("110", "1"), ("001", "0"), 0),
        (("110", "1"), ("011", "1"), 2 / 4),
        (("111", "1"), ("100", "0"), 1 / 4),
        (("000", "0"), ("000", "0"), 1),
        (("000", "0"), ("100", "0"), 0),
    ],
)
def test_overlap_is_the_jaccard_index(one, two, share):
    one, two = vectors(*one), vectors(*two)
    np.testing.assert_allclose(masks.overlap(one, two), share)
    np.testing.assert_allclose(jax.jit(masks.overlap)(two, one), share)


# ----------------------------------------------------------------------------- shuffle

MASK = {"a": draw((10, 20), 0.2), "b": {"x": draw((100,), 0.6, 1), "y": None}}
MASK["b"]["z"] = draw((50, 2), 0.1, 2)


def together(path):
    return path[0].key


GROUPINGS = {
    "leaf": (masks.own_label, [["a"], ["x"], ["z"]]),
    "parent": (together, [["a"], ["x", "z"]]),
    "all": (lambda path: 0, [["a", "x", "z"]]),
}


def by_name(mask):
    return {"a": mask["a"], "x": mask["b"]["x"], "z": mask["b"]["z"]}


def groups_keep_their_counts(shuffle, name):
    label, groups = GROUPINGS[name]
    new = shuffle(jax.random.key(0), MASK, label)
    assert jax.tree.structure(new) == jax.tree.structure(MASK)
    old, new = by_name(MASK), by_name(new)
    for leaf in old:
        assert new[leaf].dtype == bool
        assert new[leaf].shape == old[leaf].shape
        assert (new[leaf] != old[leaf]).any()
    for group in groups:
        assert sum(new[n].sum() for n in group) == sum(old[n].sum() for n in group)


@pytest.mark.parametrize("name", GROUPINGS)
def test_groups_keep_their_counts(name):
    groups_keep_their_counts(masks.shuffle, name)


def coin(key, mask, label):
    """Every entry by its own coin: counts hold on average only."""
    toss = lambda m: jax.random.bernoulli(key, m.mean(), m.shape)
    return jax.tree.map(toss, mask)


@pytest.mark.parametrize("name", GROUPINGS)
def test_counts_catch_a_coin(name):
    with pytest.raises(AssertionError):
        groups_keep_their_counts(coin, name)


def places_are_equally_likely(shuffle):
    """1000 keys: how often each of 20 places is kept, and each pair of neighbors."""
    keys = jax.random.split(jax.random.key(1), 1000)
    mask = {"a": np.arange(12).reshape(3, 4) < 4, "b": np.arange(8) < 1}
    new = jax.jit(jax.vmap(lambda key: shuffle(key, mask, lambda path: 0)))(keys)
    rows = np.concatenate([new["a"].reshape(1000, 12), new["b"]], 1).astype(float)
    assert (rows.sum(1) == 5).all()
    # Each place is kept in Bin(1000, 1/4); a pair of neighbors in Bin(1000, 1/19).
    assert abs(rows.sum(0) - 250).max() < 4.5 * np.sqrt(1000 * 0.25 * 0.75)
    pairs = (rows * np.roll(rows, 1, 1)).sum(0)
    assert abs(pairs - 1000 / 19).max() < 4.5 * np.sqrt(1000 / 19)


def test_places_are_equally_likely():
    places_are_equally_likely(masks.shuffle)


def rotates(key, mask, label):
    """Equally likely places, neighbors stay neighbors."""
    flat = jnp.concatenate([mask["a"].ravel(), mask["b"]])
    flat = jnp.roll(flat, jax.random.randint(key, (), 0, flat.size))
    return {"a": flat[:12].reshape(3, 4), "b": flat[12:]}


def leaf_by_leaf(key, mask, label):
    return masks.shuffle(key, mask)


@pytest.mark.parametrize("mutant", [rotates, leaf_by_leaf])
def test_frequencies_catch(mutant):
    with pytest.raises(AssertionError):
        places_are_equally_likely(mutant)


def test_keys_and_leaves_differ_and_the_same_key_does_not():
    one, again, other = (masks.shuffle(jax.random.key(i), MASK) for i in (0, 0, 1))
    assert masks.overlap(one, again) == 1
    assert masks.overlap(one, other) < 0.5
    alike = {"a": MASK["a"], "b": MASK["a"]}
    new = masks.shuffle(jax.random.key(0), alike)
    assert (new["a"] != new["b"]).any()


# ---------------------------------------------------------------------------- tree_map


def test_none_stands_for_the_subtree():
    mask = {"a": None, "b": np.array([True]), "c": [None, np.array([False])]}
    subtree = {"x": 1, "y": (2, None)}
    other = {"a": subtree, "b": 3, "c": [[4, 5], 6]}
    add = lambda m, x: (bool(m[0]), x)
    want = {"a": None, "b": (True, 3), "c": [None, (False, 6)]}
    assert masks.tree_map(add, mask, other) == want
    same = masks.tree_map(add, mask, other, hole=lambda x: x)
    assert same == {"a": subtree, "b": (True, 3), "c": [[4, 5], (False, 6)]}
    assert same["a"] is subtree


def test_a_hole_is_filled_by_a_value_or_a_function_of_all_subtrees():
    mask = {"a": None, "b": np.array([True])}
    assert masks.tree_map(lambda m: 1, mask, hole=0) == {"a": 0, "b": 1}
    assert masks.tree_map(lambda m: 1, mask, hole=lambda: 2) == {"a": 2, "b": 1}
    trees = {"a": 3, "b": 4}, {"a": [5], "b": 6}
    got = masks.tree_map(lambda m, x, y: x + y, mask, *trees, hole=lambda x, y: (x, y))
    assert got == {"a": (3, [5]), "b": 10}


def test_a_mask_of_none_is_one_hole():
    assert masks.tree_map(lambda m, x: x, None, {"a": 1}) is None
    assert masks.tree_map(lambda m, x: x, None, {"a": 1}, hole=len) == 1


def test_other_structures_are_an_error():
    with pytest.raises(ValueError, match="key"):
        masks.tree_map(lambda m, x: x, {"a": np.array([True])}, {"b": 1})


def test_masks_of_other_leaves_do_not_overlap():
    one, two = {"a": np.ones(3, bool), "b": None}, {"a": np.ones(3, bool)}
    whole = two | {"b": np.ones(2, bool)}
    for pair in ((one, whole), (whole, one)):
        with pytest.raises(ValueError, match=r"only one .* bools at \['b'\]"):
            masks.overlap(*pair)
    assert masks.overlap(one, two | {"b": None}) == 1


def test_more_entries_than_int32_counts():
    """Nine leaves of 2^28 entries are one array, seen nine times."""
    big = np.zeros(2**28, bool)
    big[:-3] = True
    mask = [big] * 9
    assert masks.kept(mask).item() == 9 * (2**28 - 3)
    assert np.isclose(masks.density(mask), 1)
    shape = jax.eval_shape(masks.density, mask)
    assert shape.dtype == jnp.float32
    with pytest.raises(ValueError, match="2,415,919,104 entries compete"):
        selection.global_topk(mask, mask, 0.5)
