"""Rounds of the lottery: two drivers of one round, rewinding, masks, controls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dagjax as dj
from dagjax.experiments.controls import Controls, narrowed
from dagjax.experiments.experiment import Experiment, Setup
from dagjax.experiments.granularity import GRANULARITIES, every_node_fed, make_pruner
from dagjax.experiments.store import Store
from dagjax.experiments.train import TrainInfo, evaluate, make_trainer
from dagjax.sparsity import units
from tests.experiments import tiny
from tests.experiments.tiny import TEACHER
from tests.graph import nets
from tests.sweeps import seldom

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS, REWIND = 4, 3
CONFIG = dj.TrainConfig(steps=6, batch=16, eval_every=3, eval_size=40)
KINDS = {
    "weights": (lambda: tiny.mlp(7, 4, 1), (0.6, 0.3, 0.05)),
    "units": (lambda: tiny.mlp(7, 4, 1), (0.6, 0.3, 0.1)),
    "arcs": (tiny.branched, (0.9, 0.7, 4 / 6)),
}
kinds = pytest.mark.parametrize("prune", seldom(KINDS, ["units"]))


class Both:
    """One experiment by both drivers; the loss counts its traces."""

    def __init__(self, prune):
        self.prune, (make, self.densities) = prune, KINDS[prune]
        self.loss = tiny.Counting(tiny.squares)
        task = dj.Task(self.loss, tiny.squares)
        model = dj.as_model(make(), gated=prune == "arcs")
        self.model, self.tx = model, dj.make_tx("momentum", 0.02)
        pruner = make_pruner(prune, None, model, task)
        self.traces, self.reports = [], tiny.Calls()
        self.setup = Setup(CONFIG, model, task, self.tx, pruner, prune, REWIND)
        self.keys = dj.make_keys(SEEDS)
        self.experiment = Experiment(
            self.setup, self.keys, TEACHER, self.densities, Store(None), self.on_round
        )
        self.tickets = self.experiment.rounds()
        full = GRANULARITIES[prune].full
        run = dj.make_lottery(CONFIG, model, task, self.tx, pruner, full, rewind=REWIND)
        mapped = jax.jit(dj.over_seeds(run, shared=2))
        self.start, self.rounds = mapped(self.keys, TEACHER, jnp.array(self.densities))

    def on_round(self, report):
        self.reports(report)
        self.traces.append(self.loss.traces)

    def mask(self, i, seed):
        return jax.tree.map(lambda m: np.asarray(m[i, seed]), self.tickets.masks)

    def theta(self, seed):
        return jax.tree.map(lambda x: x[seed], self.experiment.start.theta)

    @property
    def places(self):
        """Round and seed of every mask."""
        return [(i, s) for i in range(len(self.densities) + 1) for s in range(SEEDS)]


@functools.cache
def both(prune):
    return Both(prune)


def seed_axis_first(tree):
    return jax.tree.map(lambda x: np.moveaxis(np.asarray(x), 0, 1), tree)


@kinds
def test_the_two_drivers_agree(prune):
    case = both(prune)
    assert tiny.equal(case.tickets.masks, seed_axis_first(case.rounds.mask))
    assert jax.tree.leaves(case.tickets.masks)
    for one, two in zip(
        case.tickets.info, seed_axis_first(case.rounds.info), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    for one, two in zip(
        jax.tree.leaves(case.experiment.start), jax.tree.leaves(case.start), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


@kinds
def test_all_rounds_compile_once(prune):
    first, *later = both(prune).traces
    assert first > 0
    assert later == [first] * len(KINDS[prune][1])


@kinds
def test_reports(prune):
    case = both(prune)
    reports = [report for (report,) in case.reports]
    assert [r.density for r in reports] == [1.0, *case.densities]
    assert [r.done for r in reports] == [1, 2, 3, 4]
    assert {(r.arm, r.total) for r in reports} == {("ticket", 4)}
    for i, report in enumerate(reports):
        assert np.array_equal(report.loss, case.tickets.info.loss[i])
        assert np.array_equal(report.test_metric, case.tickets.info.test_metric[i])


# --- rewinding --------------------------------------------------------------------


def test_the_rewind_point_is_a_training_of_its_own():
    case = both("weights")
    before = dj.TrainConfig(REWIND, CONFIG.batch, REWIND, 1)
    for seed in (0, SEEDS - 1):
        keys = jax.tree.map(lambda k, s=seed: k[s], case.keys)
        start = dj.Trained(*case.model.init(keys.init, TEACHER.x_train[:1]))
        tx, none = optax.sgd(0.02, momentum=0.9), tiny.nothing()
        args = (before, case.model, tx, keys.order, start, none, TEACHER)
        want, _ = tiny.loop(*args, stream=1)
        wrong, _ = tiny.loop(*args, stream=0)  # the order of the rounds
        got = case.theta(seed)["params"]
        assert nets.distance(got, want) < 1e-5
        assert nets.distance(got, wrong) > 1e-4
        assert nets.distance(got, start.theta["params"]) > 1e-4


@kinds
def test_every_round_starts_at_the_masked_rewind_point(prune):
    case = both(prune)
    fixed = tuple(z[tiny.sample(CONFIG, TEACHER)] for z in TEACHER[:2])
    loss = jax.jit(
        lambda theta: evaluate(
            case.model, tiny.squares, dj.Trained(theta, {}), *map(jnp.asarray, fixed)
        )
    )
    for i, seed in case.places:
        masked = dj.masks.apply(case.mask(i, seed), case.theta(seed))
        got = case.tickets.info.loss[i, seed, 0]
        np.testing.assert_allclose(got, loss(masked), rtol=1e-5)
    # Mutant: the dense rewind point is another place.
    assert abs(case.tickets.info.loss[-1, 0, 0] - loss(case.theta(0))) > 1e-3


def test_without_rewinding_the_start_is_the_init():
    case = both("weights")
    experiment = Experiment(
        case.setup._replace(rewind=0), case.keys, TEACHER, (0.5,), Store(None)
    )
    init = case.model.init(case.keys.init[1], TEACHER.x_train[:1])[0]
    got = jax.tree.map(lambda x: x[1], experiment.start.theta)
    assert nets.distance(got, init) < 1e-6


# --- masks ------------------------------------------------------------------------


def alive(prune, mask):
    """`(kept, all)` of what is pruned."""
    if prune == "units":
        mask = units.gather(mask, -1, jnp.any)
    return int(dj.masks.kept(mask)), dj.masks.size(mask)


@kinds
def test_exact_counts_at_every_density(prune):
    case = both(prune)
    # Units are counted layer by layer, weights and arcs all together.
    groups = {"weights": [6 * 7 + 7 * 4 + 4], "units": [7, 4], "arcs": [6]}[prune]
    for i, seed in case.places:
        density = (1.0, *case.densities)[i]
        kept = sum(round(density * n) for n in groups)
        assert alive(prune, case.mask(i, seed)) == (kept, sum(groups))


@kinds
def test_masks_are_nested(prune):
    case = both(prune)
    for before, after in zip(case.places, case.places[SEEDS:], strict=False):
        old, new = (jax.tree.leaves(case.mask(*at)) for at in (before, after))
        assert all((o | ~n).all() for o, n in zip(old, new, strict=True))


def test_units_fall_with_their_bias():
    for i, seed in both("units").places:
        layers = both("units").mask(i, seed)["params"]
        for name in ("fc1", "fc2"):
            own = layers[name]["Dense"]
            assert np.array_equal(
                own["kernel"], np.broadcast_to(own["bias"], own["kernel"].shape)
            )
        assert layers["fc3"]["Dense"] == {"kernel": None, "bias": None}


def test_weights_of_least_magnitude_fall():
    """The mask of a round is found by numpy from an independent training."""
    case = both("weights")
    mask, key = case.mask(1, 2), case.keys.order[2]
    start = dj.Trained(case.theta(2), {})
    tx = optax.sgd(0.02, momentum=0.9)
    params, _ = tiny.loop(CONFIG, case.model, tx, key, start, case.mask(0, 2), TEACHER)
    live = jax.tree.leaves(
        dj.masks.tree_map(lambda m, w: np.ravel(m), mask["params"], params)
    )
    sizes = jax.tree.leaves(
        dj.masks.tree_map(lambda m, w: np.ravel(np.abs(w)), mask["params"], params)
    )
    live, sizes = np.concatenate(live), np.concatenate(sizes)
    cut = np.sort(sizes)[-live.sum()]
    assert np.array_equal(live, sizes >= cut)


def test_outputs_stay_reachable():
    case = both("arcs")
    for i, seed in case.places:
        gates = case.mask(i, seed)["gates"]
        assert "Dense_1" in dj.live_arcs(case.model.graph, gates)


@settings(max_examples=8)
@given(plan=nets.plans(min_depth=2, max_nodes=7), seed=st.integers(0, 99))
def test_every_node_keeps_an_arc_of_any_graph(plan, seed):
    graph, rng = plan.graph, np.random.default_rng(seed)
    names = [arc.name for arc in graph.arcs]
    full = {"params": None, "gates": {n: jnp.array(True) for n in names}}
    draws = {n: jnp.float32(rng.uniform()) for n in names}
    targets = {arc.target for arc in graph.arcs}
    for count in (len(targets), (len(targets) + len(names)) // 2):
        mask = every_node_fed(graph)({"gates": draws}, full, count / len(names))
        on = [n for n in names if mask["gates"][n]]
        assert len(on) == count
        assert {graph.by_name[n].target for n in on} == targets
        live = dj.live_arcs(graph, mask["gates"])
        assert {graph.by_name[n].target for n in live} >= set(graph.outputs)


def test_mutant_that_only_counts_cuts_the_output_off():
    graph = tiny.branched()
    draws = {arc.name: jnp.float32(arc.target != "out") for arc in graph.arcs}
    full = {arc.name: jnp.array(True) for arc in graph.arcs}
    mask = dj.selection.global_topk(draws, full, 4 / 6)
    assert dj.live_arcs(graph, mask) == ()
    fed = every_node_fed(graph)(
        {"gates": draws}, {"params": None, "gates": full}, 4 / 6
    )
    assert dj.live_arcs(graph, fed["gates"]) != ()


# --- controls ---------------------------------------------------------------------


@functools.cache
def control(prune, name):
    """What a control trains: `[(start, mask)]` by density; nothing is trained."""
    experiment, seen = both(prune).experiment, []
    train = experiment.pieces.train

    def spy(key, start, mask, data, lr):
        seen.append((start, jax.tree.map(np.asarray, mask)))
        zeros = TrainInfo(np.zeros((SEEDS, 3)), np.zeros(SEEDS), np.zeros(SEEDS))
        return start, zeros

    experiment.pieces = experiment.pieces._replace(train=spy)
    found = Controls(experiment, both(prune).tickets).run(name)
    experiment.pieces = experiment.pieces._replace(train=train)
    assert found.weights == both(prune).tickets.weights[1:]
    assert found.info.loss.shape == (3, SEEDS, 3)
    return seen


def ticket_mask(prune, i):
    return jax.tree.map(lambda m: m[i], both(prune).tickets.masks)


@kinds
@pytest.mark.parametrize("name", ["random", "transfer"])
def test_controls_start_where_the_ticket_does(prune, name):
    for start, _ in control(prune, name):
        assert tiny.equal(start, both(prune).experiment.start)


def groups(prune, mask):
    """`{group: mask of it, flat}`: leaves, layers' units, levels of arcs."""
    if prune == "units":
        return units.gather(mask, -1, jnp.any)
    if prune == "weights":
        leaves = jax.tree_util.tree_leaves_with_path(mask)
        return {jax.tree_util.keystr(path): m.ravel() for path, m in leaves}
    graph, found = both("arcs").model.graph, {}
    for name, on in mask["gates"].items():
        found.setdefault(graph.levels[graph.by_name[name].target], []).append(on)
    return {level: np.array(on) for level, on in found.items()}


