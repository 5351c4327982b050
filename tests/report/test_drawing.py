"""Drawings of graphs: nothing hides anything, colors say what is kept."""

import io
import itertools
import random

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

import dagjax as dj
from dagjax.graph import zoo
from dagjax.graph.core.combine import block, concat, merge, parallel, residual, series
from dagjax.graph.core.merges import Attention, Concat, Experts, Max, Mean, Product
from dagjax.graph.core.topology import Arc, Graph, GraphError
from dagjax.report.drawing import arc_shares, draw
from dagjax.report.layout import NAMED, RADIUS, layout

mpl.use("agg")
SOLID = ("-", "solid")
TIMES = "\N{MULTIPLICATION SIGN}"


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


def heads():
    """A block of a transformer whose projections are arcs."""
    ports = lambda i: [block(abs, name=f"{port}{i}") for port in "qkv"]
    attended = [series(merge(Attention(), *ports(i)), abs) for i in range(4)]
    return series(residual(parallel(*attended)), residual(abs))


def all_merges():
    parts = [(Max(), 2), (Mean(), 2), (Experts(), 3), (Attention(), 3)]
    return series(*(merge(how, *[abs] * count) for how, count in parts))


def random_graph(nodes, count, seed=0):
    """One input, one output, arcs between random nodes that are not too far apart."""
    rng = random.Random(seed)
    pairs = {(rng.randrange(max(0, i - 12), i), i) for i in range(1, nodes)}
    while len(pairs) < count:
        i, j = sorted(rng.sample(range(nodes), 2))
        if j - i < 15 or rng.random() < 0.2:
            pairs.add((i, j))
    names = [(f"v{i}", f"v{j}") for i, j in sorted(pairs)]
    return graph_of(names, "v0", f"v{nodes - 1}")


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
    "heads": heads(),
    "all_merges": all_merges(),
    "vit": zoo.vit(1, heads=12),
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
    figure = draw(graph, fold=False)
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
    figure = draw(graph, fold=False)
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
    for fold in (False, True):
        assert_inside(draw(graph, {}, fold=fold))
    assert_inside(draw(graph, contributions={graph.arcs[0].name: -1}, fold=True))


def assert_inside(figure):
    figure.canvas.draw()
    for text in figure.findobj(mpl.text.Text):
        if text.get_text():
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
    assert max(figure.get_size_inches()) < 20


@pytest.mark.parametrize(
    "name", ["lenet", "resnet20", "inputs", "merges", "skips3", "heads", "vit"]
)
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


def test_gates_beyond_one_have_a_longer_scale():
    figure = draw(GRAPHS["lenet"], {"fc1": 3.0, "fc2": jnp.zeros(())})
    arrows = patches(figure, FancyArrowPatch)
    assert arrows["fc1"].get_linewidth() > arrows["fc3"].get_linewidth()
    assert arrows["fc2"].get_linestyle() not in SOLID
    bar = figure.axes[1]
    assert bar.get_xlabel() == "gate"
    assert [t.get_text() for t in bar.get_xticklabels()] == ["0", "1", "3"]
    signed = draw(GRAPHS["lenet"], {"fc1": -2.0, "fc2": 0.0}).axes[1]
    assert [t.get_text() for t in signed.get_xticklabels()] == ["-2", "0", "2"]


def test_contributions_are_signed():
    given = {"fc1": np.float32(-2), "fc2": 1}
    figure = draw(GRAPHS["lenet"], contributions=given)
    arrows = patches(figure, FancyArrowPatch)
    (r1, _, b1, _), (r2, _, b2, _), (r3, g3, b3, _) = (
        arrows[name].get_edgecolor() for name in ("fc1", "fc2", "fc3")
    )
    assert b1 > r1  # negative
    assert r2 > b2  # positive
    assert r3 == g3 == b3  # not known
    assert arrows["fc1"].get_linewidth() > arrows["fc2"].get_linewidth()
    assert all(arrow.get_linestyle() in SOLID for arrow in arrows.values())
    assert figure.axes[1].get_xlabel() == "contribution"


def test_contributions_of_gated_arcs():
    given = dict.fromkeys(("fc1", "fc2", "fc3"), 0.0)
    figure = draw(GRAPHS["lenet"], {"fc2": 0}, contributions=given)
    arrows = patches(figure, FancyArrowPatch)
    dashed = [n for n, arrow in arrows.items() if arrow.get_linestyle() not in SOLID]
    assert dashed == ["fc2"]


