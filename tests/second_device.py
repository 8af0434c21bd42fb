"""A second device for machines without a GPU, whose tensors compute but do not mix with the CPU's.

torch's device type "lazy" has no kernels in any build, and backward passes on it run in the thread
that asks for them. Inside `second_device()` its tensors hold a tensor of the CPU, which computes.
As on a GPU, an operation that mixes devices is an error, and a value of the device reaches Python
or the CPU only by a transfer. Transfers are counted by the function of lrcompress that makes them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SECOND = torch.device("lazy", 0)
aten = torch.ops.aten
# operations whose result has a size, or is a value, that the CPU has to wait for
WAITING = {
    aten._local_scalar_dense: "a number",
    aten.nonzero: "a size that depends on values",
    aten.masked_select: "a size that depends on values",
    aten.bincount: "a size that depends on values",
    aten.repeat_interleave: "a size that depends on values",
    aten.equal: "a number",
}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class SecondTensor(Tensor):
    """A tensor on SECOND; `content`, on the CPU, has its values."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> SecondTensor:
        tensor: SecondTensor = Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=SECOND,
        )
        tensor.content = content
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a tensor of the second device outside of second_device()")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SecondTensor({self.content!r})"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor of another device has no numpy array: copy it to the CPU first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, SecondTensor)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.content = value.content


class DeviceGenerator(torch.Generator):
    """A generator for the CPU or SECOND; the CPU makes the numbers of both."""

    is_second: bool

    def __new__(cls, device: Any = "cpu") -> DeviceGenerator:
        generator = super().__new__(cls)
        generator.is_second = torch.device(device).type == SECOND.type
        return generator


class Transfers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations of both devices; `counts` has the transfers by (place, what is transferred).

    The place is the innermost function of lrcompress, without "lrcompress.". Transfers inside
    transformers are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[tuple[str, str]] = Counter()

    @property
    def places(self) -> set[str]:
        return {place for place, _ in self.counts}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_second = any(isinstance(tensor, SecondTensor) for tensor in inputs)
        if func.overloadpacket is aten._fused_sdp_choice and is_second:
            return 0  # attention by plain products: fused kernels are made for one device each
        is_result_second = is_second
        if kwargs.get("device") is not None:
            is_result_second = torch.device(kwargs["device"]).type == SECOND.type
            kwargs["device"] = torch.device("cpu")
        if is_second or is_result_second:
            self._check(func, args, inputs, is_second, is_result_second)
        result = func(*_contents(args), **_contents(kwargs))
        return _wrapped(result, inputs) if is_result_second else result

    def _check(
        self, func: Any, args: Any, inputs: Sequence[Tensor], source: bool, target: bool
    ) -> None:
        """Counts a transfer, or raises RuntimeError where an operation mixes devices."""
        kind, packet = WAITING.get(func.overloadpacket), func.overloadpacket
        on_cpu = [tensor for tensor in inputs if not isinstance(tensor, SecondTensor)]
        if packet is aten._to_copy and source != target:
            kind = "a copy to the CPU" if source else "a copy from the CPU"
        elif packet is aten.copy_ and on_cpu:
            kind = "a copy to the CPU" if args[0] is on_cpu[0] else "a copy from the CPU"
        elif packet in INDEXING and isinstance(args[0], SecondTensor):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                kind = "a size that depends on values"
            elif any(not isinstance(index, SecondTensor) for index in indices):
                kind = "a copy from the CPU"
        elif source and any(tensor.ndim for tensor in on_cpu):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if kind and (place := _place()):
            self.counts[place, kind] += 1


class Generators(TorchFunctionMode):
    """Refuses random numbers that are drawn by the generator of the other device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        is_second = isinstance(result, SecondTensor)
        if generator is not None and getattr(generator, "is_second", False) != is_second:
            raise RuntimeError(f"{func}: expected a generator of the device of the result")
        return result


def _contents(values: Any) -> Any:
    return tree_map_only(SecondTensor, lambda tensor: tensor.content, values)


def _wrapped(result: Any, inputs: Sequence[Tensor]) -> Any:
    """`result` on SECOND; what an operation changed in place is the same tensor as before."""
    wrappers = {id(t.content): t for t in inputs if isinstance(t, SecondTensor)}

    def wrapped(tensor: Tensor) -> Tensor:
        wrapper = wrappers.get(id(tensor))
        if wrapper is None:
            return SecondTensor(tensor)
        assert wrapper.shape == tensor.shape, "an operation in place that changes the shape"
        return wrapper

    return tree_map_only(Tensor, wrapped, result)


def _place() -> str | None:
    """The innermost function of lrcompress that runs; None inside transformers."""
    frame = sys._getframe(1)
    while frame is not None:
        room, _, module = str(frame.f_globals.get("__name__", "")).partition(".")
        if room == "transformers":
            return None
        if room == "lrcompress":
            return f"{module}.{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


@contextmanager
def second_device() -> Iterator[Transfers]:
    """Inside, torch has the device SECOND; gives what is transferred from and to it."""
    is_enabled = torch.is_autocast_enabled

    def is_autocast_enabled(device_type: str = "cpu") -> bool:
        return device_type != SECOND.type and is_enabled(device_type)

    states = SimpleNamespace(get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state)
    lifts = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", DeviceGenerator))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled))
        stack.enter_context(mock.patch.object(torch, SECOND.type, states, create=True))
        # torch.tensor(..., device=SECOND) makes a tensor of the CPU and copies it
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.enter_context(Generators())
        yield stack.enter_context(Transfers())


def moved(model: nn.Module) -> Any:
    """`model` on SECOND; its parameters are other ones, but tied as before."""
    model.to(SECOND)
    if tie := getattr(model, "tie_weights", None):
        tie()
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` on the CPU, without a transfer that is counted."""
    return {name: _contents(tensor) for name, tensor in model.state_dict().items()}
