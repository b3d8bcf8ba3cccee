"""Batches of samples: padded on the right or packed for training, on the left for generation."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.data.chat import IGNORED
from lorakit.data.objectives.preference import TARGETS
from lorakit.data.samples import Example, flattened


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that fills a batch: the pad token, else the end token, else token 0.

    Any token would do: the attention mask hides it, and its label is IGNORED.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def training_batch(
    examples: Sequence[Example], *, pad_id: int, multiple: int = 1
) -> dict[str, Tensor]:
    """A batch of samples, padded on the right to the longest of them, up to a multiple of tokens.

    Of samples of several texts it has all first ones, then all second ones, and so on; labels are
    of the first.

    Returns:
        input_ids, attention_mask and, if the samples have them, token_type_ids: (batch, length);
        decoder_input_ids of an encoder-decoder, which its labels are as long as;
        labels: for tokens (batch, length), with IGNORED on padding; for classes (batch,) in int64;
        for several of them (batch, classes), and for a regression (batch,), in float32.
    """
    texts = flattened(examples)
    ids = [text.input_ids for text in texts]
    length = math.ceil(max(map(len, ids)) / multiple) * multiple
    batch = {
        "input_ids": _rectangle(ids, length, pad_id),
        "attention_mask": _rectangle([[1] * len(row) for row in ids], length, 0),
    }
    decoder = [each.decoder_input_ids for each in examples if each.decoder_input_ids is not None]
    if decoder:
        length = max(map(len, decoder))
        # Its mask is causal, so that what pads it at the end is seen by nothing that has a label.
        batch["decoder_input_ids"] = _rectangle(decoder, length, pad_id)
    batch["labels"] = _labels(examples, length)
    types = [text.token_type_ids for text in texts if text.token_type_ids is not None]
    if types:
        batch["token_type_ids"] = _rectangle(types, batch["input_ids"].shape[1], 0)
    return batch


def preference_batch(
    examples: Sequence[Example], *, pad_id: int, multiple: int = 1
) -> dict[str, Tensor]:
    """A batch of prompts with their chosen answers, then with their rejected ones, padded likewise.

    Returns:
        input_ids, attention_mask, and where answers are, `TARGETS`: (2·batch, length); labels: a 0
        for each prompt, which say nothing.
    """
    pairs = [*examples, *(each.rejected for each in examples if each.rejected is not None)]
    assert len(pairs) == 2 * len(examples), "each has both answers"
    batch = training_batch(pairs, pad_id=pad_id, multiple=multiple)
    targets = (batch["labels"] != IGNORED).long()
    return batch | {TARGETS: targets, "labels": torch.zeros(len(examples))}


def joined_batch(
    examples: Sequence[Example], *, pad_id: int = 0, multiple: int = 1
) -> dict[str, Tensor]:
    """A batch of samples packed into one row, padded at its end up to a multiple of tokens.

    Args:
        examples: samples with a label per token.
        pad_id: the token of the padding.
        multiple: the row's length is a multiple of it.

    Returns:
        input_ids; position_ids, which start at 0 for each sample; labels, IGNORED on each sample's
        first token, which nothing predicts: (1, tokens).
    """
    row: dict[str, list[int]] = {
        "input_ids": [token for each in examples for token in each.input_ids],
        "position_ids": [at for each in examples for at in range(len(each.input_ids))],
        "labels": [],
    }
    for each in examples:
        assert isinstance(each.labels, list)
        row["labels"] += [IGNORED, *each.labels[1:]]
    missing = -len(row["input_ids"]) % multiple
    fill = {"input_ids": pad_id, "position_ids": 0, "labels": IGNORED}
    return {n: torch.tensor([values + [fill[n]] * missing]) for n, values in row.items()}


def generation_batch(
    prompts: Sequence[Sequence[int]], *, pad_id: int, on_right: bool = False
) -> dict[str, Tensor]:
    """A batch of prompts, padded on the left, so that every answer begins at the same position.

    Those of an encoder-decoder, whose answers do not follow them, are padded on the right.

    Returns:
        input_ids and attention_mask: (batch, length).
    """
    length = max(map(len, prompts))
    pads = [length - len(prompt) for prompt in prompts]
    if on_right:
        mask = [[1] * (length - pad) + [0] * pad for pad in pads]
        return {
            "input_ids": _rectangle(prompts, length, pad_id),
            "attention_mask": torch.tensor(mask),
        }
    ids = [[pad_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (length - pad) for pad in pads]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _rectangle(rows: Sequence[Sequence[int]], length: int, fill: int) -> Int[Tensor, "batch len"]:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def _labels(examples: Sequence[Example], length: int) -> Tensor:
    tokens = [example.labels for example in examples if isinstance(example.labels, list)]
    if tokens:
        return _rectangle(tokens, length, IGNORED)
    labels = torch.tensor([example.labels for example in examples])
    return labels.float() if labels.is_floating_point() else labels
