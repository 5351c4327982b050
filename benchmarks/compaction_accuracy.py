"""Accuracy against operations: LeNet-5 and a ResNet-8 on Fashion-MNIST, cut and tuned.

    python benchmarks/compaction_accuracy.py [--budget full] [--nets lenet5 resnet8]

One dense start for each seed. Its units are removed by several methods to 3/4, 1/2 and
1/4 of the operations; accuracy is taken right after `dj.compact` (one shot) and after
the compacted network was tuned for one epoch, batch statistics frozen.

Methods keep the same share of every group of units (scope "group"), so that they leave
the same structure and differ in which units stay, and in the refit, alone. LAMP orders
the units of one group as l2 does; its scores are made to compare groups, so it has
scope "global", where all units compete, and l2 is shown with both. LIFT-PRUNE is shown
with two scores: l2 (its default; without refit the same as "l2") and "energy", of the
units on the calibration images.

Every cell is a line of `results/compaction_accuracy.jsonl`; a run goes on where the
last one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from scipy import stats

import dagjax as dj
from dagjax.compaction.pruning.lift import energy, lift_prune
from dagjax.experiments.data import load
from dagjax.experiments.tasks import accuracy, cross_entropy
from dagjax.report import style

SHARES = (0.5, 0.25, 0.75)  # in the order of the runs
SEEDS = {"lenet5": 5, "resnet8": 3}
METHODS = (
    "random",
    "l2",
    "l2 global",
    "taylor",
    "lamp",
    "energy",
    "l2 + refit",
    "energy + refit",
)
DENSE = "dense"  # nothing is cut; tuned like the others
GLOBAL = {  # the others have scope "group"
    "l2 global": {"scope": "global"},
    "lamp": {"scope": "global", "normalize": "lamp"},
}
LABELS = {
    "l2 global": "l2, global",
    "lamp": "lamp, global",
    "energy": "energy, no refit",
    "l2 + refit": "LIFT-PRUNE (l2)",
    "energy + refit": "LIFT-PRUNE (energy)",
}
TITLES = {"lenet5": "LeNet-5", "resnet8": "ResNet-8"}
STAGES = {"one shot": "one shot", "tuned": "after one epoch of fine-tuning"}
BATCH, SLICE = 128, 1000


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run costs; a dict has one entry for each network."""

    side: int
    width: int  # of the first stage of the ResNet
    train: dict[str, int]
    test: dict[str, int]
    epochs: dict[str, int]
    tune_epochs: int = 1
    calibrate: int = 512
    dense_rate: float = 2e-3
    tune_rate: float = 1e-3


BUDGETS = {
    "small": Budget(
        side=14,
        width=8,
        train={"lenet5": 10_000, "resnet8": 6_000},
        test={"lenet5": 4_000, "resnet8": 2_000},
        epochs={"lenet5": 5, "resnet8": 6},
    ),
    "full": Budget(
        side=28,
        width=16,
        train={"lenet5": 60_000, "resnet8": 60_000},
        test={"lenet5": 10_000, "resnet8": 10_000},
        epochs={"lenet5": 20, "resnet8": 20},
        calibrate=2048,
    ),
}


# --- data and networks ----------------------------------------------------------------


def images(x: Any, side: int) -> Any:
    """Mean pooling down to so many pixels a side."""
    factor = x.shape[1] // side
    return x.reshape(-1, side, factor, side, factor, 1).mean((2, 4), dtype=np.float32)


def data_of(budget: Budget, name: str) -> tuple[Any, Any, Any, Any]:
    """Images and labels, to train on and to test on."""
    data, n, m = load("fashion-mnist"), budget.train[name], budget.test[name]
    train = images(np.asarray(data.x_train[:n]), budget.side), data.y_train[:n]
    test = images(np.asarray(data.x_test[:m]), budget.side), data.y_test[:m]
    return *train, *test


def graph_of(budget: Budget, name: str) -> Any:
    """The network, untrained."""
    shape = (budget.side, budget.side, 1)
    if name == "lenet5":
        return dj.zoo.lenet5(10, input_shape=shape)
    return dj.zoo.resnet(8, 10, width=budget.width, input_shape=shape)


# --- training -------------------------------------------------------------------------


