"""Export of the low-rank layers together with the source code that loads them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.folder import saved_as, write_weights
from lrcompress.checkpoint.record import write_record
from lrcompress.layers import experts, lowrank
from lrcompress.runtime.atomic_io import writing

MODULES_KEY = "low_rank_modules"  # config key: layout of the low-rank layers
CODE_MODULE = "modeling_lowrank"  # module in the exported folder


def export_standalone(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """Writes a folder that loads with trust_remote_code=True where lrcompress is not installed.

    The folder has the source of the low-rank layers, followed by subclasses of the stock config and
    model that rebuild the layers from the config.
    """
    modules = lowrank.layout(model)
    with writing(out) as folder:
        write_weights(model, tokenizer, folder)
        (folder / f"{CODE_MODULE}.py").write_text(_source_code(model), "utf-8")
        (folder / "experts.py").write_text(inspect.getsource(experts), "utf-8")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config.pop("quantization_config", None)
        config |= {MODULES_KEY: modules, "auto_map": _auto_map(model)}
        config["architectures"] = [f"LowRank{type(model).__name__}"]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_record(folder, dict(record) | {"export": "standalone"} | saved_as(folder))


def _auto_map(model: Any) -> dict[str, str]:
    return {
        "AutoConfig": f"{CODE_MODULE}.LowRank{type(model.config).__name__}",
        "AutoModelForCausalLM": f"{CODE_MODULE}.LowRank{type(model).__name__}",
    }


def _source_code(model: Any) -> str:
    config, name = type(model.config).__name__, type(model).__name__
    return inspect.getsource(lowrank) + (
        f"\n\nfrom transformers import {config}, {name}  # noqa: E402\n\n\n"
        f"class LowRank{config}({config}):\n"
        '    """The stock config; `low_rank_modules` records the low-rank layers."""\n\n\n'
        f"class LowRank{name}({name}):\n"
        '    """The stock model with its low-rank layers in place."""\n\n'
        f"    config_class = LowRank{config}\n\n"
        f"    def __init__(self, config: LowRank{config}) -> None:\n"
        "        super().__init__(config)\n"
        "        rebuild(self, config.low_rank_modules)\n"
    )
