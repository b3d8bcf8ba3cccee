"""Settings: what is refused, and that every problem is told at once."""

import importlib
import pkgutil
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import Field, TypeAdapter

import lorakit as lk
import lorakit.config
from lorakit.config.base import Settings
from lorakit.config.block_ranges import layer_numbers
from lorakit.config.fields import types_of
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


def precisions():
    """Each setting that is a precision, by its class and name."""
    for module in pkgutil.iter_modules(lorakit.config.__path__, "lorakit.config."):
        for kind in vars(importlib.import_module(module.name)).values():
            if not (isinstance(kind, type) and issubclass(kind, Settings)):
                continue
            for name, field in kind.model_fields.items():
                names = [
                    get_args(t) for t in types_of(field.annotation) if get_origin(t) is Literal
                ]
                if any("float16" in known for known in names):
                    yield f"{kind.__name__}.{name}", field


def test_precisions_are_taken_as_torch_has_them_everywhere():
    found = dict(precisions())
    assert {"TrainConfig.dtype", "LoRAConfig.dtype", "ServeConfig.adapter_dtype"} < found.keys()
    for name, field in found.items():
        kind: Any = Annotated[(field.annotation, Field(), *field.metadata)]
        assert TypeAdapter(kind).validate_python(torch.bfloat16) == "bfloat16", name
    config = lk.TrainConfig(out="out", dtype=torch.float16, lora=lk.LoRAConfig(dtype=torch.float16))
    assert config.model_dump(mode="json")["dtype"] == config.lora.dtype == "float16"
    assert config == lk.TrainConfig(out="out", dtype="float16", lora={"dtype": "float16"})


def test_a_precision_that_is_not_to_be_had_is_one_problem():
    with pytest.raises(ConfigError) as told:
        lk.TrainConfig(out="out", dtype=torch.int8)
    assert str(told.value).splitlines() == [
        "TrainConfig has settings that cannot be used (1 problem):",
        "  dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16', found 'int8'",
    ]


def test_layer_ranges_are_counted_from_zero_and_inclusive():
    assert layer_numbers("0-2,5") == {0, 1, 2, 5}