def batches(seed: int, epochs: int, count: int) -> Iterator[Any]:
    """Indices of examples, every epoch in another order."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(count)
        yield from order[: count // BATCH * BATCH].reshape(-1, BATCH)


@functools.partial(jax.jit, static_argnames="rate")
def dense_step(dag: Any, opt: Any, x: Any, y: Any, *, rate: float) -> Any:
    """One step in training mode: batch statistics move."""

    def loss(params: Any) -> Any:
        outputs, state = dag.replace(params=params).apply(x, train=True)
        return cross_entropy(outputs, y).mean(), state

    grads, state = jax.grad(loss, has_aux=True)(dag.params)
    updates, opt = optax.adam(rate).update(grads, opt)
    params = optax.apply_updates(dag.params, updates)
    return dag.replace(params=params, state=state), opt


def loss_of(params: Any, apply: Any, x: Any, y: Any) -> Any:
    """Cross entropy in inference mode."""
    return cross_entropy(apply(params, x), y).mean()


gradient = jax.jit(jax.grad(loss_of))


@functools.partial(jax.jit, static_argnames="rate")
def tune_step(params: Any, opt: Any, apply: Any, x: Any, y: Any, *, rate: float) -> Any:
    """One step of a compacted network."""
    grads = jax.grad(loss_of)(params, apply, x, y)
    updates, opt = optax.adam(rate).update(grads, opt)
    return optax.apply_updates(params, updates), opt


@jax.jit
def hits(params: Any, apply: Any, x: Any, y: Any) -> Any:
    """How many are right."""
    return accuracy(apply(params, x), y).sum()


def score(apply: Any, params: Any, x: Any, y: Any) -> float:
    """Accuracy, a slice of the images at a time."""
    slices = (slice(i, i + SLICE) for i in range(0, len(x), SLICE))
    return float(sum(hits(params, apply, x[s], y[s]) for s in slices)) / len(x)


def dense(budget: Budget, name: str, seed: int, data: Any) -> Any:
    """The dense network of one seed, trained."""
    x, y = data[:2]
    dag = dj.init(jax.random.key(seed), graph_of(budget, name), x[:1])
    opt = optax.adam(budget.dense_rate).init(dag.params)
    for at in batches(seed, budget.epochs[name], len(x)):
        dag, opt = dense_step(dag, opt, x[at], y[at], rate=budget.dense_rate)
    return dag


def tuned(budget: Budget, apply: Any, params: Any, seed: int, data: Any) -> Any:
    """The parameters after fine-tuning."""
    x, y = data[:2]
    opt = optax.adam(budget.tune_rate).init(params)
    for at in batches(1000 + seed, budget.tune_epochs, len(x)):
        params, opt = tune_step(params, opt, apply, x[at], y[at], rate=budget.tune_rate)
    return params


# --- pruning --------------------------------------------------------------------------


def scores_of(dag: Any, x: Any, y: Any, seed: int) -> dict[str, Any]:
    """`{method: scores}` of one dense start, on calibration images."""
    rng, (apply, params) = np.random.default_rng(seed), dj.as_function(dag)
    grads = gradient(params, apply, x, y)
    return {
        "l2": "l2",
        "l2 global": "l2",
        "lamp": "l2",
        "taylor": jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads),
        "energy": energy(dag, x),
        "random": {n: rng.random(g.size) for n, g in dj.units(dag).channels.items()},
    }


def pruned(dag: Any, scores: dict[str, Any], method: str, share: float, x: Any) -> Any:
    """The network and its mask."""
    kind, _, refit = method.partition(" + ")
    if refit:
        found = lift_prune(dag, x, {"flops": share}, scores[kind], scope="group")
        return found.net, found.mask
    how = GLOBAL.get(kind, {"scope": "group"})
    return dag, dj.prune_units(dag, scores[kind], flops=share, **how)


class Start:
    """A trained network, its accuracy and its scores."""

    def __init__(self, budget: Budget, name: str, seed: int, data: Any):
        self.budget, self.seed, self.data = budget, seed, data
        self.dag = dense(budget, name, seed, data)
        self.score = score(*dj.as_function(self.dag), *data[2:])
        self.x, y = data[0][: budget.calibrate], data[1][: budget.calibrate]
        self.scores = scores_of(self.dag, self.x, y, seed)
        self.total = dj.units(self.dag).total[0]

    def cut(self, method: str, share: float) -> Any:
        """The smaller network."""
        net, mask = pruned(self.dag, self.scores, method, share, self.x)
        return dj.compact(net, mask, verify=False).net

    def cell(self, method: str, share: float) -> dict[str, float]:
        """Accuracies of one method at one share."""
        small = self.dag if method == DENSE else self.cut(method, share)
        apply, params = dj.as_function(small)
        after = tuned(self.budget, apply, params, self.seed, self.data)
        return {
            "flops": dj.units(small).total[0] / self.total,
            "one shot": score(apply, params, *self.data[2:]),
            "tuned": score(apply, after, *self.data[2:]),
        }


# --- runs -----------------------------------------------------------------------------


def cells_of(name: str) -> list[tuple[str, int, str, float]]:
    """All cells of a network, the middle share first."""
    seeds = range(SEEDS[name])
    cut = [(name, k, m, share) for share in SHARES for k in seeds for m in METHODS]
    return cut + [(name, k, DENSE, 1.0) for k in seeds]


def done(path: Path) -> dict[tuple, dict[str, Any]]:
    """The cells that are known."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(r["net"], r["seed"], r["method"], r["share"]): r for r in rows}


