"""Beam search as the paper's code does it (microsoft/LoRA c4593f06, `gpt2_beam.py`).

It differs from transformers' search in four ways, of which the first changes texts the most where
an answer repeats its prompt: n-grams are banned that the answer has already, whatever the prompt
says; they are banned before the softmax, so that the other words share their probability; a beam
that ends takes up one of the places of its step; and no answer is final while another may yet be
better. The paper's code goes on to the last step; here a row is done as soon as none can be.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lorakit.config.answering import EvaluateConfig, GenerateConfig
from lorakit.errors import ModelError
from lorakit.kernels.few_rows import few_rows
from lorakit.methods.prompt.kv_cache import choose_rows
from lorakit.routing.row_parts import RouteParts


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """How wide a search is, and what it prefers. The defaults are the paper's (table 11)."""

    beams: int = 10
    """How many partial answers are kept of each row."""
    length_penalty: float = 0.9
    """An answer's score is the sum of its log-probabilities over its length (the end included) to
    this power: above 1 longer answers are preferred, below 1 shorter ones."""
    no_repeat_ngram: int = 4
    """How long a run of tokens must be that no answer has twice; 0: any may be."""


def search_of(settings: GenerateConfig | EvaluateConfig) -> BeamSearch | None:
    """The beam search that settings ask for; None: they have one beam."""
    if settings.num_beams == 1:
        return None
    return BeamSearch(
        beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        no_repeat_ngram=settings.no_repeat_ngram,
    )


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    search: BeamSearch,
    *,
    route: RouteParts,
    rows: Sequence[int],
    ends: Sequence[Collection[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """The best answer to each prompt, as token ids, with the token that ends it if there is one.

    Args:
        model: a causal language model that keeps keys and values.
        batch: `input_ids` and `attention_mask` (rows × positions), padded on the left.
        search: the width of the search, and what it prefers.
        route: what the model's rows use.
        rows: the number of each prompt's row among those of the route.
        ends: for each row the tokens that end its answer.
        max_new_tokens: longest answer, in tokens.

    Raises:
        ModelError: the model keeps no keys and values.
    """
    reader = _Reader(model, batch, route, rows)
    best = [_Best(each, search.length_penalty, max_new_tokens) for each in ends]
    going = best
    logits = reader.read(batch["input_ids"])
    # The beams of a row differ from the first step on, so that its prompt is read once.
    scores, history = logits.new_zeros(len(best), 1), batch["input_ids"][:, None, :0]
    for step in range(max_new_tokens):
        _ban_repeats(logits, history.flatten(0, 1), search.no_repeat_ngram)
        scores, origin, tokens = _likeliest(scores, logits, search.beams)
        history = torch.cat([history.flatten(0, 1)[origin], tokens[..., None]], dim=-1)
        pairs = enumerate(zip(going, scores, history.tolist(), strict=True))
        more = [index for index, (row, *beams) in pairs if row.take(*beams)]
        if not more or step == max_new_tokens - 1:
            break
        going = [going[index] for index in more]
        scores, history = scores[more], history[more]
        reader.go_on_from(origin[more].flatten().tolist())
        logits = reader.read(history[..., -1].view(-1, 1))
    return [row.answer for row in best]


def _likeliest(scores: Tensor, logits: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest continuations of each row's beams.

    Args:
        scores: the summed log-probability of each beam (rows × beams so far).
        logits: of the next token (rows · beams so far × vocabulary).
        beams: how many continuations of a row to keep.

    Returns:
        Their scores, the numbers of the beams that they go on from, and their last tokens (each
        rows × beams).
    """
    rows, width = scores.shape
    vocabulary = logits.shape[-1]
    summed = scores.unsqueeze(-1) + logits.log_softmax(-1).view(rows, width, vocabulary)
    kept = min(beams, width * vocabulary)
    found, chosen = summed.view(rows, -1).topk(kept, dim=1)
    first = torch.arange(0, rows * width, width, device=scores.device)
    return found, chosen // vocabulary + first[:, None], chosen % vocabulary


class _Reader:
    """A model that reads prompts, and then one token of each beam after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: dict[str, Tensor],
        route: RouteParts,
        rows: Sequence[int],
    ) -> None:
        self._model, self._route = model, route
        self._takes = inspect.signature(model.forward).parameters
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"{model.config.model_type} is an encoder-decoder, and this beam search is the"
                " paper's, of decoders: num_beams 1 answers without one"
            )
        if "past_key_values" not in self._takes:
            raise ModelError(
                f"a {type(model).__name__} keeps no keys and values, which a beam search needs:"
                " num_beams 1 answers without one"
            )
        self._cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._mask = batch["attention_mask"]
        self._row_of_beam = list(rows)

    def read(self, ids: Tensor) -> Tensor:
        """The logits after these tokens of each beam (beams × vocabulary), in float32."""
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options = {"position_ids": positions, "logits_to_keep": 1}
        with self._route.of(self._row_of_beam), few_rows(self._model, ids.numel()):
            output = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                past_key_values=self._cache,
                use_cache=True,
                **{name: value for name, value in options.items() if name in self._takes},
            )
        return cast(Tensor, output.logits[:, -1].float())

    def go_on_from(self, beams: Sequence[int]) -> None:
        """Keep these beams, in this order; one from which several go on is there several times."""
        choose_rows(self._cache, beams)
        next_token = self._mask.new_ones(len(beams), 1)
        self._mask = torch.cat([self._mask[list(beams)], next_token], dim=1)
        self._row_of_beam = [self._row_of_beam[beam] for beam in beams]


@dataclass
class _Best:
    """The best answer to one prompt so far."""

    ends: Collection[int]
    penalty: float
    longest: int
    """The most tokens of an answer."""
    answer: list[int] = field(default_factory=list)
    _score: float = -torch.inf

    def take(self, scores: Tensor, beams: list[list[int]]) -> bool:
        """Let ended beams compete, at the last step open ones too, and let no ended one go on.

        Args:
            scores: of each beam the summed log-probability; those of ended ones become -inf.
            beams: the tokens of each.

        Returns:
            Whether a beam may yet become a better answer.
        """
        open_scores = []
        for beam, (tokens, score) in enumerate(zip(beams, scores.tolist(), strict=True)):
            ended = tokens[-1] in self.ends
            if ended or len(tokens) == self.longest:
                self._offer(tokens, score)
            if ended:
                scores[beam] = -torch.inf
            else:
                open_scores.append(score)
        following = len(beams[0]) + 1
        # A sum only falls, and is divided by no more than the longest answer's power of its length.
        divisor = max(following**self.penalty, self.longest**self.penalty)
        return max(open_scores, default=-torch.inf) / divisor > self._score

    def _offer(self, tokens: list[int], score: float) -> None:
        score /= len(tokens) ** self.penalty
        if score > self._score:
            self._score, self.answer = score, tokens


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
