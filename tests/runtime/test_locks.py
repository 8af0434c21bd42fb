"""Locks admit one process at a time, and leave no files behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.runtime import locks
from lrcompress.runtime.atomic_io import writing
from lrcompress.runtime.errors import InputError


def test_a_second_writer_is_refused_and_a_lock_file_of_a_killed_process_is_ignored(
    tmp_path: Path,
) -> None:
    out = tmp_path / "new" / "out"
    with locks.beside(out), pytest.raises(InputError, match="another process is writing"):  # noqa: SIM117
        with locks.beside(out):
            raise AssertionError("two at a time")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "new" / ".out.lock").touch()
    with locks.beside(out), writing(out) as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_no_folder_that_was_made_for_the_lock(tmp_path: Path) -> None:
    with pytest.raises(InputError), locks.inside(tmp_path / "new" / "out"):
        raise InputError("nothing came of it")
    assert not list(tmp_path.iterdir())
