"""Where in a model it differs from another: each block on what the other's block is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.data.corpora import Corpus
from lrcompress.data.windows import Window, corpus_windows
from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.reporting.differences import BlockChange
from lrcompress.runtime.progress import Progress, silent


def block_changes(
    models: Mapping[str, tuple[Any, Any]],
    corpus: Corpus,
    length: int,
    limit: int | None = None,
    progress: Progress = silent,
) -> list[BlockChange]:
    """Of every later model that is built like the first one."""
    (baseline, (first, tokenizer)), *later = models.items()
    others = {label: model for label, (model, _) in later if _alike(first, model)}
    if not others:
        return []
    chosen = corpus_windows(corpus, tokenizer, length, None, limit)
    sums = {label: [0.0] * len(find_blocks(first)[1]) for label in others}
    for window in progress(chosen, "Comparing blocks", len(chosen)):
        _add(first, others, window, sums)
    tokens = sum(len(window.tokens) for window in chosen)
    return [
        BlockChange(baseline, label, corpus.spec, tokens, tuple(total / tokens for total in found))
        for label, found in sums.items()
    ]


def _alike(first: Any, other: Any) -> bool:
    """Whether a block of `other` understands what one of `first` is given."""
    ours, theirs = find_blocks(first)[1], find_blocks(other)[1]
    kinds = [type(block) for block in ours] == [type(block) for block in theirs]
    places = {parameter.device for model in (first, other) for parameter in model.parameters()}
    wide = [model.config.get_text_config().hidden_size for model in (first, other)]
    return kinds and len(ours) > 0 and len(places) == 1 and wide[0] == wide[1]


@torch.no_grad()
def _add(
    first: Any, others: Mapping[str, Any], window: Window, sums: dict[str, list[float]]
) -> None:
    """Adds the errors of every block, summed over the window's tokens, to `sums`."""
    with ExitStack() as stack:
        for index, block in enumerate(find_blocks(first)[1]):
            beside = {label: find_blocks(model)[1][index] for label, model in others.items()}
            hook = _Beside(index, beside, sums)
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        first(input_ids=window.tokens[None].to(first.device), use_cache=False)


class _Beside:
    """Runs the blocks of other models on what a block of the first one was given."""

    def __init__(
        self, index: int, blocks: Mapping[str, nn.Module], sums: dict[str, list[float]]
    ) -> None:
        self.index, self.blocks, self.sums = index, blocks, sums

    def __call__(
        self, _: nn.Module, arguments: Sequence[Any], keywords: dict[str, Any], output: Any
    ) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        ours = _tensor(output)
        for label, block in self.blocks.items():
            theirs = _tensor(block(*arguments, **keywords))
            self.sums[label][self.index] += _error(hidden, ours, theirs)


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _error(hidden: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """||theirs - ours||^2 / ||ours - hidden||^2 of each token, summed; 0 where nothing differs."""
    ours, theirs, hidden = ours.double(), theirs.double(), hidden.double()
    error, energy = (theirs - ours).square().sum(-1), (ours - hidden).square().sum(-1)
    return float(torch.where(error > 0, error / energy.clamp_min(1e-30), 0.0).sum())
