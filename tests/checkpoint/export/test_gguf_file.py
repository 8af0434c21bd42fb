"""Export to GGUF: what is stored, in which type, and which models are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants

import lrcompress
from lrcompress.checkpoint.export.gguf_file import export_gguf
from lrcompress.checkpoint.export.registry import GGUF_TYPES
from lrcompress.runtime.errors import InputError, MachineError
from tests.conftest import invoke, refusal
from tests.gguf_models import LlamaCpp, largest_difference, metadata, narrow, write_donor
from tests.tiny import byte_tokenizer, saved_model, tiny_model, tokens

# the largest relative error of a matrix in each type: rounding, or half a step of the groups
ROUNDING = {"f32": 0.0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 0.01, "q5_1": 0.05, "q4_0": 0.15}


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    (tmp_path / "donor").mkdir()
    return write_donor(tmp_path / "donor" / "dense.gguf", tiny_model().config, "llama")


def tensors(file: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Type and numbers of each tensor."""
    return {
        tensor.name: (tensor.tensor_type.name, quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(file).tensors
    }


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_each_type_loads_and_generates(type: str, donor: Path, tmp_path: Path) -> None:
    model, out = narrow(tiny_model(), (40, 72)), tmp_path / "out.gguf"
    expected = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    export_gguf(model, None, out, {}, like=str(donor), type=type)
    name, stored = tensors(out)["blk.1.ffn_down.weight"]
    assert name.lower() == type
    width = 72 if type in ("f32", "f16", "bf16") else 96
    assert stored.shape == (32, width)
    assert not tensors(out)["blk.1.ffn_up.weight"][1][72:].any()
    error = np.linalg.norm(stored[:, :72] - expected) / np.linalg.norm(expected)
    assert error <= ROUNDING[type]
    text = LlamaCpp(out).text(tokens()[0].tolist(), 12)
    assert len(text) == 12
    assert text.isalpha()


def test_types_of_tensors(donor: Path, tmp_path: Path) -> None:
    """Vectors are float32, and the embedding and output layer at least q8_0."""
    out = tmp_path / "out.gguf"
    export_gguf(narrow(tiny_model(), (40, 72)), None, out, {}, like=str(donor), type="q4_0")
    types = {name: kind for name, (kind, _) in tensors(out).items()}
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert {kind for name, kind in types.items() if "norm" not in name} == {"Q8_0", "Q4_0"}


def test_rows_that_are_no_multiple_of_the_group_are_float16(tmp_path: Path) -> None:
    model, out = tiny_model(hidden_size=48, head_dim=12), tmp_path / "out.gguf"
    donor = write_donor(tmp_path / "donor.gguf", model.config, "llama")
    export_gguf(model, None, out, {}, like=str(donor), type="q8_0")
    types = {name: kind for name, (kind, _) in tensors(out).items()}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert len(LlamaCpp(out).text([5], 2)) == 2


def test_equal_widths_after_padding_keep_the_architecture(donor: Path, tmp_path: Path) -> None:
    model, out = narrow(tiny_model(), (70, 72)), tmp_path / "out.gguf"
    export_gguf(model, None, out, {}, like=str(donor), type="q8_0")
    stated = metadata(out)
    assert (stated["general.architecture"], stated["llama.feed_forward_length"]) == ("llama", 96)


def test_weights_are_the_models(donor: Path, tmp_path: Path) -> None:
    """Embeddings and norms are not the donor's, which a finetuned model would have lost."""
    model, out = narrow(tiny_model(seed=3, tie_word_embeddings=True), (40, 72)), tmp_path / "o.gguf"
    export_gguf(model, None, out, {}, like=str(donor), type="f32")
    stored = {name: numbers for name, (_, numbers) in tensors(out).items()}
    assert np.array_equal(stored["token_embd.weight"], model.model.embed_tokens.weight.detach())
    assert np.array_equal(stored["output_norm.weight"], model.model.norm.weight.detach())
    assert "output.weight" not in stored


def test_a_checkpoint_is_exported_with_its_source_as_donor(tmp_path: Path) -> None:
    """dense GGUF -> factorize -> finetune -> GGUF, without --like."""
    model = tiny_model(num_key_value_heads=4)  # so that transformers reads the file back
    donor = write_donor(tmp_path / "donor.gguf", model.config, "llama")
    dense, small, out = (tmp_path / name for name in ("dense.gguf", "small", "out.gguf"))
    export_gguf(model, None, dense, {}, like=str(donor), type="f32")
    options = (
        "--method",
        "nystrom",
        "--keep-ratio",
        "0.6",
        "--num-samples",
        "4",
        "--seq-len",
        "64",
    )
    result = invoke("factorize", dense, "--out", small, *options)
    assert result.exit_code == 0, result.output
    narrowed = lrcompress.load(small)[0]
    result = invoke("export", small, "--to", "gguf", "--out", out, "--type", "f32")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Wrote {out}.\n"
    assert largest_difference(narrowed, out) < 1e-5
    assert metadata(out)["lrcompress.source"] == str(dense)


def test_bfloat16_models_are_exported(donor: Path, tmp_path: Path) -> None:
    model = narrow(tiny_model(), (40, 72)).to(torch.bfloat16)
    expected = model.model.embed_tokens.weight.detach().float().numpy()
    export_gguf(model, None, tmp_path / "out.gguf", {}, like=str(donor), type="bf16")
    assert np.array_equal(tensors(tmp_path / "out.gguf")["token_embd.weight"][1], expected)


def test_weights_beyond_float16_are_refused(donor: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"blk.1.ffn_up.weight has .* export with --type bf16"):
        export_gguf(model, None, tmp_path / "out.gguf", {}, like=str(donor))
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


def test_low_rank_is_refused_with_the_remedy(dense: Path, tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "out.gguf"
    options = ("--method", "svd", "--rank", "4", "--ranks", "uniform")
    assert invoke("factorize", dense, "--out", small, *options).exit_code == 0
    message = refusal("export", small, "--to", "gguf", "--out", out)
    assert "6 linears are low rank, such as model.layers.0.mlp.gate_proj" in message
    assert "factorize the dense model with --for gguf" in message
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_families_with_one_width_refuse_several(tmp_path: Path) -> None:
    model = narrow(tiny_model("qwen3"), (40, 72))
    donor = write_donor(tmp_path / "donor.gguf", model.config, "qwen3")
    with pytest.raises(InputError, match=r"this 'qwen3' have 2 different widths.*--for gguf"):
        export_gguf(model, None, tmp_path / "out.gguf", {}, like=str(donor))


@pytest.mark.parametrize(
    ("family", "sentence"),
    [("opt", "'opt' is not exported to GGUF, but bloom, "), ("mixtral", "has mixtures of experts")],
)
def test_families_that_cannot_are_refused(family: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        export_gguf(tiny_model(family), None, tmp_path / "out.gguf", {})
    assert not any(tmp_path.iterdir())


def test_an_existing_file_is_left_alone(donor: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists: choose another name"):
        export_gguf(tiny_model(), None, out, {}, like=str(donor))
    assert out.read_text() == "mine"


def test_a_full_disk_leaves_nothing(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", fail)
    with pytest.raises(MachineError, match="the disk is full"):
        export_gguf(tiny_model(), None, tmp_path / "out.gguf", {}, like=str(donor))
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


def test_wrong_options_are_one_sentence(factorized: Path, tmp_path: Path) -> None:
    command = ("export", factorized, "--out", tmp_path / "out")
    assert "name it so that it ends in .gguf" in refusal(*command, "--to", "gguf")
    message = refusal(*command, "--to", "dense", "--type", "f16")
    assert "--type is not an option of --to dense: leave it out" in message
    assert not any(tmp_path.iterdir())


def test_dense_folders_are_exported_too(donor: Path, tmp_path: Path) -> None:
    folder, out = saved_model(tmp_path / "dense"), tmp_path / "out.gguf"
    options = ("--to", "gguf", "--out", out, "--like", donor, "--type", "f32")
    assert invoke("export", folder, *options).exit_code == 0
    assert largest_difference(lrcompress.load(folder)[0], out) < 1e-5
    assert byte_tokenizer().vocab_size == 257
    assert math.isclose(metadata(out)["llama.rope.freq_base"], 1e4)
