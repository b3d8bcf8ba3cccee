import pytest
import torch

from lorakit.data.batches import generation_batch, pad_token, training_batch
from lorakit.data.chat import IGNORED
from lorakit.data.samples import Example
from tiny_tokenizers import build_tokenizer


def test_examples_are_padded_on_the_right_to_the_longest() -> None:
    examples = [
        Example(input_ids=[5, 6, 7], labels=[IGNORED, 6, 7]),
        Example(input_ids=[8, 9], labels=[IGNORED, 9]),
    ]
    batch = training_batch(examples, pad_id=9)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    # The pad token 9 is also a target token, and only as padding it has no label.
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


@pytest.mark.parametrize(("labels", "dtype"), [((1, 0), torch.int64), ((2.5, 1.0), torch.float32)])
def test_classes_are_integers_and_numbers_are_floats(
    labels: tuple[float, float], dtype: torch.dtype
) -> None:
    examples = [Example(input_ids=[1], labels=label) for label in labels]
    batch = training_batch(examples, pad_id=0)["labels"]
    assert batch.dtype == dtype
    assert batch.tolist() == list(labels)


def test_token_types_are_padded_with_the_first_type() -> None:
    examples = [
        Example(input_ids=[1, 2, 3], labels=0, token_type_ids=[0, 1, 1]),
        Example(input_ids=[1], labels=0, token_type_ids=[1]),
    ]
    assert training_batch(examples, pad_id=0)["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_prompts_are_padded_on_the_left() -> None:
    batch = generation_batch([[5, 6, 7], [8]], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_pad_token_falls_back_to_the_end_token() -> None:
    own = build_tokenizer(pad_token="<|end|>")
    assert pad_token(own) == own.convert_tokens_to_ids("<|end|>")
    without = build_tokenizer()
    assert pad_token(without) == without.eos_token_id
    assert pad_token(build_tokenizer(eos_token=None)) == 0
