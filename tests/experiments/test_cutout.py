"""The ticket cut out: the same curve on smaller arrays, or a reason."""

import json
import math
import shutil
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import dagjax as dj
from dagjax import api
from dagjax.compaction.export import cost
from dagjax.experiments import cutout, ticket_files
from dagjax.experiments.experiment import Setup
from dagjax.experiments.granularity import GRANULARITIES
from dagjax.experiments.run_folder import open_run
from dagjax.sparsity import pruners
from tests.experiments import tiny
from tests.experiments.tiny import TEACHER

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS = 12


def run(net=None, **options):
    quick = {
        "seeds": 2, "densities": [0.5], "controls": [], "steps": STEPS, "batch": 16,
        "eval_every": 4, "prune": "units", "learning_rate": 0.02,
    }  # fmt: skip
    return dj.lottery(net or tiny.mlp(8, 6, 1), TEACHER, **(quick | options))


def normed():
    """A batch norm, so a mode of training, in a branch of a residual network."""
    layers = nn.Dense(6, use_bias=False), nn.BatchNorm(), nn.relu, nn.Dense(5)
    branch = dj.block(*layers, name="branch")
    return dj.series(nn.Dense(5), dj.residual(branch), nn.relu, nn.Dense(1))


OPTIONS = {
    "densities": [0.7, 0.5], "optimizer": "adamw", "rewind": 2, "first_seed": 3,
    "keep": "all", "compact_seeds": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run in a folder, without pictures; and what it gives when it is resumed."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(api.Result, "figures", lambda self: {})
        first = run(**OPTIONS, out=folder)
        return folder, first, run(**OPTIONS, out=folder, resume=True)


@pytest.fixture(scope="module")
def result(kept):
    return kept[1]


def test_the_same_curve_on_smaller_arrays(result):
    """That of the experiment; every seed has a mask of its own."""
    for i, found in enumerate(result.compacted.cuts):
        loss = result.record.loss["ticket"][-1, i]
        assert (found.seed, found.reason) == (3 + i, "")
        assert found.gap < 1e-5 * loss.max()
        assert found.small.loss == pytest.approx(loss[-1], rel=1e-4)
        metric = result.record.test_metric["ticket"][-1, i]
        assert found.small.metric == pytest.approx(metric, rel=1e-4)
        assert loss[0] - loss[-1] > 1e-2  # it learned


def test_its_figures(result):
    found = result.compacted.cuts[0]
    assert found.dense.params == 6 * 8 + 8 + 8 * 6 + 6 + 6 + 1
    assert found.small.params == 6 * 4 + 4 + 4 * 3 + 3 + 3 + 1
    assert found.kept == result.record.weights["ticket"][-1]
    assert found.dense.flops == 2 * (6 * 8 + 8 * 6 + 6)
    assert found.small.flops == 2 * (6 * 4 + 4 * 3 + 3)
    assert found.dense.step > 0
    assert found.speedup == found.dense.step / found.small.step


def test_it_is_told(kept, result):
    said = result.compacted.sentence()
    assert said.startswith("The ticket at density 0.5, cut out: 117 -> 47 parameters (")
    assert "times faster a step (median of 2 seeds), same curve up to " in said
    assert result.table().splitlines()[-2:] == [result.verdict(), said]
    told = json.loads((kept[0] / "run.json").read_text())["compacted"]
    assert told["said"] == said
    assert told["cuts"][0]["small"]["params"] == 47
    assert told["cuts"][0]["gap"] == result.compacted.cuts[0].gap


def test_what_was_measured_is_not_measured_again(kept, result):
    assert kept[2].compacted == result.compacted
    assert tiny.equal(kept[2].tickets, result.tickets)


def test_trained_tickets_are_kept(kept, result):
    files = sorted(path.name for path in (kept[0] / "tickets").iterdir())
    assert files == ["round-1.npz", "round-2.npz"]
    for number, trained in result.tickets.items():
        mask = jax.tree.map(lambda m, i=number: m[i], result.masks)
        assert not tiny.dead(mask, {**trained.theta, "gates": None}).any()
        theta = jax.tree.map(lambda x: x[1], trained.theta)
        dag = dj.DAG(result.model.graph, theta["params"], {})
        error = -np.square(dag(TEACHER.x_test) - TEACHER.y_test).mean()
        found = result.record.test_metric["ticket"][number - 1, 1]
        assert error == pytest.approx(found, rel=1e-5)


# --- one ticket of the folder as files --------------------------------------------


@pytest.mark.parametrize(("seed", "number"), [(None, None), (4, 1)])
def test_a_ticket_as_files(kept, result, seed, number, tmp_path, monkeypatch):
    """The served network is the masked ticket; the index gathers its parameters."""
    monkeypatch.setattr(cost, "_latency", lambda *args: 1e-3)
    ticket = open_run(kept[0], seed, number).ticket(result.model)
    made = ticket_files.cut_ticket(ticket, "units")
    text = ticket_files.write(ticket, made, tmp_path / "new", [3])
    names = {"cost.txt", "index.npz", "network.zip", "params.safetensors"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    assert (tmp_path / "new" / "cost.txt").read_text() == text + "\n"
    assert f"seed {seed or 3}, round {number or 2}, density" in text
    i, r = (seed or 3) - 3, number or 2
    params = jax.tree.map(lambda x: x[i], result.tickets[r].theta["params"])
    x = TEACHER.x_test[:3]
    want = dj.DAG(result.model.graph, params, {})(x)
    served = dj.load(tmp_path / "new" / "network.zip")(x)
    np.testing.assert_allclose(served, want, rtol=1e-4, atol=1e-6)
    held = load_file(tmp_path / "new" / "params.safetensors")
    with np.load(tmp_path / "new" / "index.npz", allow_pickle=False) as index:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = "/".join(key.key for key in path)
            places = [index[f"{name}:{axis}"] for axis in range(leaf.ndim)]
            assert np.array_equal(held[name], leaf[np.ix_(*places)])
    assert sum(x.size for x in held.values()) < sum(
        x.size for x in jax.tree.leaves(params)
    )


def test_without_safetensors_parameters_are_an_npz(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    ticket_files._write_params({"fc": {"kernel": jnp.ones((2, 3))}}, tmp_path)
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        assert file["fc/kernel"].shape == (2, 3)


def spoil(folder, **changes):
    """A copy of a run folder whose `run.json` says something else."""
    record = json.loads((folder / "run.json").read_text())
    settings = record["settings"] | changes.pop("settings", {})
    (folder / "run.json").write_text(
        json.dumps(record | {"settings": settings} | changes)
    )


def refused(folder, match, **asked):
    with pytest.raises(ValueError, match=match) as caught:
        open_run(folder, **asked)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_such_ticket(kept, tmp_path):
    refused(tmp_path / "no", "no: no such folder")
    refused(tmp_path, "holds no run.json")
    refused(kept[0], "seed 9: .* has 3 to 4", seed=9)
    refused(kept[0], "round 3: .* has 1 to 2", number=3)
    folder = shutil.copytree(kept[0], tmp_path / "run")
    (folder / "tickets" / "round-1.npz").unlink()
    refused(folder, "no trained tickets of round 1: .*--keep all", number=1)
    (folder / "masks.npz").unlink()
    refused(folder, r"holds no masks\.npz")
    np.savez(
        folder / "masks.npz",
        **{"['gates']['a']": np.ones((3, 2), bool), "['gates']['b']": np.eye(3, 2) > 2},
    )
    spoil(folder, settings={"prune": "arcs"})
    refused(folder, r"pruned arcs.*dj\.delete\(dag, \['b'\]\)")
    spoil(folder, finished=False)
    refused(folder, "is not finished: .*--resume")


def test_single_weights_are_not_cut_out(kept, result):
    ticket = open_run(kept[0]).ticket(result.model)
    with pytest.raises(ValueError, match=r"only 70 of them .*dj\.sparsify"):
        ticket_files.cut_ticket(ticket, "weights")


# --- one seed, without an experiment ----------------------------------------------


def cut(net, density=0.5):
    """A ticket of random units, cut out and trained."""
    model, task = dj.as_model(net), dj.task_of(TEACHER)
    config = dj.TrainConfig(steps=STEPS, batch=16, eval_every=4)
    setup = Setup(
        config, model, task, optax.adam(0.02), pruners.one_shot(None, None), "units"
    )
    start, kind = tiny.start_of(model, TEACHER), GRANULARITIES["units"]
    full, rng = kind.full(start.theta, 1), np.random.default_rng(1)
    scores = jax.tree.map(lambda m: jnp.asarray(rng.uniform(size=m.shape)), full)
    mask = kind.select(model.graph)(scores, full, density)
    return cutout._cut_seed(
        setup, cutout._Ticket(5, jax.random.key(0), start, mask, TEACHER)
    )


def test_mutant_that_starts_elsewhere_has_another_curve(monkeypatch):
    """The curves are those of training, not of any small network."""
    honest = cutout.compacted_model

    def elsewhere(*args):
        model, start = honest(*args)
        return model, jax.tree.map(lambda x: 1.1 * x, start)

    monkeypatch.setattr(cutout, "compacted_model", elsewhere)
    found = cut(tiny.mlp(8, 6, 1))
    assert found.gap > 1e-2
    assert "curves part by" in cutout.CutOut(0.5, (found,)).sentence()


def test_batch_norm_is_trained_in_its_mode():
    """By a graph of narrower layers; channels of the stream stay, and their biases."""
    found = cut(normed())
    assert found.reason == ""
    assert found.small.params < found.dense.params
    assert found.gap < 1e-5


def test_constants_of_dead_units_are_not_trained():
    """A dead unit emits sigmoid(0); what reads it would learn from it."""
    found = cut(dj.series(nn.Dense(8), nn.sigmoid, nn.Dense(1)))
    assert found.small.params == 6 * 4 + 4 + 4 + 1
    assert found.gap > 1e-5


class Whole(nn.Module):
    """One arc, with a mode of training."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(1)(x)


def test_a_mode_of_training_in_a_module_is_a_reason():
    found = cut(Whole())
    said = cutout.CutOut(0.5, (found,)).sentence()
    assert found.seed == 5
    assert "it has a training mode" in found.reason
    assert found.small.params == 6 * 4 + 4 + 4 + 1  # in inference it is cut
    assert math.isnan(found.small.step)
    assert said.endswith("cannot be narrowed to what is left.")
    assert "\n" not in said


def test_what_cannot_be_cut_is_a_reason(monkeypatch):
    def fails(*args):
        raise dj.CompactionError("an axis is in the way\nof everything")

    monkeypatch.setattr(cutout, "compact", fails)
    assert cutout.CutOut(0.5, (cut(tiny.mlp(8, 1)),)).sentence() == (
        "The ticket at density 0.5, cut out: not cut out (an axis is in the way)."
    )


def test_bad_numbers():
    for options in ({"compact_seeds": 0}, {"keep": "some"}):
        with pytest.raises(ValueError, match="expected"):
            run(**options)
