"""Progress reporting: a plain callback for programs, a bar for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """A step of the conversion: `phase` is "check" or "write"; bytes are those of the phase."""

    phase: str
    done_bytes: int
    total_bytes: int
    tensor: str


ProgressCallback = Callable[[ConvertProgress], None]


@contextmanager
def progress_bar(enabled: bool, title: str) -> Iterator[ProgressCallback]:
    """Yield a callback that draws a bar with throughput and remaining time on stderr, or one that does nothing."""
    if not enabled:
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    labels = {"check": f"{title}: checking scales", "write": f"{title}: writing"}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        tasks = {}

        def show(step: ConvertProgress) -> None:
            if step.phase not in tasks:
                tasks[step.phase] = bar.add_task(labels.get(step.phase, step.phase), total=step.total_bytes)
            bar.update(tasks[step.phase], completed=step.done_bytes)

        yield show
