"""Which values become nodes; that choice is all that granularity is.

Every data value has a *region*: the one node that it is made of by elementwise work
alone (reductions and moving entries among it). An equation whose operands lie in two
regions is where branches meet: a sum or a merge. So a softmax, a normalization or a
gelu, whose diamonds close within one region, do not fall apart. A parametrized equation
(a product with parameters, a convolution, a pooling) starts a region of its own, and
its node stands as far down as everything that leaves the region passes: behind the
activation. (Dominators of a flow graph: Lengauer & Tarjan 1979; the rule is ours.)
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping

from dagjax.graph.tracing.cut import Choice, Cut, Piece, cut
from dagjax.graph.tracing.flow import Flow, Value
from dagjax.jaxprs.primitives import MOVES, is_elementwise, is_key, is_sum
from dagjax.jaxprs.program import Equation

_PRODUCTS = frozenset(("mul",))
_EXTREMES = (frozenset(("max",)), frozenset(("min",)))
_MASKING = frozenset(("add", "sub", "mul", "select_n", "div"))


def primitives(flow: Flow) -> Choice:
    """Every value that an output needs."""
    needed = flow.cone(flow.outputs, flow.inputs)
    data = [e for e in needed if e in flow.operands]
    results = {v for e in data for v in e.eqn.outvars if not is_key(v.aval)}
    return Choice({*flow.inputs, *flow.outputs} | (results & {*flow.users}))


def layers(flow: Flow) -> Choice:
    """One parametrized operation with the elementwise work that follows it an arc."""
    forced = {*flow.inputs}
    while True:
        regions = Regions(flow, forced)
        inner = {v for root in regions.roots for v in _inside(regions, root)} - forced
        roots = [root for root in regions.roots if root not in inner]
        ends = {root: regions.end(root) for root in roots}
        stations = {v for root in roots for v in regions.stations(root)}
        stations |= {*flow.outputs} - {*ends.values()}
        if stations <= forced:
            break
        forced |= stations
    meets = {end for root, end in ends.items() if root in regions.meets}
    nodes = {v for v in {*ends.values()} | forced if v is not None}
    inner |= regions.meets - nodes  # moved on to its end
    taken = cut(flow, Choice(nodes, meets, inner))
    bare = lambda e: is_elementwise(e, False) and not flow.reads_parameter(e)
    return contracted(taken, lambda piece: all(map(bare, taken.work(piece))))


def blocks(flow: Flow) -> Choice:
    """Series contracted until only nodes are left that branch, merge or end."""
    return contracted(cut(flow, layers(flow)), lambda piece: True)


def grouped(taken: Cut, groups: Mapping[Piece, Hashable]) -> Choice:
    """The nodes between pieces of different groups, `{piece: group}`."""
    into: dict[Value, set[Hashable]] = {v: set() for v in taken.nodes}
    met: dict[Value, set[Hashable]] = {v: set() for v in taken.nodes}
    for piece in taken.pieces:
        into[piece.target].add(groups[piece])
        met[piece.source].add(groups[piece])
        met[piece.target].add(groups[piece])
    keep = {*taken.flow.inputs, *taken.flow.outputs}
    nodes = keep | {v for v, groups_met in met.items() if len(groups_met) > 1}
    meets = {v for v in nodes if len(into[v]) > 1} & taken.choice.meets
    inner = {v for end in meets for v in _part(taken, end)} & taken.choice.inner
    return Choice(nodes, meets, inner)


def _part(taken: Cut, node: Value) -> list[Value]:
    """What a sum or merge makes on the way from its ports."""
    ports = {piece.end for piece in taken.pieces if piece.target is node}
    return [v for e in taken.flow.cone([node], ports) for v in e.eqn.outvars]


def contracted(taken: Cut, drops: Callable[[Piece], bool]) -> Choice:
    """The nodes without some that only pass a value on from one arc to one arc.

    `drops` says whether the node before a piece may go.
    """
    fed = Counter(piece.target for piece in taken.pieces)
    read = Counter(piece.source for piece in taken.pieces)
    keep = {*taken.flow.inputs, *taken.flow.outputs, *taken.merges}
    passing = {v for v in taken.nodes if fed[v] == read[v] == 1} - keep
    gone = {p.source for p in taken.pieces if p.source in passing and drops(p)}
    return taken.choice._replace(nodes={*taken.nodes} - gone)


class Regions:
    """The region of every data value, and the dominator tree within each."""

    def __init__(self, flow: Flow, forced: set[Value]):
        self.flow = flow
        self.region: dict[Value, Value] = {}
        self.parent: dict[Value, Value] = {}
        self.depth: dict[Value, int] = {}
        self.reading: dict[Value, Value] = {}  # the last value that parameters made
        self.meets: set[Value] = set()  # roots where several regions meet
        self.stationed: set[Equation] = set()  # makers of roots within one region
        self.exits: dict[Value, dict[Value, list[Equation]]] = {}
        needed = {*flow.cone(flow.outputs, flow.inputs)}
        for value in flow.inputs:
            self._settle(value, value)
        for equation, operands in flow.operands.items():
            if equation in needed:
                self._add(equation, operands, forced)
        for value in flow.outputs:
            self.exits[self.region[value]].setdefault(value, [])

    @property
    def roots(self) -> list[Value]:
        """The values that regions start with."""
        return [v for v, region in self.region.items() if v is region]

    def end(self, root: Value) -> Value | None:
        """Where the node of a region stands; None if nothing leaves the region."""
        exits = self.exits[root]
        if root in self.flow.inputs or (root in self.meets and not exits):
            return root
        end = functools.reduce(self._meet, exits) if exits else None
        return root if root in self.meets and not self._only_moves(root, end) else end

    def _only_moves(self, root: Value, end: Value) -> bool:
        """Whether a product of matrices is only reshaped up to a value."""
        work = self.flow.cone([end], {root})
        moved = all(e.name in MOVES for e in work if e in self.flow.operands)
        return moved and self.flow.maker[root].name == "dot_general"

    def stations(self, root: Value) -> Iterator[Value]:
        """Where parameters have been read on the way to exits: a normalization's end.

        Exits behind the same reading share one node, below what they share.
        """
        end = self.end(root)
        behind: dict[Value, list[Value]] = {}
        for value, users in self.exits[root].items():
            passed_on = users and self.stationed.issuperset(users)
            if end is not None and self.reading[value] is not self.reading[end]:
                if not passed_on:
                    behind.setdefault(self.reading[value], []).append(value)
        for exits in behind.values():
            yield functools.reduce(self._meet, exits)

    def goal(self, root: Value) -> Equation | None:
        """The one equation that a region's values are used by, if it is one."""
        users = {e for equations in self.exits[root].values() for e in equations}
        bare = all(self.exits[root].values())  # no output among them
        return next(iter(users)) if bare and len(users) == 1 else None

    def _add(
        self, equation: Equation, operands: tuple[Value, ...], forced: set[Value]
    ) -> None:
        regions = dict.fromkeys(self.region[v] for v in operands)
        elementwise = is_elementwise(equation, self.flow.reads_parameter(equation))
        for value in equation.eqn.outvars:
            if len(regions) == 1 and elementwise and value not in forced:
                parent = functools.reduce(self._meet, operands)
                self._settle(value, self.region[parent], parent)
                base = self.reading[parent]
                reads = self.flow.reads_parameter(equation)
                fresh = reads or any(self.reading[v] is not base for v in operands)
                self.reading[value] = value if fresh else base
                continue
            self._settle(value, value)
            if len(regions) > 1:
                self.meets.add(value)
            elif elementwise:
                self.stationed.add(equation)
            for operand in operands:
                users = self.exits[self.region[operand]].setdefault(operand, [])
                users.append(equation)

    def _settle(self, value: Value, region: Value, parent: Value | None = None) -> None:
        self.region[value] = self.reading[value] = region
        if parent is None:
            self.depth[value], self.exits[value] = 0, {}
        else:
            self.parent[value], self.depth[value] = parent, self.depth[parent] + 1

    def _meet(self, a: Value, b: Value) -> Value:
        """The lowest value of a region that both are made of."""
        while a is not b:
            if self.depth[a] >= self.depth[b]:
                a = self.parent[a]
            else:
                b = self.parent[b]
        return a


