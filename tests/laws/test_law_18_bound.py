"""Law 18: what pruning arcs can do to an output is bounded by norms of paths.

With `Lip(e)` the Lipschitz constants, `|N|` the matrix of their sums and
`Lambda = (I - |N|)^-1`,

    |h_t - h_t^pruned| <= sum over pruned u -> v of Lambda_tv |f_e(h_u)|,

Lambda of the pruned graph with values of the dense one, or the other way round.
(2.8 of the reconstruction; arcs go from the output to the input, or from the input.)
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from tests.graph import nets

WIDTH, TRIALS = 5, 12


@pytest.fixture(scope="module", autouse=True)
def double():
    with nets.precision("float64"):
        yield


def dense(activation=None, after=None):
    """A layer and its twin in numpy."""
    parts = [f for f in (activation, nn.Dense(WIDTH), after) if f is not None]
    numpy = {nn.relu: lambda x: np.maximum(x, 0), jnp.tanh: np.tanh, None: lambda x: x}

    def twin(params, x):
        own = params.get("Dense", params)
        y = numpy[activation](x) @ np.asarray(own["kernel"]) + np.asarray(own["bias"])
        return numpy[after](y)

    return dj.block(*parts), twin


def random_net(seed):
    """Six nodes, every later one reads some of the earlier ones, one of them twice."""
    rng = np.random.default_rng([seed, 18])
    made = {("again", 0, 5): dense(after=jnp.tanh)}
    for j in range(1, 6):
        sources = {j - 1, *np.flatnonzero(rng.random(j) < 0.5).tolist()}
        for i in sources:
            made[f"a{i}{j}", i, j] = dense(nn.relu if i else None)
    made["skip", 1, 4] = dj.identity, lambda _, x: x
    arcs = [dj.Arc(n, f"n{i}", f"n{j}", fn) for (n, i, j), (fn, _) in made.items()]
    functions = {name: twin for (name, _, _), (_, twin) in made.items()}
    graph = dj.Graph(arcs, "n0", "n5")
    return nets.build(graph, ((WIDTH,),), "float64", seed, functions)


NETS = {
    **{f"random{i}": lambda i=i: random_net(i) for i in range(4)},
    "lenet5": lambda: nets.zoo("lenet5", "float64"),
    "resnet8": lambda: nets.zoo("resnet8", "float64"),
}


def lipschitz(own, state):
    """An upper bound of an arc: its layers one after the other.

    Relu, tanh and the mean of a window have 1; a convolution at most the sum of the
    norms of its kernel over the window; batch norm its largest factor.
    """
    words = lambda path: [str(getattr(key, "key", key)) for key in path]
    named = lambda tree: [
        (words(path), np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    total = 1.0
    for path, x in named(own):
        if path[-1] == "kernel":
            total *= sum(np.linalg.norm(k, 2) for k in x.reshape(-1, *x.shape[-2:]))
        elif path[-1] == "scale":
            (var,) = [v for at, v in named(state) if at[-1] == "var" and path[-2] in at]
            total *= np.max(np.abs(x) / np.sqrt(var + 1e-5))
    return float(total)


def constants(case):
    """`{arc: Lip}`."""
    params, state = case.dag.params, case.dag.state
    return {
        arc.name: lipschitz(params.get(arc.name, {}), state.get(arc.name, {}))
        for arc in case.dag.graph.arcs
    }


def path_norms(graph, lip, kept):
    """`(I - |N|)^-1` of the arcs that are kept, in numpy."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    n = np.zeros((len(place), len(place)))
    for arc in graph.arcs:
        n[place[arc.target], place[arc.source]] += lip[arc.name] * kept[arc.name]
    return place, np.linalg.inv(np.eye(len(place)) - n)


def values(case, gates=None):
    """Of all nodes, and what every arc delivers when it is on."""
    h = case.oracle(dj.inject(case.dag, *case.xs), gates)
    return h, {a.name: case.arc(a, h[a.source]) for a in case.dag.graph.arcs}


def sizes(x):
    """`[B]`, the norm of each example."""
    return np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)


def summed(graph, pruned, place, paths, delivered):
    """`[nodes, B]`: the right side of the bound."""
    terms = [
        paths[:, [place[arc.target]]] * sizes(delivered[arc.name])
        for arc in graph.arcs
        if arc.name in pruned
    ]
    return np.sum(terms, 0)


class Sides(NamedTuple):
    """The change of every node, the two bounds on it, and mutants: `[nodes, B]`."""

    change: np.ndarray
    bounds: tuple[np.ndarray, np.ndarray]
    local: np.ndarray  # what arcs do on the way is left out
    both: np.ndarray  # pruned values and pruned paths


def sides(case, pruned, dense=None):
    graph, lip = case.dag.graph, constants(case)
    gates = {arc.name: float(arc.name not in pruned) for arc in graph.arcs}
    (h, ys), (cut, cut_ys) = dense or values(case), values(case, gates)
    place, few = path_norms(graph, lip, gates)
    _, all_ = path_norms(graph, lip, dict.fromkeys(gates, 1.0))
    change = np.array([sizes(h[node] - cut[node]) for node in place])
    bound = lambda paths, made: summed(graph, pruned, place, paths, made)
    local = bound(np.eye(len(place)), ys)
    return Sides(
        change, (bound(few, ys), bound(all_, cut_ys)), local, bound(few, cut_ys)
    )


@pytest.mark.parametrize("name", NETS)
def test_bound_holds(name):
    case = NETS[name]()
    names = [arc.name for arc in case.dag.graph.arcs]
    rng, dense = np.random.default_rng(1), values(case)
    violations = 0
    for _ in range(TRIALS if name.startswith("random") else 2):
        pruned = {*rng.choice(names, rng.integers(1, 4), replace=False).tolist()}
        found = sides(case, pruned, dense)
        assert found.change.max() > 1e-6
        for bound in found.bounds:
            assert np.isfinite(bound).all()
            assert (found.change <= bound * (1 + 1e-9) + 1e-12).all()
        violations += int((found.change > found.local + 1e-9).any())  # mutant
    assert violations


def test_pruned_values_need_the_paths_of_the_dense_network():
    """Mutant: of a chain, both the pruned values and the pruned paths."""
    made = {f"fc{i}": dense() for i in range(3)}
    arcs = [dj.Arc(n, f"n{i}", f"n{i + 1}", made[n][0]) for i, n in enumerate(made)]
    twins = {name: twin for name, (_, twin) in made.items()}
    graph = dj.Graph(arcs, "n0", "n3")
    case = nets.build(graph, ((WIDTH,),), "float64", 0, twins)
    unbiased = jax.tree.map(lambda w: w * (w.ndim > 1), case.dag.params)
    case = case._replace(dag=case.dag.replace(params=unbiased))
    found = sides(case, {"fc0", "fc1"})
    assert all((found.change <= bound + 1e-12).all() for bound in found.bounds)
    assert (found.change > found.both + 1e-9).any()


def test_path_norms_grow_with_the_mask():
    case = random_net(0)
    lip, graph = constants(case), case.dag.graph
    rng = np.random.default_rng(2)
    for _ in range(20):
        few = {name: float(rng.random() < 0.5) for name in lip}
        more = {name: max(on, float(rng.random() < 0.3)) for name, on in few.items()}
        small, large = (path_norms(graph, lip, kept)[1] for kept in (few, more))
        assert (small <= large + 1e-12).all()
        assert (small >= -1e-12).all()
        if few != more:
            assert (small < large - 1e-9).any()
            assert not (large <= small + 1e-12).all()  # mutant: the other way round
