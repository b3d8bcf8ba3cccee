"""The paper's beam search, beside searches that are written out in float64."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import lorakit as lk
import tiny_models
from covering import covering, sampled
from lorakit.answering.beam_search import BeamSearch, _ban_repeats, beam_search
from lorakit.config.methods import LoRAConfig, PrefixConfig
from lorakit.data.batches import generation_batch
from lorakit.errors import ModelError
from lorakit.routing.row_parts import RouteParts
from references import randomise

END = 0
WORDS = 6


def build(seed: int = 0, **shape: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        **{"vocab_size": WORDS, "n_positions": 32} | shape,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=END,
        eos_token_id=END,
        initializer_range=0.6,
    )
    return GPT2LMHeadModel(config).eval().double()


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return build()


def searched(
    model: Any, prompts: Sequence[list[int]], *, longest: int = 6, end: int = END, **search: Any
) -> list[list[int]]:
    batch = generation_batch(prompts, pad_id=1)
    rows = range(len(prompts))
    return beam_search(
        model,
        batch,
        BeamSearch(**search),
        route=RouteParts(model, len(rows), at_once=len(rows)),
        rows=rows,
        ends=[{end}] * len(rows),
        max_new_tokens=longest,
    )


def next_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """The logits after these tokens, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].double()


def written_out(
    model: Any, prompt: list[int], *, longest: int, beams: int, penalty: float, ngram: int
) -> list[int]:
    """The search of the paper's code, one beam after the other, to the last step."""
    answer: list[int] = []
    best, going = -math.inf, [(0.0, answer)]
    for step in range(1, longest + 1):
        found = []
        for score, tokens in going:
            logits = next_logits(model, prompt + tokens)
            for start in range(len(tokens) - ngram + 1 if ngram else 0):
                if tokens[start : start + ngram - 1] == tokens[len(tokens) - ngram + 1 :]:
                    logits[tokens[start + ngram - 1]] = -math.inf
            chances = logits.log_softmax(-1).tolist()
            found += [(score + chance, [*tokens, w]) for w, chance in enumerate(chances)]
        going = []
        for score, tokens in sorted(found, key=lambda one: -one[0])[:beams]:
            if tokens[-1] != END and step < longest:
                going.append((score, tokens))
            elif score / step**penalty > best:
                best, answer = score / step**penalty, tokens
    return answer


PROMPTS = ([3, 2], [5, 1, 4, 2, 2], [2], [4, 4, 4])


@covering(
    ("ngram", "beams", "penalty"),
    [(ngram, *each) for ngram in (0, 2, 3) for each in ((2, 0.9), (5, 0.8), (4, 2.0), (3, -1.0))],
)
def test_a_batch_finds_what_the_search_written_out_finds(
    model: GPT2LMHeadModel, beams: int, penalty: float, ngram: int
) -> None:
    found = searched(
        model, PROMPTS, longest=8, beams=beams, length_penalty=penalty, no_repeat_ngram=ngram
    )
    options: dict[str, Any] = {"beams": beams, "penalty": penalty, "ngram": ngram}
    assert found == [written_out(model, prompt, longest=8, **options) for prompt in PROMPTS]


@sampled("penalty", [0.0, 0.9, 2.0])
def test_with_places_for_all_it_finds_the_best_of_all_answers(
    model: GPT2LMHeadModel, penalty: float
) -> None:
    def score(prompt: list[int], answer: tuple[int, ...]) -> float:
        chances = [
            float(next_logits(model, [*prompt, *answer[:at]]).log_softmax(-1)[word])
            for at, word in enumerate(answer)
        ]
        return sum(chances) / len(answer) ** penalty

    answers = [
        tokens
        for size in (1, 2, 3)
        for tokens in product(range(WORDS), repeat=size)
        if END not in tokens[:-1] and (tokens[-1] == END or size == 3)
    ]
    options = {"beams": WORDS**3, "length_penalty": penalty, "no_repeat_ngram": 0}
    prompt = [5, 1, 4]
    best = max(answers, key=lambda answer: score(prompt, answer))
    assert searched(model, [prompt], longest=3, **options) == [list(best)]


def test_the_prompt_is_read_once_for_each_row(model: GPT2LMHeadModel) -> None:
    sizes: list[tuple[int, ...]] = []
    handle = model.transformer.wte.register_forward_hook(
        lambda _module, inputs, _output: sizes.append(tuple(inputs[0].shape))
    )
    searched(model, PROMPTS, longest=4, beams=3, length_penalty=5.0)
    handle.remove()
    assert sizes[:3] == [(4, 5), (12, 1), (12, 1)]


