"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(
    rows: Sequence[Sequence[str]], left: Collection[int] | None = (0,)
) -> list[str]:
    """Lines with columns of one width, two spaces apart.

    Args:
        rows: Cells, as many in each row.
        left: Columns that are set flush left, the others flush right; None: all.

    Example:
        >>> aligned([("group", "units"), ("Dense", "8")])
        ['group  units', 'Dense      8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush_left = range(len(widths)) if left is None else left
    cell = lambda i, text: (
        text.ljust(widths[i]) if i in flush_left else text.rjust(widths[i])
    )
    return ["  ".join(map(cell, range(len(row)), row)).rstrip() for row in rows]
