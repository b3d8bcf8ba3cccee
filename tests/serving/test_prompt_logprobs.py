"""`prompt_logprobs`: what plain transformers says of each token of a prompt, in vLLM's form."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("fastapi")

import lorakit as lk
from lorakit.serving.engine import Engine
from lorakit.serving.worker import Limits
from prefix_reference import expected, row_with_tokens
from references import randomise
from serving.engines import asked, banked
from serving.servers import Server, ids_of

LONG = [5, 9, 8, 11, 7, 12, 13, 4, 6, 15, 14, 10]
SUM = {"small": 0.7, "wide": -0.4}


@pytest.fixture(scope="module")
def place(words, folder, tmp_path_factory):
    """A folder of adapters, among them one of virtual tokens."""
    place = shutil.copytree(folder, tmp_path_factory.mktemp("prompts") / "served")
    model = AutoModelForCausalLM.from_pretrained(words)
    lk.attach(model, lk.PrefixConfig(prefix=2, infix=1))
    randomise(model, seed=3, std=0.5)
    lk.extract(model).save(place / "virtual")
    return place


@pytest.fixture(scope="module")
def served(words, place):
    """A server that reads prompts in small parts."""
    made = Server(words, place, prefill_tokens=5)
    yield made
    made.engine.close(drain=False)


def plain(words, place, weights):
    """The base in transformers alone, with B·A of some adapters in its weights."""
    model = AutoModelForCausalLM.from_pretrained(words, dtype=torch.float32)
    for name, weight in weights.items():
        adapter = lk.Adapter.load(place / name)
        for site in adapter.sites:
            a, b = (adapter.tensors[f"{site.name}.lora_{part}"] for part in "ab")
            with torch.no_grad():
                model.get_parameter(f"{site.path}.weight").add_(weight * site.scale * (b @ a))
    return model


@torch.no_grad()
def logits_of(model, prompt):
    return model(input_ids=torch.tensor([prompt])).logits[0].float()


def check(found, tokens, logits, count, decode):
    """Compare entries with naive lines.

    Args:
        found: the entries.
        tokens: that they are of.
        logits: in the place of each token; None: its entry is null.
        count: of the likeliest.
        decode: the text of a token.
    """
    assert len(found) == len(tokens) == len(logits)
    for entry, token, row in zip(found, tokens, logits, strict=True):
        if row is None:
            assert entry is None
            continue
        likeliest = sorted(range(len(row)), key=row.neg().tolist().__getitem__)
        wanted = dict.fromkeys([token, *likeliest[:count]])
        assert list(entry) == [str(t) for t in wanted]
        for t in wanted:
            told = entry[str(t)]
            assert set(told) == {"logprob", "rank", "decoded_token"}
            assert told["logprob"] == pytest.approx(float(row.log_softmax(-1)[t]), abs=1e-4)
            assert told["rank"] == 1 + likeliest.index(t)
            assert told["decoded_token"] == decode([t])


@pytest.mark.parametrize(
    "weights",
    [{}, SUM, *(pytest.param({n: 1.0}, marks=pytest.mark.thorough) for n in ("small", "wide"))],
    ids=str,
)
def test_they_are_those_of_plain_transformers(served, words, place, weights):
    model, decode = plain(words, place, weights), served.tokenizer.decode
    named = {"adapters": [{"name": n, "weight": w} for n, w in weights.items()]} if weights else {}
    how = {"prompt_logprobs": 3, "max_tokens": 2, "n": 2} | named
    # The second time the prompts are among what was read.
    for _ in range(2):
        choices = served.complete([LONG, LONG[:3], [7]], **how).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(6))
        for at, prompt in enumerate([LONG, LONG[:3], [7]]):
            rows = [None, *logits_of(model, prompt)[:-1]]
            for choice in choices[2 * at : 2 * at + 2]:
                check(choice["prompt_logprobs"], prompt, rows, 3, decode)
    chat = served.chat("red cat", **how).json()
    ids = ids_of(served, "user red cat bird")
    check(chat["prompt_logprobs"], ids, [None, *logits_of(model, ids)[:-1]], 3, decode)
    for choice in chat["choices"]:
        assert "prompt_logprobs" not in choice


def test_virtual_tokens_have_no_entries_and_come_before_the_first(served, words, place):
    base = AutoModelForCausalLM.from_pretrained(words).double()
    tensors = lk.Adapter.load(place / "virtual").tensors
    rows = expected(base, tensors, row_with_tokens(LONG, causal=True, infix=1))
    told = served.complete(LONG, model="virtual", prompt_logprobs=1).json()["choices"][0]
    # Each token is predicted by what is before it: the first one by the second virtual token.
    check(told["prompt_logprobs"], LONG, rows[1 : 1 + len(LONG)], 1, served.tokenizer.decode)


def test_they_are_right_beside_answers_and_other_prompts(served, monkeypatch):
    bank = banked()
    engine = Engine(bank.model, Limits(slots=8, prefill_tokens=5))
    monkeypatch.setattr(engine.pace, "share", lambda most, **step: 3)
    running = asked(bank, served.tokenizer, "wide", [5, 6, 7], max_tokens=26)
    engine.submit([running.request])
    engine.start()
    running.next()
    choices = ["dora", {"small": 0.6, "wide": -0.5}]
    given = [
        asked(bank, served.tokenizer, choice, [start + at, *LONG], max_tokens=4, **how)
        for at, choice in enumerate(choices)
        for start, how in ((3, {"prompt_logprobs": 2}), (13, {}))
    ]
    engine.submit([each.request for each in given])
    for each in (*given, running):
        assert each.wait().finish == "length", each.deltas[-1].error
    assert engine.close()
    # The last one, without, was read in steps of the answers.
    assert engine.joint.count
    for at, choice in enumerate(choices):
        first, *told = given[2 * at].deltas[0].prompt_tokens or ()
        prompt = [3 + at, *LONG]
        with bank.route(choice):
            logits = logits_of(bank.model, prompt)
        assert first is None
        for token, following, row in zip(told, prompt[1:], logits[:-1], strict=True):
            assert token.id == following
            ids = [following, *row.topk(2).indices.tolist()]
            assert [t for t, _ in token.alternatives] == ids[1:]
            assert token.ranks == tuple(1 + int((row > row[t]).sum()) for t in ids)
            assert token.logprob == pytest.approx(float(row.log_softmax(-1)[token.id]), abs=1e-4)
        assert given[2 * at + 1].deltas[0].prompt_tokens is None


def test_a_prompt_of_several_answers_is_read_once(served):
    read = []
    hook = served.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompt = [16, *LONG]
    found = served.complete(prompt, n=3, max_tokens=0, prompt_logprobs=0).json()
    hook.remove()
    assert sum(read) == len(prompt) + 2
    assert [choice["text"] for choice in found["choices"]] == [""] * 3
    assert found["usage"]["completion_tokens"] == 0
    first = found["choices"][0]["prompt_logprobs"]
    assert [list(entry) for entry in first[1:]] == [[str(token)] for token in LONG]
    assert all(choice["prompt_logprobs"] == first for choice in found["choices"])
    chat = served.chat(max_tokens=0, prompt_logprobs=0).json()
    assert chat["choices"][0]["message"]["content"] == ""
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(("top", "count"), [(1, 3), (3, 1)])
def test_beside_echo_each_has_as_many_as_it_asks_for(served, top, count):
    how = {"n": 2, "max_tokens": 1, "model": "small"}
    both = served.complete(LONG, echo=True, logprobs=top, prompt_logprobs=count, **how).json()
    echo = served.complete(LONG, echo=True, logprobs=top, **how).json()["choices"]
    own = served.complete(LONG, prompt_logprobs=count, **how).json()["choices"]
    for at, choice in enumerate(both["choices"]):
        assert choice["prompt_logprobs"] == own[at]["prompt_logprobs"]
        assert choice["logprobs"]["tokens"] == echo[at]["logprobs"]["tokens"]
        assert choice["logprobs"]["top_logprobs"] == echo[at]["logprobs"]["top_logprobs"]
        assert "prompt_logprobs" not in echo[at]


def test_the_schema_has_the_field(served):
    schemas = served.client.get("/openapi.json").json()["components"]["schemas"]
    for body in ("CompletionBody", "ChatBody"):
        (number, nothing) = schemas[body]["properties"]["prompt_logprobs"]["anyOf"]
        assert (number["type"], number["minimum"], number["maximum"]) == ("integer", 0, 20)
        assert nothing == {"type": "null"}
