"""PEFT's PiSSA, OLoRA and CorDA as it saves them by default: read with the base of their start."""

import copy
import dataclasses
import shutil
import sys

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig

import lorakit as lk
from lorakit.adapter.peft_config import CORDA_FILE
from lorakit.cli.main import main
from lorakit.errors import AdapterFileError
from references import outputs
from tiny_models import build, example_inputs

# PEFT asks transformers by a name that 5.23 has replaced.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (
        ".*is_gradient_checkpointing:FutureWarning",
        "Setting `save_embedding_layers` to `True`",
        "Model has `tie_word_embeddings=True`",
    )
]

FORMS = [
    ("llama", "pissa", {"lora_alpha": 6, "rank_pattern": {"down_proj": 2}}),
    ("llama", "olora", {"use_rslora": True}),
    ("gpt2", "pissa", {"use_dora": True}),
]


def in_peft(family, start, settings, folder, words=("q_proj", "down_proj"), **overrides):
    """The outputs of a model of PEFT's with a trained adapter, saved without its base."""
    base, inputs = build(family, **overrides), example_inputs(build(family))
    words = ["c_attn"] if family == "gpt2" else list(words)
    config = peft.LoraConfig(
        r=3,
        target_modules=words,
        init_lora_weights=start,
        fan_in_fan_out=family == "gpt2",
        **settings,
    )
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), config).eval())
    theirs.save_pretrained(str(folder))
    return base, inputs, outputs(theirs, inputs)


def moved(model):
    """The model, with what trains moved as training would."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.1)
    return model


@pytest.mark.parametrize(("family", "start", "settings"), FORMS, ids=str)
def test_the_outputs_are_those_of_peft(family, start, settings, tmp_path):
    base, inputs, expected = in_peft(family, start, settings, tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(outputs(again, inputs), expected, rtol=0, atol=1e-5)
    plain = outputs(base, inputs)
    lk.attach(base, tmp_path / "peft")
    torch.testing.assert_close(outputs(base, inputs), expected, rtol=0, atol=1e-5)
    adapter = lk.extract(base)
    assert {site.frozen * 2 - site.rank for site in adapter.sites} == {0}
    assert f"that {start} started from the weights of this base" in "".join(adapter.unverified)
    # What is saved belongs to the base as it is, for PEFT too.
    folder = adapter.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(family), str(folder)).eval()
    torch.testing.assert_close(outputs(theirs, inputs), expected, rtol=0, atol=1e-5)
    lk.detach(base)
    assert torch.equal(outputs(base, inputs), plain)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_embedding_beside_starts_as_usual(start, tmp_path):
    words = ("q_proj", "embed_tokens")
    base, inputs, expected = in_peft("llama", start, {}, tmp_path / "peft", words)
    lk.attach(base, tmp_path / "peft")
    torch.testing.assert_close(outputs(base, inputs), expected, rtol=0, atol=1e-5)
    assert [site.frozen for site in lk.extract(base).sites] == [0, 3, 3]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_a_weight_of_two_layers_is_refused(start, tmp_path):
    """PEFT takes the start out of the embedding, too, where the head has its weight."""
    one_weight = {"tie_word_embeddings": True}
    base, _, _ = in_peft("llama", start, {}, tmp_path / "tied", ("q_proj", "lm_head"), **one_weight)
    with pytest.raises(AdapterFileError, match=r"lm_head  has one weight with model\.embed"):
        lk.attach(base, tmp_path / "tied")
    twice = {"layer_replication": [[0, 2], [1, 2]]}
    base, _, _ = in_peft("llama", start, twice, tmp_path / "twice", ("q_proj",))
    lk.replicate_layers(base, "0-1,1-1")
    with pytest.raises(AdapterFileError) as caught:
        lk.attach(base, tmp_path / "twice")
    block = "model.layers.{}.self_attn.q_proj"
    for one, other in ((1, 2), (2, 1)):
        assert f"{block.format(one)}  has one weight with {block.format(other)}" in str(
            caught.value
        )


def test_without_the_base_the_way_is_told(tmp_path):
    base, _, _ = in_peft("llama", "olora", {}, tmp_path / "peft")
    with pytest.raises(AdapterFileError, match=r"'olora' .* computed again: read it with them, as"):
        lk.Adapter.load(tmp_path / "peft")
    with pytest.raises(AdapterFileError, match="is of 32×32 in the file, and 16×16 in this base"):
        lk.attach(build("llama", hidden_size=16), tmp_path / "peft")
    assert not hasattr(base, "_lorakit")


CORDA = [
    ("llama", "kpm", {"rank_pattern": {"down_proj": 2}}),
    ("llama", "ipm", {"use_rslora": True, "use_dora": True}),
    ("gpt2", "ipm", {"lora_alpha": 6}),
]


def preprocess_corda(model, config, run_model):
    """PEFT's, which imports attrs and does not name it among what PEFT needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "attr", dataclasses)
        from peft.tuners.lora import corda
    corda.preprocess_corda(model, config, run_model=run_model)


