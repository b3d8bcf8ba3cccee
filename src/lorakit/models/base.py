"""The base model's own modules and parameters, whatever adapters its layers hold at the moment."""

from collections.abc import Iterator

from torch import nn

BANK = "adapter_bank"
"""Name of the child that holds a layer's updates; its own children start with @."""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module, as `named_modules` would on the bare base."""
    for path, module in model.named_modules():
        if not _is_adapter_path(path):
            yield path, module


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter, as `named_parameters` would on the bare base."""
    for path, parameter in model.named_parameters():
        if not _is_adapter_path(path):
            yield path, parameter


def _is_adapter_path(path: str) -> bool:
    return f".{BANK}.@" in f".{path}" or path.endswith(f".{BANK}") or path == BANK