def test_repeats_are_folded_where_there_are_many_arcs():
    resnet56, resnet20 = GRAPHS["resnet56"], GRAPHS["resnet20"]
    figure = draw(resnet56)
    assert len(patches(figure, FancyArrowPatch)) == 12
    assert [t for t in texts(figure) if t.startswith(TIMES)] == [
        f"{TIMES} 9",
        f"{TIMES} 8",
    ]
    for graph in (resnet56, resnet20):
        for whole in (draw(graph, {}), draw(graph, fold=False)):
            assert set(patches(whole, FancyArrowPatch)) == set(graph.by_name)
    assert len(patches(draw(resnet20), FancyArrowPatch)) == 20
    assert len(patches(draw(resnet20, fold=True), FancyArrowPatch)) == 12


def test_brackets_lie_under_everything():
    figure = draw(zoo.vit(12), fold=True)
    figure.canvas.draw()
    (line,) = figure.axes[0].lines
    low = line.get_window_extent().y1
    arrows = patches(figure, FancyArrowPatch).values()
    assert all(arrow.get_window_extent().y0 > low for arrow in arrows)
    others = [text for name, text in texts(figure).items() if name[0] != TIMES]
    assert all(text.get_window_extent().y0 > low for text in others)


def test_folded_arcs_show_the_mean_of_their_copies():
    graph = GRAPHS["resnet56"]
    branches = [f"block{i}/branch" for i in range(1, 10)]
    arrow = lambda gates: patches(draw(graph, gates, fold=True), FancyArrowPatch)[
        "block1/branch"
    ]
    some = arrow(dict.fromkeys(branches[:3], 0.0))
    assert some.get_linewidth() == pytest.approx(1.0 + 1.2 * 6 / 9)
    assert some.get_linestyle() in SOLID
    assert arrow(dict.fromkeys(branches, 0.0)).get_linestyle() not in SOLID
    cancel = arrow({name: (i - 4) / 4 for i, name in enumerate(branches)})
    assert cancel.get_linestyle() in SOLID


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


def test_long_names_are_inside_the_picture():
    arcs = [Arc("b", "attention_output_12", "attention_output_13", abs)]
    assert_inside(draw(Graph(arcs, "attention_output_12", "attention_output_13")))
    many = [(f"block{i:03d}/residual", f"block{i + 1:03d}/residual") for i in range(50)]
    figure = draw(graph_of(many, many[0][0], many[-1][1]), fold=False)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts(figure).values()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_svg_has_text_as_text_and_is_the_same_each_time():
    def svg():
        file = io.StringIO()
        figure = draw(GRAPHS["resnet20"], {"stem": 0})
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()

    one = svg()
    assert ">block1/branch</text>" in one
    assert 'id="block1/branch"' in one
    assert len(one) < 60_000
    assert svg() == one


def test_takes_a_network():
    graph = dj.series(dj.flatten, abs)
    dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 2, 2)))
    assert set(patches(dj.draw(dag), FancyArrowPatch)) == {"flatten", "abs"}


def test_large_graphs_are_drawn_quickly():
    graph = random_graph(250, 500)
    figure = draw(graph)
    assert set(patches(figure, FancyArrowPatch)) == set(graph.by_name)
    assert set(texts(figure)) == set(graph.nodes)


def test_deep_graphs_are_zoomed_out():
    chain = graph_of(itertools.pairwise(f"n{i}" for i in range(200)), "n0", "n199")
    figure = draw(chain, fold=False)
    assert max(figure.get_size_inches()) == pytest.approx(40)
    assert_inside_width(figure)


def assert_inside_width(figure):
    figure.canvas.draw()
    ends = [texts(figure)[name].get_window_extent() for name in ("n0", "n199")]
    assert ends[0].x0 >= 0
    assert ends[1].x1 <= figure.bbox.x1


def test_names_are_never_formulas():
    figure = draw(Graph([Arc("a$b", "x$", "y_$1$", abs)], "x$", "y_$1$"))
    figure.canvas.draw()
    assert not texts(figure)["a$b"].get_parse_math()


def test_a_graph_without_arcs():
    draw(Graph([], "x", "x"), {}).canvas.draw()


def test_drawing_is_a_function_of_the_graph():
    one, two = (layout(zoo.resnet(20)) for _ in range(2))
    np.testing.assert_equal(one._asdict(), two._asdict())


@pytest.mark.parametrize("what", ["gates", "contributions"])
def test_refuses_unknown_arcs_and_what_is_no_number(what):
    graph = GRAPHS["lenet"]
    with pytest.raises(GraphError, match="no arc named 'nope'"):
        draw(graph, **{what: {"nope": 1.0}})
    for bad, said in {
        "nan": "finite number", "inf": "finite number", "x": "is 'x'", None: "nan",
    }.items():  # fmt: skip
        value = float(bad) if bad in ("nan", "inf") else bad
        with pytest.raises(ValueError, match=said) as caught:
            draw(graph, **{what: {"fc1": value}})
        assert f"{what}['fc1']" in str(caught.value)
    with pytest.raises(ValueError, match=r"'fc1'\] is an array \[3\]"):
        draw(graph, **{what: {"fc1": jnp.ones(3)}})


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
