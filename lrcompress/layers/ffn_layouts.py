"""Where each model family keeps the linear layers of its feed-forward networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lrcompress.layers.experts import LIST, Experts, fused_experts
from lrcompress.layers.lowrank import LowRankLinear, is_compressed, is_linear, linear_shape
from lrcompress.layers.model_info import parameter_count, refuse_quantized
from lrcompress.methods.types import LinearSpec, Role
from lrcompress.runtime.errors import InputError

# Layouts: paths inside a block -> role. A family with new names is one more row.
LAYOUTS: tuple[dict[str, Role], ...] = (
    # llama, mistral, qwen2, qwen3, gemma 1-3, granite, smollm3, olmo2/3, stablelm, cohere, ...
    {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"},
    # phi3, glm4: gate and up are one matrix
    {"mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
    # nemotron: no gate
    {"mlp.up_proj": "up", "mlp.down_proj": "down"},
    # phi
    {"mlp.fc1": "up", "mlp.fc2": "down"},
    # gpt2, gpt_neo, starcoder2
    {"mlp.c_fc": "up", "mlp.c_proj": "down"},
    # gptj, codegen
    {"mlp.fc_in": "up", "mlp.fc_out": "down"},
    # gpt_neox, bloom, falcon, persimmon
    {"mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"},
    # opt, xglm, biogpt: directly on the block
    {"fc1": "up", "fc2": "down"},
    # mpt
    {"ffn.up_proj": "up", "ffn.down_proj": "down"},
    # lfm2
    {"feed_forward.w1": "gate", "feed_forward.w3": "up", "feed_forward.w2": "down"},
    # what every token reads beside its experts: qwen2_moe; glm4_moe, deepseek, dots1, ...; hunyuan
    *(
        {f"mlp.{name}.{role}_proj": role for role in ("gate", "up", "down")}
        for name in ("shared_expert", "shared_experts", "shared_mlp")
    ),
    # granitemoeshared
    {"shared_mlp.input_linear": "gate_up", "shared_mlp.output_linear": "down"},
)
# paths inside an expert
EXPERT: dict[str, Role] = {"gate_up": "gate_up", "down": "down"}


@dataclass(frozen=True)
class FFNLinears:
    """The FFN linears of a model, and the names of the expert tensors that are none of them."""

    linears: tuple[LinearSpec, ...]
    experts: tuple[str, ...]


def find_ffns(model: nn.Module) -> FFNLinears:
    """Every FFN linear of every transformer block, dense or already low-rank, in order.

    Those of experts are linears of a model that is `unpacked`, or where some are low-rank.
    """
    linears = tuple(linears_of(model, range(len(find_blocks(model)[1]))))
    return FFNLinears(linears, tuple(_expert_tensors(model)))


def linears_of(model: nn.Module, blocks: Iterable[int]) -> Iterator[LinearSpec]:
    """The FFN linears of some of the blocks, by number."""
    prefix, every = find_blocks(model)
    for index in blocks:
        yield from _block_linears(every[index], f"{prefix}.{index}", index)
        yield from _expert_linears(every[index], f"{prefix}.{index}", index)


def ffn_parameters(model: nn.Module) -> int:
    """Parameters of the FFN linears, those of fused experts included."""
    linears = (model.get_submodule(spec.name) for spec in find_ffns(model).linears)
    fused = (module for _, module in fused_experts(model))
    return sum(parameter_count(module) for module in (*linears, *fused))


def select(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dense_first: int = 0,
) -> tuple[LinearSpec, ...]:
    """The linears to factorize: the FFNs', or those that `include` names, less `exclude`.

    Patterns are shell-style and match whole module names (`*.down_proj`, `model.layers.3.*`).
    `include` reaches every linear inside the blocks, so that an unknown family can be named by
    hand; the first `dense_first` blocks are left out. Raises InputError where a pattern matches
    nothing, where nothing is left, and where the model is compressed or quantized.
    """
    refuse_quantized(model, "factorize it before it is quantized")
    if is_compressed(model):
        raise InputError(
            "the model is already compressed: start from the dense model, or merge it first with "
            "`lrcompress export DIR --to dense`"
        )
    finding = find_ffns(model)
    linears = _included(model, finding, include) if include else finding.linears
    _check_patterns(exclude, "exclude", [spec.name for spec in linears])
    chosen = tuple(
        spec
        for spec in linears
        if spec.block >= dense_first and not any(fnmatchcase(spec.name, p) for p in exclude)
    )
    if not chosen:
        raise InputError(_nothing_left(model, finding, bool(linears)))
    return chosen


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's blocks: the ModuleList of num_hidden_layers entries
    with the most parameters. Raises InputError where there is none."""
    config: Any = model.config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    if not lists:
        raise InputError(
            f"unsupported model: {config.model_type!r} has no list of {depth} transformer blocks"
        )
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _block_linears(block: nn.Module, prefix: str, index: int) -> Iterator[LinearSpec]:
    modules = dict(block.named_modules())
    for layout in LAYOUTS:
        if all(path in modules and _is_any_linear(modules[path]) for path in layout):
            for path, role in layout.items():
                parent = path.rpartition(".")[0]
                group = path if role == "down" else parent or "input"
                ffn = f"{prefix}.{parent}".rstrip(".")
                group = f"{prefix}.{group}"
                yield _spec(modules[path], f"{prefix}.{path}", index, role, group, ffn)
            return


