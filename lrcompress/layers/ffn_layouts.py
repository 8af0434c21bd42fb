"""Finds the linear layers of the feed-forward networks (FFNs), by model family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lrcompress.layers.experts import EXPERT_LIST, Experts, fused_experts
from lrcompress.layers.lowrank import LowRankLinear, is_compressed, is_linear, linear_shape
from lrcompress.layers.model_info import parameter_count, refuse_quantized
from lrcompress.methods.types import LinearSpec, Role
from lrcompress.runtime.errors import InputError

# paths inside a block -> role; a model family with new names is one more row
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
    # experts that every token uses: qwen2_moe; glm4_moe, deepseek, dots1, ...; hunyuan
    *(
        {f"mlp.{name}.{role}_proj": role for role in ("gate", "up", "down")}
        for name in ("shared_expert", "shared_experts", "shared_mlp")
    ),
    # granitemoeshared
    {"shared_mlp.input_linear": "gate_up", "shared_mlp.output_linear": "down"},
)
# paths inside an `Expert` -> role
EXPERT_LAYOUT: dict[str, Role] = {"gate_up": "gate_up", "down": "down"}


@dataclass(frozen=True)
class FFNLinears:
    """The FFN linears of a model.

    `experts` are the names of expert weights that are 3-D tensors and not linears.
    """

    linears: tuple[LinearSpec, ...]
    experts: tuple[str, ...]


def find_ffns(model: nn.Module) -> FFNLinears:
    """Every FFN linear of every transformer block, dense or already low-rank, in order.

    The linears of experts are included in a model that is `unpacked`, and in mixtures with
    low-rank linears.
    """
    linears = tuple(linears_of(model, range(len(find_blocks(model)[1]))))
    return FFNLinears(linears, tuple(_expert_tensors(model)))


def linears_of(model: nn.Module, blocks: Iterable[int]) -> Iterator[LinearSpec]:
    """The FFN linears of the blocks with these numbers."""
    prefix, modules = find_blocks(model)
    for index in blocks:
        yield from _block_linears(modules[index], f"{prefix}.{index}", index)
        yield from _expert_linears(modules[index], f"{prefix}.{index}", index)


def ffn_parameters(model: nn.Module) -> int:
    """Number of parameters of the FFN linears and of fused experts."""
    linears = (model.get_submodule(spec.name) for spec in find_ffns(model).linears)
    fused = (module for _, module in fused_experts(model))
    return sum(parameter_count(module) for module in (*linears, *fused))


def select(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dense_first: int = 0,
) -> tuple[LinearSpec, ...]:
    """The linears to factorize: all FFN linears, or those that match `include`, without `exclude`.

    Patterns are shell-style and match whole module names (`*.down_proj`, `model.layers.3.*`).
    `include` can match every linear inside the blocks, so that models of unknown families can be
    factorized too. The first `dense_first` blocks stay dense. Raises InputError where a pattern
    matches nothing, where no linear remains, and where the model is compressed or quantized.
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
    selected = tuple(
        spec
        for spec in linears
        if spec.block >= dense_first and not any(fnmatchcase(spec.name, p) for p in exclude)
    )
    if not selected:
        raise InputError(_nothing_selected(model, finding, bool(linears)))
    _refuse_shared(model, selected)
    return selected


def _refuse_shared(model: nn.Module, selected: Iterable[LinearSpec]) -> None:
    """Raises InputError where a selected linear has a weight that another linear has too."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            names.setdefault(id(module.weight), []).append(name)
    for spec in selected:
        sharing = names.get(id(model.get_submodule(spec.name).weight), [])
        if len(sharing) > 1:
            raise InputError(
                f"{sharing[0]} and {sharing[1]} are one weight of {type(model).__name__}, and "
                "shared layers cannot be compressed: leave them out, such as with "
                f"--exclude '*.{spec.name.rpartition('.')[0].rpartition('.')[2]}.*'"
            )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's blocks.

    They are the ModuleList of num_hidden_layers entries that has the most parameters. Raises
    InputError where there is none.
    """
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
            for number, expert in enumerate(module.get_submodule(EXPERT_LIST).children()):
                ffn = f"{path}.{EXPERT_LIST}.{number}"
                for child, role in EXPERT_LAYOUT.items():
                    name = f"{ffn}.{child}"
                    group = name if role == "down" else ffn
                    spec = _spec(expert.get_submodule(child), name, index, role, group, ffn)
                    yield replace(spec, mixture=path)


def _is_any_linear(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, LowRankLinear)


def _spec(module: nn.Module, name: str, block: int, role: Role, group: str, ffn: str) -> LinearSpec:
    out_features, in_features = linear_shape(module)
    bias = module.bias is not None
    return LinearSpec(
        name=name,
        block=block,
        role=role,
        in_features=in_features,
        out_features=out_features,
        bias=bias,
        input_group=group,
        ffn=ffn,
    )


def _included(
    model: nn.Module, finding: FFNLinears, include: Sequence[str]
) -> tuple[LinearSpec, ...]:
    """The linears inside the blocks that match `include`."""
    ffn_specs = {spec.name: spec for spec in finding.linears}
    prefix, blocks = find_blocks(model)
    specs: dict[str, LinearSpec] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            if _is_any_linear(module):
                name = f"{prefix}.{index}.{path}"
                specs[name] = ffn_specs.get(name) or _guessed_spec(module, name, index)
    _check_patterns(include, "include", specs)
    return tuple(spec for name, spec in specs.items() if any(fnmatchcase(name, p) for p in include))


def _guessed_spec(module: nn.Module, name: str, block: int) -> LinearSpec:
    """The spec of a linear that no layout lists: an FFN by itself, with a role by its shape."""
    out_features, in_features = linear_shape(module)
    role: Role = "down" if out_features < in_features else "up"
    return _spec(module, name, block, role, group=name, ffn=name)


def _check_patterns(
    patterns: Sequence[str], option: str, names: Sequence[str] | dict[str, Any]
) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = next(iter(names), "none")
            raise InputError(
                f"{option} pattern {pattern!r} matches no linear layer: names look like {example!r}"
            )


def _expert_tensors(model: nn.Module) -> Iterator[str]:
    """Names of fused expert weights: parameters of three dimensions."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            yield name


def has_experts(model: nn.Module) -> bool:
    """Whether the model has mixtures of experts, fused or as lists of linears."""
    unfused = any(isinstance(module, Experts) for module in model.modules())
    return unfused or any(True for _ in _expert_tensors(model))


def _nothing_selected(model: Any, finding: FFNLinears, has_linears: bool) -> str:
    """The error text for a selection without linears."""
    if has_linears:
        return "nothing is left to factorize: --exclude and --dense-first exclude every linear"
    if finding.experts:
        return (
            f"unsupported model: the feed-forward weights of {model.config.model_type!r} are "
            f"mixture-of-experts tensors ({finding.experts[0]} and {len(finding.experts) - 1} "
            "more) with biases, transposed or otherwise not laid out as lrcompress needs them"
        )
    return (
        f"unsupported model: no feed-forward linears known for {model.config.model_type!r}: name "
        "them with --include, such as --include '*.mlp.*'"
    )
