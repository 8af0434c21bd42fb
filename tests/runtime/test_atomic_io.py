"""Outputs are the old or the new, and one process's at a time; the machine's faults are told."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lrcompress.checkpoint import fingerprints
from lrcompress.config.recipe import read_recipe
from lrcompress.models import loading
from lrcompress.runtime import atomic_io, locks
from lrcompress.runtime.atomic_io import discard, replace_text, writing
from lrcompress.runtime.errors import InputError, MachineError, machine_fault_reason
from lrcompress.workflows.run.folder import RunFolder
from lrcompress.workflows.scaling import folder as scaling_folder
from lrcompress.workflows.scaling.folder import ScalingFolder
from lrcompress.workflows.scaling.point import ScalingPoint
from tests.conftest import invoke, small_recipe


def _written(out: Path, text: str, replace: bool = False) -> None:
    with writing(out, replace) as folder:
        (folder / "file").write_text(text)


def test_what_another_process_made_in_the_meantime_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def both() -> None:
        with writing(out) as folder:
            (folder / "file").write_text("mine")
            _written(out, "the other's")

    with pytest.raises(InputError, match="exists: choose another folder"):
        both()
    assert (out / "file").read_text() == "the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 of Linux")
def test_an_older_folder_gives_way_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _written(out, "old")
    monkeypatch.setattr(Path, "rename", None)  # would fail if it were called
    _written(out, "new", replace=True)
    assert (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_the_system_has_no_such_step_it_takes_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_io, "_exchanged", lambda *_: False)
    out = tmp_path / "out"
    _written(out, "old")
    _written(out, "new", replace=True)
    assert (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_part_of_what_was_kept_is_never_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / ".out.finetune", tmp_path / "out"
    (work / "checkpoint-4").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed there
    discard(work, out)
    assert not work.exists()
    monkeypatch.undo()
    monkeypatch.setattr(atomic_io, "_is_running", lambda _: False)
    _written(out, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_refused_and_a_lock_left_by_a_kill_is_none(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with locks.beside(out), pytest.raises(InputError, match="another process is writing"):  # noqa: SIM117
        with locks.beside(out):
            raise AssertionError("two at a time")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "new" / ".out.lock").touch()
    with locks.beside(out):
        _written(out, "new")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_no_folder_that_was_made_for_the_lock(tmp_path: Path) -> None:
    with pytest.raises(InputError), locks.inside(tmp_path / "new" / "out"):
        raise InputError("nothing came of it")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".recipe.yaml.partial", ".report.md.partial", ".lock"])
def test_what_a_killed_run_leaves_is_a_run(
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


def test_a_point_is_kept_before_its_checkpoints_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"parameters": 1, "non_embedding": 1, "ffn_parameters": 1, "steps": 1, "tokens": 1}
    cost = {"flops": 1, "seconds": 1.0, "loss": 1.0, "curve": (), "device": "cpu", "diverged": None}
    point = ScalingPoint(**{"size": "s", "variant": "dense", "seed": 0} | counts | cost)  # type: ignore[arg-type]

    def trained(work: Path) -> ScalingPoint:
        (work / "checkpoint-4").mkdir(parents=True)
        return point

    def killed(work: Path, _: Path) -> None:
        assert (work / "checkpoint-4").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling_folder, "discard", killed)
    folder = ScalingFolder(None, tmp_path)  # type: ignore[arg-type]  # only claims read the recipe
    (tmp_path / "points").mkdir()
    with pytest.raises(KeyboardInterrupt):
        folder.point("one", [1], trained)
    assert fingerprints.read_state(tmp_path / "points" / "one.json")[
        "inputs"
    ] == fingerprints.digest([1], "pretrain")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"), "to its end"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_faults_of_the_machine_are_known(error: Exception, words: str) -> None:
    assert words in (machine_fault_reason(error) or "")
    later = OSError("cannot load the model")
    later.__cause__ = error
    assert words in (machine_fault_reason(later) or "")
    assert machine_fault_reason(ValueError("rank 0 is too small")) is None


def test_a_model_that_the_machine_cannot_load_is_no_bad_input(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(loading, "_load_model", limited)
    result = invoke("inspect", dense, "--energy")
    assert result.exit_code == 1
    assert "cannot be loaded: too many files are open" in result.stderr


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"could not write .*missing/file"):
        replace_text(tmp_path / "missing" / "file", "text")
