"""loralib's files: the same update as loralib's own formulas give, and every refusal's text."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter import Adapter
from lorakit.errors import AdapterFileError
from tiny_models import build, example_inputs

ATTENTION = "transformer.h.0.attn.c_attn"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def saved(path: Path, tensors: Any) -> Path:
    torch.save(tensors, path)
    return path


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**example_inputs(model)).logits


def merged_linear_delta(a: Tensor, b: Tensor, enabled: list[bool]) -> Tensor:
    """Return what loralib's MergedLinear adds to a (d_out, d_in) weight, without the scale."""
    delta = F.conv1d(a[None], b[..., None], groups=sum(enabled))[0]
    height = delta.shape[0] // sum(enabled)
    wide = torch.zeros(height * len(enabled), a.shape[1])
    wide.view(len(enabled), height, -1)[enabled] = delta.view(sum(enabled), height, -1)
    return wide


@pytest.mark.parametrize(
    ("enabled", "targets"),
    [
        ([True, False, True], "q,v"),
        ([True, False, True], "v,q"),
        ([True, False, False], "q"),
        ([False, True, True], "k,v"),
        ([True, True, True], "q,k,v"),
    ],
)
def test_merged_linear_gives_loralib_s_update(
    enabled: list[bool], targets: str, tmp_path: Path
) -> None:
    a, b = random(4 * sum(enabled), 32), random(32 * sum(enabled), 4, seed=1)
    path = saved(tmp_path / "a.pt", {f"{ATTENTION}.lora_A": a, f"{ATTENTION}.lora_B": b})
    adapter = Adapter.load(path, config=lk.LoRAConfig(rank=4, alpha=6, targets=targets, layers="0"))
    ours, theirs = build("gpt2"), build("gpt2")
    lk.attach(ours, adapter)
    with torch.no_grad():
        weight = theirs.get_submodule(ATTENTION).weight
        weight += 6 / 4 * merged_linear_delta(a, b, enabled).T
    assert (logits(theirs) - logits(build("gpt2"))).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_linear_and_embedding_give_loralib_s_update(tmp_path: Path) -> None:
    query, table = "bert.encoder.layer.1.attention.self.query", "bert.embeddings.word_embeddings"
    tensors = {
        f"{query}.lora_A": random(4, 32),
        f"{query}.lora_B": random(32, 4, seed=1),
        f"{table}.lora_A": random(4, 64, seed=2),
        f"{table}.lora_B": random(32, 4, seed=3),
    }
    path = saved(tmp_path / "a.pt", {"model_state_dict": tensors})
    config = lk.LoRAConfig(rank=4, alpha=8, targets=(query, "embed"))
    adapter = Adapter.load(path, config=config)
    assert [site.kind for site in adapter.sites] == ["linear", "embedding"]
    ours, theirs = build("bert"), build("bert")
    lk.attach(ours, adapter)
    with torch.no_grad():
        theirs.get_submodule(query).weight += (
            2 * tensors[f"{query}.lora_B"] @ tensors[f"{query}.lora_A"]
        )
        table_delta = tensors[f"{table}.lora_B"] @ tensors[f"{table}.lora_A"]
        theirs.get_submodule(table).weight += 2 * table_delta.T
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_biases_and_heads_replace_the_base_s_own(tmp_path: Path) -> None:
    query = "bert.encoder.layer.0.attention.self.query"
    tensors = {
        f"{query}.lora_A": random(4, 32),
        f"{query}.lora_B": random(32, 4, seed=1),
        f"{query}.bias": random(32, seed=2),
        "classifier.weight": random(3, 32, seed=3),
        "classifier.bias": random(3, seed=4),
    }
    config = lk.LoRAConfig(rank=4, targets="q", layers="0")
    adapter = Adapter.load(saved(tmp_path / "a.bin", tensors), config=config)
    assert adapter.copied_modules == ("classifier",)
    assert adapter.config.bias == "lora"
    assert adapter.config.modules_to_save == ("classifier",)
    ours, theirs = build("bert"), build("bert")
    lk.attach(ours, adapter)
    with torch.no_grad():
        theirs.get_submodule(query).weight += (
            tensors[f"{query}.lora_B"] @ tensors[f"{query}.lora_A"]
        )
        theirs.get_submodule(query).bias.copy_(tensors[f"{query}.bias"])
        theirs.classifier.weight.copy_(tensors["classifier.weight"])
        theirs.classifier.bias.copy_(tensors["classifier.bias"])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_it_says_what_the_file_cannot_prove_and_goes_on_as_a_folder(tmp_path: Path) -> None:
    tensors = {f"{ATTENTION}.lora_A": random(8, 32), f"{ATTENTION}.lora_B": random(64, 4)}
    config = lk.LoRAConfig(rank=4, alpha=8, targets="q,v")
    adapter = Adapter.load(saved(tmp_path / "a.pt", tensors), config=config)
    assert [fact.partition(":")[0] for fact in adapter.unverified] == [
        "the base",
        "the weights",
        "rank, alpha and targets",
        "which rows the slices are",
        "which layers are embeddings",
    ]
    again = Adapter.load(adapter.save(tmp_path / "folder"))
    assert again.content_hash() == adapter.content_hash()
    assert again.unverified == adapter.unverified


