"""What all tests share: strict JAX, four devices, keys, transforms."""

import gc
import os

import hypothesis
import jax
import pytest

gc.set_threshold(100_000, 50, 100)  # tracing makes many objects and few cycles

jax.config.update("jax_num_cpu_devices", 4)

# Programs here are many and small: compiling them is most of the time they take. The
# older code generator is quicker; jax 0.12 has it no more and aborts on the flag.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):
    quick = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

hypothesis.settings.register_profile(
    "dagjax",
    deadline=None,
    max_examples=8,
    derandomize=True,
    database=None,
    # A failing DAG is small already; to shrink it takes minutes.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("dagjax")


@pytest.fixture(scope="module", autouse=True)
def strict_ranks(request):
    """In the graph room and its laws broadcasting adds no axes behind our back."""
    strict = request.path.parent.name in ("graph", "laws")
    with jax.numpy_rank_promotion("raise" if strict else "allow"):
        yield


@pytest.fixture(scope="module")
def strict_dtypes():
    """Dtypes never mix; for modules that compute in one precision."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def optimized():
    """For laws to the bit: as it is compiled where it is used."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def key():
    return jax.random.key(0)


def vmap_of_one(f):
    """`f` on a batch of one, whose axis is taken off again."""

    def mapped(*args):
        ys = jax.vmap(f)(*jax.tree.map(lambda x: x[None], args))
        return jax.tree.map(lambda y: y[0], ys)

    return mapped


@pytest.fixture(params=[lambda f: f, jax.jit, vmap_of_one], ids=["id", "jit", "vmap"])
def transform(request):
    """`f -> f`: as it is, compiled, mapped over a batch of one."""
    return request.param
