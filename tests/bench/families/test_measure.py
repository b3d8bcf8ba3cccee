"""The table of models: what is tried on a family, what is refused, and what fails."""

import pytest
import torch

from lorakit.bench.families import measure
from lorakit.bench.families.measure import CHECKED, measure_models
from lorakit.bench.families.recipes import FAMILIES, REAL, base_of
from lorakit.bench.families.uses import (
    USES,
    Differs,
    attached,
    checkpointed,
    in_four_bits,
    merged,
    packed,
    routed,
    trained,
)
from lorakit.config.bench import ModelsConfig
from lorakit.errors import ConfigError, LorakitError

# PEFT asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_there_are_enough_families_and_none_twice():
    assert len(set(FAMILIES)) == len(FAMILIES) >= measure.FEWEST_FAMILIES
    assert not set(FAMILIES) & set(REAL)


def test_an_unknown_family_is_named_before_anything_is_tried():
    with pytest.raises(ConfigError, match=r"names lama, for which .*did you mean 'llama'"):
        measure_models(ModelsConfig(families=("lama",)))


def test_a_decoder_in_a_folder_is_called_as_its_folder(tmp_path):
    tiny = base_of("llama")
    for part in (tiny.model, tiny.tokenizer):
        part.save_pretrained(tmp_path / "mine")
    base = base_of(str(tmp_path / "mine"))
    assert (base.name, base.kind) == ("mine", "decoder")


@pytest.mark.thorough
def test_a_classifier_writes_no_text_and_the_rest_works():
    findings = measure_models(ModelsConfig(families=("bert",)))
    (row,) = findings.tables["models"]
    assert {use for use, cell in row.items() if cell == "no (1)"} == {"generate"}
    assert {cell for use, cell in row.items() if use in USES} == {CHECKED, "no (1)"}
    assert "writes no text" in findings.tables["reasons"][0]["reason"]


@pytest.mark.thorough
def test_an_encoder_decoder_does_all_but_joining_rows():
    findings = measure_models(ModelsConfig(families=("t5",)))
    (row,) = findings.tables["models"]
    assert row["kind"] == "encoder-decoder"
    assert {use for use in USES if row[use] != CHECKED} == {"packed"}
    assert "an encoder and a decoder" in findings.tables["reasons"][0]["reason"]


@pytest.mark.thorough
def test_training_lowers_the_loss_though_tokens_change_their_experts():
    trained(base_of("olmoe"))


def test_a_mistake_is_a_cell_that_fails(monkeypatch):
    def wrong(base):
        raise Differs("0 is not 1")

    monkeypatch.setattr(measure, "USES", {"attach": wrong})
    findings = measure_models(ModelsConfig(families=("llama",)))
    assert findings.tables["reasons"] == [
        {"number": 1, "reason": "fails: llama: Differs: 0 is not 1"}
    ]


def test_a_reason_names_layers_by_their_paths_and_no_family(monkeypatch):
    def wrong(base):
        raise LorakitError("llama has llama.layers.0, and so has llama.")

    monkeypatch.setattr(measure, "USES", {"attach": wrong})
    findings = measure_models(ModelsConfig(families=("llama",)))
    (told,) = (reason["reason"] for reason in findings.tables["reasons"])
    assert told == "the family has llama.layers.0, and so has the family"


@pytest.mark.parametrize("use", [attached, merged, routed])
def test_a_spoilt_layer_is_noticed(use, monkeypatch):
    base = base_of("llama")
    use(base)
    # The update is added to what is not there: every use must see it.
    layer = type(base.model.model.layers[0].mlp.down_proj)
    plain = layer.forward
    draws = torch.Generator().manual_seed(0)

    def noisy(self, x):
        return plain(self, x) + torch.randn((), generator=draws)

    monkeypatch.setattr(layer, "forward", noisy)
    with pytest.raises(Differs):
        use(base)


@pytest.mark.parametrize("use", [packed, checkpointed, in_four_bits])
def test_what_is_compared_with_itself_is_the_same(use):
    use(base_of("llama"))
