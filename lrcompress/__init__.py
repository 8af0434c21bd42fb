"""Post-hoc low-rank compression of the feed-forward layers of causal language models.

After `import lrcompress`, `AutoModelForCausalLM.from_pretrained` loads low-rank checkpoints. The
import does not import torch: the loader is registered when transformers' registry of quantizers is
imported, or at once if it already is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from lrcompress.runtime.errors import InputError, MachineError

if TYPE_CHECKING:
    from lrcompress.compression.factorize import factorize, save
    from lrcompress.evaluation.evaluate import evaluate
    from lrcompress.layers.optimize import optimize
    from lrcompress.models.loading import load
    from lrcompress.workflows.run.pipeline import run

__version__ = "0.1.0"
__all__ = ["InputError", "MachineError", "evaluate", "factorize", "load", "optimize", "run", "save"]

# public function -> the module that defines it, imported when the function is first used
_MODULES = {
    "evaluate": "evaluation.evaluate",
    "factorize": "compression.factorize",
    "load": "models.loading",
    "optimize": "layers.optimize",
    "run": "workflows.run.pipeline",
    "save": "compression.factorize",
}


@when_imported("transformers.quantizers.auto")
def _register_quantizer(_: object) -> None:
    import lrcompress.models.hf_quantizer  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lrcompress' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lrcompress.{_MODULES[name]}"), name)
