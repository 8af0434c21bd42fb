"""What lm-eval would not understand in a task file is one sentence with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.runtime.errors import InputError
from tests.evaluation.tasks.conftest import write_yaml


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"'.*own.yaml' holds nothing: give a task file of lm-eval"),
        ("- a\n- b\n", r"own.yaml' holds a list: give a task file"),
        ("words\n", r"own.yaml' holds one value: give a task file"),
        ("output_type: multiple_choice\n", r"own.yaml' has no name: add a line 'task: NAME'"),
        ("task:\ndataset_path: json\n", r"has no name: add a line 'task: NAME'"),
        ("tag: many\n", r"has no name: add a line 'task: NAME'"),
        ("class: !function words.Own\n", r"has no name: add a line 'task: NAME'"),
        ("task: [piqa, arc_easy]\n", r"own.yaml' has a list as its task: make it a group by a"),
        ("task: 3\ndataset_path: json\n", r"own.yaml' has a name that is not text: correct its"),
        ("task: {a: b}\n", r"own.yaml' has a name that is not text: correct its 'task'"),
        ("task: piqa\nnum_fewshot: 3\n", r"does not say where .* ask lm-eval's own task 'piqa'"),
        ("include: gone.yaml\ntask: a\n", r"own.yaml' includes 'gone.yaml', which is no file"),
        ("include: own.yaml\ntask: a\n", r"own.yaml' includes 'own.yaml', which is no file or "),
        ("group: many\n", r"group file '.*own.yaml' has no tasks: add a list"),
        ("group: many\ntask: mine\n", r"group file '.*own.yaml' has no tasks: add a list"),
        ("group:\ntask: [mine]\n", r"own.yaml' has no name: add a line 'group: NAME'"),
        ("group: mine\ntask: [mine]\n", r"'mine' is the name in '.*own.*' and in '.*mine.yaml'"),
        ("task: a\ntask: b\n", r"own.yaml' cannot be read: line 2 gives the key 'task' again"),
        ("task: [\n", r"own.yaml' cannot be read: while parsing"),
    ],
)
def test_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    write_yaml(tmp_path)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=sentence) as raised:
        resolve([str(tmp_path / "own.yaml")])
    assert "\n" not in str(raised.value)


def test_parts_and_files_beside_a_group(tmp_path: Path) -> None:
    mine, group, stray = write_yaml(tmp_path), tmp_path / "group.yaml", tmp_path / "stray.yaml"
    group.write_text("group: many\ntask: [mine, other]\n")
    for text, sentence in {
        "task: 3\n": r"stray.yaml' has a name that is not text",
        mine.read_text(): r"'mine' is the name in '.*mine.yaml' and in '.*stray.yaml'",
        "- no task file\n": r"group.yaml' names 'other', which is neither a task of lm-eval nor",
    }.items():
        stray.write_text(text)
        with pytest.raises(InputError, match=sentence):
            resolve([str(group)])


def test_included_keys_and_encodings_count(tmp_path: Path) -> None:
    base = write_yaml(tmp_path)
    for encoding in ("utf-8-sig", "utf-16"):
        own = tmp_path / f"{encoding}.yaml"
        own.write_text(f"include: {base.name}\ntask: own\n", encoding)
        assert list(resolve([str(own)]).tasks) == ["own"]
