"""Answers to prompts: where they end, and how much of the model's context they may take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter.card import TrainedUse
from lorakit.attachment.state import active_card, active_name
from lorakit.data.batches import generation_batch, pad_token
from lorakit.data.encode import last_tokens
from lorakit.training.progress import steps
from lorakit.training.virtual_tokens import longest_row

Note = Callable[[str], None]
"""What is done with a remark, such as that prompts were cut."""


def warn(text: str) -> None:
    """Give a remark as a Python warning."""
    warnings.warn(text, stacklevel=3)


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
    context = longest_row(model, active_name(model))
    if context is None:
        return Fitted(
            prompts=[list(prompt) for prompt in prompts],
            rooms=[max_new_tokens] * len(prompts),
            remarks=(),
        )
    kept = context - min(max_new_tokens, context // 2)
    start = tokenizer.bos_token_id
    whole = [len(prompt) < context for prompt in prompts]
    made = [
        list(prompt) if fits else last_tokens(list(prompt), kept, start=start)
        for prompt, fits in zip(prompts, whole, strict=True)
    ]
    rooms = [min(max_new_tokens, context - len(prompt)) for prompt in made]
    cut, short = whole.count(False), sum(room < max_new_tokens for room in rooms)
    size = f"in the model's context of {context:,} tokens"
    remarks = []
    if cut:
        remarks.append(f"{cut:,} of {len(made):,} prompts have no room {size} and were cut")
    if short:
        remarks.append(
            f"{short:,} of {len(made):,} answers have less room than max_new_tokens"
            f" {max_new_tokens:,} {size}"
        )
    return Fitted(prompts=made, rooms=rooms, remarks=tuple(remarks))


def end_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, trained: Iterable[int] = ()
) -> list[int]:
    """The tokens that end an answer, in ascending order.

    These are the tokenizer's end token, those of the base's generation config (a chat model's turns
    often end in another token), and those that ended the targets in training.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    return sorted({end for end in (tokenizer.eos_token_id, *listed, *trained) if end is not None})


def generation_settings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, **options: Any
) -> GenerationConfig:
    """Settings for generation that do not inherit the base model's own sampling options."""
    trained = TrainedUse.on(active_card(model)).end_tokens
    ends = end_tokens(model, tokenizer, trained=trained)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=options.pop("do_sample", False),
        pad_token_id=pad_token(tokenizer),
        eos_token_id=ends or None,
        **options,
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: bool = False,
    note: Note = warn,
    **search: Any,
) -> list[str]:
    """The text that the model generates after each prompt; greedily, unless an option is given.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens; it is less where the model's context ends.
        batch_size: prompts at once.
        progress: show it on stderr.
        note: is called with each remark on prompts and answers that the context cuts short.
        search: options of transformers' GenerationConfig, such as num_beams.
    """
    model.eval()
    fit = fitted(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    for remark in fit.remarks:
        note(remark)
    texts = [""] * len(prompts)
    batches = list(_batches(fit, batch_size))
    for number in steps(len(batches), 1, title="answering", show=progress):
        rows = batches[number]
        batch = generation_batch([fit.prompts[row] for row in rows], pad_id=pad_token(tokenizer))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        room = fit.rooms[rows[0]]
        least = {n: min(room, search[n]) for n in ("min_new_tokens",) if n in search}
        settings = generation_settings(model, tokenizer, max_new_tokens=room, **search | least)
        written = cast(Any, model).generate(**batch, generation_config=settings)
        assert isinstance(written, Tensor)
        new = written[:, batch["input_ids"].shape[1] :].tolist()
        ends = set(settings.eos_token_id or ())
        for row, ids in zip(rows, new, strict=True):
            texts[row] = text_of(tokenizer, ids, ends)
    return texts


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
