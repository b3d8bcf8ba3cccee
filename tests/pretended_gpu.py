"""A GPU that is not there: tensors that say they are on one, and are computed on the CPU.

As on a real one, an operation with tensors of both devices is an error, so that a test finds what
was made on the wrong one. Torch takes it for a device of its own kind for as long as the process
lives, so it is for programs in processes of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPU = torch.device("privateuseone", 0)
ACROSS = ("_to_copy", "copy_")
"""Operations that may have tensors of both devices."""
MISTAKES: list[str] = []
"""What was refused, also where somebody has caught the error and gone another way."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Those whose indices may be on the CPU."""


class OnGPU(Tensor):
    """A tensor that says it is on the GPU, and holds one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        make: Any = Tensor._make_wrapper_subclass
        like = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return make(cls, held.shape, dtype=held.dtype, device=GPU, **like)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        # With it a module keeps its parameters when it moves them, so that tied ones stay tied.
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> "OnGPU":
        return OnGPU(inner["held"])

    def tolist(self) -> Any:
        """The numbers, which torch gives of its own tensors alone."""
        return self.held.tolist()

    def data_ptr(self) -> int:
        """Where it is, which tells tensors apart."""
        return self.held.data_ptr()

    @property
    def data(self) -> Tensor:
        """The same without a gradient; what is set is held from then on."""
        return self.detach()

    @data.setter
    def data(self, value: "OnGPU") -> None:
        of_torch: Any = Tensor.data
        of_torch.__set__(self, value)
        self.held = value.held

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made: Tensor = OnGPU(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), made)

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, *args, **(kwargs or {}))


def computed(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operation gives, on the device on which a real one would be.

    Raises:
        AssertionError: it has tensors of both devices.
    """
    name = func._opname
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    any_there = any(isinstance(each, OnGPU) for each in tensors)
    # A single number of the CPU goes with tensors of any device.
    here = [each for each in tensors if not isinstance(each, OnGPU) and each.dim()]
    if name in INDEXING and isinstance(args[0], OnGPU):
        here = [each for each in here if each.is_floating_point()]
    if any_there and here and name not in ACROSS:
        MISTAKES.append(f"{name} has tensors of the GPU and of the CPU: {tensors}")
        raise AssertionError(MISTAKES[-1])
    if name == "_fused_sdp_choice":
        return 0  # Attention by matmuls: its kernels are of one device each.
    asked = kwargs.get("device")
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    if any_there if asked is None else torch.device(asked).type == GPU.type:
        return tree_map(lambda x: OnGPU(x) if type(x) is Tensor else x, found)
    return found


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGPU) else value


def _empty(size: Any, *more: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> OnGPU:
    return OnGPU(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **kwargs: Any) -> OnGPU:
    return OnGPU(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


_setup_privateuseone_for_python_backend()
_LIBRARY = torch.library.Library("aten", "IMPL")
"""What torch itself calls of a device, past `__torch_dispatch__`."""
for _name, _kernel in (
    ("empty.memory_format", _empty),
    ("empty_strided", _empty_strided),
    ("_copy_from", _copy_from),
):
    _LIBRARY.impl(_name, _kernel, "PrivateUse1")


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A block in which verbs have a GPU, and find it."""
    where = {"cpu": torch.device("cpu"), "auto": GPU}
    with (
        patch("lorakit.models.load.device_for", where.__getitem__),
        # It has no generator of random numbers, which attention without dropout makes and leaves.
        patch("lorakit.kernels.attention.seeded", lambda device, seed: None),
        # Nor do tensors of inference mode let a class of ours be written to.
        patch("torch.inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext()),
    ):
        yield
