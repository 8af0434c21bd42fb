"""What a user can set, section by section: types, ranges, defaults and help in one place.

The command line makes its flags of these fields, recipe files their keys, and the Python functions
their keyword arguments.
"""

from lrcompress.config.base import Section
from lrcompress.config.benchmark import FFNBenchSettings, ModelBenchSettings
from lrcompress.config.evaluate import EvaluateSettings
from lrcompress.config.factorize import BUDGETS, FactorizeSettings, RefineSettings
from lrcompress.config.model import CalibrationSettings, ModelSettings
from lrcompress.config.quantize import QuantizeSettings
from lrcompress.config.scaling import ScalingSettings, SizeSettings
from lrcompress.config.sweep import SweepSettings
from lrcompress.config.training import FinetuneSettings, PretrainSettings, TrainingSettings

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
