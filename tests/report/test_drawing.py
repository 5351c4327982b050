"""Drawings of graphs: nothing hides anything, colors say what is kept."""

import itertools

import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

from dagjax.graph import zoo
from dagjax.graph.combine import block, concat, parallel, series
from dagjax.graph.merges import Concat, Product
from dagjax.graph.topology import Arc, Graph, GraphError
from dagjax.report.drawing import arc_shares, draw
from dagjax.report.layout import NAMED, RADIUS, layout

mpl.use("agg")
SOLID = ("-", "solid")


def graph_of(pairs, inputs="in", outputs="out"):
    arcs = [Arc(f"{s}_{t}", s, t, abs) for s, t in pairs]
    return Graph(arcs, inputs, outputs)


def all_skips(depth):
    names = ["in", *(f"h{i}" for i in range(1, depth)), "out"]
    return graph_of(itertools.combinations(names, 2))


def merging():
    arcs = [
        Arc("query", "in", "a", abs), Arc("key", "in", "b", abs),
        Arc("left", "a", "m", abs, 0), Arc("right", "b", "m", abs, 1),
        Arc("values", "m", "c", abs, 0), Arc("skip", "in", "c", abs, 1),
        Arc("head", "c", "out", abs),
    ]  # fmt: skip
    return Graph(arcs, "in", "out", {"m": Product(), "c": Concat()})


def two_inputs():
    pairs = [("left", "h"), ("right", "h"), ("h", "y"), ("right", "z"), ("h", "z")]
    return graph_of(pairs, ["left", "right"], ["y", "z"])


def around():
    """A long arc that has to go around a tall column."""
    middle = [f"a{i}" for i in range(5)]
    pairs = [("in", a) for a in middle] + [(a, "out") for a in middle]
    return graph_of([*pairs, ("out", "end"), ("in", "out"), ("in", "end")], "in", "end")


GRAPHS = {
    "lenet": zoo.lenet_300_100(),
    "lenet5": zoo.lenet5(),
    "resnet20": zoo.resnet(20),
    "resnet56": zoo.resnet(56),
    "skips3": all_skips(3),
    "skips6": all_skips(6),
    "skips9": all_skips(9),
    "merges": merging(),
    "inputs": two_inputs(),
    "around": around(),
    "inception": series(abs, concat(abs, abs, abs), parallel(abs, abs, abs, abs)),
    "chain": graph_of([(f"n{i}", f"n{i + 1}") for i in range(20)], "n0", "n20"),
    "long": graph_of(
        [*itertools.pairwise("abcdefghij"), ("a", "j"), ("b", "h"), ("c", "e")],
        "a", "j",
    ),
}  # fmt: skip


@pytest.fixture(params=GRAPHS)
def graph(request):
    return GRAPHS[request.param]


def patches(figure, kind):
    found = figure.axes[0].patches
    return {p.get_gid(): p for p in found if isinstance(p, kind)}


def texts(figure):
    return {t.get_text(): t for t in figure.axes[0].texts}


def test_draws_every_node_and_arc_once(graph):
    figure = draw(graph)
    figure.canvas.draw()
    assert not plt.get_fignums()
    sums = {n for n in graph.nodes if n not in graph.merge_of}
    assert set(patches(figure, Circle)) == sums
    assert set(patches(figure, Rectangle)) == set(graph.merge_of)
    assert set(patches(figure, FancyArrowPatch)) == set(graph.by_name)
    assert set(graph.nodes) <= set(texts(figure))


def test_levels_are_columns(graph):
    nodes = layout(graph).nodes
    for a, b in itertools.combinations(graph.nodes, 2):
        (xa, ya), (xb, yb) = nodes[a], nodes[b]
        assert np.sign(xb - xa) == np.sign(graph.levels[b] - graph.levels[a])
        assert np.hypot(xb - xa, yb - ya) > 2.5 * RADIUS


def test_arcs_pass_no_node(graph):
    places = layout(graph)
    for arc in graph.arcs:
        for node, center in places.nodes.items():
            if node not in (arc.source, arc.target):
                gaps = np.hypot(*(places.curves[arc.name] - center).T)
                assert gaps.min() > RADIUS + 0.05, (arc.name, node)


def test_arcs_join_their_nodes(graph):
    places = layout(graph)
    for arc in graph.arcs:
        curve = places.curves[arc.name]
        for end, node in ((curve[0], arc.source), (curve[-1], arc.target)):
            assert RADIUS <= np.hypot(*(end - places.nodes[node])) < 2 * RADIUS


def test_no_arc_hides_another(graph):
    curves = layout(graph).curves
    for a, b in itertools.combinations(curves.values(), 2):
        gaps = np.hypot(*np.moveaxis(a[:, None] - b, -1, 0)).min(1)
        assert np.mean(gaps < 0.02) < 0.25
        assert gaps.max() > 0.1


def test_names_cover_nothing(graph):
    figure = draw(graph)
    figure.canvas.draw()
    named = [t for name, t in texts(figure).items() if name in graph.by_name]
    assert bool(named) == (len(graph.arcs) <= NAMED)
    ax = figure.axes[0]
    to_pixels = lambda points: ax.transData.transform(points)
    flat = [t for t in named if abs(t.get_rotation()) < 2 or t.get_rotation() > 358]
    boxes = [t.get_window_extent() for t in flat]
    curves = [to_pixels(curve) for curve in layout(graph).curves.values()]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        for curve in curves:
            inside = np.all(np.abs(curve - _center(box)) < _half(box), -1)
            assert not inside.any()


