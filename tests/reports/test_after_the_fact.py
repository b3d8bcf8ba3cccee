"""Models that are changed, saved or cast after an adapter was attached or merged."""

import copy
import pickle
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.attachment.state import active_name, adapter_names
from lorakit.errors import AttachError, TargetError
from tiny_models import build, example_inputs


def randomize(model: nn.Module, *, scale: float = 0.3) -> None:
    """Give every tensor of the active adapter random values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, active_name(model)):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def attached(*targets: str, tie: bool = True) -> nn.Module:
    model = build("llama", tie_word_embeddings=tie)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=targets))
    randomize(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**example_inputs(model)).logits


@pytest.mark.parametrize("targets", [("q",), ("embed",), ("head",), ("embed", "head")])
@pytest.mark.parametrize("end", [lk.unmerge, lk.detach])
def test_a_merged_model_that_was_cast_gives_the_cast_base_back(targets, end) -> None:
    model = attached(*targets)
    lk.merge(model)
    model.to(torch.bfloat16)
    end(model)
    if end is lk.unmerge:
        lk.switch(model, None)
    wanted = build("llama", tie_word_embeddings=True).to(torch.bfloat16)
    assert torch.equal(logits(model), logits(wanted))
    if end is lk.detach:
        own, theirs = model.state_dict(), wanted.state_dict()
        assert all(torch.equal(own[name], theirs[name]) for name in theirs)
        assert all(own[name].dtype == torch.bfloat16 for name in theirs)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_merge_after_a_cast_starts_from_the_cast_base() -> None:
    model = attached("embed", "head")
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("embed", "head")), name="other")
    randomize(model)
    lk.merge(model, "default")
    model.to(torch.bfloat16)
    lk.merge(model, "other", measure=False)
    found = logits(model)
    lk.unmerge(model)
    lk.merge(model, "other", measure=False)
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("targets", [("q",), ("embed",), ("q", "head")])
def test_a_resize_with_adapters_is_refused_and_changes_nothing(targets) -> None:
    model = attached(*targets)
    before = logits(model)
    with pytest.raises(AttachError, match="Resize the base first"):
        model.resize_token_embeddings(70)
    assert torch.equal(logits(model), before)
    lk.detach(model)
    model.resize_token_embeddings(70)
    assert logits(model).shape[-1] == 70


def test_a_layer_that_was_replaced_is_noticed() -> None:
    model = attached("q", "head")
    model.lm_head = nn.Linear(32, 64, bias=False)
    for use in (lk.extract, lk.merge):
        with pytest.raises(AttachError, match="lm_head  is another module now"):
            use(model)


def test_a_layer_that_was_resized_is_noticed() -> None:
    model = attached("q", "head", tie=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(70, 32))
    for use in (lk.extract, lk.merge):
        with pytest.raises(AttachError, match="lm_head  has another size now"):
            use(model)


def test_saving_the_model_warns_that_the_adapter_is_left_out(tmp_path: Path) -> None:
    model = attached("q")
    with pytest.warns(UserWarning, match="the folder will load as the base"):
        model.save_pretrained(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.merge(model)
        merged = logits(model)
        model.save_pretrained(tmp_path / "b")
        lk.unmerge(model)
        lk.switch(model, None)
        model.save_pretrained(tmp_path / "c")
        lk.detach(model)
        model.save_pretrained(tmp_path / "d")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(logits(again), merged)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_looks_at_its_own_adapters(copied, tmp_path: Path) -> None:
    model = attached("q")
    other = copied(model)
    lk.detach(model)
    with pytest.raises(AttachError, match="Resize the base first"):
        other.resize_token_embeddings(70)
    lk.detach(other)
    other.resize_token_embeddings(70)
    assert logits(other).shape[-1] == 70
    assert logits(model).shape[-1] == 64


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("inner", [False, True])
def test_a_model_that_holds_peft_s_layers_is_refused(inner: bool) -> None:
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model = theirs.base_model.model if inner else theirs
    for what in ("all-linear", "q"):
        with pytest.raises(AttachError, match="of peft: lorakit attaches to a base alone"):
            lk.attach(model, lk.LoRAConfig(rank=2, targets=(what,)))
    lk.attach(theirs.unload(), lk.LoRAConfig(rank=2, targets=("q",)))


class Table(nn.Module):
    """An embedding and a layer."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 8, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, 3)."""
        return self.head(self.table(ids))


IDS = torch.tensor([[0, 1, 2, 2, 4]])


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_padding_token_stays_the_base_s(init: str) -> None:
    model = Table(padding_idx=2)
    base = model(IDS).detach()
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("table",), init=init))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model(IDS).detach()
    torch.testing.assert_close(found[:, 2:4], base[:, 2:4], rtol=0, atol=1e-7)
    assert (found - base)[:, [0, 1, 4]].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("settings", [{"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_gradients_of_an_embedding_are_peft_s(settings) -> None:
    theirs = peft.get_peft_model(
        Table(**settings), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["table"])
    )
    layer = theirs.base_model.model.table
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    ours = Table(**settings)
    lk.attach(ours, lk.LoRAConfig(rank=2, targets=("table",)))
    parameters = dict(adapter_parameters(ours, "default"))
    with torch.no_grad():
        for parameter in (a, b):
            parameter.copy_(torch.randn(parameter.shape))
        parameters["table.lora_a"].copy_(a)
        parameters["table.lora_b"].copy_(b)
    for model in (ours, theirs):
        model(IDS).square().sum().backward()
    torch.testing.assert_close(parameters["table.lora_a"].grad, a.grad)
    torch.testing.assert_close(parameters["table.lora_b"].grad, b.grad)


def test_an_embedding_that_rescales_its_rows_is_refused() -> None:
    model = Table(max_norm=1.0)
    with pytest.raises(TargetError, match="its max_norm rescales rows of the weight"):
        lk.attach(model, lk.LoRAConfig(rank=2, targets=("table", "head")))
    assert adapter_names(model) == ()
