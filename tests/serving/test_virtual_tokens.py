"""Adapters with virtual tokens beside others: each answer is that of its adapter alone."""

import shutil

import pytest
import torch

import lorakit as lk
from lorakit.bank import AdapterBank
from lorakit.errors import RouteError
from lorakit.models.load import load_model
from lorakit.routing.slot_content import ALONE
from references import randomise
from serving.engines import adapters, asked, engine_of, greedy_alone, use_of, word_tokenizer
from tiny_models import build

TOKENS = {
    "before": lk.PrefixConfig(prefix=3),
    "around": lk.PrefixConfig(prefix=2, infix=3, every_layer=True),
    "behind": lk.PrefixConfig(prefix=0, infix=2),
    "both": [lk.PrefixConfig(prefix=2, infix=1), lk.LoRAConfig(rank=3, targets=("q", "down"))],
}
LONG = [5, 9, 8, 11, 7, 20, 33, 4, 6, 15, 19, 21]


def with_tokens(config, model, seed):
    lk.attach(model, config)
    randomise(model, seed=seed, std=0.5)
    return lk.extract(model)


def banked(family="llama"):
    bank = AdapterBank(build(family))
    bank.add("wide", adapters(family)["wide"])
    for seed, (name, config) in enumerate(TOKENS.items()):
        bank.add(name, with_tokens(config, build(family), seed))
    return bank


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def bank():
    return banked()


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.thorough) for f in ("gpt2", "bloom", "mistral"))],
)
def test_answers_are_those_of_each_adapter_alone(family, tokenizer):
    bank = banked(family)
    engine = engine_of(bank, slots=5, prefill_tokens=5)
    first = asked(bank, tokenizer, "wide", [4, 5, 6], max_tokens=14)
    engine.submit([first.request])
    first.next()
    choices = [None, "wide", *TOKENS]
    given = [asked(bank, tokenizer, c, p) for c in choices for p in (LONG, LONG[:2])]
    engine.submit([each.request for each in given])
    for each in (first, *given):
        assert each.wait().finish == "length", each.deltas[-1].error
    # Prompts are found again with their virtual tokens among what was read.
    again = [asked(bank, tokenizer, c, [*LONG, 8, 9]) for c in choices]
    for each in again:
        engine.submit([each.request])
        each.wait()
    assert engine.close()
    for each in (first, *given, *again):
        choice = next(iter(each.request.use.names), None)
        own = each.request
        assert each.ids == greedy_alone(bank, choice, own.prompt, own.max_tokens), choice
    assert [each.deltas[0].cached_tokens for each in again] == [12] * 6


def test_log_probabilities_of_a_prompt_are_those_behind_its_virtual_tokens(bank, tokenizer):
    engine = engine_of(bank, prefill_tokens=4)
    prompt = LONG[:7]
    for name, first in (("before", True), ("around", True), ("behind", False)):
        given = asked(bank, tokenizer, name, prompt, max_tokens=1, prompt_logprobs=1)
        engine.submit([given.request])
        given.wait()
        told = given.deltas[0].prompt_tokens
        assert len(told) == len(prompt)
        assert (told[0] is not None) == first
        with bank.route(name), torch.no_grad():
            logprobs = bank.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        for at, token in enumerate(told[1:]):
            assert token.id == prompt[at + 1]
            assert token.logprob == pytest.approx(float(logprobs[at, token.id]), abs=1e-4)
    assert engine.close()


def test_they_are_never_part_of_a_sum(bank, tokenizer):
    engine = engine_of(bank)
    for choice in ({"before": 0.5}, {"around": 1.0, "wide": 1.0}):
        given = asked(bank, tokenizer, choice, [4, 5])
        engine.submit([given.request])
        assert given.wait().finish == "error"
        assert str(given.deltas[-1].error) == ALONE
    assert engine.close()
    mixed = with_tokens(
        [lk.PrefixConfig(prefix=2), lk.LoRAConfig(rank=2, targets=("embed_tokens",))],
        build("llama"),
        1,
    )
    bank.add("mixed", mixed)
    with pytest.raises(RouteError, match="changes the input embedding beside them"):
        engine.slots.join(0, use_of(bank, "mixed").terms)
    bank.unload("mixed")


def test_a_server_counts_the_tokens_that_were_given(words, folder, tmp_path):
    pytest.importorskip("fastapi")
    from serving.servers import Server, ids_of

    folder = shutil.copytree(folder, tmp_path / "served")
    server = Server(words, folder)
    model, _ = load_model(words)
    with_tokens(TOKENS["around"], model, 1).save(folder / "tokens")
    loaded = server.post("/v1/load_lora_adapter", lora_name="tokens", lora_path="tokens")
    assert loaded.status_code == 200, loaded.text
    found = server.complete(model="tokens", echo=True, logprobs=1).json()
    choice, usage = found["choices"][0], found["usage"]
    answer = choice["text"].removeprefix("red cat").strip()
    assert answer == server.alone("tokens", ids_of(server, "red cat"))
    assert choice["logprobs"]["tokens"][:2] == ["red", "cat"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 5)
    # Of 32 tokens of context five are virtual.
    whole = server.complete("red " * 20, model="tokens", max_tokens=None).json()
    assert whole["usage"]["completion_tokens"] == 7
    long = server.complete("red " * 27, model="tokens")
    assert long.status_code == 400
    assert "of which its virtual tokens take 5" in long.json()["error"]["message"]
    parts = [{"name": "tokens", "weight": 0.5}, {"name": "small", "weight": 0.5}]
    summed = server.complete(adapters=parts)
    assert (summed.status_code, summed.json()["error"]["message"]) == (400, ALONE)
    server.engine.close()
