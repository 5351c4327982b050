"""The garbage collector at rest while many objects are made that live on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No search for cycles inside; a decorator, or a context.

    A program of a thousand equations is a hundred thousand objects, none of them
    garbage. So many set off a search through all that the process holds, which takes a
    tenth of a second.

    Example:
        >>> import gc
        >>> with gc_paused():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