A, B = f"{ATTENTION}.lora_A", f"{ATTENTION}.lora_B"


@pytest.mark.parametrize(
    ("tensors", "settings", "text"),
    [
        ({A: random(8, 32)}, {}, f"{B}  missing from the file"),
        ({B: random(8, 4)}, {}, f"{A}  missing from the file"),
        ({A: random(8, 32), B: random(64, 8)}, {}, "was it trained with rank 8?"),
        ({A: random(12, 9), B: random(18, 12)}, {}, "A ConvLoRA has the kernel's size times"),
        (
            {A: random(8, 32), B: random(64, 4)},
            {"targets": "q"},
            "2 slices of rank 4, but the targets name q of q, k, v",
        ),
        ({A: random(6, 32), B: random(64, 4)}, {}, "1.5 slices of rank 4"),
        ({A: random(8, 32), B: random(63, 4)}, {}, "2 slices of rank 4, but"),
        ({A: random(8, 32, 1), B: random(64, 4)}, {}, "A (8, 32, 1), B (64, 4) don't pair"),
        ({"h.weight": random(3, 3)}, {}, "it holds no update"),
        (
            {A: random(8, 32), B: random(64, 4), f"{ATTENTION}.weight": random(32, 96)},
            {},
            f"{ATTENTION}.weight  is the base's own: save lora_state_dict(model)",
        ),
        ({A: random(8, 32) / 0, B: random(64, 4)}, {}, f"{A}  holds NaN or infinity"),
        (
            {A: random(8, 32), B: random(64, 4)},
            {"rank_pattern": {"q": 2}},
            "rank_pattern and alpha_pattern: loralib's files are read without",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], settings: dict[str, Any], text: str, tmp_path: Path
) -> None:
    config = lk.LoRAConfig(**{"rank": 4, "targets": "q,v", **settings})
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(saved(tmp_path / "a.pt", tensors), config=config)
    assert text in str(caught.value)


def test_a_file_without_settings_asks_for_them(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"give them as config=LoRAConfig\(rank=…"):
        Adapter.load(saved(tmp_path / "a.pt", {A: random(4, 4)}))


def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"not a pickle")
    with pytest.raises(AdapterFileError, match=r"a\.pt cannot be read as tensors alone"):
        Adapter.load(tmp_path / "a.pt", config=lk.LoRAConfig())


class Trap:
    """A pickled object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_file_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {A: random(4, 4), B: Trap(tmp_path / "sprung")})
    with pytest.raises(AdapterFileError, match="nothing else in it is run"):
        Adapter.load(path, config=lk.LoRAConfig())
    assert not (tmp_path / "sprung").exists()
