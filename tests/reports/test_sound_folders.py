"""PEFT's folders which must not be refused, and files of other tools, which must be named."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.attachment.state import adapter_names
from lorakit.errors import AdapterFileError
from tiny_models import build, example_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def outputs(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**example_inputs(model)).logits


def wrapped(model, **settings) -> peft.PeftModel:
    """A model of PEFT's whose trained parameters are random."""
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def saved(model: peft.PeftModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("family", ["roberta", "electra"])
@pytest.mark.parametrize("words", ["all-linear", ["dense", "out_proj"]])
def test_a_classifier_with_its_head_among_the_targets(family: str, words, tmp_path: Path) -> None:
    """PEFT adapts nothing inside modules_to_save, whatever target_modules names."""
    theirs = wrapped(build(family), task_type="SEQ_CLS", target_modules=words)
    wanted = outputs(theirs)
    folder, model = saved(theirs, tmp_path / "a"), build(family)
    lk.attach(model, lk.Adapter.load(folder))
    assert torch.equal(outputs(model), wanted)
    back = lk.extract(model).save(tmp_path / "back")
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(build(family), back)), wanted)


def test_the_names_of_a_base_that_was_compiled_first(tmp_path: Path) -> None:
    theirs = wrapped(build("bert"), target_modules=["query"])
    wanted = outputs(theirs)
    folder, model = saved(theirs, tmp_path / "a"), build("bert")
    tensors = load_file(folder / "adapter_model.safetensors")
    start = "base_model.model."
    renamed = {k.replace(start, f"{start}_orig_mod."): v for k, v in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    lk.attach(model, lk.Adapter.load(folder))
    assert torch.equal(outputs(model), wanted)


def test_target_words_that_name_a_part_of_the_head(tmp_path: Path) -> None:
    """DistilBERT's head is two modules, both of which end in PEFT's word for it."""
    words = ["q_lin", "lin1"]
    theirs = wrapped(build("distilbert"), task_type="SEQ_CLS", target_modules=words)
    wanted = outputs(theirs)
    folder, model = saved(theirs, tmp_path / "a"), build("distilbert")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = [*words, "pre_classifier"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lk.attach(model, lk.Adapter.load(folder))
    assert torch.equal(outputs(model), wanted)


def test_every_bias_of_a_masked_language_model(tmp_path: Path) -> None:
    """BERT's head for words holds one bias under two names, and PEFT writes it twice."""
    theirs = wrapped(build("bert", head="ForMaskedLM"), target_modules=["query"], bias="all")
    wanted = outputs(theirs)
    folder, model = saved(theirs, tmp_path / "a"), build("bert", head="ForMaskedLM")
    lk.attach(model, lk.Adapter.load(folder))
    torch.testing.assert_close(outputs(model), wanted, rtol=0, atol=1e-6)
    back = lk.extract(model).save(tmp_path / "back")
    again = peft.PeftModel.from_pretrained(build("bert", head="ForMaskedLM"), back)
    torch.testing.assert_close(outputs(again), wanted, rtol=0, atol=1e-6)


def test_two_values_of_one_bias_are_refused(tmp_path: Path) -> None:
    theirs = wrapped(build("bert", head="ForMaskedLM"), target_modules=["query"], bias="all")
    folder = saved(theirs, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.cls.predictions.bias"] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="which is the same parameter in this model"):
        lk.attach(build("bert", head="ForMaskedLM"), lk.Adapter.load(folder))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_missing_bias_is_refused(bias: str, tmp_path: Path) -> None:
    theirs = wrapped(build("bert"), target_modules=["query"], bias=bias)
    folder = saved(theirs, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith(".bias"))
    del tensors[name]
    save_file(tensors, folder / "adapter_model.safetensors")
    model = build("bert")
    with pytest.raises(AdapterFileError, match=r"bias  missing from the adapter"):
        lk.attach(model, lk.Adapter.load(folder))
    assert adapter_names(model) == ()


def test_loralib_may_hold_some_biases_also_once_it_is_a_folder(tmp_path: Path) -> None:
    query = "bert.encoder.layer.{}.attention.self.query"
    tensors = {}
    for block in range(2):
        tensors[f"{query.format(block)}.lora_A"] = torch.ones(2, 32)
        tensors[f"{query.format(block)}.lora_B"] = torch.ones(32, 2)
    tensors[f"{query.format(0)}.bias"] = torch.ones(32)
    torch.save(tensors, tmp_path / "a.pt")
    config = lk.LoRAConfig(rank=2, targets="q")
    folder = lk.Adapter.load(tmp_path / "a.pt", config=config).save(tmp_path / "a")
    model = build("bert")
    lk.attach(model, lk.Adapter.load(folder))
    first, second = (model.get_submodule(query.format(block)) for block in range(2))
    zero, base = torch.zeros(1, 32), build("bert").get_submodule(query.format(1))
    torch.testing.assert_close(first(zero)[0], torch.ones(32))
    assert torch.equal(second(zero)[0], base.bias)


KOHYA = {
    "lora_unet_down_blocks_0_attn.lora_down.weight": torch.ones(2, 8),
    "lora_unet_down_blocks_0_attn.lora_up.weight": torch.ones(8, 2),
    "lora_unet_down_blocks_0_attn.alpha": torch.tensor(1.0),
}
DIFFUSERS = {"unet.down_blocks.0.attn.to_q.lora.down.weight": torch.ones(2, 8)}
PLAIN = {"layer.weight": torch.ones(2, 8)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [(KOHYA, "kohya"), (DIFFUSERS, "diffusers"), (PLAIN, "such as 'layer.weight'")],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin"])
def test_a_file_of_another_tool_is_named_and_never_unpickled(
    tensors, words: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tensors, tmp_path / name)
    monkeypatch.setattr(torch, "load", None)
    for config in (None, lk.LoRAConfig(rank=2, targets="q")):
        with pytest.raises(AdapterFileError, match=f"is a safetensors file.*{words}"):
            lk.Adapter.load(tmp_path / name, config=config)


def test_what_is_called_safetensors_is_never_unpickled(tmp_path: Path) -> None:
    torch.save(KOHYA, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="not a readable safetensors file"):
        lk.Adapter.load(tmp_path / "a.safetensors", config=lk.LoRAConfig(rank=2))


def test_a_pickle_of_kohya_is_named(tmp_path: Path) -> None:
    torch.save(KOHYA, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match="kohya"):
        lk.Adapter.load(tmp_path / "a.pt", config=lk.LoRAConfig(rank=2))


def test_a_folder_of_another_tool_is_named(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(AdapterFileError, match="diffusers"):
        lk.Adapter.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora"}))
    with pytest.raises(AdapterFileError, match="diffusers"):
        lk.Adapter.load(tmp_path)


def test_peft_s_weights_alone_are_named(tmp_path: Path) -> None:
    saved(wrapped(build("bert"), target_modules=["query"]), tmp_path / "a")
    shutil.copy(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(AdapterFileError, match=r"PEFT, without its adapter_config\.json"):
        lk.Adapter.load(tmp_path / "b.safetensors")
