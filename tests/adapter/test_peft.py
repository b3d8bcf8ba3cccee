"""Folders go to PEFT and come from PEFT with the same outputs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lorakit as lk
from adapter.handmade import IN_OWN_FORM, MAKERS
from covering import sampled
from lorakit.adapter.adapter import Adapter
from lorakit.errors import AdapterFileError
from tiny_models import build, example_inputs

# What PEFT says of the settings of these tests, and of its own affairs.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`",
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:Could not identify embedding layer",
    "ignore:LoRA adapter added to ConvNd layer with groups > 1",
    "ignore:Adapter 'default'",
    "ignore:Model has `tie_word_embeddings=True`",
)
Settings = dict[str, Any]


class Convolutions(nn.Module):
    """Convolutions; without dilation and padding modes, which PEFT's A leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 8, (1, 3), groups=2, padding=1)
        self.point = nn.Conv2d(8, 4, 1)
        self.time = nn.Conv1d(4, 5, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 5, length)."""
        x = self.point(self.grouped(self.image(x)))
        return self.time(x.flatten(2))


class Tables(nn.Module):
    """An embedding and a head, with biases, in no way like a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, length, 3)."""
        return self.head(self.body(self.table(x)))


def make(family: str) -> nn.Module:
    own = {"convolutions": Convolutions, "tables": Tables}
    if family not in own:
        return build(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return own[family]().eval()


def output(model: nn.Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if family == "convolutions":
            return model(torch.randn(2, 3, 9, 9, generator=generator))
        if family == "tables":
            return model(torch.randint(0, 20, (2, 5), generator=generator))
        return model(**example_inputs(make(family))).logits


def shake(parameters: list[nn.Parameter]) -> None:
    """Move what is trained away from its start, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def trained(parameters: Any) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


