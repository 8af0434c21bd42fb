"""Finds the linear layers of the feed-forward networks (FFNs), by model family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lrcompress.layers.experts import DOWN, EXPERT_LIST, GATE_UP, UP, Experts, fused_experts
from lrcompress.layers.lowrank import LowRankLinear, is_compressed, is_linear, is_tied, linear_shape
from lrcompress.layers.model_info import parameter_count, refuse_quantized
from lrcompress.methods.types import LinearSpec, Role
from lrcompress.runtime.errors import InputError

# children of a module that is an FFN -> role; a model family with new names is one more row
LAYOUTS: tuple[dict[str, Role], ...] = (
    # llama, mistral, qwen, gemma, granite, olmo, jamba, bamba, falcon_h1, recurrent_gemma, ...
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    # phi3, glm4, zamba2: gate and up are one matrix
    {"gate_up_proj": "gate_up", "down_proj": "down"},
    # nemotron, nemotron_h, mpt: no gate
    {"up_proj": "up", "down_proj": "down"},
    # phi; opt, xglm, biogpt: the block itself
    {"fc1": "up", "fc2": "down"},
    # gpt2, gpt_neo, starcoder2
    {"c_fc": "up", "c_proj": "down"},
    # gptj, codegen
    {"fc_in": "up", "fc_out": "down"},
    # gpt_neox, bloom, falcon, persimmon
    {"dense_h_to_4h": "up", "dense_4h_to_h": "down"},
    # lfm2
    {"w1": "gate", "w3": "up", "w2": "down"},
    # granitemoeshared, granitemoehybrid
    {"input_linear": "gate_up", "output_linear": "down"},
    # one expert of `Experts`, with a gate and without
    {GATE_UP: "gate_up", DOWN: "down"},
    {UP: "up", DOWN: "down"},
)
# attributes, not zero, of FFNs that compute something over all intermediate channels: gemma3n keeps
# the highest activations
MIXES_CHANNELS = ("activation_sparsity",)
# names of modules that hold no FFN
ATTENTION = re.compile("attn|attention|router")
# the module list that holds experts as FFNs of their own
EXPERT_MODULES = "experts"


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
    """The FFN linears of the blocks with these numbers; those that blocks share in the first."""
    prefix, modules = find_blocks(model)
    for index in blocks:
        for spec in _block_linears(modules[index], f"{prefix}.{index}", index):
            if not is_tied(model, spec.name):
                yield spec


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
    """Raises InputError where a selected linear has a weight that another linear has too.

    What the model declares is no error: transformers ties such weights again when it loads them.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module) and not is_tied(model, name):
            names.setdefault(id(module.weight), []).append(name)
    for spec in selected:
        sharing = names.get(id(model.get_submodule(spec.name).weight), [])
        if len(sharing) > 1:
            raise InputError(
                f"{sharing[0]} and {sharing[1]} are one weight of {type(model).__name__}, and "
                "shared layers cannot be compressed: leave them out, such as with "
                f"--exclude {_pattern_around(spec.name)!r}"
            )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's blocks.

    They are the ModuleList of num_hidden_layers entries that stands closest to the token embedding,
    so that those of encoders are none; of several, that with the most parameters. Raises InputError
    where there is none.
    """
    config: Any = model.config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    for prefix in _around_embedding(model):
        lists = {
            name: module
            for name, module in model.get_submodule(prefix).named_modules(prefix=prefix)
            if isinstance(module, nn.ModuleList) and len(module) == depth
        }
        if lists:
            return max(lists.items(), key=lambda item: parameter_count(item[1]))
    raise InputError(
        f"unsupported model: {config.model_type!r} has no list of {depth} transformer blocks"
    )


def _around_embedding(model: Any) -> Iterator[str]:
    """Names of the modules that hold the token embedding, the innermost first; "" is the model."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        yield name


