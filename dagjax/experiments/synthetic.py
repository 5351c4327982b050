"""Data with a planted ticket: targets computed by a small sparse network."""

import numpy as np

from dagjax.experiments.examples import Data, check, fail

Params = dict[str, dict[str, np.ndarray]]


def teacher(
    seed: int = 0,
    n_train: int = 1024,
    n_test: int = 256,
    d_in: int = 16,
    d_hidden: int = 4,
    d_out: int = 1,
    kept: int = 4,
) -> Data:
    """A regression whose targets a sparse relu network computes exactly.

    A student of the same depth that is pruned to the teacher's edges can reach zero
    loss: `planted` with the same arguments tells which edges these are.

    Args:
        seed: of the teacher and of the inputs.
        n_train: examples to train on.
        n_test: examples to test on; they do not depend on `n_train`.
        d_in: inputs, standard normal.
        d_hidden: hidden units of the teacher.
        d_out: targets.
        kept: inputs that each hidden unit sees.

    Returns:
        float32 inputs `[N, d_in]` and targets `[N, d_out]`.

    Raises:
        DataError: a size is not positive, or `kept` exceeds `d_in`.

    >>> data = teacher(n_train=5, d_in=8)
    >>> data.x_train.shape, data.y_train.shape
    ((5, 8), (5, 1))
    """
    params = planted(seed, d_in=d_in, d_hidden=d_hidden, d_out=d_out, kept=kept)
    _positive(n_train=n_train, n_test=n_test)
    x_train, x_test = (
        np.random.default_rng([seed, stream]).standard_normal((n, d_in), np.float32)
        for stream, n in ((1, n_train), (2, n_test))
    )
    y_train, y_test = (_apply(params, x) for x in (x_train, x_test))
    return check(Data(x_train, y_train, x_test, y_test), "teacher")


def planted(
    seed: int = 0, d_in: int = 16, d_hidden: int = 4, d_out: int = 1, kept: int = 4
) -> Params:
    """The network behind `teacher`, `x -> relu(x @ K0 + b0) @ K1`.

    Every kernel entry is zero or well away from it, so the ticket is its support.

    Args:
        seed: of the weights.
        d_in: inputs.
        d_hidden: hidden units.
        d_out: outputs.
        kept: nonzero weights into each hidden unit.

    Returns:
        float32 `{"Dense_0": {"kernel": [d_in, d_hidden], "bias": [d_hidden]},
        "Dense_1": {"kernel": [d_hidden, d_out], "bias": [d_out]}}`.

    Raises:
        DataError: a size is not positive, or `kept` exceeds `d_in`.

    >>> kernel = planted(d_in=8, d_hidden=3, kept=2)["Dense_0"]["kernel"]
    >>> np.count_nonzero(kernel, axis=0).tolist()
    [2, 2, 2]
    """
    _positive(d_in=d_in, d_hidden=d_hidden, d_out=d_out, kept=kept)
    if seed < 0:
        fail("teacher: seed", f"{seed}", "0 or more")
    if kept > d_in:
        fail("teacher: kept", f"{kept}", f"at most d_in, which is {d_in}")
    rng = np.random.default_rng([seed, 0])
    ranks = rng.random((d_in, d_hidden)).argsort(axis=0).argsort(axis=0)
    dense = _weights(rng, (d_in, d_hidden)) / np.sqrt(kept)
    first = {
        "kernel": np.where(ranks < kept, dense, 0).astype(np.float32),
        "bias": rng.uniform(-0.5, 0.5, d_hidden).astype(np.float32),
    }
    second = {
        "kernel": _weights(rng, (d_hidden, d_out)) * np.float32(np.sqrt(2 / d_hidden)),
        "bias": np.zeros(d_out, np.float32),
    }
    return {"Dense_0": first, "Dense_1": second}


def _apply(params: Params, x: np.ndarray) -> np.ndarray:
    """Targets `[N, d_out]` of inputs `[N, d_in]`."""
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)  # [N, d_hidden]
    return hidden @ second["kernel"] + second["bias"]


def _weights(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """float32 weights of size 0.5 to 1.5 and either sign."""
    signed = rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
    return signed.astype(np.float32)


def _positive(**sizes: int) -> None:
    """Require sizes of at least one."""
    for name, size in sizes.items():
        if size < 1:
            fail(f"teacher: {name}", f"{size}", "1 or more")
