"""Checks of a model before its weights are read, from its config and file headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lrcompress.layers.lowrank import rebuild
from lrcompress.layers.model_info import parameter_count
from lrcompress.models.architecture import build
from lrcompress.models.hf_quantizer import LOW_RANK_METHODS, LowRankConfig
from lrcompress.models.safetensors_headers import element_count, stored_tensors, weight_files
from lrcompress.models.stored_weights import refuse_wrapped
from lrcompress.runtime.errors import InputError

ADAPTER_FILE = "adapter_config.json"
# the highest ratio of a model's parameters to the elements in its files; quantizers pack several
# parameters into one element
MAX_PARAMETERS_PER_ELEMENT = 16


def meta_model(config: Any, trust_remote_code: bool) -> Any:
    """The model that `config` describes, on the meta device, with its compressed layers."""
    record = getattr(config, "quantization_config", None)
    with torch.device("meta"):
        model = build(config, trust_remote_code)
        if isinstance(record, dict) and record.get("quant_method") in LOW_RANK_METHODS:
            rebuild(model, LowRankConfig(record.get("modules")).modules)
    return model


def check_folder(path: str, trust_remote_code: bool) -> None:
    """Raises InputError where a model folder has only pickled weights or an adapter, or far fewer
    weights than its config asks for. A hub id is not checked."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model folder {path!r} has only pickled .bin weights, which are never loaded: save it "
            "as safetensors with transformers' save_pretrained first"
        )
    if (folder / ADAPTER_FILE).is_file():
        raise InputError(
            f"model folder {path!r} has an adapter ({ADAPTER_FILE}), which would change the model: "
            "merge it first with peft's merge_and_unload, or remove it"
        )
    stored = stored_tensors(weight_files(folder))
    refuse_wrapped(path, stored)
    if stored and not trust_remote_code:  # custom code may not run on the meta device
        _check_size(path, element_count(stored), len(stored))


def _check_size(path: str, elements: int, tensors: int) -> None:
    """Refuses a config that asks for far more weights than the files hold.

    transformers would allocate memory for all of them before it finds that they are missing.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    # the depth first: a model of very many blocks takes long to build
    if isinstance(depth, int) and depth <= tensors:
        limit = MAX_PARAMETERS_PER_ELEMENT * elements
        if parameter_count(meta_model(config, False)) <= limit:
            return
    raise InputError(
        f"model {path!r} holds {elements:,} numbers in {tensors} tensors, and its config.json asks "
        "for far more: get an intact copy"
    )
