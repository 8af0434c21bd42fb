"""Reads lm-eval's task files as text, to refuse in a sentence what lm-eval would not understand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.safe_parsing import check_keys

TEXT_TAG = "tag:yaml.org,2002:str"
NULL_TAG = "tag:yaml.org,2002:null"
FUNCTION_TAG = "!function"
# keys of which a task has one: where its questions are
SOURCE_KEYS = {"dataset_path", "custom_dataset", "class"}
IGNORED_FOLDERS = {"__pycache__", ".ipynb_checkpoints"}  # by lm-eval


@dataclass(frozen=True)
class TaskFile:
    """A task file, or a group file, whose values stay YAML nodes.

    values: its keys, and those of the files that it includes.
    modules: the Python files that its `!function` tags name, where there are such files.
    """

    path: Path
    values: Mapping[str, yaml.Node]
    modules: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path, including: tuple[Path, ...] = ()) -> TaskFile:
        """Reads `path`, which the files `including` include.

        Raises InputError where it is not a mapping, has a key twice, or includes no file.
        """
        root = _root(path)
        values = {key.value: value for key, value in root.value if isinstance(key, yaml.ScalarNode)}
        modules = tuple(_modules(root, path.parent))
        for name in _texts(values.pop("include", None)):
            included = path.parent / name
            if not included.is_file() or included.resolve() in including:
                raise InputError(
                    f"task file {str(path)!r} includes {name!r}, which is no file or includes this "
                    "file again: correct the line"
                )
            other = cls.read(included, (*including, path.resolve()))
            values = {**other.values, **values}
            modules += other.modules
        return cls(path, values, modules)

    @property
    def is_group(self) -> bool:
        return "group" in self.values and "class" not in self.values

    @property
    def name(self) -> str:
        """The name of the task or group; InputError where it is missing or not text."""
        key = "group" if self.is_group else "task"
        node = self.values.get(key)
        if node is None or node.tag == NULL_TAG or not node.value:
            raise InputError(
                f"task file {str(self.path)!r} has no name: add a line '{key}: NAME', by which its "
                "results are called"
            )
        if isinstance(node, yaml.SequenceNode):
            raise InputError(
                f"task file {str(self.path)!r} has a list as its {key}: make it a group by a line "
                "'group: NAME', or give the names of the tasks themselves"
            )
        if node.tag != TEXT_TAG:
            raise InputError(
                f"task file {str(self.path)!r} has a name that is not text: correct its {key!r}, "
                "with quotes around a number"
            )
        return str(node.value)

    @property
    def parts(self) -> list[str]:
        """The names that a group lists; parts that are defined inside the list have none."""
        tasks = self.values.get("task")
        is_list = self.is_group and isinstance(tasks, yaml.SequenceNode)
        return _texts(tasks) if is_list else []

    def check(self) -> None:
        """Raises InputError where it has no name, no source of questions, or no tasks."""
        name = self.name
        tasks = self.values.get("task")
        if self.is_group and not (isinstance(tasks, yaml.SequenceNode) and tasks.value):
            raise InputError(
                f"group file {str(self.path)!r} has no tasks: add a list, 'task: [NAME, ...]'"
            )
        if not self.is_group and not SOURCE_KEYS & self.values.keys():
            raise InputError(
                f"task file {str(self.path)!r} does not say where its questions are: add "
                "'dataset_path', a hub data set, or json with 'dataset_kwargs' for files; to ask "
                f"lm-eval's own task {name!r}, give its name and no file"
            )


@dataclass(frozen=True)
class GroupFolder:
    """A group file, and the task files in its folder and below, where lm-eval finds its parts."""

    group: TaskFile
    files: tuple[TaskFile, ...]

    @classmethod
    def of(cls, group: TaskFile) -> GroupFolder:
        """Raises InputError where a file has a name that lm-eval cannot index."""
        others = (f for f in _task_files(group.path.parent) if f.path != group.path)
        return cls(group, (group, *others))

    def used(self) -> dict[str, TaskFile]:
        """Name -> file, of the group and of all its parts that have a file here.

        Raises InputError where two files have one of these names.
        """
        used: dict[str, TaskFile] = {}
        names = [self.group.name]
        while names:
            name = names.pop()
            files = [file for file in self.files if file.name == name]
            if len(files) > 1:
                first, second = (str(file.path) for file in files[:2])
                raise InputError(f"{name!r} is the name in {first!r} and in {second!r}: change one")
            if files and name not in used:
                used[name] = files[0]
                names += files[0].parts
        return used

    def check_parts(self, known: Sequence[str]) -> None:
        """Raises InputError where the name of a part is not among the `known` ones."""
        for file in self.used().values():
            for name in file.parts:
                if name not in known:
                    raise InputError(
                        f"group file {str(file.path)!r} names {name!r}, which is neither a task of "
                        f"lm-eval nor in a file beside it{did_you_mean(name, known)}"
                    )


def used_modules(file: TaskFile) -> list[Path]:
    """The Python files that a task file names, or for a group file those that its parts name."""
    files = GroupFolder.of(file).used().values() if file.is_group else (file,)
    return [module for used in files for module in used.modules]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence that names what is close to `name`; empty where nothing is."""
    close = get_close_matches(name, known, 3)
    return f", did you mean {', '.join(close)}?" if close else ""


def _task_files(folder: Path) -> Iterator[TaskFile]:
    """The task and group files in `folder` and below. Others are skipped, as lm-eval does."""
    for path in sorted(folder.glob("**/*.yaml")):
        if IGNORED_FOLDERS & {*path.parts}:
            continue
        try:
            file = TaskFile.read(path)
        except (InputError, OSError):
            continue
        node = file.values.get("group" if file.is_group else "task")
        if isinstance(node, yaml.ScalarNode):
            _ = file.name  # lm-eval stops at one that is not text
            yield file


def _root(path: Path) -> yaml.MappingNode:
    content = path.read_bytes()
    try:
        check_keys(content)
    except ValueError as error:
        raise InputError(f"task file {str(path)!r} cannot be read: {error}") from None
    root = yaml.compose(content, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        kinds: dict[Any, str] = {yaml.SequenceNode: "a list", yaml.ScalarNode: "one value"}
        raise InputError(
            f"task file {str(path)!r} holds {kinds.get(type(root), 'nothing')}: give a task file "
            "of lm-eval, with keys such as task, dataset_path and output_type"
        )
    return root


def _modules(root: yaml.Node, folder: Path) -> Iterator[Path]:
    remaining = [root]
    while remaining:
        node = remaining.pop()
        if isinstance(node, yaml.MappingNode):
            remaining += [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            remaining += node.value
        elif node.tag == FUNCTION_TAG:
            module = node.value.rpartition(".")[0].replace(".", "/")
            if (file := folder / f"{module}.py").is_file():
                yield file.resolve()


def _texts(node: yaml.Node | None) -> list[str]:
    """The texts of a list, or one text as a list."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [str(item.value) for item in nodes if isinstance(item, yaml.ScalarNode)]
