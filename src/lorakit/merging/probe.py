"""A probe: a small fixed batch that a model takes, to compare its outputs before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError, MergeError
from lorakit.models.base import has_compiled_parts, in_eval_mode
from lorakit.models.roles import input_embedding
from lorakit.models.shape import is_encoder_decoder

TOKENS = 16
"""Token ids in a row; fewer for a model with fewer than twice as many positions."""
SAMPLES = 4000
"""Samples of a wave: a quarter of a second at 16 kHz."""
SIDE = 64
"""Height and width of an image, where the config does not say."""


def default_probe(model: nn.Module) -> Mapping[str, Tensor] | None:
    """A fixed batch of one row that a model takes, or None where none is found.

    What a model takes is told by trying: token ids, an image, a spectrogram, a wave, and an image
    with token ids, each of the size that the model's config names.
    """
    return next((batch for batch in _candidates(model) if _takes(model, batch)), None)


def outputs_on(model: nn.Module, probe: Mapping[str, Tensor] | None) -> Tensor | None:
    """A model's outputs for a batch, in float32 and eval mode; None: there is no batch.

    These are the logits of a model that has any, else the first floating-point output.

    Raises:
        MergeError: the model does not take the batch.
    """
    if probe is None:
        return None
    try:
        result = _run(model, probe)
    # The batch is the caller's, and the model may say anything about it.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MergeError(
            f"the model does not take the probe ({', '.join(probe)}): {type(error).__name__}: "
            f"{reason}; give another one, or measure=False"
        ) from error
    return _first_output(result)


def _as_written(model: nn.Module) -> AbstractContextManager[None]:
    """Have compiled parts of a model compute without their code, which has no place for errors."""
    if not has_compiled_parts(model):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@torch.no_grad()
def _run(model: nn.Module, probe: Mapping[str, Tensor]) -> Any:
    with in_eval_mode(model), _as_written(model):
        return model(**probe)


def _takes(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    try:
        return _first_output(_run(model, batch)) is not None
    except LorakitError:
        raise
    # A model that does not take a batch may fail anywhere, with any type of error.
    except Exception:
        return False


def _first_output(result: Any) -> Tensor | None:
    logits = getattr(result, "logits", None)
    values = result.values() if isinstance(result, Mapping) else result
    outputs = [logits, *(values if not isinstance(values, Tensor) else [values])]
    found = (x for x in outputs if isinstance(x, Tensor) and x.is_floating_point())
    return next((x.float() for x in found), None)


def _candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield batches, the likeliest first."""
    floats = (p for p in model.parameters() if not p.is_meta and p.is_floating_point())
    weight = next(floats, None)
    if weight is None:
        return
    ids, inputs = _token_ids(model, weight.device), list(_signals(model, weight))
    main = getattr(model, "main_input_name", "input_ids")
    inputs.sort(key=lambda each: each[0] != main)
    text = {} if ids is None else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoded = {} if ids is None else {"decoder_input_ids": ids}
    if text and main == "input_ids":
        yield text | (decoded if is_encoder_decoder(model) else {})
    for name, values in inputs:
        yield {name: values}
        if decoded:
            yield {name: values, **decoded}
            yield {name: values, **text}
    if text and main != "input_ids":
        yield text


def _token_ids(model: nn.Module, device: torch.device) -> Tensor | None:
    """Token ids (1, length) from all over the vocabulary; None: the model has no embedding."""
    embedding = _text_embedding(model)
    if embedding is None:
        return None
    positions = _number(model, "max_position_embeddings", "max_target_positions") or 2 * TOKENS
    length = max(1, min(TOKENS, positions // 2))
    step = max(1, embedding.num_embeddings // (TOKENS + 1))
    return (torch.arange(1, length + 1, device=device) * step % embedding.num_embeddings)[None]


def _text_embedding(model: nn.Module) -> nn.Embedding | None:
    """The input embedding, or else the embedding with the size of the config's vocabulary."""
    found = input_embedding(model)
    if isinstance(found, nn.Embedding):
        return found
    size = _number(model, "vocab_size")
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return next((table for table in tables if table.num_embeddings == size), None)


def _signals(model: nn.Module, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield inputs that are no token ids, by name: numbers between -1 and 1."""

    def wave(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        values = torch.linspace(0, 40, count, device=weight.device).sin()
        return values.view(shape).to(weight.dtype)

    side = _number(model, "image_size") or SIDE
    yield "pixel_values", wave(1, _number(model, "num_channels") or 3, side, side)
    bins, half = _number(model, "num_mel_bins"), _number(model, "max_source_positions")
    if bins:
        # Whisper's encoder has half as many positions as the spectrogram has frames.
        yield "input_features", wave(1, bins, 2 * (half or 2 * TOKENS))
        yield "input_features", wave(1, 2 * TOKENS, bins)
    yield "input_values", wave(1, SAMPLES)


def _number(model: nn.Module, *names: str) -> int | None:
    """The first whole number that the model's config, or one inside it, has under these names."""
    config: Any = getattr(model, "config", None)
    parts = (getattr(config, part, None) for part in _PARTS)
    for each in (config, *parts):
        for name in names:
            value = getattr(each, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


_PARTS = ("text_config", "decoder", "vision_config", "encoder", "audio_config")
"""The attributes in which a config of several models holds those of its parts."""
