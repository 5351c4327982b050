"""Every rule of the wiring against functions that are only evaluated.

The oracle never reads a rule. It changes what the labels say goes together in one
operand, with zeros in its place in the others, and sees which entries of the outputs
move; it counts what can be cut; and it cuts, and compares what is left.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.interpreters import mlir

import dagjax as dj
from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.wires import RULES, Joined, Product, Same, Wiring
from dagjax.compaction.channels.wiring import register_primitive, wiring
from dagjax.compaction.removal.derivatives import End, cut_like
from dagjax.jaxprs.primitives import PRIMITIVES, Primitive
from dagjax.jaxprs.program import is_literal, program_of


class Case(NamedTuple):
    """A function, its operands, and what can be cut of them.

    `atoms` counts the units of the operands, by hand. `summed` holds the `(operand,
    axis)` that a reduction reads: to change those changes all entries.
    """

    fn: Any
    operands: tuple[Any, ...]
    atoms: int
    summed: tuple[tuple[int, int], ...] = ()


def case(fn, *shapes, atoms, summed=()):
    """Operands are shapes, to be filled, or arrays."""
    rng = np.random.default_rng(len(shapes))
    fill = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)
    made = tuple(fill(s) if isinstance(s, tuple) else s for s in shapes)
    return Case(fn, made, atoms, tuple(summed))


def dot(lhs, rhs, batch_lhs=(), batch_rhs=()):
    numbers = ((lhs, rhs), (batch_lhs, batch_rhs))
    return lambda a, b: lax.dot_general(a, b, numbers)


def conv(layout=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **options):
    options = {"window_strides": strides, "padding": padding, **options}
    return lambda x, w: lax.conv_general_dilated(
        x, w, dimension_numbers=layout, **options
    )


def shuffle(x):
    """Channel shuffle of 3 groups."""
    n, c = x.shape
    return x.reshape(n, 3, c // 3).swapaxes(1, 2).reshape(n, c)


def pool(kind, window=(1, 2, 2, 1), strides=(1, 2, 2, 1), padding="VALID"):
    init, op = {"max": (-jnp.inf, lax.max), "sum": (0.0, lax.add)}[kind]
    return lambda x: lax.reduce_window(x, init, op, window, strides, padding)


def scanned(w, h, xs):
    def once(h, x):
        h = jnp.tanh(h * w + x)
        return h, h[::-1] * 2

    return lax.scan(once, h, xs)


def looped(w, h):
    body = lambda at: (at[0] + 1, jnp.tanh(at[1] * w))
    return lax.while_loop(lambda at: at[0] < 3, body, (0, h))[1]


def either(flag, x, y):
    return lax.cond(flag > 0, lambda x, y: x * 2, lambda x, y: x + y, x, y)


def switched(which, x):
    branches = [jnp.sin, lambda x: x, lambda x: jnp.cumsum(x, 0)]
    return lax.switch(which, branches, x)


@jax.custom_vjp
def clipped(x, y):
    return jnp.clip(x, -1, 1) * y


clipped.defvjp(lambda x, y: (clipped(x, y), (x, y)), lambda res, g: (g, g))


def looked_up(table, ids):
    return table[ids]


def rows(table, ids):
    return jnp.take_along_axis(table, ids, axis=1)


def put(x, y):
    return lax.dynamic_update_slice(x, y, (1, 0))


IDS = jnp.array([0, 2, 2, 1])
COLUMNS = jnp.array([[0, 1], [2, 0], [1, 1]])
FLAG = jnp.array([[True, False, True, False]] * 3)
OIHW = ("NCHW", "OIHW", "NCHW")
ODD = ("CNHW", "HOWI", "HWNC")  # every axis elsewhere
IMAGE, KERNEL = (2, 5, 5, 4), (3, 3, 4, 6)

CASES = {
    # Contractions.
    "dot": case(dot((1,), (0,)), (3, 4), (4, 5), atoms=12),
    "dot batch": case(dot((2,), (1,), (0,), (0,)), (2, 3, 4), (2, 4, 5), atoms=14),
    "dot batch inside": case(
        dot((0,), (2,), (1,), (0,)), (4, 2, 3), (2, 5, 4), atoms=14
    ),
    "dot two axes": case(dot((0, 2), (1, 0)), (2, 3, 4), (4, 2, 5), atoms=14),
    "dot two batches": case(
        dot((1,), (2,), (0, 2), (1, 0)), (2, 3, 4), (4, 2, 3), atoms=9
    ),
    "outer": case(dot((), ()), (3,), (2,), atoms=5),
    "einsum": case(
        lambda a, b: jnp.einsum("bthk,bshk->bhts", a, b),
        (2, 3, 4, 5),
        (2, 6, 4, 5),
        atoms=2 + 3 + 4 + 5 + 6,
    ),
    # Convolutions: batch, features in and features out; never space.
    "conv": case(conv(), IMAGE, KERNEL, atoms=12),
    "conv valid": case(conv(padding="VALID"), IMAGE, KERNEL, atoms=12),
    "conv strided": case(conv(strides=(2, 2)), IMAGE, KERNEL, atoms=12),
    "conv dilated": case(conv(rhs_dilation=(2, 2)), IMAGE, KERNEL, atoms=12),
    "conv transposed": case(
        conv(padding=((2, 2), (2, 1)), lhs_dilation=(2, 2)), IMAGE, KERNEL, atoms=12
    ),
    "conv layout": case(conv(OIHW), (2, 4, 5, 5), (6, 4, 3, 3), atoms=12),
    "conv odd layout": case(conv(ODD), (4, 2, 5, 5), (3, 6, 3, 4), atoms=12),
    "conv transpose": case(
        lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME"),
        (2, 3, 3, 4),
        (2, 2, 4, 6),
        atoms=12,
    ),
    "conv 1d": case(conv(("NHC", "HIO", "NHC"), (1,)), (2, 5, 4), (3, 4, 6), atoms=12),
    # G groups of I features in and J out: batch, G, I, J.
    "conv groups": case(
        conv(feature_group_count=3),
        (2, 4, 4, 6),
        (3, 3, 2, 12),
        atoms=2 + 3 + 2 + 4,
    ),
    "conv groups layout": case(
        conv(ODD, feature_group_count=2),
        (6, 2, 4, 4),
        (3, 8, 3, 3),
        atoms=2 + 2 + 3 + 4,
    ),
    "conv groups to one": case(
        conv(feature_group_count=3), (2, 4, 4, 6), (3, 3, 2, 3), atoms=2 + 3 + 2
    ),
    "depthwise": case(
        conv(feature_group_count=4), (2, 4, 4, 4), (3, 3, 1, 4), atoms=2 + 4
    ),
    "depthwise twice": case(
        conv(feature_group_count=4), (2, 4, 4, 4), (3, 3, 1, 8), atoms=2 + 4 + 2
    ),
    "conv batch groups": case(
        conv(batch_group_count=2), (4, 4, 4, 3), (3, 3, 3, 6), atoms=0
    ),
    # Shapes.
    "reshape merge": case(lambda x: x.reshape(2, 12), (2, 3, 4), atoms=9),
    "reshape merge three": case(lambda x: x.reshape(24), (2, 3, 4), atoms=9),
    "reshape split": case(lambda x: x.reshape(2, 3, 4), (2, 12), atoms=9),
    "reshape k:m": case(lambda x: x.reshape(4, 6), (6, 4), atoms=2 + 2),
    "reshape ones": case(lambda x: x.reshape(1, 3, 1, 4), (3, 1, 4), atoms=7),
    "reshape there and back": case(
        lambda x: x.reshape(2, 12).reshape(2, 3, 4), (2, 3, 4), atoms=9
    ),
    "flatten": case(lambda x: x.reshape(2, -1), (2, 3, 3, 4), atoms=12),
    "flatten into dense": case(
        lambda x, w: x.reshape(2, -1) @ w, (2, 3, 4), (12, 5), atoms=14
    ),
    "heads": case(
        lambda x, w: jnp.einsum("bhk,hko->bo", x.reshape(2, 3, 4), w),
        (2, 12),
        (3, 4, 5),
        atoms=14,
    ),
    "shuffle": case(lambda x, w: shuffle(x) @ w, (2, 6), (6, 3), atoms=2 + 3 + 2 + 3),
    "transpose": case(lambda x: x.transpose(2, 0, 1), (2, 3, 4), atoms=9),
    "bitcast": case(lambda x: lax.bitcast_convert_type(x, jnp.int32), (3, 4), atoms=7),
    "bitcast narrower": case(
        lambda x: lax.bitcast_convert_type(x, jnp.int16), (3, 4), atoms=0
    ),
    "squeeze": case(lambda x: lax.squeeze(x, (1,)), (3, 1, 4), atoms=7),
    "rev": case(lambda x: lax.rev(x, (1,)), (3, 4), atoms=7),
    "rev added": case(lambda x: x + lax.rev(x, (1,)), (3, 4), atoms=5),
    "broadcast": case(
        lambda x: lax.broadcast_in_dim(x, (2, 4, 5, 3), (3, 1)), (3, 4), atoms=7
    ),
    "broadcast one": case(
        lambda x: lax.broadcast_in_dim(x, (4, 3), (0, 1)), (1, 3), atoms=3
    ),
    "iota": case(
        lambda x: x + lax.broadcasted_iota(jnp.float32, (3, 4), 1), (3, 4), atoms=7
    ),
    "concatenate": case(
        lambda x, y: lax.concatenate([x, y], 1), (2, 3), (2, 4), atoms=9
    ),
    "concatenate read": case(
        lambda x, y, w: lax.concatenate([x, y], 1) @ w, (2, 3), (2, 4), (7, 2), atoms=11
    ),
    "concatenate itself": case(
        lambda x, w: lax.concatenate([x, x], 1) @ w, (2, 3), (6, 2), atoms=7
    ),
    "stack": case(lambda x, y: jnp.stack([x, y], 1), (2, 3), (2, 3), atoms=5),
    "unstack": case(lambda x: jnp.unstack(x, axis=1)[1] * 2, (2, 3), atoms=2),
    "tile": case(lambda x: jnp.tile(x, (1, 2)), (2, 3), atoms=5),
    "slice": case(lambda x: x[:, 1:3], (2, 5), atoms=7),
    "slice of one": case(lambda x: x[:, 2:3] * x, (2, 5), atoms=6),
    "split in ones": case(lambda x: lax.split(x, (1, 1, 2), 1)[2], (2, 4), atoms=4),
    "slice strided": case(
        lambda x: lax.slice(x, (0, 1), (2, 6), (1, 2)), (2, 6), atoms=8
    ),
    "rotary": case(
        lambda x: jnp.concatenate([-x[:, 3:], x[:, :3]], 1) + x, (2, 6), atoms=5
    ),
    "split": case(lambda x: lax.split(x, (2, 3), 1), (2, 5), atoms=7),
    "glu": case(
        lambda x: (lambda a, b: a * jax.nn.sigmoid(b))(*jnp.split(x, 2, 1)),
        (2, 6),
        atoms=5,
    ),
    "pad": case(lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 2, 0))), (2, 3), atoms=5),
    "pad between": case(
        lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1))), (2, 3), atoms=2
    ),
    "pad negative": case(
        lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 1, 0))), (2, 3), atoms=2
    ),
    "dynamic slice": case(
        lambda x, i: lax.dynamic_slice(x, (0, i), (2, 2)), (2, 5), jnp.int32(1), atoms=2
    ),
    "dynamic update": case(put, (4, 3), (2, 3), atoms=3),
    "embedding": case(looked_up, (3, 5), IDS, atoms=9),
    "take along": case(rows, (3, 4), COLUMNS, atoms=5),
    # Reductions read an axis, others pass.
    "sum": case(lambda x: x.sum(1), (2, 3, 4), atoms=9, summed=[(0, 1)]),
    "max": case(lambda x: x.max(-1), (2, 3), atoms=5, summed=[(0, 1)]),
    "min": case(lambda x: x.min((0, 2)), (2, 3, 4), atoms=9, summed=[(0, 0), (0, 2)]),
    "prod": case(lambda x: jnp.prod(x, 1), (2, 3), atoms=2),
    "all": case(lambda x: jnp.all(x > 0, 1), (2, 3), atoms=2),
    "any": case(lambda x: jnp.any(x > 0, 1), (2, 3), atoms=2),
    "argmax": case(lambda x: jnp.argmax(x, 1), (2, 5), atoms=2),
    "argmin": case(lambda x: jnp.argmin(x, 0), (5, 2), atoms=2),
    "softmax": case(jax.nn.softmax, (2, 3), atoms=5, summed=[(0, 1)]),
    **{
        name: case(functools.partial(fn, axis=1), (2, 4, 3), atoms=5)
        for name, fn in {
            "cumsum": jnp.cumsum,
            "cumprod": jnp.cumprod,
            "cummax": lax.cummax,
            "cummin": lax.cummin,
            "cumlogsumexp": lax.cumlogsumexp,
        }.items()
    },
    "sort": case(lambda x: lax.sort(x, dimension=0), (4, 3), atoms=3),
    "sort pairs": case(
        lambda x, y: lax.sort((x, y), dimension=0, num_keys=1), (4, 3), (4, 3), atoms=3
    ),
    "top_k": case(lambda x: lax.top_k(x, 2), (3, 5), atoms=3),
    "max pool": case(pool("max"), (2, 4, 4, 3), atoms=5),
    "avg pool": case(pool("sum"), (2, 4, 4, 3), atoms=5),
    "min pool": case(lambda x: -pool("max")(-x), (2, 4, 4, 3), atoms=5),
    "pool padded": case(
        pool("max", (1, 3, 3, 1), (1, 1, 1, 1), "SAME"), (2, 4, 4, 3), atoms=5
    ),
    "pool min": case(
        lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 1), (1, 2, 1), "VALID"),
        (2, 4, 3),
        atoms=5,
    ),
    # Elementwise.
    "add": case(lambda x, y: x + jnp.tanh(y) * 2, (2, 3), (2, 3), atoms=5),
    "ones": case(lax.mul, (2, 3), (2, 1), atoms=5),
    "ones both": case(lambda x, y: x + y, (3, 1), (1, 4), atoms=7),
    "select": case(lambda x, y: jnp.where(FLAG, x, y), (3, 4), (3, 4), atoms=7),
    "select scalar": case(
        lambda x, y: lax.select_n(x.sum() > 0, x, y),
        (3, 4),
        (3, 4),
        atoms=7,
        summed=[(0, 0), (0, 1)],
    ),
    "clamp": case(lambda x: lax.clamp(-0.5, x, 0.5), (3, 4), atoms=7),
    "convert": case(lambda x: x.astype(jnp.bfloat16), (3, 4), atoms=7),
    "barrier": case(
        lambda x, y: lax.optimization_barrier((x, y)), (2, 3), (4,), atoms=9
    ),
    # Calls, loops, conditions.
    "scan": case(scanned, (3,), (3,), (4, 3), atoms=3),
    "while": case(looped, (3,), (3,), atoms=3),
    "cond": case(either, jnp.int32(1), (2, 3), (2, 3), atoms=5),
    "switch": case(switched, jnp.int32(2), (2, 3), atoms=3),
    "custom_jvp": case(lambda x: jax.nn.relu(x) + jax.nn.silu(x), (2, 3), atoms=5),
    "custom_vjp": case(clipped, (2, 3), (2, 3), atoms=5),
    "remat": case(jax.checkpoint(lambda x, w: jnp.sin(x @ w)), (2, 3), (3, 4), atoms=9),
    "jit": case(jax.jit(lambda x, w: jnp.sin(x @ w)), (2, 3), (3, 4), atoms=9),
    # Indexing with windows.
    "fft": case(lambda x: jnp.abs(jnp.fft.fft(x)), (3, 4), atoms=3),
    "fft inside": case(lambda x: jnp.abs(jnp.fft.fft(x, axis=1)), (2, 4, 3), atoms=5),
    "segment sum": case(
        lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 1, 3]), 4), (4, 3), atoms=3
    ),
    "scatter": case(lambda x, y: x.at[:, 1].set(y), (2, 4, 3), (2, 3), atoms=5),
    "scatter max": case(lambda x, y: x.at[IDS].max(y), (3, 4), (4, 4), atoms=4),
    "scatter min": case(lambda x, y: x.at[IDS].min(y), (3, 4), (4, 4), atoms=4),
    "scatter mul": case(lambda x, y: x.at[IDS].mul(y), (3, 4), (4, 4), atoms=4),
    "permuted": case(lambda x: x[:, np.array([2, 0, 1])], (2, 3), atoms=5),
    "picked": case(lambda x: x[:, np.array([3, 1])], (2, 4), atoms=6),
    "window by example": case(
        lambda x, i: jax.vmap(lambda a, j: lax.dynamic_slice_in_dim(a, j, 2, 0))(x, i),
        (2, 5, 3),
        jnp.array([1, 3]),
        atoms=5,
    ),
    "row by example": case(
        lambda t, i: jax.vmap(lambda j: t[j])(i), (4, 3), IDS, atoms=7
    ),
    "experts": case(
        lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 3], jnp.int32)),
        (4, 3),
        (2, 3, 5),
        atoms=8,
    ),
    # Without a rule all is pinned.
    "qr": case(lambda x: jnp.linalg.qr(x)[0], (2, 4, 3), atoms=0),
    "solve": case(jnp.linalg.cholesky, (2, 3, 3), atoms=0),
}


def channels_of(fn, operands):
    closed = jax.make_jaxpr(fn)(*operands)
    body = program_of(closed)
    return Channels(body, len(body.invars), outputs=None)


def units_of(channels):
    """The atoms that touch an operand, directly or in a product."""
    classes = channels.classes
    touched = np.zeros(classes.count, bool)
    for var in channels.body.invars:
        for of in channels.classes_at(var):
            touched[of] = True
    return np.flatnonzero(classes.atoms() & classes.spoil(touched))


def where(channels, var, gone):
    """Which entries of a value lie in a class that is gone."""
    found = np.zeros(var.aval.shape, bool)
    for axis, of in enumerate(channels.classes_at(var)):
        shape = [-1 if d == axis else 1 for d in range(found.ndim)]
        found |= gone[of].reshape(shape)
    return found


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def leaves_of(fn, operands):
    return [np.asarray(y, np.float64) for y in jax.tree.leaves(fn(*operands))]


def stray(fn, operands, channels, skip=()):
    """How many entries move that the labels say cannot.

    A unit's entries change in one operand and are zero in the others.
    """
    body, run, count = channels.body, jax.jit(fn), 0
    for unit in units_of(channels):
        gone = closed_over(channels, unit)
        marks = [where(channels, v, gone) for v in body.invars]
        zeroed = [
            np.where(m, 0, x).astype(x.dtype) if is_float(x) else x
            for m, x in zip(marks, operands, strict=True)
        ]
        before = leaves_of(run, zeroed)
        for place, x in enumerate(operands):
            if not (is_float(x) and marks[place].any()) or unit in skip:
                continue
            for change in (9 + 3 * np.asarray(x), -7 + 2 * np.asarray(x)):
                moved = [*zeroed]
                moved[place] = np.where(marks[place], change, x).astype(x.dtype)
                after = leaves_of(run, moved)
                for atom, a, b in zip(body.outvars, before, after, strict=True):
                    outside = np.ones(a.shape, bool)
                    if not is_literal(atom):
                        outside = ~where(channels, atom, gone)
                    count += int((np.abs(a - b) > 1e-5)[outside].sum())
    return count


def closed_over(channels, units):
    gone = np.zeros(channels.classes.count, bool)
    gone[units] = True
    return channels.classes.close(gone)


def reduced(channels, summed):
    """The units in axes that a reduction reads."""
    ends = [channels.classes_at(channels.body.invars[i])[a] for i, a in summed]
    return {int(c) for of in ends for c in of}


@functools.cache
def program(name):
    return channels_of(CASES[name].fn, CASES[name].operands)


@pytest.mark.parametrize("name", CASES)
def test_nothing_else_moves(name):
    """Soundness: what has another label does not notice."""
    fn, operands, _, summed = CASES[name]
    channels = program(name)
    assert stray(fn, operands, channels, reduced(channels, summed)) == 0


@pytest.mark.parametrize("name", CASES)
def test_no_more_goes_together_than_must(name):
    """Completeness: as many units as counted by hand."""
    assert len(units_of(program(name))) == CASES[name].atoms


@pytest.mark.parametrize("name", CASES)
def test_the_cut_is_exact(name):
    """On operands from which zeros are gone, the outputs without their places."""
    fn, operands, *_ = CASES[name]
    channels, rng = program(name), np.random.default_rng(0)
    units = units_of(channels)
    for density in (0.5, 0.2) if len(units) else ():
        chosen = units[rng.random(len(units)) > density]
        if not chosen.size:
            continue
        assert distance_of_cut(fn, operands, channels, chosen) <= 1e-5


def distance_of_cut(fn, operands, channels, chosen):
    body, kept = channels.body, channels.kept(closed_over(channels, chosen))
    ends = [End(v.aval, kept(v), (None,) * v.aval.ndim).moving() for v in body.invars]
    taken = lambda x, keep: np.asarray(x)[np.ix_(*whole(keep, np.shape(x)))]
    zeroed = [
        x
        if all(k is None for k in kept(v))
        else restored(taken(x, kept(v)), kept(v), x)
        for x, v in zip(operands, body.invars, strict=True)
    ]
    small = cut_like(fn, ends)
    got = small(*(taken(x, kept(v)) for x, v in zip(zeroed, body.invars, strict=True)))
    want = jax.tree.leaves(jax.jit(fn)(*zeroed))
    worst = 0.0
    for g, w, atom in zip(got, want, body.outvars, strict=True):
        left = np.asarray(taken(w, kept(atom)), np.float64)
        if not left.size:  # of what is gone altogether the shape is left open
            continue
        assert g.shape == left.shape
        worst = max(
            worst, float(np.abs(np.asarray(g, np.float64) - left).max(initial=0))
        )
    return worst


def whole(keep, shape):
    return [np.arange(n) if k is None else k for k, n in zip(keep, shape, strict=True)]


def restored(x, keep, like):
    """Zeros where entries are gone."""
    full = np.zeros(np.shape(like), np.asarray(like).dtype)
    full[np.ix_(*whole(keep, full.shape))] = x
    return full


def test_every_rule_is_met():
    met = {step.name for name in CASES for step in program(name).body.walk()}
    rare = {"reduce_xor", "scatter_add", "scatter_mul"}  # or what jax calls them
    rare |= {"scatter-sub"} if "scatter-sub" not in met else set()
    if jax.__version_info__ < (0, 12):  # made of others before
        rare |= {"stack", "unstack", "tile"}
    assert {*RULES} - met <= rare
    assert {"scan", "while", "cond", "qr", "cholesky"} <= met
    assert {"custom_jvp_call", "custom_vjp_call"} <= met
    assert met & {"remat2", "checkpoint", "remat"}


def test_every_parameter_is_considered():
    """Of each primitive: a parameter that its rule does not name pins the equation."""
    for name in CASES:
        for equation in program(name).body.walk():
            rule = RULES.get(equation.name)
            if rule is not None:
                assert rule.parameters.issuperset(equation.eqn.params), equation.name


@pytest.mark.parametrize("name", ["reshape", "concatenate", "dot_general", "gather"])
def test_a_new_parameter_pins(name):
    (eqn,) = {
        equation.name: equation.eqn
        for case in CASES
        for equation in program(case).body.walk()
        if equation.name == name
    }.values()
    assert wiring(eqn).known
    more = eqn.replace(params={**eqn.params, "of_a_later_version": 1})
    assert not wiring(more).known
    assert not any(isinstance(w, Same) for axes in wiring(more).outputs for w in axes)


# --- mutants --------------------------------------------------------------------------


def swapped(eqn):
    """The parts of a concatenation in the wrong order."""
    right = RIGHT["concatenate"].wiring(eqn, None)
    turn = lambda w: Joined(w.parts[::-1]) if isinstance(w, Joined) else w
    return dataclasses.replace(right, outputs=(tuple(map(turn, *right.outputs)),))


def exchanged(eqn):
    """Features in groups as `I x G` for `G x I`."""
    right = RIGHT["conv_general_dilated"].wiring(eqn, None)
    turned = tuple(Product(flat, factors[::-1]) for flat, factors in right.products)
    return dataclasses.replace(right, products=turned)


def unturned(eqn):
    """A scatter whose windows lie the other way round in the updates."""
    right = RIGHT["scatter-add"].wiring(eqn, None)
    turn = lambda w: Joined(((0, w.sources[0][1], slice(None, None, -1)),))
    wires = (turn(w) if isinstance(w, Same) else w for w in right.outputs[0])
    return dataclasses.replace(right, outputs=(tuple(wires),))


RIGHT = {**RULES}
MUTANTS = {
    "concatenate read": ("concatenate", swapped),
    "conv groups": ("conv_general_dilated", exchanged),
    "depthwise twice": ("conv_general_dilated", exchanged),
    "segment sum": ("scatter-add", unturned),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_move(monkeypatch, name):
    primitive, mutant = MUTANTS[name]
    wrong = RIGHT[primitive]._replace(wiring=lambda eqn, _: mutant(eqn))
    monkeypatch.setitem(RULES, primitive, wrong)
    fn, operands, *_ = CASES[name]
    assert stray(fn, operands, channels_of(fn, operands)) > 0


# --- a primitive of one's own ---------------------------------------------------------


def test_a_primitive_of_ones_own():
    """Without a rule its channels are pinned; with one they are cut exactly."""
    turned = core.Primitive("turned_by_a_user")
    turned.def_impl(lambda x: jnp.sin(x)[..., ::-1])
    turned.def_abstract_eval(lambda x: x)
    mlir.register_lowering(
        turned, mlir.lower_fun(lambda x: jnp.sin(x)[..., ::-1], multiple_results=False)
    )
    fn = lambda p, x: turned.bind(x @ p["w"]) @ p["o"]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, x = {"w": draw(3, 6), "o": draw(6, 2)}, draw(4, 3)
    before = dj.trace(fn, params, x)
    assert not dj.units(before)

    def wires(eqn):
        (shape,) = (v.aval.shape for v in eqn.invars)
        last = Joined(((0, len(shape) - 1, slice(None, None, -1)),))
        rest = (Same(((0, a),)) for a in range(len(shape) - 1))
        return Wiring(((*rest, last),))

    with pytest.raises(ValueError, match="in the table already"):
        register_primitive(Primitive("dot_general"))
    register_primitive(Primitive("turned_by_a_user", "structural"), wires)
    try:
        net = dj.trace(lambda p, x: fn(p, x), params, x)
        assert dj.units(net)
        mask = dj.prune_units(net, "l2", density=0.5)
        small = dj.compact(net, mask).net
        assert small.params["w"].shape == (3, 3)
        masked = jax.tree.map(lambda m, w: w * m, mask, params)
        np.testing.assert_allclose(small(x), fn(masked, x), rtol=1e-5, atol=1e-6)
    finally:
        del RULES["turned_by_a_user"], PRIMITIVES["turned_by_a_user"]