def announce(budget: Budget, name: str, data: Any, count: int) -> None:
    """Time one compilation and some steps, and print what the run will take."""
    x, y = data[0][:BATCH], data[1][:BATCH]
    dag = dj.init(jax.random.key(0), graph_of(budget, name), x[:1])
    opt = optax.adam(budget.dense_rate).init(dag.params)
    step = lambda: dense_step(dag, opt, x, y, rate=budget.dense_rate)[1]
    first, one = record.seconds(step), min(record.seconds(step) for _ in range(5))
    epoch = budget.train[name] // BATCH * one
    starts = SEEDS[name] * (budget.epochs[name] * epoch + first)
    share = 0.6 * epoch * budget.tune_epochs  # smaller networks
    cells = count * (share + 0.3 * first + 6 * one * budget.test[name] / SLICE)
    print(f"{name}: compilation {first:.1f} s, step {1e3 * one:.0f} ms")
    print(f"  {count} cells, about {(starts + cells) / 60:.0f} minutes", flush=True)


def run(budget: Budget, name: str, path: Path) -> None:
    """Compute the cells of a network that are missing."""
    missing = [cell for cell in cells_of(name) if cell not in done(path)]
    if not missing:
        return
    data = data_of(budget, name)
    announce(budget, name, data, len(missing))
    start = functools.cache(lambda seed: Start(budget, name, seed, data))
    for cell in missing:
        begun = time.perf_counter()
        _, seed, method, share = cell
        named = dict(zip(("net", "seed", "method", "share"), cell, strict=True))
        row = named | start(seed).cell(method, share)
        row |= {"seconds": round(time.perf_counter() - begun, 2)}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def keep_compiled() -> None:
    """Programs of one structure are compiled once, in whatever run."""
    folder = Path(tempfile.gettempdir()) / "dagjax-compaction-accuracy"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# --- results --------------------------------------------------------------------------


