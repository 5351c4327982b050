"""One function over seeds: the same bits on any number of devices."""

import hashlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from dagjax.experiments import seeds as over
from tests.experiments import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS = {1: (5,), 2: (5,), 4: (2, 5)}  # by devices: fewer, more, not divided by them

SCRIPT = """
from tests.experiments import test_seeds
print(test_seeds.json.dumps(test_seeds.report()))
"""


def training():
    model, task = dj.as_model(tiny.mlp()), dj.Task(tiny.squares, tiny.squares)
    train = dj.make_train(
        dj.TrainConfig(steps=6, batch=16, eval_every=3), model, task, optax.adam(0.01)
    )

    def one(keys, data):
        start = dj.Trained(*model.init(keys.init, data.x_train[:1]))
        mask = tiny.everything(start.theta)
        return train(keys.order, start, mask, data)

    return one


def digests(results, seeds):
    """A fingerprint of the results of every seed."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(results)]
    one = lambda i: hashlib.sha256(b"".join(leaf[i].tobytes() for leaf in leaves))
    return [one(i).hexdigest() for i in range(seeds)]


def report():
    """What this process finds on its devices, and single runs on one of them."""
    one, data = training(), tiny.TEACHER
    many = jax.jit(dj.over_seeds(one, shared=1))
    devices = jax.device_count()
    counts = SEEDS[devices]
    found = {str(n): digests(many(dj.make_keys(n), data), n) for n in counts}
    if devices == 1:
        keys, single = dj.make_keys(5), jax.jit(one)
        each = [jax.tree.map(lambda k, i=i: k[i], keys) for i in range(5)]
        runs = [single(mine, data) for mine in each]
        found["single"] = digests(jax.tree.map(lambda *xs: np.stack(xs), *runs), 5)
    return {"devices": devices, **found}


@pytest.fixture(scope="module")
def reports():
    """By number of devices; each in a process of its own, all at the same time."""
    given = os.environ.get("XLA_FLAGS", "")
    flags = f"{given} --xla_force_host_platform_device_count="
    environments = [
        {**os.environ, "XLA_FLAGS": f"{flags}{n}", "JAX_PLATFORMS": "cpu"}
        for n in SEEDS
    ]
    start = [sys.executable, "-c", SCRIPT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(start, env=e, **pipes) for e in environments]
    outs = [process.communicate() for process in started]
    assert not any(process.returncode for process in started), outs
    return {n: json.loads(out) for n, (out, _) in zip(SEEDS, outs, strict=True)}


def test_the_processes_have_as_many_devices(reports):
    assert [report["devices"] for report in reports.values()] == list(SEEDS)


@pytest.mark.parametrize(("devices", "seeds"), [(1, 5), (2, 5), (4, 2), (4, 5)])
def test_bitwise_equal_to_single_runs(reports, devices, seeds):
    single = reports[1]["single"]
    assert len(set(single)) == 5
    assert reports[devices][str(seeds)] == single[:seeds]


def test_vmapped_seeds_agree_after_a_step():
    model, task = dj.as_model(tiny.mlp()), dj.Task(tiny.squares, tiny.squares)
    config = dj.TrainConfig(steps=1, batch=16, eval_every=1)
    train = dj.make_train(config, model, task, optax.sgd(0.05))

    def one(keys, data):
        start = dj.Trained(*model.init(keys.init, data.x_train[:1]))
        return train(keys.order, start, tiny.everything(start.theta), data)

    keys, data = dj.make_keys(3), jax.tree.map(jnp.asarray, tiny.TEACHER)
    spread = jax.jit(lambda *args: over._spread(one, 1, *args))(keys, data)
    batched = jax.jit(lambda *args: over._batched(one, 1, *args))(keys, data)
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(batched), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5, 9])
def test_every_seed_gets_its_own(seeds):
    def fn(mine, tree, shared):
        return mine * shared["x"].sum(), {"y": tree["y"] + 1}

    mine, tree = jnp.arange(1.0, seeds + 1), {"y": jnp.arange(2 * seeds).reshape(-1, 2)}
    shared = {"x": jnp.arange(3.0)}
    got, other = jax.jit(dj.over_seeds(fn, shared=1))(mine, tree, shared)
    assert np.array_equal(got, 3 * np.arange(1, seeds + 1))
    assert np.array_equal(other["y"], tree["y"] + 1)


def test_nothing_shared():
    got = jax.jit(dj.over_seeds(lambda x: 2 * x))(jnp.arange(6))
    assert np.array_equal(got, 2 * np.arange(6))


# --- keys -------------------------------------------------------------------------


def bits(keys):
    return np.stack([np.asarray(jax.random.key_data(stream)) for stream in keys], 1)


def test_a_seed_does_not_depend_on_how_many_there_are():
    assert np.array_equal(bits(dj.make_keys(2)), bits(dj.make_keys(7))[:2])


def test_the_first_seed_has_a_number():
    assert np.array_equal(bits(dj.make_keys(2, first=3)), bits(dj.make_keys(5))[3:])


def test_all_streams_of_all_seeds_differ():
    flat = bits(dj.make_keys(20)).reshape(60, -1)
    assert len(np.unique(flat, axis=0)) == 60


def test_mutant_that_splits_depends_on_how_many_there_are():
    """For some counts; others share a prefix by the grace of the generator."""
    split = lambda n: np.asarray(
        jax.random.key_data(jax.random.split(jax.random.key(0), n))
    )
    with jax.threefry_partitionable(False):
        assert not np.array_equal(split(2), split(7)[:2])


def test_keys_are_typed():
    for stream in dj.make_keys(2):
        assert jnp.issubdtype(stream.dtype, jax.dtypes.prng_key)
