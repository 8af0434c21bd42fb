"""Refuses to evaluate a model on text that it was calibrated or trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lrcompress.config import EvaluateSettings
from lrcompress.config.recipe import Recipe
from lrcompress.data.calibration_text import read_blocks
from lrcompress.data.conversations import ChatFormat
from lrcompress.data.corpora import SELF, read_corpus
from lrcompress.data.ngram_overlap import TOLERATED_OVERLAP, Sketch, ngram_hashes, overlap_share
from lrcompress.data.training_text import training_text
from lrcompress.data.windows import Windowing, corpus_windows
from lrcompress.layers.model_info import sequence_length
from lrcompress.models.loading import load_tokenizer, skeleton
from lrcompress.reporting.provenance import history
from lrcompress.runtime.errors import InputError

# key of a record (lrcompress.json) -> how the text that it names was used
USES = {"calibration": "calibrated on", "pretrained": "trained on", "finetuned": "trained on"}


def check_checkpoint(
    label: str, tokenizer: Any, settings: EvaluateSettings, length: int, record: Mapping[str, Any]
) -> None:
    """Raises InputError if a text of `settings.perplexity` was used to make the model of `record`.

    `length` is the number of tokens in a window of the evaluation. The text of lm-eval tasks is
    not checked.
    """
    sketches = list(_recorded_sketches(record))
    if sketches and tokenizer is not None:
        for spec, hashes in _evaluation_hashes(tokenizer, settings, length):
            for use, sketch in sketches:
                _refuse_overlap(spec, overlap_share(hashes, sketch), f"the {label} model was {use}")


def _recorded_sketches(record: Mapping[str, Any]) -> Iterator[tuple[str, Sketch]]:
    """The use and the sketch of every text in `record` and in those of earlier models."""
    for model_record in history(record):
        for key, use in USES.items():
            if sketch := (model_record.get(key) or {}).get("sketch"):
                yield use, Sketch.from_dict(sketch)


def _evaluation_hashes(
    tokenizer: Any, settings: EvaluateSettings, length: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The SPEC and the n-gram hashes of each text, in the windows used for perplexity."""
    windowing = Windowing(length, settings.stride, settings.limit, settings.loss_on)
    chat = ChatFormat.from_setting(tokenizer, settings.chat_template, settings.loss_on)
    for spec in settings.perplexity:
        corpus = read_corpus(spec, "test", chat)
        windows = corpus_windows(corpus, tokenizer, windowing)
        yield spec, ngram_hashes(window.tokens for window in windows)


def check_recipe(recipe: Recipe) -> None:
    """Raises InputError if `recipe` calibrates or trains on a text that it evaluates.

    Loads only the tokenizer and config, so that the error comes before the hours that a run may
    take. Text that the model generates for its own calibration does not exist yet and is not
    checked.
    """
    source = recipe.model
    location = (source.source, source.gguf_file, source.trust_remote_code)
    tokenizer = load_tokenizer(*location) if recipe.evaluate.perplexity else None
    if tokenizer is None:
        return  # no text is measured; a stage that needs a tokenizer raises its own error
    model, settings = skeleton(*location), recipe.evaluate
    length = sequence_length(model, settings.context_length)
    used_texts = list(_planned_hashes(recipe, model, tokenizer))
    if not used_texts:
        return
    for spec, hashes in _evaluation_hashes(tokenizer, settings, length):
        for use, used_hashes in used_texts:
            is_shared = np.isin(hashes, used_hashes, assume_unique=True)
            share = is_shared.mean() if len(hashes) else 0.0
            _refuse_overlap(spec, float(share), f"the model is to be {use}")


def _planned_hashes(recipe: Recipe, model: Any, tokenizer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The use and the n-gram hashes of the texts that `recipe` makes its models from. `model` may
    be without weights."""
    if reads_text(recipe) and set(recipe.calibration.data) != {SELF}:
        yield USES["calibration"], ngram_hashes(read_blocks(model, tokenizer, recipe.calibration))
    if recipe.finetune.data:
        text = training_text(model, tokenizer, recipe.finetune, "finetune")
        yield USES["finetuned"], ngram_hashes([text.tokens])


def reads_text(recipe: Recipe) -> bool:
    """Whether factorizing reads the text of the calibration section."""
    settings = recipe.factorize
    needs_statistics = bool(settings.build_method().requires)
    return needs_statistics or recipe.refine.enabled or settings.sequential == "anchored"


def _refuse_overlap(spec: str, share: float, use: str) -> None:
    """Raises InputError where `share` of the evaluated text `spec` is too large."""
    if share > TOLERATED_OVERLAP:
        raise InputError(
            f"{share:.1%} of the evaluated text {spec!r} is in the text that {use}: evaluate "
            "another text, or make the model from another"
        )
