"""Continued training of a compressed model towards its dense teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrcompress.config import FinetuneSettings
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.moe import unpacked
from lrcompress.runtime.protocols import InputError, Progress, silent
from lrcompress.training.distillation import DistillationTrainer, Objective
from lrcompress.training.fsdp import is_sharded
from lrcompress.training.loop import Trained, autocast, run
from lrcompress.training.self_guided import Guidance, guides
from lrcompress.training.trainable import balance, pack, trainable, with_adapters
from lrcompress.training.trainer import BlockDataset


def train(
    model: Any,
    teacher: Any,
    blocks: BlockDataset,
    held_out: BlockDataset,
    settings: FinetuneSettings,
    work: Path,
    progress: Progress = silent,
) -> Trained:
    """Trains `model` in place towards `teacher`; the parameters of the best measurement stay.

    Checkpoints are kept in `work`; a run that finds one there goes on from it. `teacher` may be
    None where the sequences bring its predictions. Raises InputError where nothing is gained.
    """
    guidance = Guidance(settings.max_steps, settings.self_guided == "reduced", settings.seed)
    make = partial(DistillationTrainer, teacher=teacher, objective=_objective(settings))
    prepared = _guided(model, teacher, settings, guidance)
    done = run(
        model, prepared, make, blocks, held_out, settings, work, progress, callbacks=[guidance]
    )
    if settings.self_guided == "off":
        return done
    return replace(done, guided_share=guidance.layers / len(list(compressed_layers(model))))


def check_pair(model: Any, teacher: Any, hidden_states: bool) -> None:
    """Raises InputError where nothing is compressed, or where the vocabularies differ; with
    `hidden_states` also where those have another number or width."""
    if not any(compressed_layers(model)):
        raise InputError("nothing in the model is compressed: factorize it first")
    sizes = [m.get_input_embeddings().num_embeddings for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher has {sizes[1]} tokens and the model {sizes[0]}: name the dense model "
            "that was compressed as --teacher"
        )
    if not hidden_states:
        return
    shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (model, teacher)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the teacher has blocks and width {shapes[1]} and the model {shapes[0]}: leave "
            "--hidden-states out"
        )


@contextmanager
def _guided(
    model: Any, teacher: Any, settings: FinetuneSettings, guidance: Guidance
) -> Iterator[Any]:
    """`_prepared`, with the teacher's dense layers beside the low-rank ones if asked for."""
    with ExitStack() as stack:
        student = stack.enter_context(_prepared(model, settings))
        if settings.self_guided != "off":
            stack.enter_context(unpacked(teacher))
            pairs = guides(model, dict(teacher.named_modules()))
            stack.enter_context(guidance.guiding(pairs))
        yield student


@contextmanager
def _prepared(model: Any, settings: FinetuneSettings) -> Iterator[Any]:
    """The model as it trains, with what trains of it; afterwards it has its own layers again."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    precision = model.dtype
    stored = balance(model) if settings.balances else {}
    lora = settings.train == "lora"
    student = with_adapters(model, settings.lora_rank, settings.seed) if lora else model
    parameters = list(trainable(student, settings.train))
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    # steps as small as the rate asks for vanish in weights of lower precision; without autocast
    # all that a layer is given has to have one precision
    for parameter in parameters if autocast(model, settings) else student.parameters():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    yield student
    if lora:
        student.merge_and_unload()
    pack(model, stored)
    if not is_sharded(model):
        model.to(precision)
    for parameter, was in wanted:
        parameter.requires_grad_(was)


def _objective(settings: FinetuneSettings) -> Objective:
    return Objective(settings.temperature, settings.cross_entropy, settings.hidden_states)
