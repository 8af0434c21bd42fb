"""What a linear costs in each of its forms where the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lrcompress.methods.types import LayerForm


@dataclass(frozen=True)
class LineCost:
    """fixed + per_parameter · p for a linear of p parameters.

    The unit is a parameter of the dense linear: dense, it costs its number of parameters.
    """

    fixed: float = 0.0
    per_parameter: float = 1.0

    def of(self, parameters: int) -> float:
        return self.fixed + self.per_parameter * parameters


@dataclass(frozen=True)
class FormCosts:
    """Linear name -> form -> its cost; what is absent costs its number of parameters."""

    lines: Mapping[str, Mapping[LayerForm, LineCost]] = field(default_factory=dict)

    def of(self, linear: str, form: LayerForm, parameters: int) -> float:
        """The cost of `linear` with `parameters` in `form`."""
        line = self.lines.get(linear, {}).get(form)
        return parameters if line is None else line.of(parameters)
