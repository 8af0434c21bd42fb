"""Logs of the questions and answers of tasks: a JSON-lines file per task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrcompress.reporting.render import nonfinite_to_text
from lrcompress.runtime.atomic_io import writing
from lrcompress.runtime.paths import unique_file_names

FOLDER = "samples"
Logs = Mapping[str, Sequence[Mapping[str, Any]]]  # task -> its items, as lm-eval logs them


def write(folder: Path, logs: Logs) -> None:
    """Replaces `folder` by one with a TASK.jsonl for each task; without logs it is removed."""
    if not logs:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with writing(folder, replace=True) as partial:
        for task, name in unique_file_names(logs).items():
            lines = [json.dumps(nonfinite_to_text(item), ensure_ascii=False) for item in logs[task]]
            (partial / f"{name}.jsonl").write_text("\n".join([*lines, ""]), "utf-8")
