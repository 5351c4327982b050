"""Repeated blocks folded to one: what counts as equal, and what must stay."""

import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import dagjax as dj
from dagjax.graph.core.merges import Concat, Max
from dagjax.graph.core.topology import Arc, Graph
from dagjax.graph.rewrite.folding import cut_nodes, fold, runs


def chain(*fns):
    """Arcs `a0, a1, ...` from `n0`."""
    arcs = [Arc(f"a{i}", f"n{i}", f"n{i + 1}", fn) for i, fn in enumerate(fns)]
    return Graph(arcs, "n0", f"n{len(fns)}")


def attention(features=8, heads=2):
    ports = [dj.block(nn.Dense(features), name=name) for name in "qkv"]
    attended = dj.series(dj.merge(dj.Attention(), *ports), nn.Dense(features))
    block = dj.series(
        dj.residual(dj.parallel(*[attended] * heads)), dj.residual(nn.Dense(features))
    )
    return block


def shuffled(graph, seed=0):
    """The same graph under other names, in another order."""
    rng = random.Random(seed)
    inner = [n for n in graph.nodes if n not in (*graph.inputs, *graph.outputs)]
    nodes = dict(zip(inner, rng.sample(range(1000), len(inner)), strict=True))
    called = lambda node: f"m{nodes[node]}" if node in nodes else node
    numbers = rng.sample(range(1000), len(graph.arcs))
    arcs = [
        Arc(f"r{i}", called(a.source), called(a.target), a.fn, a.port)
        for i, a in zip(numbers, graph.arcs, strict=True)
    ]
    merges = {called(node): merge for node, merge in graph.merges}
    return Graph(rng.sample(arcs, len(arcs)), graph.inputs, graph.outputs, merges)


def check(graph, folded):
    """What holds of every fold."""
    small, counts, copies = folded
    assert set(copies) == set(small.by_name) <= set(graph.by_name)
    every = [name for own in copies.values() for name in own]
    assert sorted(every) == sorted(graph.by_name)
    for name, own in copies.items():
        assert own[0] == name
        assert len({graph.by_name[copy].fn for copy in own}) == 1
        assert len({graph.by_name[copy].port for copy in own}) == 1
    assert {*small.inputs} == {*graph.inputs}
    assert {*small.outputs} == {*graph.outputs}
    for first, last in counts:
        assert small.levels[first] < small.levels[last]
    return small


def test_stages_of_a_resnet():
    graph = dj.zoo.resnet(56)
    folded = fold(graph)
    small = check(graph, folded)
    assert folded.counts == {("n1", "n10"): 9, ("n11", "n19"): 8, ("n20", "n28"): 8}
    assert len(small.arcs) == 12
    assert folded.copies["block1/skip"] == tuple(f"block{i}/skip" for i in range(1, 10))
    assert small.by_name["block1/skip"].target == "n10"


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_a_transformer_under_any_names(seed):
    ends = (nn.Embed(5, 8), *[attention()] * 6, nn.Dense(5))
    graph = shuffled(dj.series(*ends), seed)
    folded = fold(graph)
    small = check(graph, folded)
    assert list(folded.counts.values()) == [6]
    assert len(small.arcs) == 2 + len(attention().arcs)
    assert dj.count_paths(small) == dj.count_paths(attention())


def test_a_long_chain_is_one_arc():
    folded = fold(chain(*[abs] * 300))
    assert folded.counts == {("n0", "n300"): 300}
    assert folded.graph.depth == 1


@pytest.mark.parametrize(
    "graph",
    [
        chain(abs, jnp.sin, abs),
        dj.residual(dj.series(abs, abs)),
        dj.parallel(abs, abs),
        Graph([], "x", "x"),
        Graph([Arc("a", "x", "z", abs), Arc("b", "y", "z", abs)], ["x", "y"], "z"),
    ],
)
def test_without_repeats_nothing_changes(graph):
    folded = fold(graph)
    assert folded.graph is graph
    assert not folded.counts
    check(graph, folded)


