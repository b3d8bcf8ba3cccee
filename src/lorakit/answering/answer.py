"""Answers to prompts, in batches, and how much of the model's context they may take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from lorakit.answering.beam_search import BeamSearch, beam_search
from lorakit.answering.ends import RowEnds, ends_of_rows
from lorakit.config.answering import GenerateConfig
from lorakit.config.verbs import ChatConfig
from lorakit.data.batches import generation_batch, pad_token
from lorakit.data.encode import last_tokens
from lorakit.kernels.few_rows import few_rows
from lorakit.models.shape import is_encoder_decoder
from lorakit.routing.row_parts import RouteParts, names_of_rows
from lorakit.training.progress import steps
from lorakit.training.virtual_tokens import longest_row

Note = Callable[[str], None]
"""What is done with a remark, such as that prompts were cut."""


def warn(text: str) -> None:
    """Give a remark as a Python warning."""
    warnings.warn(text, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class RandomSampling:
    """The settings of random sampling."""

    temperature: float
    """Above 1 the likelier tokens are drawn less often than their probability, below 1 more."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together."""


def sampling_of(settings: GenerateConfig | ChatConfig) -> RandomSampling | None:
    """The random sampling that settings ask for; None: they take the likeliest."""
    if settings.temperature == 0:
        return None
    return RandomSampling(temperature=settings.temperature, top_p=settings.top_p)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Prompts that leave room for an answer in the model's context."""

    prompts: list[list[int]]
    rooms: list[int]
    """The most tokens of each answer."""
    remarks: tuple[str, ...]
    """How many prompts were cut, and how many answers have less room than was asked for."""


def fitted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> Fitted:
    """Prompts and the room of their answers, so that both fit the model's context.

    A prompt is whole, and its answer has what is left. Where nothing is left, the prompt loses its
    beginning, as in training, and the answer has `max_new_tokens`, or half of the context.
    """
    contexts = _contexts(model, len(prompts))
    if contexts is None:
        return Fitted(
            prompts=[list(prompt) for prompt in prompts],
            rooms=[max_new_tokens] * len(prompts),
            remarks=(),
        )
    if is_encoder_decoder(model):
        whole = longest_row(model, None)
        assert whole is not None
        return _fitted_to_stacks(prompts, contexts, context=whole, max_new_tokens=max_new_tokens)
    start = tokenizer.bos_token_id
    made = []
    for prompt, context in zip(prompts, contexts, strict=True):
        kept = context - min(max_new_tokens, context // 2)
        fits = len(prompt) < context
        made.append(list(prompt) if fits else last_tokens(list(prompt), kept, start=start))
    pairs = list(zip(made, contexts, strict=True))
    rooms = [min(max_new_tokens, context - len(prompt)) for prompt, context in pairs]
    cut = sum(len(own) < len(prompt) for own, prompt in zip(made, prompts, strict=True))
    short = sum(room < max_new_tokens for room in rooms)
    size = f"in the model's context of {min(contexts):,} tokens"
    remarks = []
    if cut:
        remarks.append(f"{cut:,} of {len(made):,} prompts have no room {size} and were cut")
    if short:
        remarks.append(
            f"{short:,} of {len(made):,} answers have less room than max_new_tokens"
            f" {max_new_tokens:,} {size}"
        )
    return Fitted(prompts=made, rooms=rooms, remarks=tuple(remarks))


def _fitted_to_stacks(
    prompts: Sequence[Sequence[int]],
    contexts: Sequence[int],
    *,
    context: int,
    max_new_tokens: int,
) -> Fitted:
    """Prompts for an encoder, and the room of answers in a decoder of the same context.

    As in training, a prompt that is too long loses its end, but for its last token.

    Args:
        prompts: token ids.
        contexts: the most tokens of each prompt.
        context: the most tokens that the model reads, and writes.
        max_new_tokens: of an answer.
    """
    pairs = list(zip(prompts, contexts, strict=True))
    made = [[*prompt[: room - 1], *prompt[-1:]] for prompt, room in pairs]
    made = [
        own if len(prompt) > room else list(prompt)
        for own, (prompt, room) in zip(made, pairs, strict=True)
    ]
    cut = sum(len(own) < len(prompt) for own, prompt in zip(made, prompts, strict=True))
    size = f"in the model's context of {min(contexts):,} tokens"
    remarks = (f"{cut:,} of {len(made):,} prompts have no room {size} and were cut",) if cut else ()
    # The decoder's start token takes up a place, and no virtual tokens do.
    rooms = [min(max_new_tokens, context - 1)] * len(made)
    return Fitted(prompts=made, rooms=rooms, remarks=remarks)


def _contexts(model: nn.Module, rows: int) -> list[int] | None:
    """The most tokens of each row beside its adapter's virtual tokens; None: there is no limit."""
    whole = longest_row(model, None)
    if whole is None:
        return None
    names = names_of_rows(model, rows)
    own = {name: longest_row(model, name) or whole for used in names for name in used}
    return [min((own[name] for name in used), default=whole) for used in names]


def generation_settings(
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    *,
    max_new_tokens: int,
    sampling: RandomSampling | None = None,
) -> GenerationConfig:
    """Settings for generation that do not inherit the base model's own sampling options."""
    drawn = _UNUSED_SAMPLING if sampling is None else _NEUTRAL_SAMPLING | vars(sampling)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling is not None,
        pad_token_id=pad_token(tokenizer),
        eos_token_id=sorted(ends) or None,
        # transformers fills what is left out with the base's own values.
        **(_NEUTRAL | drawn),
    )


