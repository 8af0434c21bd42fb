"""After any failure, an output is the old or the new one, and unfinished work can be resumed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from lrcompress.checkpoint import fingerprints
from lrcompress.config.recipe import read_recipe
from lrcompress.runtime import atomic_io
from lrcompress.runtime.atomic_io import discard, replace_text, writing
from lrcompress.runtime.errors import InputError, MachineError
from lrcompress.workflows.run.folder import RunFolder
from lrcompress.workflows.scaling import folder as scaling_folder
from lrcompress.workflows.scaling.folder import POINT_STAGES, ScalingFolder
from lrcompress.workflows.scaling.point import ScalingPoint
from tests.conftest import small_recipe


def _write(out: Path, text: str, replace: bool = False) -> None:
    with writing(out, replace) as folder:
        (folder / "file").write_text(text)


def test_output_of_another_process_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write_while_another_writes() -> None:
        with writing(out) as folder:
            (folder / "file").write_text("mine")
            _write(out, "the other's")

    with pytest.raises(InputError, match="exists: choose another name"):
        write_while_another_writes()
    assert (out / "file").read_text() == "the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 of Linux")
def test_an_older_folder_is_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _write(out, "old")
    monkeypatch.setattr(Path, "rename", None)  # would fail if it were called
    _write(out, "new", replace=True)
    assert (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_that_step_an_older_folder_is_replaced_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_io, "_exchange_names", lambda *_: False)
    out = tmp_path / "out"
    _write(out, "old")
    _write(out, "new", replace=True)
    assert (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_partly_removed_work_is_never_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / ".out.finetune", tmp_path / "out"
    (work / "checkpoint-4").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed there
    discard(work, out)
    assert not work.exists()
    monkeypatch.undo()
    monkeypatch.setattr(atomic_io, "_is_running", lambda _: False)
    _write(out, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".recipe.yaml.partial", ".report.md.partial", ".lock"])
def test_the_folder_of_a_killed_run_is_recognized(
    dense: Path, text: Path, tmp_path: Path, name: str
) -> None:
    recipe = read_recipe(small_recipe(tmp_path / "recipe.yaml", dense, text))
    folder = RunFolder(recipe, tmp_path / "out")
    folder.claim()
    (folder.out / name).write_text("half")
    folder.refuse_other(overwrite=False)
    (folder.out / ".thesis.partial").write_text("years of work")
    with pytest.raises(InputError, match="is no run"):
        folder.refuse_other(overwrite=False)


def test_a_point_is_saved_before_its_checkpoints_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"parameters": 1, "non_embedding": 1, "ffn_parameters": 1, "steps": 1, "tokens": 1}
    cost = {"flops": 1, "seconds": 1.0, "loss": 1.0, "curve": (), "device": "cpu", "diverged": None}
    point = ScalingPoint(**{"size": "s", "variant": "dense", "seed": 0} | counts | cost)  # type: ignore[arg-type]

    def train(work: Path) -> ScalingPoint:
        (work / "checkpoint-4").mkdir(parents=True)
        return point

    def kill(work: Path, _: Path) -> None:
        assert (work / "checkpoint-4").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling_folder, "discard", kill)
    folder = ScalingFolder(None, tmp_path)  # type: ignore[arg-type]  # only claims read the recipe
    (tmp_path / "points").mkdir()
    with pytest.raises(KeyboardInterrupt):
        folder.point("one", [1], train)
    assert fingerprints.read_state(tmp_path / "points" / "one.json")[
        "inputs"
    ] == fingerprints.digest([1], *POINT_STAGES)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"could not write .*missing/file"):
        replace_text(tmp_path / "missing" / "file", "text")
