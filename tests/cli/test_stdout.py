"""stdout: JSON and nothing else with --json, and no error for a character that a terminal lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
from click.testing import CliRunner

from lrcompress.cli.options import JSON
from lrcompress.cli.stdout import print_json

SCRIPT = """
import ctypes, os, subprocess, sys
import click
from lrcompress.cli.error_group import ErrorReportingGroup
from lrcompress.cli.options import JSON
from lrcompress.cli.stdout import print_json

kept = sys.stdout

@click.group(cls=ErrorReportingGroup)
def main(): pass

@main.command()
@JSON
def work(as_json):
    print("library")
    print("handler", file=kept)
    os.write(1, b"descriptor\\n")
    libc = ctypes.CDLL(None)
    libc.puts(b"C code")
    libc.fflush(None)
    subprocess.run(["echo", "child"], check=True)
    if as_json:
        print_json('{"value": 1}\\n')
    else:
        click.echo("a – b")
    print("afterwards")

main()
"""
NOISE = ["library", "handler", "descriptor", "C code", "child", "afterwards"]


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, "work", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )


def test_json_is_alone_on_stdout_whoever_prints() -> None:
    done = _run("--json")
    assert done.stdout == '{"value": 1}\n'
    assert sorted(done.stderr.split("\n")) == sorted(["", *NOISE])


def test_without_json_libraries_print_as_before() -> None:
    done = _run()
    assert sorted(done.stdout.split("\n")) == sorted(["", "a – b", *NOISE])
    assert done.stderr == ""


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    for encoding in ("latin-1", "iso8859-15"):
        assert "a \\u2013 b" in _run(PYTHONIOENCODING=encoding, PYTHONUTF8="0").stdout


def test_a_stream_without_a_descriptor_is_kept_for_json_too() -> None:
    @click.command()
    @JSON
    def work(as_json: bool) -> None:
        print("library")  # noqa: T201
        print_json('{"value": 1}\n')

    result = CliRunner().invoke(work, ["--json"])
    assert json.loads(result.stdout) == {"value": 1}
    assert result.stderr == "library\n"
