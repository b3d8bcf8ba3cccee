"""The blocks of a Transformer are found, in order, with the layers that feed the residual."""

import pytest
from torch import nn

from lorakit.errors import TargetError
from lorakit.models.blocks import blocks, named_modules
from tiny_models import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_an_attention_output_and_an_mlp_output(family):
    model = build(family)
    found = blocks(model)
    assert found
    for block in found:
        assert block.paths("o")
        assert block.paths("down")
        assert isinstance(model.get_submodule(block.stack), nn.ModuleList)
        assert model.get_submodule(block.path) is model.get_submodule(block.stack)[block.number]


def test_an_encoder_decoder_has_two_stacks():
    assert {block.stack for block in blocks(build("t5"))} == {"encoder.block", "decoder.block"}


def test_an_unknown_architecture_is_an_error():
    with pytest.raises(TargetError, match="does not know the blocks of Sequential"):
        blocks(nn.Sequential(nn.Linear(2, 2)))


def test_words_name_modules_in_module_order():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.Linear(2, 2)] * 1)})
    assert named_modules(model, ("b.*", "re:[ab]"), what="blocks") == ("a", "b", "b.0")
    with pytest.raises(TargetError, match="blocks: 'c' names no module"):
        named_modules(model, ("c",), what="blocks")
