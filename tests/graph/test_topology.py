"""Nodes, levels, paths, live arcs; errors that name what is wrong."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dagjax as dj
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def graph(arcs, inputs="x", outputs="y", **options):
    """`{name: "xy"}` or `{name: ("x", "y", port)}` as a graph."""
    made = [dj.Arc(n, *ends[:2], jnp.tanh, *ends[2:]) for n, ends in arcs.items()]
    return dj.Graph(made, inputs, outputs, **options)


def nx_of(graph):
    edges = networkx.MultiDiGraph()
    edges.add_nodes_from(graph.nodes)
    for arc in graph.arcs:
        edges.add_edge(arc.source, arc.target, key=arc.name)
    return edges


def paths(graph, on=None):
    """All paths from inputs to outputs, as tuples of arcs, by brute force."""
    arcs = [a for a in graph.arcs if on is None or a.name in on]

    def onward(node):
        if node in graph.outputs:
            yield ()
        for arc in arcs:
            if arc.source == node:
                yield from ((arc.name, *rest) for rest in onward(arc.target))

    return [path for node in graph.inputs for path in onward(node)]


# --- levels, paths, live arcs -----------------------------------------------------


@given(plan=nets.plans())
def test_levels_against_networkx(plan):
    graph = plan.graph
    rows = networkx.topological_generations(nx_of(graph))
    want = {node: level for level, row in enumerate(rows) for node in row}
    assert graph.levels == want
    assert graph.depth == networkx.dag_longest_path_length(nx_of(graph))
    assert list(graph.levels.values()) == sorted(graph.levels.values())
    for level, arcs in enumerate(graph.at_level):
        assert all(graph.levels[arc.target] == level for arc in arcs)
    assert sum(map(len, graph.at_level)) == len(graph.arcs)


@given(plan=nets.plans(max_nodes=9))
def test_count_paths_by_brute_force(plan):
    graph = plan.graph
    assert dj.count_paths(graph) == len(paths(graph))
    nodes = {node: i for i, node in enumerate(graph.nodes)}
    count = np.zeros((len(nodes), len(nodes)))
    for arc in graph.arcs:
        count[nodes[arc.target], nodes[arc.source]] += 1
    inverse = np.linalg.inv(np.eye(len(nodes)) - count)
    ends = itertools.product(graph.outputs, graph.inputs)
    total = sum(inverse[nodes[t], nodes[s]] for t, s in ends)
    assert dj.count_paths(graph) == round(total)


def test_count_paths_does_not_overflow():
    arcs = {f"{i}{k}": (f"n{i}", f"n{i + 1}") for i in range(100) for k in "ab"}
    assert dj.count_paths(graph(arcs, "n0", "n100")) == 2**100


@given(plan=nets.plans(max_nodes=9), data=st.data())
def test_live_arcs_by_brute_force(plan, data):
    graph = plan.graph
    names = [arc.name for arc in graph.arcs]
    off = set(data.draw(st.lists(st.sampled_from(names), max_size=5)))
    gates = dict.fromkeys(off, 0.0) | dict.fromkeys(names[:1], jnp.ones(()))
    on = {name for name in names if name not in gates or float(gates[name]) != 0}
    live = {arc for path in paths(graph, on) for arc in path}
    assert dj.live_arcs(graph, gates) == tuple(n for n in names if n in live)


def test_live_arcs_with_all_on_and_unknown_names():
    g = graph({"a": "xh", "b": "hy", "dead": "xk"})
    assert dj.live_arcs(g) == ("a", "b")
    assert dj.live_arcs(g, {"a": 0}) == ()
    with pytest.raises(dj.GraphError, match="no arc named 'c'; the arcs are a"):
        dj.live_arcs(g, {"c": 0.0})


# --- order and equality -----------------------------------------------------------


@given(plan=nets.plans(max_nodes=7), data=st.data())
def test_order_of_arcs_does_not_matter(plan, data):
    g = plan.graph
    arcs = data.draw(st.permutations(g.arcs))
    again = dj.Graph(arcs, g.inputs, g.outputs, g.merges)
    assert again == g
    assert hash(again) == hash(g)
    assert again.arcs == g.arcs
    assert again.levels == g.levels


def test_names_are_ordered_as_people_count():
    names = ["conv_10", "conv_9", "conv_2", "fc"]
    g = graph(dict.fromkeys(names, "xy"))
    assert [arc.name for arc in g.arcs] == ["conv_2", "conv_9", "conv_10", "fc"]


def test_graphs_that_differ():
    g = graph({"a": "xh", "b": "hy", "c": "hy"})
    assert g != graph({"a": "xh", "b": "hy"})
    assert g != graph({"a": "xh", "b": "hy", "d": "hy"})
    assert g != graph({"a": "xh", "b": "hy", "c": "xy"})
    assert g != g.replace(outputs=["y", "h"])
    assert g != g.replace(merges={"k": dj.Concat()}, arcs=[*g.arcs, _into_k()])


def _into_k():
    return dj.Arc("k", "x", "k", jnp.tanh, 0)


def test_select():
    g = graph({"a": "xh", "b": "hy"})
    assert [arc.name for arc in g.select(["b", "a"])] == ["a", "b"]
    assert [arc.name for arc in g.select("b")] == ["b"]
    with pytest.raises(dj.GraphError, match="no arc named 'z'; the arcs are a, b"):
        g.select(["a", "z"])


# --- errors -----------------------------------------------------------------------


def test_cycle_is_printed():
    arcs = {"a": "xh", "b": "hk", "back": "kh", "c": "ky"}
    with pytest.raises(dj.GraphError, match="cycle") as caught:
        graph(arcs)
    said = str(caught.value)
    assert "h -[b]-> k -[back]-> h" in said or "k -[back]-> h -[b]-> k" in said
    with pytest.raises(dj.GraphError, match=r"h -\[loop\]-> h"):
        graph({"a": "xh", "loop": "hh", "c": "hy"})


BAD = {
    "two arcs": (
        lambda: dj.Graph(
            [dj.Arc("a", "x", "h", abs), dj.Arc("a", "h", "y", abs)], "x", "y"
        ),
        "two arcs are named 'a'",
    ),
    "two inputs": (lambda: graph({"a": "xy"}, ["x", "x"]), "two inputs .* 'x'"),
    "two outputs": (lambda: graph({"a": "xy"}, "x", "yy"), "no node named 'yy'"),
    "outputs twice": (lambda: graph({"a": "xy"}, "x", ["y", "y"]), "two outputs .*'y'"),
    "unknown output": (
        lambda: graph({"a": "xh"}),
        "no node named 'y'; the nodes are h, x",
    ),
    "unreachable output": (
        lambda: graph({"a": "xh", "b": "ky"}),
        "no path from x to the output 'y'; reached are x, h",
    ),
    "into an input": (
        lambda: graph({"a": "xz", "b": "zy"}, ["x", "z"]),
        "arc 'a' leads into the input node 'z'",
    ),
    "no input": (lambda: graph({"a": "xy"}, []), "at least one input"),
    "no output": (lambda: graph({"a": "xy"}, "x", []), "one output node"),
    "unknown merge": (
        lambda: graph({"a": "xy"}, merges={"z": dj.Concat()}),
        "no node named 'z'",
    ),
    "port of a sum": (
        lambda: graph({"a": ("x", "y", 0)}),
        "arc 'a' writes port 0 of 'y', a sum node",
    ),
    "no port": (
        lambda: graph({"a": "xy"}, merges={"y": dj.Concat()}),
        r"arc 'a' leads into 'y', a Concat\(axis=-1\) node, and needs a port",
    ),
    "negative port": (
        lambda: graph({"a": ("x", "y", -1)}, merges={"y": dj.Product()}),
        "needs a port 0, 1, ...; got -1",
    ),
    "port twice": (
        lambda: graph(
            {"a": ("x", "y", 0), "b": ("x", "y", 0)}, merges={"y": dj.Product()}
        ),
        r"arcs a, b write one port \(0\) of 'y'",
    ),
    "merge at an input": (
        lambda: graph({"a": "xy"}, merges={"x": dj.Concat()}),
        "'x'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_graphs_that_cannot_be(kind):
    make, message = BAD[kind]
    with pytest.raises(dj.GraphError, match=message):
        make()


def test_sum_of_different_shapes_names_arcs_and_shapes():
    with pytest.raises(dj.GraphError, match="sums different shapes") as caught:
        dj.init(
            jax.random.key(0),
            dj.parallel(nn.Dense(3, name="wide"), nn.Dense(2, name="slim")),
            jnp.ones((4, 5)),
        )
    said = str(caught.value)
    for part in ("'out'", "wide", "slim", "(4, 2)", "(4, 3)"):
        assert part in said


def test_node_that_nothing_feeds_is_named():
    """A slip in the name of a source: neither an input nor the target of an arc."""
    with pytest.raises(dj.GraphError, match="'hh'") as caught:
        dj.init(jax.random.key(0), graph({"a": "xy", "b": ("hh", "y")}), jnp.ones(3))
    assert "dagjax.init finds it" not in str(caught.value)


def test_hole_in_the_ports_is_named():
    holey = {"a": ("x", "y", 0), "b": ("x", "y", 2)}
    build = lambda: nets.build(graph(holey, merges={"y": dj.Concat()}), ((3,),))
    with pytest.raises(dj.GraphError, match="'y'") as caught:
        build()
    assert "port" in str(caught.value)
    assert "1" in str(caught.value)


@pytest.mark.parametrize("widths", [(3, 4), (3, 1)])
def test_product_of_different_shapes_is_refused(widths):
    factors = [nn.Dense(width, name=f"f{width}") for width in widths]
    with pytest.raises(dj.GraphError, match="'out'"):
        dj.init(jax.random.key(0), dj.product(*factors), jnp.ones((2, 5)))


def test_concat_of_different_ranks_is_refused():
    parts = dj.concat(nn.Dense(3, name="flat"), lambda x: x[:, None])
    with pytest.raises(dj.GraphError, match="'out'"):
        dj.init(jax.random.key(0), parts, jnp.ones((2, 5)))


def test_wrong_number_of_inputs():
    case = nets.build(graph({"a": "xy", "b": "zy"}, ["x", "z"]), ((3,), (3,)))
    with pytest.raises(dj.GraphError, match=r"2 inputs \(x, z\), got 1"):
        case.dag(case.xs[0])


def test_error_of_an_arc_names_it():
    bad = dj.series(nn.Dense(3), dj.block(lambda x: x @ jnp.ones((7, 2)), name="bad"))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - XLA's own type
        dj.init(jax.random.key(0), bad, jnp.ones((2, 5)))
    notes = "\n".join(caught.value.__notes__)
    assert "Arc('bad'" in notes
    assert "float32[2, 3]" in notes


def test_arc_must_return_an_array():
    with pytest.raises(dj.GraphError, match="must return one array, got tuple"):
        dj.init(jax.random.key(0), dj.series(lambda x: (x, x)), jnp.ones((2, 3)))


@pytest.mark.parametrize("ranks", [{"x": -1}, {"h": 2.5}, {"x": 1}, {"lost": 1}])
def test_ranks_are_checked(ranks):
    arcs = [dj.Arc("a", "x", "h", abs), dj.Arc("b", "h", "y", abs)]
    assert dj.Graph(arcs, "x", "y", ranks={"h": 3}).levels == {"x": 0, "h": 3, "y": 4}
    with pytest.raises(dj.GraphError, match=r"whole number|no node named 'lost'"):
        dj.Graph(arcs, "x", "y", ranks=ranks)
