"""Models whose forward pass goes through torch.compile: what a bank prepares on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lorakit.attachment.state import attachment_for, check_rows
from lorakit.methods.lora.lora import is_adaptable, is_linear
from lorakit.models.base import base_modules, unwrapped
from lorakit.upstream.private_names import (
    compiled_call,
    forward_pre_hooks,
    is_compiled_wrapper,
    set_compiled_call,
)


def prepare_for_compile(model: nn.Module) -> None:
    """Turn all linear layers into adapted layers, so that no adapter that comes changes a class.

    Args:
        model: what torch.compile(model) returned, or a model after model.compile().
    """
    inner = unwrapped(model)
    state = attachment_for(inner)
    state.compiled = True
    for path, layer in list(base_modules(inner)):
        if is_linear(layer) and is_adaptable(layer):
            state.convert(inner, path)
    _check_outside(model)


class CheckedCall:
    """A compiled forward pass, before which the batch's rows are compared with the route."""

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]) -> None:
        self.model = model
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output.

        Raises:
            RouteError: the batch has another number of rows than the route.
        """
        check_rows(self.model, args, kwargs)
        return self.compiled(*args, **kwargs)


def _check_outside(model: nn.Module) -> None:
    """Have rows counted before the compiled code, which would compile again for each number."""
    if is_compiled_wrapper(model):
        if check_rows not in forward_pre_hooks(model).values():
            model.register_forward_pre_hook(check_rows, with_kwargs=True)
        return
    compiled = compiled_call(model)
    assert compiled is not None
    if not isinstance(compiled, CheckedCall):
        set_compiled_call(model, CheckedCall(model, compiled))
