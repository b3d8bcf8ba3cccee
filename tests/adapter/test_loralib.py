"""loralib's files: the same update as loralib's own formulas give, and every refusal's text."""

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.adapter.folder_write import save_peft
from lorakit.cli.main import main
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
    """The ΔW that loralib's MergedLinear adds to a (d_out, d_in) weight, without the scale."""
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
    assert adapter.lora.bias == "lora"
    assert adapter.lora.modules_to_save == ("classifier",)
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
        ({A: random(12, 9), B: random(18, 12)}, {}, "name it in kernel_sizes"),
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
            {"rank_pattern": {"q": 2, "attn": 4, "c_attn": 4}},
            "rank_pattern: 'q', 'attn' is neither the path of a layer nor the end of one; the "
            f"file's layers are {ATTENTION}",
        ),
        (
            {A: random(8, 32), B: random(64, 4)},
            {"alpha_pattern": {"attn.c_attn": 4, "h.1": 8}},
            "alpha_pattern: 'h.1' is neither",
        ),
        (
            {A: random(8, 32), B: random(64, 4)},
            {"rank_pattern": {"c_attn": 3}},
            "the config says rank 3: was it trained with rank 4?",
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


def test_the_last_word_of_a_pattern_gives_a_layer_its_rank_and_scale(tmp_path: Path) -> None:
    start = "bert.encoder.layer"
    ranks = {"0.attention.self.query": 2, "0.attention.self.value": 3, "1.attention.self.query": 5}
    tensors = {f"{start}.{path}.lora_A": random(rank, 32) for path, rank in ranks.items()}
    tensors |= {f"{start}.{path}.lora_B": random(32, rank) for path, rank in ranks.items()}
    config = lk.LoRAConfig(
        rank=3,
        alpha=6,
        targets=("query", "0.attention.self.value"),
        rank_pattern={"query": 2, f"{start}.1.attention.self.query": 5},
        alpha_pattern={"1.attention.self.query": 40, "self.query": 10},
    )
    adapter = Adapter.load(saved(tmp_path / "a.pt", tensors), config=config)
    scales = {site.path.removeprefix(f"{start}."): site.scale for site in adapter.sites}
    assert scales == dict(zip(ranks, (5.0, 2.0, 2.0), strict=True))
    ours, theirs = build("bert"), build("bert")
    lk.attach(ours, Adapter.load(adapter.save(tmp_path / "folder")))
    with torch.no_grad():
        for path, scale in scales.items():
            a, b = (tensors[f"{start}.{path}.lora_{end}"] for end in "AB")
            theirs.get_submodule(f"{start}.{path}").weight += scale * b @ a
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


class Pictures(nn.Module):
    """Convolutions of several kernels, and a Linear after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 5, 4, stride=(1, 2), padding=(0, 3))
        self.point = nn.Conv2d(5, 4, 1, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 2)."""
        x = self.point(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


KERNELS = {"first": 3, "second": 4, "point": 1}
BIASES = {"first": 6, "second": 5}
CONVOLUTIONS = lk.LoRAConfig(
    rank=2,
    alpha=3,
    rank_pattern={"second": 3},
    targets=("first", "second", "point", "head"),
    modules_to_save=(),
)


def pictures() -> Pictures:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pictures().eval()


def look(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(random(2, 3, 17, 14, seed=9) * 5)


def convolution_file(path: Path) -> Path:
    """Save the tensors that loralib's layers would have if `Pictures` were made of them."""
    model = pictures()
    tensors = {"head.lora_A": random(2, 4), "head.lora_B": random(2, 2, seed=1)}
    for name, k in KERNELS.items():
        layer, rank = getattr(model, name), CONVOLUTIONS.rank_pattern.get(name, 2)
        tensors[f"{name}.lora_A"] = random(rank * k, layer.in_channels * k, seed=k)
        tensors[f"{name}.lora_B"] = random(layer.out_channels * k, rank * k, seed=k + 9)
    # loralib keeps the layer itself in a child.
    biases = {f"{name}.conv.bias": random(size, seed=20) for name, size in BIASES.items()}
    return saved(path, tensors | biases | {"head.bias": random(2, seed=21)})


def as_loralib_computes(path: Path) -> Tensor:
    """The output with ΔW = (B·A).view(the weight's shape)·α/r in every layer."""
    tensors, model = torch.load(path), pictures()
    with torch.no_grad():
        for name in (*KERNELS, "head"):
            weight = getattr(model, name).weight
            delta = tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
            weight += delta.view(weight.shape) * 3 / CONVOLUTIONS.rank_pattern.get(name, 2)
        for name in BIASES:
            getattr(model, name).bias.copy_(tensors[f"{name}.conv.bias"])
        model.head.bias.copy_(tensors["head.bias"])
    return look(model)


def test_convolutions_give_loralib_s_update(tmp_path: Path) -> None:
    path = convolution_file(tmp_path / "a.pt")
    adapter = Adapter.load(path, config=CONVOLUTIONS, kernel_sizes=KERNELS)
    facts = {site.path: (site.kind, site.rank, site.scale) for site in adapter.sites}
    assert facts["first"] == ("conv", 18, 1.5)
    assert facts["second"] == ("conv", 48, 1.0)
    assert facts["head"] == ("linear", 2, 1.5)
    assert "kernel_sizes" in adapter.unverified[-1]
    model, expected = pictures(), as_loralib_computes(path)
    base = look(model)
    lk.attach(model, adapter)
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(look(model), expected, rtol=0, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(look(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [3, 0.1, 7.3])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_convolutions_go_on_as_folders_of_lorakit_and_peft(
    alpha: float, use_rslora: bool, tmp_path: Path
) -> None:
    path = convolution_file(tmp_path / "a.pt")
    config = CONVOLUTIONS.model_copy(update={"alpha": alpha, "use_rslora": use_rslora})
    adapter = Adapter.load(path, config=config, kernel_sizes=KERNELS)
    model = pictures()
    lk.attach(model, adapter)
    ours = look(model)
    again = Adapter.load(adapter.save(tmp_path / "folder"))
    assert again.content_hash() == adapter.content_hash()
    save_peft(adapter, tmp_path / "peft")
    for folder in ("folder", "peft"):
        model = pictures()
        lk.attach(model, Adapter.load(tmp_path / folder))
        torch.testing.assert_close(look(model), ours, rtol=0, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(pictures(), str(tmp_path / "peft"))
    torch.testing.assert_close(look(theirs), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kernels", "text"),
    [
        ({}, "first  has A (6, 9), B (18, 6), but the config says rank 2: was it trained with"),
        (KERNELS | {"third": 3}, "'third' is neither the path of a layer nor the end of one; the"),
        (KERNELS | {"first": 2}, "of rank 2 with a 2x2 kernel has A (4, 2·c_in), B (2·c_out, 4)"),
        (KERNELS | {"point": 0}, "point  has no kernel of size 0"),
        (KERNELS | {"head": 3}, "head  has A (2, 4), B (2, 2), but a convolution of rank 2 with"),
    ],
)
def test_wrong_kernel_sizes_are_refused(kernels: dict[str, int], text: str, tmp_path: Path) -> None:
    path = convolution_file(tmp_path / "a.pt")
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(path, config=CONVOLUTIONS, kernel_sizes=kernels)
    assert text in str(caught.value)
    assert "first, second, point" in str(caught.value) or "third" not in kernels


def test_a_grouped_convolution_is_refused_by_the_model(tmp_path: Path) -> None:
    tensors = {"0.lora_A": random(6, 12), "0.lora_B": random(9, 6)}  # Conv2d(4, 6, 3, groups=2)
    config = lk.LoRAConfig(rank=2, targets="0", modules_to_save=())
    adapter = Adapter.load(saved(tmp_path / "a.pt", tensors), config=config, kernel_sizes={"0": 3})
    with pytest.raises(AdapterFileError, match=r"0\.lora_a  shape \(18, 4, 3, 3\) in the adapter"):
        lk.attach(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), adapter)


def test_kernel_sizes_are_not_for_folders(tmp_path: Path) -> None:
    path = convolution_file(tmp_path / "a.pt")
    adapter = Adapter.load(path, config=CONVOLUTIONS, kernel_sizes=KERNELS)
    with pytest.raises(AdapterFileError, match=r"is a folder, .*: leave kernel_sizes out"):
        Adapter.load(adapter.save(tmp_path / "folder"), kernel_sizes=KERNELS)


def test_the_command_line_takes_kernel_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = convolution_file(tmp_path / "a.pt")
    words = ["convert", "--source", str(path), "--out", str(tmp_path / "out"), "--lora.rank", "2"]
    words += ["--lora.alpha", "3", "--lora.rank-pattern", "{second: 3}"]
    words += ["--lora.targets", "first,second,point,head", "--lora.modules-to-save", ""]
    assert main(words) == 2
    assert "kernel_sizes" in capsys.readouterr().err
    assert main([*words, "--kernel-sizes", "{first: 3, second: 4, point: 1}"]) == 0
    loaded = Adapter.load(path, config=CONVOLUTIONS, kernel_sizes=KERNELS)
    assert Adapter.load(tmp_path / "out").content_hash() == loaded.content_hash()


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
