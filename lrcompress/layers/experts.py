"""Mixtures of experts as FFNs of plain linears, each of which may become low-rank by itself.

transformers keeps the experts of a block in two 3-D parameters: gate_up_proj (experts, 2 channels,
hidden), gate above up, and down_proj (experts, hidden, channels). Here they are views of these, one
linear each.

This file depends on torch alone: `lrcompress export --standalone` ships it beside `lowrank.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# what experts that are computed as here say of themselves; transformers picks its kernels by it
ORDINARY = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
LIST = "ffns"


class Expert(nn.Module):
    """One gated FFN: down(gating(gate_up(x))), gate and up in one matrix, x (tokens, hidden)."""

    def __init__(self, gate_up: nn.Parameter, down: nn.Parameter, gating: Any) -> None:
        super().__init__()
        self.gate_up, self.down = _linear(gate_up), _linear(down)
        self.gating: Callable[[Tensor], Tensor] = gating

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gating(self.gate_up(x)))
        return y


class Experts(nn.Module):
    """The experts of one mixture, in the place of `fused`, whose weights they begin with.

    The one-element buffer `down_proj` holds no information: it sits under the fused tensor's own
    key, so that a loader which does not know this module fails on its shape instead of filling
    the experts with random weights.
    """

    down_proj: Tensor

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.shell = (_emptied(fused),)  # in a tuple: no submodule
        gate_up, down = fused.gate_up_proj, fused.down_proj
        assert isinstance(gate_up, nn.Parameter)
        assert isinstance(down, nn.Parameter)
        gating: Any = self.shell[0]._apply_gate
        experts = zip(_rows(gate_up), _rows(down), strict=True)
        setattr(self, LIST, nn.ModuleList(Expert(*pair, gating) for pair in experts))
        self.register_buffer("down_proj", down.detach().new_zeros(1, 1, 1))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token's experts, weighted and summed: hidden_states (tokens, hidden), the others
        (tokens, experts of a token)."""
        chosen, every = top_k_index.flatten(), getattr(self, LIST)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(every)).tolist()
        rows = torch.split(hidden_states[order // top_k_index.shape[1]], counts)
        outputs = torch.cat(
            [
                expert(x)
                for expert, x in zip(every, rows, strict=True)
                if len(x) or torch.is_grad_enabled()  # all take part in training
            ]
        )
        weighted = outputs * top_k_weights.flatten()[order, None]
        by_token = weighted[order.argsort()].view(*top_k_index.shape, -1)
        return by_token.sum(1).to(hidden_states.dtype)

    def fused(self) -> nn.Module:
        """The module of transformers again, of experts whose linears are all dense."""
        module, every = _emptied(self.shell[0]), list(getattr(self, LIST))
        for name, part in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            weights = [getattr(expert, part).weight for expert in every]
            wanted = weights[0].requires_grad
            stacked = nn.Parameter(torch.stack(weights).detach(), requires_grad=wanted)
            module.register_parameter(name, stacked)
        return module.train(self.training)


def _rows(tensor: nn.Parameter) -> list[nn.Parameter]:
    """Views of the matrices of a 3-D parameter."""
    return [nn.Parameter(one, tensor.requires_grad) for one in tensor.detach()]


def _linear(weight: nn.Parameter) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = weight
    return linear


def _emptied(fused: nn.Module) -> nn.Module:
    """A copy of `fused` that has its activation and flags, and no parameters."""
    shell = copy.copy(fused)
    shell.__dict__["_parameters"] = {}
    return shell


def is_fused(module: nn.Module) -> bool:
    """Whether `module` is a mixture's experts in two 3-D parameters, as `Experts` takes them."""
    own = dict(module.named_parameters())
    if set(own) != {"gate_up_proj", "down_proj"} or any(True for _ in module.buffers()):
        return False
    if any(getattr(module, name, None) is not value for name, value in ORDINARY.items()):
        return False
    gate_up, down = own["gate_up_proj"], own["down_proj"]
    if not (gate_up.ndim == down.ndim == 3 and hasattr(module, "_apply_gate")):
        return False
    experts, hidden, channels = down.shape
    return tuple(gate_up.shape) == (experts, 2 * channels, hidden)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the experts of every mixture that `Experts` can take the place of."""
    return ((name, module) for name, module in model.named_modules() if is_fused(module))
