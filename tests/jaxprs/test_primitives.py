"""Every claim of the table of primitives against primitives that are only evaluated.

Examples are met in traces of functions; the oracle knows no rules: it feeds random
operands, zeros and constants, and looks at what comes out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dagjax.jaxprs.interpret import bind
from dagjax.jaxprs.primitives import PRIMITIVES, Primitive, primitive_of
from dagjax.jaxprs.program import program_of

SHAPE = (3, 4)
UNARY = [
    lax.neg, lax.sqrt, lax.square, lax.tanh, lax.atan, lax.asinh, lax.erf, lax.erfc,
    lax.logistic, lax.asin, lax.sinh, lax.atanh, lax.expm1, lax.log1p, lax.cbrt,
    lax.erf_inv, lax.floor, lax.ceil, lax.round, lax.sign, lax.exp, lax.exp2, lax.log,
    lax.acosh, lax.acos, lax.rsqrt, lax.abs, lax.sin, lax.cos, lax.tan,
    lax.stop_gradient, lax.bessel_i1e, lambda x: lax.reduce_precision(x, 5, 4),
    lambda x: x.astype(jnp.float16),
    lambda x: lax.optimization_barrier((x,))[0], lambda x: jax.device_put(x),
    lambda x: lax.bitcast_convert_type(x, jnp.int32), jnp.copy,
    lambda x: checkpoint_name(x, "here"),
]  # fmt: skip
BINARY = [
    lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min, lax.gt, lax.lt,
    lax.ne, lax.complex,
]  # fmt: skip
WHOLE = [
    lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.shift_left,
    lax.shift_right_arithmetic, lax.shift_right_logical,
]  # fmt: skip
SHAPING = [
    lambda x: lax.broadcast_in_dim(x, (2, *SHAPE), (1, 2)),
    lambda x: lax.concatenate([x, x + 1], 0), lambda x: lax.expand_dims(x, (0,)),
    lambda x: lax.pad(x, x[0, 0], [(1, 0, 0), (0, 2, 1)]),
    lambda x: lax.reshape(x, (4, 3)), lambda x: lax.rev(x, (0,)),
    lambda x: lax.slice(x, (1, 0), (3, 4)), lambda x: lax.split(x, (1, 2)),
    lambda x: lax.squeeze(x[:1], (0,)), lambda x: x.T,
    lambda x: x.sum(0), lambda x: lax.reduce_max(x, (0,)),
    lambda x: lax.reduce_min(x, (1,)),
    lambda x: (x > 0).all(0), lambda x: (x > 0).any(0), lambda x: x.prod(0),
    lambda x: jnp.cumsum(x, 0), lambda x: lax.cummax(x, 0), lambda x: lax.cummin(x, 1),
    lambda x: jnp.cumprod(x, 0), lambda x: lax.cumlogsumexp(x, 0),
    lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "VALID"),
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"),
    lambda x: lax.reduce_window(x, jnp.inf, lax.min, (2, 2), (1, 1), "VALID"),
    lambda x: lax.dynamic_slice(x, (jnp.int32(1), jnp.int32(0)), (2, 4)),
    lambda x: lax.dynamic_update_slice(x, x[:1], (jnp.int32(1), jnp.int32(0))),
    lambda x: x.at[jnp.array([0, 2])].set(x[:2]),
    lambda x: x.at[jnp.array([0, 2])].add(x[:2]),
    lambda x: x.at[jnp.array([0, 2])].max(x[:2]),
    lambda x: x.at[jnp.array([0, 2])].min(x[:2]),
    lambda x: x.at[jnp.array([0, 2])].mul(x[:2]),
    lambda x: jnp.real(lax.complex(x, x)), lambda x: jnp.imag(lax.complex(x, x)),
    lambda x: jnp.conj(lax.complex(x, x)), lambda x: jnp.fft.fft(x),
    lambda x: x @ x.T, lambda x: lax.clamp(x - 1, x, x + 1),
    lambda x: jnp.where(x > 0, x, x + 1),
    lambda x: lax.conv(x[None, None], x[None, None, :2, :2], (1, 1), "SAME"),
    lambda x: lax.ragged_dot(x, jnp.stack([x.T, x.T]), jnp.array([1, 2])),
    lambda x: jnp.tile(x, (2, 1)), lambda x: jnp.stack([x, x]), jnp.unstack,
    lambda x: lax.reduce_xor((x * 9).astype(jnp.int32), (0,)),
    lambda x: lax.population_count((x * 9).astype(jnp.int32)),
]  # fmt: skip
# Names of other versions of jax, of meshes, and of what nothing public binds.
RARE = {
    "add_any", "copy_p", "scatter_add", "scatter_mul", "scatter-sub", "reshard",
    "sharding_constraint", "tile", "stack", "unstack", "copy", "expand_dims",
    "device_put",
}  # fmt: skip
INDEXED = {
    "dynamic_slice": (0,), "dynamic_update_slice": (0, 1), "select_n": (1, 2),
    "ragged_dot_general": (0, 1),
}  # fmt: skip


@functools.cache
def examples():
    """`{primitive: an equation}`."""
    x = jnp.ones(SHAPE)
    calls = [(fn, (x,)) for fn in (*UNARY, *SHAPING)]
    calls += [(fn, (x, x)) for fn in BINARY]
    calls += [(fn, (x.astype(jnp.int32),) * 2) for fn in WHOLE]
    found = {}
    for fn, operands in calls:
        for equation in program_of(jax.make_jaxpr(fn)(*operands)).equations:
            found.setdefault(equation.name, equation.eqn)
    return found


def data_of(eqn):
    """Which operands hold data; the others are indices and choices."""
    name = eqn.primitive.name
    every = (0, 2) if name.startswith("scatter") else tuple(range(len(eqn.invars)))
    return INDEXED.get(name, every)


def drawn(eqn, seed=0):
    """Operands in (0.1, 0.9), where all functions but one are finite."""
    rng = np.random.default_rng(seed)
    least = 1 if eqn.primitive.name == "acosh" else 0

    def fill(place, aval):
        x = least + rng.uniform(0.1, 0.9, aval.shape)
        whole = aval.dtype == bool or jnp.issubdtype(aval.dtype, jnp.integer)
        if place in data_of(eqn) and whole and aval.dtype != bool:
            return jnp.asarray(np.ceil(x * 5), aval.dtype)
        return jnp.asarray(np.where(x > 0.5, 1, 0) if whole else x, aval.dtype)

    return [fill(i, v.aval) for i, v in enumerate(eqn.invars)]


def made(eqn, operands):
    return [np.asarray(y).astype(np.complex128) for y in bind(eqn, operands)]


def near(one, two):
    rows = zip(one, two, strict=True)
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in rows)


def is_linear(eqn, places):
    one, two, mixed = drawn(eqn, 1), drawn(eqn, 2), drawn(eqn, 1)
    for i in range(len(one)):
        mixed[i] = 2 * one[i] - 3 * two[i] if i in places else one[i]
        two[i] = two[i] if i in places else one[i]
    rows = zip(made(eqn, one), made(eqn, two), strict=True)
    return near(made(eqn, mixed), [2 * a - 3 * b for a, b in rows])


def is_zero_of_zeros(eqn, places):
    operands = drawn(eqn)
    for i in places:
        operands[i] = jnp.zeros_like(operands[i])
    return all(not y.any() for y in made(eqn, operands))


def keeps_constants(eqn, value=3):
    operands = [
        jnp.full_like(x, value) if i in data_of(eqn) and x.dtype != bool else x
        for i, x in enumerate(drawn(eqn))
    ]
    flags = all(operands[i].dtype == bool for i in data_of(eqn))
    return flags or all((y == value).all() for y in made(eqn, operands))


def rises(eqn, place, sign):
    low = drawn(eqn)
    high = [*low]
    if low[place].dtype == bool:
        high[place] = jnp.ones_like(low[place])
    else:
        high[place] = low[place] + drawn(eqn, 5)[place] / 10
    rows = zip(made(eqn, low), made(eqn, high), strict=True)
    return all((sign * (b - a).real >= -1e-6).all() for a, b in rows)


def is_lipschitz(eqn, bound):
    one, two = drawn(eqn, 1), drawn(eqn, 2)
    step = max(float(jnp.abs(a - b).max()) for a, b in zip(one, two, strict=True))
    rows = zip(made(eqn, one), made(eqn, two), strict=True)
    return all(np.abs(a - b).max() <= bound * step + 1e-5 for a, b in rows)


def broken(entry, eqn):
    """The claims of an entry that do not hold of an example."""
    data, checks = data_of(eqn), {}
    linear = data if entry.linear == "all" else entry.linear
    if linear and not any(eqn.invars[i].aval.dtype == bool for i in linear):
        checks["linear"] = is_linear(eqn, linear)
    if entry.bilinear:
        checks["bilinear"] = all(is_linear(eqn, (i,)) for i in data)
    if entry.zero is not None:
        sets = {"all": [data], "any": [(i,) for i in data], "first": [data[:1]]}
        checks["zero"] = all(is_zero_of_zeros(eqn, s) for s in sets[entry.zero])
    if entry.keeps_constant:
        checks["keeps_constant"] = keeps_constants(eqn)
    for place in data if entry.monotone else ():
        sign = entry.monotone[min(place, len(entry.monotone) - 1)]
        checks[f"monotone {place}"] = sign == 0 or rises(eqn, place, sign)
    if entry.lipschitz is not None:
        checks["lipschitz"] = is_lipschitz(eqn, entry.lipschitz)
    return {claim for claim, holds in checks.items() if not holds}


def claims(entry):
    more = (entry.bilinear, entry.zero, entry.keeps_constant, entry.lipschitz)
    return bool(entry.linear or entry.monotone or any(more))


@pytest.mark.parametrize("name", sorted(n for n, p in PRIMITIVES.items() if claims(p)))
def test_claims_hold(name):
    eqn = examples().get(name)
    if eqn is None:
        assert name in RARE
        return
    assert broken(PRIMITIVES[name], eqn) == set()


MUTANTS = {
    "exp": {"zero": "all"}, "cos": {"keeps_constant": True}, "mul": {"linear": "all"},
    "neg": {"monotone": (1,)}, "tanh": {"lipschitz": 0.3},
    "reduce_sum": {"keeps_constant": True},
    "tan": {"linear": "all"}, "add": {"zero": "any"}, "expm1": {"monotone": (-1,)},
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_claims_are_found(name):
    wrong = Primitive(name, PRIMITIVES[name].kind, **MUTANTS[name])
    assert broken(wrong, examples()[name])


def test_rounding_once():
    """In float32 the result is that of float64, rounded."""
    for name, entry in PRIMITIVES.items():
        if entry.rounds_once and name in examples():
            eqn = examples()[name]
            operands = drawn(eqn, 3)
            (single,) = bind(eqn, operands)
            with jax.enable_x64(True):
                wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in operands]
                fn = lambda *xs, eqn=eqn: eqn.primitive.bind(*xs, **eqn.params)
                exact = np.asarray(fn(*wide)).astype(np.float32)
            assert np.array_equal(np.asarray(single), exact), name


def test_what_is_not_listed_is_opaque():
    entry = Primitive.of("of_a_later_version")
    assert entry.kind == "opaque"
    assert not claims(entry)
    assert primitive_of(examples()["exp"]).name == "exp"