def with_corda(family, method, settings, folder, words=("q_proj", "down_proj")):
    """As `in_peft`, with directions of W·C in `folder/cache/all.pt`, C of one row of inputs."""
    base, inputs = build(family), example_inputs(build(family))
    config = peft.LoraConfig(
        r=3,
        target_modules=["c_attn"] if family == "gpt2" else list(words),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method, cache_file=str(folder / "cache/all.pt")),
        fan_in_fan_out=family == "gpt2",
        **settings,
    )
    model = copy.deepcopy(base).eval()
    preprocess_corda(model, config, run_model=lambda: model(inputs["input_ids"][:1]))
    theirs = moved(peft.get_peft_model(model, config).eval())
    theirs.save_pretrained(str(folder / "peft"))
    return base, inputs, outputs(theirs, inputs)


@pytest.mark.parametrize(("family", "method", "settings"), CORDA, ids=str)
def test_corda_is_read_with_the_cache_that_peft_wrote(family, method, settings, tmp_path):
    base, inputs, expected = with_corda(family, method, settings, tmp_path)
    plain = outputs(base, inputs)
    shutil.copy(tmp_path / "cache/all.pt", tmp_path / "peft" / CORDA_FILE)
    lk.attach(base, tmp_path / "peft")
    torch.testing.assert_close(outputs(base, inputs), expected, rtol=0, atol=1e-5)
    adapter = lk.extract(base)
    assert {site.frozen * 2 - site.rank for site in adapter.sites} == {0}
    assert "that corda started from the weights of this base" in "".join(adapter.unverified)
    folder = adapter.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(family), str(folder)).eval()
    torch.testing.assert_close(outputs(theirs, inputs), expected, rtol=0, atol=1e-5)
    lk.detach(base)
    assert torch.equal(outputs(base, inputs), plain)


def test_corda_without_its_cache_is_refused_as_peft_refuses_it(tmp_path):
    base, _, _ = with_corda("llama", "kpm", {}, tmp_path, ("q_proj",))
    names = {file.name for file in (tmp_path / "peft").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ValueError, match=r"`eigens` attribute not found .* `preprocess_corda`"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "peft"))
    text = r"'corda' changes the base's weights \(its start .* copy the file .* as corda_cache\.pt"
    for read in (lambda folder: lk.Adapter.load(folder, base=base), lambda f: lk.attach(base, f)):
        with pytest.raises(AdapterFileError, match=text):
            read(tmp_path / "peft")


def spoiled(cache, name, tensor):
    return {**cache, f"model.layers.0.self_attn.q_proj.eigens.{name}": tensor}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda found: {"x": torch.ones(2)}, r"q_proj  is not in corda_cache\.pt"),
        (
            lambda found: spoiled(found, "S_WC", torch.ones(2)),
            r"q_proj\.eigens\.S_WC of shape \(2,\) in corda_cache\.pt, where \(3,\) belongs",
        ),
        (
            lambda found: spoiled(found, "V_WC", torch.ones(32, 3)),
            r"q_proj  has directions in corda_cache\.pt that are not of its weight",
        ),
        (lambda found: spoiled(found, "U_WC", torch.full((32, 3), torch.nan)), "U_WC  holds NaN"),
        (lambda found: spoiled(found, "U_WC", print), "cannot be read as tensors alone"),
    ],
)
def test_a_cache_of_something_else_is_refused(change, text, tmp_path):
    base, inputs, _ = with_corda("llama", "ipm", {}, tmp_path, ("q_proj",))
    plain = outputs(base, inputs)
    found = torch.load(tmp_path / "cache/all.pt", weights_only=True)
    torch.save(change(found), tmp_path / "peft" / CORDA_FILE)
    with pytest.raises(AdapterFileError, match=text):
        lk.attach(base, tmp_path / "peft")
    assert torch.equal(outputs(base, inputs), plain)


def test_a_cache_of_another_base_is_refused(tmp_path):
    with_corda("llama", "ipm", {}, tmp_path, ("q_proj",))
    shutil.copy(tmp_path / "cache/all.pt", tmp_path / "peft" / CORDA_FILE)
    other = build("llama")
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight = other.model.layers[1].self_attn.q_proj.weight
        weight.copy_(weight.std() * torch.randn(weight.shape, generator=draws))
    with pytest.raises(AdapterFileError) as caught:
        lk.attach(other, tmp_path / "peft")
    assert "model.layers.1.self_attn.q_proj  has directions" in str(caught.value)
    assert "model.layers.0" not in str(caught.value)


def test_convert_reads_it_with_the_base(tiny_llama, tmp_path, capsys):
    base, inputs, expected = in_peft("llama", "pissa", {}, tmp_path / "peft")
    given = ["convert", str(tmp_path / "peft"), str(tmp_path / "out"), "--model", str(tiny_llama)]
    assert main(given) == 0, capsys.readouterr().err
    lk.attach(base, tmp_path / "out")
    torch.testing.assert_close(outputs(base, inputs), expected, rtol=0, atol=1e-5)
