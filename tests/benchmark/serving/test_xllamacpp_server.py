"""The script that serves a GGUF file by xllamacpp says in a line why it does not.

That it serves is in tests/integration/test_serving.py.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lrcompress.benchmark.serving import xllamacpp_server


def run(*arguments: object, flags: tuple[str, ...] = ()) -> tuple[int, str]:
    """The exit code, and the last line of standard error or, without one, of standard output."""
    command = [sys.executable, *flags, xllamacpp_server.__file__, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in result.stderr
    return result.returncode, (result.stderr or result.stdout).splitlines()[-1]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A file that begins as a GGUF file does."""
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    return file


def test_help_needs_no_package() -> None:
    assert run("--help", flags=("-S",))[0] == 0


def test_a_missing_package_is_named(broken: Path) -> None:
    code, line = run(broken, flags=("-S",))  # without what is installed
    assert code == 2
    assert line.endswith("has no xllamacpp: install it there")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.gguf", None, "missing.gguf' is not a file: give a GGUF file"),
        ("text.gguf", b"text", "text.gguf' is not a GGUF file"),
        ("empty.gguf", b"", "empty.gguf' is not a GGUF file"),
        ("broken.gguf", b"GGUF" + bytes(64), "is not served: the log above says why"),
    ],
)
def test_what_is_no_model_is_refused(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    code, line = run(file)
    assert code == 2
    assert words in line


@pytest.mark.parametrize("option", ["--port", "--context", "--parallel", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_numbers_are_checked(option: str, value: str, broken: Path) -> None:
    code, line = run(broken, f"{option}={value}", flags=("-S",))
    assert code == 2
    assert f"argument {option}: {value!r} is not a whole number of at least 1" in line


@pytest.mark.parametrize("port", ["taken", 99_999])
def test_a_port_that_cannot_be_used_is_named(port: str | int, broken: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1] if port == "taken" else port
        code, line = run(broken, "--port", number)
    assert code == 2
    assert f"port {number} cannot be used" in line
    assert line.endswith("give another --port")
