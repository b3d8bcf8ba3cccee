"""Beam search as the paper's code does it (microsoft/LoRA c4593f06, `gpt2_beam.py`).

It differs from transformers' search in four ways, of which the first changes texts the most where
an answer repeats its prompt: n-grams are banned that the answer has already, whatever the prompt
says; they are banned before the softmax, so that the other words share their probability; a beam
that ends takes up one of the places of its step; and no answer is final before the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def beam_search(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    beams: int = 10,
    length_penalty: float = 0.9,
    no_repeat_ngram: int = 4,
    step: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """The best answer to each prompt, as token ids, with the token that ends it if there is one.

    An answer's score is the sum of its log-probabilities over its length (the end included) to the
    power of the penalty.

    Args:
        model: a causal language model that keeps keys and values, with or without a route.
        batch: `input_ids` and `attention_mask` (rows × positions), padded on the left.
        end_ids: tokens that end an answer.
        max_new_tokens: longest answer, in tokens.
        beams: how many partial answers are kept of each row.
        length_penalty: above 1 longer answers are preferred, below 1 shorter ones.
        no_repeat_ngram: how long a run of tokens must be that no answer has twice; 0: any may be.
        step: called after each step.
    """
    rows = batch["input_ids"].shape[0]
    # A route has one choice for each row of the batch, so the prompt is read once for each beam.
    wide = {name: tensor.repeat_interleave(beams, dim=0) for name, tensor in batch.items()}
    ids, mask = wide["input_ids"], wide["attention_mask"]
    best = _Best(rows, beams, end_ids, length_penalty)
    scores = torch.full((rows, beams), -torch.inf, device=ids.device)
    # All beams of a row are equal at first: the first one alone goes on.
    scores[:, 0] = 0
    history = ids[:, :0]
    cache = None
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        _ban_repeats(logits, history, no_repeat_ngram)
        summed = scores.unsqueeze(-1) + logits.log_softmax(-1).view(rows, beams, -1)
        vocabulary = summed.shape[-1]
        scores, chosen = summed.view(rows, -1).topk(beams, dim=1)
        first = torch.arange(0, rows * beams, beams, device=ids.device)
        origin = (chosen // vocabulary + first[:, None]).view(-1)
        ids = (chosen % vocabulary).view(-1, 1)
        cache.reorder_cache(origin)
        history = torch.cat([history[origin], ids], dim=1)
        mask = torch.cat([mask[origin], mask.new_ones(rows * beams, 1)], dim=1)
        best.end(scores, history)
        step()
        if bool(scores.isneginf().all()):
            break
    best.take(scores, history)
    return best.answers


class _Best:
    """The best answer of each row so far."""

    def __init__(
        self, rows: int, beams: int, end_ids: Sequence[int], length_penalty: float
    ) -> None:
        self.answers: list[list[int]] = [[] for _ in range(rows)]
        self._scores = [-torch.inf] * rows
        self._beams = beams
        self._end_ids = frozenset(end_ids)
        self._penalty = length_penalty

    def end(self, scores: Tensor, history: Tensor) -> None:
        """Take the beams that have ended, and let none of them go on."""
        for index, token in enumerate(history[:, -1].tolist()):
            if token in self._end_ids:
                row, beam = divmod(index, self._beams)
                self._offer(row, scores[row, beam].item(), history[index])
                scores[row, beam] = -torch.inf

    def take(self, scores: Tensor, history: Tensor) -> None:
        """Let the beams that are open at the last step compete with those that have ended."""
        for index, score in enumerate(scores.view(-1).tolist()):
            self._offer(index // self._beams, score, history[index])

    def _offer(self, row: int, score: float, answer: Tensor) -> None:
        score /= len(answer) ** self._penalty
        if score > self._scores[row]:
            self._scores[row] = score
            self.answers[row] = answer.tolist()


def _ban_repeats(logits: Tensor, history: Tensor, size: int) -> None:
    """Make impossible each token that would complete a run that the answer has already."""
    length = history.shape[1]
    if not size or length < size - 1:
        return
    for row, tokens in enumerate(history.tolist()):
        last = tokens[length - size + 1 :]
        banned = [
            tokens[end] for end in range(size - 1, length) if tokens[end - size + 1 : end] == last
        ]
        logits[row, banned] = -torch.inf
