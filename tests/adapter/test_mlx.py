"""mlx-lm's folders: y + scale·((x·a)·b), computed naively, is what the adapter answers here."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

import lorakit as lk
from lorakit.errors import AdapterFileError
from references import outputs
from tiny_models import build, example_inputs

# PEFT asks transformers in words that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PATHS = [f"model.layers.{n}.{end}" for n in (0, 1) for end in ("self_attn.q_proj", "mlp.up_proj")]
CONFIG = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "model": "mlx-community/tiny",
    "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    "learning_rate": 1e-5,
}


def made(base, folder, *, dora=False, **config):
    """A folder as mlx-lm writes it, and a copy of the base that has its updates in the weights."""
    plain, generator = copy.deepcopy(base), torch.Generator().manual_seed(0)
    settings = {**CONFIG, **config}
    scale = settings["lora_parameters"]["scale"]
    if alpha := settings["lora_parameters"].get("alpha"):
        scale *= alpha / 3
    tensors: dict[str, torch.Tensor] = {}
    for path in PATHS:
        weight = plain.get_submodule(path).weight.data
        a = torch.randn(weight.shape[1], 3, generator=generator) * 0.1
        b = torch.randn(3, weight.shape[0], generator=generator) * 0.1
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        weight += scale * (a @ b).T
        if dora:
            m = torch.rand(len(weight), generator=generator) + 0.5
            tensors[f"{path}.m"] = m
            weight *= (m / weight.norm(dim=1))[:, None]
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return plain, tensors


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"dora": True, "fine_tune_type": "dora"},
        {"lora_parameters": {"rank": 3, "scale": 10.0, "alpha": 16.0, "dropout": 0.1}},
    ],
    ids=["lora", "dora", "alpha"],
)
def test_a_folder_of_mlx_lm_answers_the_same(config, tmp_path):
    base = build("llama")
    inputs = example_inputs(base)
    plain, _ = made(base, tmp_path / "mlx", **config)
    expected = outputs(plain, inputs)
    model = copy.deepcopy(base)
    lk.attach(model, tmp_path / "mlx")
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)
    adapter = lk.extract(model)
    assert adapter.base_name == "mlx-community/tiny"
    assert ("has an alpha" in "".join(adapter.unverified)) == ("lora_parameters" in config)
    with lk.route(model, ["default", None]):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], outputs(base, inputs)[1], rtol=1e-4, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)
    again = lk.Adapter.load(adapter.save(tmp_path / "ours"))
    assert again.content_hash() == adapter.content_hash()
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(outputs(theirs, inputs), expected, rtol=1e-4, atol=1e-5)


EXPERTS = {f"{PATHS[0]}.lora_{end}": torch.ones(2, 3, 4) for end in "ab"}
EMBEDDING = {
    "model.embed_tokens.lora_a": torch.ones(64, 3),
    "model.embed_tokens.lora_b": torch.ones(3, 32),
}


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({}, {"fine_tune_type": "full"}, "fine_tune_type: input should be 'lora' or 'dora'"),
        ({}, {"lora_parameters": {"scale": 1.0}}, "lora_parameters.rank: field required"),
        ({}, {"lora_parameters": {"rank": 4, "scale": 1.0}}, "don't go with rank 4"),
        ({"model.norm.weight": torch.ones(3)}, {}, "model.norm.weight  unexpected"),
        (EXPERTS, {}, "is of experts, which have other names"),
        (EMBEDDING, {}, "is an embedding, whose update acts in a tied head too"),
        ({f"{PATHS[0]}.m": torch.ones(3)}, {}, "has lora_a, lora_b, m; lora_a, lora_b expected"),
        ({f"{PATHS[0]}.lora_a": torch.full((32, 3), torch.nan)}, {}, "holds NaN"),
    ],
)
def test_what_cannot_be_read_is_told(tensors, config, told, tmp_path):
    _, good = made(build("llama"), tmp_path / "mlx")
    save_file({**good, **tensors}, tmp_path / "mlx" / "adapters.safetensors")
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    with pytest.raises(AdapterFileError) as caught:
        lk.Adapter.load(tmp_path / "mlx")
    assert told in str(caught.value)
    assert "(of mlx-lm) cannot be used" in str(caught.value)