@kinds
def test_random_masks_have_the_tickets_counts(prune):
    differ = 0
    for i, (_, mask) in enumerate(control(prune, "random"), 1):
        for seed in range(SEEDS):
            got = groups(prune, jax.tree.map(lambda m, s=seed: m[s], mask))
            want = groups(prune, both(prune).mask(i, seed))
            assert {g: int(m.sum()) for g, m in got.items()} == {
                g: int(m.sum()) for g, m in want.items()
            }
            differ += any(not np.array_equal(got[g], want[g]) for g in want)
    assert differ >= (1 if prune == "arcs" else 2 * SEEDS)


def test_random_units_are_whole_units():
    for _, mask in control("units", "random"):
        own = mask["params"]["fc1"]["Dense"]
        assert np.array_equal(
            own["kernel"], np.broadcast_to(own["bias"][:, None], own["kernel"].shape)
        )


def test_random_masks_differ_by_seed_and_round():
    seen = [
        m["params"]["fc1"]["Dense"]["kernel"] for _, m in control("weights", "random")
    ]
    flat = [mask[seed].tobytes() for mask in seen for seed in range(SEEDS)]
    assert len(set(flat)) == len(flat)


@kinds
def test_fresh_start_under_the_tickets_mask(prune):
    for i, (start, mask) in enumerate(control(prune, "fresh"), 1):
        assert tiny.equal(mask, ticket_mask(prune, i))
        fresh, own = start.theta["params"], both(prune).experiment.start.theta["params"]
        for one, two in zip(jax.tree.leaves(fresh), jax.tree.leaves(own), strict=True):
            assert not np.array_equal(one, two)


