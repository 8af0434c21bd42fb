"""The Python of a task imports what stands beside it, and nothing takes its place unsaid."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.evaluation.tasks.sibling_modules import SiblingFinder
from lrcompress.evaluation.tasks.task_code import sources
from lrcompress.runtime.errors import InputError
from tests.evaluation.tasks.conftest import ROWS, write_yaml
from tests.evaluation.tasks.test_task_code import forget, write


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    forget()
    sys.meta_path[:] = [item for item in sys.meta_path if not isinstance(item, SiblingFinder)]


def task_in(folder: Path, name: str = "mine", **modules: str) -> Path:
    """A task whose prompt is words.prompt, with modules of that text beside it."""
    task = write_yaml(folder, name, text="!function words.prompt")
    for module, text in modules.items():
        write(folder / f"{module.replace('__in__', '/')}.py", text)
    return task


def prompt_of(task: Path) -> Any:
    (loaded,) = resolve([str(task)]).tasks.values()
    return loaded.config.doc_to_text


FAR = "ask = lambda doc: 'near'\n"


@pytest.mark.parametrize(
    ("words", "modules"),
    [
        ("import mine_near\nprompt = lambda doc: mine_near.ask(doc)\n", {"mine_near": FAR}),
        (
            "def prompt(doc):\n    from mine_near import ask\n    return ask(doc)\n",
            {"mine_near": "import mine_far\nask = mine_far.ask\n", "mine_far": FAR},
        ),
        (
            "import mine_pack.deep\nprompt = lambda doc: mine_pack.deep.ask(doc)\n",
            {"mine_pack__in____init__": "", "mine_pack__in__deep": FAR},
        ),
        (
            "from mine_bare import deep\nprompt = lambda d: deep.ask(d)",
            {"mine_bare__in__deep": FAR},
        ),
    ],
)
def test_siblings_are_found_and_count_as_code(
    words: str, modules: dict[str, str], tmp_path: Path
) -> None:
    prompt = prompt_of(task_in(tmp_path, words=words, **modules))
    assert prompt(ROWS[0]) == "near"
    counted = {name for name in sources(prompt) if name.startswith("mine")}
    expected = {name.replace("__in____init__", "").replace("__in__", ".") for name in modules}
    assert counted >= expected


@pytest.mark.parametrize("name", ["json", "yaml", "sys"])
def test_a_sibling_named_like_another_module_is_refused(name: str, tmp_path: Path) -> None:
    write_yaml(tmp_path)
    task = task_in(tmp_path, words=f"import {name}\nprompt = lambda d: 'a'", **{name: ""})
    with pytest.raises(InputError, match=f"words.py' imports '{name}', which is .*{name}.py' and"):
        resolve([str(task)])
    (tmp_path / f"{name}.py").rename(tmp_path / "unused.py")
    assert prompt_of(task)(ROWS[0]) == "a"


def test_a_name_in_two_folders_is_refused_together_and_right_in_turn(tmp_path: Path) -> None:
    words = "import mine_near\nprompt = lambda doc: mine_near.WORD\n"
    tasks = [
        task_in(tmp_path / name, name, words=words, mine_near=f"WORD = {name!r}\n")
        for name in ("mine_a", "mine_b")
    ]
    with pytest.raises(InputError, match=r"tasks import 'mine_near' from .* and from "):
        resolve([str(task) for task in tasks])
    for _ in range(2):
        for task in tasks:
            prompt = prompt_of(task)
            assert prompt(ROWS[0]) == task.stem
            assert sources(prompt)["mine_near"] == f"WORD = {task.stem!r}\n"


def test_parts_of_a_group_import_what_is_beside_them(tmp_path: Path) -> None:
    for name in ("mine_a", "mine_b"):
        words = f"import {name}_near\nprompt = lambda doc: {name}_near.WORD\n"
        task_in(tmp_path / name, name, words=words, **{f"{name}_near": f"WORD = {name!r}\n"})
    (tmp_path / "group.yaml").write_text("group: both\ntask: [mine_a, mine_b]\n")
    for name, task in resolve([str(tmp_path / "group.yaml")]).tasks.items():
        assert task.doc_to_text(ROWS[0]) == name
