"""What lm-eval tells while it runs a task: its bootstraps as progress, its warnings once."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lrcompress.runtime.progress import Progress

# lm-eval draws so many resamples of a bootstrap with one seed
RESAMPLES_PER_SEED = 1000
# metrics that scikit-learn computes, with milliseconds for each resample
SLOW_METRICS = {"f1_score", "matthews_corrcoef"}
# resamples of slow metrics: the standard error is known to 1 / sqrt(2 * 10,000) = 0.7 % of itself
SLOW_RESAMPLES = 10_000
# items that a bootstrap draws, of slow metrics and of others: about a minute, and a few
MAX_DRAWN_SLOW, MAX_DRAWN = 10**8, 10**9

logger = logging.getLogger(__name__)


@contextmanager
def shown_bootstraps(progress: Progress) -> Iterator[dict[str, int]]:
    """Inside, the bootstraps of lm-eval run in this process, and `progress` shows them.

    Their random numbers are those of lm-eval, so the results are equal, but slow metrics and many
    items get fewer resamples. Yields the name of the function of each such metric and the number of
    its resamples. lm-eval would print to stdout, and copy this process, with its model, for every
    core.
    """
    from lm_eval.api import metrics

    reduced: dict[str, int] = {}

    def standard_error(
        metric: Callable[[Sequence[Any]], float], items: Sequence[Any], iters: int
    ) -> float:
        used = resamples(metric.__name__, len(items), iters)
        if used < iters:
            reduced[metric.__name__] = used
        size = min(RESAMPLES_PER_SEED, used)
        values: list[float] = []
        seeds = used // size
        for seed in progress(range(seeds), f"Bootstrapping {metric.__name__}", seeds):
            generator = random.Random(seed)
            values += [metric(generator.choices(items, k=len(items))) for _ in range(size)]
        return float(metrics.sample_stddev(values))

    original = metrics.bootstrap_stderr
    metrics.bootstrap_stderr = standard_error
    try:
        yield reduced
    finally:
        metrics.bootstrap_stderr = original


def resamples(metric: str, items: int, iters: int) -> int:
    """How many resamples of so many `items` are drawn where lm-eval draws `iters`.

    At least those of one seed, and whole seeds.
    """
    is_slow = metric in SLOW_METRICS
    most = min(SLOW_RESAMPLES, iters) if is_slow else iters
    affordable = (MAX_DRAWN_SLOW if is_slow else MAX_DRAWN) // max(items, 1)
    if affordable >= most:
        return most
    seeds = max(affordable // RESAMPLES_PER_SEED, 1)
    return min(most, seeds * RESAMPLES_PER_SEED)


@contextmanager
def warnings_once() -> Iterator[None]:
    """Inside, each warning of lm-eval is logged as one of lrcompress, once.

    Warnings of cut prompts are left out: `cut_prompts` counts them.
    """
    source = logging.getLogger("lm_eval")
    collector, state = _Collector(), (source.level, source.propagate)
    source.addHandler(collector)
    source.setLevel(logging.WARNING)
    source.propagate = False
    try:
        yield
    finally:
        source.removeHandler(collector)
        source.propagate = state[1]
        source.setLevel(state[0])
        for message in collector.messages:
            logger.warning("lm-eval: %s", message)


class _Collector(logging.Handler):
    """Keeps every different message, in order."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if "truncat" not in message.lower():
            self.messages[message] = None
