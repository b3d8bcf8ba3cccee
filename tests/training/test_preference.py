"""Training on preferences: the chosen answer becomes the likelier one, with the loss of TRL."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import lorakit as lk
from lorakit.errors import ConfigError

ROWS = [
    {"prompt": "red cat", "chosen": "big dog", "rejected": "old bird"},
    {"prompt": "blue fish", "chosen": "new dog", "rejected": "old bird"},
    {"prompt": "green bird", "chosen": "big dog", "rejected": "small fish fish"},
    {"prompt": "red dog", "chosen": "new cat", "rejected": "old fish"},
]


@pytest.fixture
def settings(tiny_llama, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(out, **more):
        given = {
            "model": str(tiny_llama),
            "data": lk.DataConfig(train=str(file), validation=str(file)),
            "dtype": "float32",
            "lora": lk.LoRAConfig(rank=4, targets=("all-linear",)),
            "steps": 12,
            "warmup_steps": 0,
            "learning_rate": 2e-2,
            "batch_size": 4,
        }
        return lk.TrainConfig(out=tmp_path / out, **{**given, **more})

    return make


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["dpo", "simpo", "orpo"])
def test_the_chosen_answers_become_the_likelier_ones(form, settings, tmp_path):
    result = lk.train(settings(form, preference={"form": form}))
    assert result.last_loss < result.first_loss
    assert result.scores["accuracy"] == 1.0
    card = result.adapter.card
    assert (card["task"], card["preference"]["form"]) == ("generation", form)
    assert card["rows_kind"] == "prompt"
    # Scored again from the folder, in the form of the training.
    held = lk.DataConfig(validation=str(tmp_path / "rows.jsonl"))
    again = lk.evaluate(adapter=result.out, task="preference", data=held)
    assert again == pytest.approx(result.scores, abs=1e-4)
    # What was trained writes text, as any other adapter.
    assert len(lk.generate("red cat", adapter=result.out, max_new_tokens=3)) == 1


TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.mark.thorough
def test_conversations_are_trained_and_answered_through_the_chat_template(
    tiny_llama, settings, tmp_path
):
    base, file = tmp_path / "base", tmp_path / "conversations.jsonl"
    shutil.copytree(tiny_llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    file.write_text("".join(json.dumps(conversation(row)) + "\n" for row in ROWS))
    data = lk.DataConfig(train=str(file), validation=str(file))
    result = lk.train(settings("chat", model=str(base), data=data, preference={"form": "orpo"}))
    assert result.scores["accuracy"] == 1.0
    assert result.adapter.card["rows_kind"] == "messages"
    held = lk.DataConfig(validation=str(file))
    outputs = tmp_path / "outputs.jsonl"
    again = lk.evaluate(adapter=result.out, task="preference", data=held, outputs=outputs)
    assert again == pytest.approx(result.scores, abs=1e-4)
    first = json.loads(outputs.read_text().splitlines()[0])
    assert first["prompt"] == [{"role": "user", "content": "red cat"}]
    assert first["references"] == [{"role": "assistant", "content": "big dog"}]
    assert first["answer"] > 0


def conversation(row):
    """A row as two whole conversations."""
    asked = {"role": "user", "content": row["prompt"]}
    return {
        name: [asked, {"role": "assistant", "content": row[name]}]
        for name in ("chosen", "rejected")
    }


def test_a_base_alone_has_no_preferences(tiny_llama, settings, tmp_path):
    data = settings("base").data
    with pytest.raises(ConfigError, match="a base alone prefers nothing to itself"):
        lk.evaluate(model=str(tiny_llama), task="preference", data=data)


def test_what_does_not_go_with_it_is_told(settings):
    with pytest.raises(ConfigError, match="virtual tokens are put into rows of one answer each"):
        lk.train(settings("tokens", method="prefix-embedding", lora={}))
