"""PEFT's LoftQ: a base whose adapted layers are what quantising leaves of them.

Widths are multiples of 64, the block of nf4: where a block ends inside a row, bitsandbytes takes
wrong scales on CPUs, and PEFT with it.
"""

import copy
import importlib.util
import types
from dataclasses import replace

import peft
import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import identity_of
from lorakit.cli.main import main
from lorakit.errors import (
    AdapterFileError,
    AnalysisError,
    MissingExtraError,
    ModelError,
    TargetError,
)
from lorakit.merging.merge import finalize
from lorakit.models.loftq import LoftQ, loftq_of
from lorakit.models.quantized import Quantization, quantize
from lorakit.serving.fleet.version import vllm_obstacles
from references import attach_random, outputs
from tiny_models import build, example_inputs
from tiny_tokenizers import build_tokenizer

# PEFT asks transformers by a name that 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
WORDS = ["q_proj", "down_proj"]
FORMS = [
    (4, 1, {}),
    (4, 2, {"rank_pattern": {"down_proj": 2}, "lora_alpha": 6}),
    (4, 1, {"use_dora": True, "use_rslora": True}),
    (8, 1, {}),
    (8, 3, {"rank_pattern": {"down_proj": 5}}),
]


def llama(**settings):
    return build("llama", **WIDTHS, **settings)


@pytest.fixture(autouse=True)
def peft_on_the_cpu(monkeypatch):
    """PEFT's very own LoftQ, which computes on the CPU where it names a GPU."""
    theirs = vars(peft.tuners.lora.layer)["loftq_init"].__wrapped__
    named = tuple("cpu" if each == "cuda" else each for each in theirs.__code__.co_consts)
    assert named != theirs.__code__.co_consts
    mine = types.FunctionType(
        theirs.__code__.replace(co_consts=named),
        theirs.__globals__,
        theirs.__name__,
        theirs.__defaults__,
    )
    monkeypatch.setattr(peft.tuners.lora.layer, "loftq_init", torch.no_grad()(mine))


