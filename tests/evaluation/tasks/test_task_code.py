"""The code of a task is all that it imports of the user's own, or it cannot be told."""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrcompress.evaluation.tasks.cache import definitions_hash
from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.evaluation.tasks.task_code import UntrackedCodeError, sources
from tests.evaluation.tasks.conftest import quality, write_yaml
from tests.tiny import tiny_model

LONG_AGO = 1_000_000_000
# one module for each form of import; `outside` is what a package has that nothing imports
MODULES = {
    "mine/__init__.py": "",
    "mine/near.py": "from . import deep\nfrom .deep import *\n",
    "mine/deep.py": "def pick(doc):\n    from mine_lazy import gold\n    return gold(doc)\n",
    "mine/outside.py": "",
    "mine_lazy.py": "import json, os.path\nimport numpy as np\ngold = lambda doc: doc['gold']\n",
    "mine_optional.py": "try:\n    import mine_not_there\nexcept ImportError:\n    pass\n",
}
TASK = "import mine.near\nimport mine_optional\ndef right(doc):\n    return mine.near.pick(doc)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path with MODULES, and a task file whose module imports them."""
    for name, text in MODULES.items():
        write(tmp_path / name, text)
    (tmp_path / "words.py").write_text(TASK)
    task = write_yaml(tmp_path)
    task.write_text(task.read_text().replace(": gold", ": !function words.right"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    forget()


def write(file: Path, text: str) -> None:
    """Writes a file that is older than this process."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    os.utime(file, (LONG_AGO, LONG_AGO))


def forget() -> None:
    """A new process would import the modules again."""
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("mine")]:
        del sys.modules[name]


def function_of(folder: Path) -> Any:
    return resolve([str(folder / "mine.yaml")]).tasks["mine"].config.doc_to_target


def test_every_form_of_import_is_followed(folder: Path) -> None:
    found = sources(function_of(folder))
    own = {name: text for name, text in found.items() if name.startswith("mine")}
    expected = {"mine", "mine.near", "mine.deep", "mine_lazy", "mine_optional"}
    assert own.keys() == expected
    assert own["mine_lazy"] == MODULES["mine_lazy.py"]
    assert found[str(folder / "words")] == TASK
    assert "numpy.linalg" not in found  # what is installed is not followed


def test_of_an_installed_module_it_is_that_module_alone() -> None:
    assert list(sources(OrderedDict)) == ["collections"]
    assert sources(len) == {}
    assert list(sources(json.loads)) == ["json"]


@pytest.mark.parametrize("module", ["mine/deep.py", "mine_lazy.py", "words.py"])
def test_a_changed_module_is_another_result(module: str, folder: Path, passes: list[int]) -> None:
    model, cache, task = tiny_model(), folder / "cache", folder / "mine.yaml"
    before = [quality(model, task, cache=cache), quality(model, task, cache=cache)]
    assert len(passes) == 3 * 8
    assert before[0] == before[1]
    state = definitions_hash(resolve([str(task)]).tasks.values())
    assert state == definitions_hash(resolve([str(task)]).tasks.values())
    text = (folder / module).read_text()
    write(folder / module, text.replace("doc['gold']", "0 * doc['gold']") + "# edited\n")
    forget()
    (folder / "words.py").touch()  # a new process would import it again
    changed = quality(model, task, cache=cache)
    assert len(passes) == 2 * 3 * 8
    assert (changed != before[0]) == (module == "mine_lazy.py")
    assert state != definitions_hash(resolve([str(task)]).tasks.values())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import importlib\nimportlib.import_module('mine_' + 'lazy')\n", "uses import_module"),
        ("__import__('mine_lazy')\n", "uses __import__, which can run any code"),
        ("exec('import mine_lazy')\n", "uses exec"),
    ],
)
def test_code_that_cannot_be_told_keeps_nothing(
    code: str,
    reason: str,
    folder: Path,
    passes: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(folder / "mine_lazy.py", MODULES["mine_lazy.py"] + code)
    model, cache, task = tiny_model(), folder / "cache", folder / "mine.yaml"
    first = quality(model, task, cache=cache)
    assert quality(model, task, cache=cache) == first
    assert len(passes) == 2 * 3 * 8
    assert not list(cache.rglob("*.json"))
    assert "The results of task 'mine' are not kept" in caplog.text
    assert reason in caplog.text
    tasks = resolve([str(task)]).tasks.values()
    assert definitions_hash(tasks) != definitions_hash(tasks)


def test_an_edited_module_that_is_not_imported_again_keeps_nothing(folder: Path) -> None:
    function = function_of(folder)
    assert function({"gold": 2}) == 2
    assert "mine_lazy" in sources(function)
    (folder / "mine_lazy.py").write_text("gold = lambda doc: 0\n")
    assert function({"gold": 2}) == 2  # Python has the old module
    with pytest.raises(UntrackedCodeError, match=r"mine_lazy.py' was edited after"):
        sources(function)


def test_a_method_of_no_module_is_told() -> None:
    space: dict[str, Any] = {"__name__": "no_module_of_this_name"}
    exec("def right(doc):\n    return 0\n", space)
    with pytest.raises(UntrackedCodeError, match=r"the module of .* is unknown"):
        sources(space["right"])
