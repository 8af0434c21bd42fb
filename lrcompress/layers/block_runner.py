"""Runs single transformer blocks of a model, with the arguments that the model gives them.

Also draws the output gradients whose second moment is the Fisher matrix, and passes them backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.runtime.errors import InputError

# a block's arguments beside the hidden states: positional ones and keywords
BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]
Forward = Callable[..., Any]
# types of block arguments, beside tensors, that cannot carry state from one block to the next
STATELESS_TYPES = (type(None), bool, int, float, str)
# tokens whose logits are in memory at a time
TOKENS_PER_CHUNK = 128


class _ForwardStopped(Exception):  # noqa: N818
    """Ends a forward pass early, once the hook has what it needs."""


@dataclass
class BlockOutput:
    """One pass of one sample through a block.

    `output` is (1, length, width); `inputs` and `outputs` are those of some linears, by name.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class BlockRunner:
    """Runs the blocks of `model` one at a time, in `dtype` (by default the model's own).

    The arguments beside the hidden states (masks, positions) are recorded with two of the `tokens`
    (samples, length); only the first block needs its weights in memory for this. Raises InputError
    unless every block gets equal arguments for both samples.
    """

    def __init__(self, model: Any, tokens: Tensor, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        self.blocks = list(find_blocks(model)[1])
        self.tuple_length = self._tuple_length(tokens[0])
        self.arguments = self._record_arguments(tokens[0])
        if len(tokens) > 1:
            self._check_equal(self._record_arguments(tokens[1]))

    def _cast(self, values: Any) -> Any:
        if self.dtype is None:
            return values
        return tree_map_only(
            Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, values
        )

    def embedded(self, sample: Tensor) -> Tensor:
        """The hidden states (1, length, width) in front of the first block, of tokens (length,)."""
        return self._cast(self._first_call(sample)[0])  # type: ignore[no-any-return]

    def _first_call(self, sample: Tensor) -> tuple[Tensor, BlockArguments]:
        """Hidden states and other arguments of the first block; no block is run."""
        calls: list[tuple[Tensor, BlockArguments]] = []

        def record(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            calls.append(_split(arguments, keywords))
            raise _ForwardStopped

        hook = self.blocks[0].register_forward_pre_hook(record, with_kwargs=True)
        try:
            self._run_base(sample)
        except _ForwardStopped:
            pass
        finally:
            hook.remove()
        return calls[0]

    def _run_base(self, sample: Tensor) -> None:
        self.model.base_model(input_ids=sample[None].to(self.model.device), use_cache=False)

    @torch.no_grad()
    def _tuple_length(self, sample: Tensor) -> int:
        hidden, (arguments, keywords) = self._first_call(sample)
        return tuple_length(self.blocks[0](hidden, *arguments, **keywords))

    @torch.no_grad()
    def _record_arguments(self, sample: Tensor) -> dict[int, BlockArguments]:
        recorded: dict[int, BlockArguments] = {}
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                hook = self._recorder(index, recorded)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            with _identity_blocks(self.blocks, self.tuple_length):
                self._run_base(sample)
        return recorded

    def _recorder(self, index: int, recorded: dict[int, BlockArguments]) -> Callable[..., None]:
        def record(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            recorded[index] = self._cast(_split(arguments, keywords)[1])

        return record

    def _check_equal(self, other: dict[int, BlockArguments]) -> None:
        for index in range(len(self.blocks)):
            if index not in self.arguments or not _equal(self.arguments[index], other[index]):
                raise InputError(
                    f"block {index} gets arguments that differ between samples, or is not called: "
                    "use --sequential independent, without --refine and --streaming"
                )

    def run(
        self,
        block: int,
        hidden: Tensor,
        inputs_of: Sequence[str] = (),
        outputs_of: Sequence[str] = (),
    ) -> BlockOutput:
        """Runs block number `block` on one sample's hidden states (1, length, width).

        The result holds the inputs of the linears in `inputs_of`, and the outputs of those in
        `outputs_of`, by name.
        """
        result = BlockOutput(hidden, {}, {})
        with ExitStack() as stack:
            for name in {*inputs_of, *outputs_of}:
                hook = _linear_recorder(result, name, name in inputs_of, name in outputs_of)
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            arguments, keywords = self.arguments[block]
            output = self.blocks[block](hidden, *arguments, **keywords)
        result.output = output if isinstance(output, Tensor) else output[0]
        return result

    def input_of(self, name: str, block: int, hidden: Tensor) -> Tensor:
        """The input of the linear `name` in a block; the block stops there."""
        inputs: list[Tensor] = []

        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.append(arguments[0])
            raise _ForwardStopped

        hook = self.model.get_submodule(name).register_forward_pre_hook(record)
        try:
            self.run(block, hidden)
        except _ForwardStopped:
            pass
        finally:
            hook.remove()
        return inputs[0]

    def score_gradient(self, hidden: Tensor, sample: Tensor, seed: int) -> Tensor:
        """The function of this name, of `hidden` (1, length, width) for tokens (length,)."""
        return score_gradient(self.model, hidden, sample[None], seed, self.tuple_length)

    @torch.enable_grad()
    def input_gradient(self, block: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to the input `hidden` of a block, from that of its output."""
        leaf = hidden.detach().requires_grad_(True)
        output = self.run(block, leaf).output
        return torch.autograd.grad(output, leaf, gradient)[0]


def tuple_length(output: Any) -> int:
    """How many values a block returned in a tuple, hidden states first; 0 for a bare tensor."""
    return 0 if isinstance(output, Tensor) else len(output)


@torch.enable_grad()
def score_gradient(
    model: Any, hidden: Tensor, sample: Tensor, seed: int, tuple_length: int
) -> Tensor:
    """`sample_score_gradients` of the logits, passed back to `hidden`, the output of the last block
    (1, length, width) for the tokens `sample` (1, length).

    Logits are computed for TOKENS_PER_CHUNK tokens at a time: those of a whole sample would be the
    largest tensors of a calibration. `tuple_length` is that of what blocks return.
    """
    # on several devices, accelerate returns the logits to that of the tokens
    generator = torch.Generator(model.device).manual_seed(seed)
    blocks = list(find_blocks(model)[1])
    gradient = torch.empty_like(hidden)
    for start in range(0, hidden.shape[1], TOKENS_PER_CHUNK):
        part = slice(start, start + TOKENS_PER_CHUNK)
        leaf = hidden[:, part].detach().requires_grad_(True)
        with _identity_blocks(blocks, tuple_length, leaf):
            tokens = sample[:, part].to(model.device)
            logits = model(input_ids=tokens, use_cache=False).logits
        scores = sample_score_gradients(logits.detach(), generator)
        gradient[:, part] = torch.autograd.grad(logits, leaf, scores)[0]
    return gradient


@contextmanager
def _identity_blocks(
    blocks: Sequence[nn.Module], tuple_length: int, last_output: Tensor | None = None
) -> Iterator[None]:
    """Inside, blocks return their input; the last returns `last_output` where it is given."""

    def make_identity(index: int, _: Forward) -> Forward:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            hidden = _split(arguments, keywords)[0]
            if last_output is not None and index == len(blocks) - 1:
                hidden = last_output
            return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden

        return forward

    with replaced_forwards(blocks, make_identity):
        yield


@contextmanager
def replaced_forwards(
    blocks: Sequence[nn.Module], make_forward: Callable[[int, Forward], Forward]
) -> Iterator[None]:
    """Inside, block `index` runs `make_forward(index, its own forward)` as its `forward`."""
    # accelerate may have set a `forward` on the instance
    instance_forwards = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = make_forward(index, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, instance_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _split(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, BlockArguments]:
    """Separates the hidden states from a block's other arguments."""
    if arguments:
        return arguments[0], (arguments[1:], dict(keywords))
    others = {key: value for key, value in keywords.items() if key != "hidden_states"}
    return keywords["hidden_states"], ((), others)


def _equal(first: BlockArguments, second: BlockArguments) -> bool:
    first_leaves, second_leaves = tree_leaves(first), tree_leaves(second)
    return len(first_leaves) == len(second_leaves) and all(
        map(_equal_values, first_leaves, second_leaves)
    )


def _equal_values(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    return isinstance(first, STATELESS_TYPES) and first == second


def _linear_recorder(
    result: BlockOutput, name: str, record_input: bool, record_output: bool
) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if record_input:
            result.inputs[name] = arguments[0]
        if record_output:
            result.outputs[name] = output.clone()  # some families change it in place later

    return hook


def sample_score_gradients(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a random u for every token of `logits` (..., vocabulary), E u uᵀ = diag(p) - p pᵀ.

    p = softmax(logits) are the model's own predictions, and diag(p) - p pᵀ is their Fisher matrix:
    the Hessian of the KL divergence from p. Passed backward to the output of any layer, u therefore
    has that output's Fisher matrix as its second moment. The gradient of one label drawn from p has
    the same second moment (Martens and Grosse 2015, arXiv 1503.05671, section 5) with more noise;
    here u = z - p sum(z), with z normal of variance p, covers all labels at once. The gradient of
    the text's own label (the empirical Fisher matrix) would give most weight to the tokens that the
    model predicts worst.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    z = torch.empty_like(p).normal_(generator=generator).mul_(p.sqrt())
    return z.addcmul_(p, z.sum(-1, keepdim=True), value=-1).to(logits.dtype)
