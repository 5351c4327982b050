"""Sweeps: a few of the cases in every run of the tests, all of them in `make soak`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly(cases: Iterable[Any], often: Container[Any]) -> list[Any]:
    """The cases; all but those of `often` are marked for `make soak`."""
    return [_soak(case, case not in often) for case in cases]


def seldom(cases: Iterable[Any], rare: Container[Any]) -> list[Any]:
    """The cases; those of `rare` are marked for `make soak`."""
    return [_soak(case, case in rare) for case in cases]


def _soak(case: Any, rare: bool) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=[pytest.mark.soak] * rare)
