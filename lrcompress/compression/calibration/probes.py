"""What a change costs where inputs and gradients depend on each other: corrects estimates.

Estimates from moments take an FFN's inputs and the gradients of its outputs as independent, as
K-FAC does. They are not: in many blocks the tokens with the largest inputs have the largest
gradients too. So each FFN is changed as a probe, and the mean of (gᵀ D h)² over tokens is measured
for that one change D, which needs no independence, on samples that the moments have not seen. What
it is over its estimate is the factor by which a policy corrects all estimates of the block.
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

# of the channels, or of the full rank, that a probe keeps
SHARE = 0.7
# samples for probes alone, and the least share that they are of
SAMPLES, SAMPLES_OF = 6, 8


def held_out(samples: int) -> range:
    """Which of `samples`, the last ones, are for probes and not for moments."""
    return range(samples - min(SAMPLES, samples // SAMPLES_OF), samples)


@dataclass(frozen=True)
class Probe:
    """`change` (out, in), float32, is what `linear` loses, `estimated` its squared error."""

    linear: LinearSpec
    change: Tensor
    estimated: float


def probe(ffn: FFN, method: Method, choices: Candidates, channels: Tensor | None) -> Probe | None:
    """Of down_proj: of its channels, where the method narrows, or of its rank."""
    if (down := ffn.down) is None:
        return None
    if channels is None:
        return _truncated(ffn, method, down)
    narrowed = [shape for shape in choices.shapes if shape.width is not None]
    return _narrowed(ffn, method, down, narrowed, channels) if narrowed else None


def _truncated(ffn: FFN, method: Method, down: LinearSpec) -> Probe:
    weight, rank = to_float64(ffn.weights[down.name]), max(1, round(SHARE * down.full_rank))
    found = method.decompose(weight, ffn.statistics[down.name], rank).factors(weight, rank)
    return Probe(down, (weight - found.B @ found.A).float(), found.error)


def _narrowed(
    ffn: FFN, method: Method, down: LinearSpec, shapes: Sequence[WidthOption], channels: Tensor
) -> Probe:
    change = to_float64(ffn.weights[down.name]).clone()
    shape = min(shapes, key=lambda one: abs((one.width or 0) - SHARE * down.in_features))
    kept = channels[: shape.width].to(change.device)
    change[:, kept] -= method.narrow(ffn, kept).weights[down.name]
    return Probe(down, change.float(), shape.error)


class ProbeErrors:
    """Sums over the tokens of each sample of (gᵀ D h)², D the change of each probe."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self.sums: dict[str, list[float]] = {one.linear.name: [] for one in probes}
        self.backward = False

    def start(self) -> None:
        """What comes next is of another sample."""
        for sums in self.sums.values():
            sums.append(0.0)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self.probes:
                module = model.get_submodule(one.linear.name)
                stack.callback(module.register_forward_hook(self._watch(one)).remove)
            yield

    def _watch(self, one: Probe) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and not self.backward:  # not when checkpointing runs it again
                h = arguments[0].detach().flatten(0, -2).float()
                lost = h @ one.change.T.to(h.device)

                def add(g: Tensor) -> None:
                    products = (g.flatten(0, -2).float() * lost).sum(-1)
                    self.sums[one.linear.name][-1] += float(products.square().sum())

                output.register_hook(add)  # type: ignore[no-untyped-call]

        return watch

    def means(self, length: int) -> dict[str, list[float]]:
        """Over the tokens of each sample of `length`."""
        return {name: [found / length for found in sums] for name, sums in self.sums.items()}


def corrected(
    choices: Sequence[Candidates], probes: Sequence[Probe], measured: Mapping[str, Sequence[float]]
) -> tuple[Candidates, ...]:
    """`choices` with the factor of each block: what its probes cost over their estimates.

    That is the geometric mean over samples, so that a strange one does not decide; 1 where there is
    nothing to compare.
    """
    by_block: defaultdict[int, list[Probe]] = defaultdict(list)
    for one in probes:
        by_block[one.linear.block].append(one)
    factors = {block: _factor(found, measured) for block, found in by_block.items()}
    return tuple(replace(one, factor=factors.get(one.linears[0].block, 1.0)) for one in choices)


def _factor(probes: Sequence[Probe], measured: Mapping[str, Sequence[float]]) -> float:
    estimated = sum(one.estimated for one in probes)
    samples = zip(*(measured[one.linear.name] for one in probes), strict=True)
    costs = [cost for cost in map(sum, samples) if cost > 0]
    return geometric_mean(costs) / estimated if costs and estimated > 0 else 1.0
