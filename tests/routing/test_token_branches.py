"""Layers that models choose among otherwise: rows that differ are right there, or are refused."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers

import lorakit as lk
from lorakit.errors import RouteError
from lorakit.models.families import FAMILIES
from references import attach_random

NAMES = ["a", None, {"a": 0.5, "b": -1.0}, "b"]


def with_adapters(model, targets):
    for name in ("a", "b"):
        attach_random(model, name, seed=ord(name), targets=targets, rank=2)
    return model


def test_experts_that_get_all_tokens_and_are_masked_behind_are_layers_as_any():
    # Each of ViTPose's is a Linear, and computes all rows; what did not choose it is set to 0.
    config = transformers.VitPoseBackboneConfig(
        image_size=(64, 32),
        patch_size=(16, 16),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=3,
        part_features=8,
    )
    torch.manual_seed(0)
    model = transformers.VitPoseBackbone(config).eval()
    with_adapters(model, "all-linear")
    assert any(".experts.1" in site.path for site in lk.extract(model, "a").sites)
    pixels, index = torch.randn(4, 3, 64, 32), torch.tensor([0, 2, 1, 2])

    def features(rows, names):
        with lk.route(model, names), torch.no_grad():
            return model(pixels[rows], dataset_index=index[rows]).feature_maps[-1]

    expected = [features(slice(row, row + 1), name)[0] for row, name in enumerate(NAMES)]
    torch.testing.assert_close(features(slice(None), NAMES), torch.stack(expected))
    assert not torch.allclose(features(slice(None), None)[0], expected[0])


def test_a_branch_that_gets_the_tokens_of_one_kind_is_refused_where_rows_differ():
    # Higgs Audio's layers have one MLP for text and one for audio, given the tokens of their kind.
    config = transformers.HiggsAudioV2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_codebooks=2,
        codebook_size=8,
        pad_token_id=0,
        eos_token_id=2,
        audio_token_id=30,
        audio_bos_token_id=31,
        audio_delay_token_id=32,
        audio_stream_bos_id=6,
        audio_stream_eos_id=7,
    )
    torch.manual_seed(0)
    model = transformers.HiggsAudioV2ForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, 4, 30, 30], [5, 30, 30, 6]])
    batch = {"input_ids": ids, "audio_input_ids": torch.randint(0, 6, (2, 2, 2))}
    with_adapters(model, "q_proj")
    with lk.route(model, ["a", "b"]), torch.no_grad():
        mixed = model(**batch).logits
    for row, name in enumerate(["a", "b"]):
        with lk.route(model, name), torch.no_grad():
            torch.testing.assert_close(model(**batch).logits[row], mixed[row])
    lk.detach(model)
    with_adapters(model, "audio_mlp.up_proj")
    with (
        lk.route(model, ["a", "b"]),
        torch.no_grad(),
        pytest.raises(RouteError, match=r"audio_mlp\.up_proj"),
    ):
        model(**batch)
    with lk.route(model, "a"), torch.no_grad():
        assert not torch.allclose(model(**batch).logits, mixed)


@pytest.mark.thorough
def test_no_other_family_keeps_experts_as_modules():
    """Of transformers' modelling files; a new one is to be looked at, and put into `families`."""
    folder = Path(inspect.getfile(transformers.models)).parent
    kept = re.compile(r"class \w*(?:Expert|Moe|MoE)\w*\(nn\.Module(?:List|Dict)\)")
    listed = re.compile(r"self\.\w*experts\w* = nn\.Module(?:List|Dict)\(")
    found = {
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if kept.search(text := file.read_text("utf-8")) or listed.search(text)
    }
    known = {each for each, family in FAMILIES.items() if family.experts}
    assert found - {"vitpose_backbone"} == {each.replace("-", "_") for each in known}
