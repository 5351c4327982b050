"""Annotations say what a value is: `Any` alone says nothing, and may not come back."""

import ast
from pathlib import Path

import dagjax

ROOT = Path(dagjax.__file__).parent
MOST = 0.06  # share of all annotations of arguments, results and fields


def annotations(tree):
    """Those of arguments, results and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns


def is_bare(annotation):
    """Whether it is `Any`, or `Any` with stars: nothing else is said."""
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def share_of(text):
    found = list(annotations(ast.parse(text)))
    return sum(map(is_bare, found)), len(found)


def test_the_count():
    text = (
        "def f(a: Any, *b: int, c: list[Any]) -> Any:\n    x: Any = 1\n    y: int = 2"
    )
    assert share_of(text) == (3, 6)


def test_few_annotations_say_nothing():
    counts = {path: share_of(path.read_text()) for path in ROOT.rglob("*.py")}
    bare, total = (sum(column) for column in zip(*counts.values(), strict=True))
    worst = sorted(counts, key=lambda path: -counts[path][0])[:5]
    names = [f"{path.relative_to(ROOT)} {counts[path][0]}" for path in worst]
    assert bare <= MOST * total, f"{bare} of {total}; most in {', '.join(names)}"