def test_the_fresh_start_is_trained_to_the_rewind_point_too():
    (start, _), *_ = control("weights", "fresh")
    bias = start.theta["params"]["fc1"]["Dense"]["bias"]
    assert np.abs(bias).min(axis=1).max() > 0  # an untrained bias is zero


@kinds
def test_transfer_is_the_neighbors_mask(prune):
    for i, (_, mask) in enumerate(control(prune, "transfer"), 1):
        for seed in range(SEEDS):
            got = jax.tree.map(lambda m, s=seed: m[s], mask)
            assert tiny.equal(got, both(prune).mask(i, (seed - 1) % SEEDS))


@pytest.mark.parametrize("prune", ["weights", "arcs"])
def test_narrow_nets_have_the_nearest_number_of_parameters(prune):
    case = both(prune)
    for weights in case.tickets.weights[1:]:
        setup = narrowed(case.setup, weights, TEACHER)
        count = lambda model: sum(
            x.size
            for x in jax.tree.leaves(model.shapes(TEACHER.x_train[:1])[0]["params"])
        )
        tried = {dj.narrow(case.model.graph, i / 56) for i in range(1, 57)}
        best = min(abs(count(dj.as_model(graph)) - weights) for graph in tried)
        assert abs(count(setup.model) - weights) == best
        assert setup.model.gated == case.model.gated


