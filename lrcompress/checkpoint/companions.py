"""The files of a model's folder that are neither weights nor tokenizer but that loading needs.

Such as configs of processors, chat templates and code of a processor's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, cached_file

from lrcompress.runtime.paths import is_inside

SUFFIXES = (".json", ".jinja")
WRITTEN_BY_SAVING = (
    "config.json",
    "generation_config.json",
    "lrcompress.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
# what loading a model and its tokenizer does not bring into the cache of the hub
HUB_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_NAME_LENGTH = 255


def source_folder(model: Any) -> Path | None:
    """The folder that `model` was loaded from; None where it was not, or where it is gone."""
    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    files = [_from_hub(name, file) for file in (CONFIG_NAME, *HUB_FILES)]
    return files[0].parent if files[0] else None


def _from_hub(name: str, file: str) -> Path | None:
    """The path of a file of a hub model in the cache, to which it is fetched where that works."""
    try:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # neither a hub id nor a folder that is still there
        return None
    return Path(path) if path else None


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what loading needs from `source` to `folder`, and replaces nothing there.

    These are JSON files and templates, files and folders that a JSON file names, and code that
    their `auto_map` names.
    """
    plain = [file for file in sorted(source.glob("*")) if _is_companion(file)]
    contents = [_content(file) for file in (*plain, source / "config.json")]
    named = [path for text in _texts(contents) if (path := _named_path(source, text))]
    code = [path for content in contents[:-1] for path in _code(source, content)]
    for path in (*plain, *named, *code):
        _copy(path, folder / path.relative_to(source))


def _is_companion(file: Path) -> bool:
    is_written = file.name in WRITTEN_BY_SAVING or file.name.endswith(".index.json")
    return file.is_file() and file.suffix in SUFFIXES and not is_written


def _content(file: Path) -> Any:
    """The JSON data in `file`; None where it holds something else, such as a template."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _texts(content: Any) -> Iterator[str]:
    """Every text in JSON data."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)


def _named_path(source: Path, text: str) -> Path | None:
    """The file or folder of `source` that `text` names; weights of the model are none."""
    is_name = 0 < len(text) <= MAX_NAME_LENGTH and "\0" not in text and text[0] not in "./~"
    if not (is_name and is_inside(text)):
        return None
    path = source / text
    is_weights = path.parent == source and path.suffix in (".safetensors", ".bin", ".gguf")
    is_written = path.name in WRITTEN_BY_SAVING and path.parent == source
    return path if path.exists() and not (is_weights or is_written) else None


def _code(source: Path, content: Any) -> Iterable[Path]:
    """The modules that `auto_map` in JSON data names, and those that they import."""
    for text in _texts(content.get("auto_map") if isinstance(content, dict) else None):
        module = source / f"{text.partition('.')[0]}.py"
        if "--" not in text and module.is_file():
            yield module
            yield from (Path(file) for file in get_relative_import_files(module))


def _copy(path: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)
