"""Words of settings that name targets, and what is said of those that do not."""

import fnmatch

import peft
import pytest
from torch import nn

from lorakit.errors import TargetError
from lorakit.models.roles import targets_of, task_heads
from lorakit.models.target_words import select_targets, targets_by_word
from models.named_layers import names, nested, paths
from tiny_models import FAMILIES, build

ENCODERS = FAMILIES[FAMILIES.index("bert") : FAMILIES.index("t5")]


def test_a_role_selects_slices_and_a_path_selects_the_whole_layer():
    model = build("gpt2")
    assert names(select_targets(model, ("v",), layers="0")) == ["transformer.h.0.attn.c_attn[v]"]
    assert names(select_targets(model, ("c_attn",), layers="0")) == ["transformer.h.0.attn.c_attn"]
    assert names(select_targets(model, ("c_attn[v]",), layers="0")) == [
        "transformer.h.0.attn.c_attn[v]"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_stand_for_their_roles(family):
    model = build(family)
    known = {target.role for target in targets_of(model)}
    assert {p.role for p in select_targets(model, ("attention",))} == {"q", "k", "v", "o"}
    assert {p.role for p in select_targets(model, ("mlp",))} == {"gate", "up", "down"} & known


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", None),
        ("gpt2", None),
        ("opt", None),
        ("t5", None),
        ("phi3", None),
        ("bert", "SEQ_CLS"),
        ("roberta", "SEQ_CLS"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`is_gradient_checkpointing`")
def test_all_linear_means_what_it_means_in_peft(family, task):
    model = build(family)
    ours = paths(select_targets(model, ("all-linear",)))
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    theirs = peft.get_peft_model(build(family), config).base_model.targeted_module_names
    assert ours == theirs


def test_a_path_word_matches_whole_components_at_the_end():
    model = build("llama")
    assert paths(select_targets(model, ("layers.1.mlp.up_proj",))) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(TargetError):
        select_targets(model, ("p_proj",))


def test_a_glob_and_a_regex_match_the_whole_path():
    model = build("llama")
    expected = [path for path in paths(targets_of(model)) if fnmatch.fnmatch(path, "*.1.mlp.*")]
    assert len(expected) == 3
    assert paths(select_targets(model, ("model.layers.1.mlp.*",))) == expected
    assert paths(select_targets(model, (r"re:.*\.1\.mlp\.(gate|up|down)_proj",))) == expected
    with pytest.raises(TargetError):
        select_targets(model, ("re:mlp",))


def test_a_role_word_wins_over_a_module_of_that_name():
    model = build("llama")
    model.model.layers[0].up = nn.Linear(2, 2)
    assert names(select_targets(model, ("up",))) == [
        f"model.layers.{n}.mlp.up_proj" for n in (0, 1)
    ]


def test_places_come_once_and_in_module_order():
    model = build("gpt2")
    order = names(targets_of(model))
    chosen = names(select_targets(model, ("down", "mlp", "q", "attention")))
    assert chosen == [name for name in order if name in set(chosen)]
    assert len(chosen) == 12


def test_layers_keep_only_those_blocks():
    model = build("llama", num_hidden_layers=4)
    assert paths(select_targets(model, ("q",), layers="0,2-3")) == [
        f"model.layers.{number}.self_attn.q_proj" for number in (0, 2, 3)
    ]


def test_a_numbered_task_head_is_no_block():
    model = build("bert")
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    told = message(model, "classifier.0", layers="0")
    assert told == "nothing of 'classifier.0' is left after layers '0'."
    assert "bert has 2 blocks" in message(model, "q", layers="2")


def test_exclude_takes_away_layers_and_the_slices_of_a_layer():
    model = build("gpt2")
    assert names(select_targets(model, ("attention",), exclude=("k", "h.1.attn.c_attn"))) == [
        "transformer.h.0.attn.c_attn[q]",
        "transformer.h.0.attn.c_attn[v]",
        "transformer.h.0.attn.c_proj",
        "transformer.h.1.attn.c_proj",
    ]


def test_no_words_select_nothing():
    assert select_targets(build("gpt2"), ()) == ()


def test_named_gives_the_places_of_each_word():
    model = build("gpt2")
    found = targets_by_word(model, ("q", "h.0.attn.c_attn"))
    assert names(found["q"]) == [f"transformer.h.{n}.attn.c_attn[q]" for n in (0, 1)]
    layer = "transformer.h.0.attn.c_attn"
    assert names(found["h.0.attn.c_attn"]) == [layer, *(f"{layer}[{role}]" for role in "qkv")]


def test_path_words_work_on_any_module():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2), nn.Embedding(3, 2))
    assert paths(targets_of(model)) == ["0", "2", "3"]
    assert paths(select_targets(model, ("0", "3"))) == ["0", "3"]
    assert paths(select_targets(model, ("all-linear",))) == ["2"]


