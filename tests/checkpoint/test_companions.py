"""Every file of a model's folder that loading needs is in each folder made from it."""

from __future__ import annotations

import json
from pathlib import Path

from lrcompress.checkpoint.companions import copy_companions

FILES = {
    "config.json": json.dumps({"speech_head": "speech/head.bin", "weights": "model.safetensors"}),
    "model.safetensors": "weights",
    "model.safetensors.index.json": "{}",
    "preprocessor_config.json": json.dumps(
        {"auto_map": {"AutoProcessor": "processing_it.It"}, "outside": "../secret", "size": "."}
    ),
    "processor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "processing_it.py": "from .helper_it import x\n",
    "helper_it.py": "x = 1\n",
    "train.py": "never needed",
    "modules.json": json.dumps([{"path": "1_Pooling"}]),
    "1_Pooling/config.json": "{}",
    "speech/head.bin": "more weights",
    "tokenizer_config.json": "that of the source",
    "notes.txt": "not needed",
    "checkpoint-5/config.json": "{}",
}
NEEDED = {
    "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "modules.json",
    "processing_it.py", "helper_it.py", "1_Pooling/config.json", "speech/head.bin",
}  # fmt: skip


def test_what_loading_needs_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    for name, text in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (tmp_path / "secret").write_text("private")
    folder.mkdir()
    copy_companions(source, folder)
    copied = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert copied == NEEDED
    assert all((folder / name).read_text() == FILES[name] for name in copied)


def test_what_was_written_stays(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    for place, text in ((source, "old"), (folder, "new")):
        place.mkdir()
        (place / "chat_template.jinja").write_text(text)
    copy_companions(source, folder)
    assert (folder / "chat_template.jinja").read_text() == "new"
