"""Paths, links and task files of others: never followed out of a folder, and never run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import QUICK_EVAL, invoke, refusal, small_recipe

# absurd numbers make libraries warn
pytestmark = pytest.mark.filterwarnings("ignore")


def test_paths_stay_in_the_folders_that_they_name(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "has no GGUF file" in refusal("inspect", dense, "--gguf-file", "../x.gguf")
    for file in ("/etc/hosts", "../../x.gguf"):
        assert "leads out of its package" in refusal("inspect", f"package:torch/{file}")
    assert "is not a path" in refusal("inspect", "~nobody-of-that-name/model")
    assert "too long" in refusal("inspect", "/" + "a" * 5000)
    assert "no package '__main__'" in refusal("eval", dense, "--perplexity", "package:__main__")


def test_links_are_not_followed_out_of_a_run(dense: Path, text: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    recipe = small_recipe(tmp_path / "recipe.yaml", dense, text)
    for command, name in (("run", "samples"), ("sweep", "points")):
        out = tmp_path / command
        out.mkdir()
        (out / name).symlink_to(precious)
        assert "is a link" in refusal(command, recipe, out)
    assert (precious / "thesis.txt").read_text() == "years"


def test_a_card_is_not_written_through_a_link(factorized: Path, tmp_path: Path) -> None:
    folder, other = shutil.copytree(factorized, tmp_path / "model"), tmp_path / "other"
    other.write_text("mine")
    for name in ("README.md", ".README.md.partial", ".lrcompress.json.partial"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(other)
    result = invoke("eval", folder, "--write-card", *QUICK_EVAL)
    assert result.exit_code == 0, result.output
    assert other.read_text() == "mine"
    assert not (folder / "README.md").is_symlink()


def test_a_task_file_makes_no_objects(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for tag, words in (
        ("!!python/object/apply:os.mkdir [BROKEN]", "cannot be run"),
        ("!!python/name:os.system", "cannot be run"),
        ("[", "cannot be read"),
    ):
        file.write_text(f"task: mine\ndataset_path: json\ndoc_to_text: {tag}\n")
        assert words in refusal("eval", dense, "--tasks", file, *QUICK_EVAL)
    assert not Path("BROKEN").exists()
