"""Calls of a model that get virtual tokens: generation, routes, labels, caches, and refusals."""

import copy

import pytest
import torch
from transformers import DynamicCache

import lorakit as lk
from covering import sampled
from lorakit.config.methods import LoRAConfig, PrefixConfig
from lorakit.errors import RouteError
from prefix_reference import bare, expected, own_positions, prefixed, row_with_tokens
from references import outputs, randomise
from tiny_models import build, example_inputs

ROWS = ([5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17])
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def left(rows=ROWS):
    """Rows padded on the left."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    ids = [[0] * pad + row for pad, row in zip(pads, rows, strict=True)]
    mask = [[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def stepwise(base, tensors, row, steps, **tokens):
    """The tokens that greedily follow a prompt, without any cache."""
    longer = row_with_tokens(row, causal=True, **tokens)
    for _ in range(steps):
        longer = [*longer, int(expected(base, tensors, longer)[-1].argmax())]
    return longer[-steps:]


@pytest.mark.parametrize("every_layer", [False, True], ids=["embedding", "layer"])
@sampled("family", ["llama", "gpt2", "opt", "mistral", "gemma"])
def test_greedy_answers_are_those_of_longer_rows_without_a_cache(family, every_layer):
    model = prefixed(family, every_layer=every_layer)
    tensors, base = lk.extract(model).tensors, bare(model)
    batch = left()
    written = model.generate(**batch, max_new_tokens=5, **GREEDY)[:, 6:]
    for row, answer in zip(ROWS, written.tolist(), strict=True):
        assert answer == stepwise(base, tensors, row, 5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_find_the_likeliest_of_all_answers(family):
    model = prefixed(family, model=build(family, vocab_size=8, bos_token_id=1, pad_token_id=0))
    tensors, base = lk.extract(model).tensors, bare(model)
    rows = ([5, 6, 7, 3], [4, 3])
    # As many beams as there are answers: nothing is missed.
    found = model.generate(
        **left(rows), num_beams=8, num_return_sequences=2, max_new_tokens=2, **GREEDY
    )[:, 4:]
    for number, row in enumerate(rows):
        longer = row_with_tokens(row, causal=True)
        first = expected(base, tensors, longer)[-1].log_softmax(-1)
        both = {
            (a, b): float(first[a] + second[b])
            for a in range(8)
            for second in [expected(base, tensors, [*longer, a])[-1].log_softmax(-1)]
            for b in range(8)
        }
        best = sorted(both, key=both.__getitem__, reverse=True)[:2]
        assert [tuple(each) for each in found[2 * number : 2 * number + 2].tolist()] == best


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def several(request):
    """A model with two prefix adapters, LoRA, and both in one."""
    model = prefixed(request.param, name="layer", seed=1)
    prefixed(request.param, model=model, name="short", prefix=1, infix=0, every_layer=False, seed=2)
    lk.attach(model, LoRAConfig(targets=("q", "v")), name="lora")
    both = [LoRAConfig(targets=("q",)), PrefixConfig(prefix=0, infix=2, every_layer=True)]
    lk.attach(model, both, name="both")
    randomise(model, "lora", seed=3)
    randomise(model, "both", seed=4, std=0.4)
    return model.double()


CHOICES = ["layer", None, "short", "lora", "both", {"lora": 0.5, "short": 1.0}]
MIXED = [*ROWS, [18, 19], [20, 21, 22, 23, 24], [25]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_adapters_answer_as_if_alone(several, side):
    batch = left(MIXED)
    if side == "right":
        batch = {name: values.flip(1) for name, values in batch.items()}
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with lk.route(several, CHOICES):
        found = outputs(several, batch | {"position_ids": positions})
    assert found.shape[1] == 6
    for number, name in enumerate(CHOICES):
        real = batch["attention_mask"][number].bool()
        with lk.route(several, name):
            alone = outputs(several, {"input_ids": batch["input_ids"][number][real][None]})
        torch.testing.assert_close(found[number][real], alone[0], rtol=1e-8, atol=1e-8)


def test_rows_of_equal_length_need_no_mask(several):
    ids = torch.tensor([row[:1] * 3 for row in MIXED])
    with lk.route(several, CHOICES):
        found = outputs(several, {"input_ids": ids})
    for number, name in enumerate(CHOICES):
        with lk.route(several, name):
            alone = outputs(several, {"input_ids": ids[number : number + 1]})[0]
        torch.testing.assert_close(found[number], alone, rtol=1e-8, atol=1e-8)


def test_rows_of_different_adapters_go_on_with_a_cache_of_the_caller_s(several):
    ids, more = torch.tensor([row[:1] * 3 for row in MIXED]), torch.tensor([[30]]).expand(6, 1)
    caches = [DynamicCache(config=several.config) for _ in range(7)]
    with lk.route(several, CHOICES), torch.no_grad():
        first = several(ids, past_key_values=caches[-1]).logits
        second = several(more, past_key_values=caches[-1]).logits
    for number, name in enumerate(CHOICES):
        cache = caches[number]
        with lk.route(several, name), torch.no_grad():
            alone = several(ids[number : number + 1], past_key_values=cache).logits[0]
            after = several(more[:1], past_key_values=cache).logits[0]
        torch.testing.assert_close(first[number], alone, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(second[number], after, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_different_adapters_write_as_if_alone(several, beams):
    options = {"max_new_tokens": 4, "num_beams": beams, **GREEDY}
    with lk.route(several, CHOICES):
        together = several.generate(**left(MIXED), **options)[:, 6:]
        equal = several.generate(torch.tensor([r[:1] for r in MIXED]), **options)[:, 1:]
    for number, (row, name) in enumerate(zip(MIXED, CHOICES, strict=True)):
        with lk.route(several, name):
            alone = several.generate(torch.tensor([row]), **options)[0, len(row) :]
            short = several.generate(torch.tensor([row[:1]]), **options)[0, 1:]
        assert torch.equal(together[number], alone)
        assert torch.equal(equal[number], short)


def test_the_loss_is_that_of_labels_behind_the_infix():
    model = prefixed("llama")
    tensors, base = lk.extract(model).tensors, bare(model)
    labels = torch.tensor([[-100, -100, -100, 8, 9, 10], [-100, 12, 13, -100, -100, -100]])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        found = model(ids, attention_mask=mask, labels=labels)
    losses = []
    for row, prompt in ((ids[0].tolist(), 3), (ids[1, :3].tolist(), 1)):
        longer = row_with_tokens(row, causal=True, prompt=prompt)
        likely = expected(base, tensors, longer).log_softmax(-1)
        start = longer.index(row[prompt])
        losses += [-likely[at - 1, longer[at]] for at in range(start, len(longer))]
        wanted = expected(base, tensors, longer)[own_positions(longer, causal=True)]
        number = 0 if prompt == 3 else 1
        torch.testing.assert_close(found.logits[number, : len(row)], wanted, rtol=1e-9, atol=1e-9)
    assert found.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_where_nothing_precedes_the_labels_there_is_no_infix_and_no_first_token_to_learn():
    model = prefixed("gpt2")
    tensors, base = lk.extract(model).tensors, bare(model)
    row = [5, 6, 7, 8]
    with torch.no_grad():
        found = model(torch.tensor([row]), labels=torch.tensor([row]))
    longer = row_with_tokens(row, causal=True, prompt=0, infix=0)
    logits = expected(base, tensors, longer)
    likely = logits.log_softmax(-1)[2:-1]
    wanted = -likely[range(3), row[1:]].mean()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(found.logits[0], logits[2:], rtol=1e-9, atol=1e-9)


def test_rows_that_have_their_tokens_are_left_alone():
    model = prefixed("llama")
    row = [64, 65, 5, 6, 7, 66, 67, 68]
    found = outputs(model, {"input_ids": torch.tensor([row, row])})
    assert found.shape[1] == 8
    short = outputs(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    torch.testing.assert_close(found[0, [2, 3, 7]], short[0], rtol=1e-9, atol=1e-9)
    batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, 8).long()}
    written = model.generate(**batch, max_new_tokens=3, **GREEDY)[:, 8:]
    plain = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, **GREEDY)[:, 3:]
    assert torch.equal(written, plain)


def test_token_types_and_hidden_states_are_those_of_the_caller_s_tokens():
    model = build("bert", head="ForTokenClassification", type_vocab_size=2)
    prefixed("bert", model=model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    types = torch.tensor([[0, 0, 0, 1, 1]])
    with torch.no_grad():
        found = model(ids, token_type_ids=types, output_hidden_states=True)
        longer = torch.tensor([[5, 64, 65, 6, 7, 8, 9, 66, 67, 68]])
        of_longer = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
        wanted = model(longer, token_type_ids=of_longer, output_hidden_states=True)
    own = [0, 3, 4, 5, 6]
    torch.testing.assert_close(found.logits, wanted.logits[:, own])
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    torch.testing.assert_close(found.hidden_states[2], wanted.hidden_states[2][:, own])


def test_gpt2_s_token_types_are_no_virtual_tokens():
    model = prefixed("gpt2")
    base, tensors = bare(model), lk.extract(model).tensors
    ids, types = torch.tensor([[5, 6, 7]]), torch.tensor([[3, 3, 3]])
    found = outputs(model, {"input_ids": ids, "token_type_ids": types})
    longer = row_with_tokens([5, 6, 7], causal=True)
    hook = base.transformer.wpe.register_forward_hook(
        lambda _m, _a, out: out + base.transformer.wte.weight[3]
    )
    wanted = expected(base, tensors, longer)[own_positions(longer, causal=True)]
    hook.remove()
    torch.testing.assert_close(found[0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_a_caller_may_go_on_with_the_cache_token_by_token(masked):
    model = prefixed("gpt2")
    tensors, base = lk.extract(model).tensors, bare(model)
    written, row = [], [5, 6, 7]
    with torch.no_grad():
        mask = {"attention_mask": torch.ones(1, 3).long()} if masked else {}
        found = model(torch.tensor([row]), **mask)
        for step in range(4):
            written.append(int(found.logits[0, -1].argmax()))
            mask = {"attention_mask": torch.ones(1, 4 + step).long()} if masked else {}
            found = model(
                torch.tensor([written[-1:]]), past_key_values=found.past_key_values, **mask
            )
    assert written == stepwise(base, tensors, row, 4)


def test_a_row_can_be_written_on_by_another_adapter_than_it_began_with():
    model = prefixed("llama")
    lk.attach(model, LoRAConfig(), name="lora")
    randomise(model.double(), "lora", std=0.5)
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 4).long()
    with torch.no_grad():
        with lk.route(model, "default"):
            cache = model(ids).past_key_values
            cache = copy.deepcopy(cache)
        with lk.route(model, None):
            found = model(torch.tensor([[8]]), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 9
    assert found.logits.shape == (1, 1, 64)


IDS = torch.tensor([[5, 6, 7, 8]])


def filled(model, name):
    with torch.no_grad(), lk.route(model, name):
        return model(IDS).past_key_values


def cropped(model):
    cache = filled(model, "default")
    cache.crop(-5)
    return cache


REFUSED = {
    "input_ids, and there are none": lambda m: m(inputs_embeds=torch.zeros(1, 3, 32).double()),
    "not one of a value for each token": lambda m: m(IDS, attention_mask=torch.ones(1, 1, 4, 4)),
    "mystery has a value for each token": lambda m: m(IDS, mystery=torch.zeros(1, 4)),
    "leave use_cache at True": lambda m: m.generate(IDS, max_new_tokens=2, use_cache=False),
    "StaticCache has a fixed length": lambda m: m.generate(
        IDS, max_new_tokens=2, cache_implementation="static"
    ),
    "filled without the virtual tokens": lambda m: m(IDS[:, :1], past_key_values=filled(m, None)),
    "cut or filled meanwhile: 4 tokens, not 9": lambda m: m(IDS[:, :1], past_key_values=cropped(m)),
    "2 tokens are given at once": lambda m: m(IDS[:, :2], past_key_values=filled(m, "default")),
    "not one of 5 tokens": lambda m: m(
        IDS[:, :1], past_key_values=filled(m, "default"), attention_mask=torch.ones(1, 9).long()
    ),
    "holds 1 rows, and 2 are given": lambda m: m(
        IDS[:, :1].expand(2, 1), past_key_values=filled(m, "default")
    ),
    "position_ids are not consecutive": lambda m: m(IDS, position_ids=torch.tensor([[0, 1, 0, 1]])),
    "row 0 has virtual token 5, but its adapter has 5": lambda m: m(torch.tensor([[69, 5]])),
    "33 tokens with the trained ones, and the model's context is 32": lambda m: m(
        torch.ones(1, 28).long()
    ),
    "answer with return_dict=True": lambda m: m(IDS, return_dict=False),
    "the last position is 4, not 3|tokens are given at once": lambda m: m.generate(
        torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]),
        past_key_values=filled(m, "default"),
        max_new_tokens=1,
        **GREEDY,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_a_silent_error_is_refused(message):
    model = prefixed("llama")
    with pytest.raises(RouteError, match=message), torch.no_grad():
        REFUSED[message](model)
    assert not model.model.embed_tokens.adapter_route.own.stack
    assert outputs(model, {"input_ids": IDS}).shape == (1, 4, 64)


def test_token_ids_beyond_the_vocabulary_are_refused_by_the_base_too():
    model = prefixed("llama")
    with lk.route(model, None), pytest.raises(RouteError, match="its adapter has 0"):
        model(torch.tensor([[64, 5]]))


@pytest.mark.parametrize(
    "choice", [{"layer": 0.5}, {"layer": 1.0, "short": 1.0}, {"layer": 1.0, "both": 1.0}], ids=str
)
def test_prefixes_are_neither_weakened_nor_mixed(several, choice):
    refusal = "can't mix or weaken adapters with virtual tokens"
    with pytest.raises(RouteError, match=refusal), lk.route(several, choice):
        pass


def test_without_an_infix_generation_needs_no_cache():
    model = prefixed("llama", infix=0)
    options = {"max_new_tokens": 4, **GREEDY}
    cached = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options, use_cache=False), cached)
    cache = filled(model, "default")
    rest = torch.tensor([[9, 10]])
    with torch.no_grad():
        found = model(rest, past_key_values=cache).logits
        whole = model(torch.cat([IDS, rest], 1)).logits[:, 4:]
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


def test_a_cache_without_prefixes_is_none_of_its_business():
    model = prefixed("llama")
    with lk.route(model, None):
        cache = DynamicCache(config=model.config)
        model(IDS, past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 5


COMPILED = """
import torch, lorakit as lk
from lorakit.errors import RouteError
from prefix_reference import prefixed
BACKEND = "eager"
model, ids = prefixed("llama"), torch.tensor([[5, 6, 7]])
with lk.route(model, None):
    wanted = model(ids).logits
