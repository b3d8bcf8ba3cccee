"""Adapters as GGUF files: read back, and compared tensor by tensor with ΔW in float64."""

from dataclasses import replace

import gguf
import pytest
import torch

import lorakit as lk
from lorakit.adapter.llama_cpp import save_gguf
from lorakit.cli import convert
from lorakit.cli.main import main
from lorakit.errors import AdapterFileError, OutputError
from references import attach_random
from tiny_models import build

LAYERS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "c_attn": "attn_qkv",
    "qkv_proj": "attn_qkv",
    "attn.c_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "c_fc": "ffn_up",
    "down_proj": "ffn_down",
    "mlp.c_proj": "ffn_down",
}


def read(file):
    """What a file says of itself, and its tensors in float64."""
    reader = gguf.GGUFReader(file)
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    return [reader.fields[key].contents() for key in keys], {
        tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors
    }


def update(tensors, alpha, name):
    """The ΔW that llama.cpp adds to a weight."""
    a, b = (tensors[f"{name}.weight.lora_{end}"] for end in "ab")
    return alpha / b.shape[1] * b @ a


def deltas(adapter):
    """ΔW of every whole layer, by its path."""
    found: dict[str, torch.Tensor] = {}
    for site in adapter.sites:
        a, b = (adapter.tensors[f"{site.name}.lora_{end}"].double() for end in "ab")
        rows = site.rows or ((0, b.shape[0]),)
        index = torch.cat([torch.arange(*each) for each in rows])
        height = site.layer_rows or b.shape[0]
        whole = found.setdefault(site.path, torch.zeros(height, a.shape[1], dtype=torch.float64))
        whole[index] += site.scale * b @ a
    return found


def name_of(path):
    """llama.cpp's name of a block's layer."""
    block = next(part for part in path.split(".") if part.isdecimal())
    return f"blk.{block}." + next(name for end, name in LAYERS.items() if path.endswith(f".{end}"))


def in_pairs(delta, heads):
    """The rows of a query or key in llama.cpp's order, one at a time."""
    size = delta.shape[0] // heads
    order = []
    for head in range(heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + size // 2 + i]
    return delta[order]


@pytest.mark.parametrize(
    ("family", "architecture", "settings"),
    [
        # Other ranks and alphas by layer: α/r is 2, 4, 3.2 and 0.875.
        ("llama", "llama", {"rank_pattern": {"v": 4, "up": 5}, "alpha_pattern": {"down": 7}}),
        pytest.param(
            "smollm3",
            "smollm3",
            {"targets": ("q", "k"), "use_rslora": True},
            marks=pytest.mark.thorough,
        ),
        pytest.param("qwen3", "qwen3", {"targets": ("q", "k", "v")}, marks=pytest.mark.thorough),
        pytest.param("gemma3_text", "gemma3", {}, marks=pytest.mark.thorough),
        # Slices of a fused layer, whose scales differ by no power of two.
        pytest.param(
            "phi3",
            "phi3",
            {"targets": ("q", "k", "v", "o", "up"), "rank_pattern": {"v": 4, "k": 6}},
            marks=pytest.mark.thorough,
        ),
        ("gpt2", "gpt2", {"targets": ("q", "v", "o", "up", "down")}),
    ],
)
def test_the_file_holds_the_same_updates(family, architecture, settings, tmp_path):
    model = build(family)
    attach_random(model, **{"rank": 8, "alpha": 16, "targets": ("all-linear",), **settings})
    adapter = lk.extract(model)
    file = save_gguf(adapter, tmp_path / "a.gguf", model.config)
    said, tensors = read(file)
    assert said[:3] == ["adapter", architecture, "lora"]
    expected = deltas(adapter)
    assert len(tensors) == 2 * len(expected)
    for path, delta in expected.items():
        name = name_of(path)
        heads = {"attn_q": 4, "attn_k": 2}.get(name.rpartition(".")[2])
        if heads and architecture in ("llama", "smollm3"):
            delta = in_pairs(delta, heads)
        torch.testing.assert_close(update(tensors, said[3], name), delta, rtol=1e-6, atol=1e-6)


def test_embeddings_and_the_head_are_written_where_they_are_two_matrices(tmp_path):
    model = build("llama", tie_word_embeddings=False)
    attach_random(model, targets=("embed", "head"), rank=4, alpha=4)
    adapter = lk.extract(model)
    said, tensors = read(save_gguf(adapter, tmp_path / "a.gguf", model.config))
    a, b = (adapter.tensors[f"model.embed_tokens.lora_{end}"] for end in "ab")
    # llama.cpp looks up the rows of A by token.
    assert torch.equal(tensors["token_embd.weight.lora_a"], a.double().T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], b.double())
    torch.testing.assert_close(update(tensors, said[3], "output"), deltas(adapter)["lm_head"])
    model.config.tie_word_embeddings = True
    with pytest.raises(AdapterFileError, match="one matrix for its embeddings and its head"):
        save_gguf(adapter, tmp_path / "b.gguf", model.config)