def trained(base, folder, bits=4, iterations=1, *, words=WORDS, rate=0.5, **settings):
    """A model of PEFT's with an adapter that was trained from LoftQ's start and saved."""
    config = peft.LoraConfig(
        r=3,
        target_modules=words,
        init_lora_weights="loftq",
        loftq_config=peft.LoftQConfig(loftq_bits=bits, loftq_iter=iterations),
        **settings,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    weights = [each for each in theirs.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=rate)
    for _ in range(2):
        theirs(**example_inputs(base)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval().save_pretrained(str(folder))
    return theirs


def weights_of(theirs, adapter):
    """The weights that PEFT's base has in the layers of an adapter."""
    inner = theirs.get_base_model()
    return {s.path: inner.get_submodule(f"{s.path}.base_layer").weight for s in adapter.sites}


@pytest.mark.parametrize(("bits", "iterations", "settings"), FORMS, ids=str)
def test_weights_and_outputs_are_those_of_peft(bits, iterations, settings, tmp_path):
    base = llama()
    theirs = trained(base, tmp_path / "peft", bits, iterations, **settings)
    inputs = example_inputs(base)
    plain, expected = outputs(base, inputs), outputs(theirs, inputs)
    adapter = lk.Adapter.load(tmp_path / "peft")
    assert adapter.loftq == LoftQ(bits=bits, iterations=iterations)
    adapter.prepare_base(base)
    for path, weight in weights_of(theirs, adapter).items():
        assert torch.equal(base.get_submodule(path).weight, weight), path
    changed = outputs(base, inputs)
    assert not torch.equal(changed, plain)
    plan = lk.attach(base, adapter, trainable=True)
    assert sum(p.numel() for p in base.parameters() if p.requires_grad) == plan.parameters
    torch.testing.assert_close(outputs(base, inputs), expected, rtol=0, atol=1e-5)
    lk.merge(base)
    torch.testing.assert_close(outputs(base, inputs), expected, rtol=0, atol=1e-5)
    lk.detach(base)
    assert torch.equal(outputs(base, inputs), changed)


def test_files_go_both_ways(tmp_path):
    theirs = trained(llama(), tmp_path / "peft", 4, 2, rank_pattern={"down_proj": 2})
    expected = outputs(theirs, example_inputs(llama()))
    adapter = lk.Adapter.load(tmp_path / "peft")
    again = lk.Adapter.load(adapter.save(tmp_path / "ours"))
    assert again.loftq == adapter.loftq
    assert again.content_hash() == adapter.content_hash()
    assert replace(adapter, loftq=None).content_hash() != adapter.content_hash()
    base = llama()
    again.prepare_base(base)
    lk.attach(base, again)
    torch.testing.assert_close(outputs(base, example_inputs(base)), expected, rtol=0, atol=1e-5)
    assert lk.extract(base).content_hash() == adapter.content_hash()
    in_peft = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(outputs(in_peft, example_inputs(base)), expected, rtol=0, atol=1e-5)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "with a CUDA GPU, bitsandbytes and the base in floats" in card
    assert "vllm" not in card


def test_of_conv1d_it_is_the_weight_as_it_is_stored(tmp_path):
    def gpt2():
        return build("gpt2", n_embd=64)

    # PEFT's start has a fitting A and B of square ones alone.
    words = ["attn.c_proj"]
    theirs = trained(gpt2(), tmp_path / "a", 4, 2, words=words, fan_in_fan_out=True)
    base, adapter = gpt2(), lk.Adapter.load(tmp_path / "a")
    adapter.prepare_base(base)
    for path, weight in weights_of(theirs, adapter).items():
        assert torch.equal(base.get_submodule(path).weight, weight), path
    lk.attach(base, adapter)
    inputs = example_inputs(base)
    torch.testing.assert_close(outputs(base, inputs), outputs(theirs, inputs), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_tied_head_takes_its_embedding_along_as_in_peft(tmp_path):
    theirs = trained(llama(tie_word_embeddings=True), tmp_path / "peft", words=["lm_head"])
    base, adapter = llama(tie_word_embeddings=True), lk.Adapter.load(tmp_path / "peft")
    adapter.prepare_base(base)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    lk.attach(base, adapter)
    inputs = example_inputs(base)
    torch.testing.assert_close(outputs(base, inputs), outputs(theirs, inputs), rtol=0, atol=1e-5)


def test_a_base_in_bfloat16_is_quantised_from_float32_and_comes_back(tmp_path):
    theirs = trained(llama().bfloat16(), tmp_path / "peft", 4, 2)
    base, adapter = llama().bfloat16(), lk.Adapter.load(tmp_path / "peft")
    adapter.prepare_base(base)
    for path, weight in weights_of(theirs, adapter).items():
        assert base.get_submodule(path).weight.dtype == torch.bfloat16
        assert torch.equal(base.get_submodule(path).weight, weight), path


@pytest.fixture
def loftq(tmp_path):
    """A trained adapter of LoftQ, and a function that makes its base."""

    def prepared():
        base = llama()
        adapter.prepare_base(base)
        return base

    trained(llama(), tmp_path / "peft")
    adapter = lk.Adapter.load(tmp_path / "peft")
    return adapter, prepared


def test_the_base_is_told_by_what_it_was(loftq):
    adapter, prepared = loftq
    base = prepared()
    mine, wanted = identity_of(base), identity_of(llama())
    assert mine is not None
    assert wanted is not None
    assert mine.difference(wanted) is None
    lk.attach(base, adapter)
    assert any("they are quantised anew" in note for note in lk.extract(base).unverified)
    # A final merge leaves another model.
    lk.merge(base)
    finalize(base)
    assert not loftq_of(base)
    merged = identity_of(base)
    assert merged is not None
    assert merged.difference(wanted)
    lk.attach(base, lk.LoRAConfig())


def test_adapters_of_one_such_base_are_side_by_side(loftq, tmp_path):
    adapter, prepared = loftq
    trained(llama(), tmp_path / "b", rank_pattern={"q_proj": 5}, lora_alpha=6)
    bank = lk.AdapterBank(prepared())
    bank.add("a", adapter)
    # Quantised once, W' does not depend on the rank.
    bank.add("b", lk.Adapter.load(tmp_path / "b"))
    inputs = example_inputs(bank.model, rows=3)
    with bank.route(["a", None, "b"]):
        mixed = outputs(bank.model, inputs)
    for name, row in (("a", 0), ("b", 2)):
        base = prepared()
        lk.attach(base, adapter if name == "a" else tmp_path / "b")
        torch.testing.assert_close(mixed[row], outputs(base, inputs)[row], rtol=0, atol=1e-5)


def test_another_base_is_refused_and_the_way_told(loftq, tmp_path):
    adapter, prepared = loftq
    told = r"LoftQ \(4 bits, 1 iteration\) changed its layers of the base, and .*\.load_base\(\)"
    with pytest.raises(AdapterFileError, match=told):
        lk.attach(llama(), adapter)
    with pytest.raises(AdapterFileError, match=told):
        lk.plan(llama(), tmp_path / "peft")
    lk.attach(llama(), adapter, allow_other_base=True)
    bank = lk.AdapterBank(llama())
    with pytest.raises(AdapterFileError, match=told):
        bank.add("a", adapter)
    plain = llama()
    attach_random(plain, rank=2)
    told = r"4 layers are not .*down_proj: 4 bits, 1 iteration; for this adapter: as it was"
    with pytest.raises(AdapterFileError, match=told):
        lk.attach(prepared(), lk.extract(plain))
    with pytest.raises(TargetError, match="LoftQ changed 4 layers of this base for an adapter"):
        lk.attach(prepared(), lk.LoRAConfig())
    trained(llama(), tmp_path / "twice", 4, 2)
    told = "down_proj: 4 bits, 1 iteration; for this adapter: 4 bits, 2 iterations, rank 3"
    with pytest.raises(AdapterFileError, match=told):
        lk.attach(prepared(), tmp_path / "twice")
    trained(llama(), tmp_path / "fewer", words=["q_proj"])
    with pytest.raises(AdapterFileError, match=r"2 layers are not .*; for this adapter: as it was"):
        lk.attach(prepared(), tmp_path / "fewer")


def test_a_base_that_cannot_be_changed_is_left_as_it_was(loftq, tmp_path, monkeypatch):
    adapter, prepared = loftq
    base = prepared()
    adapter.prepare_base(base)  # a second time it does nothing
    trained(llama(), tmp_path / "twice", 4, 2)
    with pytest.raises(ModelError, match="changed for another adapter already: load the base anew"):
        lk.Adapter.load(tmp_path / "twice").prepare_base(base)
    with pytest.raises(ModelError, match="LoftQ has changed its weights for an adapter"):
        quantize(base, Quantization.of("4bit", "float32"))
    held = llama()
    quantize(held, Quantization.of("4bit", "float32"))
    with pytest.raises(ModelError, match=r"its weights are quantised, .* without quantize"):
        adapter.prepare_base(held)
    with_adapter = llama()
    lk.attach(with_adapter, lk.LoRAConfig())
    with pytest.raises(ModelError, match="adapters are attached: detach them first"):
        adapter.prepare_base(with_adapter)
    gpt2 = build("gpt2")
    with pytest.raises(ModelError, match=r"\(4 problems\):\n.*down_proj  is not a module of this"):
        adapter.prepare_base(gpt2)
    repeated = llama()
    repeated.model.layers[1].mlp.down_proj.weight = repeated.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ModelError, match=r"1\.mlp\.down_proj  has the weight of model"):
        adapter.prepare_base(repeated)
    assert not loftq_of(repeated)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"LoftQ.*pip install 'lorakit\[quantized\]'"):
        adapter.prepare_base(llama())


def test_what_has_no_form_for_it_says_so(loftq, tmp_path):
    adapter, _ = loftq
    reason = "LoftQ (4 bits, 1 iteration) changed the weights of its base"
    assert reason in vllm_obstacles(adapter)
    with pytest.raises(AnalysisError, match=r"LoftQ .* changed its base by the layers and ranks"):
        lk.analysis.combine([adapter], [2.0])
    with pytest.raises(AnalysisError, match=r"LoftQ .* changed its base by the layers and ranks"):
        lk.analysis.compress(adapter, rank=1)
    with pytest.raises(AnalysisError, match=r"LoftQ .* changed its layers of the base"):
        lk.analysis.amplification(adapter, llama())
    plain = llama()
    attach_random(plain, rank=2, targets="q")
    with pytest.raises(AnalysisError, match="LoftQ changed other layers of its base"):
        lk.analysis.compare(adapter, lk.extract(plain))


@pytest.fixture
def folders(tmp_path):
    """The folder of a base, and that of an adapter of LoftQ that names it."""
    inner = tmp_path / "base"
    llama(vocab_size=300).save_pretrained(inner)
    build_tokenizer().save_pretrained(inner)
    base, _ = lk.load_model(inner)
    trained(base, tmp_path / "peft", 4, 2)
    return inner, tmp_path / "peft"


def test_the_base_is_loaded_so(folders):
    base, folder = folders
    model, _ = lk.Adapter.load(folder).load_base(str(base))
    assert set(loftq_of(model).values()) == {"4 bits, 2 iterations, rank 3"}
    lk.attach(model, folder)


@pytest.mark.thorough
def test_the_verbs_make_its_base(folders, tmp_path, capsys):
    base, folder = folders
    theirs = peft.PeftModel.from_pretrained(llama(vocab_size=300), str(folder)).eval()
    inputs = example_inputs(llama())
    expected = outputs(theirs, inputs)
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    merged, _ = lk.load_model(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged, inputs), expected, rtol=0, atol=1e-5)
    how = ["--model", str(base), "--prompt", "red", "--max-new-tokens", "2"]
    assert main(["generate", "--adapter", str(folder), *how]) == 0, capsys.readouterr().err
    given = ["convert", str(folder), str(tmp_path / "ours"), "--model", str(base)]
    assert main(given) == 0, capsys.readouterr().err
    model, _ = lk.Adapter.load(tmp_path / "ours").load_base()
    lk.attach(model, tmp_path / "ours")
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-5)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    assert "its layers changed by LoftQ (4 bits, 2 iterations)" in capsys.readouterr().out
    gguf = ["convert", str(folder), str(tmp_path / "a.gguf"), "--to", "gguf", "--model", str(base)]
    assert main(gguf) == 2
    assert "LoftQ (4 bits, 2 iterations) changed the weights of its base: merge it" in (
        capsys.readouterr().err
    )


@pytest.mark.thorough
def test_of_a_real_model_the_answers_are_those_of_peft(tmp_path):
    base, tokenizer = lk.load_model("smollm2")
    words = ["q_proj", "v_proj", "down_proj"]
    # PEFT's is trained on a copy.
    some = {"layers_to_transform": [0, 14, 29], "lora_alpha": 6}
    theirs = trained(base, tmp_path / "peft", 4, 2, words=words, rate=1e-3, **some)
    model, _ = lk.Adapter.load(tmp_path / "peft").load_base("smollm2")
    for path, weight in weights_of(theirs, lk.Adapter.load(tmp_path / "peft")).items():
        assert torch.equal(model.get_submodule(path).weight, weight), path
    lk.attach(model, tmp_path / "peft")
    inputs = tokenizer(["The sea is", "Two and two are"], return_tensors="pt", padding=True)
    mine, wanted = outputs(model, inputs), outputs(theirs, inputs)
    assert (wanted - outputs(base, inputs)).abs().max() > 0.1
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-3)
