"""Moments of the linears' inputs and output gradients, from one pass over calibration tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrcompress.compression.calibration.activations import kept_blocks
from lrcompress.compression.calibration.outliers import OutlierRows, outlier_rows
from lrcompress.compression.calibration.probes import Probe, ProbeErrors, held_out
from lrcompress.compression.calibration.token_sums import TokenSums
from lrcompress.data.packing import IGNORED
from lrcompress.layers.bfloat16_linears import bfloat16_linears
from lrcompress.layers.block_runner import (
    Forward,
    replaced_forwards,
    score_gradient,
    tuple_length,
)
from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.layers.model_state import (
    evaluation_mode,
    only_trainable,
)
from lrcompress.layers.moe import unpacked
from lrcompress.methods.types import LinearSpec, OutlierShares, Statistics
from lrcompress.runtime.distributed import shard_of
from lrcompress.runtime.errors import InputError, NotFiniteError
from lrcompress.runtime.progress import Progress, silent
from lrcompress.runtime.stage_costs import stage


class MomentCollector:
    """Hooks that sum x xᵀ per input group and, with `gradients`, g gᵀ per linear.

    x are the inputs, g the gradients of the outputs. Sums of x xᵀ are kept in float64; those of
    g gᵀ, which only weigh errors, in float32, at half the memory. Outliers are kept apart: what the
    sums of x xᵀ leave out, and the inputs of tokens whose gradients are outliers.
    """

    def __init__(self, linears: Sequence[LinearSpec], gradients: bool) -> None:
        self.linears, self.gradients = linears, gradients
        self.input_sums = TokenSums(torch.float64)
        self.gradient_sums = TokenSums(torch.float32)
        self.input_outliers, self.gradient_outliers = OutlierRows(), OutlierRows()
        self.readers = Counter(spec.input_group for spec in linears)

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Sums forward passes of `model` inside; their backward passes may follow outside."""
        # the linears of a group read the same input: one of them gets a hook
        readers = {spec.input_group: spec.name for spec in reversed(self.linears)}
        with ExitStack() as stack:
            for group, name in readers.items():
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._input_hook(group)).remove)
            for spec in self.linears if self.gradients else ():
                module = model.get_submodule(spec.name)
                stack.callback(module.register_forward_hook(self._output_hook(spec)).remove)
            yield

    def _input_hook(self, group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = _by_token(arguments[0])
            norms = x.norm(dim=1)
            scales = self.input_sums.add(group, x, norms)
            self.input_outliers.add(group, outlier_rows(x, 1 - scales.square(), norms))

        return add_input

    def _output_hook(
        self, spec: LinearSpec
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Weighs inputs by what clipping takes from ‖g‖², so that no token counts for less.

        g gᵀ ⊗ x xᵀ of a token is that of the clipped g with the weight (‖g‖ / clipped ‖g‖)². One
        part of this weight is in the mean of x xᵀ, and the rest makes a row of the outliers.
        """

        def add_gradient(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                g, x = _by_token(gradient), _by_token(arguments[0])
                scales = self.gradient_sums.add(spec.name, g, g.norm(dim=1))
                weights = (scales.square().reciprocal() - 1) / self.readers[spec.input_group]
                rows = outlier_rows(x, weights, x.norm(dim=1))
                self.gradient_outliers.add(spec.input_group, rows)

            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return add_gradient

    def all_reduce(self, device: torch.device) -> None:
        """Replaces the sums over the samples of this process by those over all processes."""
        self.input_sums.all_reduce(
            {spec.input_group: spec.in_features for spec in self.linears}, device
        )
        self.gradient_sums.all_reduce(
            {spec.name: spec.out_features for spec in self.linears}, device
        )
        self.input_outliers.all_gather()
        self.gradient_outliers.all_gather()

    def statistics(self, tokens: int, gradient_tokens: int) -> MomentStatistics:
        """The mean moments over `tokens`, of which `gradient_tokens` have gradients."""
        return MomentStatistics(
            linears=tuple(self.linears),
            input_sums=self.input_sums,
            gradient_sums=self.gradient_sums,
            input_outliers=self.input_outliers,
            gradient_outliers=self.gradient_outliers,
            tokens=tokens,
            gradient_tokens=gradient_tokens,
        )


def _by_token(vectors: Tensor) -> Tensor:
    """`vectors` (..., features) as (tokens, features) in float32."""
    return vectors.detach().flatten(0, -2).float()


@dataclass(frozen=True)
class MomentStatistics:
    """Mean moments, read from finished sums over `tokens` and `gradient_tokens`.

    An expert that fewer tokens reached than it has features gets the mean of its mixture for the
    missing ones.
    """

    linears: tuple[LinearSpec, ...]
    input_sums: TokenSums
    gradient_sums: TokenSums
    input_outliers: OutlierRows
    gradient_outliers: OutlierRows
    tokens: int
    gradient_tokens: int

    def statistics(self, linear: LinearSpec) -> Statistics:
        """The moments of `linear`. Raises as `second_moment` and `gradient_moment` do."""
        return Statistics(
            second_moment=self.second_moment(linear),
            outlier_moment=self.outlier_moment(linear),
            gradient_moment=self.gradient_moment(linear),
            outlier_shares=self.outlier_shares(linear),
        )

    def outlier_shares(self, linear: LinearSpec) -> OutlierShares:
        """How much of the energy of inputs and gradients outliers have beyond their limits."""
        return OutlierShares(
            inputs=self.input_sums.outlier_share(linear.input_group),
            gradients=self.gradient_sums.outlier_share(linear.name),
        )

    def outlier_moment(self, linear: LinearSpec) -> Tensor | None:
        """The mean over tokens of what outliers add to x xᵀ (in, in); None without outliers."""
        parts = [
            (self.input_outliers.product(linear.input_group), self.tokens),
            (self.gradient_outliers.product(linear.input_group), self.gradient_tokens),
        ]
        means = [product / tokens for product, tokens in parts if product is not None]
        return torch.stack(means).sum(0) if means else None

    def second_moment(self, linear: LinearSpec) -> Tensor:
        """The mean of x xᵀ (in, in) of `linear`, with outliers scaled down.

        Raises InputError where no token reached it, NotFiniteError where it is not finite.
        """
        group, sums = linear.input_group, self.input_sums
        if linear.mixture:
            experts = [spec.input_group for spec in self._same_role(linear)]
            reads_hidden = linear.role != "down"
            total = sums.padded_by_mixture(group, experts, linear.in_features, reads_hidden)
        elif group in sums.sums:
            total = sums.sums[group]
        else:
            raise InputError(f"calibration never reached {linear.name}: exclude it by name")
        return _require_finite(_mean(total, self.tokens), "input", linear)

    def gradient_moment(self, linear: LinearSpec) -> Tensor | None:
        """The mean of g gᵀ (out, out) of `linear`, with outliers scaled down.

        None if no gradient was measured. That of an expert is a mean over the expert's own tokens,
        since its input moment already accounts for how few they are.
        """
        name, sums = linear.name, self.gradient_sums
        if linear.mixture and self.gradient_tokens:
            size, experts = linear.out_features, [spec.name for spec in self._same_role(linear)]
            writes_hidden = linear.role == "down"
            total = sums.padded_by_mixture(name, experts, size, writes_hidden)
            tokens = max(sums.count(name), size)
        elif name in sums.sums:
            total, tokens = sums.sums[name], self.gradient_tokens
        else:
            return None
        return _require_finite(_mean(total, tokens), "output gradient", linear)

    @cached_property
    def _mixtures(self) -> dict[tuple[str, str], list[LinearSpec]]:
        """The linears of all experts of a mixture, by mixture and role."""
        mixtures: dict[tuple[str, str], list[LinearSpec]] = {}
        for spec in self.linears:
            if spec.mixture:
                mixtures.setdefault((spec.mixture, spec.role), []).append(spec)
        return mixtures

    def _same_role(self, linear: LinearSpec) -> list[LinearSpec]:
        """The linears of the same role in all experts of the mixture."""
        return self._mixtures[linear.mixture, linear.role]

    def undersampled_experts(self) -> list[tuple[str, int]]:
        """The experts that fewer tokens reached than they have inputs, with that number."""
        readers = [
            spec for (_, role), specs in self._mixtures.items() if role != "down" for spec in specs
        ]
        counts = [(spec, self.input_sums.count(spec.input_group)) for spec in readers]
        return [(spec.ffn, tokens) for spec, tokens in counts if tokens < spec.in_features]


def _require_finite(moment: Tensor, subject: str, linear: LinearSpec) -> Tensor:
    if not bool(moment.isfinite().all()):
        raise NotFiniteError(
            f"the {subject} of {linear.name} is not finite: calibrate with --dtype float32"
        )
    return moment


def _mean(upper: Tensor, tokens: int) -> Tensor:
    """The symmetric matrix whose upper triangle is that of `upper`, over `tokens`; in a new tensor.

    In place, because at width 14,336 every copy takes 1.6 GB.
    """
    mean = upper.triu()
    mean += upper.triu(1).T
    return mean.div_(tokens)


def measure_moments(
    model: Any,
    linears: Sequence[LinearSpec],
    tokens: Tensor,
    gradient_samples: int = 0,
    progress: Progress = silent,
    labels: Tensor | None = None,
) -> MomentStatistics:
    """Runs `tokens` (samples, length) through the model, one sample at a time.

    In the first `gradient_samples` of them the forward pass is followed by a backward pass from
    `score_gradient`. Blocks whose activations take too much memory are checkpointed; parameters get
    no gradients and stay as they are. Several processes share the samples, and all get the sums.
    With `labels`, only predictions of tokens that these do not ignore have gradients.
    With gradients, products may be in bfloat16; without, the moments may be whitened with hardly
    any damping, which reads digits that bfloat16 does not have.
    """
    samples, length = tokens.shape
    gradient_samples = min(gradient_samples, samples)
    collector, indices = MomentCollector(linears, gradient_samples > 0), shard_of(range(samples))
    with unpacked(model), evaluation_mode(model), bfloat16_linears(model, gradient_samples > 0):
        for index in progress(indices, "Calibrating", len(indices)):
            batch = tokens[index][None].to(model.device)
            with stage("gradients" if index < gradient_samples else "second_moments"):
                if index < gradient_samples:
                    _forward_backward(model, batch, collector, index, labels)
                else:
                    _forward(model, batch, collector)
    collector.all_reduce(model.device)
    return collector.statistics(samples * length, gradient_samples * length)


def measure_errors(
    model: Any,
    probes: Sequence[Probe],
    tokens: Tensor,
    progress: Progress = silent,
    labels: Tensor | None = None,
) -> dict[str, list[float]]:
    """Mean over tokens of each probe's (gᵀ D h)², by the name of its linear.

    Each list has an entry per held-out sample of `tokens` (samples, length). `labels` as in
    `measure_moments`.
    """
    samples, errors = held_out(len(tokens)), ProbeErrors(probes)
    with unpacked(model), evaluation_mode(model), bfloat16_linears(model):
        for index in progress(samples, "Probing", len(samples)):
            errors.start_sample()
            batch = tokens[index][None].to(model.device)
            _forward_backward(model, batch, errors, index, labels)
    return errors.means(tokens.shape[1])


@torch.no_grad()
def _forward(model: Any, sample: Tensor, collector: MomentCollector) -> None:
    with collector.hooks(model):
        model.base_model(input_ids=sample, use_cache=False)  # without the head


@torch.enable_grad()
def _forward_backward(
    model: Any,
    sample: Tensor,
    observer: MomentCollector | ProbeErrors,
    index: int,
    labels: Tensor | None,
) -> None:
    """Runs `sample` (1, length), which is number `index` of the text and has that row of `labels`
    (samples, length)."""
    blocks = list(find_blocks(model)[1])
    recomputed = blocks[: len(blocks) - kept_blocks(model, sample.shape[1])]
    with _gradients_of_activations(model), replaced_forwards(recomputed, _checkpointed):
        # checkpointing repeats the forward pass during the backward pass: then without hooks
        with observer.hooks(model), _output_of(blocks[-1]) as outputs:
            model.base_model(input_ids=sample, use_cache=False)  # without the head
        hidden = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
        length = tuple_length(outputs[0])
        gradient = score_gradient(model, hidden.detach(), sample, index, length)
        hidden.backward(of_counted(gradient, labels, index))


def of_counted(gradient: Tensor, labels: Tensor | None, index: int) -> Tensor:
    """`gradient` (1, length, width) of the hidden states that predict tokens which count.

    It is zero where row `index` of `labels` (samples, length) ignores the next token, and behind
    the last one. Without labels all count.
    """
    if labels is None:
        return gradient
    counts = (labels[index] != IGNORED).roll(-1)
    counts[-1] = False
    return gradient * counts[:, None].to(gradient)


@contextmanager
def _output_of(block: nn.Module) -> Iterator[list[Any]]:
    """Inside, outputs of `block` are added to the list."""
    outputs: list[Any] = []
    hook = block.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _gradients_of_activations(model: Any) -> Iterator[None]:
    """No parameter requires a gradient; the embedded input does, so that there is a graph."""
    hook = model.get_input_embeddings().register_forward_hook(
        # some families scale the embedding in place, which autograd refuses for a leaf: clone it
        lambda _, __, output: output.detach().requires_grad_(True).clone()
    )
    try:
        with only_trainable(model, ()):
            yield
    finally:
        hook.remove()


def _checkpointed(_: int, forward: Forward) -> Forward:
    """A block's `forward` that keeps no activations; unlike the model's own, also in eval mode."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    return run
