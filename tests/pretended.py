"""A device that is not there: what runs on it shows that nothing is mixed with the processor's.

`device()` gives PyTorch one whose tensors say that they lie elsewhere while their numbers lie in
tensors of the processor, which compute them. As on a GPU, an operation on tensors of both raises,
and so does reading one as an array before it was brought back. What is carried between the two
places, and what lies there, is counted, and what is asked of it can be looked up in PyTorch's table
of kernels. Mixed precision rounds as on a GPU. What cannot be shown is how fast one is, in which
order it adds up, and what it does with memory beyond that of tensors.

PyTorch's own name for a device without a backend of its own here, ``lazy``, stands for it;
`torch.inference_mode` is `torch.no_grad` meanwhile, as tensors that wrap others cannot be made in
it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("lazy:0")
CARRIES = ("aten::_to_copy", "aten::copy_")
"""Operations that may take tensors of two places."""
LOWERED = {
    "conv2d", "conv3d", "conv_transpose3d", "linear", "matmul", "__matmul__", "mm", "addmm", "bmm",
    "baddbmm", "prelu",
}  # fmt: skip
RAISED = {"softmax", "log_softmax", "log", "exp", "sum", "cumsum", "pow", "mse_loss", "nll_loss"}
"""What mixed precision computes in the low one, and in float32, as on CUDA:
https://docs.pytorch.org/docs/stable/amp.html"""
PRODUCTS = {
    f"aten::{name}" for name in ("convolution", "convolution_backward", "mm", "addmm", "bmm")
}  # fmt: skip
"""What is then summed in float32."""
COMPARES = "aten::_has_compatible_shallow_copy_type"
"""Asked of two parameters, of which one lies there and the other does not."""
_PRECISION: list[torch.dtype | None] = []
"""The mixed precision that was asked for last, innermost."""