FROM_PEFT: tuple[tuple[str, Settings], ...] = (
    ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 7}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 4, "1.self_attn.v_proj": 2, "v_proj": 3},
            "alpha_pattern": {"k_proj": 3, r"layers\.0\.mlp.*": 5},
            "use_rslora": True,
        },
    ),
    ("llama", {"target_modules": r".*\.0\..*_proj", "exclude_modules": ["o_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    (
        "llama",
        {"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    ("gpt2", {"target_modules": ["c_attn", "wte"], "bias": "all", "task_type": "CAUSAL_LM"}),
    ("bert", {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    ("roberta", {"target_modules": ["value"], "modules_to_save": ["classifier"]}),
    ("t5", {"target_modules": ["q", "v"]}),
    ("llama", {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"q_proj": 3}}),
    ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "use_rslora": True}),
    ("bert", {"target_modules": ["query"], "use_dora": True, "bias": "all"}),
    ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    ("convolutions", {"target_modules": ["image", "point", "time"], "init_lora_weights": False}),
    ("convolutions", {"target_modules": ["image", "point", "time"], "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all", "use_rslora": True}),
    ("convolutions", {"target_modules": ["image", "time"], "lora_bias": True}),
    ("tables", {"target_modules": ["table", "body.0"], "modules_to_save": ["head"], "bias": "all"}),
)


@sampled(
    ("family", "settings"),
    FROM_PEFT,
    share=2,
    ids=[f"{f}{i}" for i, (f, _) in enumerate(FROM_PEFT)],
)
def test_an_adapter_of_peft_gives_the_same_outputs_here_and_back_there(
    family: str, settings: Settings, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(make(family), peft.LoraConfig(**settings))
    shake(trained(theirs.parameters()))
    theirs.eval().save_pretrained(str(tmp_path / "peft"))
    expected = output(theirs, family)
    assert (expected - output(make(family), family)).abs().max() > 1e-3

    adapter = Adapter.load(tmp_path / "peft")
    ours = make(family)
    lk.attach(ours, adapter)
    torch.testing.assert_close(output(ours, family), expected, rtol=0, atol=1e-5)

    again = lk.extract(ours).save(tmp_path / "lorakit")
    assert Adapter.load(again).content_hash() == adapter.content_hash()
    back = peft.PeftModel.from_pretrained(make(family), again)
    torch.testing.assert_close(output(back.eval(), family), expected, rtol=0, atol=1e-5)


TO_PEFT: tuple[tuple[str, lk.LoRAConfig], ...] = (
    ("llama", lk.LoRAConfig(rank=4, alpha=7, targets="q,v,embed,head")),
    (
        "llama",
        lk.LoRAConfig(
            rank=4,
            alpha_pattern={"q": 3},
            rank_pattern={"down": 2, "re:.*1.mlp.*": 6},
            targets="q,mlp",
        ),
    ),
    ("gpt2", lk.LoRAConfig(rank=4, alpha=8, targets="q,v", bias="lora")),
    (
        "gpt2",
        lk.LoRAConfig(
            rank=3, alpha=1, targets="q,v", rank_pattern={"v": 6}, alpha_pattern={"v": 2}
        ),
    ),
    ("gpt2", lk.LoRAConfig(rank=3, targets="k,v,c_proj", use_rslora=True)),
    ("gpt2", lk.LoRAConfig(rank=4, targets="c_attn", layers="1")),
    ("gpt_neox", lk.LoRAConfig(rank=4, targets="q,v")),
    ("phi3", lk.LoRAConfig(rank=4, targets="k,gate")),
    ("bert", lk.LoRAConfig(rank=4, targets="q,v", bias="all")),
    ("llama", lk.LoRAConfig(rank=4, alpha=7, targets="q,down,head,embed", use_dora=True)),
    ("gpt2", lk.LoRAConfig(rank=4, targets="c_attn,down", use_dora=True, bias="lora")),
    ("bert", lk.LoRAConfig(rank=3, targets="q,v", use_dora=True, use_rslora=True)),
    ("llama", lk.LoRAConfig(rank=4, targets="q,v", init="pissa", rank_pattern={"v": 3})),
    ("gpt2", lk.LoRAConfig(rank=3, alpha=5, targets="q,v", init="pissa", use_rslora=True)),
    ("convolutions", lk.LoRAConfig(rank=3, targets="image,grouped,point", init="pissa")),
    ("convolutions", lk.LoRAConfig(rank=4, targets="image,grouped,point,time")),
    (
        "convolutions",
        lk.LoRAConfig(rank=3, alpha=5, targets="image,point,time", use_dora=True, bias="lora"),
    ),
    ("gpt2", lk.LoRAConfig(rank=3, targets="q,v,up", lora_bias=True, alpha_pattern={"v": 6})),
    ("convolutions", lk.LoRAConfig(rank=4, targets="image,grouped,point", lora_bias=True)),
    ("tables", lk.LoRAConfig(rank=4, targets="table,0", modules_to_save="head", bias="lora")),
)


@sampled(
    ("family", "config"), TO_PEFT, share=2, ids=[f"{f}{i}" for i, (f, _) in enumerate(TO_PEFT)]
)
def test_an_adapter_made_here_gives_the_same_outputs_in_peft(
    family: str, config: lk.LoRAConfig, tmp_path: Path
) -> None:
    ours = make(family)
    lk.attach(ours, config)
    shake(trained(ours.parameters()))
    expected = output(ours, family)
    adapter = lk.extract(ours)
    folder = adapter.save(tmp_path / "a")
    assert Adapter.load(folder).content_hash() == adapter.content_hash()

    theirs = peft.PeftModel.from_pretrained(make(family), folder).eval()
    torch.testing.assert_close(output(theirs, family), expected, rtol=0, atol=1e-5)
    adapted = {n for n, layer in theirs.named_modules() if isinstance(layer, LoraLayer)}
    assert adapted == {f"base_model.model.{site.path}" for site in adapter.sites}


def test_slices_of_unequal_scale_give_the_same_outputs_in_peft(tmp_path: Path) -> None:
    config = lk.LoRAConfig(rank=4, alpha=4, targets="q,v", alpha_pattern={"v": 16})
    test_an_adapter_made_here_gives_the_same_outputs_in_peft("gpt2", config, tmp_path)


@pytest.mark.parametrize("made", IN_OWN_FORM, ids=lambda made: made.__name__)
def test_peft_refuses_what_it_cannot_express(made: Callable[[], Adapter], tmp_path: Path) -> None:
    folder = made().save(tmp_path / "a")
    with pytest.raises(KeyError, match="peft_type"):
        peft.PeftModel.from_pretrained(make("tables"), folder)


@pytest.mark.parametrize("made", MAKERS, ids=lambda made: made.__name__)
def test_the_config_holds_only_what_peft_knew_in_0_14(
    made: Callable[[], Adapter], tmp_path: Path
) -> None:
    config = json.loads((made().save(tmp_path / "a") / "adapter_config.json").read_text())
    known = """alpha_pattern auto_mapping base_model_name_or_path bias eva_config exclude_modules
        fan_in_fan_out inference_mode init_lora_weights layer_replication layers_pattern
        layers_to_transform loftq_config lora_alpha lora_bias lora_dropout megatron_config
        megatron_core modules_to_save peft_type r rank_pattern revision target_modules task_type
        use_dora use_rslora"""
    assert made in IN_OWN_FORM or set(config) <= set(known.split())


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


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["updates", "copies"],
)
def test_layers_that_peft_ties_are_each_read(settings: Settings, tmp_path: Path) -> None:
    base = build("llama", tie_word_embeddings=True)
    config = peft.LoraConfig(ensure_weight_tying=True, **settings)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shake(trained(theirs.parameters()))
    theirs.eval().save_pretrained(str(tmp_path / "peft"))
    expected = output(theirs, "llama")
    ours = copy.deepcopy(base)
    lk.attach(ours, tmp_path / "peft")
    torch.testing.assert_close(output(ours, "llama"), expected, rtol=0, atol=1e-5)
    adapter = lk.extract(ours)
    assert adapter.lora is not None
    assert adapter.lora.ensure_weight_tying
    again = adapter.save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), again).eval()
    torch.testing.assert_close(output(back, "llama"), expected, rtol=0, atol=1e-5)


