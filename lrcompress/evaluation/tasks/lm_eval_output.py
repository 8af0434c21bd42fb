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

logger = logging.getLogger(__name__)


@contextmanager
def shown_bootstraps(progress: Progress) -> Iterator[None]:
    """Inside, the bootstraps of lm-eval run in this process, and `progress` shows them.

    Their random numbers are those of lm-eval, so the results are equal. lm-eval would print to
    stdout, and copy this process, with its model, for every core.
    """
    from lm_eval.api import metrics

    def standard_error(
        metric: Callable[[Sequence[Any]], float], items: Sequence[Any], iters: int
    ) -> float:
        size = min(RESAMPLES_PER_SEED, iters)
        values: list[float] = []
        seeds = iters // size
        for seed in progress(range(seeds), f"Bootstrapping {metric.__name__}", seeds):
            generator = random.Random(seed)
            values += [metric(generator.choices(items, k=len(items))) for _ in range(size)]
        return float(metrics.sample_stddev(values))

    original = metrics.bootstrap_stderr
    metrics.bootstrap_stderr = standard_error
    try:
        yield
    finally:
        metrics.bootstrap_stderr = original


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
