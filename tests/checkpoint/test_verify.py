"""`lrcompress verify` finds damage in every file of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lrcompress.checkpoint.folder import checksums
from lrcompress.checkpoint.record import read_record, write_record
from lrcompress.checkpoint.verify import Fault, verify
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke
from tests.tiny import flip_a_bit


@pytest.fixture
def saved(factorized: Path, tmp_path: Path) -> Path:
    return shutil.copytree(factorized, tmp_path / "saved")


def faults(folder: Path) -> list[Fault]:
    (verification,) = verify(folder)
    return list(verification.faults)


def test_what_was_saved_is_right(saved: Path) -> None:
    (saved / "README.md").write_text("an edited card")
    result = invoke("verify", saved)
    assert result.exit_code == 0, result.output
    files = {path.name for path in saved.iterdir()} - {"README.md", "lrcompress.json"}
    assert f"{saved}: {len(files)} files," in result.stdout
    assert result.stdout.endswith("as they were saved.\n")
    (verification,) = json.loads(invoke("verify", saved, "--json").stdout)
    assert verification == {
        "folder": str(saved),
        "files": len(files),
        "bytes": sum((saved / name).stat().st_size for name in files),
        "faults": [],
        "unchecked": None,
    }


def test_a_flipped_bit_in_any_file_is_found(saved: Path) -> None:
    for name in json.loads((saved / "lrcompress.json").read_text())["files"]:
        whole = (saved / name).read_bytes()
        flip_a_bit(saved / name)
        assert [(fault.file, fault.kind) for fault in faults(saved)] == [(name, "checksum")]
        (saved / name).write_bytes(whole)
    assert faults(saved) == []


def test_truncated_missing_and_extra_files_are_named(saved: Path) -> None:
    weights = saved / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    (saved / "tokenizer.json").unlink()
    (saved / "extra.safetensors").write_bytes(b"")
    assert [(fault.file, fault.kind) for fault in faults(saved)] == [
        ("model.safetensors", "size"),
        ("tokenizer.json", "missing"),
        ("extra.safetensors", "extra"),
    ]
    result = invoke("verify", saved)
    assert result.exit_code == 1
    assert f"model.safetensors has {size - 1:,} bytes and was saved with {size:,}" in result.stdout
    assert "  tokenizer.json is missing\n" in result.stdout
    assert "  extra.safetensors is not a file of the checkpoint\n" in result.stdout
    assert result.stderr.startswith(f"Error: {str(saved)!r} is not what was saved: model.safe")
    assert result.stderr.count("\n") == 1


def _with_new_checksums(saved: Path) -> None:
    record = read_record(saved) or {}
    write_record(saved, record | {"files": checksums(saved)})


def test_tensors_have_to_fit_the_config(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    name, layer = next(iter(config["quantization_config"]["modules"].items()))
    layer["rank" if "rank" in layer else "shape"] = 3
    (saved / "config.json").write_text(json.dumps(config))
    _with_new_checksums(saved)
    (fault,) = faults(saved)
    assert fault.kind == "model"
    assert name in fault.message


def test_types_have_to_fit_the_config(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    _with_new_checksums(saved)
    (fault,) = faults(saved)
    assert fault.message == "model.norm.weight is stored as F16 and config.json says float32"


def test_exports_and_runs_are_covered(factorized: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("dense", "standalone"):
        assert invoke("export", factorized, "--out", run / name, "--to", name).exit_code == 0
    assert [(Path(result.folder).name, result.faults) for result in verify(run)] == [
        ("dense", ()),
        ("standalone", ()),
    ]
    (run / "standalone" / "modeling_lowrank.py").write_text("print('anything')")
    result = invoke("verify", run)
    assert result.exit_code == 1
    assert "modeling_lowrank.py has" in result.stderr


def test_what_holds_no_checksums_is_refused(saved: Path, dense: Path) -> None:
    record = json.loads((saved / "lrcompress.json").read_text())
    for files, words in ((None, "holds no checksums"), ({"config.json": 1}, "are damaged")):
        changed = {key: value for key, value in record.items() if key != "files"}
        changed |= {} if files is None else {"files": files}
        (saved / "lrcompress.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            verify(saved)
    result = invoke("verify", dense)
    assert result.exit_code == 2
    assert "is no checkpoint of lrcompress" in result.stderr
