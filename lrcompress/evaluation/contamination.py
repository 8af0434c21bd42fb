"""No model is measured on text that it was made from: whoever tries is told so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lrcompress.config import EvaluateSettings
from lrcompress.config.recipe import Recipe
from lrcompress.data.calibration_text import read_blocks
from lrcompress.data.corpora import SELF, read_corpus
from lrcompress.data.ngram_overlap import TOLERATED_OVERLAP, Sketch, ngram_hashes, overlap_share
from lrcompress.data.training_text import training_text
from lrcompress.data.windows import corpus_windows
from lrcompress.layers.model_info import sequence_length
from lrcompress.models.loading import load_tokenizer, skeleton
from lrcompress.reporting.provenance import history
from lrcompress.runtime.errors import InputError

# part of a record (lrcompress.json) -> what a model was with the text that it names
USES = {"calibration": "calibrated on", "pretrained": "trained on", "finetuned": "trained on"}


def check_checkpoint(
    label: str, tokenizer: Any, settings: EvaluateSettings, length: int, record: Mapping[str, Any]
) -> None:
    """Raises InputError if the model of `record` was made from a text of `settings.perplexity`.

    `length` is that of the evaluation's windows. The text of lm-eval tasks is not looked into.
    """
    known = list(_recorded(record))
    if known and tokenizer is not None:
        for spec, hashes in _evaluated(tokenizer, settings, length):
            for use, sample in known:
                _refuse(spec, overlap_share(hashes, sample), f"the {label} model was {use}")


def _recorded(record: Mapping[str, Any]) -> Iterator[tuple[str, Sketch]]:
    for part in history(record):
        for key, use in USES.items():
            if known := (part.get(key) or {}).get("sketch"):
                yield use, Sketch.from_dict(known)


def _evaluated(
    tokenizer: Any, settings: EvaluateSettings, length: int
) -> Iterator[tuple[str, np.ndarray]]:
    """SPEC and shingles of each text, of exactly the windows on which perplexity is measured."""
    for spec in settings.perplexity:
        corpus = read_corpus(spec, "test")
        windows = corpus_windows(corpus, tokenizer, length, settings.stride, settings.limit)
        yield spec, ngram_hashes(window.tokens for window in windows)


def check_recipe(recipe: Recipe) -> None:
    """Raises InputError if a run of `recipe` would make a model from a text that it evaluates.

    Only tokenizer and config are loaded, so that it is said before the hours that a run may take.
    What the model would write itself is not known yet.
    """
    source = recipe.model
    where = (source.source, source.gguf_file, source.trust_remote_code)
    tokenizer = load_tokenizer(*where) if recipe.evaluate.perplexity else None
    if tokenizer is None:
        return  # nothing is compared; whatever needs a tokenizer says so
    bare, settings = skeleton(*where), recipe.evaluate
    length = sequence_length(bare, settings.context_length)
    known = list(_planned(recipe, bare, tokenizer))
    for spec, hashes in _evaluated(tokenizer, settings, length) if known else ():
        for use, read in known:
            share = np.isin(hashes, read, assume_unique=True).mean() if len(hashes) else 0.0
            _refuse(spec, float(share), f"the model is to be {use}")


def _planned(recipe: Recipe, bare: Any, tokenizer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Use and shingles of the texts from which `recipe` makes its models."""
    if reads_text(recipe) and set(recipe.calibration.data) != {SELF}:
        yield USES["calibration"], ngram_hashes(read_blocks(bare, tokenizer, recipe.calibration))
    if recipe.finetune.data:
        text = training_text(bare, tokenizer, recipe.finetune, "finetune")
        yield USES["finetuned"], ngram_hashes([text.tokens])


def reads_text(recipe: Recipe) -> bool:
    """Whether factorizing may read the text of the calibration section."""
    settings, anchored = recipe.factorize, recipe.factorize.sequential == "anchored"
    return bool(settings.compressor().requires) or recipe.refine.enabled or anchored


def _refuse(spec: str, share: float, what: str) -> None:
    if share > TOLERATED_OVERLAP:
        raise InputError(
            f"{share:.1%} of the evaluated text {spec!r} is in the text that {what}: evaluate "
            "another text, or make the model from another"
        )
