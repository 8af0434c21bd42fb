"""Compares models block by block: each block gets the input that the first model's block gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.data.corpora import Corpus
from lrcompress.data.windows import Window, Windowing, corpus_windows
from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.layers.token_ids import check_token_ids
from lrcompress.models.loading import Loaded
from lrcompress.reporting.differences import BlockChange
from lrcompress.runtime.progress import Progress, silent


def block_changes(
    models: Mapping[str, Loaded],
    corpus: Corpus,
    windowing: Windowing,
    progress: Progress = silent,
) -> list[BlockChange]:
    """The error of every block of each later model against the first model (see `BlockChange`).

    Later models whose blocks are of other classes or sizes are left out.
    """
    (baseline, (first, tokenizer)), *later = models.items()
    others = {label: model for label, (model, _) in later if _is_comparable(first, model)}
    if not others:
        return []
    windows = corpus_windows(corpus, tokenizer, windowing)
    sums = {label: [0.0] * len(find_blocks(first)[1]) for label in others}
    for window in progress(windows, "Comparing blocks", len(windows)):
        _add_errors(first, others, window, sums)
    tokens = sum(len(window.tokens) for window in windows)
    return [
        BlockChange(
            baseline=baseline,
            model=label,
            data=corpus.spec,
            tokens=tokens,
            errors=tuple(total / tokens for total in totals),
        )
        for label, totals in sums.items()
    ]


def _is_comparable(first: Any, other: Any) -> bool:
    """Whether the blocks of `other` accept the inputs of the blocks of `first`."""
    blocks, other_blocks = find_blocks(first)[1], find_blocks(other)[1]
    same_classes = [type(block) for block in blocks] == [type(block) for block in other_blocks]
    devices = {parameter.device for model in (first, other) for parameter in model.parameters()}
    hidden_sizes = {model.config.get_text_config().hidden_size for model in (first, other)}
    return same_classes and len(blocks) > 0 and len(devices) == 1 and len(hidden_sizes) == 1


@torch.no_grad()
def _add_errors(
    first: Any, others: Mapping[str, Any], window: Window, sums: dict[str, list[float]]
) -> None:
    """Adds every block's error, summed over the tokens of `window`, to `sums[label][block]`."""
    with ExitStack() as stack:
        for index, block in enumerate(find_blocks(first)[1]):
            other_blocks = {label: find_blocks(model)[1][index] for label, model in others.items()}
            hook = _BlockComparison(index, other_blocks, sums)
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        check_token_ids(first, window.tokens)
        first(input_ids=window.tokens[None].to(first.device), use_cache=False)


class _BlockComparison:
    """Forward hook of a block of the first model: runs the other models' blocks on its input."""

    def __init__(
        self, index: int, blocks: Mapping[str, nn.Module], sums: dict[str, list[float]]
    ) -> None:
        self.index, self.blocks, self.sums = index, blocks, sums

    def __call__(
        self, _: nn.Module, arguments: Sequence[Any], keywords: dict[str, Any], output: Any
    ) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        baseline_output = _hidden_states(output)
        for label, block in self.blocks.items():
            block_output = _hidden_states(block(*arguments, **keywords))
            self.sums[label][self.index] += _relative_error(hidden, baseline_output, block_output)


def _hidden_states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _relative_error(hidden: Tensor, baseline: Tensor, output: Tensor) -> float:
    """Sum over tokens of ||output - baseline||^2 / ||baseline - hidden||^2.

    All tensors have shape (..., hidden size). A token whose outputs are equal counts 0, also where
    the denominator is 0.
    """
    baseline, output, hidden = baseline.double(), output.double(), hidden.double()
    error = (output - baseline).square().sum(-1)
    energy = (baseline - hidden).square().sum(-1)
    return float(torch.where(error > 0, error / energy.clamp_min(1e-30), 0.0).sum())