def interval(values: Any) -> dict[str, float]:
    """The mean and half of its 95% t interval."""
    x = np.asarray(values, float)
    half = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x) if len(x) > 1 else np.nan
    return {"mean": round(float(x.mean()), 4), "half": round(float(half), 4)}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each network, share and method."""
    found = []
    for name in SEEDS:
        for share in sorted(SHARES, reverse=True):
            for method in METHODS:
                key = {"net": name, "share": share, "method": method}
                mine = [r for r in rows if key.items() <= r.items()]
                if mine:
                    found.append(key | _entry(mine))
    return found


def _entry(rows: list[dict[str, Any]]) -> dict[str, Any]:
    flops = round(float(np.mean([r["flops"] for r in rows])), 4)
    of = {stage: interval([r[stage] for r in rows]) for stage in STAGES}
    return {"seeds": len(rows), "flops": flops, **of}


def checks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """LIFT-PRUNE minus l2 before tuning at half of the operations, seed by seed."""
    half = [r for r in rows if r["share"] == 0.5]
    at = {(r["net"], r["method"], r["seed"]): r["one shot"] for r in half}
    found = {}
    for name, seeds in SEEDS.items():
        for method in ("l2 + refit", "energy + refit"):
            for base in ("l2", "l2 global"):
                gain = [at[name, method, k] - at[name, base, k] for k in range(seeds)]
                key = f"{name}: {LABELS[method]} minus {LABELS.get(base, base)}"
                found[key] = interval(gain) | {"least": round(min(gain), 4)}
    return found


def is_met(found: dict[str, Any]) -> bool:
    """Whether the intervals of all differences are above zero, and all seeds."""
    return all(f["mean"] > f["half"] and f["least"] > 0 for f in found.values())


def text(found: list[dict[str, Any]], dense_of: dict[str, Any]) -> str:
    """The table as text."""
    of = lambda s: f"{100 * s['mean']:5.1f} ± {100 * s['half']:4.1f}"
    lines = [f"{'net':8} {'FLOPs':>6}  {'method':30} {'one shot':>13} {'tuned':>13}"]
    for name, score in dense_of.items():
        lines.append(
            f"{name:8} {1:6.3f}  {'dense':30} {of(score['one shot']):>13} "
            f"{of(score['tuned']):>13}"
        )
        lines += [
            f"{name:8} {r['flops']:6.3f}  {LABELS.get(r['method'], r['method']):30} "
            f"{of(r['one shot']):>13} {of(r['tuned']):>13}"
            for r in found
            if r["net"] == name
        ]
    return "\n".join(lines)


def dense_scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of the dense networks, at the start and after tuning as well."""
    mine = lambda name: [r for r in rows if (r["net"], r["method"]) == (name, DENSE)]
    return {name: _entry(mine(name)) for name in SEEDS}


def seconds_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    """What the cells of each network took, the dense starts among them."""
    mine = lambda name: (r["seconds"] for r in rows if r["net"] == name)
    return {name: round(sum(mine(name))) for name in SEEDS}