@dataclass
class Counted:
    """Bytes of every tensor that was brought there, and back, in their order; what the tensors of
    the device took at most, all together; and how often it was asked for something, by its name in
    PyTorch's table of kernels."""

    there: list[int] = field(default_factory=list)
    back: list[int] = field(default_factory=list)
    most: int = 0
    asked: Counter = field(default_factory=Counter)
    _held: dict[int, int] = field(default_factory=dict)
    _owners: Counter = field(default_factory=Counter)

    def hold(self, tensor: Far) -> Far:
        """Count a tensor until it is forgotten; those that share their memory once."""
        memory = tensor.near.untyped_storage()
        key = memory.data_ptr()
        self._held[key] = memory.nbytes()
        self._owners[key] += 1
        self.most = max(self.most, sum(self._held.values()))
        weakref.finalize(tensor, self._forget, key)
        return tensor

    def _forget(self, key: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._held[key], self._owners[key]


class Far(Tensor):
    """A tensor of the device; `near` is that of the processor in which its numbers lie."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        return Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def tolist(self) -> Any:
        return self.near.tolist()

    def __reduce_ex__(self, version: int) -> Any:
        return self.near.__reduce_ex__(version)

    def __repr__(self) -> str:
        return f"Far({self.near})"

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None):
        name, given = getattr(function, "__name__", ""), (args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if _PRECISION and _PRECISION[-1] is not None and name in LOWERED | RAISED:
                given = _in(_PRECISION[-1] if name in LOWERED else torch.float32, given, Far)
            return function(*given[0], **given[1])

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {}, Counted())


class _Pretending(TorchDispatchMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {}, self.counted)


def _run(function: Any, args: Any, kwargs: dict[str, Any], counted: Counted) -> Any:
    """An operation's result, made by the processor, where its tensors or its ``device`` say."""
    far: list[Far] = []
    near: list[Tensor] = []

    def look(value: Any) -> Any:
        if isinstance(value, Far):
            far.append(value)
            return value.near
        if isinstance(value, Tensor):
            near.append(value)
        return value

    name, wanted = function._schema.name, kwargs.get("device")
    own_args, own_kwargs = tree_map(look, args), tree_map(look, kwargs)
    if name == COMPARES:
        return False
    if far and name not in CARRIES and (other := [tuple(t.shape) for t in near if t.dim()]):
        raise RuntimeError(f"{name}: tensors of {other} lie on the processor, others on {DEVICE}")
    if wanted is not None:
        own_kwargs["device"] = torch.device("cpu")
    low = {one.dtype for one in far} & {torch.bfloat16, torch.float16}
    if low and name in PRODUCTS:  # summed in float32, and rounded once
        wide_args, wide_kwargs = _in(torch.float32, (own_args, own_kwargs))
        found = _in(low.pop(), function(*wide_args, **wide_kwargs))
    else:
        found = function(*own_args, **own_kwargs)
    if far and name.startswith("aten::") and not _is_view(function):
        counted.asked[".".join(filter(None, (name[6:], function._schema.overload_name)))] += 1
    if name == "aten::copy_":
        if far and near:
            (counted.there if isinstance(args[0], Far) else counted.back).append(near[0].nbytes)
        return args[0]
    there = bool(far) if wanted is None else torch.device(wanted).type == DEVICE.type
    if name == "aten::_to_copy" and there != bool(far):
        (counted.there if there else counted.back).append(found.nbytes)
    known = {id(one.near): one for one in far}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return counted.hold(Far(value)) if there else value

    return tree_map(place, found)


def _in(precision: torch.dtype, given: Any, kind: type = Tensor) -> Any:
    """Some arguments or results, their floating-point tensors of a kind in a precision."""

    def cast(value: Any) -> Any:
        meant = isinstance(value, kind) and value.is_floating_point()
        return value.to(precision) if meant else value

    return tree_map(cast, given)


def without_kernel(asked: Iterable[str], backend: str) -> set[str]:
    """Of some operations those for which PyTorch's own table has no kernel of a backend, as CUDA.

    The table comes with PyTorch (`torchgen`). For which types of numbers there is one it does not
    say.
    """
    table = _kernels()

    def served(name: str) -> bool:
        if name.startswith("mkldnn"):
            return False  # of the processor, whatever the table says
        entry = table[name]
        if "structured_delegate" in entry:
            return served(entry["structured_delegate"])
        if "ufunc_inner_loop" in entry or "dispatch" not in entry:
            return True  # made for every backend; made of other operations
        keys = ",".join(entry["dispatch"]).replace(" ", "").split(",")
        return any(key == backend or key.startswith("Composite") for key in keys)

    return {name for name in asked if not served(name)}


@cache
def _kernels() -> dict[str, dict[str, Any]]:
    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {entry["func"].partition("(")[0]: entry for entry in entries}


def _is_view(function: Any) -> bool:
    """Whether an operation only says where in the memory of another tensor one lies."""
    ends = [one.alias_info for one in function._schema.returns]
    return any(end is not None and not end.is_write for end in ends)


class _Kind(type):
    """Random numbers of the device are drawn by the processor's generator."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _GENERATOR("cpu" if torch.device(device).type == DEVICE.type else device)

    def __instancecheck__(cls, other: Any) -> bool:
        return isinstance(other, _GENERATOR)


_GENERATOR = torch.Generator


class _Generator(metaclass=_Kind):
    pass


@contextlib.contextmanager
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """While it is open there is `DEVICE`, in this thread; what is carried to and from it."""
    real, counted = torch.autocast, Counted()

    @contextlib.contextmanager
    def mixed(precision: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
        _PRECISION.append(precision if enabled else None)
        try:
            yield
        finally:
            _PRECISION.pop()

    def autocast(kind: str, *how: Any, **more: Any) -> Any:
        return mixed(*how, **more) if kind == DEVICE.type else real(kind, *how, **more)

    with monkeypatch.context() as patch, _Pretending(counted):
        patch.setattr(torch, "autocast", autocast)
        patch.setattr(torch, "inference_mode", torch.no_grad)
        patch.setattr(torch, "Generator", _Generator)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield counted
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
