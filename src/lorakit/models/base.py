"""The base model's own modules and parameters, also while adapters are attached."""

from collections.abc import Iterator

from torch import nn

from lorakit.upstream.private_names import own_modules, own_parameters

BANK = "adapter_bank"
"""Name of the child module, of an adapted layer, that holds its updates."""


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
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


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
