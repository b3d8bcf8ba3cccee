"""Prompts that wait are read together: several in one forward pass, each with its own adapters."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from lorakit.methods.prompt.kv_cache import leave_alone
from lorakit.serving.decoder import Decoder
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.pace import Pace
from lorakit.serving.prefixes import Prefixes
from lorakit.serving.requests import Request
from lorakit.serving.sampling import Token, reported

FULL = 0.75
"""The least share of tokens in a pass that are no padding."""


@dataclass(eq=False)
class Prompt:
    """A request's prompt, while it is read into a cache of its own."""

    request: Request
    slot: int
    cache: DynamicCache = field(default_factory=DynamicCache)
    read: int = 0
    """Its tokens that the cache has."""
    cached: int = 0
    """Those of them that were read before, for another request."""
    tokens: list[Token | None] | None = None
    """With log-probabilities, where these are asked for."""

    def __post_init__(self) -> None:
        if self.request.prompt_logprobs is not None:
            # The first token is predicted by nothing, unless virtual tokens are before it.
            self.tokens = [None] if self.request.ids[0] == self.request.prompt[0] else []

    @property
    def left(self) -> int:
        """The tokens that are to be read."""
        return len(self.request.ids) - self.read

    @property
    def is_apart(self) -> bool:
        """Whether it is read in passes of its own: the logits of all tokens of all rows would be
        large, and virtual tokens are put in row by row."""
        return self.tokens is not None or self.request.use.virtual_tokens is not None