def check_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the refit is worth it."""
    found = checks(rows)
    return {"met": is_met(found), "differences of accuracy, paired by seed": found}


def finish(name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    """Write and print what was found."""
    found, dense_of = table(rows), dense_scores(rows)
    shown = text(found, dense_of)
    figures = {
        "budget": kind,
        "sizes": dataclasses.asdict(BUDGETS[kind]) | {"batch": BATCH},
        "scope": {m: GLOBAL.get(m, {}).get("scope", "group") for m in METHODS},
        "interval": "95%, Student's t, over seeds",
        "seconds": seconds_of(rows),
        "check: one shot, half of the operations": check_of(rows),
        "dense": dense_of,
        "text": shown.splitlines(),
        "table": found,
    }
    record.write(name, figures)
    print(shown)
    draw(found, dense_of, kind, record.RESULTS / f"{name}.png")


# --- the figure -----------------------------------------------------------------------

LOOKS = {  # color (of the score), marker, line
    "random": ("#8c8c8c", "x", ":"),
    "l2": ("#0072b2", "s", "-"),
    "taylor": ("#009e73", "^", "-"),
    "l2 global": ("#56b4e9", "s", "-"),
    "lamp": ("#cc79a7", "D", "-"),
    "energy": ("#d55e00", "v", "-"),
    "l2 + refit": ("#0072b2", "o", "-"),
    "energy + refit": ("#d55e00", "o", "-"),
}


def draw(found: Any, dense_of: Any, kind: str, path: Path) -> None:
    """Accuracy against operations, a panel for each network and stage."""
    with style.canvas(9.2, 6.4) as figure:
        axes = figure.subplots(2, 2)
        figure.subplots_adjust(0.065, 0.19, 0.83, 0.95, wspace=0.72, hspace=0.36)
        for row, name in zip(axes, SEEDS, strict=True):
            for ax, stage in zip(row, STAGES, strict=True):
                mine = [r for r in found if r["net"] == name]
                panel(ax, mine, stage, 100 * dense_of[name][stage]["mean"])
                ax.set_title(f"{TITLES[name]}, {STAGES[stage]}", loc="left")
        figure.text(0.065, 0.025, caption(kind), fontsize=7.5, color=style.MUTED)
        figure.savefig(path, dpi=160)


def caption(kind: str) -> str:
    """What was run."""
    b = BUDGETS[kind]
    per_net = lambda sizes: " / ".join(f"{n:,}" for n in sizes.values())
    words = (
        f"Fashion-MNIST at {b.side}x{b.side} pixels, budget “{kind}”: "
        f"{per_net(b.train)} training and {per_net(b.test)} test images, dense start "
        f"of {per_net(b.epochs)} epochs (LeNet-5 / ResNet-8 of width {b.width}). "
        f"Means and 95% t intervals over {per_net(SEEDS)} seeds; points are moved "
        "apart a little. The same share of every group of units is kept; where "
        "“global” is said, all units compete. Scores and refit on "
        f"{b.calibrate:,} training images. The dense network (dashed) was tuned for "
        "the same epoch in the panels on the right. The vertical scales differ."
    )
    return textwrap.fill(words, 145)


def panel(ax: Any, rows: Any, stage: str, dense_score: float) -> None:
    """The lines of one panel with their labels."""
    ends = []
    for place, method in enumerate(METHODS):
        mine = [r for r in rows if r["method"] == method]  # most operations first
        x = [r["flops"] + 0.006 * (place - 3.5) for r in mine]
        y, half = (
            100 * np.array([r[stage][k] for r in mine]) for k in ("mean", "half")
        )
        line(ax, method, x, y, half)
        ends.append((x[-1], y[-1]))
    ax.axhline(dense_score, color=style.INK, lw=0.9, ls=(0, (4, 3)), zorder=0)
    words = {"textcoords": "offset points", "fontsize": 7.5}
    ax.annotate(f"dense {dense_score:.1f}", (0.96, dense_score), (0, 3), **words)
    ax.set_xlim(0.97, 0.2)
    lowest = 100 * min(r[stage]["mean"] for r in rows)
    ax.set_ylim(max(0, lowest - 8), dense_score + 8)
    ax.set_xticks([0.75, 0.5, 0.25], ["3/4", "1/2", "1/4"])
    ax.set_xlabel("operations kept")
    ax.set_ylabel("test accuracy, %")
    names(ax, ends)


def line(ax: Any, method: str, x: Any, y: Any, half: Any) -> None:
    """The line of a method with its intervals."""
    color, marker, dash = LOOKS[method]
    refit = "+" in method
    fill = color if refit else "white"
    ax.errorbar(
        x, y, half, color=color, marker=marker, ls=dash, ms=4.2, mfc=fill, capsize=1.5,
        lw=1.8 if refit else 1.1, elinewidth=0.8, mew=1.0, zorder=3 if refit else 2,
    )  # fmt: skip


def names(ax: Any, ends: list[tuple[float, float]]) -> None:
    """The names of the methods beside the ends of their lines."""
    low, high = ax.get_ylim()
    places = style.spread([y for _, y in ends], 0.075 * (high - low))
    for method, (x, y), place in zip(METHODS, ends, places, strict=True):
        color, bold = LOOKS[method][0], "bold" if "+" in method else None
        bend = [x - 0.012, 0.19, 0.175], [y, place, place]
        ax.plot(*bend, color=color, lw=0.5, alpha=0.7, clip_on=False)
        font = {"color": color, "fontsize": 7.5, "weight": bold}
        ax.text(0.165, place, LABELS.get(method, method), va="center", **font)


def main() -> None:
    """Run what is missing; write results when all cells are there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--nets", nargs="+", choices=SEEDS, default=list(SEEDS))
    args = parser.parse_args()
    name = "compaction_accuracy" + ("" if args.budget == "small" else "_full")
    path = record.RESULTS / f"{name}.jsonl"
    keep_compiled()
    for net in args.nets:
        run(BUDGETS[args.budget], net, path)
    cells = [cell for net in SEEDS for cell in cells_of(net)]
    found = done(path)
    rows = [found[cell] for cell in cells if cell in found]
    if len(rows) == len(cells):
        finish(name, args.budget, rows)
    else:
        print(f"{len(cells) - len(rows)} of {len(cells)} cells are missing")


if __name__ == "__main__":
    main()
