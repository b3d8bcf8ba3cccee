"""The paper's beam search, beside a search that is written out."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lorakit.answering.beam_search import _ban_repeats, beam_search

END = 0


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=6,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=END,
        eos_token_id=END,
        initializer_range=0.6,
    )
    return GPT2LMHeadModel(config).eval()


def batch(*prompts: list[int]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    padded = [[1] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def log_probability(model: GPT2LMHeadModel, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    start = len(prompt) - 1
    return sum(float(logits[start + place, token]) for place, token in enumerate(answer))


def all_answers(length: int) -> list[list[int]]:
    """Every answer that ends, or is of full length without an end before."""
    found = []
    for size in range(1, length + 1):
        for tokens in product(range(6), repeat=size):
            ended = tokens[-1] == END
            if END not in tokens[:-1] and (ended or size == length):
                found.append(list(tokens))
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.9, 2.0])
def test_with_places_for_all_it_finds_the_best_answer(
    model: GPT2LMHeadModel, penalty: float
) -> None:
    prompts = [[3, 2], [5, 1, 4]]
    found = beam_search(
        model,
        batch(*prompts),
        end_ids=[END],
        max_new_tokens=3,
        beams=6**3,
        length_penalty=penalty,
        no_repeat_ngram=0,
    )
    for prompt, answer in zip(prompts, found, strict=True):
        best = max(
            all_answers(3),
            key=lambda tokens: log_probability(model, prompt, tokens) / len(tokens) ** penalty,
        )
        assert answer == best


def test_one_beam_is_greedy_and_goes_on_to_the_end(model: GPT2LMHeadModel) -> None:
    def greedy(prompt: list[int]) -> list[int]:
        answer: list[int] = []
        while len(answer) < 6 and END not in answer:
            logits = model(torch.tensor([prompt + answer])).logits[0, -1]
            answer.append(int(logits.argmax()))
        return answer

    prompts = [[3, 2], [5, 1, 4], [2]]
    settings: dict[str, Any] = {"end_ids": [END], "max_new_tokens": 6, "no_repeat_ngram": 0}
    found = beam_search(model, batch(*prompts), beams=1, **settings)
    assert found == [greedy(prompt) for prompt in prompts]
    alone = [beam_search(model, batch(prompt), beams=4, **settings)[0] for prompt in prompts]
    assert beam_search(model, batch(*prompts), beams=4, **settings) == alone


def test_a_repeat_is_banned_before_the_softmax_and_the_prompt_may_be_repeated() -> None:
    history = torch.tensor([[1, 2, 3, 1, 2], [1, 2, 3, 4, 5]])
    logits = torch.zeros(2, 6)
    _ban_repeats(logits, history, 3)
    assert logits[0].tolist() == [0, 0, 0, -math.inf, 0, 0]
    assert logits[1].tolist() == [0] * 6
    # What is left shares the probability of what is banned.
    assert float(logits[0].log_softmax(-1)[0]) == pytest.approx(math.log(1 / 5))
