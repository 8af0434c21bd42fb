"""Block by block: each linear aims at the dense model's output, given what it really reads.

Once a block is compressed, the blocks after it read something else than they did in the dense
model. Two streams of hidden states go through the model side by side, one dense, one
compressed, and every linear is fitted to the dense stream's output from the compressed stream's
input before it is truncated (as SAES-SVD and AA-SVD do). The second-stage linear also takes
over the drift that the compressed stream has built up, where the block adds its output to the
residual stream as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.ffn import find_blocks
from lrcompress.linalg import to_float64
from lrcompress.lowrank import install
from lrcompress.prepare import Prepared
from lrcompress.protocols import FFN, Form, LinearSpec, Plan, Progress
from lrcompress.shrink import ShrunkLinear, shrunk_ffn, shrunk_linear
from lrcompress.sizes import evaluation_mode


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass at the point of interest."""


@dataclass
class Pass:
    """One pass of one sample through a block: its output, and what watched linears saw."""

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Fit:
    """Sums over tokens of v vᵀ and t vᵀ: least squares of targets t from inputs v."""

    def __init__(self) -> None:
        self.moment: Tensor | None = None
        self.cross: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        v, t = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        moment, cross = to_float64(v.T @ v), to_float64(t.T @ v)
        self.moment = moment if self.moment is None else self.moment + moment
        self.cross = cross if self.cross is None else self.cross + cross
        self.tokens += len(v)

    def second_moment(self) -> Tensor:
        assert self.moment is not None
        return self.moment / self.tokens

    def weight(self, prior: Tensor, damping: float) -> Tensor:
        """argmin over W of E‖t - W v‖² + ridge ‖W - prior‖², ridge relative to mean v²."""
        assert self.moment is not None
        assert self.cross is not None
        ridge = damping * self.moment.diagonal().mean()
        eye = torch.eye(len(self.moment), dtype=self.moment.dtype, device=self.moment.device)
        right = self.cross + ridge * to_float64(prior)
        solution: Tensor = torch.linalg.solve(self.moment + ridge * eye, right.T)
        return solution.T


class Streams:
    """The hidden states of every sample in front of one block, dense and compressed."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model = model
        self.prefix, self.blocks = find_blocks(model)
        self.extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.dense = [self._embedded(sample[None].to(model.device)) for sample in tokens]
        self.compressed = list(self.dense)
        self._record_extras(tokens[:1].to(model.device))

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
        return found[0]

    def _record_extras(self, sample: Tensor) -> None:
        """What each block is given beside hidden states: masks and positions, equal for all."""

        def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            others = {key: value for key, value in keywords.items() if key != "hidden_states"}
            self.extras.append((arguments[1:], others))

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
            self.model.base_model(input_ids=sample, use_cache=False)

    def run(self, block: int, hidden: Tensor, watch: Sequence[str]) -> Pass:
        """Block number `block` on one sample's hidden states (1, length, width)."""
        seen = Pass(hidden, {}, {})
        with ExitStack() as stack:
            for name in watch:
                stack.enter_context(_watching(self.model.get_submodule(name), name, seen))
            arguments, keywords = self.extras[block]
            output = self.blocks[block](hidden, *arguments, **keywords)
        seen.output = output[0] if isinstance(output, tuple) else output
        return seen


@contextmanager
def _watching(module: nn.Module, name: str, seen: Pass) -> Iterator[None]:
    def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        # some families add to the output in place
        seen.inputs[name], seen.outputs[name] = arguments[0], output.clone()

    hook = module.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def shrink_anchored(
    model: Any,
    prepared: Prepared,
    plan: Plan,
    form: Form,
    tokens: Tensor,
    damping: float,
    progress: Progress,
) -> tuple[ShrunkLinear, ...]:
    """`shrink`, with every linear fitted to the dense model's outputs in the order of blocks.

    Installs as it goes; whatever fails, the dense layers are put back.
    """
    originals = {s.name: model.get_submodule(s.name) for s in prepared.linears}
    try:
        with evaluation_mode(model):
            return tuple(_anchored(model, prepared, plan, form, tokens, damping, progress))
    except BaseException:
        for name, layer in originals.items():
            install(model, name, layer)
        raise


