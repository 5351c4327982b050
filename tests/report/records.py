"""Synthetic records with numbers as an experiment gives them."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from dagjax.experiments.result import Record

mpl.use("agg")

DENSITIES = (0.67, 0.45, 0.3, 0.2)
CONTROLS = ("random", "fresh", "transfer", "narrow")
EVALS = np.arange(0, 1001, 20)


def make_record(
    densities=DENSITIES, controls=CONTROLS, seeds=5, masks=None, prune="weights"
):
    rng = np.random.default_rng(0)

    def curves(rounds, rate):
        mean = 2.3 * np.exp(-rate * np.sqrt(EVALS)) + 0.02
        return mean * np.exp(rng.normal(0, 0.05, (rounds, seeds, EVALS.size)))

    rounds = len(densities)
    loss = {"dense": curves(1, 0.16), "ticket": curves(rounds, 0.18)}
    loss |= {name: curves(rounds, 0.12) for name in controls}
    metric = {name: rng.normal(0.95, 0.003, x.shape[:2]) for name, x in loss.items()}
    weights = {name: [1000] * len(x) for name, x in loss.items()}
    settings = {"metric": "accuracy", "margin": 0.01, "prune": prune}
    masks = weight_masks(densities, seeds) if masks is None else masks
    return Record(settings, EVALS, densities, loss, metric, metric, weights, masks)


def falling(shape, densities, seeds):
    """Masks `[round, seed, ...]`, the first one full, each with its share."""
    scores = np.random.default_rng(1).permutation(seeds * int(np.prod(shape)))
    scores = scores.reshape(seeds, *shape)
    rank = scores.reshape(seeds, -1).argsort(-1).argsort(-1).reshape(scores.shape)
    size = int(np.prod(shape))
    return np.stack([rank < round(d * size) for d in (1.0, *densities)])


def weight_masks(densities=DENSITIES, seeds=5):
    make = lambda *shape: falling(shape, densities, seeds)
    layer = lambda *shape: {"Dense": {"kernel": make(*shape), "bias": None}}
    params = {"fc1": layer(784, 300), "fc2": layer(300, 100), "fc3": layer(100, 10)}
    return {"params": params, "gates": None}


def texts(figure):
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(mpl.text.Text) if t.get_text()]


def drawn(figure):
    """Draw as a user would; nothing may be left open in pyplot."""
    figure.canvas.draw()
    assert not plt.get_fignums()
    return figure
