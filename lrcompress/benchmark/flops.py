"""Two counters of floating-point operations (FLOPs).

`analytic_flops` computes them from the shapes of a model's layers, without running it.
`executed_flops` counts those of the operators that run.

Both count matrix products, 2 m n k for (m, k) times (k, n): linear layers (low-rank ones by their
factors), attention over the whole square of positions, and the output layer. Neither counts norms,
activations, softmax, the loss and the optimizer's steps; the first leaves out rotary angles too.
The backward pass has two products for each product of the forward pass, one for either operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lrcompress.layers.ffn_layouts import find_blocks, find_ffns, has_experts
from lrcompress.layers.lowrank import is_linear, linear_shape, tied_modules
from lrcompress.runtime.errors import InputError

# products of a forward and backward pass over those of the forward pass
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """FLOPs of the forward pass for one token of a sequence.

    `ffn` are those of all FFNs, `projections` those of the other linears of the blocks, `attention`
    the products of queries with keys and of attention weights with values, `head` the output layer.
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
        """Forward and backward pass, with gradients of all parameters."""
        return FORWARD_AND_BACKWARD * self.forward

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"training": self.training}


def analytic_flops(model: Any, length: int) -> Flops:
    """FLOPs of a causal language model for a token, in sequences of `length` tokens.

    The model may be on the meta device. Every block counts as attending to all positions, with
    `num_attention_heads` heads. Raises InputError for mixtures of experts, whose operations depend
    on the router.
    """
    if has_experts(model):
        raise InputError(
            f"the operations of {model.config.model_type!r} depend on which experts its tokens "
            "take: use a model without mixtures of experts"
        )
    blocks_name, blocks = find_blocks(model)
    names = [spec.name for spec in find_ffns(model).linears]
    ffn_linears = {place for name in names for place in (name, *tied_modules(model, name))}
    ffn = projections = 0
    for name, linear in _linears(blocks, blocks_name):
        cost = linear_flops(linear)
        # the factors of a low-rank linear are its children
        if any(
            name == ffn_linear or name.startswith(f"{ffn_linear}.") for ffn_linear in ffn_linears
        ):
            ffn += cost
        else:
            projections += cost
    attention = len(blocks) * _attention_flops(model.config, length)
    return Flops(ffn, projections, attention, head=linear_flops(model.get_output_embeddings()))


def _linears(blocks: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # a linear that several blocks share computes in each of them
    for name, module in blocks.named_modules(prefix=prefix, remove_duplicate=False):
        if is_linear(module):
            yield name, module


def linear_flops(linear: nn.Module) -> int:
    """FLOPs of a linear layer for one token, forward: 2 x out x in."""
    out_features, in_features = linear_shape(linear)
    return 2 * out_features * in_features


def _attention_flops(config: Any, length: int) -> int:
    """FLOPs of Q Kᵀ and of the weighted sum of values in one block, for one of `length` tokens."""
    text_config = config.get_text_config(decoder=True)
    heads = text_config.num_attention_heads
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return 2 * 2 * length * int(heads) * int(head_width)


def run_flops(
    model: Any,
    length: int,
    tokens_per_step: int,
    steps: int,
    guide_flops: int = 0,
    guided_steps: int = 0,
) -> int:
    """FLOPs of a whole training of `steps` steps, in sequences of `length` tokens.

    In self-guided training, the dense guides take `guide_flops` forward FLOPs for a token, and
    they run and train in `guided_steps` of the steps.
    """
    model_flops = analytic_flops(model, length).training * steps
    return int(tokens_per_step) * (model_flops + FORWARD_AND_BACKWARD * guide_flops * guided_steps)


# CPU attention operators that torch's counter lacks -> (its formula for attention, the number of
# leading shapes that the formula takes)
CPU_ATTENTION: Mapping[str, tuple[Callable[..., int], int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": (sdpa_flop_count, 3),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (sdpa_backward_flop_count, 4),
}


def executed_flops(run: Callable[[], object]) -> int:
    """Calls `run`; returns the FLOPs of its matrix products and attention."""
    formulas = {
        getattr(torch.ops.aten, operator): _of_leading_shapes(formula, leading)
        for operator, (formula, leading) in CPU_ATTENTION.items()
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return int(counter.get_total_flops())


def _of_leading_shapes(formula: Callable[..., int], leading: int) -> Callable[..., int]:
    def flops(*shapes: Any, **_: Any) -> int:
        return formula(*shapes[:leading])

    return flops