def _center(box):
    return np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2


def _half(box):
    return np.array([box.width, 0.5 * box.height]) / 2


def test_nothing_is_clipped(graph):
    figure = draw(graph, {})
    figure.canvas.draw()
    for text in figure.findobj(mpl.text.Text):
        if text.get_text():
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
    assert max(figure.get_size_inches()) < 20


@pytest.mark.parametrize("name", ["lenet", "resnet20", "inputs", "merges", "skips3"])
def test_small_graphs_name_every_arc(name):
    assert set(layout(GRAPHS[name]).names) == set(GRAPHS[name].by_name)


def test_parallel_arcs_lie_on_both_sides():
    places = layout(GRAPHS["resnet20"])
    branch, skip = places.curves["block1/branch"], places.curves["block1/skip"]
    assert branch[:, 1].min() > 0 > skip[:, 1].max()


def test_kept_shares_are_colors():
    graph = GRAPHS["resnet20"]
    kept = {"stem": 0.0, "block1/branch": 0.05, "block2/branch": 0.6}
    figure = draw(graph, kept)
    arrows = patches(figure, FancyArrowPatch)
    weights = (0.3, 0.6, 0.1)
    dark = {name: np.dot(a.get_edgecolor()[:3], weights) for name, a in arrows.items()}
    assert dark["head"] < dark["block2/branch"] < dark["block1/branch"]
    assert dark["head"] == dark["block9/skip"]
    dashed = [name for name, a in arrows.items() if a.get_linestyle() not in SOLID]
    assert dashed == ["stem"]
    red, green, blue, _ = arrows["stem"].get_edgecolor()
    assert red == green == blue
    assert len(figure.axes) == 2


def test_without_shares_there_is_no_colorbar():
    figure = draw(GRAPHS["lenet"])
    assert len(figure.axes) == 1
    colors = {a.get_edgecolor() for a in patches(figure, FancyArrowPatch).values()}
    assert len(colors) == 1


def test_merges_carry_their_names():
    assert {"product", "concat"} <= set(texts(draw(merging())))


def test_long_names_stand_beside_the_node():
    arcs = [Arc("a", "in", "attention_output_12", abs)]
    text = texts(draw(Graph(arcs, "in", "attention_output_12")))["attention_output_12"]
    assert text.get_position()[1] < -RADIUS


def test_names_are_never_formulas():
    figure = draw(Graph([Arc("a$b", "x$", "y_$1$", abs)], "x$", "y_$1$"))
    figure.canvas.draw()
    assert not texts(figure)["a$b"].get_parse_math()


def test_a_graph_without_arcs():
    draw(Graph([], "x", "x"), {}).canvas.draw()


def test_drawing_is_a_function_of_the_graph():
    one, two = (layout(zoo.resnet(20)) for _ in range(2))
    np.testing.assert_equal(one._asdict(), two._asdict())


def test_refuses_unknown_arcs_and_bad_shares():
    with pytest.raises(GraphError, match="no arc named 'nope'"):
        draw(GRAPHS["lenet"], {"nope": 1.0})
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="fc1"):
            draw(GRAPHS["lenet"], {"fc1": bad})


def test_shares_count_what_is_prunable():
    kernel = jnp.arange(12).reshape(3, 4) < 3
    params = {
        "fc1": {"Dense": {"kernel": kernel, "bias": None}},
        "fc2": {"kernel": np.ones((2, 2), bool), "bias": np.array([True, False])},
        "fc3": None,
    }
    shares = arc_shares(GRAPHS["lenet"], {"params": params, "gates": None})
    assert shares == pytest.approx({"fc1": 0.25, "fc2": 5 / 6, "fc3": 1.0})


def test_shares_of_gates():
    graph = all_skips(3)
    gates = {arc.name: np.bool_(arc.name != "h1_h2") for arc in graph.arcs}
    shares = arc_shares(graph, {"params": None, "gates": gates})
    assert shares == {name: float(name != "h1_h2") for name in graph.by_name}


def test_dead_arcs_count_as_nothing():
    graph = all_skips(3)
    gates = {"h1_h2": False, "h1_out": False}
    shares = arc_shares(graph, {"params": None, "gates": gates})
    assert {name for name, share in shares.items() if not share} == {*gates, "in_h1"}
    half = np.array([True, False])
    params = {"in_h2": half, "h2_out": np.zeros(2, bool), "in_h1": half}
    shares = arc_shares(graph, {"params": params, "gates": None})
    assert shares["in_h2"] == shares["h1_h2"] == shares["h2_out"] == 0
    assert shares["in_h1"] == 0.5


def test_shares_refuse_unknown_gates():
    with pytest.raises(GraphError, match="nope"):
        arc_shares(all_skips(2), {"params": None, "gates": {"nope": True}})


def test_shares_draw():
    graph = block(abs, name="only")
    figure = draw(graph, arc_shares(graph, {"params": None, "gates": {"only": True}}))
    assert set(patches(figure, FancyArrowPatch)) == {"only"}
