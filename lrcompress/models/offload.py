"""A model whose blocks stay on disk; only one block at a time has its weights in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from lrcompress.config import ModelSettings
from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.models.loading import checked_device, load, locate, skeleton
from lrcompress.runtime import distributed
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.stage_costs import stage


@dataclass(frozen=True)
class OffloadedModel:
    """`model` holds the weights outside its blocks, and those of a block while it is `resident`.

    `weights` reads the weights of the blocks from disk, by full name; `prefix` is the name of the
    list of blocks.
    """

    model: Any
    tokenizer: Any
    weights: Mapping[str, Tensor]
    prefix: str

    @classmethod
    def load(cls, source: ModelSettings, work: Path) -> Self:
        """Loads a model folder; `work` gets copies of weights that transformers converts.

        Raises InputError for a GGUF file, and where the model cannot be loaded.
        """
        if locate(source.source, source.gguf_file).gguf_file:
            raise InputError(
                f"--streaming does not read GGUF, as of {source.source!r}: give a folder"
            )
        meta_model = skeleton(source.source, None, source.trust_remote_code)
        prefix, _ = find_blocks(meta_model)
        device = distributed.local_device(source.device)
        if device == "auto":
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        device_map = dict.fromkeys(names_outside(meta_model, prefix), checked_device(device))
        placement = {
            "device_map": device_map | {prefix: "disk"},
            "offload_folder": str(work / f"converted-{distributed.rank()}"),
        }
        arguments = source.model_dump(exclude={"source", "gguf_file", "device"})
        model, tokenizer = load(source.source, **arguments, placement=placement)
        weights = _offloaded_weights(find_blocks(model)[1])
        remove_hook_from_submodules(model)
        del model.hf_device_map
        return cls(model.requires_grad_(False).eval(), tokenizer, weights, prefix)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(find_blocks(self.model)[1])

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Inside, block number `index` has its weights in memory.

        Afterwards its modules and meta parameters are restored, also where modules were replaced.
        """
        block = find_blocks(self.model)[1][index]
        original_modules = {name: module for name, module in block.named_modules() if name}
        meta_parameters = {name: p for name, p in block.named_parameters() if p.is_meta}
        try:
            with stage("loading"):
                for name, parameter in meta_parameters.items():
                    weight = self.weights[f"{self.prefix}.{index}.{name}"].to(self.model.device)
                    _set(block, name, nn.Parameter(weight, requires_grad=parameter.requires_grad))
            yield block
        finally:
            for name, module in original_modules.items():
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, module)
            for name, parameter in meta_parameters.items():
                _set(block, name, parameter)

    def stored(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """The weights of a resident block, by their names in a checkpoint."""
        state = {f"{self.prefix}.{index}.{n}": tensor for n, tensor in block.state_dict().items()}
        stored = revert_weight_conversion(self.model, state)
        return {name: tensor.contiguous() for name, tensor in stored.items()}

    def outside(self) -> dict[str, Tensor]:
        """The weights outside the blocks."""
        state = self.model.state_dict()
        return {n: tensor for n, tensor in state.items() if not n.startswith(f"{self.prefix}.")}


def _set(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    block.get_submodule(parent).register_parameter(child, parameter)


def names_outside(model: nn.Module, prefix: str) -> Iterator[str]:
    """Names of the modules and parameters that together hold all weights outside the blocks."""
    parent, path = model, ""
    for step in prefix.split("."):
        for name, _ in (*parent.named_children(), *parent.named_parameters(recurse=False)):
            if name != step:
                yield path + name
        parent, path = parent.get_submodule(step), f"{path}{step}."


def _offloaded_weights(blocks: nn.ModuleList) -> Mapping[str, Tensor]:
    """The mapping by which accelerate reads the weights of the blocks from disk."""
    for module in blocks.modules():
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            return weights_map.dataset  # type: ignore[no-any-return]
    raise InputError("the model's blocks hold no weights: there is nothing to stream")
