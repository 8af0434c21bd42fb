"""New models: their config, a preset or the user's, their tokenizer, and their random weights."""

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
from lrcompress.data.conversations import ChatFormat
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
from lrcompress.training.self_guided import GuidePairs, guide_pairs

# preset -> width, intermediate width, blocks, heads. Non-embedding parameters are about 12 width²
# a block. The last four are near the sizes of Wei et al. 2024 (110M to 1.3B with embeddings).
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
MAX_POSITIONS = 2048  # of a preset

# keys of a config that describe existing weights
KEYS_OF_WEIGHTS = ("quantization_config", "auto_map", "dtype", "torch_dtype", "architectures")


@dataclass
class NewModel:
    """A model that is trained from scratch.

    Once it is factorized, `record` is the factorization's part of lrcompress.json. In self-guided
    training `guide_pairs` are its low-rank layers with the dense layers that they were made from.
    """

    model: Any
    guide_pairs: GuidePairs = ()
    record: dict[str, Any] = field(default_factory=dict)

    def factorize(self, settings: PretrainSettings, progress: Progress = silent) -> None:
        """Truncates the SVD of the FFN weights in place (spectral initialization).

        Each of the two factors takes the square root of the singular values.
        """
        with unpacked(self.model):
            linears = select(self.model, dense_first=settings.dense_first)
            dense_modules = {spec.name: self.model.get_submodule(spec.name) for spec in linears}
            factorization = factorize_model(
                self.model,
                tokenizer=None,
                calibration=CalibrationSettings(),
                factorize=_svd_settings(settings),
                refine=RefineSettings(),
                progress=progress,
            )
            self.record = factorization.to_dict()
        if settings.self_guided != "off":
            self.guide_pairs = guide_pairs(self.model, dense_modules)


def read_config(source: str) -> Any:
    """The transformers config of `source`: a preset, a config.json, or a folder with one.

    Raises InputError where `source` is none of these, or transformers refuses the config.
    """
    if source in LLAMAS:
        return _build_config(_preset(source), source)
    path = user_path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        presets = allowed_words(source, LLAMAS)
        raise InputError(f"config {source!r} is no file, folder or preset{presets}")
    try:
        values = read_object(file)
    except ValueError as error:
        raise InputError(f"config {str(file)!r} is not JSON ({error}): restore it") from None
    if not isinstance(values.get("model_type"), str):
        raise InputError(f"config {str(file)!r} names no model_type: give a transformers config")
    return _build_config(values, source)


def _preset(name: str) -> dict[str, Any]:
    """The keys of a transformers llama config, without the size of the vocabulary."""
    width, intermediate, blocks, heads = LLAMAS[name]
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
    }


def _build_config(values: dict[str, Any], source: str) -> PreTrainedConfig:
    keys = {key: value for key, value in values.items() if key not in KEYS_OF_WEIGHTS}
    try:
        return AutoConfig.for_model(keys.pop("model_type"), **keys)
    except Exception as error:  # each model family raises errors of its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"config {source!r} cannot be used: {reason}") from None


def make_tokenizer(settings: PretrainSettings) -> Any:
    """The tokenizer that the settings name; without one, a tokenizer trained on the data."""
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer, gguf_file=None, trust_remote_code=False)
        if tokenizer is None:
            raise InputError(f"{settings.tokenizer!r} holds no tokenizer: add tokenizer.json")
        return tokenizer
    plain = ChatFormat(None, is_plain=True)  # a template needs a tokenizer, which is made here
    corpora = [read_corpus(spec, "calibration", plain) for spec in settings.data]
    return train_tokenizer(corpora, settings.vocab_size)


def fit_config(config: Any, tokenizer: Any, settings: PretrainSettings) -> None:
    """Sets the special tokens of `config`, and its vocab_size unless the user gave both.

    Raises InputError where the user's tokenizer has more tokens than the user's config.
    """
    keeps_vocab_size = settings.source not in LLAMAS and settings.tokenizer is not None
    if keeps_vocab_size and config.vocab_size < len(tokenizer):
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the config a vocab_size of "
            f"{config.vocab_size}: set it to {len(tokenizer)}"
        )
    if not keeps_vocab_size:
        config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def new_model(config: Any, settings: PretrainSettings, progress: Progress = silent) -> NewModel:
    """A model with random weights, equal for equal seeds.

    It is factorized if the settings have a `keep_ratio`, unless it starts dense (`dense_share`).
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
    """`new_model` on the meta device: shapes and ranks without weights, always factorized."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if settings.keep_ratio is not None:
        with unpacked(model):
            layout = _layout(model, settings)
        rebuild(model, layout)
    return model


def _layout(model: Any, settings: PretrainSettings) -> dict[str, dict[str, Any]]:
    """Form, rank and shape of each linear that gets a rank, as `rebuild` reads them."""
    linears, truncation = select(model, dense_first=settings.dense_first), _svd_settings(settings)
    prepared = prepare(model, linears, truncation, settings.keep_ratio, None, silent)
    assert prepared.plan is not None
    shapes = {spec.name: [spec.out_features, spec.in_features] for spec in linears}
    return {
        name: {"form": truncation.form, "rank": rank, "shape": shapes[name]}
        for name, rank in prepared.plan.ranks.items()
    }


def _svd_settings(settings: PretrainSettings) -> FactorizeSettings:
    return FactorizeSettings(
        method="svd",
        keep_ratio=settings.keep_ratio,
        dense_first=settings.dense_first,
        rank_multiple=settings.rank_multiple,
    )


def _device(name: str) -> str:
    """The device of this process."""
    device = distributed.local_device(name)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(device)
