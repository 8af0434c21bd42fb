"""Post-hoc low-rank compression of the feed-forward layers of causal language models.

`import lrcompress` is all that `AutoModelForCausalLM.from_pretrained` needs to load a low-rank
checkpoint. It costs no torch import: the loader is registered when transformers' own
registry of quantizers is imported, or at once where it has been.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from lrcompress.protocols import InputError, MachineError

if TYPE_CHECKING:
    from lrcompress.compare import evaluate
    from lrcompress.compress import factorize, save
    from lrcompress.fusing import optimize
    from lrcompress.models import load
    from lrcompress.pipeline import run

__version__ = "0.1.0"
__all__ = ["InputError", "MachineError", "evaluate", "factorize", "load", "optimize", "run", "save"]

_HOMES = {
    "evaluate": "compare",
    "factorize": "compress",
    "load": "models",
    "optimize": "fusing",
    "run": "pipeline",
    "save": "compress",
}


@when_imported("transformers.quantizers.auto")
def _register(_: object) -> None:
    import lrcompress.quantizer  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lrcompress' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lrcompress.{_HOMES[name]}"), name)