def _expert_linears(block: nn.Module, prefix: str, index: int) -> Iterator[LinearSpec]:
    for path, module in block.named_modules(prefix=prefix):
        if isinstance(module, Experts):
            for number, expert in enumerate(module.get_submodule(LIST).children()):
                ffn = f"{path}.{LIST}.{number}"
                for child, role in EXPERT.items():
                    name = f"{ffn}.{child}"
                    group = name if role == "down" else ffn
                    spec = _spec(expert.get_submodule(child), name, index, role, group, ffn)
                    yield replace(spec, mixture=path)


def _is_any_linear(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, LowRankLinear)


def _spec(module: nn.Module, name: str, block: int, role: Role, group: str, ffn: str) -> LinearSpec:
    out_features, in_features = linear_shape(module)
    bias = module.bias is not None
    return LinearSpec(name, block, role, in_features, out_features, bias, group, ffn)


def _included(
    model: nn.Module, finding: FFNLinears, include: Sequence[str]
) -> tuple[LinearSpec, ...]:
    known = {spec.name: spec for spec in finding.linears}
    prefix, blocks = find_blocks(model)
    every: dict[str, LinearSpec] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            if _is_any_linear(module):
                name = f"{prefix}.{index}.{path}"
                every[name] = known.get(name) or _unknown(module, name, index)
    _check_patterns(include, "include", every)
    return tuple(s for n, s in every.items() if any(fnmatchcase(n, p) for p in include))


def _unknown(module: nn.Module, name: str, block: int) -> LinearSpec:
    out_features, in_features = linear_shape(module)
    role: Role = "down" if out_features < in_features else "up"
    return _spec(module, name, block, role, group=name, ffn=name)


def _check_patterns(
    patterns: Sequence[str], what: str, names: Sequence[str] | dict[str, Any]
) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = next(iter(names), "none")
            raise InputError(
                f"{what} pattern {pattern!r} matches no linear layer: names look like {example!r}"
            )


def _expert_tensors(model: nn.Module) -> Iterator[str]:
    """Fused expert weights are parameters of three dimensions, which no linear owns."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            yield name


def has_experts(model: nn.Module) -> bool:
    """Whether the model has mixtures of experts, of whichever layout and form."""
    lists = any(isinstance(module, Experts) for module in model.modules())
    return lists or any(True for _ in _expert_tensors(model))


def _nothing_left(model: Any, finding: FFNLinears, found: bool) -> str:
    if found:
        return "nothing is left to factorize: --exclude and --dense-first take every linear away"
    if finding.experts:
        return (
            f"unsupported model: the feed-forward weights of {model.config.model_type!r} are "
            f"mixture-of-experts tensors ({finding.experts[0]} and {len(finding.experts) - 1} "
            "more) with biases, transposed or otherwise not laid out as lrcompress factorizes them"
        )
    return (
        f"unsupported model: no feed-forward linears known for {model.config.model_type!r}: name "
        "them with --include, such as --include '*.mlp.*'"
    )