def _anchored(
    model: Any,
    prepared: Prepared,
    plan: Plan,
    form: Form,
    tokens: Tensor,
    damping: float,
    progress: Progress,
) -> Iterator[ShrunkLinear]:
    streams = Streams(model, tokens)
    ffns = prepared.ffns(model)
    ffn = next(ffns, None)
    for index in progress(range(len(streams.blocks)), "Anchoring", len(streams.blocks)):
        here = []
        while ffn is not None and ffn.linears[0].block == index:
            here.append(ffn)
            ffn = next(ffns, None)
        watch = [spec.name for found in here for spec in found.linears]
        dense = [streams.run(index, hidden, watch) for hidden in streams.dense]
        for found in here:
            yield from _fit(model, streams, index, found, dense, prepared, plan, form, damping)
        streams.dense = [done.output for done in dense]
        streams.compressed = [
            streams.run(index, hidden, ()).output for hidden in streams.compressed
        ]


def _fit(
    model: Any,
    streams: Streams,
    index: int,
    ffn: FFN,
    dense: list[Pass],
    prepared: Prepared,
    plan: Plan,
    form: Form,
    damping: float,
) -> Iterator[ShrunkLinear]:
    """First the linears that read the block's hidden state, then the one that reads theirs."""
    first = [spec for spec in ffn.linears if spec.role != "down"]
    ffn = _refitted(ffn, first, streams, index, dense, damping)
    shrunk = shrunk_ffn(model, ffn, prepared, plan, form)
    found = {what.spec.name: (what, layer) for what, layer in shrunk}
    for name, (_, layer) in found.items():
        if layer is not None:
            install(model, name, layer)
    for spec in ffn.linears:
        what, layer = found[spec.name]
        if spec.role == "down" and layer is not None:
            what = _fit_down(model, streams, index, ffn, spec, dense, prepared, plan, form, damping)
        yield what


def _refitted(
    ffn: FFN,
    linears: Sequence[LinearSpec],
    streams: Streams,
    index: int,
    dense: list[Pass],
    damping: float,
) -> FFN:
    """`ffn` with weights and second moments that fit the compressed stream's inputs."""
    if not linears:
        return ffn
    name = linears[0].name
    fit = Fit()
    for hidden, target in zip(streams.compressed, dense, strict=True):
        inputs = streams.run(index, hidden, (name,)).inputs[name]
        fit.add(inputs, target.inputs[name])
    weights, statistics = dict(ffn.weights), dict(ffn.statistics)
    eye = torch.eye(linears[0].in_features, dtype=torch.float64)
    change = fit.weight(eye.to(fit.second_moment().device), damping)  # x_dense ~ change x
    for spec in linears:
        if spec.input_group == linears[0].input_group:
            weights[spec.name] = to_float64(weights[spec.name]) @ change
            moment = fit.second_moment()
            statistics[spec.name] = replace(statistics[spec.name], second_moment=moment)
    return replace(ffn, weights=weights, statistics=statistics)


def _fit_down(
    model: Any,
    streams: Streams,
    index: int,
    ffn: FFN,
    spec: LinearSpec,
    dense: list[Pass],
    prepared: Prepared,
    plan: Plan,
    form: Form,
    damping: float,
) -> ShrunkLinear:
    left = ffn
    if ffn.name in plan.widths:
        channels = prepared.channels[ffn.name][: plan.widths[ffn.name]]
        left = prepared.method.narrow(ffn, channels)
    fit, bias = Fit(), left.biases[spec.name]
    adds = _adds_to_residual(streams, index, spec.name)
    for hidden, target in zip(streams.compressed, dense, strict=True):
        now = streams.run(index, hidden, (spec.name,))
        wanted = target.outputs[spec.name]
        if adds:  # all that the block's output misses, not this linear's share alone
            wanted = target.output - (now.output - now.outputs[spec.name])
        fit.add(now.inputs[spec.name], wanted if bias is None else wanted - bias)
    weights = dict(left.weights) | {spec.name: fit.weight(left.weights[spec.name], damping)}
    moments = dict(left.statistics)
    moments[spec.name] = replace(moments[spec.name], second_moment=fit.second_moment())
    left = replace(left, weights=weights, statistics=moments)
    what, layer = shrunk_linear(model, left, spec, prepared.method, plan, form)
    assert layer is not None
    install(model, spec.name, layer)
    return what


def _adds_to_residual(streams: Streams, index: int, name: str) -> bool:
    """Whether the linear's output reaches the block's output unchanged; shown by a small shift."""
    module = streams.model.get_submodule(name)
    plain = streams.run(index, streams.compressed[0], (name,))
    shift = plain.outputs[name].abs().mean()
    hook = module.register_forward_hook(lambda _, __, output: output + shift)
    try:
        moved = streams.run(index, streams.compressed[0], ()).output
    finally:
        hook.remove()
    difference = (moved - plain.output) / shift - 1
    return float(difference.abs().mean()) < 1e-2
