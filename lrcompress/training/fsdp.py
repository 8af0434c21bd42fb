"""Parameters, gradients and optimizer state split over the processes (FSDP2).

transformers can split a model while it loads: each process reads its own shard of each weight. Its
Trainer can train such a model but not resume it, so this module saves and loads the checkpoints.
The alternative is Trainer's argument `fsdp`: accelerate then splits a model that every process has
loaded whole, and on CPU it trains without splitting and without a warning.
"""

from __future__ import annotations

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

OPTIMIZER_FOLDER, SCHEDULER_FILE = "optimizer_parts", "scheduler.pt"


def check_processes(command: str, device: str) -> None:
    """Raises InputError where there is one process only, or `device` leaves the GPUs unused."""
    if distributed.world_size() == 1:
        raise InputError(
            "--shard splits a model over several processes and there is one: start it with "
            f"torchrun --nproc-per-node N -m lrcompress {command}"
        )
    if device == "cpu" and torch.cuda.is_available():
        raise InputError("--shard uses the GPUs of a machine that has any: use --device auto")


def check_source(source: ModelSettings) -> None:
    """Raises InputError where `source` is a GGUF file, which transformers cannot split."""
    if locate(source.source, source.gguf_file).gguf_file:
        raise InputError(f"--shard does not read GGUF, as of {source.source!r}: give a folder")


def placement(source: ModelSettings, shard: bool) -> dict[str, Any]:
    """Arguments of `load_model` that put `source` on this process's device, or split it.

    Raises InputError where a mixture of experts would be split.
    """
    if not shard:
        return {"device": distributed.local_device(source.device)}
    bare = skeleton(source.source, source.gguf_file, source.trust_remote_code)
    if has_experts(bare):
        raise InputError(
            f"--shard does not split mixtures of experts, as of {source.source!r}: leave it out"
        )
    blocks, _ = find_blocks(bare)
    plan = {f"{blocks}.*": "free_full_weight"}  # only one block at a time has its whole weights
    split = DistributedConfig(fsdp_size=distributed.world_size(), fsdp_plan=plan)
    return {"placement": {"distributed_config": split}}


def check_precision(model: Any) -> None:
    """Raises InputError where a sharded model would train in less than float32."""
    if is_sharded(model) and model.dtype != torch.float32:
        raise InputError(
            f"--shard trains what it loads and this is {str(model.dtype)[6:]}: use --dtype float32"
        )


def check_embedding(model: Any, remedy: str) -> None:
    """Raises InputError where the processes would have unequal shards of a tied embedding.

    transformers ties the weights after it has split them. Where the last shard has another size,
    the embedding and the output layer would then be trained apart. The error proposes `remedy`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied and len(embedding.weight) % distributed.world_size():
        raise InputError(
            f"--shard cannot train a tied embedding of {len(embedding.weight)} tokens, which "
            f"{distributed.world_size()} processes do not share evenly: use {remedy}, or another "
            "--nproc-per-node"
        )


def is_sharded(model: Any) -> bool:
    """Whether transformers split `model` over the processes while it loaded."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def gather_state_dict(model: Any) -> dict[str, Tensor] | None:
    """The whole weights of a sharded model on the CPU; None if the model is not sharded.

    Every process has to call it; only the main one gets the weights. Removes what the model's
    config says of sharding, so that the saved model loads in one process.
    """
    if not is_sharded(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict: Any = get_model_state_dict(model, options=options)
    model.config.__dict__.pop("distributed_config", None)
    tied = _parameter_names(model, with_tied=True) - _parameter_names(model, with_tied=False)
    return {name: tensor for name, tensor in state_dict.items() if name not in tied}


def _parameter_names(model: nn.Module, with_tied: bool) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=not with_tied)}


class ShardingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that prints nothing and can resume sharded models, on any number of processes."""

    def __init__(self, *, model: Any, args: TrainingArguments, **arguments: Any) -> None:
        # Trainer refuses sharded models unless only the model is saved; the overrides below save
        # the optimizer too
        args.save_only_model = is_sharded(model)
        super().__init__(model=model, args=args, **arguments)
        args.save_only_model = False
        self.remove_callback(PrinterCallback)  # it prints once on each machine

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states = {"optimizer": self._optimizer_state()}
        save(states, checkpoint_id=Path(output_dir) / OPTIMIZER_FOLDER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        states = {"optimizer": self._optimizer_state()}
        load(states, checkpoint_id=Path(checkpoint) / OPTIMIZER_FOLDER)
        set_optimizer_state_dict(self.model, self.optimizer, states["optimizer"])
        schedule = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _optimizer_state(self) -> Any:
        return get_optimizer_state_dict(self.model, self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the main process then writes the state file, which marks the checkpoint as complete
        distributed.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            _load_shards(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if is_sharded(self.model):
            _load_shards(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def _load_shards(model: Any, folder: Path) -> None:
    """Fills this process's shards from the whole weights in `folder`, one tensor at a time."""
    state_dict = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call,unused-ignore]
            for name in tensors.keys():  # noqa: SIM118
                _copy_shard(state_dict[name], tensors.get_tensor(name))


@torch.no_grad()
def _copy_shard(target: Tensor, whole: Tensor) -> None:
    if isinstance(target, DTensor):
        whole = whole.to(target.device, target.dtype)
        # every process has read the whole tensor: with src_data_rank None none has to send it
        target.copy_(
            distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        )
    else:
        target.copy_(whole)
