"""Mixtures of experts as lists of FFNs with plain linears, which can become low-rank one by one.

transformers keeps the experts of a block in two 3-D parameters: gate_up_proj (experts, 2 channels,
hidden), with the rows of gate before those of up, or without a gate up_proj (experts, channels,
hidden); and down_proj (experts, hidden, channels). Here each expert's linears are views of these
parameters.

This file imports only torch: `lrcompress export --to standalone` ships it beside `lowrank.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# attributes that transformers sets on experts, with the values that `Experts` supports
SUPPORTED_FLAGS = {
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
# the attribute of `Experts` that holds the list; part of parameter names in checkpoints
EXPERT_LIST = "ffns"
# names of an expert's linears; those of the fused parameters have the ending too
GATE_UP, UP, DOWN = "gate_up", "up", "down"
FUSED_ENDING = "_proj"


class Expert(nn.Module):
    """One FFN, down(activation(first(x))), x (tokens, hidden).

    The first linear is called `first_name`: gate and up as one matrix, or up alone.
    """

    def __init__(
        self, first_name: str, first: nn.Parameter, down: nn.Parameter, activation: Any
    ) -> None:
        super().__init__()
        self.first_name = first_name
        self.add_module(first_name, _linear(first))
        self.down = _linear(down)
        self.activation: Callable[[Tensor], Tensor] = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(getattr(self, self.first_name)(x)))
        return y


class Experts(nn.Module):
    """Replaces the module `fused` of transformers; its linears are views of the fused weights.

    The one-element buffer `down_proj` holds no information. It has the fused tensor's own key in
    a checkpoint, so that a loader which does not know this module fails on the shape instead of
    filling the experts with random weights.
    """

    down_proj: Tensor

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.shell = (_without_parameters(fused),)  # a tuple, so that it is not a submodule
        first_name = GATE_UP if fused.has_gate else UP
        first, down = getattr(fused, first_name + FUSED_ENDING), fused.down_proj
        assert isinstance(first, nn.Parameter)
        assert isinstance(down, nn.Parameter)
        shell: Any = self.shell[0]
        activation = shell._apply_gate if fused.has_gate else shell.act_fn
        weights = zip(_matrices(first), _matrices(down), strict=True)
        ffns = nn.ModuleList(Expert(first_name, *pair, activation) for pair in weights)
        setattr(self, EXPERT_LIST, ffns)
        self.register_buffer("down_proj", down.detach().new_zeros(1, 1, 1))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts (tokens, hidden).

        `hidden_states` is (tokens, hidden); `top_k_index` and `top_k_weights` are (tokens, k).
        """
        experts = getattr(self, EXPERT_LIST)
        expert_of_row = top_k_index.flatten()  # one row for each token and expert
        order = expert_of_row.argsort(stable=True)
        counts = expert_of_row.bincount(minlength=len(experts)).tolist()
        inputs = torch.split(hidden_states[order // top_k_index.shape[1]], counts)
        outputs = torch.cat(
            [
                expert(x)
                for expert, x in zip(experts, inputs, strict=True)
                if len(x) or torch.is_grad_enabled()  # in training every expert gets a gradient
            ]
        )
        weighted = outputs * top_k_weights.flatten()[order, None]
        by_token = weighted[order.argsort()].view(*top_k_index.shape, -1)
        return by_token.sum(1).to(hidden_states.dtype)

    def to_fused(self) -> nn.Module:
        """The module of transformers again; all linears of the experts have to be dense."""
        module, experts = _without_parameters(self.shell[0]), list(getattr(self, EXPERT_LIST))
        for name in (experts[0].first_name, DOWN):
            weights = [getattr(expert, name).weight for expert in experts]
            stacked = torch.stack(weights).detach()
            parameter = nn.Parameter(stacked, requires_grad=weights[0].requires_grad)
            module.register_parameter(name + FUSED_ENDING, parameter)
        return module.train(self.training)


def _matrices(parameter: nn.Parameter) -> list[nn.Parameter]:
    """Views of the matrices of a 3-D parameter."""
    return [nn.Parameter(matrix, parameter.requires_grad) for matrix in parameter.detach()]


def _linear(weight: nn.Parameter) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = weight
    return linear


def _without_parameters(fused: nn.Module) -> nn.Module:
    """A copy of `fused` with its activation function and flags, but without parameters."""
    shell = copy.copy(fused)
    shell.__dict__["_parameters"] = {}
    return shell


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds experts in two 3-D parameters laid out as `Experts` needs them."""
    parameters = dict(module.named_parameters())
    has_gate = getattr(module, "has_gate", None)
    first_name = (GATE_UP if has_gate else UP) + FUSED_ENDING
    if set(parameters) != {first_name, "down_proj"} or any(True for _ in module.buffers()):
        return False
    if any(getattr(module, name, None) is not value for name, value in SUPPORTED_FLAGS.items()):
        return False
    first, down = parameters[first_name], parameters["down_proj"]
    if not (
        first.ndim == down.ndim == 3 and hasattr(module, "_apply_gate" if has_gate else "act_fn")
    ):
        return False
    experts, hidden, channels = down.shape
    return tuple(first.shape) == (experts, 2 * channels if has_gate else channels, hidden)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all fused experts in `model` that `Experts` can replace."""
    return ((name, module) for name, module in model.named_modules() if is_fused(module))
