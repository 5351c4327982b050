"""The front door: any network, any data, one call."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax import api
from tests.experiments import tiny
from tests.experiments.tiny import TEACHER
from tests.sweeps import seldom

pytestmark = pytest.mark.usefixtures("quick_compile")

QUICK = {
    "seeds": 4,
    "densities": [0.5],
    "controls": [],
    "steps": 4,
    "batch": 16,
    "eval_every": 2,
}


def run(net=None, data=TEACHER, **options):
    return dj.lottery(net or tiny.mlp(), data, **(QUICK | options))


def classes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4, 4, 1)).astype(np.float32)
    y = (x.mean((1, 2, 3)) > 0).astype(np.int32) + 2 * (x[:, 0, 0, 0] > 0)
    return dj.data.Data(
        x[:40], y[:40].astype(np.int32), x[40:], y[40:].astype(np.int32)
    )


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return nn.Dense(4)(x)


def tokens_net(vocabulary):
    """A pair: an embedding and a readout of each token."""

    def init(key, x):
        one, two = jax.random.split(key)
        table = jax.random.normal(one, (vocabulary, 5))
        return {"table": table, "out": jax.random.normal(two, (5, vocabulary)) / 5}

    def apply(params, x):
        return params["table"][x] @ params["out"]

    return init, apply


TEXT = dj.data.characters("to be or not to be, that is the question " * 8, length=6)
LETTERS = len(dj.data.alphabet("to be or not to be, that is the question "))

CASES = {
    "graph, classes": (lambda: dj.zoo.mlp((6, 4), input_shape=(4, 4, 1)), classes),
    "module, classes": (Noisy, classes),
    "pair, next token": (lambda: tokens_net(LETTERS), lambda: TEXT),
    "graph, regression": (tiny.mlp, lambda: TEACHER),
}
METRIC = dict.fromkeys(CASES, "accuracy") | {"graph, regression": "negative_error"}


@pytest.mark.parametrize("case", CASES)
def test_any_net_and_data(case):
    net, data = (make() for make in CASES[case])
    result = run(net, data)
    record = result.record
    assert set(record.loss) == {"dense", "ticket"}
    for arm in record.loss:
        assert record.loss[arm].shape == (1, 4, 3)
        assert record.test_metric[arm].shape == record.test_loss[arm].shape == (1, 4)
        assert all(
            np.isfinite(x).all() for x in (record.loss[arm], record.test_loss[arm])
        )
    assert record.settings["metric"] == METRIC[case]
    if METRIC[case] == "accuracy":
        assert (
            0
            <= record.test_metric["ticket"].min()
            <= record.test_metric["ticket"].max()
            <= 1
        )
    np.testing.assert_array_equal(record.evals, [0, 2, 4])
    masks = jax.tree.leaves(result.masks)
    assert all(m.shape[:2] == (2, 4) and m.dtype == bool for m in masks)
    total = sum(m[0, 0].size for m in masks)
    kept = [[sum(m[i, s].sum() for m in masks) for s in range(4)] for i in range(2)]
    assert kept == [[total] * 4, [round(0.5 * total)] * 4]
    assert result.seconds > 0


@pytest.fixture(scope="module")
def full():
    """All controls; what the callbacks were told."""
    chunks, rounds = tiny.Calls(), tiny.Calls()
    result = run(
        densities=[0.6, 0.3], controls=["random", "fresh", "transfer", "narrow"],
        rewind=2, on_chunk=chunks, on_round=rounds,
    )  # fmt: skip
    return result, chunks, rounds


def test_on_round_is_told_every_round(full):
    reports = [report for (report,) in full[2]]
    assert [report.done for report in reports] == list(range(1, 12))
    assert {report.total for report in reports} == {11}
    want = [("ticket", 1.0), ("ticket", 0.6), ("ticket", 0.3)]
    for control in ("random", "fresh", "transfer", "narrow"):
        want += [(control, 0.6), (control, 0.3)]
    assert [(report.arm, report.density) for report in reports] == want
    assert all(report.loss.shape == (4, 3) for report in reports)
    assert all(report.test_metric.shape == (4,) for report in reports)


def test_on_chunk_rises_to_the_total(full):
    done, totals = zip(*full[1], strict=True)
    assert set(totals) == {11}
    assert list(done) == sorted(done)
    assert done[-1] == 11
    assert set(range(1, 12)) <= set(done)
    assert {i + 0.5 for i in range(11)} <= set(done)


def test_the_table_is_text(full):
    result, record = full[0], full[0].record
    lines = result.table().splitlines()
    assert lines[0].split()[:3] == ["arm", "density", "weights"]
    assert "test negative_error" in lines[0]
    rows = [line.split() for line in lines[1:12]]
    assert [row[0] for row in rows] == ["dense"] + [
        arm for arm in ("ticket", "random", "fresh", "transfer", "narrow") for _ in "ab"
    ]
    assert [row[1] for row in rows[:3]] == ["1", "0.6", "0.3"]
    weights = [int(row[2].replace(",", "")) for row in rows]
    assert weights[:3] == [41, 21 + 6, 10 + 6]  # 35 can be pruned, 6 biases stay
    assert weights[3:5] == weights[5:7] == weights[7:9] == weights[1:3]
    assert lines[-1] == result.verdict() == record.sentence()
    for row, line in zip(record.rows(), lines[1:], strict=False):
        assert f"{row.metric.mean:.4f}" in line
        mean = np.mean(record.test_metric[row.arm][0 if row.density in (1, 0.6) else 1])
        assert row.metric.mean == pytest.approx(mean, rel=1e-6)


def test_the_verdict_is_a_sentence(full):
    verdict = full[0].verdict()
    assert verdict.endswith(".")
    assert "\n" not in verdict
    assert "ticket" in verdict
    assert repr(full[0]) == f"Result({verdict})"


def test_settings_are_json_values(full):
    settings = full[0].record.settings
    assert json.loads(json.dumps(settings)) == settings
    expected = {"seeds": 4, "densities": [0.6, 0.3], "rewind": 2, "prune": "weights",
                "score": "magnitude", "steps": 4, "batch": 16, "eval_every": 2,
                "optimizer": "adam", "first_seed": 0}  # fmt: skip
    assert {key: settings[key] for key in expected} == expected
    assert settings["margin"] == pytest.approx(0.01 * np.var(TEACHER.y_train))


def test_saved_files(full, tmp_path):
    result = full[0]
    folder = result.save(tmp_path / "new" / "run")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"run.json", "arrays.npz", "masks.npz", "table.txt"}
    assert names >= {f"{name}.png" for name in ("accuracy", "curves", "masks", "graph")}
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.txt").read_text() == result.table() + "\n"
    told = json.loads((folder / "run.json").read_text())
    assert told["finished"] is True
    assert told["settings"] == result.record.settings
    assert told["verdict"] == result.verdict()
    assert {"python", "dagjax", "jax", "jaxlib", "flax", "optax", "numpy"} == set(
        told["versions"]
    )
    assert told["devices"] == 4
    assert told["device"]
    assert told["seconds"] > 0
    with np.load(folder / "masks.npz", allow_pickle=False) as file:
        kept = {name: file[name] for name in file.files}
    assert len(kept) == len(jax.tree.leaves(result.masks))
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        assert np.array_equal(file["['loss/ticket']"], result.record.loss["ticket"])


# --- how many seeds ---------------------------------------------------------------


@functools.cache
def six():
    return run(seeds=6)


@pytest.mark.parametrize(("seeds", "first"), seldom([(6, 0), (1, 2), (3, 1)], [(3, 1)]))
def test_any_number_of_seeds(seeds, first):
    """More than there are devices, not divided by them, fewer; the same bits."""
    result = six() if seeds == 6 else run(seeds=seeds, first_seed=first)
    assert len(set(result.record.test_loss["ticket"][0].tolist())) == seeds
    for arm, loss in result.record.loss.items():
        assert loss.shape == (1, seeds, 3)
        assert np.array_equal(loss, six().record.loss[arm][:, first : first + seeds])


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Conv(2, (3, 3))(x)).reshape(x.shape[0], -1))


def test_convolutions_train_in_waves_of_seeds():
    """They are driven step by step, a wave of seeds at a time; five do not divide."""
    chunks = tiny.Calls()
    result = run(Convolution(), classes(), seeds=5, on_chunk=chunks)
    assert result.record.loss["ticket"].shape == (1, 5, 3)
    done = [d for d, _ in chunks]
    assert done == sorted(done)
    assert done[-1] == 2


# --- options that do not fit ------------------------------------------------------

BAD = {
    "optimizer": ("adm", "adam, adamw, sgd, momentum, nesterov"),
    "schedule": ("step", "constant, linear, cosine, warmup-cosine"),
    "prune": ("neurons", "weights, units, arcs"),
    "score": ("gate", "magnitude, taylor, random"),
    "controls": (["narow"], "random, fresh, transfer, narrow"),
    "densities": ([0.0], r"\(0, 1\]"),
    "steps": (0, "at least 1"),
    "batch": (0, "at least 1"),
    "eval_every": (3, "multiple of eval_every"),
    "seeds": (0, "seeds 0: expected at least 1"),
    "rewind": (-1, "rewind -1"),
    "margin": (-1.0, "margin"),
}
MORE_DENSITIES = [[1.5], [], [0.5, 0.6], [float("nan")], [1e-9], [-0.1]]


def refused(match, **options):
    told = tiny.Calls()
    with pytest.raises(ValueError, match=match) as caught:
        run(**options, on_chunk=told)
    assert not told  # before anything is trained
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", BAD)
def test_bad_options_are_answered_with_what_is_allowed(option):
    value, match = BAD[option]
    refused(match, **{option: value})


@pytest.mark.parametrize("densities", MORE_DENSITIES)
def test_bad_densities(densities):
    refused(r"densit.*expected", densities=densities)


@pytest.mark.parametrize("prune", ["units", "arcs"])
def test_densities_that_keep_nothing(prune):
    refused("expected at least", net=tiny.branched(), prune=prune, densities=[0.01])


@pytest.mark.parametrize("score", ["magnitude", "sniip"])
def test_scores_fit_their_granularity(score):
    refused("gate, taylor, random", net=tiny.branched(), prune="arcs", score=score)


# --- nets and data that do not fit ------------------------------------------------


def test_inputs_that_the_net_does_not_take():
    net = dj.series(nn.Conv(2, (3, 3)), nn.Dense(1))
    refused(r"does not take inputs \(2, 6\)", net=net)


def test_outputs_of_another_shape():
    refused(r"outputs \(2, 2\) do not fit targets \(2, 1\)", net=tiny.mlp(5, 2))


def test_labels_beyond_the_outputs():
    net = dj.zoo.mlp((5, 3), input_shape=(4, 4, 1))
    refused("label 3, but the net has 3 outputs", net=net, data=classes())


def test_two_inputs():
    b = dj.GraphBuilder()
    for name in ("left", "right"):
        b.arc(f"fc_{name}", b.input(name), "y", nn.Dense(1))
    refused("2 inputs", net=b.build("y"))


def test_two_outputs():
    b = dj.GraphBuilder()
    x = b.input("x")
    for name in ("y", "z"):
        b.arc(f"fc_{name}", x, name, nn.Dense(1))
    refused("output", net=b.build(["y", "z"]))


def test_broken_data():
    x, y = TEACHER.x_train, TEACHER.y_train
    refused("y_train: got length 47, expected 48", data=(x, y[:-1], x, y))
    refused("x_test: got nan", data=(x, y, np.full_like(x, np.nan), y))


# --- controls that are left out ---------------------------------------------------


class Stop(Exception):
    pass


@pytest.fixture
def planned(monkeypatch):
    """Nothing is trained; how many controls would have been."""
    seen = []

    def stop(*args, **kept):
        seen.append(args[-1])
        raise Stop

    monkeypatch.setattr(api, "Experiment", stop)
    return seen


def test_transfer_needs_two_seeds(planned):
    with (
        pytest.warns(UserWarning, match="'transfer' is left out: it needs two seeds"),
        pytest.raises(Stop),
    ):
        run(seeds=1, controls=["transfer", "random"])
    assert planned == [1]


STIFF = {
    "a module": (Noisy, classes),
    "groups": (
        lambda: dj.series(nn.Dense(8), nn.GroupNorm(4), nn.Dense(1)),
        lambda: TEACHER,
    ),
    "a constant": (
        lambda: dj.series(
            nn.Dense(8), lambda x: x + jnp.arange(8.0)[None], nn.Dense(1)
        ),
        lambda: TEACHER,
    ),
    "a skip into the output": (
        lambda: dj.series(nn.Dense(1), dj.residual(nn.Dense(1))),
        lambda: TEACHER,
    ),
}


@pytest.mark.parametrize("name", STIFF)
def test_nets_that_cannot_be_narrowed(name, planned):
    net, data = (make() for make in STIFF[name])
    with pytest.warns(UserWarning, match="'narrow' is left out"), pytest.raises(Stop):
        run(net, data, controls=["narrow", "fresh"])
    assert planned == [1]


def test_controls_that_are_not_asked_for_are_not_warned_of(planned):
    with pytest.raises(Stop):
        run(Noisy(), classes(), seeds=1, controls=["fresh"])


# --- losses of one's own ----------------------------------------------------------


def huber(outputs, targets):
    return jnp.log(jnp.cosh(outputs - targets))


def test_own_loss_and_metric():
    closeness = lambda outputs, targets: jnp.exp(-jnp.square(outputs - targets))
    result = run(loss=huber, metric=closeness)
    settings = result.record.settings
    assert (settings["loss"], settings["margin"]) == ("huber", 0.01)
    assert 0 < result.record.test_metric["dense"].min() <= 1


def test_two_nets_are_two_settings():
    """In `run.json` a net is known by its arcs, not by where it lies in memory."""
    describe = lambda net: api.describe_net(net, dj.as_model(net))
    assert describe(tiny.mlp(5, 1)) == describe(tiny.mlp(5, 1))
    assert describe(tiny.mlp(5, 1)) != describe(tiny.mlp(6, 1))
    assert describe(tokens_net(3)) == describe(tokens_net(3))
    assert describe(nn.Sequential([nn.Dense(3), nn.relu])) == describe(
        nn.Sequential([nn.Dense(3), nn.relu])
    )
    own = lambda: dj.series(nn.Dense(3), lambda x: 2 * x)
    assert describe(own()) == describe(own())
    assert "0x" not in describe(tokens_net(3))


def test_a_network_with_parameters_is_refused():
    net = dj.zoo.mlp((4, 2), input_shape=(3,))
    dag = dj.init(jax.random.key(0), net, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"give it the graph \(dag.graph\)"):
        dj.as_model(dag)
