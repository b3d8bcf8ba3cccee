"""A model's forward pass as the engine uses it: prompts in pieces, and steps of many rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lorakit.errors import ModelError
from lorakit.kernels.few_rows import few_rows
from lorakit.serving.attention_by_query import by_query, rows_by_query
from lorakit.serving.joint_pass import JointPass, PromptPiece
from lorakit.serving.kv_slots import KeyValueSlots, states_of
from lorakit.serving.row_windows import ColumnGroup, by_groups, groups_of
from lorakit.serving.step_attention import (
    Attention,
    attending,
    has_step_attention,
    use_step_attention,
    whole,
)

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
        self.reads_together = True
        """Whether prompts read together get the logits of each alone; `prove` finds out."""
        self.joins = False
        """Whether a step and parts of prompts can be one pass; `prove` finds out."""
        self.is_invariant = False
        """Whether logits do not depend on the batch, to the bit; `make_invariant` finds out."""

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
        with attending(by_query if self.is_invariant else None):
            output = self._call(
                torch.tensor([list(ids)], device=device),
                cache,
                torch.ones(1, past + len(ids), dtype=torch.long, device=device),
                positions,
                keep=None if every else 1,
            )
        return output[0]

    def read_together(
        self, texts: Sequence[Sequence[int]], caches: Sequence[DynamicCache]
    ) -> tuple[Tensor, list[DynamicCache]]:
        """Read the next tokens of several rows, each to the end of its text.

        The rows are a left-padded batch. All of them read as many tokens as the one that has the
        most new ones: another reads its latest tokens once more, or padding where it has no more.
        So no padding comes between a row's tokens, and windows and distances are its own.

        Args:
            texts: the tokens of each row from its beginning on.
            caches: what was read of each before; they stay as they are.

        Returns:
            The logits after each text, (rows, vocabulary), and caches that have read all of it.
        """
        new = max(
            len(text) - cache.get_seq_length() for text, cache in zip(texts, caches, strict=True)
        )
        pasts = [max(0, len(text) - new) for text in texts]
        past, device = max(pasts), self.model.device
        batch = _left_padded(caches, pasts)
        # Where each row begins.
        starts = torch.tensor([[past + new - len(text)] for text in texts], device=device)
        columns = torch.arange(past + new, device=device)
        padded = [[0] * (new - len(text)) + list(text[-new:]) for text in texts]
        output = self._call(
            torch.tensor(padded, device=device),
            batch,
            (columns >= starts).long(),
            (columns[past:] - starts).clamp(min=0),
            keep=1,
        )
        return output[:, -1], _apart(batch, [len(text) for text in texts])

    def step(
        self,
        tokens: Sequence[int],
        slots: KeyValueSlots,
        *,
        window: int | None = None,
        groups: Sequence[ColumnGroup] | None = None,
    ) -> Tensor:
        """The logits after one token more of each of the first slots, (rows, vocabulary).

        Args:
            tokens: of those slots.
            slots: their keys and values.
            window: the columns that all see, see `KeyValueSlots.begin`.
            groups: of rows that see others; None: those that pay, without a window.
        """
        lengths = slots.lengths[: len(tokens)]
        attention = None if window is not None else self._attention(lengths, groups)
        cache, mask, positions = slots.begin(len(tokens), window)
        device = self.model.device
        ids = torch.tensor(tokens, device=device)[:, None]
        own = torch.tensor(positions, device=device)[:, None]
        # Faster, but what is traced to be compiled must be no tensors of inference mode.
        inference = torch.inference_mode() if window is None else nullcontext()
        with inference, attending(attention):
            return self.in_place(ids, cache, mask, own)

    def join(
        self, tokens: Sequence[int], slots: KeyValueSlots, pieces: Sequence[PromptPiece]
    ) -> tuple[Tensor, Tensor]:
        """A step as by `step`, and the next tokens of prompts, in one forward pass.

        Args:
            tokens: of the first slots.
            slots: their keys and values.
            pieces: of the prompts.

        Returns:
            The logits after the step (rows, vocabulary), and after each piece (pieces, vocabulary).
        """
        rows, device = len(tokens), self.model.device
        cache, mask, positions = slots.begin(rows)
        joint = JointPass(
            cache,
            mask,
            pieces,
            of_answers=self._attention(slots.lengths[:rows]) or whole,
            of_pieces=by_query if self.is_invariant else whole,
        )
        ids = [*tokens, *(token for piece in pieces for token in piece.ids)]
        # transformers leaves masks of four dimensions alone, and what attends here needs none.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        with torch.inference_mode(), attending(joint.attend):
            logits = self._call(
                torch.tensor([ids], device=device),
                joint,
                unused,
                torch.tensor([[*positions, *joint.positions]], device=device),
                keep=joint.wanted,
            )[0]
        return logits[:rows], logits[rows:]

    def _attention(
        self, lengths: Sequence[int], groups: Sequence[ColumnGroup] | None = None
    ) -> Attention | None:
        """How a step's rows of some lengths attend; None: as the model does."""
        if self.is_invariant:
            return rows_by_query(lengths)
        groups = groups_of(lengths) if groups is None else groups
        return by_groups(groups) if groups else None

    @property
    def has_windows(self) -> bool:
        """Whether some layers see a window of the latest tokens alone."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        if kinds:
            return bool(kinds - {"full_attention"})
        return getattr(config, "sliding_window", None) is not None

    def in_place(self, ids: Tensor, cache: Cache, mask: Tensor, positions: Tensor) -> Tensor:
        """The logits of a step whose tensors are given, (rows, vocabulary)."""
        return self._call(ids, cache, mask, positions, keep=None)[:, -1]

    def _call(
        self,
        ids: Tensor,
        cache: Cache,
        mask: Tensor,
        positions: Tensor,
        *,
        keep: int | Sequence[int] | None,
    ) -> Tensor:
        """The logits of a forward pass.

        Args:
            ids: (rows, tokens).
            cache: of keys and values.
            mask: what the tokens see.
            positions: of the tokens.
            keep: the tokens whose logits are wanted: so many last ones, or those at these places;
                None: all.
        """
        more: dict[str, Any] = {}
        if keep is not None and "logits_to_keep" in self._takes:
            places = isinstance(keep, Sequence)
            more["logits_to_keep"] = torch.tensor(keep, device=ids.device) if places else keep
        if "position_ids" in self._takes:
            more["position_ids"] = positions
        with few_rows(self.model, ids.numel()):
            output = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
            )
        logits = output.logits
        assert isinstance(logits, Tensor)
        if keep is None or "logits_to_keep" in more:
            return logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]

    @torch.no_grad()
    def prove(self) -> None:
        """Make sure that rows over slots get the logits of the model's own forward pass.

        Raises:
            ModelError: they do not.
        """
        last = self.vocabulary - 1
        rows = [[min(token, last) for token in ids] for ids in ([5, 9], [3, 8, 4, 7, 6])]
        expected = [
            self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0, -1]
            for ids in rows
        ]
        self._prove_steps(rows, expected)
        self._prove_groups(rows, expected)
        self.reads_together = self._is_equal_together(rows, expected)
        self.joins = self._is_equal_joint(rows, expected)

    def _prove_steps(self, rows: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> None:
        try:
            found = self._stepped(rows)
        except ModelError:
            raise
        except Exception as error:
            raise self._refusal(f"a step fails: {error}") from error
        for row, own in zip(found, expected, strict=True):
            problem = difference(row, own)
            if problem:
                raise self._refusal(problem)

    def _prove_groups(self, rows: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> None:
        """Have rows of unlike lengths read their own columns, if the logits are then the same."""
        use_step_attention(self.model)
        groups = [ColumnGroup(0, 2, len(rows[1])), ColumnGroup(2, 3, len(rows[0]))]
        try:
            found = self._stepped(rows, groups)
        except Exception:
            use_step_attention(self.model, wanted=False)
            return
        if any(map(difference, found, expected)):
            use_step_attention(self.model, wanted=False)

    def _stepped(
        self, rows: Sequence[Sequence[int]], groups: Sequence[ColumnGroup] | None = None
    ) -> list[Tensor]:
        """The logits of two rows, their last tokens in a step of slots 2 and 0."""
        slots, tokens = self._begun(rows)
        found = self.step(tokens, slots, groups=groups)
        return [found[2], found[0]]

    def _begun(self, rows: Sequence[Sequence[int]]) -> tuple[KeyValueSlots, list[int]]:
        """Two rows without their last tokens in slots 2 and 0, and the tokens of the next step."""
        slots = KeyValueSlots(3)
        for slot, ids in zip((2, 0), rows, strict=True):
            cache = DynamicCache()
            for token in ids[:-1]:
                self.read([token], cache)
            slots.admit(slot, cache)
        return slots, [rows[1][-1], 0, rows[0][-1]]

    def _is_equal_together(self, rows: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> bool:
        """Whether rows that are read together, one of them in two parts, get their own logits."""
        try:
            caches = [DynamicCache() for _ in rows]
            self.read(rows[1][:2], caches[1])
            found, _ = self.read_together(rows, caches)
        except Exception:
            return False
        return not any(map(difference, found, expected))

    def _is_equal_joint(self, rows: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> bool:
        """Whether a step that reads prompts too, one of them in parts, gives all their logits."""
        # A window of tokens would need a mask of its own, and these rows are shorter than any.
        if self.has_windows or not has_step_attention(self.model):
            return False
        try:
            slots, tokens = self._begun(rows)
            begun = DynamicCache()
            self.read(rows[1][:2], begun)
            pieces = [PromptPiece(rows[1][2:], begun), PromptPiece(rows[0], DynamicCache())]
            step, read = self.join(tokens, slots, pieces)
        except Exception:
            return False
        found = [step[2], step[0], read[1], read[0]]
        return not any(map(difference, found, [*expected, *expected]))

    @torch.no_grad()
    def make_invariant(self) -> str | None:
        """Have a row's logits be the same to the bit whatever else is computed with it.

        Each query attends by itself, prompts are read without padding, and all else must compute
        each row by itself already, which a probe finds out.

        Returns:
            Why that can't be; None: it is so from now on.
        """
        if not self.joins:
            return (
                "its attention is not transformers' sdpa, or sees a window of tokens, so that rows "
                "of unlike lengths share its calls"
            )
        together, self.is_invariant = self.reads_together, True
        self.reads_together = False
        last = self.vocabulary - 1
        rows = [[min(token, last) for token in ids] for ids in ([5, 9], [3, 8, 4, 7, 6, 2, 11])]
        if all(map(torch.equal, *self._alone_and_joined(rows))):
            return None
        self.reads_together, self.is_invariant = together, False
        return "matrix products of many rows are not those of each row, to the bit"

    def _alone_and_joined(
        self, rows: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The logits of a step of two rows and of reading them: of each alone, and in one pass."""
        alone: list[Tensor] = []
        for ids in rows:
            slots, cache = KeyValueSlots(1), DynamicCache()
            self.read(ids[:-1], cache)
            slots.admit(0, cache)
            alone += [self.step([ids[-1]], slots)[0], self.read(ids, DynamicCache())[0]]
        slots, tokens = self._begun(rows)
        begun = DynamicCache()
        self.read(rows[1][:2], begun)
        pieces = [PromptPiece(rows[1][2:], begun), PromptPiece(rows[0], DynamicCache())]
        step, read = self.join(tokens, slots, pieces)
        return alone, [step[2], read[1], step[0], read[0]]

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"a {type(self.model).__name__} can't be served: in a batch over slots it does not "
            f"compute what it computes alone ({reason})"
        )


