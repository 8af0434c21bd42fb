"""What goes to stdout: with --json nothing but JSON, and characters that every terminal takes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

import click

JSON_STREAM = "lrcompress.json"  # key in click's context


def escape_unknown_characters() -> None:
    """Lets stdout escape what its encoding lacks, as stderr does; Python's default is an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # a stream that is read too and cannot seek, such as a pipe
            sys.stdout.reconfigure(errors="backslashreplace")


def reserve_for_json(context: click.Context, _: click.Parameter, as_json: bool) -> bool:
    """Callback of --json: until the command ends, only `print_json` writes to stdout."""
    if as_json and not context.resilient_parsing:
        context.meta[JSON_STREAM] = context.with_resource(_prints_on_stderr())
    return as_json


def print_json(text: str) -> None:
    """Prints `text`, the whole output of a command with --json."""
    click.echo(text, nl=False, file=click.get_current_context().meta[JSON_STREAM])


@contextmanager
def _prints_on_stderr() -> Iterator[TextIO]:
    """Inside, what libraries print goes to stderr; yields the original stdout."""
    original = sys.stdout
    try:
        descriptor = original.fileno()
    except OSError:  # a stream of Python alone: no other program writes to it
        with redirect_stdout(sys.stderr):
            yield original
        return
    with _descriptor_on_stderr(original, descriptor) as stream, redirect_stdout(sys.stderr):
        yield stream


@contextmanager
def _descriptor_on_stderr(original: TextIO, descriptor: int) -> Iterator[TextIO]:
    """As `_prints_on_stderr`, also for C code and child processes, which know only `descriptor`."""
    original.flush()
    with os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as stream:
        os.dup2(sys.stderr.fileno(), descriptor)
        try:
            yield stream
        finally:
            original.flush()
            os.dup2(stream.fileno(), descriptor)
