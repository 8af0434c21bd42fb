"""Searches for the smallest model whose perplexity on a validation text stays within a limit."""

from __future__ import annotations

import copy
from typing import Any

from lrcompress.compression.planning import PreparedModel
from lrcompress.compression.replace_layers import apply_plan
from lrcompress.config import FactorizeSettings
from lrcompress.data.conversations import ChatFormat
from lrcompress.data.corpora import read_corpus
from lrcompress.data.windows import Windowing
from lrcompress.evaluation.perplexity import perplexity
from lrcompress.layers.model_info import sequence_length
from lrcompress.layers.model_state import evaluation_mode
from lrcompress.methods.plan import Budget, Plan
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent

TRIALS = 6
MIN_KEEP_RATIO = 0.1
# windows of validation text on which each trial is measured
TRIAL_WINDOWS = 12


def smallest_within(
    model: Any,
    tokenizer: Any,
    prepared: PreparedModel,
    settings: FactorizeSettings,
    progress: Progress,
) -> tuple[Plan, tuple[dict[str, float], ...]]:
    """Bisects keep_ratio for a perplexity of at most (1 + max_perplexity_increase) x dense.

    Returns the plan of the smallest keep_ratio within the limit, and every trial as {keep_ratio,
    perplexity, limit}. Apart from noise, perplexity falls as keep_ratio rises, so the result is
    exact to the last halving of the range. Raises InputError where no trial is within the limit.
    """
    assert settings.max_perplexity_increase is not None
    if tokenizer is None:
        raise InputError(
            "max_perplexity_increase measures perplexity, which needs a tokenizer: pass one"
        )
    limit = _measure_perplexity(model, tokenizer, settings)
    limit *= 1 + settings.max_perplexity_increase
    low, high, prepared = MIN_KEEP_RATIO, 1.0, prepared.for_many_plans()
    best: Plan | None = None
    trials = []
    for _ in progress(range(TRIALS), "Searching", TRIALS):
        ratio = (low + high) / 2
        plan = prepared.allocator.allocate(prepared.candidates, Budget(keep_ratio=ratio))
        trial = copy.deepcopy(model)
        apply_plan(trial, prepared, plan, silent)
        measured = _measure_perplexity(trial, tokenizer, settings)
        trials.append({"keep_ratio": ratio, "perplexity": measured, "limit": limit})
        if measured <= limit:
            best, high = plan, ratio
        else:
            low = ratio
    if best is None:
        raise InputError(
            f"no keep_ratio up to {low:.3f} holds the perplexity on {settings.validation!r} "
            f"within {limit:.4g}: allow a larger --max-perplexity-increase"
        )
    return best, tuple(trials)


def _measure_perplexity(model: Any, tokenizer: Any, settings: FactorizeSettings) -> float:
    corpus = read_corpus(settings.validation, "test", ChatFormat(tokenizer))
    windowing = Windowing(sequence_length(model, None), limit=TRIAL_WINDOWS)
    with evaluation_mode(model):
        return run_on_main(lambda: perplexity("trial", (model, tokenizer), corpus, windowing).value)
