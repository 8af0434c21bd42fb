"""Progress and what is to be known before it, on stderr."""

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
PLAIN_INTERVAL = 10.0


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A bar on a terminal; elsewhere a line now and then."""
    return (_bar if sys.stderr.isatty() else _lines)(items, description, total)


def say(sentence: str) -> None:
    """What is to be known before the work starts; to stderr, as progress is."""
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
    started = said = time.monotonic()
    click.echo(f"{description} ...", err=True)
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said >= PLAIN_INTERVAL:
            said = time.monotonic()
            note = f", {item}" if isinstance(item, Status) and item else ""
            click.echo(f"{description}: {done} of {total or '?'}{note}", err=True)
    click.echo(f"{description}: {done} done in {time.monotonic() - started:.0f} s", err=True)
