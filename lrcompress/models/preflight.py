"""What is known of a model before a number of it is read, and reason enough to refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrcompress.layers.lowrank import rebuild
from lrcompress.layers.model_info import parameter_count
from lrcompress.models.hf_quantizer import LOW_RANK, LowRankConfig
from lrcompress.models.safetensors_headers import numbers, stored_tensors, weight_files
from lrcompress.runtime.errors import InputError

ADAPTER = "adapter_config.json"
# numbers of a model for one number of its files, at most: quantizers pack them as densely
PACKED = 16


def meta_model(config: Any, trust_remote_code: bool) -> Any:
    """The model that `config` describes on the meta device, with its compressed layers."""
    record = getattr(config, "quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        if isinstance(record, dict) and record.get("quant_method") in LOW_RANK:
            rebuild(model, LowRankConfig(record.get("modules")).modules)
    return model


def check_folder(path: str, trust_remote_code: bool) -> None:
    """Raises InputError where a folder has no weights that are safe to read, or far fewer than its
    config asks memory for. A hub id is not looked at."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model folder {path!r} has only pickled .bin weights, which are never loaded: save it "
            "as safetensors with transformers' save_pretrained first"
        )
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"model folder {path!r} has an adapter ({ADAPTER}), which would change the model: "
            "merge it first with peft's merge_and_unload, or remove it"
        )
    stored = stored_tensors(weight_files(folder))
    if stored and not trust_remote_code:  # code of a model's own may need more than shapes
        _check_size(path, numbers(stored), len(stored))


def _check_size(path: str, held: int, tensors: int) -> None:
    """What the files lack would be made up in memory, before it is found missing."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    fits = isinstance(depth, int) and depth <= tensors  # first: to build too many takes long
    if fits and parameter_count(meta_model(config, False)) <= PACKED * held:
        return
    raise InputError(
        f"model {path!r} holds {held:,} numbers in {tensors} tensors, and its config.json asks for "
        "far more: get an intact copy"
    )
