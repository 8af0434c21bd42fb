"""A changed byte of an exported GGUF file is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrcompress.checkpoint.export.gguf_file import export_gguf
from lrcompress.checkpoint.export.gguf_seal import HEAD, KEY, is_sealed
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke, refusal
from tests.gguf_models import metadata, narrow, write_donor
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = narrow(tiny_model(), (40, 72))
    donor = write_donor(folder / "donor.gguf", model.config, "llama")
    export_gguf(model, None, folder / "out.gguf", {}, like=str(donor))
    return folder / "out.gguf"


def test_what_was_exported_is_right(exported: Path) -> None:
    assert is_sealed(exported)
    assert len(set(metadata(exported)[KEY])) > 8
    result = invoke("verify", exported)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("1 files, 0.1 MB, as they were saved.\n")


def test_a_flipped_bit_anywhere_is_found(exported: Path, tmp_path: Path) -> None:
    whole, copy = exported.read_bytes(), tmp_path / "copy.gguf"
    digits = whole.index(HEAD) + len(HEAD)
    for position in (0, 9, digits, digits + 63, len(whole) // 2, len(whole) - 1):
        flipped = bytes([whole[position] ^ 1])
        copy.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        assert not is_sealed(copy), position
    for length in (digits + 10, len(whole) - 32):
        copy.write_bytes(whole[:length])
        assert not is_sealed(copy), length
    result = invoke("verify", copy)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {str(copy)!r} is not what was saved: copy.gguf has")
    (verification,) = json.loads(invoke("verify", copy, "--json").stdout)
    assert [fault["kind"] for fault in verification["faults"]] == ["checksum"]


def test_what_holds_no_checksum_is_refused(exported: Path, tmp_path: Path) -> None:
    whole, copy = exported.read_bytes(), tmp_path / "copy.gguf"
    for content in (b"", b"GGUF", whole.replace(KEY.encode(), KEY.upper().encode())):
        copy.write_bytes(content)
        with pytest.raises(InputError, match="holds no checksum"):
            is_sealed(copy)
    assert "holds no checksum" in refusal("verify", exported.with_name("donor.gguf"))
