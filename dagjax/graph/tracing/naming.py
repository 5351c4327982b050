"""Names of arcs and nodes: paths of parameters, else name scopes, else the work."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import jax
from jax.extend import core
from jax.tree_util import KeyPath

from dagjax.graph.tracing.cut import Cut, Piece
from dagjax.graph.tracing.flow import Flow, Value
from dagjax.jaxprs.primitives import is_elementwise
from dagjax.jaxprs.program import Equation

# What a primitive is called in a network.
_WORDS = {
    "dot_general": "dense",
    "conv_general_dilated": "conv",
    "reduce_window_max": "max_pool",
    "reduce_window_sum": "avg_pool",
    "reduce_max": "max",
    "reduce_sum": "mean",
    "concatenate": "concat",
    "select_n": "select",
    "mul": "product",
    "add": "sum",
    "add_any": "sum",
    "sub": "sum",
}
# What a module calls its parameters, if it has one of a kind.
_LEAVES = frozenset(
    "kernel weight weights w W bias b B scale gamma beta embedding value g".split()
)
_STEPS = frozenset(
    """
    abs acos asin atan cbrt ceil clamp cos cosh cumlogsumexp cummax cummin cumprod
    cumsum dynamic_slice dynamic_update_slice erf exp expm1 fft floor integer_pow log
    log1p logistic pow rem rev round rsqrt sign sin sinh slice sort split sqrt square
    tan tanh top_k cond scan while pad scatter scatter-add reduce_max reduce_sum max min
    argmax
    """.split()
)


class Names:
    """Names for the pieces, merges and nodes of a program.

    `paths` are those of the parameters in their tree; state is left out.
    """

    def __init__(
        self,
        cut: Cut,
        paths: Mapping[Value, str],
        inputs: Mapping[Value, str],
        outputs: Mapping[Value, str],
    ):
        self.cut, self.flow, self.paths = cut, cut.flow, paths
        scopes = {e: _plain(e.scope) for e in self.flow.operands}
        first = {s.split("/")[0] for s in scopes.values() if s}
        top = first.pop() if len(first) == 1 else ""  # the network itself
        self.scopes = {e: _below(s, top) for e, s in scopes.items()}
        self.containers = {
            parent for s in {*self.scopes.values()} for parent in _parents(s)
        }
        self.into = Counter(piece.target for piece in cut.pieces)
        self.pieces: dict[Piece, str] = {}
        self.nodes: dict[Value, str] = {**inputs}
        self._name_all(outputs)

    def _name_all(self, outputs: Mapping[Value, str]) -> None:
        arcs = Unique()
        nodes = Unique(outputs.values(), self.nodes.values())
        for target, group in itertools.groupby(
            self.cut.pieces, key=lambda piece: piece.target
        ):
            pieces = list(group)
            work = [self.cut.work(piece) for piece in pieces]
            modules = [self._modules(equations) for equations in work]
            place = self._place(target, modules)
            for piece, equations, read in zip(pieces, work, modules, strict=True):
                name = self._of_modules(read, equations)
                self.pieces[piece] = arcs(name or self._of_work(piece, place))
            if target in outputs:
                self.nodes[target] = outputs[target]
            elif len(pieces) == 1 and target not in self.cut.merges:
                self.nodes[target] = nodes(self.pieces[pieces[0]])
            else:
                self.nodes[target] = nodes(self._of_meeting(target, place))

    def _modules(self, work: Sequence[Equation]) -> list[str]:
        """The modules that the parametrized equations read, else the first."""
        read = [self.paths[v] for e in work for v in e.reads if v in self.paths]
        data = [e for e in work if e in self.flow.operands]
        layers = [self._sources(e) for e in data if not is_elementwise(e, True)]
        modules = [_shared(list(map(_module, paths))) for paths in layers if paths]
        return list(dict.fromkeys(modules or map(_module, read[:1])))

    def _of_modules(self, modules: list[str], work: Sequence[Equation]) -> str:
        """The module that a piece reads; of several what they share."""
        shared = posixpath.commonpath(modules) if modules else ""
        if not modules or _is_word(shared):
            return shared
        ends = dict.fromkeys((modules[0], modules[-1]))
        return "..".join(dict.fromkeys(self._lettered(end, work) for end in ends))

    def _lettered(self, name: str, work: Sequence[Equation]) -> str:
        """A name that is not only a number, as modules in a list have."""
        if _is_word(name):
            return name
        data = [e for e in work if e in self.flow.operands]
        main = [e for e in data if not is_elementwise(e, True)] or data
        scopes = [s for e in main if (s := self.scopes[e]) not in self.containers]
        if not scopes or not scopes[0]:
            return f"{kind(data)}_{name.replace('/', '_')}" if name else kind(data)
        shared = posixpath.commonpath(scopes)
        return shared if shared else "..".join(dict.fromkeys((scopes[0], scopes[-1])))

    def _sources(self, equation: Equation) -> list[str]:
        """The paths of the parameters that an equation reads, itself or in a chain."""
        met = dict.fromkeys(v for v in equation.reads if v not in self.flow.data)
        waiting = [*met]
        for value in waiting:
            maker = None if value in self.paths else self.flow.maker.get(value)
            fresh = [v for v in maker.reads if v not in met] if maker else []
            met |= dict.fromkeys(fresh)
            waiting += fresh
        return [self.paths[v] for v in met if v in self.paths]

    def _of_work(self, piece: Piece, place: str) -> str:
        """A name from the scopes and the work of a piece without parameters."""
        work = [e for e in self.cut.work(piece) if e in self.flow.operands]
        main = [e for e in work if not is_elementwise(e, True)]
        if not main and self.into[piece.target] > 1:
            return f"{place}/skip" if place else "skip"
        if not work:
            return "identity"
        scope = self.scopes[(main or work)[-1]]
        if scope and scope not in self.containers:
            return scope
        return f"{scope}/{kind(work)}" if scope else kind(work)

    def _of_meeting(self, target: Value, place: str) -> str:
        maker = self.flow.maker[target]
        scope = self.scopes[maker]
        if scope and scope not in self.containers:
            return scope
        merge = self.cut.merges.get(target)
        word = kind(merge.equations) if merge else "sum"
        return f"{place}/{word}" if place else word

    def _place(self, target: Value, modules: Sequence[list[str]]) -> str:
        """The module that a sum or merge stands in."""
        if scope := self.scopes[self.flow.maker[target]]:
            return scope
        alone = [m[0] for m in modules if len(m) == 1]
        several = [posixpath.commonpath(m) for m in modules if len(m) > 1]
        parents = {*several, *map(posixpath.dirname, alone)}
        return posixpath.commonpath(parents) if parents and all(parents) else ""


class Unique:
    """Names that are given once."""

    def __init__(self, *taken: Iterable[str]):
        self.taken = {*itertools.chain(*taken)}

    def __call__(self, name: str) -> str:
        """The name, or the first of `name_1`, `name_2`, ... that is free."""
        given = name
        for number in itertools.count(1):
            if given not in self.taken:
                self.taken.add(given)
                return given
            given = f"{name}_{number}"
        raise AssertionError


def kind(work: Sequence[Equation]) -> str:
    """One word for some equations: softmax, attention, max_pool, relu, ..."""
    names = [e.name for e in work]
    if "exp" in names and "reduce_sum" in names:
        return "attention" if names.count("dot_general") > 1 else "softmax"
    for equation in work[::-1]:
        if not is_elementwise(equation, True):
            return _word(equation)
    return _word(work[-1])


def describe(flow: Flow, work: Sequence[Equation]) -> str:
    """A piece in one line: `conv 3x3x16x32 > relu`."""
    steps: list[str] = []
    for equation in work:
        if equation not in flow.operands:  # of parameters and statistics alone
            steps += ["norm"] * (equation.name == "rsqrt")
        elif not is_elementwise(equation, flow.reads_parameter(equation)):
            word = "embed" if equation.name == "gather" else _word(equation)
            steps.append(f"{word}{_shape(flow, equation)}")
        elif equation.name in _STEPS or equation.name.startswith("custom"):
            steps.append(_word(equation))
    names = ">".join(steps)
    names = re.sub("integer_pow>tanh", "gelu", names)
    names = re.sub("(max>)+exp>mean", "softmax", names)
    names = re.sub("((square|integer_pow|mean|max)>)+rsqrt", "norm", names)
    return names.replace(">", " > ") or (work[-1].name if work else "identity")


def _shape(flow: Flow, equation: Equation) -> str:
    """The shape of what a parametrized equation reads beside the data."""
    operands = [v for v in equation.reads if v not in flow.data]
    if equation.name.startswith("reduce_window"):
        sides = [n for n in equation.eqn.params["window_dimensions"] if n > 1]
    else:
        sides = operands[0].aval.shape if operands else ()
    return " " + "x".join(map(str, sides)) if sides else ""


def _word(equation: Equation) -> str:
    if equation.name.startswith("custom"):
        inner = next(iter(core.jaxprs_in_params(equation.eqn.params)))
        named = [e.params["name"] for e in inner.eqns if "name" in e.params]
        return named[0] if named else equation.name
    return _WORDS.get(equation.name, equation.name)


def _module(path: str) -> str:
    """`fc/kernel` is of `fc`; `attention/query` is one of several of `attention`."""
    module, name = posixpath.split(path)
    return module if module and (name in _LEAVES or name.isdigit()) else path


def _shared(modules: Sequence[str]) -> str:
    """What modules have in common, else the first."""
    common = posixpath.commonpath(modules)
    return common if _is_word(common) else modules[0]


def _is_word(name: str) -> bool:
    return re.search("[A-Za-z]", name) is not None


def _plain(scope: str) -> str:
    """A name stack without marks of transformations: `vmap(Net)/Conv`, `Net/Conv`."""
    scope = re.sub(r"\w+\(([^()]*)\)", r"\1", scope)
    return "/".join(p for p in scope.split("/") if p and not re.search("->|[<>]", p))


def _below(scope: str, top: str) -> str:
    return scope.removeprefix(top).removeprefix("/") if top else scope


def _parents(scope: str) -> Iterable[str]:
    parts = scope.split("/")
    return ("/".join(parts[:i]) for i in range(len(parts)))


def path_of(path: KeyPath) -> str:
    """A key path of a tree as `a/b/c`, without the words that frameworks add."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").strip("/").split("/")
    parts = parts[1:] if len(parts) > 1 and parts[0] == "params" else parts
    return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts)
