"""The cost of a point of a sweep, counted as if the point had been made alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lrcompress.compression.calibration.session import CalibrationSession
from lrcompress.compression.planning import PreparedModel
from lrcompress.methods.decomposition_cache import DecompositionCache


@dataclass
class CostLedger:
    """Seconds, and the peak memory of the process in bytes, that are charged to one point.

    The points of a sweep share the calibration, and those of a variant its candidates and
    decompositions. Each is made once, and charged to every point that uses it.
    """

    session: CalibrationSession
    seconds: float = 0.0
    memory: int | None = None
    """None where the system does not report memory."""

    def charge(self, seconds: float, memory: int | None) -> None:
        """Adds seconds of work; `memory` is the peak of the process during that work."""
        self.seconds += seconds
        self.memory = max(self.memory or 0, memory or 0) or None

    @contextmanager
    def timing(self, decompositions: DecompositionCache) -> Iterator[None]:
        """Charges the seconds of the block, and those that kept `decompositions` saved in it.

        Reading the calibration text is left out: `charge_calibration` adds it.
        """
        started = time.perf_counter()
        reading, saved = self.session.text_seconds, decompositions.saved
        yield
        seconds = time.perf_counter() - started - (self.session.text_seconds - reading)
        self.seconds += seconds + decompositions.saved - saved

    def charge_calibration(self, prepared: PreparedModel, memory: int | None) -> None:
        """Charges reading the text, and measuring the moments that `prepared` has, if any.

        `memory` is the peak of the process while the moments of all variants were measured.
        """
        moments = prepared.moments
        if moments is None:
            self.charge(self.session.text_seconds, None)
        else:
            measuring = self.session.moment_seconds[moments.gradient_tokens > 0]
            self.charge(self.session.text_seconds + measuring, memory)
