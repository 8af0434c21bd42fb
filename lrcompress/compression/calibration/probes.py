"""Probes: measured costs of single changes, which correct the estimates of whole blocks.

Estimates from moments assume that an FFN's inputs and the gradients of its outputs are
independent, as K-FAC does. They are not: in many blocks the tokens with the largest inputs also
have the largest gradients. So one change D per FFN serves as a probe. The mean of (gᵀ D h)² over
tokens, h the inputs and g the gradients, is measured on samples that the moments have not seen;
it assumes no independence. The ratio of this measured cost to its estimate is the factor by which
a rank policy corrects all estimates of the block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import geometric_mean

from torch import Tensor, nn

from lrcompress.methods.linalg import to_float64
from lrcompress.methods.plan import Candidates, WidthOption
from lrcompress.methods.types import FFN, LinearSpec, Method

# the share of the channels, or of the full rank, that a probe keeps
PROBE_KEEP_RATIO = 0.7
# one sample in eight is held out for probes, and at most six
MAX_SAMPLES, SAMPLES_PER_PROBE_SAMPLE = 6, 8


def held_out(samples: int) -> range:
    """The indices of the last samples, which are for probes and not for moments."""
    return range(samples - min(MAX_SAMPLES, samples // SAMPLES_PER_PROBE_SAMPLE), samples)


@dataclass(frozen=True)
class Probe:
    """One change of one linear and its estimated squared error.

    `change` D (out, in), float32, is what the linear's weight loses.
    """

    linear: LinearSpec
    change: Tensor
    estimated: float


def probe_of(
    ffn: FFN, method: Method, candidates: Candidates, channels: Tensor | None
) -> Probe | None:
    """A change of down_proj: fewer channels where the method narrows, otherwise a lower rank.

    `channels` is the order in which channels are kept, None where the method does not narrow.
    Returns None where there is nothing to change.
    """
    if (down := ffn.down) is None:
        return None
    if channels is None:
        return _truncated(ffn, method, down)
    narrowed = [option for option in candidates.shapes if option.width is not None]
    return _narrowed(ffn, method, down, narrowed, channels) if narrowed else None


def _truncated(ffn: FFN, method: Method, down: LinearSpec) -> Probe:
    weight = to_float64(ffn.weights[down.name])
    rank = max(1, round(PROBE_KEEP_RATIO * down.full_rank))
    factors = method.decompose(weight, ffn.statistics[down.name], rank).factors(weight, rank)
    return Probe(down, (weight - factors.B @ factors.A).float(), factors.error)


def _narrowed(
    ffn: FFN, method: Method, down: LinearSpec, options: Sequence[WidthOption], channels: Tensor
) -> Probe:
    change = to_float64(ffn.weights[down.name]).clone()
    width = PROBE_KEEP_RATIO * down.in_features
    option = min(options, key=lambda option: abs((option.width or 0) - width))
    kept_channels = channels[: option.width].to(change.device)
    change[:, kept_channels] -= method.narrow(ffn, kept_channels).weights[down.name]
    return Probe(down, change.float(), option.error)


class ProbeErrors:
    """Hooks that sum (gᵀ D h)² over the tokens of each sample, D being the change of each probe."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self.sums: dict[str, list[float]] = {probe.linear.name: [] for probe in probes}

    def start_sample(self) -> None:
        """The passes that follow are of another sample."""
        for sums in self.sums.values():
            sums.append(0.0)

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Observes forward passes of `model` inside; their backward passes may follow outside."""
        with ExitStack() as stack:
            for probe in self.probes:
                module = model.get_submodule(probe.linear.name)
                stack.callback(module.register_forward_hook(self._output_hook(probe)).remove)
            yield

    def _output_hook(self, probe: Probe) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            h = arguments[0].detach().flatten(0, -2).float()
            lost = h @ probe.change.T.to(h.device)

            def add(g: Tensor) -> None:
                products = (g.flatten(0, -2).float() * lost).sum(-1)
                self.sums[probe.linear.name][-1] += float(products.square().sum())

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return watch

    def means(self, length: int) -> dict[str, list[float]]:
        """Means over the tokens of each sample, by linear; every sample has `length` tokens."""
        return {name: [total / length for total in totals] for name, totals in self.sums.items()}


def corrected(
    choices: Sequence[Candidates], probes: Sequence[Probe], measured: Mapping[str, Sequence[float]]
) -> tuple[Candidates, ...]:
    """`choices` with the factor of each block: measured over estimated cost of its probes.

    `measured` has the costs on each sample by the name of the probe's linear. Samples are combined
    by their geometric mean, so that no outlier dominates. The factor is 1 where a block has no
    probe, or where its measured or estimated cost is 0.
    """
    by_block: defaultdict[int, list[Probe]] = defaultdict(list)
    for probe in probes:
        by_block[probe.linear.block].append(probe)
    factors = {block: _factor(group, measured) for block, group in by_block.items()}
    return tuple(
        replace(candidates, factor=factors.get(candidates.linears[0].block, 1.0))
        for candidates in choices
    )


def _factor(probes: Sequence[Probe], measured: Mapping[str, Sequence[float]]) -> float:
    estimated = sum(probe.estimated for probe in probes)
    samples = zip(*(measured[probe.linear.name] for probe in probes), strict=True)
    costs = [cost for cost in map(sum, samples) if cost > 0]
    return geometric_mean(costs) / estimated if costs and estimated > 0 else 1.0
