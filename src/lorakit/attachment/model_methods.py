"""Methods of a model that mislead while it has adapters: saving it, and resizing its embeddings."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from lorakit.errors import AttachError


class GuardedMethod:
    """Takes the place of a method on one model: looks at the model first, then calls the method.

    It holds no reference of its own to the model, whose memory is then freed as ever.
    """

    def __init__(self, model: nn.Module, name: str, look: Callable[[nn.Module], None]) -> None:
        self._model = weakref.ref(model)
        self._name = name
        self._look = look
        self._before = vars(model).get(name)
        self.instead: Callable[..., None] | None = None
        """What is called in the method's place, with the model first; None: the method."""
        vars(model)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        model = self._model()
        assert model is not None
        if self.instead is not None:
            return self.instead(model, *args, **kwargs)
        self._look(model)
        if self._before is not None:
            return self._before(*args, **kwargs)
        return getattr(type(model), self._name)(model, *args, **kwargs)

    def remove(self) -> None:
        """Give the model its own method back."""
        model = self._model()
        if model is not None and vars(model).pop(self._name, None) and self._before is not None:
            vars(model)[self._name] = self._before

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle, which holds the copy of the model itself."""
        return vars(self) | {"_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_model": weakref.ref(state["_model"])})


def guarded_methods(
    model: nn.Module, look_at_save: Callable[[nn.Module], None]
) -> dict[str, GuardedMethod]:
    """Guard the methods that a model has, by their names.

    Args:
        model: one that gets its first adapter.
        look_at_save: what is done before `save_pretrained`.
    """
    looks = {"save_pretrained": look_at_save, "resize_token_embeddings": refuse_resize}
    found = {name: look for name, look in looks.items() if hasattr(type(model), name)}
    return {name: GuardedMethod(model, name, look) for name, look in found.items()}


def refuse_resize(model: nn.Module) -> None:
    """Refuse another number of tokens: adapters were made for this one.

    Raises:
        AttachError: always.
    """
    raise AttachError(
        "resize_token_embeddings: this model has adapters, whose record of the base, and whose A "
        "and B of embeddings, are for the present number of tokens. Resize the base first: "
        "lk.extract(model) what is trained, lk.detach(model), resize, then attach"
    )


def warn_of_save(name: str) -> None:
    """Warn that the folder which is being written will answer as the base alone."""
    warnings.warn(
        f"save_pretrained writes the base without adapter {name!r}: the folder will load as the "
        f"base. Save the adapter with lk.extract(model, {name!r}).save(folder), or merge it first "
        "with lk.merge(model)",
        stacklevel=4,
    )
