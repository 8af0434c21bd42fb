"""Types of settings: lists of names, and paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.config import CalibrationSettings, EvaluateSettings


def test_commas_separate_texts_but_not_the_name_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a,b.txt"
    file.write_text("words")
    for value, items in {
        "a.txt, b.txt": ("a.txt", "b.txt"),
        f"{file}": (f"{file}",),
        f"{file}:body": (f"{file}:body",),
    }.items():
        assert CalibrationSettings(data=value).data == items


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = EvaluateSettings(data_dir="~/copies", task_cache="none")
    assert (settings.data_dir, settings.task_cache) == ("/home/somebody/copies", "none")


@pytest.mark.parametrize(
    "settings",
    [{"fewshot_as_multiturn": True}, {"apply_chat_template": True, "chat_template": "none"}],
)
def test_chat_settings_that_exclude_each_other(settings: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"fewshot_as_multiturn needs|needs a template"):
        EvaluateSettings(**settings)
