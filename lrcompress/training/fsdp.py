"""Parameters, gradients and optimizer state split over the processes (FSDP2).

transformers splits a model while it loads: each process reads its own part of each weight. Its
Trainer trains such a model and cannot resume it, so the checkpoints are made here. The other way,
Trainer's `fsdp` argument, has accelerate split a model that every process has loaded whole, and
on CPU it trains without splitting and does not say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from lrcompress.config import ModelSettings
from lrcompress.layers.ffn_layouts import find_blocks, has_experts
from lrcompress.models.loading import locate, skeleton
from lrcompress.runtime import distributed
from lrcompress.runtime.errors import InputError

OPTIMIZER, SCHEDULER = "optimizer_parts", "scheduler.pt"


def check_processes(command: str, device: str) -> None:
    """Raises InputError where `command` has no processes to split a model over, or not on GPUs."""
    if distributed.world_size() == 1:
        raise InputError(
            "--shard splits a model over several processes and there is one: start it with "
            f"torchrun --nproc-per-node N -m lrcompress {command}"
        )
    if device == "cpu" and torch.cuda.is_available():
        raise InputError("--shard uses the GPUs of a machine that has any: use --device auto")


def check_source(source: ModelSettings) -> None:
    """Raises InputError where the model `source` is stored in a way that cannot be split."""
    if locate(source.source, source.gguf_file).gguf_file:
        raise InputError(f"--shard does not read GGUF, as of {source.source!r}: give a folder")


def placement(source: ModelSettings, shard: bool) -> dict[str, Any]:
    """Arguments of `models.load` that put `source` where this process needs it.

    Raises InputError for mixtures of experts that would be split.
    """
    if not shard:
        return {"device": distributed.local_device(source.device)}
    bare = skeleton(source.source, source.gguf_file, source.trust_remote_code)
    if has_experts(bare):
        raise InputError(
            f"--shard does not split mixtures of experts, as of {source.source!r}: leave it out"
        )
    blocks, _ = find_blocks(bare)
    plan = {f"{blocks}.*": "free_full_weight"}  # one block at a time is whole, then given up
    split = DistributedConfig(fsdp_size=distributed.world_size(), fsdp_plan=plan)
    return {"placement": {"distributed_config": split}}


def check_precision(model: Any) -> None:
    """Raises InputError where a sharded model would train in lower precision than float32."""
    if is_sharded(model) and model.dtype != torch.float32:
        raise InputError(
            f"--shard trains what it loads and this is {str(model.dtype)[6:]}: use --dtype float32"
        )


def check_embedding(model: Any, instead: str) -> None:
    """Raises InputError where `model`, once sharded, would train a tied embedding in unequal parts;
    `instead` is what to use.

    transformers ties it after it was split, and the two uses then go apart in the last part.
    """
    entry, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is entry.weight
    if tied and len(entry.weight) % distributed.world_size():
        raise InputError(
            f"--shard cannot train a tied embedding of {len(entry.weight)} tokens, which "
            f"{distributed.world_size()} processes do not share evenly: use {instead}, or other "
            "--nproc-per-node"
        )


def is_sharded(model: Any) -> bool:
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """The weights of a sharded model in the main process, on the CPU; None of any other model.

    Every process has to call it. The model's config forgets that it was sharded.
    """
    if not is_sharded(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_model_state_dict(model, options=options)
    model.config.__dict__.pop("distributed_config", None)
    tied = set(_names(model, once=False)) - set(_names(model, once=True))
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _names(model: nn.Module, once: bool) -> Iterator[str]:
    return (name for name, _ in model.named_parameters(remove_duplicate=once))


class ShardingTrainer(Trainer):  # type: ignore[misc]
    """A silent Trainer whose sharded models can be resumed, on any number of processes."""

    def __init__(self, *, model: Any, args: TrainingArguments, **arguments: Any) -> None:
        # Trainer refuses to save optimizer states of sharded models, as it knows no way to
        args.save_only_model = is_sharded(model)
        super().__init__(model=model, args=args, **arguments)
        args.save_only_model = False
        self.remove_callback(PrinterCallback)  # it writes to stdout, once on each machine

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states = {"optimizer": self._optimizer_state()}
        save(states, checkpoint_id=Path(output_dir) / OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        states = {"optimizer": self._optimizer_state()}
        load(states, checkpoint_id=Path(checkpoint) / OPTIMIZER)
        set_optimizer_state_dict(self.model, self.optimizer, states["optimizer"])
        schedule = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _optimizer_state(self) -> Any:
        return get_optimizer_state_dict(self.model, self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        distributed.barrier()  # all have written before the main process says that it is whole

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            _read_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if is_sharded(self.model):
            _read_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def _read_weights(model: Any, folder: Path) -> None:
    """Fills the parts that this process has from whole weights, one tensor at a time."""
    state = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call,unused-ignore]
            for name in tensors.keys():  # noqa: SIM118
                _fill(state[name], tensors.get_tensor(name))


@torch.no_grad()
def _fill(target: Tensor, whole: Tensor) -> None:
    if isinstance(target, DTensor):
        whole = whole.to(target.device, target.dtype)
        # every process reads the file, so that none has to send
        mesh, parts = target.device_mesh, target.placements
        target.copy_(distribute_tensor(whole, mesh, parts, src_data_rank=None))
    else:
        target.copy_(whole)