def _block_linears(block: nn.Module, prefix: str, index: int) -> Iterator[LinearSpec]:
    """The linears of all FFNs in a block: those that every token uses, then those of experts."""
    modules = dict(block.named_modules(prefix=prefix))
    ffns = {path: layout for path, ffn in modules.items() if (layout := _layout(ffn))}
    mixtures = {path: _mixture(path, modules) for path in ffns}
    for path in sorted(ffns, key=lambda path: mixtures[path] != ""):
        channelwise = _is_channelwise(modules[path], ffns[path])
        for child, role in ffns[path].items():
            name = f"{path}.{child}"
            group = name if role == "down" else path
            spec = _spec(modules[name], name, index, role, group, path)
            yield replace(spec, mixture=mixtures[path], channelwise=channelwise)


def _layout(module: nn.Module) -> dict[str, Role]:
    """The row of LAYOUTS of which every name is a linear in `module`; empty where there is none."""
    children = {name for name, child in module.named_children() if _is_any_linear(child)}
    return next((layout for layout in LAYOUTS if layout.keys() <= children), {})


def _mixture(path: str, modules: dict[str, nn.Module]) -> str:
    """The mixture of experts to which the FFN `path` belongs; empty where every token uses it."""
    siblings = path.rpartition(".")[0]
    mixture = siblings.removesuffix(f".{EXPERT_LIST}")
    is_list = isinstance(modules.get(siblings), nn.ModuleList)
    is_mixture = isinstance(modules.get(mixture), Experts) or mixture.endswith(f".{EXPERT_MODULES}")
    return mixture if is_list and is_mixture else ""


def _is_channelwise(ffn: nn.Module, layout: dict[str, Role]) -> bool:
    """Whether everything between the linears of `ffn` acts on each intermediate channel by itself.

    Any other tensor with as many features as there are channels, or as gate and up have in one
    matrix, such as that of a norm or of an adapter, could act on several.
    """
    linears = {role: ffn.get_submodule(child) for child, role in layout.items()}
    in_linears = {id(p) for linear in linears.values() for p in linear.parameters()}
    channels = linear_shape(linears["down"])[1]
    others = (p for p in ffn.parameters() if id(p) not in in_linears)
    return not any(getattr(ffn, name, 0) for name in MIXES_CHANNELS) and not any(
        {channels, 2 * channels} & set(tensor.shape) for tensor in others
    )


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
    specs = {
        name: ffn_specs.get(name) or _guessed_spec(linear, name, block)
        for name, linear, block in _linears_in_blocks(model)
    }
    _check_patterns(include, "include", specs)
    return tuple(spec for name, spec in specs.items() if any(fnmatchcase(name, p) for p in include))


def _linears_in_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, module and number of the block of every linear in the blocks."""
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name, module in block.named_modules(prefix=f"{prefix}.{index}"):
            if _is_any_linear(module) and not is_tied(model, name):
                yield name, module, index


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
    """Names of expert weights that are not those of linears."""
    for path, module in model.named_modules():
        is_expert = "expert" in path or "expert" in type(module).__name__.lower()
        if is_expert and not _is_any_linear(module):
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                is_matrix = parameter.ndim == 2 and not name.endswith(("weight", "bias"))
                if parameter.ndim == 3 or is_matrix:
                    yield name


def has_experts(model: nn.Module) -> bool:
    """Whether the model has mixtures of experts, fused or as lists of linears."""
    unfused = any(spec.mixture for spec in find_ffns(model).linears)
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
    return no_ffns(model)


def no_ffns(model: Any) -> str:
    """The error text for a model without known FFNs, with a pattern for its largest linears."""
    text = f"unsupported model: no feed-forward linears known for {model.config.model_type!r}"
    sizes = {name: linear_shape(linear) for name, linear, _ in _linears_in_blocks(model)}
    if not sizes:
        return f"{text}, and its blocks have no linears"
    largest = max(sizes, key=lambda name: (not ATTENTION.search(name), *sizes[name]))
    return f"{text}: name them with --include, such as --include {_pattern_around(largest)!r}"


def _pattern_around(name: str) -> str:
    """A pattern for the linear called `name` and those beside it, in every block."""
    *_, parent, child = name.split(".")
    return f"*.{child}" if parent.isdecimal() else f"*.{parent}.*"
