"""One pass over calibration tokens: moments of the linears' inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrcompress.compression.calibration.probes import Probe, ProbeErrors, held_out
from lrcompress.compression.calibration.token_sums import TokenSums, zeros
from lrcompress.layers.block_runner import (
    Forward,
    logits_of,
    replaced_forwards,
    sample_score_gradients,
)
from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.layers.model_state import evaluation_mode, only_trainable
from lrcompress.layers.moe import unpacked
from lrcompress.methods.types import LinearSpec, Statistics
from lrcompress.runtime.distributed import shard_of
from lrcompress.runtime.errors import InputError, NotFiniteError
from lrcompress.runtime.progress import Progress, silent

# columns that a product of moments takes at a time
COLUMNS = 384


class Moments:
    """Running sums of x xᵀ per input group and, with `gradients`, of g gᵀ per linear.

    Products are taken in float32, of the upper triangle alone. Sums of x xᵀ are kept in float64;
    those of g gᵀ, which only weigh errors, in float32, at half the memory. What an expert lacks to
    as many tokens as it has features is made up for by the mean of its mixture.
    """

    def __init__(self, linears: Sequence[LinearSpec], gradients: bool) -> None:
        # linears of one group read the same input, so one of them is watched
        self.watched = {spec.input_group: spec.name for spec in reversed(linears)}
        self.outputs = [spec.name for spec in linears] if gradients else []
        self.mixtures = _mixtures(linears)
        self.sums, self.gradient_sums = TokenSums(), TokenSums()
        self.tokens = self.gradient_tokens = 0
        self.backward = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for group, name in self.watched.items():
                hook = model.get_submodule(name).register_forward_pre_hook(self._input(group))
                stack.callback(hook.remove)
            for name in self.outputs:
                hook = model.get_submodule(name).register_forward_hook(self._output(name))
                stack.callback(hook.remove)
            yield

    def _input(self, group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if not self.backward:  # gradient checkpointing runs the forward pass once more
                _add(self.sums, group, arguments[0], torch.float64)

        return add

    def _output(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and not self.backward:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda g: _add(self.gradient_sums, name, g, torch.float32)
                )

        return watch

    def add_up(self, linears: Sequence[LinearSpec], device: torch.device) -> None:
        """Sums over all processes in place of those over the samples of this one."""
        inputs = {spec.input_group: spec.in_features for spec in linears}
        outputs = {spec.name: spec.out_features for spec in linears}
        self.sums.add_up(inputs, torch.float64, device)
        self.gradient_sums.add_up(outputs, torch.float32, device)

    def statistics(self, linear: LinearSpec) -> Statistics:
        """The moments of `linear`. Raises InputError where one is missing or not finite."""
        group = linear.input_group
        if linear.mixture:
            parts = [spec.input_group for spec in self._alike(linear)]
            hidden = linear.role != "down"
            found = self.sums.filled_up(group, parts, linear.in_features, alike=hidden)
        elif group in self.sums.of:
            found = self.sums.of[group]
        else:
            raise InputError(f"calibration never reached {linear.name}: exclude it by name")
        moment = _symmetric(found) / self.tokens
        return Statistics(_finite(moment, "input", linear), self.gradient(linear))

    def gradient(self, linear: LinearSpec) -> Tensor | None:
        """The gradient moment of `linear` if it was measured.

        That of an expert is a mean over its own tokens: that few come is in its input's moment.
        """
        name, sums = linear.name, self.gradient_sums
        if linear.mixture and self.outputs:
            size, parts = linear.out_features, [spec.name for spec in self._alike(linear)]
            found = sums.filled_up(name, parts, size, alike=linear.role == "down")
            tokens = max(sums.count(name), size)
        elif name in sums.of:
            found, tokens = sums.of[name], self.gradient_tokens
        else:
            return None
        return _finite(_symmetric(found) / tokens, "output gradient", linear)

    def _alike(self, linear: LinearSpec) -> list[LinearSpec]:
        """The linears of its role in all experts of its mixture."""
        return self.mixtures[linear.mixture, linear.role]

    def scarce(self) -> list[tuple[str, int]]:
        """The experts that fewer tokens reached than they have inputs, and how many did."""
        reads = [s for (_, role), specs in self.mixtures.items() if role != "down" for s in specs]
        counts = [(spec, self.sums.count(spec.input_group)) for spec in reads]
        return [(spec.ffn, tokens) for spec, tokens in counts if tokens < spec.in_features]


def _mixtures(linears: Sequence[LinearSpec]) -> dict[tuple[str, str], list[LinearSpec]]:
    found: dict[tuple[str, str], list[LinearSpec]] = {}
    for spec in linears:
        if spec.mixture:
            found.setdefault((spec.mixture, spec.role), []).append(spec)
    return found


def _finite(moment: Tensor, what: str, linear: LinearSpec) -> Tensor:
    if not bool(moment.isfinite().all()):
        raise NotFiniteError(
            f"the {what} of {linear.name} is not finite: calibrate with --dtype float32"
        )
    return moment


def _add(sums: TokenSums, key: str, rows: Tensor, dtype: torch.dtype) -> None:
    """Adds v vᵀ over the tokens of v (..., features): the blocks on and above the diagonal."""
    v = rows.detach().flatten(0, -2).float()
    size = v.shape[1]
    if key not in sums.of:
        sums.of[key], sums.tokens[key] = zeros(size, dtype, v.device), torch.tensor(0)
    total = sums.of[key]
    sums.tokens[key] += len(v)
    for begin in range(0, size, COLUMNS):
        product = v[:, begin : begin + COLUMNS].T @ v[:, begin:]
        total[begin : begin + COLUMNS, begin:] += product.to(total.device)


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T


def measure_moments(
    model: Any,
    linears: Sequence[LinearSpec],
    tokens: Tensor,
    gradient_samples: int = 0,
    progress: Progress = silent,
) -> Moments:
    """Runs `tokens` (samples, length) through the model, one sample at a time.

    In the first `gradient_samples` of them a backward pass of `drawn_scores` follows the forward
    pass; blocks are checkpointed, parameters get no gradients and stay as they are. Several
    processes share the samples, and all get the sums.
    """
    samples, length = tokens.shape
    gradient_samples = min(gradient_samples, samples)
    moments, own = Moments(linears, gradient_samples > 0), shard_of(range(samples))
    with unpacked(model), evaluation_mode(model), moments.watching(model):
        for index in progress(own, "Calibrating", len(own)):
            batch = tokens[index][None].to(model.device)
            if index < gradient_samples:
                _with_gradients(model, batch, moments, seed=index)
            else:
                _forward(model, batch)
    moments.add_up(linears, model.device)
    moments.tokens, moments.gradient_tokens = samples * length, gradient_samples * length
    return moments


def measure_errors(
    model: Any, probes: Sequence[Probe], tokens: Tensor, progress: Progress = silent
) -> dict[str, list[float]]:
    """Mean (gᵀ D h)² of each probe by the name of its linear, for each of the `tokens` (samples,
    length) that are held out."""
    samples, errors = held_out(len(tokens)), ProbeErrors(probes)
    with unpacked(model), evaluation_mode(model), errors.watching(model):
        for index in progress(samples, "Probing", len(samples)):
            errors.start()
            _with_gradients(model, tokens[index][None].to(model.device), errors, seed=index)
    return errors.means(tokens.shape[1])


@torch.no_grad()
def _forward(model: Any, sample: Tensor) -> None:
    model.base_model(input_ids=sample, use_cache=False)  # without the head


@torch.enable_grad()
def _with_gradients(model: Any, sample: Tensor, watching: Moments | ProbeErrors, seed: int) -> None:
    with (
        _gradients_of_activations(model),
        replaced_forwards(list(find_blocks(model)[1]), _checkpointing),
    ):
        logits = logits_of(model, sample)
        watching.backward = True
        try:
            logits.backward(sample_score_gradients(logits.detach(), seed))  # type: ignore[no-untyped-call]
        finally:
            watching.backward = False


@contextmanager
def _gradients_of_activations(model: Any) -> Iterator[None]:
    """No parameter takes a gradient; the embedded input does, so that there is a graph."""
    hook = model.get_input_embeddings().register_forward_hook(
        # a clone is no leaf, so that a family may scale its embedding in place
        lambda _, __, output: output.detach().requires_grad_(True).clone()
    )
    try:
        with only_trainable(model, ()):
            yield
    finally:
        hook.remove()


def _checkpointing(_: int, forward: Forward) -> Forward:
    """Keeps the activations of one block at a time; works in eval mode, unlike the model's own."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    return run
