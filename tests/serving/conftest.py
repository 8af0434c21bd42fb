"""A checkpoint with every form, which tests copy before they damage it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.tiny_checkpoints import random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "model"
    random_checkpoint(out)
    return out
