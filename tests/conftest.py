"""One torch thread, no network, and folders with models in them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lrcompress-tests-")  # not that of the user
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.tiny import saved_model

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="tests/torture: run all tries, not a sample of them"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests/torture counted, summed over all tests."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        counts.update(dict[str, int](getattr(report, "user_properties", ())))
    for name, count in sorted(counts.items()):
        terminalreporter.write_line(f"{name}: {count}")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense llama with its tokenizer; tests must not write to it."""
    return saved_model(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="session")
def factorized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama factorized at keep_ratio 0.6; tests must not write to it."""
    out = tmp_path_factory.mktemp("factorized") / "model"
    result = invoke("factorize", dense, "--out", out, "--keep-ratio", "0.6", *SMALL)
    assert result.exit_code == 0, result.output
    return out


# options for commands on the tiny model: seconds of calibration, of evaluation
SMALL = ("--num-samples", "4", "--seq-len", "64")
QUICK_EVAL = ("--perplexity", "pydoc", "--context-length", "64", "--limit", "1", "--no-speed")

Invoke = Callable[..., Result]


def invoke(*arguments: object) -> Result:
    """Runs a command line in this process; raises exceptions other than SystemExit."""
    from lrcompress.cli.app import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*arguments: object) -> str:
    """The error of a command that refuses its input: one sentence, with exit code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("Error: ") :]
    assert error.count("\n") == 1
    return error


def interrupt(patch: pytest.MonkeyPatch, kind: type, method: str, at: int) -> list[int]:
    """Lets call number `at` of a method raise KeyboardInterrupt; returns a list of all calls."""
    original, calls = getattr(kind, method), list[int]()

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    patch.setattr(kind, method, counted)
    return calls


def small_recipe(file: Path, dense: Path, text: Path, more: str = "") -> Path:
    """A recipe of the tiny model whose run takes seconds, with the lines `more`."""
    file.write_text(
        f"model: {{source: {dense}}}\n"
        "calibration: {num_samples: 4, seq_len: 64}\n"
        f"factorize: {{keep_ratio: 0.6}}\n{more}"
        f"evaluate: {{perplexity: {text}, context_length: 64, limit: 2, prompt_length: 8,\n"
        "  new_tokens: 2, repeats: 2}\n"
    )
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 200, "utf-8")
    return file
