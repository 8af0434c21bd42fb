"""Export of the low-rank layers together with the source code that loads them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from lrcompress.checkpoint.export.load_check import check_loads_alone
from lrcompress.checkpoint.folder import add_from_source, saved_as, write_weights
from lrcompress.checkpoint.record import write_record
from lrcompress.layers import experts, lowrank
from lrcompress.models.architecture import auto_classes
from lrcompress.runtime.atomic_io import writing

MODULES_KEY = "low_rank_modules"  # config key: layout of the low-rank layers
# they build what is below their head by AutoModel, which has to learn the config of the folder
HEADS_ON_AUTO_MODEL = (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GenericForQuestionAnswering,
)
# buffers that are not stored, such as those of falcon_h1, are made here
INITIALIZATION = """
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # transformers leaves these out for code in a folder; they change no tensor that was read
        for module in self.modules():
            if hasattr(module, "_init_weights"):
                module._init_weights(module)
"""
CODE_MODULE = "modeling_lowrank"  # module in the exported folder


def export_standalone(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """Writes a folder that loads with trust_remote_code=True where lrcompress is not installed.

    The folder has the source of the low-rank layers, followed by subclasses of the config and model
    that rebuild the layers from the config. The tensors have the names of the model's modules:
    transformers converts names for its own classes alone. The folder is loaded again before it gets
    its name; raises InputError where the result is another model.
    """
    modules = lowrank.layout(model)
    with writing(out) as folder:
        write_weights(model, tokenizer, folder, module_names=True)
        carried_over = add_from_source(model, folder)
        (folder / f"{CODE_MODULE}.py").write_text(_source_code(model), "utf-8")
        (folder / "experts.py").write_text(inspect.getsource(experts), "utf-8")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config.pop("quantization_config", None)
        config |= {MODULES_KEY: modules, "auto_map": _auto_map(model)}
        config["architectures"] = [f"LowRank{type(model).__name__}"]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        check_loads_alone(model, folder)
        complete = dict(record) | {"export": "standalone"} | carried_over | saved_as(folder)
        write_record(folder, complete)


def _auto_map(model: Any) -> dict[str, str]:
    model_class = f"{CODE_MODULE}.LowRank{type(model).__name__}"
    config_class = f"{CODE_MODULE}.LowRank{type(model.config).__name__}"
    return {"AutoConfig": config_class} | dict.fromkeys(auto_classes(model), model_class)


def _source_code(model: Any) -> str:
    config, name = type(model.config).__name__, type(model).__name__
    return inspect.getsource(lowrank) + (
        f"\n\n{_import(type(model.config))}\n{_import(type(model))}\n\n\n"
        f"class LowRank{config}({config}):\n"
        '    """The original config; `low_rank_modules` records the low-rank layers."""\n\n\n'
        f"{_registration(model)}"
        f"class LowRank{name}({name}):\n"
        '    """The original model with its low-rank layers in place."""\n\n'
        f"    config_class = LowRank{config}\n\n"
        f"    def __init__(self, config: LowRank{config}) -> None:\n"
        "        super().__init__(config)\n"
        "        rebuild(self, config.low_rank_modules)\n"
        f"{INITIALIZATION if _is_stock(type(model)) else ''}"
    )


def _registration(model: Any) -> str:
    """The statements by which AutoModel builds what is below the head; empty where it does not."""
    if not isinstance(model, HEADS_ON_AUTO_MODEL):
        return ""
    base, config = type(model.base_model), type(model.config).__name__
    name = base.__name__
    return (
        f"from transformers import AutoModel  # noqa: E402\n{_import(base)}\n\n\n"
        f"class LowRank{name}({name}):\n"
        '    """The original model below the head."""\n\n'
        f"    config_class = LowRank{config}\n\n\n"
        f"AutoModel.register(LowRank{config}, LowRank{name}, exist_ok=True)\n\n\n"
    )


def _is_stock(original: type) -> bool:
    return original.__module__.startswith("transformers.")


def _import(original: type) -> str:
    """The statement that imports a class of transformers, or of code that is in the folder."""
    module = "transformers" if _is_stock(original) else f".{original.__module__.rpartition('.')[2]}"
    return f"from {module} import {original.__name__}  # noqa: E402"