def _left_padded(caches: Sequence[DynamicCache], lengths: Sequence[int]) -> DynamicCache:
    """The first tokens of rows' own caches, so many of each, as the cache of a batch."""
    batch, longest = DynamicCache(), max(lengths)
    if not longest:
        return batch
    of_rows = [states_of(cache) for cache in caches]
    like = next(states for states in of_rows if states)
    for layer, pair in enumerate(like):
        keys, values = (x.new_zeros(len(caches), x.shape[1], longest, x.shape[3]) for x in pair)
        for row, (states, length) in enumerate(zip(of_rows, lengths, strict=True)):
            if length:
                for whole, own in zip((keys, values), states[layer], strict=True):
                    whole[row, :, longest - length :] = own[0, :, :length]
        batch.update(keys, values, layer)
    return batch


def _apart(batch: DynamicCache, lengths: Sequence[int]) -> list[DynamicCache]:
    """A cache of its own for each row of a left-padded batch, of so many tokens."""
    caches = [DynamicCache() for _ in lengths]
    for layer, pair in enumerate(states_of(batch)):
        for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            # A view would keep the other rows' memory as long as this one's is needed.
            keys, values = (x[row : row + 1, :, x.shape[2] - length :].clone() for x in pair)
            cache.update(keys, values, layer)
    return caches


def difference(found: Tensor, expected: Tensor) -> str | None:
    """How far logits are from others, if that is more than rounding."""
    limit = CLOSE.get(expected.dtype, CLOSE_HALF) * float(expected.abs().max())
    worst = float((found.float() - expected.float()).abs().max())
    return None if worst <= limit else f"a logit is {worst:.3g} off"
