"""Block matrices drawn as a product: every entry at its place, pictures stay small."""

import dataclasses
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

import dagjax as dj
from dagjax.report.grid import Grid
from dagjax.report.matrices import draw_matrices, extremes

mpl.use("agg")


@dataclasses.dataclass
class Matrix:
    """A stand-in for `dagjax.BlockMatrix`."""

    sizes: dict
    blocks: dict


SIZES = {"in": 784, "n1": 30, "n2": 30, "out": 10}


def factors(sizes=None, seed=0):
    """A chain with a skip over the last but one node."""
    sizes, rng = sizes or SIZES, np.random.default_rng(seed)
    names = list(sizes)
    block = lambda row, column: rng.normal(size=(sizes[row], sizes[column]))
    made = []
    for i in range(1, len(names)):
        columns = names[max(i - 2, 0) : i] if i == len(names) - 1 else names[i - 1 : i]
        blocks = {(names[i], column): block(names[i], column) for column in columns}
        made.append(Matrix(sizes, blocks))
    return made


def axes(figure):
    """Of the matrices, without the colorbar."""
    return [ax for ax in figure.axes if ax.lines]


def captions(figure):
    return [ax.texts[-2].get_text() for ax in axes(figure)]


def pixels(ax):
    return np.asarray(ax.images[0].get_array())


def block_of(ax, grid, row, column):
    """The pixels of a block, whether they are not white."""
    span = lambda node: slice(*grid.ends[grid.names.index(node) :][:2])
    return np.any(pixels(ax)[span(row), span(column), :3] != 255, -1)


def test_matrices_stand_as_their_product_is_written():
    L = factors()
    figure = draw_matrices(L, product=L[0])
    assert captions(figure) == ["$L_{3}$", "$L_{2}$", "$L_{1}$", "$(I - N)^{-1}$"]
    signs = [ax.texts[-1].get_text() for ax in axes(figure)]
    assert signs[0] == ""
    assert signs[1] == signs[2] != signs[3] == "="
    lefts = [ax.get_position().x0 for ax in axes(figure)]
    assert lefts == sorted(lefts)
    assert len(axes(draw_matrices(L))) == 3
    assert not plt.get_fignums()


def test_labels_in_the_order_of_the_factors():
    L = factors()
    figure = draw_matrices(L, labels=["A", "B", "C"])
    assert captions(figure) == ["C", "B", "A"]


def test_blocks_lie_at_their_places_and_the_rest_is_white():
    L, grid = factors(), Grid.of(SIZES)
    for ax, matrix in zip(axes(draw_matrices(L)), L[::-1], strict=True):
        for row in SIZES:
            for column in SIZES:
                inked = block_of(ax, grid, row, column)
                assert inked.mean() > 0.5 if (row, column) in matrix.blocks else (
                    not inked.any()
                )  # fmt: skip
        (diagonal,) = ax.lines
        assert np.array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])


def test_signs_are_colors_on_one_scale():
    sizes = {"x": 1, "y": 2}
    one = Matrix(sizes, {("y", "x"): np.array([[4.0], [-4.0]])})
    two = Matrix(sizes, {("y", "x"): np.array([[1.0], [0.0]])})
    figure = draw_matrices([one, two])
    second, first = axes(figure)
    grid = Grid.of(sizes)
    column = lambda ax: pixels(ax)[grid.ends[1] :, 0, :3].astype(int)
    positive, negative = column(first)[0], column(first)[-1]
    assert positive[0] > positive[2]
    assert negative[2] > negative[0]
    assert column(second)[0].sum() > positive.sum()  # paler
    assert np.all(column(second)[-1] == 255)
    labels = [t.get_text() for t in figure.axes[-1].get_xticklabels()]
    assert labels == ["-4", "-1", "0", "1", "4"]


def test_small_nodes_stay_visible():
    grid = Grid.of({"x": 50_000, "y": 1, **{f"n{i}": 100 for i in range(60)}})
    assert np.diff(grid.ends).min() >= 4
    wide = Grid.of({"x": 784, "y": 10})
    assert 0.7 < wide.ends[1] / wide.ends[2] < 0.8


