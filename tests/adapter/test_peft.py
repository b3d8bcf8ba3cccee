"""Adapters go to PEFT and come from PEFT with the same outputs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer

import lorakit as lk
from adapter.handmade import IN_OWN_FORM, MAKERS
from adapter.peft_models import PEFTS_WARNINGS, Settings, make, output, shake, trained
from covering import sampled
from lorakit.adapter.adapter import Adapter
from tiny_models import build

pytestmark = PEFTS_WARNINGS

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
