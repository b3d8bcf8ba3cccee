"""The memory of a server: one base, slots of requests, and their adapters."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from lorakit.attachment.plan import Plan
from lorakit.config.estimate import ServedSettings
from lorakit.errors import ConfigError
from lorakit.estimating.counter import StepCounter, fused_attention
from lorakit.estimating.sizes import tensors_bytes
from lorakit.kernels.stand_in import DeviceKind, standing_for
from lorakit.methods.lora.low_rank import LowRankComponent
from lorakit.models.quantized import base_tensors
from lorakit.models.shape import context_length
from lorakit.serving.kv_slots import SPARE, states_of, window_for

READ = 512
"""Tokens of a prompt that are read at once: `prefill_tokens` of `lorakit serve`."""
FLOAT_BYTES = 4
"""Of a logit as it is sampled from."""


def serving_bytes(
    model: PreTrainedModel, plan: Plan, settings: ServedSettings, *, device: DeviceKind
) -> dict[str, int]:
    """What a server holds when all its slots are as long as they may be, by what it is for.

    Args:
        model: the base on the meta device, without adapters.
        plan: what an adapter is on it.
        settings: of the server.
        device: the kind of device that it would run on.

    Raises:
        ConfigError: the model keeps no keys and values, so that it cannot be served.
    """
    longest = settings.max_length or context_length(model)
    if longest is None:
        raise ConfigError("the model has no context length of its own: give serve.max_length")
    with standing_for(device):
        per_token, reading = _read_once(model, min(READ, longest))
    width = model.dtype.itemsize
    own = width * sum(each.parameters for each in plan.of_kind(LowRankComponent))
    return {
        "weights": sum(each.nbytes for each in base_tensors(model)),
        "keys and values": settings.slots * window_for(longest + SPARE) * per_token,
        "adapters": settings.adapters * tensors_bytes(plan),
        "adapters of slots": settings.slots * own if settings.adapters else 0,
        "kept prompts": settings.prefix_bytes,
        "logits": settings.slots * getattr(model.config, "vocab_size", 0) * (width + FLOAT_BYTES),
        "reading a prompt": reading,
    }


def _read_once(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """The bytes of keys and values of a token, and what reading so many tokens needs besides.

    Raises:
        ConfigError: the model keeps something else, or nothing.
    """
    cache, counter = DynamicCache(config=model.config), StepCounter()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    try:
        with torch.no_grad(), counter, fused_attention(causal=True):
            model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        pairs = states_of(cache)
    # What is no decoder takes no cache, and says so in its own way.
    except Exception as error:
        name = type(model).__name__
        raise ConfigError(f"a {name} can't be served: {str(error).splitlines()[0]}") from error
    kept = sum(each.nbytes for pair in pairs for each in pair)
    return kept // tokens, max(0, counter.peak_bytes - kept)