def test_it_ends_as_soon_as_no_open_beam_can_be_better() -> None:
    # Nearly all probability is that of the end, so nothing longer can have a better sum.
    model = build()
    model.lm_head = torch.nn.Linear(16, WORDS).double()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor([9.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    calls: list[Any] = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    assert searched(model, [[3, 2]], longest=20, beams=3, length_penalty=0.0) == [[END]]
    handle.remove()
    assert len(calls) == 1


# Each difference from transformers' search, on a model whose next words have chosen chances.


def bigram(chances: dict[int, dict[int, float]]) -> GPT2LMHeadModel:
    """A model whose next word depends on the last one alone; the rest is spread evenly."""
    model = build()
    table = torch.empty(WORDS, WORDS, dtype=torch.float64)
    for word in range(WORDS):
        given = chances.get(word, {})
        table[word] = (1 - sum(given.values())) / max(1, WORDS - len(given)) + 1e-9
        for following, chance in given.items():
            table[word, following] = chance
    with torch.no_grad():
        for block in model.transformer.h:
            for parameter in block.parameters():
                parameter.zero_()
        model.transformer.wpe.weight.zero_()
        states = model.transformer(torch.arange(WORDS)[:, None]).last_hidden_state[:, 0]
        model.lm_head = torch.nn.Linear(16, WORDS, bias=False).double()
        model.lm_head.weight.copy_(torch.linalg.lstsq(states, table.log()).solution.T)
    return model


def by_transformers(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"eos_token_id": END, "pad_token_id": END, "do_sample": False}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)[
        0, len(prompt) :
    ].tolist()
    return written[: written.index(END) + 1] if END in written else written


def test_a_run_of_the_prompt_may_be_repeated() -> None:
    model = bigram({1: {2: 0.9}, 2: {3: 0.9}, 3: {END: 0.9}, 5: {1: 0.9}})
    prompt = [1, 2, 3, 5]
    found = searched(model, [prompt], beams=2, no_repeat_ngram=2)
    assert found == [[1, 2, 3, END]]
    options = {"num_beams": 2, "no_repeat_ngram_size": 2, "length_penalty": 0.9}
    assert by_transformers(model, prompt, max_new_tokens=6, **options) != found[0]


def test_what_is_not_banned_shares_the_probability_of_what_is() -> None:
    history = torch.tensor([[1, 2, 3, 1, 2], [1, 2, 3, 4, 5]])
    logits = torch.zeros(2, 6)
    _ban_repeats(logits, history, 3)
    assert logits[0].tolist() == [0, 0, 0, -math.inf, 0, 0]
    assert logits[1].tolist() == [0] * 6
    assert float(logits[0].log_softmax(-1)[0]) == pytest.approx(math.log(1 / 5))


def test_a_beam_that_ends_takes_a_place_of_its_step() -> None:
    # The best answer goes on from the third likeliest word, which has no place beside the end.
    model = bigram({5: {END: 0.4, 1: 0.35, 2: 0.25}, 2: {3: 0.99}, 3: {END: 0.99}})
    found = searched(model, [[5]], beams=2, length_penalty=3.0, longest=3, no_repeat_ngram=0)
    assert found[0][0] == 1
    options = {"num_beams": 2, "length_penalty": 3.0, "max_new_tokens": 3}
    assert by_transformers(model, [5], **options) == [2, 3, END]


def test_open_beams_go_on_while_they_may_be_better_and_compete_at_the_end() -> None:
    model = bigram({5: {END: 0.45, 1: 0.45}, 1: {END: 0.9, 3: 0.08}, 3: {3: 0.999}})
    options: dict[str, Any] = {"length_penalty": 2.0, "no_repeat_ngram": 0, "longest": 12}
    assert searched(model, [[5]], beams=2, **options) == [[1, *[3] * 11]]
    early = {"num_beams": 2, "length_penalty": 2.0, "max_new_tokens": 12}
    assert by_transformers(model, [5], **early) == [1, END]


# Batches, routes and models.


def test_one_beam_takes_the_likeliest_word_each_time(model: GPT2LMHeadModel) -> None:
    def greedy(prompt: list[int]) -> list[int]:
        answer: list[int] = []
        while len(answer) < 6 and END not in answer:
            answer.append(int(next_logits(model, prompt + answer).argmax()))
        return answer

    assert searched(model, PROMPTS, beams=1, no_repeat_ngram=0) == [greedy(p) for p in PROMPTS]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_row_of_a_route_is_searched_with_its_own_adapter(family: str) -> None:
    if family == "gpt2":
        base: Any = build(vocab_size=40)
    else:
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.6,
            )
        ).double()
    lk.attach(base, LoRAConfig(targets=("q", "v")), name="lora")
    prefix = PrefixConfig(prefix=2, infix=1, every_layer=True)
    lk.attach(base, prefix, name="prefix")
    randomise(base, "lora", seed=1, std=0.5)
    randomise(base, "prefix", seed=2, std=0.5)
    model, names = base.eval(), ["prefix", None, "lora", "prefix"]
    prompts = [[5, 7], [9, 8, 7, 6], [3], [4, 4, 4]]
    with lk.route(model, names):
        together = searched(model, prompts, beams=3)
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        with lk.route(model, name):
            alone += searched(model, [prompt], beams=3)
            if name != "prefix":  # Without a cache its infix would be behind the answer.
                options: dict[str, Any] = {"beams": 3, "penalty": 0.9, "ngram": 4}
                assert alone[-1] == written_out(model, prompt, longest=6, **options)
    assert together == alone
    assert len(set(map(tuple, together))) == 4


@pytest.mark.parametrize("family", ["bloom", "falcon", "gemma2", "gpt_neox", "mistral", "opt"])
def test_models_of_other_positions_and_caches_are_searched(family: str) -> None:
    shape = {"sliding_window": 4} if family in ("gemma2", "mistral") else {}
    torch.manual_seed(0)
    model = tiny_models.build(family, **shape)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    prompts = [[5, 6, 7, 8, 9, 10, 11], [11, 12, 13]]
    found = searched(model, prompts, longest=5, beams=3, no_repeat_ngram=2)
    options: dict[str, Any] = {"beams": 3, "penalty": 0.9, "ngram": 2}
    assert found == [written_out(model, prompt, longest=5, **options) for prompt in prompts]


def test_a_model_without_keys_and_values_is_refused() -> None:
    config = MambaConfig(vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="a MambaForCausalLM keeps no keys and values"):
        searched(MambaForCausalLM(config), [[1]])
