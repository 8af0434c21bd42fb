"""The blocks of a model, each run by itself as the model runs it."""

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

Extras = tuple[tuple[Any, ...], dict[str, Any]]
Forward = Callable[..., Any]
# what blocks may be given that is no tensor: anything else could carry state from block to block
PLAIN = (type(None), bool, int, float, str)


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass at the point of interest."""


@dataclass
class BlockOutput:
    """One pass of one sample through a block: its output, and what some linears read and gave."""

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class BlockRunner:
    """The blocks of `model`, and what each is given beside hidden states: masks and positions.

    That is found with two of the `tokens` (samples, length); the first block alone has to hold its
    weights for it. Raises InputError unless every block is given the same for every sample. Hidden
    states are computed in `dtype`, by default the model's own.
    """

    def __init__(self, model: Any, tokens: Tensor, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        self.blocks = list(find_blocks(model)[1])
        self.gives_tuple = self._gives_tuple(tokens[0])
        self.extras = self._extras(tokens[0])
        if len(tokens) > 1:
            self._check(self._extras(tokens[1]))

    def _cast(self, found: Any) -> Any:
        if self.dtype is None:
            return found
        return tree_map_only(
            Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, found
        )

    def embedded(self, sample: Tensor) -> Tensor:
        """The hidden states (1, length, width) in front of the first block."""
        return self._cast(self._first_call(sample)[0])  # type: ignore[no-any-return]

    def _first_call(self, sample: Tensor) -> tuple[Tensor, Extras]:
        found: list[tuple[Tensor, Extras]] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append(_split(arguments, keywords))
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run_base(sample)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]

    def _run_base(self, sample: Tensor) -> None:
        self.model.base_model(input_ids=sample[None].to(self.model.device), use_cache=False)

    @torch.no_grad()
    def _gives_tuple(self, sample: Tensor) -> bool:
        hidden, (arguments, keywords) = self._first_call(sample)
        return not isinstance(self.blocks[0](hidden, *arguments, **keywords), Tensor)

    @torch.no_grad()
    def _extras(self, sample: Tensor) -> dict[int, Extras]:
        found: dict[int, Extras] = {}
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                hook = self._recorder(index, found)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            with self._passing_on():
                self._run_base(sample)
        return found

    def _recorder(self, index: int, found: dict[int, Extras]) -> Callable[..., None]:
        def record(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found[index] = self._cast(_split(arguments, keywords)[1])

        return record

    def _check(self, other: dict[int, Extras]) -> None:
        for index in range(len(self.blocks)):
            if index not in self.extras or not _equal(self.extras[index], other[index]):
                raise InputError(
                    f"block {index} is given more than its hidden states, or is passed over: "
                    "leave out --refine, --sequential anchored and --streaming for this family"
                )

    @contextmanager
    def _passing_on(self, last: Tensor | None = None) -> Iterator[None]:
        """The blocks do nothing; the last gives `last`, if that is there."""

        def passing(index: int, _: Forward) -> Forward:
            def run(*arguments: Any, **keywords: Any) -> Any:
                hidden = _split(arguments, keywords)[0]
                if last is not None and index == len(self.blocks) - 1:
                    hidden = last
                return (hidden,) if self.gives_tuple else hidden

            return run

        with replaced_forwards(self.blocks, passing):
            yield

    def run(
        self, block: int, hidden: Tensor, reads: Sequence[str] = (), gives: Sequence[str] = ()
    ) -> BlockOutput:
        """Block number `block` on one sample's hidden states (1, length, width).

        The inputs of the linears that `reads` names are kept, and the outputs of those in `gives`.
        """
        seen = BlockOutput(hidden, {}, {})
        with ExitStack() as stack:
            for name in {*reads, *gives}:
                hook = _keep(seen, name, name in reads, name in gives)
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            arguments, keywords = self.extras[block]
            output = self.blocks[block](hidden, *arguments, **keywords)
        seen.output = output if isinstance(output, Tensor) else output[0]
        return seen

    def read_by(self, name: str, block: int, hidden: Tensor) -> Tensor:
        """What the linear `name` of a block reads; the block is run no further."""
        found: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found.append(arguments[0])
            raise _Reached

        hook = self.model.get_submodule(name).register_forward_pre_hook(stop)
        try:
            self.run(block, hidden)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]

    @torch.enable_grad()
    def score_gradient(self, hidden: Tensor, sample: Tensor, seed: int) -> Tensor:
        """The gradient in `hidden`, the output of the last block, by the chain rule from
        `sample_score_gradients`."""
        leaf = hidden.detach().requires_grad_(True)
        with self._passing_on(leaf):
            logits = logits_of(self.model, sample[None])
            return torch.autograd.grad(logits, leaf, sample_score_gradients(logits.detach(), seed))[
                0
            ]

    @torch.enable_grad()
    def input_gradient(self, block: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to a block's input, from that to its output."""
        leaf = hidden.detach().requires_grad_(True)
        output = self.run(block, leaf).output
        return torch.autograd.grad(output, leaf, gradient)[0]


def logits_of(model: Any, sample: Tensor) -> Tensor:
    """(length, vocabulary) of one sample (1, length)."""
    logits: Tensor = model(input_ids=sample.to(model.device), use_cache=False).logits[0]
    return logits


@contextmanager
def replaced_forwards(
    blocks: Sequence[nn.Module], make: Callable[[int, Forward], Forward]
) -> Iterator[None]:
    """`make` gives the `forward` of each block from its number and its own `forward`."""
    before = [vars(block).get("forward") for block in blocks]  # accelerate sets one of its own
    for index, block in enumerate(blocks):
        block.forward = make(index, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _split(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, Extras]:
    """The hidden states that a block is given, and the rest."""
    if arguments:
        return arguments[0], (arguments[1:], dict(keywords))
    others = {key: value for key, value in keywords.items() if key != "hidden_states"}
    return keywords["hidden_states"], ((), others)


def _equal(first: Extras, second: Extras) -> bool:
    ones, others = tree_leaves(first), tree_leaves(second)
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return isinstance(one, PLAIN) and one == other


def _keep(seen: BlockOutput, name: str, reads: bool, gives: bool) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if reads:
            seen.inputs[name] = arguments[0]
        if gives:
            seen.outputs[name] = output.clone()  # some families add to it in place

    return hook


# tokens whose predictions are held at a time
ROWS = 128


def sample_score_gradients(logits: Tensor, seed: int) -> Tensor:
    """A random u for every token of `logits` (tokens, vocabulary), with E u uᵀ = diag(p) - p pᵀ.

    p are the model's own predictions, the softmax of the logits, and diag(p) - p pᵀ is their Fisher
    matrix, the Hessian of the divergence from them. So what u becomes by the chain rule in some
    layer's output has that output's Fisher matrix as second moment. The gradient of a label drawn
    from p has it too (Martens and Grosse 2015, arXiv 1503.05671, section 5), but tells of one
    label; u = z - p sum(z), z normal with variance p, tells of all. The gradient of the text's own
    label (the empirical Fisher matrix) weighs most the tokens that surprise the model most.
    """
    generator = torch.Generator(logits.device).manual_seed(seed)
    scores = torch.empty_like(logits)
    for rows, found in zip(torch.split(logits, ROWS), torch.split(scores, ROWS), strict=True):
        p = rows.float().softmax(-1)
        z = torch.empty_like(p).normal_(generator=generator) * p.sqrt()
        found.copy_(z - p * z.sum(-1, keepdim=True))
    return scores
