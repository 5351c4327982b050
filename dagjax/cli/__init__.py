"""The command line: `dagjax lottery`, `compact`, `show`, `list`."""

from dagjax.cli.entry import main as main
