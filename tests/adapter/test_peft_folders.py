"""PEFT's folders: what they cannot prove is told, and what is wrong with them refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorakit as lk
from adapter.peft_models import PEFTS_WARNINGS, Settings, make, output, shake, trained
from lorakit.adapter.adapter import Adapter
from lorakit.adapter.peft_config import PeftConfig
from lorakit.adapter.peft_read import read_peft
from lorakit.errors import AdapterFileError

pytestmark = PEFTS_WARNINGS


def test_a_folder_of_peft_says_what_it_cannot_prove(tmp_path: Path) -> None:
    settings = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"])
    theirs = peft.get_peft_model(make("llama"), settings)
    theirs.save_pretrained(str(tmp_path / "a"))
    text = "\n".join(Adapter.load(tmp_path / "a").unverified)
    for fact in ("the base (not named)", "the weights", "the scales", "the list of layers"):
        assert fact in text
    assert "the base's own model.embed_tokens.weight: in the file, but not compared" in text


def test_a_grouped_convolution_that_mixes_its_groups_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["grouped"])
    peft.get_peft_model(make("convolutions"), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(AdapterFileError, match="grouped  A mixes the convolution's 2 groups"):
        Adapter.load(tmp_path / "a")


def test_dora_of_a_grouped_convolution_is_no_file_of_peft_either_way(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(target_modules=["grouped"], use_dora=True)
    peft.get_peft_model(make("convolutions"), theirs).save_pretrained(str(tmp_path / "theirs"))
    reason = "PEFT takes the norms of its DoRA from another matrix"
    with pytest.raises(AdapterFileError, match=f"grouped  is a grouped convolution: {reason}"):
        Adapter.load(tmp_path / "theirs")
    ours = make("convolutions")
    lk.attach(ours, lk.LoRAConfig(rank=4, targets="grouped,point", use_dora=True))
    shake(trained(ours.parameters()))
    expected, adapter = output(ours, "convolutions"), lk.extract(ours)
    folder = adapter.save(tmp_path / "ours")
    assert f"grouped: {reason}" in (folder / "adapter_config.json").read_text()
    assert Adapter.load(folder).content_hash() == adapter.content_hash()
    again = make("convolutions")
    lk.attach(again, folder)
    assert torch.equal(output(again, "convolutions"), expected)


def test_peft_s_norms_of_a_grouped_convolution_are_of_another_matrix() -> None:
    """What the refusal says: where they were right, such files could be read."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["grouped"], use_dora=True)
    theirs: Any = peft.get_peft_model(make("convolutions"), settings)
    layer = theirs.base_model.model.grouped
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        # Block by block, as the weight of a grouped convolution is: an update that it could hold.
        layer.lora_A["default"].weight[:2, 3:] = 0
        layer.lora_A["default"].weight[2:, :3] = 0
        dora = layer.lora_magnitude_vector["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        made = dora.get_lora_weight(layer.lora_A["default"], layer.lora_B["default"])
        true = torch.cat(
            [b[:4].flatten(1) @ a[:2, :3].flatten(1), b[4:].flatten(1) @ a[2:, 3:].flatten(1)]
        )
    assert made.numel() == true.numel()
    assert not torch.allclose(made.reshape(true.shape), true, atol=0.1)


def test_a_grouped_convolution_of_ours_is_read_back_without_its_record(tmp_path: Path) -> None:
    ours = make("convolutions")
    lk.attach(ours, lk.LoRAConfig(rank=4, alpha=6, targets="grouped"))
    shake(trained(ours.parameters()))
    adapter = lk.extract(ours)
    folder = adapter.save(tmp_path / "a")
    (folder / "lorakit.json").unlink()
    assert Adapter.load(folder).content_hash() == adapter.content_hash()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PEFT's with a head and a bias."""
    config = peft.LoraConfig(
        target_modules=["body.0"], r=4, lora_alpha=8, bias="lora_only", modules_to_save=["head"]
    )
    folder = tmp_path_factory.mktemp("peft")
    peft.get_peft_model(make("tables"), config).save_pretrained(str(folder))
    return folder


P = "base_model.model."
A, B = f"{P}body.0.lora_A.weight", f"{P}body.0.lora_B.weight"


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def _put(**by_name: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update(by_name)


SPOILED: tuple[tuple[Callable[[dict[str, Tensor]], object], Settings, str], ...] = (
    (_rename(A, P + A), {}, "is there twice; was the model wrapped twice"),
    (_rename(A, A.removeprefix(P)), {}, "it does not start with 'base_model.model.'"),
    (
        _rename(A, f"{P}body.0.lora_A.default.weight"),
        {},
        "the name of an adapter, 'default', was left in it",
    ),
    (lambda tensors: tensors.pop(B), {}, f"{P}body.0  has no lora_B in the file"),
    (lambda tensors: None, {"r": 8}, "A has rank 4, but adapter_config.json says 8: was it"),
    (_put(**{B: torch.zeros(8, 2)}), {}, "B (8, 2) does not go with rank 4"),
    (_put(**{B: torch.zeros(8, 4, 1)}), {}, "A (4, 8) and B (8, 4, 1) don't pair"),
    (_put(**{A: torch.zeros(4, 0)}), {}, "don't pair"),
    (lambda tensors: None, {"bias": "none"}, "unexpected: adapter_config.json says bias='none'"),
    (_put(**{f"{P}body.2.weight": torch.zeros(8, 8)}), {}, "body.2.weight  unexpected"),
    (_put(**{f"{P}body.0.lora_embedding_A": torch.zeros(4, 8)}), {}, "has a lora_A already"),
    (
        _put(**{f"{P}body.0.lora_B.bias": torch.zeros(8)}),
        {},
        "lora_B.bias  unexpected: adapter_config.json says lora_bias=False",
    ),
    (
        _put(**{f"{P}table.lora_magnitude_vector": torch.ones(8)}),
        {},
        "vector  unexpected: adapter_config.json says use_dora=False",
    ),
    (
        _put(**{f"{P}table.token_adapter.trainable_tokens_delta": torch.ones(2, 8)}),
        {"trainable_token_indices": [3, 3]},
        "table  adapter_config.json names 3 twice in trainable_token_indices",
    ),
    (lambda tensors: None, {"use_dora": True}, "body.0  has no lora_magnitude_vector in the file"),
    (
        _put(**{f"{P}body.0.lora_magnitude_vector": torch.ones(7)}),
        {"use_dora": True},
        "body.0  has a lora_magnitude_vector (7,) for 8 rows",
    ),
    (lambda tensors: None, {"lora_bias": True}, "body.0  has no lora_B.bias in the file"),
    (
        _put(**{f"{P}body.0.lora_B.bias": torch.ones(7)}),
        {"lora_bias": True},
        "body.0  has a lora_B.bias (7,) for 8 rows",
    ),
    (
        _put(
            **{
                f"{P}table.lora_embedding_A": torch.ones(4, 20),
                f"{P}table.lora_embedding_B": torch.ones(8, 4),
            }
        ),
        {"use_dora": True},
        "table  has no lora_magnitude_vector in the file",
    ),
    (
        _put(**{f"{P}body.base_layer.2.lora_A.weight": torch.ones(4, 8)}),
        {},
        "base_layer.2.lora_A.weight  unexpected: it is of a parameter that target_parameters in",
    ),
    (
        lambda tensors: None,
        {"modules_to_save": ["head", "pooler"]},
        "modules_to_save names 'pooler', but the file has nothing of it",
    ),
    (
        _put(**{f"{P}head.modules_to_save.bias": torch.ones(3)}),
        {},
        "head.modules_to_save.bias  differs from its other copy",
    ),
    (lambda tensors: tensors.clear(), {}, "it holds no update"),
)


@pytest.mark.parametrize(("change", "settings", "text"), SPOILED, ids=[s[2] for s in SPOILED])
def test_a_spoiled_folder_of_peft_is_refused(
    plain: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    settings: Settings,
    text: str,
) -> None:
    tensors = safetensors.torch.load((plain / "adapter_model.safetensors").read_bytes())
    change(tensors)
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    config = copy.deepcopy(json.loads((plain / "adapter_config.json").read_text())) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(tmp_path)
    assert text in str(caught.value)


def test_words_that_are_roles_here_keep_peft_s_meaning(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make("t5"), peft.LoraConfig(target_modules=["q", "wi_0"]))
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.target_modules == ("q", "wi_0")
    assert adapter.lora is not None
    assert adapter.lora.targets == (r"re:(.*\.)?q", "wi_0")
    chosen = {site.path for site in lk.plan(make("t5"), adapter.lora).sites}
    assert chosen == {site.path for site in adapter.sites}


def test_a_resized_embedding_is_taken_as_a_full_copy_and_reported(plain: Path) -> None:
    tensors = safetensors.torch.load((plain / "adapter_model.safetensors").read_bytes())
    tensors[f"{P}model.embed_tokens.weight"] = torch.ones(9, 8)
    config = PeftConfig.model_validate(json.loads((plain / "adapter_config.json").read_text()))
    adapter, problems = read_peft(config, tensors)
    assert adapter is not None
    assert problems == []
    assert adapter.copied_modules == ("head", "model.embed_tokens")
    note = "why model.embed_tokens.weight is in the file: it is taken as a full copy"
    assert note in adapter.unverified
