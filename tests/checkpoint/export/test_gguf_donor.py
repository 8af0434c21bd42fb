"""What a donor gives to an export, and which donors are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lrcompress.checkpoint.export.gguf_donor import find_donor
from lrcompress.checkpoint.export.gguf_file import export_gguf
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke, refusal
from tests.gguf_models import largest_difference, metadata, narrow, write_donor
from tests.tiny import byte_tokenizer, saved_model, tiny_model

CONFIG = tiny_model().config


def export(donor: Path, out: Path, tokenizer: Any = None, **options: str) -> Path:
    model = narrow(tiny_model(), (40, 72))
    export_gguf(model, tokenizer or byte_tokenizer(), out, {}, like=str(donor), **options)
    return out


def test_metadata_and_tokenizer_are_the_donors(tmp_path: Path) -> None:
    donor = write_donor(tmp_path / "donor.gguf", CONFIG, "llama")
    before, after = metadata(donor), metadata(export(donor, tmp_path / "out.gguf", type="q8_0"))
    same = {key: value for key, value in before.items() if key.startswith("tokenizer.")}
    assert same.items() <= after.items()
    assert after["general.name"] == "tiny"
    assert after["deci.context_length"] == before["llama.context_length"]
    assert after["deci.feed_forward_length"] == [64, 96]
    assert not any(key.startswith("llama.") for key in after)
    assert after["general.file_type"] == 7
    assert after["general.quantization_version"] == 2
    assert after["general.size_label"] == "38K"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block_count": 3}, "has 3 blocks, and the model 2"),
        ({"embedding_length": 64}, "has 64 hidden features, and the model 32"),
        ({"attention.head_count": 8}, "has 8 attention heads, and the model 4"),
        ({"attention.head_count_kv": 4}, "has 4 key-value heads, and the model 2"),
        ({"attention.key_length": 16}, "has 16 features in a head, and the model 8"),
        ({"attention.layer_norm_rms_epsilon": 1e-5}, "has 1e-05 as epsilon of the norms"),
        ({"rope.freq_base": 5e5}, "has the rotary base 500000, and the model 10000"),
    ],
)
def test_a_donor_of_another_model_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    donor = write_donor(tmp_path / "donor.gguf", CONFIG, "llama", **changes)
    with pytest.raises(InputError, match=sentence) as error:
        export(donor, tmp_path / "out.gguf")
    assert "give a GGUF file of the same dense model with --like" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"donor.gguf"}


def test_a_donor_of_another_architecture_is_refused(tmp_path: Path) -> None:
    donor = write_donor(tmp_path / "donor.gguf", CONFIG, "qwen3")
    with pytest.raises(InputError, match="describes a 'qwen3', and the model is a 'llama'"):
        export(donor, tmp_path / "out.gguf")


def test_a_donor_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    donor = write_donor(tmp_path / "donor.gguf", CONFIG, "llama")
    with pytest.raises(InputError, match="has 257 tokens, and the model 300"):
        export_gguf(tiny_model(vocab_size=300), None, tmp_path / "out.gguf", {}, like=str(donor))


def test_a_donor_with_another_tokenizer_of_that_size_is_refused(tmp_path: Path) -> None:
    donor, tokenizer = write_donor(tmp_path / "donor.gguf", CONFIG, "llama"), byte_tokenizer()
    shifted = {token: (id + 1) % 257 for token, id in tokenizer.get_vocab().items()}
    tokenizer.get_vocab = lambda: shifted
    with pytest.raises(InputError, match="another tokenizer, and 257 of the model's tokens"):
        export(donor, tmp_path / "out.gguf", tokenizer)


def test_rotary_factors_are_copied(tmp_path: Path) -> None:
    """Llama 3 scales its rotary frequencies; transformers computes the factors from the config."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = narrow(tiny_model(rope_parameters=rope), (40, 72))
    scaled = model.model.rotary_emb.inv_freq
    factors = (1e4 ** (-np.arange(0, 8, 2) / 8) / scaled.numpy()).astype(np.float32)
    assert factors.max() > 2
    donor = _with_tensor(tmp_path / "donor.gguf", model.config, "rope_freqs.weight", factors)
    export_gguf(model, None, tmp_path / "out.gguf", {}, like=str(donor), type="f32")
    (copied,) = (
        t for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == "rope_freqs.weight"
    )
    assert np.array_equal(copied.data, factors)
    assert largest_difference(model, tmp_path / "out.gguf") < 1e-5


def _with_tensor(file: Path, config: Any, name: str, data: np.ndarray[Any, Any]) -> Path:
    """A donor that also holds a tensor."""
    original = GGUFWriter.write_header_to_file

    def add(self: GGUFWriter, *arguments: Any) -> None:
        self.add_tensor(name, data)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", add)
        return write_donor(file, config, "llama")


def test_the_source_of_the_checkpoint_is_the_donor(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    donor = write_donor(folder / "donor.gguf", CONFIG, "llama")
    assert find_donor(None, {"source": str(donor)}) == donor
    recipe = {"model": {"gguf_file": "donor.gguf"}}
    assert find_donor(None, {"source": str(folder), "recipe": recipe}) == donor


def test_sources_that_cannot_be_donors_are_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "dense")
    for source, sentence in (
        (str(folder), "is not a GGUF file: give a GGUF file of the same dense model"),
        (str(tmp_path / "gone.gguf"), "which is not there any more: give a GGUF file"),
        (None, "names no source: give a GGUF file"),
    ):
        with pytest.raises(InputError, match=sentence):
            find_donor(None, {"source": source})
    command = ("export", folder, "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert "is not a GGUF file: give" in refusal(*command)
    assert "'no.gguf' does not exist" in refusal(*command, "--like", "no.gguf")
    assert f"--like {str(folder)!r} is not a GGUF file" in refusal(*command, "--like", folder)
    donor = write_donor(tmp_path / "donor.gguf", CONFIG, "llama")
    assert invoke(*command, "--like", donor).exit_code == 0


def test_a_damaged_donor_is_one_sentence(tmp_path: Path) -> None:
    donor = write_donor(tmp_path / "donor.gguf", CONFIG, "llama")
    whole = donor.read_bytes()
    key = whole.index(b"tokenizer.ggml.tokens")
    unreadable = whole[: key + 40] + b"\xff" * 8 + whole[key + 48 :]
    for content in (whole[:100], b"GGUF" + bytes(60), unreadable):
        donor.write_bytes(content)
        with pytest.raises(InputError, match=r"donor.gguf' .*(cannot be read|has no|holds no)"):
            export(donor, tmp_path / "out.gguf")
