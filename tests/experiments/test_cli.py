"""The command line: what it writes, and one line where it refuses."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import dagjax as dj
from dagjax import cli
from dagjax.cli import by_name, commands
from dagjax.experiments.store import Store

CPU = ["--device", "cpu"]
TINY = [
    *CPU, "--seeds", "4", "--rounds", "1", "--density", "0.5", "--controls", "none",
    "--steps", "4", "--batch", "16",
]  # fmt: skip

OWN = """
import dagjax as dj
from dagjax.experiments import data as datasets

def net():
    return dj.zoo.mlp((5, 10), input_shape=(8, 8, 1))

def line():
    return dj.zoo.mlp((5, 1), input_shape=(6,))

def lines():
    return datasets.teacher(n_train=48, n_test=20, d_in=6)

def data():
    return datasets.Data(*(x[:60] for x in datasets.digits()))

built = net()

def fails():
    raise ValueError("the factory fails")

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A current folder with a module of one's own; JAX is left as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "own_net.py").write_text(OWN)
    names = [
        "jax_platforms",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    sys.modules.pop("own_net", None)


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run(folder, capsys):
    own = ["--net", "own_net:net", "--data", "own_net:data", "--out", "run"]
    cli.main(["lottery", *TINY, *own])
    out = capsys.readouterr().out
    for text in ("dense", "ticket", "accuracy", "No weak ticket"):
        assert text in out
    pictures = {f"{name}.png" for name in ("accuracy", "curves", "masks", "graph")}
    written = {"run.json", "arrays.npz", "masks.npz", "table.txt", "rounds", "tickets"}
    assert files(folder / "run") == pictures | written
    told = json.loads((folder / "run" / "run.json").read_text())
    assert told["finished"] is True
    assert told["settings"]["densities"] == [0.5]
    assert told["settings"]["seeds"] == 4
    assert set(told["versions"]) >= {"python", "dagjax", "jax", "flax", "optax"}
    assert told["device"]
    assert told["seconds"] > 0
    with np.load(folder / "run" / "masks.npz", allow_pickle=False) as masks:
        assert {masks[name].shape[:2] for name in masks.files} == {(2, 4)}

    when = {p: p.stat().st_mtime_ns for p in (folder / "run" / "rounds").iterdir()}
    again = ["lottery", *TINY, *own, "--resume"]
    cli.main(again)
    assert {p: p.stat().st_mtime_ns for p in when} == when
    with pytest.raises(SystemExit) as caught:
        cli.main([*again, "--lr", "0.5"])
    assert caught.value.code == 2
    assert "learning_rate: 0.0012 -> 0.5" in capsys.readouterr().err


def test_a_run_of_regression(folder, capsys):
    """Its metric is negative; that is no reason to warn."""
    cli.main(["lottery", *TINY, "--net", "own_net:line", "--data", "own_net:lines"])
    told = capsys.readouterr()
    assert "negative_error" in told.out.replace("\n", "")
    assert "warning" not in told.out
    [run] = (folder / "runs").iterdir()
    assert run.name.startswith("own_net-line-own_net-lines-weights-")
    assert "run.json" in files(run)


def test_a_ticket_is_cut_out(folder, capsys, monkeypatch):
    monkeypatch.setattr("dagjax.compaction.export.cost._latency", lambda *args: 1e-3)
    own = ["--net", "own_net:net", "--data", "own_net:data", "--out", "run"]
    cli.main(["lottery", *TINY, *own, "--prune", "units", "--no-compact"])
    cli.main(["compact", "run", *CPU, "--seed", "2", "--batch-sizes", "4"])
    told = capsys.readouterr().out
    assert "The ticket at density" not in told
    made = folder / "run" / "compact-seed2-round1"
    assert (made / "cost.txt").read_text() in told
    assert "before  385 (1.00)" in told  # 64 * 5 + 5 + 5 * 10 + 10
    assert "after   160 (0.42)" in told  # 64 * 2 + 2 + 2 * 10 + 10
    x = by_name.load_data("own_net:data").x_test[:4]
    assert dj.load(made / "network.zip")(x).shape == (4, 10)

    (folder / "own_net.py").write_text(OWN.replace("(5, 10)", "(6, 10)"))
    sys.modules.pop("own_net")
    importlib.invalidate_caches()
    for options, text in (
        ([], "was trained; see --net"),
        (["--net", "mlp"], "expected package.module:factory"),
        (["--batch-sizes", "0"], "expected 1 or more"),
        (["--round", "2"], "round 2: run has 1 to 1"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["compact", "run", *CPU, *options])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1


def test_networks_of_the_zoo_are_remembered(folder):
    """As they were made: with the shapes of the data, and the CPU's convolution."""
    for name in ("lenet5", "own_net:net"):
        data = by_name.load_data("digits")
        Store(folder).write_json("run", {"finished": True})
        by_name.remember(folder, name, data)
        record = Store(folder).read_json("run")
        assert by_name.remembered(record, None) == by_name.load_net(name, data)
    with pytest.raises(ValueError, match="started from Python"):
        by_name.remembered({}, None)
    own = by_name.load_net("own_net:net", None)
    assert by_name.remembered({}, "own_net:net") == own


# --- refusals ---------------------------------------------------------------------

REFUSED = {
    "net": (["--net", "lenet7"], "no net named 'lenet7'; nets are mlp, lenet-300-100"),
    "data": (["--data", "mnist"], "no data 'mnist': expected digits"),
    "no folder": (["--data", "no/such/folder"], "no/such/folder"),
    "no density": (["--density", "0"], "density 0.0: expected a kept share in (0, 1]"),
    "much": (["--density", "1.5"], "(0, 1]"),
    "little": (["--density", "1e-9"], "density 1e-09 keeps 0 of"),
    "rounds": (["--rounds", "0"], "rounds 0: expected at least 1"),
    "score": (["--score", "gate"], "choose from magnitude, taylor, random"),
    "arcs": (["--prune", "arcs", "--score", "magnitude"], "gate, taylor, random"),
    "prune": (["--prune", "cells"], "expected weights, units, arcs"),
    "controls": (["--controls", "random,x"], "no control named 'x'"),
    "optimizer": (["--optimizer", "x"], "choose from adam, adamw, sgd"),
    "schedule": (["--schedule", "x"], "choose from constant, linear"),
    "seeds": (["--seeds", "0"], "seeds 0: expected at least 1"),
    "steps": (["--steps", "0"], "steps 0: expected at least 1"),
    "device": (["--device", "fpga"], "expected auto, cpu, gpu or tpu"),
    "module": (["--net", "no_such:net"], "expected package.module:factory"),
    "factory": (["--net", "own_net:nett"], "expected package.module:factory"),
    "failing": (["--net", "own_net:fails"], "the factory fails"),
    "no net": (["--net", "own_net:number"], "3"),
    "no data": (["--data", "own_net:net"], "expected Data"),
    "a word": (["--seeds", "many"], "seeds"),
    "no option": (["--sedes", "3"], "sedes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what, capsys, monkeypatch, folder):
    monkeypatch.delenv("DAGJAX_TRACEBACK", raising=False)
    options, text = REFUSED[what]
    defaults = {"--net": "own_net:net", "--data": "own_net:data", "--device": "cpu",
                "--steps": "4", "--seeds": "1", "--controls": "none"}  # fmt: skip
    given = [w for k, v in defaults.items() if k not in options for w in (k, v)]
    with pytest.raises(SystemExit) as caught:
        cli.main(["lottery", *given, *options, "--out", "run"])
    told = capsys.readouterr()
    assert caught.value.code == 2
    assert text in told.err
    assert told.err.startswith("dagjax:")
    assert told.err.count("\n") == 1
    assert "Traceback" not in told.err
    assert not (folder / "run" / "arrays.npz").exists()


def test_the_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("DAGJAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="rounds 0"):
        cli.main(["lottery", *CPU, "--rounds", "0"])


def test_stopped_by_hand(monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dagjax.api.lottery", stop)
    with pytest.raises(SystemExit, match="--resume goes on"):
        cli.main(["lottery", *TINY, "--net", "own_net:net", "--data", "own_net:data"])


# --- the other commands -----------------------------------------------------------


def test_list(capsys):
    cli.main(["list"])
    out = capsys.readouterr().out
    for word in ("lenet5", "resnet20", "digits", "magnitude", "gate", "narrow",
                 "nesterov", "cosine", "module:factory"):  # fmt: skip
        assert word in out


def test_show(capsys, folder):
    cli.main(["show", "--net", "lenet5"])
    out = capsys.readouterr().out
    assert "conv1" in out
    assert (folder / "lenet5.png").read_bytes().startswith(b"\x89PNG")


def test_show_a_net_of_ones_own(folder):
    cli.main(["show", "--net", "own_net:built", "--out", "own.png"])
    assert "own.png" in files(folder)


def test_unknown_net_to_show(capsys):
    with pytest.raises(SystemExit):
        cli.main(["show", "--net", "x"])
    assert capsys.readouterr().err.startswith("dagjax: no net named 'x'")


# --- small parts ------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_densities_fall_by_one_factor(density, rounds):
    found = np.array([1.0, *commands.geometric(density, rounds)])
    np.testing.assert_allclose(found[1:] / found[:-1], density ** (1 / rounds))
    assert found[-1] == density
    assert len(found) == rounds + 1


def test_nets_fit_the_data():
    data = by_name.load_data("digits")
    graph = by_name.load_net("mlp", data)
    assert dict(graph.spaces)["in"].shape == (8, 8, 1)
    assert graph.arcs[-1].fn == by_name.load_net("mlp", None).arcs[-1].fn


def test_the_current_folder_is_searched_and_left(folder):
    path = list(sys.path)
    by_name.load_net("own_net:net", None)
    assert sys.path == path


# --- the second start compiles nothing --------------------------------------------

COUNTED = """
import collections, json, sys
import jax
from dagjax import cli
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
found, name = [], "/jax/compilation_cache/cache_"
for args in json.loads(sys.argv[1]):
    jax.clear_caches()
    counts.clear()
    cli.main(args)
    found.append([counts[name + "misses"], counts[name + "hits"]])
print(json.dumps(found))
"""


def compilations(cache, *runs):
    """Misses and hits of the compilation cache, run by run of one process."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    args = ["lottery", *CPU, "--data", "own_net:data", "--seeds", "2", "--rounds", "1",
            "--controls", "none", "--steps", "2", "--batch", "8"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, json.dumps([[*args, *own] for own in runs])],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """After a first start: the counts of a second one and of two runs behind it."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "own_net.py").write_text(OWN)
    own = ["--net", "own_net:net"]
    names = ("rate", "net")
    runs = [*own, "--lr", "0.1"], ["--net", "mlp"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        [(misses, _)] = compilations(folder / "cache", own)
        again = compilations(folder / "cache", *runs)
    assert misses > 10
    return dict(zip(names, again, strict=True))


def test_the_second_start_compiles_nothing(started):
    """Also with another learning rate: it is a value."""
    misses, hits = started["rate"]
    assert misses == 0
    assert hits > 10


def test_mutant_with_another_net_compiles(started):
    misses, _ = started["net"]
    assert misses > 10


def test_the_version_is_that_of_the_package(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"dagjax {importlib.metadata.version('dagjax')}\n"