_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Options of transformers' generation that leave the model's probabilities as they are."""
_NEUTRAL_SAMPLING: dict[str, Any] = {"top_k": 0, "min_p": 0.0}
_UNUSED_SAMPLING: dict[str, Any] = {"top_k": 50, "top_p": 1.0, "temperature": 1.0}
"""transformers' defaults: it warns of any others where nothing is drawn."""


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    search: BeamSearch | RandomSampling | None = None,
    stop: str | None = None,
    progress: bool = False,
    note: Note = warn,
) -> list[str]:
    """The text that the model generates after each prompt.

    Under a route for rows, each prompt is a row of it: it is answered by its own adapter, and its
    answer ends where those of this adapter do.

    Args:
        model: a language model, with or without an adapter.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens; it is less where the model's context ends.
        batch_size: sequences at once: prompts, or beams of all prompts.
        search: how tokens are chosen. None: the likeliest each time.
        stop: a text of one token that ends an answer, beside the end tokens.
        progress: show it on stderr.
        note: is called with each remark on prompts and answers that the context cuts short.

    Raises:
        ConfigError: `stop` is not one token.
        ModelError: the model cannot be searched with beams.
        RouteError: the route is for another number of rows.
    """
    model.eval()
    ends = ends_of_rows(model, tokenizer, len(prompts), stop=stop)
    fit = fitted(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    for remark in fit.remarks:
        note(remark)
    texts = [""] * len(prompts)
    beams = search.beams if isinstance(search, BeamSearch) else 1
    at_once = max(1, batch_size // beams)
    batches, route = list(_batches(fit, at_once)), RouteParts(model, len(prompts), at_once=at_once)
    for number in steps(len(batches), 1, title="answering", show=progress):
        rows = batches[number]
        batch = generation_batch(
            [fit.prompts[row] for row in rows],
            pad_id=pad_token(tokenizer),
            on_right=model.config.is_encoder_decoder,
        )
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        own, room = [ends[row] for row in rows], fit.rooms[rows[0]]
        if isinstance(search, BeamSearch):
            written = beam_search(
                model, batch, search, route=route, rows=rows, ends=own, max_new_tokens=room
            )
        else:
            with route.of(rows):
                written = _generated(model, tokenizer, batch, own, search, max_new_tokens=room)
        for row, ids in zip(rows, written, strict=True):
            texts[row] = text_of(tokenizer, ids, ends[row])
    return texts


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Tensor],
    ends: Sequence[frozenset[int]],
    sampling: RandomSampling | None,
    *,
    max_new_tokens: int,
) -> list[list[int]]:
    """The token ids that transformers' `generate` writes after each prompt, and what pads them."""
    common = frozenset.intersection(*ends)
    settings = generation_settings(
        tokenizer, common, max_new_tokens=max_new_tokens, sampling=sampling
    )
    criteria: list[Any] = [RowEnds(ends)] if any(own != common for own in ends) else []
    with few_rows(model, len(ends)):
        written = cast(Any, model).generate(
            **batch, generation_config=settings, stopping_criteria=StoppingCriteriaList(criteria)
        )
    assert isinstance(written, Tensor)
    return cast(list[list[int]], written[:, answer_start(model, batch["input_ids"]) :].tolist())


def answer_start(model: PreTrainedModel, prompts: Tensor) -> int:
    """The position at which answers begin in what `generate` returns.

    It is after the prompts (rows × positions), or after the start token of a decoder.
    """
    return 1 if model.config.is_encoder_decoder else prompts.shape[1]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Collection[int]) -> str:
    """The text of an answer up to the token that ends it, without white space around it."""
    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(list(ids[:stop]), skip_special_tokens=True)).strip()


def _batches(fit: Fitted, batch_size: int) -> Iterator[list[int]]:
    """The rows of each batch: prompts of similar length, whose answers have the same room."""
    order = sorted(range(len(fit.prompts)), key=lambda row: len(fit.prompts[row]))
    for _, group in groupby(order, key=lambda row: fit.rooms[row]):
        rows = list(group)
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
