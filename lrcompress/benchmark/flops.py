"""Exact floating-point operations of training, counted from the layers that a model has.

Counted are matrix products, 2 m n k for (m, k) times (k, n), as by torch.utils.flop_counter:
linear layers, low-rank ones by their factors, attention over the whole square of positions, and
the output layer. Not counted are norms, activations, softmax, rotary angles, the loss and the
optimizer's steps. The backward pass takes each product twice, once for either operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lrcompress.layers.ffn_layouts import find_blocks, find_ffns, has_experts
from lrcompress.layers.lowrank import is_linear, linear_shape
from lrcompress.runtime.errors import InputError

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Of the forward pass, for one token of a sequence.

    `projections` are the linears of blocks outside the FFNs, `attention` the products of queries
    with keys and of weights with values.
    """

    ffn: int
    projections: int
    attention: int
    head: int

    @property
    def forward(self) -> int:
        return self.ffn + self.projections + self.attention + self.head

    @property
    def training(self) -> int:
        """Forward and backward pass, with gradients of every parameter."""
        return FORWARD_AND_BACKWARD * self.forward

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"training": self.training}


def count(model: Any, length: int) -> Flops:
    """Of a causal language model on sequences of `length` tokens; it may be on the meta device.

    Every block is taken to attend to all positions, with `num_attention_heads` heads. Raises
    InputError for mixtures of experts, whose operations depend on what the router chooses.
    """
    if has_experts(model):
        raise InputError(
            f"the operations of {model.config.model_type!r} depend on which experts its tokens "
            "take: use a model without mixtures of experts"
        )
    name, blocks = find_blocks(model)
    ffns = {spec.name for spec in find_ffns(model).linears}
    ffn = projections = 0
    for path, linear in _linears(blocks, name):
        cost = linear_flops(linear)
        if any(path == spec or path.startswith(f"{spec}.") for spec in ffns):
            ffn += cost
        else:
            projections += cost
    head = linear_flops(model.get_output_embeddings())
    return Flops(ffn, projections, len(blocks) * _attention(model.config, length), head)


def _linears(blocks: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for path, module in blocks.named_modules(prefix=name):
        if is_linear(module):
            yield path, module


def linear_flops(linear: nn.Module) -> int:
    """Of one linear layer for one token, forward: 2 x out x in."""
    out_features, in_features = linear_shape(linear)
    return 2 * out_features * in_features


def _attention(config: Any, length: int) -> int:
    """Q Kᵀ and the mixing of values in one block, for one of `length` tokens."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * 2 * length * int(heads) * int(width)


def run_flops(
    model: Any, length: int, tokens_of_step: int, steps: int, guides: int = 0, guided_steps: int = 0
) -> int:
    """Of a whole training: `guides` are forward FLOPs a token of dense layers beside low-rank ones,
    which train in `guided_steps` of the `steps`."""
    plain = count(model, length).training * steps
    return int(tokens_of_step) * (plain + FORWARD_AND_BACKWARD * guides * guided_steps)


# operators of the CPU that torch's counter does not know, and how many shapes decide each
ATTENTION: Mapping[str, tuple[Callable[..., int], int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": (sdpa_flop_count, 3),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (sdpa_backward_flop_count, 4),
}


def count_operations(run: Callable[[], object]) -> int:
    """Operations of the matrix products and the attention of what runs."""
    known = {getattr(torch.ops.aten, name): _by_shapes(*how) for name, how in ATTENTION.items()}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return int(counter.get_total_flops())


def _by_shapes(count: Callable[..., int], leading: int) -> Callable[..., int]:
    def counted(*shapes: Any, **_: Any) -> int:
        return count(*shapes[:leading])

    return counted
