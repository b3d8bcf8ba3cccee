"""A model's forward pass as the engine uses it: a prompt in pieces, and steps of many rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lorakit.errors import ModelError
from lorakit.serving.kv_slots import KeyValueSlots

CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far a logit of a step may be from that of the whole forward pass, over the largest logit."""
CLOSE_HALF = 0.05
"""The same in half precision."""


class Decoder:
    """Calls a causal language model that keeps keys and values.

    Raises:
        ModelError: the model is no such one, or its steps over slots differ from its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes = inspect.signature(model.forward).parameters
        if model.config.is_encoder_decoder or "past_key_values" not in self._takes:
            raise ModelError(
                f"a {type(model).__name__} can't be served: it is no decoder that keeps the keys "
                "and values of its tokens"
            )

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model's embedding has."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def read(self, ids: Sequence[int], cache: DynamicCache, *, every: bool = False) -> Tensor:
        """Read the next tokens of one row into a cache of its own.

        Args:
            ids: of the tokens.
            cache: what was read before.
            every: give the logits after each of the tokens, not after the last one alone.

        Returns:
            The logits (tokens or 1, vocabulary).
        """
        past = cache.get_seq_length()
        device = self.model.device
        positions = torch.arange(past, past + len(ids), device=device)[None]
        more: dict[str, Any] = {}
        if not every and "logits_to_keep" in self._takes:
            more["logits_to_keep"] = 1
        output = self._call(
            torch.tensor([list(ids)], device=device),
            cache,
            torch.ones(1, past + len(ids), dtype=torch.long, device=device),
            positions,
            **more,
        )
        return output[0] if every else output[0, -1:]

    def step(
        self, tokens: Sequence[int], slots: KeyValueSlots, *, window: int | None = None
    ) -> Tensor:
        """The logits after one token more of each of the first slots, (rows, vocabulary).

        Args:
            tokens: of those slots.
            slots: their keys and values.
            window: the columns that they see, see `KeyValueSlots.begin`.
        """
        cache, mask, positions = slots.begin(len(tokens), window)
        device = self.model.device
        ids = torch.tensor(tokens, device=device)[:, None]
        return self._call(ids, cache, mask, torch.tensor(positions, device=device)[:, None])[:, -1]

    def _call(
        self, ids: Tensor, cache: Cache, mask: Tensor, positions: Tensor, **more: Any
    ) -> Tensor:
        if "position_ids" in self._takes:
            more["position_ids"] = positions
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
        )
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    @torch.no_grad()
    def prove(self) -> None:
        """Make sure that rows over slots get the logits of the model's own forward pass.

        Raises:
            ModelError: they do not.
        """
        last = self.vocabulary - 1
        rows = [[min(token, last) for token in ids] for ids in ([5, 9], [3, 8, 4, 7, 6])]
        slots = KeyValueSlots(3)
        try:
            for slot, ids in zip((2, 0), rows, strict=True):
                cache = DynamicCache()
                for token in ids[:-1]:
                    self.read([token], cache)
                slots.admit(slot, cache)
            found = self.step([rows[1][-1], 0, rows[0][-1]], slots)
        except ModelError:
            raise
        except Exception as error:
            raise self._refusal(f"a step fails: {error}") from error
        for slot, ids in zip((2, 0), rows, strict=True):
            expected = self.model(input_ids=torch.tensor([ids], device=found.device)).logits[0, -1]
            problem = difference(found[slot], expected)
            if problem:
                raise self._refusal(problem)

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"a {type(self.model).__name__} can't be served: in a batch over slots it does not "
            f"compute what it computes alone ({reason})"
        )


def difference(found: Tensor, expected: Tensor) -> str | None:
    """How far logits are from others, if that is more than rounding."""
    limit = CLOSE.get(expected.dtype, CLOSE_HALF) * float(expected.abs().max())
    worst = float((found.float() - expected.float()).abs().max())
    return None if worst <= limit else f"a logit is {worst:.3g} off"
