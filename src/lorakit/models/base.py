"""The base model's own modules and parameters, also while adapters are attached."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorakit.upstream.private_names import (
    COMPILED_WRAPPER,
    accelerate_device,
    compiled_call,
    own_modules,
    own_parameters,
)

WRAPPERS = ("torch", "deepspeed", "accelerate")
"""The packages whose modules hold a model in `module`, to call it in several places."""

BANK = "adapter_bank"
"""Name of the child module, of an adapted layer, that holds its updates."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, of DistributedDataParallel and the like.

    Names in adapters are those of the model itself, whatever runs it.
    """
    while True:
        is_wrapper = type(model).__module__.partition(".")[0] in WRAPPERS
        inner = getattr(model, COMPILED_WRAPPER, None)
        inner = getattr(model, "module", None) if inner is None and is_wrapper else inner
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each module of the base, in the order of `named_modules`.

    The children that hold updates are skipped, not searched, so that the time does not grow with
    the number of adapters.
    """
    yield from _walk(model, "", set())


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in own_modules(module).items():
        if child is not None and name != BANK:
            # A part that is compiled by itself has the names of what is compiled.
            inner = own_modules(child).get(COMPILED_WRAPPER)
            found = child if inner is None else inner
            yield from _walk(found, f"{path}.{name}" if path else name, seen)


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether what happens in parts of a model's forward pass can't be seen: torch.compile's."""
    return any(
        compiled_call(module) is not None
        or any(COMPILED_WRAPPER in own_modules(child) for child in module.children())
        for _, module in base_modules(model)
    )


def base_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter of the base by its dotted name, also where an adapter replaces it in use."""
    owner, _, leaf = name.rpartition(".")
    parameter = own_parameters(module.get_submodule(owner))[leaf]
    assert parameter is not None
    return parameter


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of each parameter of the base, in the order of `named_parameters`."""
    seen: set[nn.Parameter] = set()
    for path, module in base_modules(model):
        for name, parameter in own_parameters(module).items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield (f"{path}.{name}" if path else name), parameter


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Have all modules of a model in eval mode inside a block, and then each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings a module's own weights from elsewhere for each call."""
    own = (parameter for parameter in own_parameters(module).values() if parameter is not None)
    return accelerate_device(module) is not None and any(parameter.is_meta for parameter in own)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first weight is, or is brought to for a call."""
    for _, inner in base_modules(module):
        for parameter in own_parameters(inner).values():
            if parameter is not None:
                offloaded = accelerate_device(inner) if parameter.is_meta else None
                return parameter.device if offloaded is None else offloaded
    return torch.device("cpu")
