"""Law 12: nodes, arcs, levels, paths and sub-architectures are counted exactly.

The oracle enumerates: all paths by recursion, all sets of arcs by their definition
(every arc on a path from an input to an output within the set).
"""

import itertools

import flax.linen as nn
import pytest
from hypothesis import given

import dagjax as dj
from tests.graph import nets


def series_of(*widths):
    """A chain of blocks, each of some arcs in parallel."""
    blocks = [
        dj.parallel(*(dj.block(nn.Dense(3), name=f"b{i}") for i in range(w)))
        for w in widths
    ]
    return dj.series(*blocks)


def transformer(blocks, heads=4):
    one = dj.zoo.transformer_block(heads, 2 * heads)
    return dj.series(*[one] * blocks)


inception = dj.zoo.inception_module()

# graph -> nodes, arcs, levels, paths, sub-architectures
TABLE = {
    "mlp": (series_of(1, 1, 1, 1), (5, 4, 4, 1, 1)),
    "resnet20": (dj.zoo.resnet(20), (12, 20, 11, 512, 19683)),
    "dense block": (dj.zoo.dense_block(4, 3), (5, 10, 4, 8, 159)),
    "dense block, readout": (
        dj.zoo.dense_block(4, 3, readout=True), (6, 15, 5, 16, 3903),
    ),
    "unet 2": (dj.zoo.unet_core(2), (5, 6, 4, 3, 7)),
    "unet 3": (dj.zoo.unet_core(3), (7, 9, 6, 4, 15)),
    "unet 4": (dj.zoo.unet_core(4), (9, 12, 8, 5, 31)),
    "inception": (inception, (6, 8, 2, 4, 15)),
    "inception x2": (dj.series(inception, inception), (11, 16, 4, 16, 225)),
    "transformer": (transformer(1), (3, 7, 2, 10, 93)),
    "transformer x2": (transformer(2), (5, 14, 4, 100, 8649)),
}  # fmt: skip


def counts(graph):
    return (
        len(graph.nodes), len(graph.arcs), graph.depth,
        dj.count_paths(graph), dj.count_subgraphs(graph),
    )  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    graph, want = TABLE[name]
    assert counts(graph) == want


def enumerated_paths(graph):
    ends = lambda arc: (
        [arc.target in graph.outputs]
        + [end for a in graph.arcs if a.source == arc.target for end in ends(a)]
    )
    starts = [arc for arc in graph.arcs if arc.source in graph.inputs]
    trivial = len({*graph.inputs} & {*graph.outputs})
    return trivial + sum(sum(ends(arc)) for arc in starts)


def enumerated_subgraphs(graph, needs_start=True):
    """Non-empty sets in which every arc lies on a path; the mutant needs no start."""
    found = 0
    for bits in itertools.product([False, True], repeat=len(graph.arcs)):
        arcs = [arc for arc, bit in zip(graph.arcs, bits, strict=True) if bit]
        heads = {*graph.inputs} | {arc.target for arc in arcs}
        tails = {*graph.outputs} | {arc.source for arc in arcs}
        started = all(arc.source in heads for arc in arcs) or not needs_start
        found += bool(arcs) and started and all(arc.target in tails for arc in arcs)
    return found


@given(plan=nets.plans(max_nodes=7))
def test_random(plan):
    graph = plan.graph
    if len(graph.arcs) > 10:
        kept = graph.arcs[:10]  # the lowest ones
        fed = {arc.target for arc in kept}
        merges = {node: merge for node, merge in graph.merges if node in fed}
        graph = dj.Graph(kept, graph.inputs, kept[-1].target, merges)
    assert dj.count_paths(graph) == enumerated_paths(graph)
    assert dj.count_subgraphs(graph) == enumerated_subgraphs(graph)
    assert dj.count_subgraphs(graph) == len({*dj.subgraphs(graph)})


def test_closed_forms():
    """Of graphs too large to enumerate, beyond 64 bits."""
    deep = series_of(*[2] * 200)
    assert dj.count_paths(deep) == 2**200
    assert dj.count_subgraphs(deep) == 3**200
    complete = dj.zoo.dense_block(9, 3)
    assert dj.count_paths(complete) == 2**8
    assert dj.count_subgraphs(transformer(6, heads=12)) == (3 * (2**13 - 1)) ** 6


def test_mutant():
    """A set that is not connected to the input is no sub-architecture."""
    graph = dj.zoo.dense_block(3, 3)
    assert dj.count_subgraphs(graph) == enumerated_subgraphs(graph)
    assert dj.count_subgraphs(graph) != enumerated_subgraphs(graph, needs_start=False)


def test_networks_count_as_their_graphs():
    case = nets.zoo("two_streams")
    assert dj.count_paths(case.dag) == dj.count_paths(case.dag.graph)
    assert dj.count_subgraphs(case.dag) == enumerated_subgraphs(case.dag.graph)


def test_limits():
    with pytest.raises(dj.GraphError, match="count_subgraphs counts without"):
        next(dj.subgraphs(dj.zoo.dense_block(7, 3)))
