"""Hidden states of a text in front of one block at a time, dense and compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lrcompress.ffn import find_blocks
from lrcompress.protocols import InputError

Extras = tuple[tuple[Any, ...], dict[str, Any]]
# what blocks may be given that is no tensor: anything else could carry state from block to block
PLAIN = (type(None), bool, int, float, str)


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass at the point of interest."""


@dataclass
class Pass:
    """One pass of one sample through a block: its output, and what some linears read and gave."""

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Streams:
    """The hidden states of every sample in front of one block, dense and compressed.

    Both start at the embedding of `tokens` (samples, length); whoever walks through the blocks
    moves them on. States are kept in `dtype`, by default the model's own.
    """

    def __init__(self, model: Any, tokens: Tensor, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.dtype = dtype
        self.dense = [self._embedded(sample[None].to(model.device)) for sample in tokens]
        self.compressed = list(self.dense)
        self.extras = self._extras(tokens[0])
        if len(tokens) > 1:
            self._check(self._extras(tokens[1]))

    def _cast(self, found: Any) -> Any:
        if self.dtype is None:
            return found
        return tree_map_only(
            Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, found
        )

    def _embedded(self, sample: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model.base_model(input_ids=sample, use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return self._cast(found[0])  # type: ignore[no-any-return]

    def _extras(self, sample: Tensor) -> dict[int, Extras]:
        """What each block is given beside hidden states: masks and positions."""
        found: dict[int, Extras] = {}
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                hook = self._recorder(index, found)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            self.model.base_model(input_ids=sample[None].to(self.model.device), use_cache=False)
        return found

    def _recorder(self, index: int, found: dict[int, Extras]) -> Callable[..., None]:
        def record(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            others = {key: value for key, value in keywords.items() if key != "hidden_states"}
            found[index] = self._cast((arguments[1:], others))

        return record

    def _check(self, other: dict[int, Extras]) -> None:
        """Raises InputError unless every block is given the same for another sample."""
        for index in range(len(self.blocks)):
            if index not in self.extras or not _equal(self.extras[index], other[index]):
                raise InputError(
                    f"block {index} is given more than its hidden states, or is passed over: "
                    "leave out --refine and --sequential anchored for this family"
                )

    def run(
        self, block: int, hidden: Tensor, reads: Sequence[str] = (), gives: Sequence[str] = ()
    ) -> Pass:
        """Block number `block` on one sample's hidden states (1, length, width).

        The inputs of the linears that `reads` names are kept, and the outputs of those in `gives`.
        """
        seen = Pass(hidden, {}, {})
        with ExitStack() as stack:
            for name in {*reads, *gives}:
                hook = _keep(seen, name, name in reads, name in gives)
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            arguments, keywords = self.extras[block]
            output = self.blocks[block](hidden, *arguments, **keywords)
        seen.output = output[0] if isinstance(output, tuple) else output
        return seen

    def adds_to_residual(self, block: int, name: str) -> bool:
        """Whether the linear's output reaches the block's output unchanged; shown by a shift.

        It is as large as what it is added to, so that rounding in low precision does not hide it.
        """
        module = self.model.get_submodule(name)
        plain = self.run(block, self.compressed[0], gives=(name,))
        shift = torch.maximum(plain.outputs[name].abs().mean(), plain.output.abs().mean())
        hook = module.register_forward_hook(lambda _, __, output: output + shift)
        try:
            moved = self.run(block, self.compressed[0]).output
        finally:
            hook.remove()
        difference = (moved - plain.output) / shift - 1
        return float(difference.abs().mean()) < 1e-2


def _equal(first: Extras, second: Extras) -> bool:
    ones, others = tree_leaves(first), tree_leaves(second)
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return isinstance(one, PLAIN) and one == other


def _keep(seen: Pass, name: str, reads: bool, gives: bool) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if reads:
            seen.inputs[name] = arguments[0]
        if gives:
            seen.outputs[name] = output.clone()  # some families add to it in place

    return hook


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Weights of lower precision in float32; those that did not change come back bit for bit."""
    before = [
        (tensor, tensor.dtype)
        for tensor in (*block.parameters(), *block.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)
