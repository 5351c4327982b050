"""Sensitivity: the metric with one group pruned at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from dagjax.compaction.pruning import sensitivity as module
from dagjax.compaction.pruning.scores import unit_scores
from dagjax.compaction.pruning.sensitivity import sensitivity
from dagjax.report.sensitivity import draw_sensitivity
from tests.graph import nets

DENSITIES = (1.0, 0.6, 0.3)


@pytest.fixture(scope="module")
def case():
    dag = nets.build(dj.zoo.mlp((9, 7, 3), input_shape=(5,)), ((5,),)).dag
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 5)), jnp.float32)
    return dag, x, jnp.argmax(dag(x), -1)


def by_hand(dag, x, y, name, density):
    """Accuracy and cross entropy of the network that `prune_units` masks."""
    found = dj.units(dag)
    scores = unit_scores(dag, "l2", found)[name]
    order = np.argsort(-scores, kind="stable")[: max(1, round(density * len(scores)))]
    mask = found.mask({name: np.isin(np.arange(len(scores)), order)})
    out = dag.replace(params=dj.masks.apply(mask, dag.params))(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
    return float((out.argmax(-1) == y).mean()), float(loss)


def test_values_are_those_of_masked_networks(case):
    dag, x, y = case
    found = sensitivity(dag, (x, y), densities=DENSITIES)
    assert found.metric.shape == found.loss.shape == (2, 3)
    assert found.dense[0] == 1
    for i, name in enumerate(found.groups):
        for j, density in enumerate(DENSITIES):
            want = by_hand(dag, x, y, name, density)
            assert np.allclose((found.metric[i, j], found.loss[i, j]), want, atol=1e-5)
    assert np.all(found.metric[:, 0] == 1)
    assert found.metric.min() < 0.9  # pruning does something


def test_one_compilation(case):
    dag, x, y = case
    module._value.clear_cache()
    sensitivity(dag, (x, y), densities=DENSITIES)
    sensitivity(dag, (x, y), densities=(0.5,), groups=["fc1/Dense"])
    assert module._value._cache_size() == 1


def test_many_masks_at_a_time(case, monkeypatch):
    """As on an accelerator; the last chunk is filled up."""
    dag, x, y = case
    want = sensitivity(dag, (x, y), densities=DENSITIES)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(module, "_CHUNK", 3)
    module._many.clear_cache()
    got = sensitivity(dag, (x, y), densities=DENSITIES)
    assert module._many._cache_size() == 1
    assert np.allclose(got.loss, want.loss, atol=1e-5)
    assert np.array_equal(got.metric, want.metric)


def test_floats_are_regressed_and_objectives_can_be_given(case):
    dag, x, _ = case
    target = dag(x)
    found = sensitivity(dag, (x, target), densities=(0.5,))
    assert found.dense == (0, 0)
    assert np.all(found.loss > 0)
    assert np.array_equal(found.metric, -found.loss)
    worst = lambda y, t: jnp.max(jnp.abs(y - t))
    given = sensitivity(dag, (x, target), densities=(0.5,), loss=worst)
    assert np.all(given.loss > found.loss)
    assert np.array_equal(given.metric, found.metric)


def test_scores_and_groups_can_be_chosen(case):
    dag, x, y = case
    first, second = dj.units(dag).channels
    size = dj.units(dag)[second].size
    scores = {second: np.arange(size)}
    found = sensitivity(dag, (x, y), densities=(0.01,), scores=scores)
    assert found.groups == (second,)
    assert found.kept.tolist() == [[1]]
    assert found.sizes.tolist() == [size]
    assert sensitivity(dag, (x, y), groups=[first]).groups == (first,)


def test_errors(case):
    dag, x, y = case
    with pytest.raises(dj.CompactionError, match=r"in \(0, 1\], got 0"):
        sensitivity(dag, (x, y), densities=(0.5, 0))
    with pytest.raises(KeyError, match="no group 'nothing'"):
        sensitivity(dag, (x, y), groups=["nothing"])
    with pytest.raises(dj.CompactionError, match="nothing of this network"):
        sensitivity(dag, (x, y), groups=[])


def test_table_and_figure(case):
    dag, x, y = case
    found = sensitivity(dag, (x, y), densities=DENSITIES)
    lines = found.table().splitlines()
    assert lines[0].split() == ["group", "units", "1", "0.6", "0.3"]
    assert len(lines) == len(found.groups) + 2
    order = [found.groups.index(line.split()[0]) for line in lines[1:-1]]
    means = found.metric.mean(1)[order]
    assert np.all(np.diff(means) >= 0)  # the most sensitive group first
    figure = draw_sensitivity(found)
    (ax,) = figure.axes
    assert {text.get_text() for text in ax.texts} == {*found.groups}
    curves = [line for line in ax.lines if len(line.get_xdata()) == len(DENSITIES)]
    assert len(curves) == len(found.groups)
    for line, row in zip(curves, found.metric, strict=True):
        assert np.array_equal(line.get_ydata(), row)
    assert [*ax.lines[0].get_ydata()] == [found.dense[0]] * 2


def test_bools_are_two_classes(case):
    dag, x, y = case
    labels = np.asarray(y) == 1
    found = sensitivity(dag, (x, labels), densities=(0.6,))
    want = sensitivity(dag, (x, labels.astype(np.int32)), densities=(0.6,))
    assert found.dense == want.dense
    assert np.array_equal(found.loss, want.loss)
    with pytest.raises(dj.CompactionError, match=r"\(64, 3\) do not fit .* \(64,\)"):
        sensitivity(dag, (x, labels[:, None]))
    with pytest.raises(dj.CompactionError, match="squared_error expected"):
        sensitivity(dag, (x, np.zeros(64, np.float32)))


def test_one_group_is_named_by_a_string(case):
    dag, x, y = case
    assert sensitivity(dag, (x, y), groups="fc1/Dense").groups == ("fc1/Dense",)