def of(part):
    part.compile(backend=BACKEND)
    return model
def wrapped():
    return torch.compile(model, backend=BACKEND)
for make in (lambda: of(model.model), wrapped, lambda: of(model)):
    model.model._compiled_call_impl = None
    compiled = make()
    try:
        compiled(ids)
    except RouteError as error:
        assert "before torch.compile" in str(error), error
    else:
        raise AssertionError("not refused")
    with lk.route(model, None):
        assert torch.allclose(compiled(ids).logits, wanted)
print("refused")
"""


@pytest.mark.thorough
def test_a_compiled_model_is_refused_and_its_base_is_not(forks):
    assert "refused" in forks.run(COMPILED)


def test_the_hooks_go_with_the_last_prefix_and_not_before():
    model = prefixed("llama")
    prefixed("llama", model=model, name="other")
    lk.attach(model, LoRAConfig(), name="lora")
    lk.detach(model, "default")
    # One is the virtual tokens', the other that of every attachment.
    assert len(model._forward_hooks) == 2
    lk.detach(model, "other")
    assert len(model._forward_hooks) == 1
    assert not model.model.embed_tokens._forward_pre_hooks
    lk.switch(model, "lora")
    assert outputs(model, {"input_ids": IDS}).shape == (1, 4, 64)


def test_rows_alone_are_rows_of_a_batch_for_encoders():
    model = prefixed("roberta")
    inputs = example_inputs(model, rows=3)
    inputs["attention_mask"][1, 4:] = 0
    inputs["input_ids"][1, 4:] = model.config.pad_token_id
    with lk.route(model, ["default", "default", None]):
        found = outputs(model, inputs)
    for row, name in enumerate(["default", "default", None]):
        real = inputs["attention_mask"][row].bool()
        with lk.route(model, name):
            alone = outputs(model, {"input_ids": inputs["input_ids"][row][real][None]})
        torch.testing.assert_close(found[row], alone[0], rtol=1e-9, atol=1e-9)
