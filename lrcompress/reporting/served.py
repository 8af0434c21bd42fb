"""Speeds of a served model, as its record holds them, for reports and model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrcompress.reporting.metric import Summary
from lrcompress.reporting.tables import MetricTable, table


def served_tables(record: Mapping[str, Any]) -> dict[str, MetricTable]:
    """Engine -> its table; `record` is that of a checkpoint (lrcompress.json)."""
    return {
        engine: table([Summary(**metric) for metric in metrics])
        for engine, metrics in record.get("served", {}).items()
    }
