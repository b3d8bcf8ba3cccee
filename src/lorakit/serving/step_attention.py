"""The attention of a server's forward passes, which a pass may replace by one of its own.

transformers looks attention up by a name. Under this name it is the one that the model had before,
unless the running thread is in a block that says how the rows of its pass are to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.masking_utils import sdpa_mask

from lorakit.upstream.private_names import attention_name, names_attention

NAME = "lorakit_steps"
"""The name of this attention among those of transformers."""
REPLACED = "sdpa"
"""The attention that it computes."""

Attention = Callable[..., tuple[Tensor, None]]
"""What transformers calls: module, query, key, value, mask, and settings by keyword."""

_own: ContextVar[Attention | None] = ContextVar("own", default=None)


def use_step_attention(model: PreTrainedModel, *, wanted: bool = True) -> None:
    """Have a model's attention do as `attending` says, or compute as it did before.

    Only a model with the attention `sdpa` is changed, and outside `attending` it computes the same.
    """
    before, after = (REPLACED, NAME) if wanted else (NAME, REPLACED)
    config = model.config
    if names_attention(config) and attention_name(config) == before:
        model.set_attn_implementation(after)


def has_step_attention(model: PreTrainedModel) -> bool:
    """Whether a model's attention does as `attending` says."""
    config = model.config
    return names_attention(config) and attention_name(config) == NAME


@contextmanager
def attending(attention: Attention | None) -> Iterator[None]:
    """Have the running thread's forward passes attend in another way, inside a block."""
    token = _own.set(attention)
    try:
        yield
    finally:
        _own.reset(token)


def whole(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of all rows at once, as the model had it: (rows, tokens, heads, size of a head)."""
    return sdpa_attention.sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )


def _attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return (_own.get() or whole)(module, *args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