class PromptReader:
    """Reads prompts, the oldest first, and with it as many others as go well together.

    Args:
        decoder: calls the model.
        slots: A and B of each prompt.
        prefixes: what was read before.
        pace: how much of a prompt may be read while others are answered.
        most: the most tokens between two decode steps.
    """

    def __init__(
        self, decoder: Decoder, slots: HeldSlots, prefixes: Prefixes, pace: Pace, most: int
    ) -> None:
        self._decoder, self._slots, self._prefixes = decoder, slots, prefixes
        self._pace, self._most = pace, most

    def read(
        self, prompts: Sequence[Prompt], *, beside: bool
    ) -> Iterator[tuple[Prompt, Tensor | Exception]]:
        """Read as much as may be between two decode steps.

        Args:
            prompts: what is not yet read.
            beside: whether there are answers that wait for their next step.

        Yields:
            Prompts that were read whole with the logits (vocabulary) after their last token, and
            those that failed with the error. What is done with one comes before the next is read.
        """
        room = self._most
        share = self._pace.share(room) if beside else room
        waiting = sorted(prompts, key=lambda prompt: prompt.request.number)
        while waiting:
            group = self._group(waiting, share, room)
            if not group:
                return
            room -= len(group) * max(min(prompt.left, share) for prompt in group)
            for prompt, found in self._passed(group, share):
                if isinstance(found, Exception) or not prompt.left:
                    yield prompt, found
            waiting = [prompt for prompt in waiting if prompt not in group]

    def parts(self, prompts: Sequence[Prompt], *, rows: int) -> list[tuple[Prompt, int]]:
        """The prompts that are read in the answers' next step, the oldest first.

        Args:
            prompts: what is not yet read.
            rows: of the step.

        Returns:
            Each with the number of its tokens; nothing where one needs a pass of its own.
        """
        if any(prompt.is_apart for prompt in prompts):
            return []
        room = self._most
        share = self._pace.share(room, joined=rows)
        parts: list[tuple[Prompt, int]] = []
        waiting = sorted(prompts, key=lambda prompt: prompt.request.number)
        for at, prompt in enumerate(waiting):
            if self._waits(prompt, waiting[:at]):
                continue
            self._begin(prompt)
            part = min(prompt.left, share, room)
            if not part:
                break
            parts.append((prompt, part))
            room -= part
        return parts

    def _group(self, waiting: Sequence[Prompt], share: int, room: int) -> list[Prompt]:
        """The prompts of the next pass: the oldest, and others of like lengths; none: no room."""
        group: list[Prompt] = []
        longest, tokens = 0, 0
        for at, prompt in enumerate(waiting):
            count = len(group) + 1
            if count * longest > room or (group and not self._may_join(group[0])):
                break
            earlier = waiting[:at]
            if (group and not self._may_join(prompt)) or self._waits(prompt, earlier):
                continue
            own = min(prompt.left - self._known(prompt), share)
            size = count * max(longest, own)
            if size <= room and tokens + own >= FULL * size:
                self._begin(prompt)
                group.append(prompt)
                longest, tokens = max(longest, own), tokens + own
            elif not group:
                # Younger ones do not overtake the oldest.
                break
        return group

    def _may_join(self, prompt: Prompt) -> bool:
        return self._decoder.reads_together and not prompt.is_apart

    def _waits(self, prompt: Prompt, earlier: Sequence[Prompt]) -> bool:
        """Whether most of a prompt is in one that is read before it: it goes on from there."""
        return not prompt.read and any(
            2 * self._prefixes.common(prompt.request, other.request) >= prompt.left
            for other in earlier
            if prompt.tokens is None
        )

    def _known(self, prompt: Prompt) -> int:
        """The tokens of a prompt that need not be read, beside those that its cache has."""
        if prompt.read or prompt.tokens is not None:
            return 0
        return self._prefixes.count(prompt.request.use, prompt.request.ids)

    def _begin(self, prompt: Prompt) -> None:
        """Take what was read before of a prompt."""
        if prompt.read:
            return
        request = prompt.request
        if prompt.tokens is None:
            prompt.read, prompt.cache = self._prefixes.start(request.use, request.ids)
            known = request.ids[: prompt.read]
            prompt.cached = sum(token < self._decoder.vocabulary for token in known)
        if request.use.virtual_tokens is not None:
            leave_alone(prompt.cache)

    def _passed(
        self, group: Sequence[Prompt], share: int
    ) -> list[tuple[Prompt, Tensor | Exception]]:
        """The logits after a part more of some prompts; where together fails, of each alone."""
        try:
            return list(zip(group, self._pass(group, share), strict=True))
        except Exception as error:
            if len(group) == 1:
                return [(group[0], error)]
            return [each for prompt in group for each in self._passed([prompt], share)]

    def _pass(self, group: Sequence[Prompt], share: int) -> list[Tensor]:
        """The logits after a part more of some prompts, in one forward pass."""
        # Slots that follow each other need not be copied.
        ordered = sorted(group, key=lambda prompt: prompt.slot)
        parts = [min(prompt.left, share) for prompt in ordered]
        begun = time.perf_counter()
        if len(ordered) == 1:
            used = self._slots.reading(ordered[0].slot, ordered[0].request.use.terms)
        else:
            used = self._slots.used_by([prompt.slot for prompt in ordered])
        # Without the counting of writes, which a pass of few tokens notices.
        with used, torch.inference_mode():
            if len(ordered) == 1:
                found = [self._alone(ordered[0], parts[0])]
            else:
                found = self._together(ordered, parts)
        # A GPU has not computed what nobody asks for.
        float(found[-1][0])
        taken = time.perf_counter() - begun
        self._pace.read(len(parts) * max(parts), taken, prompts=len(parts))
        for prompt, part in zip(ordered, parts, strict=True):
            prompt.read += part
        logits = dict(zip(ordered, found, strict=True))
        return [logits[prompt] for prompt in group]

    def _together(self, group: Sequence[Prompt], parts: Sequence[int]) -> list[Tensor]:
        texts = [
            prompt.request.ids[: prompt.read + part]
            for prompt, part in zip(group, parts, strict=True)
        ]
        logits, caches = self._decoder.read_together(texts, [prompt.cache for prompt in group])
        for prompt, cache in zip(group, caches, strict=True):
            prompt.cache = cache
        return list(logits)

    def _alone(self, prompt: Prompt, part: int) -> Tensor:
        request, end = prompt.request, prompt.read + part
        ids = request.ids[prompt.read : end]
        logits = self._decoder.read(ids, prompt.cache, every=prompt.tokens is not None)
        if prompt.tokens is not None:
            following = request.ids[prompt.read + 1 : end + 1]
            prompt.tokens += [
                reported(own, token, request.prompt_logprobs, ranked=True)
                for own, token in zip(logits, following, strict=False)
                # Virtual tokens are no text.
                if token < self._decoder.vocabulary
            ]
        return logits[-1]
