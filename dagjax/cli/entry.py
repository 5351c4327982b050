"""From arguments to a command; a complaint is one line."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import itertools
import os
import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

from dagjax.cli import commands
from dagjax.cli.options import Compact, List, Lottery, Show

T = TypeVar("T")

_EXTRAS = "the command line needs more packages: pip install 'dagjax[all]'"


def main(args: list[str] | None = None) -> None:
    """Run the command line; without arguments those of the process."""
    if (sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"dagjax {importlib.metadata.version('dagjax')}")
        return
    try:
        import tyro
    except ImportError:
        sys.exit(f"dagjax: {_EXTRAS}")
    subcommands = (
        Annotated[Lottery, tyro.conf.subcommand("lottery", prefix_name=False)]
        | Annotated[
            Compact,
            tyro.conf.subcommand("compact", prefix_name=False),
            tyro.conf.PositionalRequiredArgs,
        ]
        | Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)]
        | Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
    )
    parse = functools.partial(
        tyro.cli,
        subcommands,  # pyright: ignore[reportArgumentType]
        args=args,
        prog="dagjax",
        description="Networks as DAGs of functions; pruning; lottery tickets.",
    )
    options = _one_line(parse)
    run = {
        Lottery: commands.lottery, Compact: commands.compact,
        Show: commands.show, List: commands.names,
    }[type(options)]  # fmt: skip
    try:
        run(options)
    except KeyboardInterrupt:
        sys.exit("dagjax: stopped; the same command with --resume goes on")
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("DAGJAX_TRACEBACK"):
            raise
        print(f"dagjax: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _one_line(parse: Callable[[], T]) -> T:
    """Parse options; of a complaint keep the first paragraph, without its box."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        rows = [row.strip("│ ") for row in said.getvalue().splitlines()]
        rows = [row for row in rows if not row.startswith(("╭", "╰"))]
        text = itertools.takewhile(lambda row: row.strip("─"), rows)
        if stop.code:
            print("dagjax:", *text, "(dagjax --help)", file=sys.stderr)
        raise