def _inside(regions: Regions, root: Value) -> list[Value]:
    """Roots that are no nodes, being part of the merge or sum at `root`.

    A sum of sums is one sum, a product of products one product, and attention one
    merge of queries, keys, values and masks.
    """
    maker = regions.flow.maker.get(root)
    if maker is None or root not in regions.meets:
        return []
    if is_sum(maker):
        return [r for r in _feeding(regions, maker) if is_sum(_made(regions, r))
                and [*regions.exits[r]] == [r]]  # fmt: skip
    for alike in (_PRODUCTS, *_EXTREMES):
        if maker.name in alike:
            feeding = _feeding(regions, maker)
            return [r for r in feeding if _made(regions, r).name in alike]
    return _scores(regions, maker) if maker.name == "dot_general" else []


def _scores(regions: Regions, maker: Equation) -> list[Value]:
    """The products of queries and keys behind a softmax, with what masks them."""
    for root in _feeding(regions, maker):
        work = regions.flow.cone([*regions.exits[root]], {root})
        names = {equation.name for equation in work}
        if "exp" in names and "reduce_sum" in names:
            return _up_to_product(regions, root)
    return []


def _up_to_product(regions: Regions, root: Value) -> list[Value]:
    maker = _made(regions, root)
    if maker.name == "dot_general":
        return [root]
    if maker.name not in _MASKING:
        return []
    for before in _feeding(regions, maker):
        if product := _up_to_product(regions, before):
            return [root, *product]
    return []


def _feeding(regions: Regions, maker: Equation) -> list[Value]:
    """Where branches meet whose values only this equation uses."""
    before = dict.fromkeys(regions.region[v] for v in regions.flow.operands[maker])
    return [r for r in before if r in regions.meets and regions.goal(r) is maker]


def _made(regions: Regions, root: Value) -> Equation:
    return regions.flow.maker[root]
