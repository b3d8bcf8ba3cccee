"""Settings: what is refused, and that every problem is told at once."""

from typing import Any

import pytest

import lorakit as lk
from lorakit.config.block_ranges import layer_numbers
from lorakit.errors import ConfigError, LorakitError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: input should be greater than or equal to 1, found 0"),
        ({"rank": -3}, "found -3"),
        ({"rank": 2.5}, "rank: input should be a valid integer"),
        ({"alpha": 0}, "alpha: input should be greater than 0, found 0"),
        ({"alpha": float("nan")}, "alpha: input should be"),
        ({"dropout": 7}, "dropout: input should be less than 1, found 7"),
        ({"bias": "some"}, "bias: input should be 'none', 'lora' or 'all', found 'some'"),
        (
            {"init": "zeros"},
            "init: input should be 'kaiming', 'gaussian', 'orthogonal', 'pissa' or 'eva'",
        ),
        ({"layers": "3-1"}, "has a range that ends before it starts"),
        ({"layers": "all"}, "is not a list of blocks"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q"),
        ({"targts": "q"}, "targts: unknown setting; did you mean 'targets'?"),
        ({"targets": (), "modules_to_save": ()}, "targets is empty, so no layer would be adapted"),
        ({"targets": []}, "targets is empty, so no layer would be adapted"),
        ({"alpha": True}, "alpha: true and false are no numbers, found True"),
        ({"r": 4, "lora_alpha": 8}, "lora_alpha: unknown setting; did you mean 'alpha'?"),
    ],
)
def test_a_wrong_setting_is_told(settings, message):
    with pytest.raises(ConfigError) as error:
        lk.LoRAConfig(**settings)
    assert message in str(error.value)


def test_all_problems_of_all_sections_come_in_one_error():
    with pytest.raises(LorakitError) as error:
        lk.TrainConfig(out="x", steps=0, lora={"rank": 0, "alfa": 3}, data={"max_lenght": 3})
    text = str(error.value)
    assert "4 problems" in text
    for part in (
        "steps:",
        "lora.rank:",
        "lora.alfa:",
        "did you mean 'lora.alpha'",
        "data.max_lenght:",
    ):
        assert part in text


def test_settings_cannot_be_changed_afterwards():
    settings: Any = lk.LoRAConfig()
    with pytest.raises(ValueError, match="frozen"):
        settings.rank = 4


def test_names_may_be_written_in_one_string():
    assert lk.LoRAConfig(targets="q, v").targets == ("q", "v")


def test_layer_ranges_are_counted_from_zero_and_inclusive():
    assert layer_numbers("0-2,5") == {0, 1, 2, 5}
