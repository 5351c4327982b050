"""A run in the terminal: a progress bar while it runs, a table at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table

from dagjax.experiments.experiment import Report
from dagjax.experiments.result import HEADERS, cells
from dagjax.types import PyTree


class Follower:
    """Draws a bar with the time left, and a line after every round."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
            TextColumn("left"), TimeLeft(),
        )  # fmt: skip
        self.console = console
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("compiling", total=None)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *error: BaseException | None) -> None:
        self.progress.stop()

    def on_chunk(self, done: float, total: int) -> None:
        """Move the bar; it appears with the first chunk."""
        self.progress.start()
        self.progress.update(
            self.task, completed=done, total=total, description="training"
        )

    def on_round(self, report: Report) -> None:
        """Say how a round ended: means over seeds."""
        self.console.print(
            f"[{report.done:>{len(str(report.total))}}/{report.total}] "
            f"{report.arm:<8} density {report.density:<5.3g} "
            f"train loss {report.loss[:, -1].mean():.3g}, "
            f"test {report.test_metric.mean():.4f}",
            highlight=False, markup=False,
        )  # fmt: skip


def print_result(console: Console, result: PyTree, folder: Path) -> None:
    """The final table, the verdict, and where the files are."""
    metric = result.record.settings["metric"]
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in HEADERS:
        table.add_column(header.format(metric=metric).replace(" ", "\n", 1))
    for row in result.record.rows():
        table.add_row(*cells(row))
    console.print(table)
    console.print("mean ± half of the 95 percent t interval over seeds", style="dim")
    console.print(f"\n{result.verdict()}", highlight=False)
    console.print(f"{result.seconds:.0f} s; figures, masks and arrays in {folder}")
