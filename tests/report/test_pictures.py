"""Masks as pictures: what is black is what the mask keeps."""

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from dagjax.report import figures, pictures
from tests.report.records import (
    DENSITIES,
    drawn,
    falling,
    make_record,
    texts,
    weight_masks,
)


@pytest.fixture
def record():
    return make_record()


def test_mask_pictures_are_the_masks(record):
    figure = drawn(figures.mask_pictures(record, seed=2))
    grid = np.array(figure.axes).reshape(3, len(DENSITIES))
    for row, name in zip(grid, ("fc1", "fc2", "fc3"), strict=True):
        kernel = record.masks["params"][name]["Dense"]["kernel"]
        assert row[0].get_title("left") == f"{name} Dense"
        for i, ax in enumerate(row, 1):
            mask = kernel[i, 2]
            expected = pictures.image(mask)
            np.testing.assert_allclose(ax.images[0].get_array(), expected)
            assert ax.get_title("right") == f"{100 * mask.mean():.3g}%"
    assert {"67% of weights", "20% of weights"} <= set(texts(figure))


def test_image_lies_and_keeps_small_masks():
    mask = np.random.default_rng(0).random((3, 3, 4, 5)) < 0.5
    np.testing.assert_array_equal(pictures.image(mask), mask.reshape(36, 5).T)
    np.testing.assert_array_equal(pictures.image(mask[0, 0, 0]), mask[0, 0, 0][None])


def test_image_averages_blocks():
    mask = np.random.default_rng(0).random((70, 103)) < 0.3
    picture = pictures.image(mask, (8, 16))  # blocks of 9 x 7
    assert picture.shape == (8, 15)
    np.testing.assert_allclose(picture[1, 2], mask[9:18, 14:21].mean())
    np.testing.assert_allclose(picture[-1, -1], mask[63:, 98:].mean())


def test_mask_pictures_choose_six_and_name_the_rest():
    kernel = lambda: falling((3, 3, 4, 4), DENSITIES, 2)
    vector = lambda: falling((4,), DENSITIES, 2)
    params = {f"block{i}": {"kernel": kernel(), "bias": vector()} for i in range(1, 13)}
    record = make_record(masks={"params": params, "gates": None}, seeds=2)
    figure = drawn(figures.mask_pictures(record))
    names = [ax.get_title("left") for ax in figure.axes if ax.get_title("left")]
    assert names == ["block1", "block3", "block5", "block8", "block10", "block12"]
    (note,) = [t for t in texts(figure) if t.startswith("Not shown")]
    assert "block2 kernel" in note.replace("\n", " ")
    assert note.endswith("and 2 more.")


def test_vectors_are_strips():
    params = {"fc": {"kernel": falling((6, 4), (0.5,), 2)}}
    params["fc"]["bias"] = falling((4,), (0.5,), 2)
    masks = {"params": params, "gates": None}
    record = make_record(densities=(0.5,), masks=masks, seeds=2)
    bias, kernel = figures.mask_pictures(record).axes
    assert bias.get_title("left") == "fc bias"
    assert bias.images[0].get_array().shape == (1, 4)
    assert bias.get_position().height < kernel.get_position().height


def test_gates_are_columns_with_names():
    names = ["stem", "block2/skip", "block10/skip"]
    each = falling((3,), DENSITIES, 2)
    gates = {name: each[:, :, i] for i, name in enumerate(names)}
    record = make_record(masks={"params": None, "gates": gates}, seeds=2, prune="arcs")
    axes = drawn(figures.mask_pictures(record, seed=1)).axes
    order = ["block2/skip", "block10/skip", "stem"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == order
    for i, ax in enumerate(axes, 1):
        expected = [[gates[name][i, 1]] for name in order]
        np.testing.assert_array_equal(ax.images[0].get_array(), expected)


def test_masks_of_any_tree():
    masks = {"params": [{"w": falling((4, 4), (0.5,), 1)}, None], "gates": None}
    record = make_record(densities=(0.5,), seeds=1, masks=masks)
    assert figures.mask_pictures(record).axes[0].get_title("left") == "0 w"


def test_device_arrays_are_fine():
    masks = jax.tree.map(jax.numpy.asarray, weight_masks((0.5,), 1))
    drawn(figures.mask_pictures(make_record(densities=(0.5,), seeds=1, masks=masks)))


def test_many_densities_are_thinned():
    densities = tuple(0.8**i for i in range(1, 13))
    masks = {"params": {"fc": falling((8, 8), densities, 1)}, "gates": None}
    figure = figures.mask_pictures(make_record(densities, seeds=1, masks=masks))
    assert len(figure.axes) == 8
    assert any(t.startswith("Not shown: densities 64%") for t in texts(figure))


def test_no_figure_is_left_after_an_error(record):
    record.masks["params"]["fc1"]["Dense"]["kernel"] = np.ones((1, 5, 4, 4), bool)
    with pytest.raises(IndexError, match="out of bounds"):
        figures.mask_pictures(record)
    assert not plt.get_fignums()
