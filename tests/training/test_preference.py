"""Training on preferences: the chosen answer becomes the likelier one, with the loss of TRL."""

import json

import pytest

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
@pytest.mark.parametrize("form", ["dpo", "simpo"])
def test_the_chosen_answers_become_the_likelier_ones(form, settings):
    result = lk.train(settings(form, preference={"form": form}))
    assert result.last_loss < result.first_loss
    assert result.scores["accuracy"] == 1.0
    card = result.adapter.card
    assert (card["task"], card["preference"]["form"]) == ("generation", form)
    # What was trained writes text, as any other adapter.
    assert len(lk.generate("red cat", adapter=result.out, max_new_tokens=3)) == 1


def test_what_does_not_go_with_it_is_told(settings):
    with pytest.raises(ConfigError, match="virtual tokens are put into rows of one answer each"):
        lk.train(settings("tokens", method="prefix-embedding", lora={}))
