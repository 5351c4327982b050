"""The figures of `mathematics.md`: `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

import dagjax as dj

FIGURES = Path(__file__).parent / "figures"


def small_resnet() -> tuple[dj.DAG, jax.Array]:
    """A ResNet-8 with 2 channels on one 8x8 digit, its running statistics settled."""
    images = jnp.asarray(dj.data.digits().x_train)
    graph = dj.zoo.resnet(8, width=2, input_shape=(8, 8, 1))
    dag = dj.init(jax.random.key(3), graph, images[:1])
    for _ in range(50):
        dag = dag.replace(state=dag.apply(images[:256], train=True)[1])
    return dag, images[7:8]


def main() -> None:
    """Draw and save."""
    FIGURES.mkdir(exist_ok=True)
    dag, x = small_resnet()
    lin = dj.linearize(dag, x, tolerance=0)
    logit = int(jnp.argmax(dag(x)))
    parts = dj.contributions(lin)
    shares = {arc: float(part[0, logit]) for arc, part in parts.arcs.items()}
    worth = dj.shapley(dag, x, readout=lambda y: y[0, logit])
    figures = {
        "resnet8": dj.draw(dag),
        "matrices": dj.draw_matrices(lin.matrices(), product=lin.product()),
        "contributions": dj.draw(dag, contributions=shares),
        "shapley": dj.draw(
            dag, contributions={a: float(v) for a, v in worth.values.items()}
        ),
        "resnet56": dj.draw(dj.zoo.resnet(56)),
    }
    for name, figure in figures.items():
        figure.savefig(FIGURES / f"{name}.svg")
        print(FIGURES / f"{name}.svg")


if __name__ == "__main__":
    main()
