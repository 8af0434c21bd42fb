"""The GGUF file of the dense model, from which an export takes metadata and tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor
from transformers.utils import cached_file

from lrcompress.models.gguf_files import check_gguf
from lrcompress.models.loading import Location, locate
from lrcompress.runtime.errors import InputError

ARCHITECTURE = "general.architecture"
WIDTH = "feed_forward_length"
TOKENS = "tokenizer.ggml.tokens"
# metadata of the donor's own weights or file, which do not describe the export
OWN_KEYS = ("general.file_type", "general.quantization_version", "general.size_label")
OWN_PREFIXES = ("GGUF.", "split.", "quantize.", "lrcompress.")
# tensors that are computed from the config, and not trained
CONSTANT_TENSORS = ("rope_freqs.", "rope_factors_")
# metadata key after the architecture -> config key, and what a message calls it
SIZES = {
    "block_count": ("num_hidden_layers", "blocks"),
    "embedding_length": ("hidden_size", "hidden features"),
    "attention.head_count": ("num_attention_heads", "attention heads"),
    "attention.head_count_kv": ("num_key_value_heads", "key-value heads"),
    "attention.key_length": ("head_dim", "features in a head"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "as epsilon of the norms"),
}
# tokenizers in GGUF may spell a few special tokens in another way
MIN_SHARE_OF_EQUAL_TOKENS = 0.99
REMEDY = "give a GGUF file of the same dense model with --like"


def find_donor(like: str | None, record: Mapping[str, Any]) -> Path:
    """The donor's file: `like`, or else the GGUF file from which the model was compressed.

    Raises InputError where neither is a GGUF file of a model that is here.
    """
    source = like or record.get("source")
    if source is None:
        raise InputError(f"the checkpoint names no source: {REMEDY}")
    location = _locate(source, None if like else _recorded_file(record), like is not None)
    with _read_errors_explained(location.name):
        file = Path(str(cached_file(location.path, str(location.gguf_file))))
        check_gguf(file)
    return file


@contextmanager
def _read_errors_explained(name: str) -> Iterator[None]:
    """Turns errors of reading a damaged GGUF file into one InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the reader trusts lengths and types in the file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"GGUF file {name!r} cannot be read ({reason}): {REMEDY}") from error


def _recorded_file(record: Mapping[str, Any]) -> str | None:
    recipe = record.get("recipe", {})
    return recipe.get("model", {}).get("gguf_file") if isinstance(recipe, Mapping) else None


def _locate(source: str, gguf_file: str | None, named_by_user: bool) -> Location:
    try:
        location = locate(source, gguf_file)
    except InputError as error:
        if named_by_user:
            raise
        raise InputError(f"the checkpoint was made from {source!r}, {_problem(error)}") from None
    if location.gguf_file is None:
        subject = "--like" if named_by_user else "the source of the checkpoint,"
        raise InputError(f"{subject} {source!r} is not a GGUF file: {REMEDY}")
    return location


def _problem(error: InputError) -> str:
    missing = "does not exist" in str(error)
    return f"which {'is not there any more' if missing else 'cannot be read'}: {REMEDY}"


class Donor:
    """A GGUF file of the dense model, opened for its metadata."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with _read_errors_explained(str(file)):
            self.reader = GGUFReader(file)
            self.values = {key: f.contents() for key, f in self.reader.fields.items()}
        self.architecture = str(self.values[ARCHITECTURE])

    def check(self, config: Any, tokenizer: Any, vocabulary: int, architecture: str) -> None:
        """Raises InputError where the file is not of the model that is exported.

        vocabulary: number of rows of the model's embedding.
        """
        if self.architecture != architecture:
            self._refuse(f"describes a {self.architecture!r}", f"the model is a {architecture!r}")
        for key, (name, words) in SIZES.items():
            stated, expected = self.values.get(f"{architecture}.{key}"), getattr(config, name, None)
            if _differ(stated, expected):
                self._refuse(f"has {stated:g} {words}", f"the model {expected:g}")
        self._check_rotary_base(config)
        self._check_tokens(tokenizer, vocabulary)

    def _check_rotary_base(self, config: Any) -> None:
        stated = self.values.get(f"{self.architecture}.rope.freq_base")
        expected = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
        if _differ(stated, expected):
            self._refuse(f"has the rotary base {stated:g}", f"the model {expected:g}")

    def _check_tokens(self, tokenizer: Any, vocabulary: int) -> None:
        tokens = self.values.get(TOKENS, [])
        if len(tokens) != vocabulary:
            self._refuse(f"has {len(tokens)} tokens", f"the model {vocabulary}")
        if tokenizer is None:
            return
        ids = {id: token for token, id in tokenizer.get_vocab().items() if id < vocabulary}
        equal = sum(tokens[id] == token for id, token in ids.items())
        if equal < MIN_SHARE_OF_EQUAL_TOKENS * len(ids):
            self._refuse(
                "has another tokenizer", f"{len(ids) - equal} of the model's tokens are not in it"
            )

    def _refuse(self, donor_has: str, model_has: str) -> None:
        raise InputError(f"GGUF file {str(self.file)!r} {donor_has}, and {model_has}: {REMEDY}")

    def copy_metadata(self, writer: GGUFWriter) -> None:
        """Adds all metadata that describes the model and its tokenizer, except the FFN width."""
        old, new = f"{self.architecture}.", f"{writer.arch}."
        own = (ARCHITECTURE, f"{old}{WIDTH}", *OWN_KEYS)
        for key, field in self.reader.fields.items():
            if key in own or key.startswith(OWN_PREFIXES):
                continue
            kind, value = field.types[0], self.values[key]
            if kind == GGUFValueType.ARRAY and not value:
                continue  # the writer takes no empty array
            name = new + key.removeprefix(old) if key.startswith(old) else key
            items = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, kind, sub_type=items)

    def constant_tensors(self) -> Iterator[ReaderTensor]:
        """The tensors that a model of transformers computes and llama.cpp reads."""
        return (t for t in self.reader.tensors if t.name.startswith(CONSTANT_TENSORS))


def _differ(stated: Any, expected: Any) -> bool:
    """Whether two numbers differ by more than float32 can; False where one is no number."""
    if not (isinstance(stated, int | float) and isinstance(expected, int | float)):
        return False
    return not math.isclose(stated, expected, rel_tol=1e-6)
