"""Progress and messages before the work, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lrcompress.runtime.progress import Status

T = TypeVar("T")

# seconds between lines of progress where stderr is not a terminal
LINE_INTERVAL = 10.0


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows a bar on a terminal, and otherwise prints a line every `LINE_INTERVAL` seconds."""
    show = _bar if sys.stderr.isatty() else _lines
    return show(items, description, total)


def say(sentence: str) -> None:
    """Prints a message to stderr, beside the progress."""
    click.echo(sentence, err=True)


def _bar(items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        for item in bar.track(items, total=total, task_id=task):
            if isinstance(item, Status):
                bar.update(task, description=f"{description} {item}".rstrip())
            yield item


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
    start = last_line = time.monotonic()
    click.echo(f"{description} ...", err=True)
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last_line >= LINE_INTERVAL:
            last_line = time.monotonic()
            status = f", {item}" if isinstance(item, Status) and item else ""
            click.echo(f"{description}: {count} of {total or '?'}{status}", err=True)
    click.echo(f"{description}: {count} done in {time.monotonic() - start:.0f} s", err=True)