def test_tied_layers_with_dora_keep_their_own(tmp_path: Path) -> None:
    base = build("llama", tie_word_embeddings=True)
    config = peft.LoraConfig(
        ensure_weight_tying=True, use_dora=True, target_modules=["q_proj", "embed_tokens"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shake(trained(theirs.parameters()))
    theirs.eval().save_pretrained(str(tmp_path / "peft"))
    expected = output(theirs, "llama")
    lk.attach(base, tmp_path / "peft")
    torch.testing.assert_close(output(base, "llama"), expected, rtol=0, atol=1e-5)
    adapter = lk.extract(base)
    assert "lorakit trains DoRA of each layer for itself" in "".join(adapter.unverified)
    back = Adapter.load(adapter.save(tmp_path / "ours"))
    assert back.content_hash() == adapter.content_hash()


def test_tied_layers_that_came_apart_in_peft_keep_their_own(tmp_path: Path) -> None:
    config = peft.LoraConfig(ensure_weight_tying=True, target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(build("llama", tie_word_embeddings=True), config)
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n: t + float("lm_head" in n) for n, t in tensors.items()}, file)
    adapter = Adapter.load(tmp_path)
    assert adapter.lora is not None
    assert not adapter.lora.ensure_weight_tying
    assert all(site.tied_to is None for site in adapter.sites)
    assert "that tied layers were trained as one" in "".join(adapter.unverified)


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
    from lorakit.adapter.peft_config import PeftConfig
    from lorakit.adapter.peft_read import read_peft

    config = PeftConfig.model_validate(json.loads((plain / "adapter_config.json").read_text()))
    adapter, problems = read_peft(config, tensors)
    assert adapter is not None
    assert problems == []
    assert adapter.copied_modules == ("head", "model.embed_tokens")
    note = "why model.embed_tokens.weight is in the file: it is taken as a full copy"
    assert note in adapter.unverified
