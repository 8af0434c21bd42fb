"""Commands for the tests that kill or starve them, and the folders in which they run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import SMALL, small_recipe
from tests.torture import forked
from tests.torture.conftest import Workspace

TRAIN = (
    "--max-steps", 6, "--train-length", 32, "--held-out", 2, "--eval-every", 2,
    "--learning-rate", "3e-3",
)  # fmt: skip


Command = tuple[object, ...]


def _factorize(workspace: Workspace) -> Command:
    budget = ("--keep-ratio", "0.6", "--refine", "--refine-epochs", "2")
    return ("factorize", workspace.inputs / "dense", "--out", workspace.out, *budget, *SMALL)


def _streaming(workspace: Workspace) -> Command:
    text = ("--streaming", "--calibration", workspace.inputs / "text.txt")
    return (*_factorize(workspace), *text)


def _finetune(workspace: Workspace) -> Command:
    text = ("--data", workspace.inputs / "text.txt", *TRAIN)
    return ("finetune", workspace.inputs / "low", "--teacher", workspace.inputs / "dense", "--out",
            workspace.out, *text)  # fmt: skip


def _pretrain(workspace: Workspace) -> Command:
    dense, text = workspace.inputs / "dense", workspace.inputs / "text.txt"
    options = ("--tokenizer", dense, "--keep-ratio", "0.5", "--data", text, *TRAIN)
    return ("pretrain", dense / "config.json", "--out", workspace.out, *options)


def _recipe(workspace: Workspace, more: str = "") -> Path:
    file, text = workspace.inputs / "recipe.yaml", workspace.inputs / "text.txt"
    return small_recipe(file, workspace.inputs / "dense", text, more)


FEWER = ("--set", "evaluate.speed=false", "--set", "evaluate.compared_windows=1")


def _sweep(workspace: Workspace) -> Command:
    points = ("--keep-ratio", "0.8,0.6", "--method", "svd,whitened")
    return ("sweep", _recipe(workspace), workspace.out, *points, *FEWER)


def _run(workspace: Workspace) -> Command:
    training = (
        f"finetune: {{data: {workspace.inputs / 'train.txt'}, max_steps: 4, train_length: 32,\n"
        "  held_out: 2, eval_every: 2, learning_rate: 3e-3}\n"
    )
    (workspace.inputs / "train.txt").write_text("Pack my box with five dozen jugs of ink. " * 60)
    return ("run", _recipe(workspace, training), workspace.out, *FEWER)


def _overwrite(workspace: Workspace) -> Command:
    return ("run", _recipe(workspace), workspace.out, *FEWER, "--overwrite")


def _older_run(workspace: Workspace) -> None:
    """A finished run of another recipe."""
    result = forked.run((*_overwrite(workspace), "--set", "factorize.keep_ratio=0.8"))
    assert result.code == 0, result.output


def _nothing(workspace: Workspace) -> None:
    """The output folder does not exist yet."""


@dataclass(frozen=True)
class Case:
    """A command, what prepares its output folder, and how often it is killed."""

    command: Callable[[Workspace], Command]
    kills: int
    """With --full."""
    sample: int
    """Without."""
    prepare: Callable[[Workspace], None] = _nothing


CASES = {
    "factorize": Case(_factorize, 18, 2),
    "factorize --streaming": Case(_streaming, 16, 1),
    "finetune": Case(_finetune, 20, 2),
    "pretrain": Case(_pretrain, 8, 1),
    "sweep": Case(_sweep, 14, 1),
    "run": Case(_run, 14, 1),
    "run --overwrite": Case(_overwrite, 10, 1, _older_run),
}


def file_states(folder: Path) -> dict[str, tuple[str, int]]:
    """The SHA-256 of every file in `folder`, and when it was written in ns."""
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
