"""The training loop: which checkpoint it resumes from."""

from __future__ import annotations

from pathlib import Path

from lrcompress.training import loop


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path) -> None:
    for step, state in ((4, "{}"), (8, '{"half')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / loop.STATE_FILE).write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert loop.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