def test_other_functions_wiring_ports_or_merges_are_not_equal():
    one = dj.merge(Concat(), dj.block(abs, name="a"), dj.block(jnp.sin, name="b"))
    two = dj.merge(Concat(), dj.block(jnp.sin, name="b"), dj.block(abs, name="a"))
    three = dj.merge(Max(), dj.block(abs, name="a"), dj.block(jnp.sin, name="b"))
    assert fold(dj.series(one, one, abs)).counts
    assert not fold(dj.series(one, two, abs)).counts
    assert not fold(dj.series(one, three, abs)).counts
    assert not fold(dj.series(nn.Dense(3), nn.Dense(4))).counts
    wide = dj.parallel(dj.series(abs, abs), dj.series(abs, abs))
    deep = dj.residual(dj.series(abs, abs), dj.series(abs, abs))
    assert fold(dj.series(wide, deep)).counts  # alike, though built in two ways
    crossed = dj.parallel(dj.series(abs, dj.parallel(abs, abs)), abs)
    assert not fold(dj.series(wide, crossed)).counts


def test_wiring_that_only_looks_alike_is_not_equal():
    """Two arcs into and out of every node, but one ring or two."""

    def part(i, pairs):
        ends = {"s": f"cut{i}", "t": f"cut{i + 1}"}
        at = lambda node: ends.get(node, f"{node}{i}")
        pairs = ["sa", "sb", "sc", *pairs, "dt", "et", "ft"]
        return [Arc(f"{i}{n}", at(u), at(v), abs) for n, (u, v) in enumerate(pairs)]

    ring = ["ad", "ae", "be", "bf", "cf", "cd"]
    turned = ["bd", "be", "ce", "cf", "af", "ad"]
    rings = ["ad", "ae", "bd", "be", "cf", "cf"]
    other = lambda pairs: Graph(part(0, ring) + part(1, pairs), "cut0", "cut2")
    assert fold(other(turned)).counts == {("cut0", "cut2"): 2}
    assert not fold(other(rings)).counts


def test_outputs_stay():
    arcs = [Arc(f"a{i}", f"n{i}", f"n{i + 1}", abs) for i in range(6)]
    graph = Graph(arcs, "n0", ["n3", "n6"])
    folded = fold(graph)
    check(graph, folded)
    assert folded.counts == {("n0", "n3"): 3, ("n3", "n6"): 3}


def test_outputs_inside_of_blocks_stay():
    block = lambda i: [
        Arc(f"u{i}", f"c{i}", f"m{i}", abs), Arc(f"v{i}", f"m{i}", f"c{i + 1}", abs),
        Arc(f"w{i}", f"c{i}", f"c{i + 1}", abs),
    ]  # fmt: skip
    arcs = [arc for i in range(4) for arc in block(i)]
    graph = Graph(arcs, "c0", ["m1", "c4"])
    folded = fold(graph)
    check(graph, folded)
    assert folded.counts == {("c2", "c4"): 2}


def test_known_shapes_count():
    graph = dj.series(*[nn.Dense(8)] * 4)
    assert fold(graph).counts == {("in", "out"): 4}
    dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 3)))
    folded = fold(dag.graph)
    assert folded.counts == {("n1", "out"): 3}
    assert set(folded.graph.space_of) == set(folded.graph.nodes)


def test_cut_nodes_are_passed_by_no_arc():
    arcs = [Arc("a", "x", "h", abs), Arc("b", "h", "k", abs), Arc("c", "k", "y", abs)]
    assert cut_nodes(Graph(arcs, "x", "y")) == ("x", "h", "k", "y")
    skip = [*arcs, Arc("skip", "x", "k", abs)]
    assert cut_nodes(Graph(skip, "x", "y")) == ("x", "k", "y")
    side = [*arcs, Arc("side", "h", "dead", abs)]
    assert cut_nodes(Graph(side, "x", "y")) == ("x", "h", "y")


@pytest.mark.parametrize(
    ("keys", "left"),
    [("", 0), ("a", 1), ("aa", 1), ("abab", 2), ("ababa", 3), ("aabaab", 3),
     ("baaaabaaaa", 4), ("abcabcabcd", 4), ("aaaaab", 2)],
)  # fmt: skip
def test_as_few_segments_as_possible_are_left(keys, left):
    found = list(runs(keys))
    assert len(keys) - sum(period * (times - 1) for _, period, times in found) == left
    ends = [0, *(at + period * times for at, period, times in found)]
    assert all(at >= end for (at, _, _), end in zip(found, ends, strict=False))
    for at, period, times in found:
        block = keys[at : at + period]
        assert keys[at : at + period * times] == block * times
