"""Standalone exports of every family give the logits of the model where lrcompress is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrcompress
from lrcompress.checkpoint.export import standalone
from lrcompress.checkpoint.export.load_check import check_loads_alone
from lrcompress.checkpoint.export.standalone import export_standalone
from lrcompress.checkpoint.verify import CODE_NOT_RUN, verify
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke
from tests.tiny import (
    ALL_FAMILIES,
    copied_model,
    flip_a_bit,
    logits,
    saved_weights,
    tiny_model,
)

SCRIPT = """
import sys
sys.modules["lrcompress"] = None
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
tokens = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(1))
for expected in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    model, report = AutoModelForCausalLM.from_pretrained(
        expected.with_suffix(""), trust_remote_code=True, output_loading_info=True
    )
    with torch.no_grad():
        equal = torch.equal(model.eval()(input_ids=tokens).logits, load_file(expected)["logits"])
    print(expected.stem, equal and not any(report.values()))
"""


def test_every_family_loads_to_equal_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one process loads all exports, where the export itself starts one for each
    monkeypatch.setattr(standalone, "check_loads_alone", lambda *_: None)
    for family in ALL_FAMILIES:
        model = tiny_model(family)
        lrcompress.factorize(model, None, keep_ratio=0.7, method="svd")
        expected = {"logits": logits(model).contiguous()}
        export_standalone(model, None, tmp_path / family, {})
        save_file(expected, tmp_path / f"{family}.safetensors")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [f"{family} True" for family in sorted(ALL_FAMILIES)]
    for family in ALL_FAMILIES:
        (verification,) = verify(tmp_path / family)
        assert (verification.faults, verification.unchecked) == ((), CODE_NOT_RUN)
        flip_a_bit(tmp_path / family / "model.safetensors")
        (verification,) = verify(tmp_path / family)
        assert [fault.kind for fault in verification.faults] == ["checksum"]


@pytest.fixture
def alone(factorized: Path, tmp_path: Path) -> Path:
    out = tmp_path / "alone"
    result = invoke("export", factorized, "--to", "standalone", "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_an_export_with_other_weights_is_refused(alone: Path, factorized: Path) -> None:
    model, _ = lrcompress.load(factorized)
    file = alone / "model.safetensors"
    tensors = load_file(file)
    check_loads_alone(model, alone)
    head = tensors["lm_head.weight"]
    save_file(tensors | {"lm_head.weight": torch.randn_like(head)}, file, {"format": "pt"})
    with pytest.raises(InputError, match="does not give the outputs of the model"):
        check_loads_alone(model, alone)
    renamed = {name.replace("lm_head", "head"): tensor for name, tensor in tensors.items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"does not load without lrcompress .*lm_head.weight"):
        check_loads_alone(model, alone)


def test_verify_says_what_it_did_not_load(alone: Path) -> None:
    result = invoke("verify", alone)
    assert result.exit_code == 0
    assert "the model was not loaded" in result.stdout
    assert "as they were saved" not in result.stdout
    result = invoke("verify", alone, "--trust-remote-code")
    assert result.stdout.endswith("as they were saved.\n")
    for name in ("model.safetensors", "modeling_lowrank.py", "config.json"):
        content = (alone / name).read_bytes()
        flip_a_bit(alone / name)
        result = invoke("verify", alone, "--trust-remote-code")
        assert result.exit_code == 1
        assert f"{name} has changed" in result.stdout
        (alone / name).write_bytes(content)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .helper_own import SCALE

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        output.logits = output.logits * SCALE
        return output
"""


def test_a_model_with_code_of_its_own(dense: Path, tmp_path: Path) -> None:
    classes = {"AutoConfig": "modeling_own.OwnConfig"}
    classes["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    keys: dict[str, Any] = {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    source = copied_model(dense, tmp_path / "source", auto_map=classes, **keys)
    (source / "modeling_own.py").write_text(CODE)
    (source / "helper_own.py").write_text("SCALE = 2.0\n")
    small, alone = tmp_path / "small", tmp_path / "alone"
    options = ("--keep-ratio", "0.7", "--method", "svd", "--trust-remote-code")
    result = invoke("factorize", source, "--out", small, *options)
    assert result.exit_code == 0, result.output
    assert saved_weights(small).keys() >= saved_weights(source).keys()
    result = invoke("export", small, "--to", "standalone", "--out", alone, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    for folder in (small, alone):
        assert (folder / "helper_own.py").is_file()
        assert "the model was not loaded" in invoke("verify", folder).stdout
        (verification,) = verify(folder, trust_remote_code=True)
        assert (verification.faults, verification.unchecked) == ((), None)
