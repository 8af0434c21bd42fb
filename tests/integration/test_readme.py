"""The commands and the Python example of the README run as they are written there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import invoke

README = Path("README.md").read_text("utf-8")


QUICK = {
    "bench": ("--prompt-length", "8", "--new-tokens", "2", "--training-length", "8"),
    "eval": ("--limit", "1", "--repeats", "2"),
    "finetune": ("--max-steps", "2", "--train-length", "64", "--held-out", "2"),
    "pretrain": (
        *("--max-steps", "2", "--train-length", "32", "--held-out", "2"),
        *("--batch-size", "2", "--vocab-size", "260"),
    ),
}


def test_python_example_runs(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shown: list[object] = []
    exec(code.replace('"MODEL"', repr(str(dense))), {"print": lambda *a: shown.append(a)})
    assert (tmp_path / "small" / "lrcompress.json").is_file()
    assert any("token perplexity" in str(line) for line in shown)


def test_commands_run(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^lrcompress (\w+ .*?) +#", README, re.MULTILINE)
    assert len(lines) == 14
    Path("TRAIN.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    for line in (line for line in lines if line.split()[0] not in ("run", "scaling")):
        arguments = line.replace("MODEL", str(dense)).split()
        result = invoke(*arguments, *QUICK.get(arguments[0], ()))
        assert result.exit_code == 0, result.output


def test_tree_names_every_module() -> None:
    tree = README[README.index("## What is where") :]
    for file in Path("lrcompress").glob("[a-z]*.py"):
        assert file.name in tree or file.name == "lm_eval.py", file
