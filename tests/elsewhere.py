"""A stand-in for a GPU: tensors that claim another device, compute on the CPU, and refuse to meet
tensors that were left there.

The claimed device is torch's "meta", the only one besides "cpu" that every build knows. What CUDA
allows is allowed: numbers without axes, index tensors on the CPU, and copies between devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
COPIES = {"_to_copy", "copy_", "lift_fresh", "detach", "alias"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor whose numbers are in `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        new = Tensor._make_wrapper_subclass(
            cls, held.size(), dtype=held.dtype, device=DEVICE, **shape
        )
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return carry_out(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"


def carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; its result is elsewhere if its tensors, or `device`, are."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim]
    if there and here and name not in COPIES | INDEXING:
        raise RuntimeError(
            f"{name}: tensors on two devices, {[tuple(x.shape) for x in here]} on cpu"
        )
    if name in INDEXING and not isinstance(args[0], Elsewhere) and there:
        raise RuntimeError(f"{name}: a tensor on cpu, its indices or values elsewhere")
    if name == "_fused_sdp_choice":
        return 0  # SDPA by its plain formula
    device = kwargs.get("device")
    wanted = bool(there) if device is None else torch.device(device) == DEVICE
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    unwrap = lambda x: x.held if isinstance(x, Elsewhere) else x  # noqa: E731
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    wrap = lambda x: Elsewhere(x) if isinstance(x, Tensor) and wanted else x  # noqa: E731
    return tree_map(wrap, out)


class Factories(TorchDispatchMode):
    """Also tensors that are made there from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return carry_out(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Also tensors that are made there from Python's numbers, and lists as indices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            made = func(*args, **kwargs | {"device": "cpu"})
            return Elsewhere(made) if torch.device(kwargs["device"]) == DEVICE else made
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], (list, tuple)):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = args[0], index, *args[2:]
        return func(*args, **kwargs)


@contextmanager
def moved(model: nn.Module) -> Iterator[nn.Module]:
    """The model's weights elsewhere, and factories that can make tensors there."""
    with torch.no_grad(), Factories(), Literals():
        for module in model.modules():
            for group in (module._parameters, module._buffers):
                for name, value in group.items():
                    if value is not None:
                        new = Elsewhere(value.detach().clone())
                        group[name] = (
                            nn.Parameter(new, False) if group is module._parameters else new
                        )
        yield model
