"""A text's embedding from the hidden states of its tokens, as the base's own files say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import ModelError
from lorakit.upstream.private_names import loaded_from

MODULES_FILE = "modules.json"
"""In which sentence-transformers lists what turns a text into its embedding."""


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1)


def _mean_of_roots(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).sqrt()


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    last = mask[..., 0].sum(1).long() - 1
    return hidden[range(len(hidden)), last]


def _most(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, float("-inf")).amax(1)


WAYS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": _mean_of_roots,
    "cls_token": _first,
    "lasttoken": _last,
    "max_tokens": _most,
}
"""By the words of sentence-transformers: from hidden states (rows, tokens, width) of right-padded
rows and their mask (rows, tokens, 1) to one vector a row."""


def pooled(hidden: Tensor, mask: Tensor, way: str) -> Tensor:
    """The embeddings of rows, each of length 1, (rows, width).

    Args:
        hidden: states of the last layer (rows, tokens, width).
        mask: 1 for a row's own tokens, which come first (rows, tokens).
        way: one of `WAYS`.
    """
    hidden = hidden.float()
    return F.normalize(WAYS[way](hidden, mask[..., None].to(hidden.dtype)), dim=-1)


def way_of(model: nn.Module) -> str:
    """The way in which a base pools: its mean, where no file says another.

    Raises:
        ModelError: its files ask for something else than one of `WAYS`.
    """
    modules = _read(model, MODULES_FILE)
    if modules is None:
        return "mean_tokens"
    kinds = {each["type"].rpartition(".")[2]: each["path"] for each in modules}
    others = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    config = _read(model, f"{kinds.get('Pooling')}/config.json") or {}
    prefix = "pooling_mode_"
    asked = [name.removeprefix(prefix) for name, on in config.items() if on is True]
    asked = [name for name in asked if name != "include_prompt"] or ["mean_tokens"]
    if others or len(asked) > 1 or asked[0] not in WAYS:
        what = ", ".join([*sorted(others), *asked])
        raise ModelError(
            f"the base makes its embeddings by {what}, and the server by one of {', '.join(WAYS)}"
        )
    return asked[0]


def _read(model: nn.Module, name: str) -> Any:
    """A file of the base in JSON; None: it has none."""
    source = loaded_from(model)
    if not source:
        return None
    path = Path(source, name)
    if not Path(source).is_dir():
        try:
            path = Path(huggingface_hub.hf_hub_download(source, name))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
