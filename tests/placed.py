"""Two devices that no machine needs to have, to test a model that is spread over several GPUs.

A tensor on `lazy:0` or `lazy:1`, which torch has no kernels for, is computed on the CPU, and an
operation on tensors of two of these devices, or of one and the CPU, raises MixedDevicesError, as
CUDA would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.models.offload import names_outside

FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)
CPU = torch.device("cpu")
aten = torch.ops.aten
# they may read tensors of several devices: copies, and lookups with indices on the CPU
COPIES = (aten._to_copy.default, aten.copy_.default)
LOOKUPS = (aten.index.Tensor, aten.index_put_.default)


class MixedDevicesError(RuntimeError):
    """An operation has tensors of two devices, or a generator of another device."""


class Placed(Tensor):
    """`values`, a tensor on the CPU, that claims to be on another device."""

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> Placed:
        placed: Placed = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=device
        )
        return placed

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self.content = values

    def tolist(self) -> Any:
        return self.content.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of `func` on the values, on the device of its tensors or that of the keyword."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, Placed)}
    if func not in COPIES:
        _check(func, tensors, devices)
    target = kwargs.get("device")
    if target is not None:
        kwargs = kwargs | {"device": CPU}
    else:
        target = tensors[0].device if func in COPIES else next(iter(devices), CPU)
    plain_args, plain_kwargs = tree_map_only(Placed, lambda t: t.content, (args, kwargs))
    output = func(*plain_args, **plain_kwargs)
    if args and output is plain_args[0]:
        return args[0]
    device = torch.device(target)
    if device.type != FIRST.type:
        return output
    return tree_map_only(Tensor, lambda t: Placed(t, device), output)


def _check(func: Any, tensors: list[Tensor], devices: set[torch.device]) -> None:
    """A scalar on the CPU may be used anywhere."""
    on_cpu = any(not isinstance(tensor, Placed) and tensor.ndim for tensor in tensors)
    if len(devices) > 1 or (devices and on_cpu and func not in LOOKUPS):
        raise MixedDevicesError(f"{func} has tensors on {devices}{' and the CPU' * on_cpu}")


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes new tensors, which read no other tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does before it dispatches: data and lists become tensors, generators are used."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        if isinstance(generator := kwargs.get("generator"), _Generator):
            device = kwargs.get("device") or getattr(args[0], "device", CPU)
            if torch.device(device) != generator.placed_on:
                raise MixedDevicesError(f"a generator on {generator.placed_on} for {device}")
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    placed_on: torch.device

    def __new__(cls, device: Any = CPU) -> _Generator:
        generator = super().__new__(cls, CPU)  # type: ignore[call-arg]
        generator.placed_on = torch.device(device)
        return generator


@contextmanager
def two_devices(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors can be on FIRST and SECOND."""
    patch.setattr(torch, FIRST.type, torch.cpu, raising=False)  # checkpoints ask for the module
    patch.setattr(torch, "Generator", _Generator)
    with _Dispatch(), _Functions():  # type: ignore[no-untyped-call]
        yield


def split(model: Any) -> Any:
    """`model` with its first blocks on FIRST and the others on SECOND, as accelerate spreads it.

    The output layer is on SECOND, or with the embedding if the two are tied.
    """
    prefix, blocks = find_blocks(model)
    places = {
        f"{prefix}.{index}": FIRST if index < len(blocks) // 2 else SECOND
        for index in range(len(blocks))
    }
    embedding, tied = model.get_input_embeddings(), model.config.tie_word_embeddings
    for name in names_outside(model, prefix):
        reads_tokens = embedding in model.get_submodule(name).modules()
        places[name] = FIRST if reads_tokens or tied else SECOND
    return dispatch_model(model, places, main_device=FIRST, force_hooks=True)