@pytest.mark.parametrize("family", ENCODERS)
def test_no_role_but_its_path_names_a_task_head(family):
    model = build(family)
    heads = task_heads(model)
    inside = [target for target in targets_of(model) if target.path.startswith(heads)]
    assert inside
    assert {target.role for target in inside} == {None}
    assert not set(select_targets(model, ("all-linear",))) & set(inside)
    assert set(select_targets(model, (f"{heads[-1]}*",))) <= set(inside)


def test_a_layer_of_a_task_head_has_no_role_whatever_its_name():
    model = build("bert")
    model.classifier = nested("output.dense")
    assert [
        target.role for target in targets_of(model) if target.path == "classifier.output.dense"
    ] == [None]


def message(model, *words, **settings):
    with pytest.raises(TargetError) as caught:
        select_targets(model, words, **settings)
    return str(caught.value)


def test_an_unknown_word_is_answered_with_the_roles():
    told = "gpt2 has no layer called 'value'. Its layers are q, k, v, o, up, down."
    assert message(build("gpt2"), "value") == told
    assert message(build("gpt2"), "q", "value") == told


def test_a_role_that_the_family_lacks_is_unknown():
    assert message(build("gpt2"), "gate").startswith("gpt2 has no layer called 'gate'.")
    assert message(build("bert"), "head").startswith("bert has no layer called 'head'")


def test_the_nearest_name_is_suggested():
    assert "'c_atn' (did you mean 'c_attn'?)" in message(build("gpt2"), "c_atn")
    told = message(build("llama"), "self_attn.q_porj")
    assert "(did you mean 'self_attn.q_proj'?)" in told


def test_all_problems_are_told_at_once():
    told = message(build("gpt2"), "q", "value", "re:(", "wat", layers="0-7", exclude=("nope",))
    assert told.splitlines()[0] == "the layers of gpt2 cannot be chosen (4 problems):"
    assert "no layers called 'value', 'wat'" in told
    assert "'re:(' is not a regular expression" in told
    assert "exclude: gpt2 has no layer called 'nope'" in told
    assert "layers '0-7' goes up to block 7, but gpt2 has 2 blocks" in told


def test_an_unknown_architecture_is_said_to_be_unknown():
    model = nested("body.fc1", "body.fc2", "out")
    assert message(model, "q", "v") == (
        "Module has no layers called 'q', 'v'. lorakit does not know the roles of this"
        " architecture: name its modules instead. Its modules are fc1, fc2, out."
    )
    assert "roles" not in message(model, "fc3")


def test_a_long_list_of_modules_is_cut():
    told = message(nested(*(f"body.layer_{number}" for number in range(30))), "q")
    assert told.endswith("layer_18, layer_19, ….")


def test_a_layer_cannot_be_adapted_whole_and_by_slice():
    told = message(build("gpt2"), "q", "c_attn", "v")
    assert "'c_attn' names transformer.h.0.attn.c_attn as a whole and" in told
    assert told.endswith("name either the layer or its slices.")


def test_a_slice_of_a_whole_layer_cannot_be_excluded():
    told = message(build("gpt2"), "c_attn", exclude=("k",))
    assert (
        "'c_attn' names transformer.h.0.attn.c_attn as a whole and exclude names its slice" in told
    )


@pytest.mark.parametrize(
    ("words", "settings", "told"),
    [
        (("embed",), {"layers": "0"}, "nothing of 'embed' is left after layers '0'."),
        (("q",), {"exclude": ("q",)}, "nothing of 'q' is left after exclude."),
        (
            ("v", "q"),
            {"exclude": ("h.1.attn.c_attn[q]",), "layers": "1"},
            "nothing of 'q' is left after layers '1' and exclude.",
        ),
    ],
)
def test_a_word_of_which_nothing_is_left_is_an_error(words, settings, told):
    assert message(build("gpt2"), *words, **settings) == told


def test_the_setting_with_the_bad_word_is_named():
    with pytest.raises(TargetError, match=r"^rank_pattern: gpt2 has no layer called 'value'\."):
        targets_by_word(build("gpt2"), {"value": 4}, what="rank_pattern")