def test_names_stand_where_they_fit():
    few = draw_matrices(factors())
    assert {"in", "n1", "n2", "out"} <= {t.get_text() for t in axes(few)[0].texts}
    sizes = {f"layer_{i}": 1000 if i % 2 else 1 for i in range(40)}
    many = axes(draw_matrices(factors(sizes)[:2]))[0]
    named = {t.get_text() for t in many.texts}
    assert "layer_1" in named
    assert "layer_2" not in named


@pytest.mark.parametrize("sizes", [SIZES, dict.fromkeys("abcdefghijkl", 4),
                                   {"embedding_in": 5, "attention_output": 3, "y": 2},
                                   {"x": 1, "y": 1}])  # fmt: skip
def test_nothing_is_clipped_or_overlaps(sizes):
    L = factors(sizes)
    figure = draw_matrices(L, product=L[0])
    figure.canvas.draw()
    texts = [t for t in figure.findobj(mpl.text.Text) if t.get_visible()]
    boxes = [t.get_window_extent() for t in texts if t.get_text().strip()]
    boxes += [ax.get_window_extent() for ax in axes(figure)]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert figure.get_size_inches()[0] < 12


def test_many_factors_are_wrapped_into_rows():
    L = factors(dict.fromkeys("abcdefghijkl", 4))
    tops = [round(ax.get_position().y0, 3) for ax in axes(draw_matrices(L))]
    assert len(set(tops)) == 3
    assert tops == sorted(tops, reverse=True)


def test_svg_stays_small():
    sizes = {"in": 3072, "n1": 1024, "n2": 1024, "n3": 512, "out": 10}
    L = factors(sizes)
    file = io.StringIO()
    draw_matrices(L, product=L[0]).savefig(file, format="svg")
    assert len(file.getvalue()) < 300_000
    assert ">out</text>" in file.getvalue()


def test_pixels_show_the_largest_entry():
    block = np.zeros((100, 90))
    block[37, 41], block[80, 3] = -5, 2
    small = extremes(block, (10, 9))
    assert small[3, 4] == -5
    assert small[8, 0] == 2
    assert np.count_nonzero(small) == 2
    assert np.array_equal(extremes(np.eye(3), (3, 3)), np.eye(3))
    large = extremes(np.arange(6).reshape(2, 3), (7, 5))
    assert large.shape == (7, 5)
    assert set(large.ravel()) == set(range(6))


def test_what_is_not_finite_is_gray():
    sizes = {"x": 2, "y": 1}
    figure = draw_matrices([Matrix(sizes, {("y", "x"): np.array([[np.nan, 3.0]])})])
    (ax,) = axes(figure)
    red, green, blue, _ = pixels(ax)[-1, 0]
    assert red == green == blue < 255
    assert figure.axes[-1].get_xticklabels()[-1].get_text() == "3"


def test_zero_matrices_and_empty_nodes():
    draw_matrices([Matrix({"x": 3}, {})]).canvas.draw()
    sizes = {"x": 0, "y": 2}
    draw_matrices([Matrix(sizes, {("y", "x"): np.ones((2, 0))})]).canvas.draw()


def test_refuses_what_does_not_fit():
    L = factors()
    with pytest.raises(ValueError, match="no factors"):
        draw_matrices([])
    with pytest.raises(ValueError, match="2 labels for 3 matrices"):
        draw_matrices(L, labels=["a", "b"])
    with pytest.raises(ValueError, match="different nodes"):
        draw_matrices([*L, Matrix({"x": 1}, {})])
    for place in (("n1", "out"), ("n1", "nope")):
        with pytest.raises(ValueError, match=rf"'n1' <- '{place[1]}' is \[3, 3\]"):
            draw_matrices([Matrix(SIZES, {place: np.ones((3, 3))})])


def test_draws_the_factors_of_a_network():
    graph = dj.series(nn.Dense(8), dj.residual(nn.Dense(8)), nn.Dense(3))
    x = jnp.ones((1, 4))
    point = dj.linearize(dj.init(jax.random.key(0), graph, x), x)
    L, whole = point.matrices(), point.product()
    assert captions(draw_matrices(L, product=whole))[0] == "$L_{3}$"