@kinds
def test_kept_parameters(prune):
    case = both(prune)
    for i, got in enumerate(case.tickets.weights):
        mask, theta = case.mask(i, 0), case.theta(0)
        if prune == "arcs":
            names = [arc for arc, on in mask["gates"].items() if on]
            trees = [theta["params"].get(arc, {}) for arc in names]
            want = sum(x.size for x in jax.tree.leaves(trees))
        else:
            ones = jax.tree.map(jnp.ones_like, theta["params"])
            kept = dj.masks.apply(mask["params"], ones)
            want = int(sum(x.sum() for x in jax.tree.leaves(kept)))
        assert got == want


# --- planted ----------------------------------------------------------------------


def test_magnitude_finds_a_planted_ticket():
    """A dense student that starts at the teacher keeps the teacher's edges."""
    data = dj.data.teacher(n_train=48, n_test=20, d_in=8, kept=2)
    params = dj.data.planted(d_in=8, kept=2)
    model = dj.as_model(tiny.mlp(4, 1, d_in=8))
    theta = {
        "params": {f"fc{i + 1}": {"Dense": params[f"Dense_{i}"]} for i in (0, 1)},
        "gates": {},
    }
    full = tiny.everything(jax.tree.map(jnp.asarray, theta))
    pruner = make_pruner("weights", None, model, dj.task_of(data))
    mask, _ = pruner.update(None, (), theta, full, None, (4 * 2 + 4) / (8 * 4 + 4))
    found = mask["params"]["fc1"]["Dense"]["kernel"]
    assert np.array_equal(found, params["Dense_0"]["kernel"] != 0)
    at = dj.Trained(dj.masks.apply(mask, theta), {})
    trainer = make_trainer(
        CONFIG, model, dj.Task(tiny.squares, tiny.squares), optax.sgd(0.1)
    )
    carry = trainer.begin(at, mask, None)
    assert float(trainer.measure(carry, data)) < 1e-10
