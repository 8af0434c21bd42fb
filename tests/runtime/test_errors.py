"""Machine faults are recognized in the errors of libraries, and shown as such."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lrcompress.models import loading
from lrcompress.runtime.errors import machine_fault_reason
from tests.conftest import invoke


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"), "to its end"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_machine_faults_are_recognized(error: Exception, words: str) -> None:
    assert words in (machine_fault_reason(error) or "")
    wrapper = OSError("cannot load the model")
    wrapper.__cause__ = error
    assert words in (machine_fault_reason(wrapper) or "")
    assert machine_fault_reason(ValueError("rank 0 is too small")) is None


def test_a_machine_fault_while_loading_is_not_an_input_error(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(loading, "_model_from_pretrained", limited)
    result = invoke("inspect", dense, "--energy")
    assert result.exit_code == 1
    assert "cannot be loaded: too many files are open" in result.stderr