def test_what_llama_cpp_cannot_hold_is_refused_with_every_reason(tmp_path):
    model = build("gpt2")
    model.config.tie_word_embeddings = True
    attach_random(model, targets=("c_attn", "wpe"), bias="lora", use_dora=False)
    with pytest.raises(AdapterFileError) as error:
        save_gguf(lk.extract(model), tmp_path / "a.gguf", model.config)
    assert str(error.value).splitlines() == [
        "llama.cpp cannot hold this adapter (2 problems):",
        "  it has 2 tensors that are no A or B of a layer (transformer.h.0.attn.c_attn.bias, "
        "transformer.h.1.attn.c_attn.bias): merge it",
        "  llama.cpp has no update of 1 of its layers (transformer.wpe)",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("opt", lk.LoRAConfig(), "its base is a opt; bases that can be written"),
        ("llama", lk.LoRAConfig(use_dora=True), "it was made by DoRA"),
        (
            "llama",
            lk.PrefixConfig(),
            "it was made by prefix-embedding",
        ),
        ("gpt2", lk.BitFitConfig(), "it was made by bitfit"),
    ],
)
def test_other_methods_and_families_are_refused(family, config, reason, tmp_path):
    model = build(family)
    lk.attach(model, config)
    with pytest.raises(AdapterFileError, match=reason):
        save_gguf(lk.extract(model), tmp_path / "a.gguf", model.config)


def test_convert_refuses_a_family_before_it_loads_a_base(tmp_path, monkeypatch, capsys):
    model = build("opt")
    model.config.save_pretrained(tmp_path / "base")
    attach_random(model)
    folder = replace(lk.extract(model), card={}, base=None).save(tmp_path / "adapter")
    monkeypatch.setattr(convert, "load_model", None)
    monkeypatch.setattr(convert, "combine", None)
    out = ["--to", "gguf", "--model", str(tmp_path / "base")]
    lines = (
        [str(folder), str(tmp_path / "a.gguf"), *out],
        [
            str(tmp_path / "base"),
            str(tmp_path / "a.gguf"),
            *out,
            "--from-checkpoint",
            "--rank",
            "2",
        ],
    )
    for line in lines:
        assert main(["convert", *line]) == 2
        told = capsys.readouterr().err
        assert told.count("error:") == 1
        assert "its base is a opt; bases that can be written: llama, " in told
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = build("llama")
    attach_random(model, targets=("k",))
    adapter, other = lk.extract(model), build("qwen2").config
    with pytest.raises(AdapterFileError, match="was trained on a llama, and the base is a qwen2"):
        save_gguf(adapter, tmp_path / "a.gguf", other)
    model.config.num_key_value_heads = 32
    with pytest.raises(AdapterFileError, match="16 rows are not those of 32 heads"):
        save_gguf(replace(adapter, base=None), tmp_path / "a.gguf", model.config)


@pytest.mark.thorough
def test_convert_writes_the_file_once(tiny_llama, tmp_path, capsys):
    model, _ = lk.load_model(tiny_llama)
    attach_random(model, targets=("q",))
    lk.extract(model).save(tmp_path / "adapter")
    words = ["convert", str(tmp_path / "adapter"), str(tmp_path / "a.gguf"), "--to", "gguf"]
    assert main(words) == 0
    assert f"--lora {tmp_path / 'a.gguf'}" in capsys.readouterr().out
    assert len(read(tmp_path / "a.gguf")[1]) == 4
    assert main(words) == 2
    assert "a.gguf exists: choose another" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "folder"), "--to", "gguf"]) == 2
    assert "a file that ends in .gguf goes with `to gguf`" in capsys.readouterr().err


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    model = build("llama")
    attach_random(model, targets=("q",))
    write = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tensor", lambda self, name, values: write(self, name, values + 1)
    )
    with pytest.raises(OutputError, match="it reads back differently"):
        save_gguf(lk.extract(model), tmp_path / "a.gguf", model.config)
    assert list(tmp_path.iterdir()) == []
