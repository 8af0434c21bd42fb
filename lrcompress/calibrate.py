"""One pass over calibration tokens: second moments of the inputs of every input group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.linalg import to_float64
from lrcompress.protocols import InputError, LinearSpec, Progress, Statistics, silent


class SecondMoments:
    """Running sums of x xᵀ per input group, float32 products accumulated in float64."""

    def __init__(self, linears: Sequence[LinearSpec]) -> None:
        # linears of one group read the same input, so one of them is watched
        self.watched = {spec.input_group: spec.name for spec in reversed(linears)}
        self.sums: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(self.watched, 0)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(group))
            for group, name in self.watched.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, group: str) -> Any:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).float()
            product = to_float64(x.T @ x)
            if group in self.sums:
                self.sums[group] += product
            else:
                self.sums[group] = product
            self.counts[group] += len(x)

        return add

    def statistics(self, linear: LinearSpec) -> Statistics:
        """The mean of x xᵀ for `linear`. Raises InputError where it is not finite."""
        group = linear.input_group
        if group not in self.sums:
            raise InputError(f"calibration never reached {linear.name}: exclude it by name")
        moment = self.sums[group] / self.counts[group]
        if not bool(moment.isfinite().all()):
            raise InputError(
                f"the input of {linear.name} is not finite: calibrate with --dtype float32"
            )
        return Statistics(second_moment=moment)


@torch.no_grad()
def second_moments(
    model: Any, linears: Sequence[LinearSpec], tokens: Tensor, progress: Progress = silent
) -> SecondMoments:
    """Runs `tokens` (samples, length) through the model without its head, one sample at a time."""
    moments = SecondMoments(linears)
    training = model.training
    model.eval()
    with moments.watching(model):
        for sample in progress(tokens, "Calibrating", len(tokens)):
            model.base_model(input_ids=sample[None].to(model.device), use_cache=False)
    model.train(training)
    return moments
