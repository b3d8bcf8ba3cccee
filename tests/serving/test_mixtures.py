"""Adapters on experts and on routers behind an engine."""

import lorakit as lk
from covering import sampled
from lorakit.bank import AdapterBank
from mixtures import mixture
from references import attach_random
from serving.engines import asked, engine_of, greedy_alone, word_tokenizer

TARGETS = {"experts": ["experts", "o_proj"], "router": ["mlp.gate", "o_proj"]}


@sampled("family", ["mixtral", "qwen3_moe", "olmoe"], share=2)
def test_mixed_requests_are_answered_as_generate_answers_each(family, tiny_llama):
    bank, tokenizer = AdapterBank(mixture(family)), word_tokenizer(tiny_llama)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        model = mixture(family)
        attach_random(model, name, seed=seed, targets=targets, rank=2)
        bank.add(name, lk.extract(model, name))
    choices = [None, "experts", "router", {"router": 0.5}]
    prompts = [[3, 8, 4, 7, 6], [9, 11, 12], [5, 6, 7, 8, 9, 10], [4, 4]]
    engine = engine_of(bank, prefill_tokens=5)
    given = [asked(bank, tokenizer, c, p) for c, p in zip(choices, prompts, strict=True)]
    engine.submit([each.request for each in given])
    for each in given:
        each.wait()
    assert engine.close()
    for each, choice in zip(given, choices, strict=True):
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, 8)
