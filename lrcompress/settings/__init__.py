"""What a user can set, section by section: types, ranges, defaults and help in one place.

The command line makes its flags of these fields, recipe files their keys, and the Python functions
their keyword arguments.
"""

from lrcompress.settings.measuring import EvaluateSettings, SweepSettings
from lrcompress.settings.quantizing import QuantizeSettings
from lrcompress.settings.scaling import ScalingSettings, SizeSettings
from lrcompress.settings.section import Section
from lrcompress.settings.shrinking import BUDGETS, FactorizeSettings, RefineSettings
from lrcompress.settings.sources import CalibrationSettings, ModelSettings
from lrcompress.settings.timing import FFNBenchSettings, ModelBenchSettings
from lrcompress.settings.training import FinetuneSettings, PretrainSettings, TrainingSettings

__all__ = [
    "BUDGETS",
    "CalibrationSettings",
    "EvaluateSettings",
    "FFNBenchSettings",
    "FactorizeSettings",
    "FinetuneSettings",
    "ModelBenchSettings",
    "ModelSettings",
    "PretrainSettings",
    "QuantizeSettings",
    "RefineSettings",
    "ScalingSettings",
    "Section",
    "SizeSettings",
    "SweepSettings",
    "TrainingSettings",
]
