"""New models: a config and a tokenizer by name, and random weights, dense or low-rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lrcompress.compression.factorize import factorize_model
from lrcompress.compression.planning import prepare
from lrcompress.config import (
    CalibrationSettings,
    FactorizeSettings,
    PretrainSettings,
    RefineSettings,
)
from lrcompress.config.field_types import allowed_words
from lrcompress.data.corpora import read_corpus
from lrcompress.data.train_tokenizer import train_tokenizer
from lrcompress.layers.ffn_layouts import select
from lrcompress.layers.lowrank import rebuild
from lrcompress.layers.moe import unpacked
from lrcompress.models.loading import checked_device, load_tokenizer
from lrcompress.runtime import distributed
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path
from lrcompress.runtime.progress import Progress, silent
from lrcompress.runtime.safe_parsing import read_object
from lrcompress.training.self_guided import Pairs, guides


@dataclass
class NewModel:
    """A model that is trained from scratch. `pairs` are its low-rank layers with the dense ones
    that they were made of; `described` is what its record says of them."""

    model: Any
    pairs: Pairs = ()
    described: dict[str, Any] = field(default_factory=dict)

    def factorize(self, settings: PretrainSettings, progress: Progress = silent) -> None:
        """Truncates its FFN linears by the SVD of their weights, in place; both factors share the
        singular values (spectral initialization)."""
        parts = (CalibrationSettings(), _truncation(settings), RefineSettings(), progress)
        with unpacked(self.model):
            linears = select(self.model, dense_first=settings.dense_first)
            dense = {spec.name: self.model.get_submodule(spec.name) for spec in linears}
            self.described = factorize_model(self.model, None, *parts).to_dict()
        if settings.self_guided != "off":
            self.pairs = guides(self.model, dense)


def read_config(source: str) -> Any:
    """The transformers config that SOURCE names: a preset, a config.json, or a folder with one.

    Raises InputError where it names none.
    """
    if source in LLAMAS:
        return _config(preset(source), source)
    path = user_path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"config {source!r} is no file, folder or preset{_presets(source)}")
    try:
        values = read_object(file)
    except ValueError as error:
        raise InputError(f"config {str(file)!r} is not JSON ({error}): restore it") from None
    if not isinstance(values.get("model_type"), str):
        raise InputError(f"config {str(file)!r} names no model_type: give a transformers config")
    return _config(values, source)


def _presets(source: str) -> str:
    return allowed_words(source, LLAMAS)


def _config(values: dict[str, Any], source: str) -> PreTrainedConfig:
    left = {key: value for key, value in values.items() if key not in NOT_OF_A_NEW_MODEL}
    try:
        return AutoConfig.for_model(left.pop("model_type"), **left)
    except Exception as error:  # each family has its own checks
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"config {source!r} cannot be used: {reason}") from None


# keys of a config that speak of weights that exist already
NOT_OF_A_NEW_MODEL = ("quantization_config", "auto_map", "dtype", "torch_dtype", "architectures")


def make_tokenizer(settings: PretrainSettings) -> Any:
    """The one that is given, or one trained on the data."""
    if settings.tokenizer is not None:
        found = load_tokenizer(settings.tokenizer, None, False)
        if found is None:
            raise InputError(f"{settings.tokenizer!r} holds no tokenizer: add tokenizer.json")
        return found
    corpora = [read_corpus(spec, "calibration") for spec in settings.data]
    return train_tokenizer(corpora, settings.vocab_size)


def fit_config(config: Any, tokenizer: Any, settings: PretrainSettings) -> None:
    """Gives `config` the special tokens, and the number of tokens where that is not its own.

    Raises InputError where a given tokenizer has more tokens than a given config.
    """
    own = settings.source not in LLAMAS and settings.tokenizer is not None
    if own and config.vocab_size < len(tokenizer):
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the config a vocab_size of "
            f"{config.vocab_size}: set it to {len(tokenizer)}"
        )
    if not own:
        config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def new_model(config: Any, settings: PretrainSettings, progress: Progress = silent) -> NewModel:
    """A random model by `config`, the same for equal seeds.

    It is factorized where `keep_ratio` says so, unless it is to be dense for its first steps.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(_device(settings.device))
    new = NewModel(model)
    if settings.keep_ratio is not None and not settings.dense_share:
        new.factorize(settings, progress)
    return new


def bare_model(config: Any, settings: PretrainSettings) -> Any:
    """The same model on the meta device: its shapes and ranks, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if settings.keep_ratio is not None:
        with unpacked(model):
            records = _records(model, settings)
        rebuild(model, records)
    return model


def _records(model: Any, settings: PretrainSettings) -> dict[str, dict[str, Any]]:
    """What `rebuild` is told of each linear that gets a rank."""
    linears, truncation = select(model, dense_first=settings.dense_first), _truncation(settings)
    prepared = prepare(model, linears, truncation, settings.keep_ratio, None, silent)
    assert prepared.plan is not None
    shapes = {spec.name: [spec.out_features, spec.in_features] for spec in linears}
    return {
        name: {"form": truncation.form, "rank": rank, "shape": shapes[name]}
        for name, rank in prepared.plan.ranks.items()
    }


def _truncation(settings: PretrainSettings) -> FactorizeSettings:
    return FactorizeSettings(
        method="svd",
        keep_ratio=settings.keep_ratio,
        dense_first=settings.dense_first,
        rank_multiple=settings.rank_multiple,
    )


def _device(asked: str) -> str:
    own = distributed.local_device(asked)
    if own == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(own)


# width, intermediate width, blocks, heads. Non-embedding parameters are about 12 width² a block.
# The last four are near the sizes of Wei et al. 2024 (110M to 1.3B with embeddings).
LLAMAS: dict[str, tuple[int, int, int, int]] = {
    "llama-0.3m": (64, 176, 6, 2),
    "llama-0.9m": (96, 256, 8, 3),
    "llama-2.5m": (160, 432, 8, 5),
    "llama-8m": (256, 688, 10, 8),
    "llama-25m": (384, 1024, 14, 6),
    "llama-85m": (768, 2048, 12, 12),
    "llama-300m": (1024, 2736, 24, 16),
    "llama-700m": (1536, 4096, 24, 16),
    "llama-1.2b": (2048, 5464, 24, 32),
}


POSITIONS = 2048


def preset(name: str) -> dict[str, Any]:
    """Keys of a transformers llama config, but the vocabulary."""
    width, intermediate, blocks, heads = LLAMAS[name]
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
    }
