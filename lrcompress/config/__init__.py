"""All user settings, by section: type, range, default and help text of each in one place.

The fields are the flags of the command line, the keys of recipe files, and the keyword arguments
of the Python functions.
"""

from lrcompress.config.base import Section
from lrcompress.config.benchmark import FFNBenchSettings, ModelBenchSettings, ServeBenchSettings
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
    "ServeBenchSettings",
    "SizeSettings",
    "SweepSettings",
    "TrainingSettings",
]
