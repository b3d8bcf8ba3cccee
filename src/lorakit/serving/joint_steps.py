"""Steps of the answers that read parts of prompts in the same forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from lorakit.serving.decoder import Decoder
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.joint_pass import PromptPiece
from lorakit.serving.kv_slots import KeyValueSlots, states_of
from lorakit.serving.pace import Pace
from lorakit.serving.prompt_reading import Prompt, PromptReader


@dataclass(frozen=True)
class Joint:
    """What a joint step gave."""

    logits: Tensor
    """After one token more of each of the first slots, (rows, vocabulary)."""
    read: Sequence[tuple[Prompt, Tensor]]
    """The prompts that were read whole, with the logits (vocabulary) after their last token."""


class JointSteps:
    """Computes a step of the answers and parts of prompts in one pass, where that can be.

    Args:
        decoder: calls the model.
        slots: A and B of the rows and prompts.
        keys_and_values: of the rows.
        reader: knows which prompts are next.
        pace: how much of them may be read.
        note: is told why there are no joint steps any more.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: HeldSlots,
        keys_and_values: KeyValueSlots,
        reader: PromptReader,
        pace: Pace,
        *,
        note: Callable[[str], None],
    ) -> None:
        self._decoder, self._slots, self._states = decoder, slots, keys_and_values
        self._reader, self._pace, self._note = reader, pace, note
        self.count = 0
        """Joint steps so far."""

    def step(
        self, tokens: Sequence[int], used: Sequence[int], prompts: Sequence[Prompt]
    ) -> Joint | None:
        """One token more of each of the first slots, and parts of prompts; None: not in one pass.

        Nothing has happened then. An error is the pass's own, and ends joint steps for good: what
        computes the same apart tells whose error it is.

        Args:
            tokens: of those slots.
            used: the slots that answer.
            prompts: what is not yet read.
        """
        taken = [*used, *(prompt.slot for prompt in prompts)]
        if not self._decoder.joins or self._slots.has_others(taken):
            return None
        parts = self._reader.parts(prompts, rows=len(tokens))
        if not parts:
            return None
        begun = time.perf_counter()
        try:
            logits, found = self._pass(tokens, parts)
            # A GPU has not computed what nobody asks for.
            float(logits[0, 0])
        except Exception as error:
            for prompt, _ in parts:
                prompt.cache = _cut(prompt.cache, prompt.read)
            self._decoder.joins = False
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            self._note(f"prompts are no longer read in the answers' steps: {reason}")
            return None
        count = len(tokens) + sum(part for _, part in parts)
        self._pace.read(count, time.perf_counter() - begun, prompts=len(parts))
        self.count += 1
        for prompt, part in parts:
            prompt.read += part
        whole = [
            (prompt, own) for (prompt, _), own in zip(parts, found, strict=True) if not prompt.left
        ]
        return Joint(logits, whole)

    def _pass(
        self, tokens: Sequence[int], parts: Sequence[tuple[Prompt, int]]
    ) -> tuple[Tensor, Tensor]:
        pieces = [
            PromptPiece(prompt.request.ids[prompt.read : prompt.read + part], prompt.cache)
            for prompt, part in parts
        ]
        of_prompts = [((prompt.slot,), part) for prompt, part in parts]
        with self._slots.used_in_parts([(range(len(tokens)), 1), *of_prompts]):
            return self._decoder.join(tokens, self._states, pieces)


def _cut(cache: DynamicCache, tokens: int) -> DynamicCache:
    """The first tokens of a cache, some layers of which may have more."""
    kept = DynamicCache()
    if tokens:
        for layer, (keys, values) in enumerate(states_of(cache)):
            kept.update(keys[:, :, :tokens], values[:, :, :tokens], layer)
    return kept
