"""Files of kohya's sd-scripts and of diffusers: W + alpha/r·up·down in each layer."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import lorakit as lk
from lorakit.adapter.unet_names import stability_names
from lorakit.cli.main import main
from lorakit.errors import AdapterFileError


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 6, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(6, 6), nn.Dropout(0.0)])

    def forward(self, x):
        return self.to_out[1](self.to_out[0](self.to_q(x)))


class UNet(nn.Module):
    """A model with names as diffusers' U-Net has them."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])

    def forward(self, x):
        return self.down_blocks[0]["attn1"](self.conv_in(x).flatten(2).mT)


def model_of():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet().eval()


PATHS = ("conv_in", "down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0")
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
STYLES = {
    "kohya": ("lora_unet_", "_", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("unet.", ".", ".lora_A.weight", ".lora_B.weight"),
    "early diffusers": ("unet.", ".", ".lora.down.weight", ".lora.up.weight"),
}


def made(base, file, style, *, alpha=None, metadata=None):
    """A file in a tool's style, and a copy of the base that has its updates in the weights."""
    prefix, dot, down, up = STYLES[style]
    plain, generator = copy.deepcopy(base), torch.Generator().manual_seed(2)
    scale = 1.0 if alpha is None else alpha / 2
    tensors: dict[str, torch.Tensor] = {}
    for path in PATHS:
        weight = plain.get_submodule(path).weight.data
        a = torch.randn(2, *weight.shape[1:], generator=generator)
        b = torch.randn(len(weight), 2, *[1] * (weight.dim() - 2), generator=generator)
        name = prefix + path.replace(".", dot)
        tensors |= {name + down: a, name + up: b}
        if alpha is not None and metadata is None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    save_file(tensors, file, metadata)
    return plain, tensors


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("style", STYLES)
def test_a_file_answers_the_same(style, alpha, tmp_path):
    base = model_of()
    plain, tensors = made(base, tmp_path / "a.safetensors", style, alpha=alpha)
    other = {"lora_te_text_model_layers_0.lora_down.weight": torch.ones(2, 8)}
    save_file(tensors | other, tmp_path / "a.safetensors")
    adapter = lk.Adapter.load(tmp_path / "a.safetensors", base=base)
    assert "the layers of lora_te_: they are of another model" in "".join(adapter.unverified)
    model = copy.deepcopy(base)
    lk.attach(model, adapter)
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-4)
    saved = lk.extract(model).save(tmp_path / "ours")
    assert lk.Adapter.load(saved).content_hash() == lk.extract(model).content_hash()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(saved)).eval()
    torch.testing.assert_close(theirs(X), plain(X), rtol=1e-4, atol=1e-4)
    with lk.route(model, ["default", None]):
        mixed = model(X)
    torch.testing.assert_close(mixed[0], plain(X)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], base(X)[1], rtol=1e-4, atol=1e-4)
    lk.merge(model)
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-4)


def test_diffusers_metadata_has_the_scales(tmp_path):
    base = model_of()
    settings = {"unet.r": 2, "unet.lora_alpha": 5, "unet.target_modules": ["to_q"]}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    plain, _ = made(base, file, "diffusers", alpha=5.0, metadata=metadata)
    lk.attach(base, lk.Adapter.load(tmp_path, base=base))
    torch.testing.assert_close(base(X), plain(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"lora_unet_conv_in.dora_scale": torch.ones(6)}, "is no A, B or alpha of a plain LoRA"),
        ({"lora_unet_conv_out.lora_up.weight": torch.ones(3, 2)}, "is no layer of this model"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 3, 1, 1)}, "A and B don't pair"),
        ({"lora_unet_conv_in.alpha": torch.tensor(-1.0)}, "has alpha -1"),
    ],
)
def test_what_cannot_be_read_is_told(tensors, told, tmp_path):
    base, file = model_of(), tmp_path / "a.safetensors"
    _, good = made(base, file, "kohya")
    save_file({**good, **tensors}, file)
    with pytest.raises(AdapterFileError, match=told):
        lk.Adapter.load(file, base=base)


def test_another_model_and_another_file_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    made(model_of(), file, "kohya")
    with pytest.raises(AdapterFileError, match="of no prefix have the names and shapes"):
        lk.Adapter.load(file, base=nn.Linear(3, 3))
    with pytest.raises(AdapterFileError, match="is no adapter folder"):
        lk.Adapter.load(tmp_path, base=model_of())
    with pytest.raises(AdapterFileError, match="with base=MODEL"):
        lk.Adapter.load(file)


# Facts of SDXL's U-Net: three groups of two residual blocks, the first without attention.
STABILITY = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": (
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k"
    ),
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0.time_emb_proj": "output_blocks.3.0.emb_layers.1",
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}


def test_stabilitys_names_are_those_of_sdxl():
    assert dict(stability_names([*STABILITY, "conv_norm_out"])) == STABILITY
    assert not dict(stability_names(["conv_in", "conv_out"])), "no U-Net of diffusers"


class Cross(nn.Module):
    """Names of a group of SDXL, and what is computed by two of its layers."""

    def __init__(self):
        super().__init__()
        self.resnets = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(6, 6, 1)})])
        self.attentions = nn.ModuleList([nn.ModuleDict({"proj_in": nn.Linear(6, 6)})])

    def forward(self, x):
        x = self.resnets[0]["conv1"](x)
        return self.attentions[0]["proj_in"](x.flatten(2).mT)


class SDXL(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.down_blocks = nn.ModuleList([Cross()])

    def forward(self, x):
        return self.down_blocks[0](self.conv_in(x))


def test_kohyas_file_with_stabilitys_names_answers_the_same(tmp_path):
    base, generator = SDXL().eval(), torch.Generator().manual_seed(2)
    plain = copy.deepcopy(base)
    tensors: dict[str, torch.Tensor] = {}
    names = {
        "down_blocks.0.resnets.0.conv1": "lora_unet_input_blocks_1_0_in_layers_2",
        "down_blocks.0.attentions.0.proj_in": "lora_unet_input_blocks_1_1_proj_in",
    }
    for path, name in names.items():
        weight = plain.get_submodule(path).weight.data
        a = torch.randn(2, *weight.shape[1:], generator=generator)
        b = torch.randn(len(weight), 2, *[1] * (weight.dim() - 2), generator=generator)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        weight += (b.flatten(1) @ a.flatten(1)).view_as(weight)
    save_file(tensors, tmp_path / "xl.safetensors")
    lk.attach(base, lk.Adapter.load(tmp_path / "xl.safetensors", base=base))
    torch.testing.assert_close(base(X), plain(X), rtol=1e-4, atol=1e-4)


def test_convert_reads_a_file_with_the_model_that_is_named(tiny_llama, tmp_path, capsys):
    path = "model_layers_0_self_attn_q_proj"
    tensors = {"down": torch.ones(2, 32), "up": torch.ones(32, 2)}
    file = tmp_path / "kohya.safetensors"
    save_file({f"lora_te_{path}.lora_{end}.weight": each for end, each in tensors.items()}, file)
    given = ["convert", str(file), str(tmp_path / "out")]
    assert main([*given, "--model", str(tiny_llama)]) == 0, capsys.readouterr().err
    adapter = lk.Adapter.load(tmp_path / "out")
    assert [site.path for site in adapter.sites] == ["model.layers.0.self_attn.q_proj"]
    assert main([*given[:2], str(tmp_path / "other")]) == 2
