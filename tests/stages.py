"""The source behind each stage of `fingerprints.STAGES`, as a test remembers it.

`python -m tests.stages` (make stages) records it again, once the number of a changed stage is
decided.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lrcompress.checkpoint.fingerprints import STAGES, Stage

RECORD = Path("tests/checkpoint/stages.json")
TEXT = ["corpora", "files", "rows", "text", "conversations", "packing"]
SHARED = ["layers/*.py", "models/loading.py", *(f"data/{name}.py" for name in TEXT)]
PERPLEXITY = ["evaluation/perplexity.py", "data/windows.py"]
COMPRESSION = ["compression/**/*.py", "methods/**/*.py"]
TRAINING = ["training/*.py", "data/training_text.py", "data/train_tokenizer.py", *COMPRESSION]
# stage -> patterns below lrcompress/ of the modules whose code makes its numbers
SOURCES: dict[Stage, list[str]] = {
    "benchmark": ["benchmark/*.py", *SHARED],
    "evaluate": ["evaluation/*.py", "models/torchao.py", *PERPLEXITY, *SHARED],
    "factorize": [
        *COMPRESSION, "data/calibration_text.py", "data/generated.py", *PERPLEXITY, *SHARED,
    ],
    "finetune": [*TRAINING, *SHARED],
    "pretrain": [*TRAINING, *SHARED],
    "tasks": ["evaluation/tasks/*.py", *SHARED],
    "teacher": ["training/teacher_cache.py", "training/losses.py"],
}  # fmt: skip


def recorded() -> dict[str, dict[str, object]]:
    """Stage -> its number and the hash of its source, at the last `make stages`."""
    return json.loads(RECORD.read_text("utf-8"))  # type: ignore[no-any-return]


def current() -> dict[str, dict[str, object]]:
    return {stage: {"number": STAGES[stage], "source": _hash(stage)} for stage in sorted(STAGES)}


def _hash(stage: Stage) -> str:
    """Of the text without blank lines and lines of comment: equal in every version of Python."""
    files = {file for pattern in SOURCES[stage] for file in Path("lrcompress").glob(pattern)}
    digest = hashlib.sha256()
    for file in sorted(files):
        lines = map(str.strip, file.read_text("utf-8").splitlines())
        code = [line for line in lines if line and not line.startswith("#")]
        digest.update("\n".join([file.as_posix(), *code]).encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    RECORD.write_text(json.dumps(current(), indent=2) + "\n", "utf-8")
