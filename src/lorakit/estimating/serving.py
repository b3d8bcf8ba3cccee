"""The memory of a server: one base, slots of requests, and their adapters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lorakit.attachment.plan import Plan
from lorakit.config.base import dtype_name
from lorakit.config.estimate import ServedSettings
from lorakit.errors import ConfigError
from lorakit.estimating.counter import StepCounter, fused_attention
from lorakit.estimating.sizes import tensors_bytes
from lorakit.kernels.stand_in import DeviceKind, standing_for
from lorakit.methods.lora.low_rank import LowRankComponent
from lorakit.models.quantized import base_tensors
from lorakit.models.shape import context_length
from lorakit.serving.kv_slots import KeyValueSlots, states_of
from lorakit.serving.pace import CHUNK
from lorakit.serving.worker import Limits

READ = 512
"""Tokens of a prompt that are read at once: `prefill_tokens` of `lorakit serve`."""


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
    states = KeyValueSlots(settings.slots)
    with standing_for(device):
        prompts, reading = _read(model, settings.slots, longest)
        for slot in range(settings.slots):
            states.admit(slot, prompts)
        step = _step(model, states)
    low_ranks = plan.of_kind(LowRankComponent)
    narrow = [each for each in low_ranks if each.site.rank <= Limits.slot_rank]
    # What is not in the slots is computed in their precision all the same.
    copied = [
        each
        for each in low_ranks
        if each.site.rank > Limits.slot_rank and each.config.dtype != dtype_name(model.dtype)
    ]
    of_slots, of_used = (
        model.dtype.itemsize * sum(each.parameters for each in some) for some in (narrow, copied)
    )
    used = min(settings.adapters, settings.slots)
    return {
        "weights": sum(each.nbytes for each in base_tensors(model)),
        "keys and values": states.size_bytes,
        "adapters": settings.adapters * tensors_bytes(plan),
        "adapters of slots": settings.slots * of_slots * bool(used) + used * of_used,
        "kept prompts": settings.prefix_bytes,
        # One follows the other.
        "a step, or reading a prompt": max(step, reading),
    }


def _read(model: PreTrainedModel, slots: int, tokens: int) -> tuple[DynamicCache, int]:
    """The keys and values of prompts of so many tokens, and the memory of reading them.

    They are in a cache of their own until all of a prompt is read, and then copied into its slot.
    Prompts are read together, in a cache for all of them and then in one for each; of a long one
    the last part is read here. Beside answers a pass reads a few tokens of each prompt, as many as
    the machine's speed allows, so at most all prompts but that of one answer are read at once.

    Raises:
        ConfigError: the model keeps something else, or nothing.
    """
    cache, part = DynamicCache(config=model.config), min(READ, tokens)
    rows = min(slots, READ // part)
    if tokens > part:
        _forward(model, cache, rows=1, new=tokens - part, seen=tokens - part)
    before = sum(each.nbytes for each in _held(cache))
    counted = before + _forward(model, cache, rows=rows, new=part, seen=tokens)
    try:
        kept = sum(each.nbytes for pair in states_of(cache) for each in pair)
    except Exception as error:
        raise _refusal(model, error) from error
    together = max(rows, min(slots - 1, READ // CHUNK))
    return cache, max(counted, 2 * kept * together // rows) if together > 1 else counted


def _step(model: PreTrainedModel, states: KeyValueSlots) -> int:
    """The memory of a step of all slots, beside what they hold."""
    cache, mask, _ = states.begin(len(states.lengths))
    rows, seen = mask.shape
    return _forward(model, cache, rows=rows, new=1, seen=seen)


def _forward(model: PreTrainedModel, cache: Cache, *, rows: int, new: int, seen: int) -> int:
    """The peak of a forward pass, with what it adds to a cache of what was read before.

    Raises:
        ConfigError: the model takes no cache.
    """
    counter = StepCounter()
    counter.hold(base_tensors(model), "weights")
    counter.hold(_held(cache), "weights")
    counter.begin()
    before = counter.peak_bytes
    with torch.device("meta"):
        ids = torch.zeros(rows, new, dtype=torch.long)
        positions = torch.arange(seen - new, seen)[None].expand(rows, -1)
    is_masked = rows > 1 or new < seen
    try:
        with torch.no_grad(), counter, fused_attention(causal=None if is_masked else True):
            mask = None
            if is_masked:
                # What transformers would make from the values of the short one.
                mask = torch.empty(rows, 1, new, seen, dtype=torch.bool, device="meta")
            model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    # What is no decoder takes no cache, and says so in its own way.
    except Exception as error:
        raise _refusal(model, error) from error
    return counter.peak_bytes - before


def _held(cache: Cache) -> list[Tensor]:
    found = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return [each for each in found if isinstance(each, Tensor)]


def _refusal(model: PreTrainedModel, error: Exception) -> ConfigError:
    return ConfigError(f"a {type(model).__name__} can't be served: {str(error).splitlines()[0]}")
