"""The table of a network, and its counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import dagjax as dj
from dagjax.graph.core.show import summary
from tests.graph import nets


def table(capsys, *args):
    dj.show(*args)
    return capsys.readouterr().out.rstrip("\n").split("\n")


def test_every_arc_has_a_line(capsys):
    case = nets.zoo("resnet8")
    lines = table(capsys, case.dag)
    assert lines[0].split()[:4] == ["level", "node", "shape", "arc"]
    assert len(lines) == 1 + 1 + len(case.dag.graph.arcs) + 1
    for arc in case.dag.graph.arcs:
        (line,) = [line for line in lines if f" {arc.name} " in line]
        count = sum(p.size for p in jax.tree.leaves(case.dag.params.get(arc.name, {})))
        assert f" {count:,} " in line
    assert lines[-1] == summary(case.dag)


def test_graph_that_knows_its_input_needs_no_example(capsys):
    graph = dj.zoo.lenet_300_100()
    assert table(capsys, graph) == table(capsys, graph, jnp.ones((2, 28, 28, 1)))
    assert "266,610 parameters" in table(capsys, graph)[-1]


def test_unknown_shapes_stay_open(capsys):
    graph = dj.series(nn.Dense(3), nn.relu)
    bare, known = table(capsys, graph), table(capsys, graph, jnp.ones((2, 4)))
    assert "?" in bare[1]
    assert "[B, 4]" in known[1]
    assert bare[-1] == "3 nodes, 2 arcs, 2 levels, 1 path"
    assert known[-1] == "3 nodes, 2 arcs, 2 levels, 1 path, 15 parameters"


def test_merges_show_ports(capsys):
    lines = table(capsys, nets.zoo("two_streams").dag)
    (both,) = [line for line in lines if line.split()[1] == "both"]
    assert "[B, 2] | [B, 4]" in both
    assert any("l [0]" in line for line in lines)
    assert any("h [1]" in line for line in lines)


def test_nodes_without_arcs_are_shown(capsys):
    dag = dj.delete(nets.zoo("mlp").dag, "fc2")
    lines = table(capsys, dag)
    assert any(line.split()[:2] == ["0", "n2"] for line in lines)
    assert "fc2" not in "\n".join(lines)


@pytest.mark.parametrize("name", nets.ZOO)
def test_no_addresses_and_no_trailing_blanks(name, capsys):
    for line in table(capsys, nets.zoo(name).dag):
        assert "0x" not in line
        assert line == line.rstrip()


@pytest.mark.parametrize(
    ("graph", "counts"),
    [
        (dj.zoo.resnet(8), "6 nodes, 8 arcs, 5 levels, 8 paths"),
        (dj.zoo.resnet(20), "12 nodes, 20 arcs, 11 levels, 512 paths"),
        (dj.zoo.lenet_300_100(), "4 nodes, 3 arcs, 3 levels, 1 path"),
        (dj.zoo.lenet5(), "6 nodes, 5 arcs, 5 levels, 1 path"),
        (dj.zoo.conv2(), "6 nodes, 5 arcs, 5 levels, 1 path"),
        (dj.zoo.conv4(), "8 nodes, 7 arcs, 7 levels, 1 path"),
        (dj.zoo.conv6(), "10 nodes, 9 arcs, 9 levels, 1 path"),
        (nets.dense_block(), "5 nodes, 10 arcs, 4 levels, 8 paths"),
    ],
)
def test_counts(graph, counts):
    assert summary(graph).startswith(counts)


# Frankle & Carbin (2019), figure 2; LeNet-5 and ResNets of the literature.
@pytest.mark.parametrize(
    ("graph", "parameters"),
    [
        (dj.zoo.lenet_300_100(), 266_610),
        (dj.zoo.lenet5(), 61_706),
        (dj.zoo.conv2(), 4_301_642),
        (dj.zoo.conv4(), 2_425_930),
        (dj.zoo.conv6(), 2_262_602),
        (dj.zoo.resnet(20), 272_474),
    ],
)
def test_parameters_of_the_literature(graph, parameters):
    assert summary(graph).endswith(f", {parameters:,} parameters")


def test_zoo_by_name():
    assert dj.zoo.by_name("resnet8", classes=3) == dj.zoo.resnet(8, 3)
    assert dj.zoo.by_name("mlp", input_shape=(4,)) == dj.zoo.mlp(input_shape=(4,))
    with pytest.raises(ValueError, match="no net named 'vgg'; nets are mlp, lenet"):
        dj.zoo.by_name("vgg")
    for depth in (7, 9, 2):
        with pytest.raises(ValueError, match=f"resnet depth {depth}"):
            dj.zoo.resnet(depth)
