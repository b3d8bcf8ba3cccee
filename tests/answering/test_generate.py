"""lk.generate: a list of texts, from a folder or an adapter, by name or on a loaded model."""

import pytest

import lorakit as lk
from lorakit.attachment.state import active_name, adapter_names
from lorakit.errors import ConfigError, ModelError
from references import attach_random, base_hash


@pytest.fixture
def loaded(tiny_llama):
    return lk.load_model(tiny_llama)


@pytest.fixture
def adapter(loaded):
    model, _ = loaded
    attach_random(model, std=1.0, targets=("all-linear",))
    made = lk.extract(model)
    lk.detach(model)
    return made


PROMPTS = ["red cat dog", "big fish"]


def test_texts_are_the_same_by_folder_by_object_and_on_a_loaded_model(
    loaded, adapter, tiny_llama, tmp_path
):
    model, tokenizer = loaded
    folder = adapter.save(tmp_path / "adapter")
    found = [
        lk.generate(PROMPTS, adapter=folder, max_new_tokens=4),
        lk.generate(PROMPTS, adapter=adapter, model=str(tiny_llama), max_new_tokens=4),
        lk.generate(PROMPTS, adapter=adapter, model=model, tokenizer=tokenizer, max_new_tokens=4),
        [lk.generate(each, adapter=folder, max_new_tokens=4)[0] for each in PROMPTS],
    ]
    assert all(each == found[0] for each in found)
    assert found[0] != lk.generate(PROMPTS, model=str(tiny_llama), max_new_tokens=4)


def test_a_loaded_model_answers_as_it_is_and_is_left_so(loaded, adapter):
    model, tokenizer = loaded
    base = base_hash(model)
    lk.attach(model, adapter, name="own")
    model.train()
    own = lk.generate(PROMPTS, model=model, tokenizer=tokenizer, max_new_tokens=4)
    assert own == lk.generate(PROMPTS, adapter=adapter, max_new_tokens=4)
    lk.switch(model, None)
    again = lk.generate(
        PROMPTS, adapter=adapter, model=model, tokenizer=tokenizer, max_new_tokens=4
    )
    assert again == own
    assert (model.training, adapter_names(model), active_name(model)) == (True, ("own",), None)
    assert base_hash(model) == base


def test_what_is_drawn_depends_on_the_seed_alone(loaded):
    model, tokenizer = loaded
    drawn = [
        lk.generate(
            PROMPTS, model=model, tokenizer=tokenizer, max_new_tokens=6, temperature=2.0, seed=seed
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_mistakes_say_what_to_write(loaded, tiny_llama):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        lk.generate("red", model=str(tiny_llama), max_new_token=3)
    with pytest.raises(ModelError, match="needs its tokenizer"):
        lk.generate("red", model=model)
    with pytest.raises(ConfigError, match="goes with a loaded model"):
        lk.generate("red", model=str(tiny_llama), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="dtype is that of a base which is loaded by name"):
        lk.generate("red", model=model, tokenizer=tokenizer, dtype="bfloat16")


def test_beams_search_and_other_settings_of_a_search_are_refused_without_them(loaded):
    model, tokenizer = loaded
    ask = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 6}
    found = [lk.generate(PROMPTS, **ask, num_beams=4, batch_size=size) for size in (4, 16)]
    assert found[0] == found[1] != lk.generate(PROMPTS, **ask)
    with pytest.raises(ConfigError, match="length_penalty and no_repeat_ngram: of a search with b"):
        lk.generate(PROMPTS, **ask, length_penalty=1.0, no_repeat_ngram=0)
    with pytest.raises(ConfigError, match="num_beams is of a search, and temperature draws"):
        lk.generate(PROMPTS, **ask, num_beams=4, temperature=1.0)


def test_within_a_route_each_prompt_is_answered_by_its_own_adapter(loaded, adapter):
    model, tokenizer = loaded
    lk.attach(model, adapter, name="own")
    ask = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 12}
    names = [None, "own", "own", None]
    prompts = ["red cat dog", "big fish", "red cat dog", "big fish"]
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        with lk.route(model, name):
            alone += lk.generate(prompt, **ask)
    with lk.route(model, names):
        assert lk.generate(prompts, **ask, batch_size=3) == alone
    assert alone[0] != alone[2]


def test_within_a_route_each_prompt_is_put_as_its_own_adapter_was_trained(loaded, adapter):
    model, tokenizer = loaded
    # The base talks in messages, the adapter was trained on texts.
    tokenizer.chat_template = "{% for m in messages %}fish fish {{ m['content'] }} cat{% endfor %}"
    asked = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 12}
    lk.attach(model, adapter)
    names = ["default", None, {"default": 1.0}]
    with lk.route(model, names):
        together = lk.generate(["red cat dog"] * 3, **asked)
    for name, text in zip(names, together, strict=True):
        with lk.route(model, name):
            assert lk.generate("red cat dog", chat=name is None, **asked) == [text]
    with lk.route(model, names):
        messages = lk.generate(["red cat dog"] * 3, chat=True, **asked)
    assert messages[1] == together[1]
    assert messages[0] != together[0]
